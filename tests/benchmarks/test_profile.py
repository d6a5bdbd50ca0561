"""Every stage of an append is timed, on stored rows and on a model: pytest -k profile"""

from __future__ import annotations

import pytest
from rich.console import Console

from benchmarks import profile


@pytest.mark.parametrize("engine", ["stored", "hf"])
async def test_the_stages_of_an_append_add_up_to_what_the_client_waits(engine: str) -> None:
    words = ["--engine", engine, "--model", "tiny", "--tokens", "128", "--quick"]
    arms, lags = await profile.measure(profile.arguments_parser().parse_args(words))
    console = Console(record=True, width=100)
    console.print(profile.shown(arms, lags, 64))
    text = console.export_text()
    for stage in ("decode", "overlap and drift", "engine queue", "encode", "loop lag"):
        assert stage in text
    assert ("engine: head and rows" in arms) == (engine == "hf")
    assert all(len(arm.samples) == 2 for arm in arms.values())
    assert sum(arm.median_s or 0.0 for arm in arms.values()) > 0
