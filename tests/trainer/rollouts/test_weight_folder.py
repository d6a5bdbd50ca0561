"""A folder that weights pass through: it has room, or that is said before a run begins, and nothing
stays.

Run: python -m pytest tests/trainer/rollouts/test_weight_folder.py
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from student_trainer.errors import ConfigError, WeightSyncError
from student_trainer.records import AS_LEARNT, WeightFormat
from student_trainer.rollouts import weight_folder as module
from student_trainer.rollouts.weight_folder import PREFIX, SLACK_BYTES, WeightFolder, sweep
from tests.trainer.learner.made_learners import learner_of
from tests.trainer.learner.tiny_student import tiny_student
from tests.waiting import LIMIT_S

HOLDS = """
import sys, time
from pathlib import Path
from student_trainer.rollouts.weight_folder import OwnFolder
folder = OwnFolder(Path(sys.argv[1]))
(folder.path / "model.safetensors").write_bytes(bytes(1000))
print(folder.path, flush=True)
time.sleep(1000)
"""


def sized(monkeypatch: pytest.MonkeyPatch, free: dict[Path, int]) -> None:
    """Disks with so many bytes free."""
    usage = module.shutil._ntuple_diskusage  # type: ignore[attr-defined]
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(0, 0, free[Path(path)]))


def test_a_folder_of_a_killed_process_is_swept_and_one_of_a_living_is_not(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        held = Path(process.stdout.readline().strip())
        assert held.name.startswith(f"{PREFIX}{process.pid}-")
        foreign = tmp_path / "driftline-weights-of-a-version-without-locks"
        foreign.mkdir()
        assert sweep(tmp_path) == 0
        assert held.is_dir()
        process.send_signal(signal.SIGKILL)
        process.wait(LIMIT_S)
        said: list[str] = []
        folder = WeightFolder(tmp_path)
        folder.make_room(100, said.append)
        folder.close()
        assert not held.exists()
        assert foreign.is_dir()
        assert len(said) == 1
        assert f"that killed runs had left in {tmp_path}" in said[0]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def test_a_folder_that_is_too_small_or_none_is_an_error_with_the_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sized(monkeypatch, {tmp_path: 256 << 10})
    with pytest.raises(
        ConfigError,
        match=r"^sampler\.weights_dir: .* has 0\.3 MB free, the weights take 3,001\.0 MB; .*"
        r"name no folder: then they need 33\.6 MB of memory",
    ):
        WeightFolder(tmp_path).make_room(3_000_000_000, print)
    with pytest.raises(ConfigError, match=r"none is no folder that may be written"):
        WeightFolder(tmp_path / "none").make_room(1, print)
    assert not [*tmp_path.iterdir()]


async def test_the_weights_are_in_the_folder_while_they_are_received_and_it_goes(
    tmp_path: Path,
) -> None:
    folder = WeightFolder(tmp_path)
    folder.make_room(100, print)
    folder.make_room(100, print)
    assert len([*tmp_path.iterdir()]) == 1

    async def receive(where: str) -> Tensor:
        return load_file(Path(where) / "model.safetensors")["w"]

    for version in range(2):
        sent = torch.full((3,), float(version))
        assert torch.equal(await folder.send(iter([("w", sent)]), receive), sent)
    folder.close()
    folder.close()
    assert not [*tmp_path.iterdir()]


async def test_a_folder_that_cannot_be_written_any_more_is_named(tmp_path: Path) -> None:
    folder = WeightFolder(tmp_path)
    folder.make_room(100, print)
    shutil.rmtree(next(tmp_path.iterdir()))

    async def receive(where: str) -> None:
        pytest.fail(f"there is nothing in {where}")

    with pytest.raises(WeightSyncError, match=r"cannot be written .* name no folder"):
        await folder.send(iter([("w", torch.ones(3))]), receive)
    folder.close()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
async def test_the_size_is_known_before_and_the_file_is_in_the_samplers_arithmetic(
    tmp_path: Path, tied: bool, dtype: str | None
) -> None:
    learner = learner_of(tiny_student(tied=tied))
    written = WeightFormat(dtype=dtype)
    known = learner.export_bytes(written)
    folder = WeightFolder(tmp_path)
    folder.make_room(known, print)

    async def receive(where: str) -> None:
        path = Path(where) / "model.safetensors"
        assert known < path.stat().st_size < known + SLACK_BYTES
        state = load_file(path)
        assert {str(t.dtype) for t in state.values()} == {f"torch.{dtype or 'float32'}"}
        assert ("lm_head.weight" in state) == (not tied)

    await folder.send(learner.weights(written), receive)
    folder.close()
    if dtype:
        assert learner.export_bytes(AS_LEARNT) == pytest.approx(2 * known, rel=0.5)
