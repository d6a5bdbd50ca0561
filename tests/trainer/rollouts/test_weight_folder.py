"""Where weights pass through: there is room, or it is said before a run begins, and nothing stays.

Run: python -m pytest tests/trainer/rollouts/test_weight_folder.py
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

from student_trainer.errors import ConfigError, WeightSyncError
from student_trainer.records import AS_LEARNT, WeightFormat
from student_trainer.rollouts import weight_folder as module
from student_trainer.rollouts.weight_folder import PREFIX, sweep, weight_folder
from tests.trainer.learner.made_learners import learner_of
from tests.trainer.learner.tiny_student import tiny_student, write_tiny_student
from tests.trainer.rollouts.test_weight_sync import change, started, sync_of
from tests.waiting import LIMIT_S

HOLDS = """
import sys, time
from pathlib import Path
from student_trainer.rollouts.weight_folder import WeightFolder
folder = WeightFolder(Path(sys.argv[1]))
(folder.path / "model.safetensors").write_bytes(bytes(1000))
print(folder.path, flush=True)
time.sleep(1000)
"""


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shared memory of a size of our own."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(module, "SHARED_MEMORY", folder)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return folder


def sized(monkeypatch: pytest.MonkeyPatch, free: dict[Path, int]) -> None:
    """Disks with so many bytes free."""
    usage = module.shutil._ntuple_diskusage  # type: ignore[attr-defined]
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(0, 0, free[Path(path)]))


def test_a_folder_of_a_killed_process_is_swept_and_one_of_a_living_is_not(memory: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(memory)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        held = Path(process.stdout.readline().strip())
        assert held.name.startswith(f"{PREFIX}{process.pid}-")
        foreign = memory / "driftline-weights-of-a-version-without-locks"
        foreign.mkdir()
        assert sweep(memory) == 0
        assert held.is_dir()
        process.send_signal(signal.SIGKILL)
        process.wait(LIMIT_S)
        said: list[str] = []
        folder = weight_folder(100, None, said.append)
        assert not held.exists()
        assert foreign.is_dir()
        assert len(said) == 1
        assert f"that killed runs had left in {memory}" in said[0]
        folder.close()
        assert not folder.path.exists()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def test_memory_that_is_too_small_is_gone_around_with_a_line(
    memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sized(monkeypatch, {memory: 256 << 10, tmp_path: 1 << 40})
    said: list[str] = []
    folder = weight_folder(3_000_000_000, None, said.append)
    assert folder.path.parent == tmp_path
    assert said == [
        f"{memory} has 0.3 MB free, the weights take 3,001.0 MB: weights go to the sampler through "
        f"{tmp_path}"
    ]
    folder.close()


def test_no_folder_that_is_large_enough_is_an_error_with_the_sizes(
    memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sized(monkeypatch, {memory: 256 << 10, tmp_path: 1 << 20})
    with pytest.raises(WeightSyncError, match=r"has 0\.3 MB free.*has 1\.0 MB free.*--shm-size"):
        weight_folder(3_000_000_000, None, print)
    with pytest.raises(ConfigError, match=r"^sampler\.weights_dir: .* has 0\.3 MB free"):
        weight_folder(3_000_000_000, memory, print)
    with pytest.raises(ConfigError, match=r"none is no folder that may be written"):
        weight_folder(1, tmp_path / "none", print)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_size_is_known_before_and_the_file_is_in_the_samplers_arithmetic(
    tmp_path: Path, tied: bool, dtype: str | None
) -> None:
    learner = learner_of(tiny_student(tied=tied))
    written = WeightFormat(dtype=dtype)
    learner.export_weights(tmp_path, written)
    size = (tmp_path / "model.safetensors").stat().st_size
    known = learner.export_bytes(written)
    assert known < size < known + module.SLACK_BYTES
    state = load_file(tmp_path / "model.safetensors")
    assert {str(t.dtype) for t in state.values()} == {f"torch.{dtype or 'float32'}"}
    assert ("lm_head.weight" in state) == (not tied)
    if dtype:
        assert learner.export_bytes(AS_LEARNT) == pytest.approx(2 * known, rel=0.5)


async def test_a_tied_head_that_was_not_written_is_the_new_embedding(tmp_path: Path) -> None:
    sampler = await started(write_tiny_student(tmp_path / "student", tied=True))
    learner = tiny_student(tied=True)
    change(learner, 1)
    (tmp_path / "weights").mkdir()
    learner_of(learner).export_weights(tmp_path / "weights", WeightFormat())
    await sampler.load_weights(tmp_path / "weights")
    head = sampler._model().lm_head.weight
    assert (head == learner.model.embed_tokens.weight).all()
    sync = sync_of(learner, sampler)
    assert await sync.push(0) < 1e-4
    sync.close()
