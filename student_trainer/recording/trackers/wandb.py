"""Weights & Biases. Where it is reached, and whether at all, is its own affair: WANDB_MODE,
WANDB_BASE_URL, WANDB_API_KEY."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

START_S = 30
"""To reach its server, or to be told who one is; beyond, the run goes on without."""


class Wandb:
    """A tracker. Its own counter only rises, so steps are a scalar that curves are drawn over."""

    def __init__(
        self,
        folder: Path,
        *,
        run_id: str,
        project: str,
        name: str,
        entity: str | None,
        config: Mapping[str, Any],
    ) -> None:
        """Goes on with the run of this id where there is one."""
        import wandb

        self._run = wandb.init(
            id=run_id,
            resume="allow",
            project=project,
            name=name,
            entity=entity,
            dir=folder,
            config=dict(config),
            reinit="create_new",
            settings=wandb.Settings(
                console="off", silent=True, init_timeout=START_S, login_timeout=START_S
            ),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()
