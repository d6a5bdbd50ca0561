"""A student spread over two processes learns what one process does, to rounding.

Two gloo processes, each with some of the sequences of recorded rollouts and scores, against one
with all of them; FSDP2, with an adapter too.

Run: python -m pytest tests/trainer/learner/test_sharding.py
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from transformers import PreTrainedModel

from student_trainer.learner.adapter import ALL_LINEAR, LoraShape, adapted, new_config
from student_trainer.learner.learner import Learner
from student_trainer.learner.sharding import is_spread, shard
from student_trainer.learner.student import response_logprobs
from student_trainer.losses.objective import StepSums, sum_over_processes
from student_trainer.losses.weight_choice import BlockGate, PruneWeight
from student_trainer.pretrained import load_student
from student_trainer.process.stopping import Stopped, StopRequest
from student_trainer.records import AS_LEARNT, Rollout, WeightFormat
from tests.trainer.learner.made_learners import learner_of
from tests.trainer.learner.tiny_student import tiny_student
from tests.trainer.made_rollouts import random_rollout
from tests.waiting import LIMIT_S

ROOT = Path(__file__).resolve().parents[3]
LENGTHS = (5, 11, 2, 7, 1, 9)
WORLD, STEPS, HALF = 2, 10, 5
UPDATES = {"tied, checkpointing": 4}
"""A step; of six rollouts some updates have one, and a process none of its own."""
KINDS = ("whole", "tied, checkpointing", "adapter")
ROUNDED = "adapter on a bfloat16 base"
ALONE = WeightFormat(dtype="float32", adapter_alone=True)
PROMPT, CONTINUED = np.array([5, 6, 7], np.int32), np.array([8, 9, 10, 11], np.int32)


def rollouts_of(step: int) -> list[Rollout]:
    """Recorded: the same in every process, which learns from its share."""
    rng = np.random.default_rng(step)
    return [random_rollout(rng, num_response=n, masked=int(n > 6)) for n in LENGTHS]


def student_of(kind: str, start: Path | None) -> tuple[PreTrainedModel, Any]:
    """A model, and its adapter where it has one, from a checkpoint where there is one."""
    has_adapter = "adapter" in kind
    if start is None or has_adapter:
        model: PreTrainedModel = tiny_student(tied="tied" in kind)
    else:
        device = torch.device("cpu")
        model = load_student(str(start), dtype=torch.float32, device=device)
    if "checkpointing" in kind:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if not has_adapter:
        return model, None
    if kind == ROUNDED:
        model.to(torch.bfloat16)
    shape = LoraShape(rank=3, alpha=6.0, targets=ALL_LINEAR, rslora=False)
    torch.manual_seed(1)
    adapter = adapted(model, new_config(shape, "base"))
    if start is not None:
        adapter.load(start)
    return model, adapter


def learner_from(kind: str, start: Path | None, **changes: Any) -> Learner:
    """At the beginning, or where a checkpoint is."""
    model, adapter = student_of(kind, start)
    shard(model, response_logprobs)
    assert is_spread(model) is dist.is_initialized()
    learner = learner_of(
        model,
        weights=[PruneWeight(w_drop=0.1), BlockGate(block_size=4)],
        adapter=adapter,
        dtype=torch.bfloat16 if kind == ROUNDED else torch.float32,
        **{"micro_batch_tokens": 16, "updates_per_epoch": UPDATES.get(kind, 1)} | changes,
    )
    if start is not None:
        learner.load(torch.load(start / "state.pt"))
    return learner


def learnt(kind: str, folder: Path, steps: range, start: Path | None = None) -> dict[str, Any]:
    """What each step reports, and the weights as they are sent; a checkpoint at its end."""
    learner = learner_from(kind, start)
    reports = [asdict(learner.learn(rollouts_of(step), step)) for step in steps]
    written = ALONE if "adapter" in kind else AS_LEARNT
    before = dict(learner.weights(written))
    plain = learner.plain_logprobs(PROMPT, CONTINUED)
    with learner.changed():
        changed = learner.logprobs(PROMPT, CONTINUED)
    for name, tensor in learner.weights(written):
        assert torch.equal(tensor, before[name]), name
    is_writer = not dist.is_initialized() or dist.get_rank() == 0
    folder.mkdir(parents=True, exist_ok=True)
    learner.save(folder if is_writer else None)
    state = learner.state()
    if is_writer:
        torch.save(state, folder / "state.pt")
    return {
        "reports": [{k: v for k, v in r.items() if v is not None} for r in reports],
        "weights": before,
        "merged": dict(learner.weights(AS_LEARNT)),
        "logprobs": learner.logprobs(PROMPT, CONTINUED),
        "plain": plain,
        "changed": changed,
    }


class AskedInUpdate:
    """A request to stop, which one process gets in a pass of this update."""

    def __init__(self, number: int) -> None:
        self.stop = StopRequest()
        self._number = number

    def learner(self) -> Learner:
        """Of two updates a step, each of several passes, some of which are for the others alone."""
        changes = {"micro_batch_tokens": 1, "updates_per_epoch": 2}
        made = learner_from("whole", None, **changes, stop=self.stop)
        passed = made._pass_for_the_others

        def asked() -> None:
            if made.update_under_way[0] == self._number:
                self.stop.request()
            passed()

        made._pass_for_the_others = asked  # type: ignore[method-assign]
        return made


def asked_to_stop() -> dict[str, Any]:
    """What becomes of steps in whose updates one of the processes is asked to stop."""
    first, second = AskedInUpdate(1), AskedInUpdate(2)
    learner = first.learner()
    before = dict(learner.weights(AS_LEARNT))
    with pytest.raises(Stopped):
        learner.learn(rollouts_of(0), 0)
    after = dict(learner.weights(AS_LEARNT))
    another = second.learner()
    report = another.learn(rollouts_of(0), 0)
    was_asked = second.stop.requested
    with pytest.raises(Stopped):
        another.learn(rollouts_of(1), 1)
    return {
        "unchanged": all(torch.equal(after[name], before[name]) for name in before),
        "updates": [made.state()["optimizer"]["updates"] for made in (learner, another)],
        "reported": report.updates,
        "was asked": was_asked,
        "are told": first.stop.requested and second.stop.requested,
    }


def worker(rank: int, folder: Path) -> None:
    """One of two processes; writes what it found to the folder."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    found = {}
    for kind in KINDS:
        first = learnt(kind, folder / kind / "two", range(HALF))
        dist.barrier()
        found[kind] = learnt(
            kind, folder / kind / "two-two", range(HALF, STEPS), folder / kind / "two"
        )
        found[kind]["reports"] = first["reports"] + found[kind]["reports"]
        found[kind]["of one"] = learnt(
            kind, folder / kind / "one-two", range(HALF, STEPS), folder / kind / "one"
        )["reports"]
    found[ROUNDED] = learnt(ROUNDED, folder / ROUNDED, range(2))
    found["asked"] = asked_to_stop()
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def both_workers(folder: Path) -> None:
    """Forked, so that the imports are made once."""
    torch.set_num_threads(1)
    multiprocessing.start_processes(worker, (folder,), nprocs=WORLD, start_method="fork")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the checkpoints that one process wrote half-way, and then what two made of the same."""
    made = tmp_path_factory.mktemp("processes")
    for kind in KINDS:
        learnt(kind, made / kind / "one", range(HALF))
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.trainer.learner.test_sharding import both_workers\n"
        "both_workers(Path(sys.argv[1]))"
    )
    # Not forked from this process, which may have threads.
    done = subprocess.run(
        [sys.executable, "-c", code, str(made)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return made


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes found."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD)]


def alone(kind: str, folder: Path, start: str | None = None) -> dict[str, Any]:
    """What one process with all sequences finds; from a checkpoint half-way, where one is named."""
    if start is None:
        return learnt(kind, folder / kind / "whole", range(STEPS))
    return learnt(kind, folder / kind / "rest", range(HALF, STEPS), folder / kind / start)


def is_close(found: list[dict[str, float]], expected: list[dict[str, float]], rel: float) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=rel)


@pytest.mark.parametrize("kind", KINDS)
def test_ten_steps_of_two_processes_are_those_of_one(
    folder: Path, both: list[dict[str, Any]], kind: str
) -> None:
    """With a checkpoint of two half-way, on which two went on."""
    expected = alone(kind, folder)
    assert expected["reports"][0]["loss_tokens"] == sum(LENGTHS) - sum(n > 6 for n in LENGTHS)
    for found in both:
        assert [r["loss"] for r in found[kind]["reports"]] == pytest.approx(
            [r["loss"] for r in expected["reports"]], rel=1e-5
        )
        assert [r["loss_tokens"] for r in found[kind]["reports"]] == [
            r["loss_tokens"] for r in expected["reports"]
        ]
    is_close(both[0][kind]["reports"], both[1][kind]["reports"], 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_two_goes_on_on_one_and_back(
    folder: Path, both: list[dict[str, Any]], kind: str
) -> None:
    expected = alone(kind, folder)["reports"][HALF:]
    from_two = alone(kind, folder, "two")["reports"]
    is_close(from_two, expected, 1e-4)
    assert [r["loss"] for r in from_two] == pytest.approx([r["loss"] for r in expected], rel=1e-5)
    for found in both:
        is_close(found[kind]["of one"], expected, 1e-4)
        assert [r["loss"] for r in found[kind]["of one"]] == pytest.approx(
            [r["loss"] for r in expected], rel=1e-5
        )


@pytest.mark.parametrize("kind", KINDS)
def test_what_two_processes_send_prove_and_save_is_whole(
    folder: Path, both: list[dict[str, Any]], kind: str
) -> None:
    expected = alone(kind, folder)
    for found in both:
        for name in ("weights", "merged"):
            assert found[kind][name].keys() == expected[name].keys()
            for key, tensor in expected[name].items():
                assert torch.allclose(found[kind][name][key], tensor, atol=2e-4), key
        for name in ("logprobs", "plain", "changed"):
            assert found[kind][name] == pytest.approx(expected[name], abs=2e-2), name
        assert found[kind]["logprobs"] == pytest.approx(found[kind]["plain"], abs=1e-4)
        assert not np.allclose(found[kind]["changed"], found[kind]["logprobs"], atol=1e-2)


def test_a_frozen_base_in_bfloat16_is_spread_beside_an_adapter_in_float32(
    folder: Path, both: list[dict[str, Any]]
) -> None:
    expected = learnt(ROUNDED, folder / "alone", range(2))["reports"]
    for found in both:
        assert [r["loss"] for r in found[ROUNDED]["reports"]] == pytest.approx(
            [r["loss"] for r in expected], rel=2e-2
        )


def test_all_processes_give_a_step_up_together_until_its_first_update(
    both: list[dict[str, Any]],
) -> None:
    for found in both:
        assert found["asked"]["unchanged"]
        assert found["asked"]["updates"] == [0, 2]
        assert found["asked"]["reported"] == 2
        assert found["asked"]["are told"]
    assert sorted(found["asked"]["was asked"] for found in both) == [False, True]


def test_the_saved_student_is_nobodys_special_class(folder: Path, both: object) -> None:
    assert '"Qwen3ForCausalLM"' in (folder / "whole" / "two" / "config.json").read_text()


def test_half_of_the_sequences_alone_learn_otherwise(folder: Path) -> None:
    half, whole = learner_from("whole", None), learner_from("whole", None)
    losses = [half.learn(rollouts_of(0)[:3], 0).loss, whole.learn(rollouts_of(0), 0).loss]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_one_process_has_its_own_sums() -> None:
    one = torch.ones(())
    sums = StepSums(
        loss_sum=one,
        weight_sum=one,
        num_tokens=one,
        weight_min=one,
        weight_max=one,
        monitor_sums={},
    )
    assert sum_over_processes(sums) is sums
