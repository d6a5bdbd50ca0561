"""trackio. Where it keeps or sends figures is its own affair: TRACKIO_DIR, TRACKIO_SPACE_ID."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from typing import Any


class Trackio:
    """A tracker. It knows runs by their names alone, so the name must be that of no other."""

    def __init__(self, *, project: str, name: str, config: Mapping[str, Any]) -> None:
        """Goes on with the run of this name where there is one."""
        import trackio

        self._finish: Callable[[], None] = trackio.finish
        with redirect_stdout(io.StringIO()):  # it greets
            self._run = trackio.init(
                project,
                name=name,
                resume="allow",
                config=dict(config),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            self._finish()
