"""Checkpoints: the student in Hugging Face format, and beside it what a resumed run needs.

A checkpoint appears under its final name only when it is complete, so a killed run never leaves one
that half loads. Old ones go after the new one is there.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from student_trainer.errors import CheckpointError

STATE_FILE = "trainer_state.pt"


def save_student(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The student alone, in Hugging Face format."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Checkpoints:
    """The numbered checkpoints of one run."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def save(
        self,
        step: int,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        state: Mapping[str, Any],
    ) -> Path:
        """Writes the state after `step` steps and drops the oldest ones beyond `keep`."""
        final = self._folder / f"step-{step:06d}"
        partial = self._folder / f".{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_student(partial, model, tokenizer)
        torch.save({"step": step, **state}, partial / STATE_FILE)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in self._complete()[: -self._keep]:
            shutil.rmtree(old)
        return final

    def latest(self) -> Path:
        """The newest complete checkpoint. Raises CheckpointError when there is none."""
        complete = self._complete()
        if not complete:
            raise CheckpointError(f"{self._folder}: no checkpoint to resume from")
        return complete[-1]

    def refuse_older(self) -> None:
        """Raises CheckpointError when an earlier run left checkpoints: a new one, which starts
        from step 0 again, would drop its own as the oldest."""
        if complete := self._complete():
            raise CheckpointError(
                f"{complete[-1]} is of an earlier run: continue it with --resume, or choose "
                "another run.out"
            )

    def _complete(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("step-*") if path.is_dir())


def load_state(folder: Path) -> dict[str, Any]:
    """What `Checkpoints.save` stored beside the student. Raises CheckpointError."""
    try:
        state: dict[str, Any] = torch.load(folder / STATE_FILE, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {STATE_FILE}, not a checkpoint of a run") from None
    except (EOFError, RuntimeError, UnpicklingError) as error:
        raise CheckpointError(f"{folder}: cannot read {STATE_FILE}: {error}") from error
    return state
