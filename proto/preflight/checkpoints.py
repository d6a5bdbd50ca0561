"""What is known of a checkpoint without fetching anything: a folder, or what a hub's cache has."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OFFLINE = "HF_HUB_OFFLINE"


def model_json(model: str, revision: str = "") -> Mapping[str, Any] | None:
    """config.json of a folder or of what is in the cache of the hub; None where neither has it."""
    path = Path(model) / "config.json"
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(model, "config.json", revision=revision or None)
        except HFValidationError:  # a path that is not there is no name on a hub
            return None
        if not isinstance(cached, str):
            return None
        path = Path(cached)
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else None


@contextmanager
def fetching_nothing() -> Iterator[None]:
    """The libraries that are imported within for the first time ask no hub, and say so at once."""
    before = os.environ.get(OFFLINE)
    os.environ[OFFLINE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[OFFLINE]
        else:
            os.environ[OFFLINE] = before
