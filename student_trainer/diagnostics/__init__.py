"""What a step's rollouts say about drift, waste and time, and which of it is worth a warning.

Pure numpy; the loop reports it. Every metric is explained in docs/diagnostics.md.
"""

from student_trainer.diagnostics.alarms import Alarm, warnings_of
from student_trainer.diagnostics.mismatch import mismatched_tokens
from student_trainer.diagnostics.repetition import repetition_rate
from student_trainer.diagnostics.step import (
    BAND_TOKENS,
    effective_lengths,
    phase_seconds,
    rollout_report,
    step_profile,
)

__all__ = [
    "BAND_TOKENS",
    "Alarm",
    "effective_lengths",
    "mismatched_tokens",
    "phase_seconds",
    "repetition_rate",
    "rollout_report",
    "step_profile",
    "warnings_of",
]
