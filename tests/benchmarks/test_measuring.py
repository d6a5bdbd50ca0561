"""Statistics, table and file of the benchmarks; one small run with real engines.

Run: pytest tests/benchmarks/test_measuring.py
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import concurrency, oneshot, verdict
from benchmarks.arms.base import Job, Setup, made_texts
from benchmarks.arms.lineup import CLIENTS, made, names
from benchmarks.arms.vllm_server import parsed_rows
from benchmarks.measuring import (
    Measured,
    Run,
    Sample,
    fastest,
    interleave,
    ratio,
    table,
    turned,
    write,
)
from benchmarks.models import checkpoint
from benchmarks.processes import what_failed
from benchmarks.progress import Progress
from benchmarks.trainer_load import Append
from tests.cores import own_core
from tests.rounds import in_the_long_round
from tests.waiting import LIMIT_S

ROOT = Path(__file__).resolve().parents[2]


def measured(*seconds: float, error: str | None = None) -> Measured:
    return Measured(
        description="made up",
        samples=[Sample(seconds=s, figures={"rows_per_s": 10 / s}) for s in seconds],
        error=error,
    )


ARMS = {
    "driftline": measured(2.0, 1.0, 9.0),
    "vllm_openai": measured(20.0, 30.0, 25.0),
    "vllm_openai_cached": measured(3.0, 3.0, 3.0),
    "vllm_token_ids": measured(error="did not start: StartError: [V2] requires Triton"),
    "floor": measured(1.0, 1.5, 2.0),
}


def test_ratios_are_of_medians_and_null_for_a_failed_arm() -> None:
    ratios = verdict.named_ratios(ARMS)
    assert ratios == {
        "vllm_openai_over_driftline": 12.5,
        "vllm_openai_cached_over_driftline": 1.5,
        "vllm_token_ids_over_driftline": None,
        "vllm_best_over_driftline": 1.5,
        "driftline_over_floor": 1.3333,
    }


def test_trls_client_is_compared_with_itself_against_vllm() -> None:
    arms = ARMS | {"trl_client": measured(2.0), "trl_client_vllm": measured(15.0)}
    assert verdict.named_ratios(arms)["trl_client_vllm_over_trl_client"] == 7.5


def test_an_arm_that_fails_in_a_late_repeat_has_no_median() -> None:
    arms = ARMS | {"driftline": measured(1.0, 1.0, error="RuntimeError: gone")}
    assert arms["driftline"].median_s is None
    assert set(verdict.named_ratios(arms).values()) == {None}
    assert fastest(arms, ["driftline", "vllm_token_ids"]) is None
    assert ratio(arms, "floor", "no such arm") is None


def test_one_shot_ratios_compare_within_a_batch() -> None:
    found = {f"{name}_b{batch}": arm for name, arm in ARMS.items() for batch in (1, 8)}
    found["driftline_b8"] = measured(0.5)
    ratios = oneshot.named_ratios(found, list(ARMS), 8)
    assert ratios["vllm_openai_over_driftline_b8"] == 50.0
    assert ratios["vllm_best_over_driftline_b8"] == 6.0
    assert ratios["vllm_token_ids_over_driftline_b8"] is None
    assert oneshot.named_ratios(found, list(ARMS), 1)["driftline_over_floor_b1"] == 1.3333


def test_the_table_shows_the_error_of_a_failed_arm() -> None:
    out = io.StringIO()
    shown = table("title", ARMS, reference="driftline", figures={"rows_per_s": ".1f"})
    Console(file=out, width=80).print(shown)
    text = out.getvalue()
    assert "vllm_token_ids: did not start: StartError: [V2] requires Triton" in text
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if "│" in line}
    assert "failed" in rows["vllm_token_ids"]
    assert "1.000 - 9.000" in rows["driftline"]
    assert "12.50" in rows["vllm_openai"]


def test_the_file_has_every_arm_and_where_it_was_made(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "result.json"
    write(path, ARMS, verdict.named_ratios(ARMS), {"k": 32})
    content = json.loads(path.read_text())
    assert set(content["made"]) == {"at", "commit", "machine", "versions", "command"}
    assert content["settings"] == {"k": 32}
    assert set(content["arms"]) == set(ARMS)
    ours, failed = content["arms"]["driftline"], content["arms"]["vllm_token_ids"]
    assert ours["seconds"] == [2.0, 1.0, 9.0]
    assert ours["median"] == 2.0
    assert ours["spread"] == [1.0, 9.0]
    assert ours["error"] is None
    assert ours["figures"]["rows_per_s"]["median"] == 5.0
    assert failed["median"] is None
    assert failed["spread"] is None
    assert "requires Triton" in failed["error"]
    assert content["ratios"]["vllm_token_ids_over_driftline"] is None
    assert str(ROOT) not in path.read_text()
    assert list(path.parent.iterdir()) == [path]


async def test_arms_take_turns_and_one_that_fails_stops_alone() -> None:
    order: list[tuple[str, int]] = []

    def run(name: str) -> Run:
        async def once(repeat: int) -> Sample:
            order.append((name, repeat))
            if name == "b" and repeat == 1:
                raise ValueError("rows are missing\nand more")
            if name == "c":
                await asyncio.sleep(10)
            return Sample(seconds=1.0)

        return once

    arms = {name: Measured() for name in "abcd"}
    arms["d"].error = "did not start"
    calls = {name: run(name) for name in arms}
    await interleave(calls, arms, repeats=3, pause_s=0.0, limit_s=0.05)
    warm_up, *later = [[name for name, r in order if r == repeat] for repeat in range(-1, 3)]
    assert warm_up == ["a", "b", "c"]
    assert later == [["a", "b"], ["b", "a"], ["a"]]
    assert [len(arm.samples) for arm in arms.values()] == [3, 1, 0, 0]
    assert arms["b"].error == "ValueError: rows are missing"
    assert arms["c"].error == "no result within 0 s"
    assert arms["d"].error == "did not start"


async def test_a_run_that_was_cut_off_goes_on_where_it_was(tmp_path: Path) -> None:
    order: list[tuple[str, int]] = []

    def calls(give_up_after: int) -> dict[str, Run]:
        def run(name: str) -> Run:
            async def once(repeat: int) -> Sample:
                if len(order) == give_up_after:
                    raise asyncio.CancelledError
                order.append((name, repeat))
                return Sample(seconds=1.0 + repeat, figures={"rows_per_s": 2.0})

            return once

        return {name: run(name) for name in "ab"}

    async def measure(settings: dict[str, object], give_up_after: int = -1) -> dict[str, Measured]:
        arms = {name: Measured() for name in "ab"}
        progress = Progress(tmp_path / "result.json", settings)
        progress.restore(arms)
        order.clear()
        await interleave(
            calls(give_up_after),
            arms,
            repeats=3,
            pause_s=0.0,
            kept=lambda: progress.keep(arms),
        )
        progress.done()
        return arms

    with pytest.raises(asyncio.CancelledError):
        await measure({"lengths": (1, 2)}, give_up_after=5)
    cut_off = (tmp_path / "result.progress").read_bytes()
    arms = await measure({"lengths": (1, 2)})
    assert order == [("a", -1), ("b", -1), ("a", 1), ("a", 2), ("b", 2)]
    assert [[s.seconds for s in arm.samples] for arm in arms.values()] == [[1.0, 2.0, 3.0]] * 2
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "result.progress").write_bytes(cut_off)
    await measure({"lengths": (1, 3)})
    assert len(order) == 8, "samples of other settings are not gone on from"


def test_turns() -> None:
    assert turned("abc", 4) == ["b", "c", "a"]
    assert turned([], 3) == []


def test_a_job_makes_the_same_texts_again_and_others_with_another_seed() -> None:
    job = Job(seed=1, prompt=5, response=10, piece=4, texts=2)
    assert job.pieces() == [(0, 4), (4, 8), (8, 10)]
    first, again = (made_texts(job, vocab_size=100, k=8) for _ in range(2))
    assert all(
        (a.candidate_ids == b.candidate_ids).all() for a, b in zip(first, again, strict=True)
    )
    assert (first[0].response_ids != first[1].response_ids).any()
    assert all(len(set(row)) == 8 for row in first[0].candidate_ids.tolist())
    assert len(first[0].upto(4)) == 9
    assert first[0].candidate_ids.max() < 100


def test_rows_of_vllms_json() -> None:
    row = {
        "7": {"logprob": -9.0, "rank": 40, "decoded_token": None},
        "3": {"logprob": -1.0, "rank": 1, "decoded_token": "t3"},
        "5": {"logprob": -2.0, "rank": 2, "decoded_token": "t5"},
    }
    assert parsed_rows([row, row], k=2) == 2


def append(sent: float, answered: float, rows: int = 64) -> Append:
    return Append(sent, answered, queue_s=0.1, engine_s=0.5, rows=rows)


def test_shares_count_what_was_done_until_the_first_trainer_ended() -> None:
    quick = [append(10, 11), append(11, 12)]
    slow = [append(10, 11), append(11, 13), append(13, 14)]
    assert concurrency.shares([quick, slow]) == [128.0, 96.0]
    assert concurrency.jain_index([5, 5, 5, 5]) == 1.0
    assert concurrency.jain_index([1, 0, 0, 0]) == 0.25
    sample = concurrency.sample([quick, slow], started_at=10.0)
    assert sample.seconds == 4.0
    assert sample.figures["rows_per_s"] == 80.0
    assert sample.figures["append_p50_s"] == 1.0
    assert sample.figures["engine_s"] == 0.5


def test_concurrency_ratios() -> None:
    figures = {"rows_per_s": 90.0, "append_p95_s": 0.9, "engine_s": 0.5, "jain_index": 0.99}
    found = {
        "s64_t1": Measured(samples=[Sample(seconds=1.0, figures=figures)]),
        "s64_t4": Measured(error="RuntimeError: gone"),
        "oneshot_b64": Measured(samples=[Sample(seconds=1.0, figures={"rows_per_s": 100.0})]),
    }
    assert concurrency.named_ratios(found, 64) == {
        "throughput_s64_t1_over_oneshot_b64": 0.9,
        "append_p95_over_engine_s64_t1": 1.8,
        "throughput_s64_t4_over_oneshot_b64": None,
        "append_p95_over_engine_s64_t4": None,
        "jain_index_s64_t4": None,
    }


def test_every_arm_says_what_it_is(tiny_setup: Setup) -> None:
    for name in [*names([32, 64]), *CLIENTS]:
        assert len(made(name, tiny_setup).description) > 40
    with pytest.raises(ValueError, match="no arm is called 'vllm'"):
        made("vllm", tiny_setup)


@pytest.fixture
def tiny_setup() -> Setup:
    return Setup(model="nowhere", vocab_size=4096)


def test_what_failed_is_the_line_that_names_the_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "WARNING an error may follow\n"
        "  Value error, V2 requires Triton. [type=value_error, in={}]\n"
        "    For further information visit somewhere/errors\n\n"
    )
    assert what_failed(log) == "Value error, V2 requires Triton."
    log.write_text("nothing wrong\nlast words\n")
    assert what_failed(log) == "last words"


@pytest.mark.vllm
@pytest.mark.e2e
@in_the_long_round
def test_verdict_runs_with_a_tiny_model(tmp_path: Path) -> None:
    path, arms = tmp_path / "verdict.json", ["driftline", "transformers", "floor"]
    checkpoint("tiny")  # here, where transformers is imported, it takes no seconds
    command = [sys.executable, "-m", "benchmarks.verdict", "--quick", "--model", "tiny", "--eager"]
    command += ["--dtype", "float32", "--arms", *arms]
    command += ["--repeats", "2"]
    command += [
        "--cores",
        own_core(),
        "--prompt",
        "64",
        "--prefix",
        "192",
        "--kv-cache-gib",
        "0.25",
        "--json",
        str(path),
    ]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "proto")])}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=3 * LIMIT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(path.read_text())
    assert list(content["arms"]) == arms
    assert {len(arm["seconds"]) for arm in content["arms"].values()} == {2}, content
    ratios = content["ratios"]
    measured_arms = {"transformers_over_driftline": "transformers", "driftline_over_floor": "floor"}
    for name, other in measured_arms.items():
        assert (ratios.get(name) is not None) == (other in arms)
    assert content["settings"]["piece"] == 64
    assert "driftline" in done.stdout
