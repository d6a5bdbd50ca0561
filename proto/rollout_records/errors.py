"""What goes wrong with a recording."""

from __future__ import annotations


class RecordingError(ValueError):
    """A file, row or column that is not a recorded rollout; the message names it."""
