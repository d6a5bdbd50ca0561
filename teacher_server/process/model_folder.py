"""Whether there is a checkpoint where a setting says, before half a minute of imports; imports
nothing that takes long."""

from __future__ import annotations

import os
import re
from pathlib import Path

from teacher_server.settings import ConfigError, TeacherConfig

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_CONFIGURATION = "config.json"


def check_model_folder(config: TeacherConfig) -> None:
    """Raises ConfigError for a path at which there is no checkpoint. What may be a name on a hub is
    not looked for."""
    name = config.model
    if config.engine == "fake" or not name:
        return
    folder = Path(name)
    told = f"cannot read the checkpoint {name!r}: "
    if folder.is_dir():
        if os.access(folder, os.R_OK | os.X_OK) and not (folder / _CONFIGURATION).exists():
            raise ConfigError(
                f"{told}the folder has no {_CONFIGURATION}: name the checkpoint's own"
            )
        return
    if folder.exists():
        raise ConfigError(f"{told}that is a file: name the folder of the checkpoint")
    if not _HUB_NAME.fullmatch(name):
        raise ConfigError(
            f"{told}there is no such folder, and it is no name on a hub, such as Qwen/Qwen3-4B"
        )
