"""The arithmetic of capacity against the fake engine on a clock that is told, and a small real run.

Run: python -m pytest tests/benchmarks/test_capacity.py. No figure here depends on how fast a
machine is; fleets against real servers are `python -m benchmarks.capacity`.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.capacity import __main__ as command
from benchmarks.capacity import day, plan
from benchmarks.capacity.arithmetic import TeacherSpeed, forecast, most_trainers
from benchmarks.capacity.fleets import FLEETS, PLAIN, QUICK, Fleet
from benchmarks.capacity.trainers import Seen, SimulatedTrainer
from teacher_server.engine.fake_engine import FakeEngine
from teacher_wire.records import TokenSpan

SECONDS = 1500.0


class ToldClock(asyncio.SelectorEventLoop):
    """A loop whose time goes on only when nothing else can."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        loop: Any = self
        if not loop._ready and loop._scheduled:
            self.now = max(self.now, loop._scheduled[0]._when)
        super()._run_once()  # type: ignore[misc]


@dataclass
class Rows:
    """As many as were asked for."""

    offset: int
    length: int

    def __len__(self) -> int:
        return self.length


class Client:
    """Of replicas that take a step's time and make no rows."""

    info = SimpleNamespace(vocab_size=64, max_append_tokens=4096)

    def __init__(self, engines: list[FakeEngine], rng: random.Random) -> None:
        self._engines, self._rng = engines, rng
        self.tokens, self.open_s = 0, 0.0

    def open(self, *_: object) -> Any:
        engine, loop = self._rng.choice(self._engines), asyncio.get_running_loop()
        opened: list[float] = []

        async def append(span: TokenSpan) -> Any:
            opened.append(loop.time())
            await engine._in_a_step(len(span), None)
            self.tokens += len(span)
            return SimpleNamespace(rows=Rows(span.offset, len(span)))

        async def close() -> None:
            self.open_s += loop.time() - opened[0] if opened else 0.0

        return SimpleNamespace(append=append, close=close)


async def simulated(fleet: Fleet) -> dict[str, tuple[float, float]]:
    """Seen and forecast."""
    engines = [
        FakeEngine(
            prefill_tokens_per_s=fleet.speed.tokens_per_s,
            base_latency_s=fleet.speed.step_s,
            step_tokens=fleet.speed.step_tokens,
        )
        for _ in range(fleet.replicas)
    ]
    client, seen = Client(engines, random.Random(0)), Seen()
    trainers = [
        asyncio.create_task(SimulatedTrainer(client, fleet.load, seen, seed=i).steps())  # type: ignore[arg-type]
        for i in range(fleet.trainers)
    ]
    await asyncio.sleep(SECONDS)
    for trainer in trainers:
        trainer.cancel()
    await asyncio.gather(*trainers, return_exceptions=True)
    for engine in engines:
        await engine.close()
    await asyncio.sleep(1.0)
    said = forecast(
        seen.drawn(fleet.load), trainers=fleet.trainers, speed=fleet.speed, replicas=fleet.replicas
    )
    step_s = sum(seen.rollouts_s) / seen.steps + sum(seen.learnt_s) / len(seen.learnt_s)
    return {
        "tokens_per_s": (client.tokens / SECONDS, said.tokens_per_s),
        "step_s": (step_s, said.step_s),
        "open_sessions": (client.open_s / SECONDS, said.open_sessions),
        "append_s": (seen.append_s / seen.appends, said.append_s),
    }


@pytest.mark.parametrize("name", FLEETS)
def test_the_arithmetic_holds_on_a_clock_that_is_told(name: str) -> None:
    loop = ToldClock()
    try:
        found = loop.run_until_complete(simulated(FLEETS[name]))
    finally:
        loop.close()
    for figure in ("tokens_per_s", "step_s", "open_sessions"):
        seen, said = found[figure]
        assert seen == pytest.approx(said, rel=0.1), (figure, seen, said)
    seen, said = found["append_s"]
    if name in ("one", "half_full", "many_rollouts", "slow_teacher"):  # below half
        assert seen == pytest.approx(said, rel=0.15), (seen, said)


def test_a_teacher_that_is_always_wanted_gives_all_it_can() -> None:
    steady = replace(PLAIN, learn_s=0.001)
    said = forecast(steady, trainers=40, speed=QUICK)
    assert said.used_share == pytest.approx(1.0, abs=0.01)
    assert said.tokens_per_s == pytest.approx(QUICK.most_tokens_per_s, rel=0.01)
    assert said.step_s == pytest.approx(40 * steady.step_tokens / QUICK.most_tokens_per_s, rel=0.01)


def test_more_trainers_are_never_faster_and_more_replicas_never_slower() -> None:
    steps = [forecast(PLAIN, trainers=n, speed=QUICK).step_s for n in range(1, 20)]
    assert steps == sorted(steps)
    fewer, more = (most_trainers(PLAIN, speed=QUICK, replicas=n) for n in (1, 2))
    assert 1 < fewer < more <= 2 * fewer + 1


def test_a_model_is_given_the_room_that_its_card_has() -> None:
    config, ranks = plan.MODELS["Qwen3-8B"]
    one = plan.Teacher(config, ranks, plan.CARDS["H200"])
    two = plan.Teacher(config, 2, plan.CARDS["H200"])
    assert one.kv_tokens * 147_456 < (139 * 0.9 - 15.2) * 2**30
    assert two.kv_tokens > 2 * one.kv_tokens, "each holds half of the weights, and half of a token"
    assert two.speed.most_tokens_per_s < 2 * one.speed.most_tokens_per_s
    measured = plan.Teacher(plan.MODELS["Qwen3-1.7B"][0], 1, 139.0).speed
    assert 8192 / measured.tokens_per_s == pytest.approx(0.084 + 0.0334)


def test_the_tables_of_the_document_are_those_of_the_arithmetic() -> None:
    text = plan.DOCUMENT.read_text("utf-8")
    assert plan.with_tables(text) == text, "python -m benchmarks.capacity --plan"


def test_an_hour_of_trainers_that_come_and_go_loses_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real server and real clients, a moment of each: counts, no times."""
    monkeypatch.setattr(day, "FASTER", 900.0)
    monkeypatch.setattr(day, "PLACES", 2)
    monkeypatch.setattr(day, "SAMPLE_S", 0.5)
    monkeypatch.setattr(day, "PAUSE_S", (60.0, 200.0))
    monkeypatch.setattr(day, "LIFE_S", (600.0, 1200.0))
    monkeypatch.setattr(day, "KILLED_SHARE", 1.0)
    monkeypatch.setattr(day, "LIMITS", {**day.LIMITS, "--session-ttl-s": 2})
    monkeypatch.setattr(day, "SPEED", TeacherSpeed(tokens_per_s=20, step_s=9.0, step_tokens=2048))
    said = asyncio.run(day.run_day(tmp_path / "day.json", 1, lambda line: None))
    assert day.broken(said) == []
    assert said["rows_received"] > 0
    assert said["killed"] > 0
    assert not (tmp_path / "day.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--at-once 0", "--at-once: 0, must be at least 1"),
        ("--repeats 0", "--repeats: 0, must be at least 1"),
        ("--hours -1", "--hours: -1, must be at least 1"),
        ("--hours 1.5", "--hours: invalid count value: '1.5'"),
        ("--seconds -1", "--seconds: -1 s, must be more than 0"),
        ("--seconds nan", "--seconds: nan s, must be more than 0"),
    ],
)
def test_a_number_without_sense_is_refused(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.parser().parse_args(words.split())
    assert message in capsys.readouterr().err
    given = command.parser().parse_args(["--at-once", "1", "--seconds", "0.5"])
    assert (given.at_once, given.seconds) == (1, 0.5)
