"""Which checkpoints are the best by their evaluation, whose figures stand in a file in each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from student_trainer.errors import CheckpointError
from student_trainer.process.writing import write_whole

EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The rule by which some checkpoints are kept, however old."""

    keep: int
    metric: str
    """Name of a figure; a checkpoint without it is never among the best."""
    higher_is_better: bool

    def of(self, checkpoints: Sequence[Path]) -> list[Path]:
        """The best, at most `keep`, of those given oldest first; of equal ones the newest.

        Raises CheckpointError.
        """
        sign = 1 if self.higher_is_better else -1
        figures = [(path, figures_of(path).get(self.metric)) for path in reversed(checkpoints)]
        rated = [(sign * figure, path) for path, figure in figures if figure is not None]
        rated.sort(key=lambda pair: pair[0], reverse=True)
        return [path for _, path in rated[: self.keep]]


NONE = Best(keep=0, metric="", higher_is_better=False)


def write_figures(checkpoint: Path, figures: Mapping[str, float]) -> None:
    """Keeps what an evaluation of its weights came to; whole or not at all."""
    write_whole(checkpoint / EVALUATION_FILE, json.dumps(dict(figures), indent=2) + "\n")


def figures_of(checkpoint: Path) -> dict[str, float]:
    """What the evaluation at its step came to; empty where there was none.

    Raises CheckpointError for a file that is broken.
    """
    path = checkpoint / EVALUATION_FILE
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}; delete it or its checkpoint") from None
    if not isinstance(figures, dict):
        raise CheckpointError(f"{path}: must be an object; delete it or its checkpoint")
    return figures
