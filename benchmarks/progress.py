"""Samples on disk while a benchmark runs, so that one that was cut off goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measuring import Measured, Sample
from benchmarks.provenance import commit
from student_trainer.process.writing import write_whole


class Progress:
    """What has been measured so far of one result file; gone once that file is written."""

    def __init__(self, result: Path, settings: Mapping[str, Any]) -> None:
        """Goes on from an earlier run of the same commit with the same settings, else afresh."""
        self._path = result.with_suffix(".progress")
        # Through JSON, as what it is compared with has been.
        self._of = json.loads(json.dumps({"commit": commit(), "settings": dict(settings)}))
        self._earlier: dict[str, list[dict[str, Any]]] = {}
        if self._path.exists():
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            if kept["of"] == self._of:
                self._earlier = kept["samples"]

    def restore(self, arms: Mapping[str, Measured]) -> None:
        """Gives the arms the samples that they had."""
        for name, arm in arms.items():
            arm.samples = [Sample(**sample) for sample in self._earlier.get(name, [])]

    def keep(self, arms: Mapping[str, Measured]) -> None:
        """Writes the samples of all arms, in one go."""
        samples = {name: [asdict(sample) for sample in arm.samples] for name, arm in arms.items()}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, json.dumps({"of": self._of, "samples": samples}))

    def done(self) -> None:
        """The result is written."""
        self._path.unlink(missing_ok=True)
