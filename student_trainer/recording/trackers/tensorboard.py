"""TensorBoard: event files in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


class TensorBoard:
    """A tracker; of a resumed run what was drawn after its first step is taken back."""

    def __init__(self, folder: Path, *, resume_from: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(
            folder / "tensorboard", purge_step=None if resume_from is None else resume_from + 1
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()
