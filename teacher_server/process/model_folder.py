"""Whether there is a checkpoint where a setting says, before half a minute of imports; imports
nothing that takes long."""

from __future__ import annotations

import os
from pathlib import Path

from preflight.checkpoints import CONFIGURATION, is_hub_name
from teacher_server.settings import ConfigError, TeacherConfig


def check_model_folder(config: TeacherConfig) -> None:
    """Raises ConfigError for a path at which there is no checkpoint. What may be a name on a hub is
    not looked for."""
    name = config.model
    if config.engine == "fake" or not name:
        return
    folder = Path(name)
    told = f"cannot read the checkpoint {name!r}: "
    if folder.is_dir():
        if os.access(folder, os.R_OK | os.X_OK) and not (folder / CONFIGURATION).exists():
            raise ConfigError(f"{told}the folder has no {CONFIGURATION}: name the checkpoint's own")
        return
    if folder.exists():
        raise ConfigError(f"{told}that is a file: name the folder of the checkpoint")
    if not is_hub_name(name):
        raise ConfigError(
            f"{told}there is no such folder, and it is no name on a hub, such as Qwen/Qwen3-4B"
        )
