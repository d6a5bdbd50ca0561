"""On which cores sampler and teacher run, and how their threads wait for each other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_process.cores import SHARED


def _cores() -> list[str]:
    return [str(core) for core in sorted(os.sched_getaffinity(0))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to share the cores."""

    sampler_cores: str | None
    teacher_cores: str | None
    """None leaves the configuration's, of either."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Of both, on top of this process's."""
    teacher_niceness: int = 0
    """How much less than others the teacher asks for a core."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of the trainer."""

    def settings(self) -> dict[str, Any]:
        """Of the trainer."""
        cores = {} if self.sampler_cores is None else {"sampler.cpu_cores": self.sampler_cores}
        return cores | dict(self.changes)


def _made() -> dict[str, Arm]:
    first, last, every = _cores()[0], _cores()[-1], ",".join(_cores())
    return {
        "shipped": Arm(sampler_cores=None, teacher_cores=last),
        "apart": Arm(sampler_cores=first, teacher_cores=last),
        "both": Arm(sampler_cores=every, teacher_cores=every),
        "shared": Arm(sampler_cores=SHARED, teacher_cores=SHARED),
        "single": Arm(sampler_cores=f"{SHARED}:1", teacher_cores=f"{SHARED}:1"),
        "single_nice": Arm(
            sampler_cores=f"{SHARED}:1", teacher_cores=f"{SHARED}:1", teacher_niceness=10
        ),
        "shared_nice": Arm(sampler_cores=SHARED, teacher_cores=SHARED, teacher_niceness=10),
        "apart_blocks": Arm(
            sampler_cores=first, teacher_cores=last, changes={"rollout.chunk_tokens": 32}
        ),
    }


ARMS = _made()
