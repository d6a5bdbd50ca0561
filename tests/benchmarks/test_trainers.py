"""TRL beside ours: what runs come to, and whether both did the same work; starts neither.

Run: python -m pytest tests/benchmarks/test_trainers.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.trainers import environment, memory, pairs, running
from benchmarks.trainers.__main__ import main, parser, size
from benchmarks.trainers.load import _own_s, busy_s, processor_s
from benchmarks.trainers.memory import Peaks, proportional_bytes, tree
from benchmarks.trainers.pairs import ARMS, PAIRS
from benchmarks.trainers.results import (
    Results,
    measured,
    ratios,
    seconds_to,
    undisturbed,
)
from benchmarks.trainers.running import differences, record_of
from benchmarks.trainers.task import Task, phases_apart, prompts_digest
from student_trainer.settings.config import load_config
from tests.rounds import in_the_long_round

PLAYGROUND = PAIRS["playground"]
STARTED = 2150.0
TRL_LINES = """\
{"event": "ready", "at": 2157.9}
{"event": "first_token", "at": 2158.5}
{"event": "step", "at": 2163.1, "step": 1, "seconds": 4.8, "phases": {"generate": 0.5, "teacher": 0.9, "loss": 0.2, "backward": 1.2, "update": 1.9, "other": 0.1}, "rollouts": 2, "generated_tokens": 16, "longest": 8, "prompt_tokens": 24, "prompts": "4691598f2539144a", "loss_tokens": 16, "loss": 0.027, "learning_rate": 0.00025}
{"event": "step", "at": 2170.4, "step": 2, "seconds": 7.2, "phases": {"generate": 3.9, "teacher": 1.7, "loss": 0.2, "backward": 0.8, "update": 0.5, "other": 0.1}, "rollouts": 2, "generated_tokens": 16, "longest": 8, "prompt_tokens": 24, "prompts": "ae79b12719a6bf3e", "loss_tokens": 16, "loss": 0.005, "learning_rate": 0.0005}
{"event": "done", "at": 2170.5, "settings": {"max_tokens": 8, "temperature": 1.0, "temperature_of_loss": 1.0, "top_p": 1.0, "dtype": "float32", "sampler_dtype": "float32", "teacher_dtype": "float32", "betas": [0.9, 0.95], "weight_decay": 0.0, "max_grad_norm": 1.0, "updates_a_step": 1, "autocast": false, "gradient_checkpointing": false, "teacher_weight_bytes": 2625792}}
"""  # noqa: E501 - as TRL 1.16.0 was recorded
STEPS = 2


@cache
def task(arm: str = "trl") -> Task:
    """The work of the recorded run."""
    pair = replace(PLAYGROUND, rollouts=2, max_tokens=8)
    out = Path("out")
    return pairs.task(pair, ARMS[arm], seed=0, steps=STEPS, out=out, teacher="127.0.0.1:1")


def recorded() -> dict[str, Any]:
    events = [json.loads(line) | {"others_cores": 0.0} for line in TRL_LINES.splitlines()]
    return record_of(events, STARTED)


def run(
    number: int, seconds: list[float], *, start_up: float = 10.0, peak: float = 1000.0, **more: Any
) -> dict[str, Any]:
    """A record of a run, 100 tokens a step."""
    steps = [
        {
            "step": index + 1,
            "seconds": value,
            "phases": {"generate": value / 2, "sync": value / 10},
            "generated_tokens": 100,
            "prompt_tokens": 10,
            "others_cores": 0.02,
        }
        for index, value in enumerate(seconds)
    ]
    return {
        "round": number,
        "of": "work",
        "commit": "code",
        "ready_s": start_up - 1,
        "start_up_s": start_up,
        "others_cores_at_start": 0.02,
        "quiet_cores": 0.1,
        "steps": steps,
        "settings": {},
        "peak_mib": {"trainer": peak, "shared": 0.0},
        **more,
    }


def heldout(**by_step: float) -> dict[str, dict[str, float]]:
    return {step.removeprefix("step"): {"reverse_kl": kl} for step, kl in by_step.items()}


def test_both_trainers_are_given_the_same_work() -> None:
    """Prompts, limits, temperature, learning rates, batch: the arms of a pair differ in none, but
    for the one that is named for its updates."""
    ours, *others = [task(name) for name, arm in ARMS.items() if arm.steps is None]
    for other in others:
        assert replace(other, arm=ours.arm, overrides=ours.overrides) == ours
    assert (ours.steps, ours.rollouts) == (STEPS, 2)


@pytest.mark.parametrize("arm", [name for name, arm in ARMS.items() if arm.mode is None])
def test_our_configuration_is_what_the_task_says(arm: str) -> None:
    given = task(arm)
    config = load_config(Path(given.config), given.overrides)
    assert config.longest_response == given.max_tokens
    assert config.rollout.temperature == given.temperature
    assert config.rollout.prompts_per_step == given.rollouts
    assert (config.optim.betas, config.optim.weight_decay) == (given.betas, given.weight_decay)
    assert config.optim.epochs * config.optim.updates_per_epoch == given.updates
    assert given.updates == (8 if arm == "driftline_updates" else 1)
    assert len(given.learning_rates) == given.updates * given.steps
    assert config.student.dtype == given.dtype
    assert config.data.heldout is None
    assert config.drift.stop_in_flight == arm.endswith(("stop", "updates"))
    kinds = {"driftline": "vllm", "driftline_batched": "hf_batched", "driftline_hf": "hf"}
    kinds["driftline_updates"] = "hf_batched"
    assert config.sampler.kind == kinds[arm.removesuffix("_stop")]


def test_learning_rates_are_those_of_our_schedule() -> None:
    given = task()
    config = load_config(Path(given.config), given.overrides)
    # Two steps of warm-up, and no third.
    assert given.learning_rates == [config.optim.learning_rate / 2, config.optim.learning_rate]


def test_the_same_work_has_the_same_digest_wherever_it_is_done() -> None:
    one = task("driftline")
    elsewhere = [
        line.replace("127.0.0.1:1", "127.0.0.1:2").replace("run.out=", "run.out=x")
        for line in one.overrides
    ]
    assert replace(one, out="elsewhere", overrides=elsewhere).digest() == one.digest()
    assert replace(one, max_tokens=9).digest() != one.digest()
    assert task("driftline_stop").digest() != one.digest()


def test_a_task_is_read_as_it_was_written(tmp_path: Path) -> None:
    given = task()
    given.write(tmp_path / "run" / "task.json")
    assert Task.read(tmp_path / "run" / "task.json") == given


def test_what_trl_said_is_the_work_that_was_asked() -> None:
    record = recorded()
    assert differences(task(), record["steps"], record["settings"]) == []
    assert (record["ready_s"], record["start_up_s"]) == (7.9, 8.5)
    assert [step["seconds"] for step in record["steps"]] == [4.8, 7.2]


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda record: record["settings"].update({name: value})


def _step(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda record: record["steps"][1].update({name: value})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set("max_tokens", 9), "max_tokens 9 for 8"),
        (_set("temperature", 0.7), "temperature 0.7 for 1.0"),
        (_set("temperature_of_loss", 0.7), "temperature_of_loss 0.7 for 1.0"),
        (_set("top_p", 0.9), "top_p 0.9 for 1.0"),
        (_set("dtype", "bfloat16"), "dtype 'bfloat16' for 'float32'"),
        (_set("autocast", True), "autocast to another precision"),
        (_set("gradient_checkpointing", True), "gradient_checkpointing True for False"),
        (_set("betas", [0.9, 0.999]), r"betas [0.9, 0.999] for [0.9, 0.95]"),
        (_set("updates_a_step", 2), "updates_a_step 2 for 1"),
        (_step("rollouts", 1), "step 2: 1 rollouts for 2"),
        (_step("prompts", "0"), "step 2: other prompts"),
        (_step("longest", 9), "step 2: a rollout of 9 tokens for at most 8"),
        (_step("learning_rate", 0.0004), "step 2: learning rate 0.0004 for 0.0005"),
        (_step("loss_tokens", 15), "step 2: the loss saw 15 of 16 tokens"),
        (lambda record: record["steps"].pop(), "1 steps for 2"),
    ],
)
def test_other_work_is_named(change: Callable[[dict[str, Any]], None], says: str) -> None:
    record = recorded()
    change(record)
    assert differences(task(), record["steps"], record["settings"]) == [says]


def test_with_a_stop_the_loss_sees_what_was_kept() -> None:
    record = recorded()
    record["steps"][1]["loss_tokens"] = 9
    record["settings"]["stop_in_flight"] = True
    assert differences(task(), record["steps"], record["settings"]) == []


def test_prompts_are_the_same_in_any_order() -> None:
    assert prompts_digest([[1, 2], [3]]) == prompts_digest([[3], [1, 2]])
    assert prompts_digest([[1, 2], [3]]) != prompts_digest([[1], [2, 3]])


def test_phases_of_trl_add_up_to_the_step() -> None:
    clocks = {"generate": 3.0, "teacher": 0.5, "loss": 1.5, "inside": 5.5, "update": 0.25}
    found = phases_apart(clocks, 6.0)
    assert found == {
        "generate": 3.0,
        "teacher": 0.5,
        "loss": 1.0,
        "backward": 1.0,
        "update": 0.25,
        "other": 0.25,
    }
    assert sum(found.values()) == 6.0


def test_the_first_step_of_a_run_is_not_counted() -> None:
    arm = measured([run(0, [9.0, 2.0, 4.0]), run(1, [9.0, 3.0], peak=2000.0)], "text", None)
    assert [sample.seconds for sample in arm.samples] == [2.0, 4.0, 3.0]
    assert arm.median_s == 3.0
    assert arm.figure("generate_s") == 1.5
    assert arm.record()["figures"]["peak_trainer_mib"]["values"] == [1000.0, 2000.0]


def test_ratios_are_of_medians_with_the_fastest_mode_of_trl() -> None:
    mib = 2**20
    runs = {
        "playground/trl": [run(0, [9.0, 6.0, 6.0])],
        "playground/trl_static": [
            run(0, [9.0, 4.0, 4.0], peak=900.0, settings={"teacher_weight_bytes": 300 * mib})
        ],
        "playground/trl_vllm": [],
        "playground/driftline": [run(0, [9.0, 8.0, 8.0], start_up=40.0, peak=1200.0)],
    }
    found = ratios(runs, {"playground/trl_vllm": "AttributeError: no"})
    assert found["trl_step_over_driftline_playground"] == 0.5
    assert found["trl_default_step_over_driftline_playground"] == 0.75
    assert found["trl_static_step_over_driftline_playground"] == 0.5
    assert found["trl_start_up_over_driftline_playground"] == 0.25
    assert found["trl_peak_over_driftline_playground"] == 0.75
    assert found["trl_peak_without_teacher_over_driftline_playground"] == 0.5
    assert found["sync_share_driftline_playground"] == pytest.approx(0.1)
    assert found["trl_step_over_driftline_stop_playground"] is None
    assert found["trl_seconds_to_same_kl_over_driftline"] is None


def test_an_arm_that_failed_is_in_no_ratio() -> None:
    runs = {"smollm2/trl": [run(0, [1.0, 1.0])], "smollm2/driftline": [run(0, [1.0, 2.0])]}
    found = ratios(runs, {"smollm2/driftline": "SamplerError: dead"})
    assert found["trl_step_over_driftline_smollm2"] is None
    assert ratios(runs, {})["trl_step_over_driftline_smollm2"] == 0.5


def test_the_way_to_a_level_is_straight_between_measurements() -> None:
    one = run(0, [4.0, 2.0, 2.0, 2.0], heldout=heldout(step0=2.0, step2=1.0, step4=0.5))
    assert seconds_to(one, 2.5) == 0.0
    assert seconds_to(one, 1.5) == pytest.approx(3.0)
    assert seconds_to(one, 1.0) == pytest.approx(6.0)
    assert seconds_to(one, 0.75) == pytest.approx(8.0)
    assert seconds_to(one, 0.4) is None


def test_seconds_to_the_level_of_trl_compare_round_by_round() -> None:
    theirs = [
        run(0, [5.0, 5.0], start_up=10.0, heldout=heldout(step0=2.0, step2=1.0)),
        run(1, [5.0, 5.0], start_up=10.0, heldout=heldout(step0=2.0, step2=1.5)),
    ]
    ours = [
        run(0, [2.0, 2.0], start_up=16.0, heldout=heldout(step0=2.0, step2=1.0)),
        run(1, [2.0, 2.0], start_up=18.0, heldout=heldout(step0=2.0, step2=1.0)),
    ]
    runs = {"playground/trl": theirs, "playground/driftline_stop": ours}
    found = ratios(runs, {})
    assert found["trl_seconds_to_same_kl_over_driftline"] == pytest.approx((2.5 + 5.0) / 2)
    assert found["trl_seconds_to_same_kl_with_start_up_over_driftline"] == pytest.approx(
        (20 / 21 + 20 / 19) / 2, abs=1e-4
    )
    ours[1]["heldout"] = heldout(step0=2.0, step2=1.75)
    assert ratios(runs, {})["trl_seconds_to_same_kl_over_driftline"] is None


def test_a_step_beside_others_is_not_counted() -> None:
    one = run(0, [9.0, 2.0, 40.0, 4.0])
    one["steps"][2]["others_cores"] = 0.8
    arm = measured([one], "text", None)
    assert [sample.seconds for sample in arm.samples] == [2.0, 4.0]
    assert undisturbed(one) == [9.0, 2.0, 3.0, 4.0]
    for step in one["steps"]:
        step["others_cores"] = 0.8
    assert measured([one], "text", None).error == (
        "no step beside which others had at most 0.1 cores"
    )
    assert undisturbed(one) == []
    assert (
        ratios({"smollm2/trl": [one], "smollm2/driftline": [run(0, [1.0, 1.0])]}, {})[
            "trl_step_over_driftline_smollm2"
        ]
        is None
    )


def test_a_run_mostly_beside_others_is_done_again_where_asked(tmp_path: Path) -> None:
    results = Results(tmp_path / "trainers.json", 0.1)
    one = run(0, [9.0, 2.0, 40.0, 4.0])
    results.add("playground/trl", one)
    one["steps"][2]["others_cores"] = 0.8
    assert results.has("playground/trl", 0, "work", "code", mostly_quiet=True)
    one["steps"][3]["others_cores"] = 0.8
    assert results.has("playground/trl", 0, "work", "code")
    assert not results.has("playground/trl", 0, "work", "code", mostly_quiet=True)


def test_what_others_may_have_is_asked_of_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "trainers.json"
    strict = Results(path, 0.1)
    one = run(0, [9.0, 2.0, 4.0])
    one["steps"][2]["others_cores"] = 0.3
    strict.add("playground/trl", one)
    strict.write({}, {})
    assert json.loads(path.read_text())["arms"]["playground/trl"]["median"] == 2.0
    Results(path, 0.5).write({}, {})
    assert json.loads(path.read_text())["arms"]["playground/trl"]["median"] == 3.0


def test_processor_time_of_others_is_told_from_ours() -> None:
    """A child that computed and was waited for is ours, and takes nothing from the others'."""
    before, own = busy_s(), _own_s()
    work = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", work], check=True, timeout=60)
    assert _own_s() - own >= 0.45
    assert busy_s() - before >= 0.45
    assert processor_s([2**22 + 1]) == {}


def test_results_go_on_where_they_were(tmp_path: Path) -> None:
    path = tmp_path / "trainers.json"
    results = Results(path, 0.1)
    results.add("playground/trl", run(1, [3.0, 2.0]))
    results.add("playground/trl", run(0, [3.0, 1.0]))
    results.fail("playground/trl_vllm", "AttributeError: no")
    results.write({"trl": "as it is"}, {"playground": {}})
    again = Results(path, 0.1)
    assert again.has("playground/trl", 0, "work", "code")
    assert not again.has("playground/trl", 0, "other work", "code")
    assert not again.has("playground/trl", 0, "work", "other code")
    assert not again.has("playground/trl", 2, "work", "code")
    assert again.errors == {"playground/trl_vllm": "AttributeError: no"}
    written = json.loads(path.read_text())
    assert set(written) == {"made", "settings", "ratios", "before", "failed", "arms"}
    assert written["arms"]["playground/trl_vllm"]["error"] == "AttributeError: no"
    arm = written["arms"]["playground/trl"]
    assert (arm["seconds"], arm["median"], arm["description"]) == ([1.0, 2.0], 1.5, "as it is")
    busy = run(0, [3.0, 1.0])
    busy["steps"][1]["others_cores"] = 0.8
    again.add("playground/trl_vllm", busy)
    again.write({}, {})
    assert json.loads(path.read_text())["arms"]["playground/trl_vllm"]["error"]
    assert Results(path, 0.1).errors == {}
    assert again.errors == {}
    again.add("playground/trl", run(0, [3.0, 1.0, 1.0]))
    assert [one["round"] for one in again.runs["playground/trl"]] == [0]
    again.add("playground/trl", run(1, [3.0, 1.0, 1.0], commit="other code"))
    assert [one["round"] for one in again.runs["playground/trl"]] == [1]


def test_memory_is_that_of_a_process_and_all_below_it() -> None:
    hold = "import sys; held = bytearray(b'x') * (64 << 20); print(flush=True); sys.stdin.read()"
    before = proportional_bytes(tree(os.getpid()))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    child = subprocess.Popen([sys.executable, "-c", hold], **pipes)  # type: ignore[call-overload]
    with child:
        child.stdout.readline()
        assert child.pid in tree(os.getpid())
        with Peaks({"child": child.pid}) as peaks:
            pass
        assert proportional_bytes(tree(os.getpid())) - before > 60 * memory.MIB
        child.stdin.close()
    assert peaks.mib()["child"] > 60
    assert proportional_bytes([child.pid]) == 0


@pytest.mark.e2e
@in_the_long_round
def test_our_trainer_does_the_work_that_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teacher and trainer as processes, with the engines that start at once."""
    monkeypatch.setattr(running, "RUNS", tmp_path)
    config = tmp_path / "teacher.toml"
    config.write_text('engine = "hf"\ndtype = "float32"\nmax_k = 8\n')
    pair = replace(PLAYGROUND, rollouts=2, max_tokens=8, teacher_config=config)
    found = running.run(pair, ARMS["driftline_hf"], 0, steps=STEPS, environments={}, said=print)
    assert [step["step"] for step in found["steps"]] == [1, 2]
    assert found["of"] == task("driftline_hf").digest()
    assert 0 < found["ready_s"] <= found["start_up_s"]
    for step in found["steps"]:
        assert sum(step["phases"].values()) == pytest.approx(step["seconds"])
        assert step["loss_tokens"] == step["generated_tokens"] == 16
    assert (tmp_path / "playground" / "driftline_hf-0" / "step2" / "model.safetensors").is_file()
    assert min(found["peak_mib"]["trainer"], found["peak_mib"]["teacher"]) > 0


def test_an_environment_that_is_given_is_used_as_it_is(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.touch()
    assert environment.made(tmp_path, environment.TRL, print) == python


def test_a_quick_run_counts_steps_too() -> None:
    assert size(parser().parse_args(["--quick"]), PLAYGROUND) == (1, 3)
    assert size(parser().parse_args(["--steps", "1"]), PLAYGROUND) == (2, 2)
    assert size(parser().parse_args([]), PLAYGROUND) == (2, 16)


def test_a_pair_without_its_models_says_how_they_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = replace(PAIRS["smollm2"], student=tmp_path / "student")
    monkeypatch.setitem(PAIRS, "smollm2", missing)
    assert main(["--json", str(tmp_path / "x.json"), "--pairs", "smollm2"]) == 2
    assert "python -m examples.language --prepare" in capsys.readouterr().out
