"""The set-up's failures are one line, and pip's configuration reaches uv. Nothing is downloaded.

Run: pytest tests/distributions/test_setup_venv.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.setup_venv import cause, usable_uv, uv_environment, with_pip, with_uv
from tests.rounds import in_the_long_round

ROOT = Path(__file__).resolve().parents[2]
PIP = [sys.executable, "-m", "pip"]
UV_WITHOUT_NETWORK = """\
Using Python 3.11.7 environment at: .venv
error: Request failed after 3 retries in 5.2s
  cause: Failed to fetch: http://index.invalid/simple/torch/
  cause: error sending request for url (http://index.invalid/simple/torch/)
  cause: failed to lookup address information: Name or service not known
"""


@pytest.fixture
def configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip's configuration, read after those of the machine."""
    for name in os.environ:
        if name.startswith(("PIP_", "UV_")):
            monkeypatch.delenv(name)
    path = tmp_path / "pip.conf"
    monkeypatch.setenv("PIP_CONFIG_FILE", str(path))
    return path


def test_pips_configuration_becomes_uvs_and_what_is_given_stays(
    configuration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration.write_text(
        "[global]\nindex-url = http://one/simple\nextra-index-url =\n  http://two\n  http://three\n"
        "find-links = /a /b\ntimeout = 7\n[install]\nfind-links = /c /d\n"
    )
    found = uv_environment(PIP, {})
    expected = {
        "UV_DEFAULT_INDEX": "http://one/simple",
        "UV_INDEX": "http://two http://three",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/c,/d",
        "UV_HTTP_TIMEOUT": "7",
    }
    assert expected.items() <= found.items()
    monkeypatch.setenv("PIP_FIND_LINKS", "/e")
    assert uv_environment(PIP, {})["UV_FIND_LINKS"] == "/e"
    given = uv_environment(PIP, {"UV_INDEX": "http://mine", "UV_FIND_LINKS": ""})
    assert not {"UV_INDEX", "UV_INDEX_STRATEGY", "UV_FIND_LINKS"} & set(given)


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_both_installers_install_both_distributions(accelerator: str, tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    by_uv = with_uv("uv", str(python), accelerator, "http://torch", PIP)
    by_pip = list(with_pip(PIP, accelerator, "http://torch"))
    project = ["-e", "proto", "-e", f".[{accelerator},dev]"]
    for steps in (by_uv, by_pip):
        assert any(word.startswith("torch==") for word in steps[0].command)
        assert "http://torch" in steps[0].command
        assert steps[1].command[-4:] == project
    assert len(by_uv) == 2
    assert "--compile-bytecode" in by_uv[1].command
    removed = [step.command[-3:] for step in by_pip[2:]]
    assert removed == [["torchvision", "torchaudio", "torchcodec"]] * (accelerator == "cpu")


@pytest.mark.parametrize(
    ("says", "usable"),
    [("echo uv 0.12.0", 1), ("echo uv 1.0.0 x", 1), ("echo uv 0.11.33", 0), ("exit 127", 0)],
)
def test_a_uv_that_would_skip_the_projects_settings_is_not_used(
    says: str, usable: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "uv").write_text(f"#!/bin/sh\n{says}\n")
    (tmp_path / "uv").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert usable_uv() == (str(tmp_path / "uv") if usable else None)
    (tmp_path / "uv").unlink()
    assert usable_uv() is None


def test_a_failure_of_uv_is_the_last_cause_and_a_remedy() -> None:
    line = cause(UV_WITHOUT_NETWORK)
    assert "failed to lookup address information" in line
    assert "check the network" in line
    assert "\n" not in line
    assert cause("error: disk full\n") == "error: disk full"
    assert cause("") == "it said nothing"


@in_the_long_round
@pytest.mark.e2e
@pytest.mark.usefixtures("configuration")
def test_without_an_index_one_line_says_so_and_half_an_environment_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)  # those of the machine are left out too
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    half = tmp_path / "half"
    half.mkdir()
    (half / "rest of another").touch()
    command = [sys.executable, "scripts/setup_venv.py", "--venv", str(half)]
    done = subprocess.run(
        [*command, "--accelerator", "cpu", "--installer", "pip"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("setup: torch (cpu) failed: ERROR: No matching distribution found")
    assert "check the network" in line
    assert str(tmp_path / "half.log") in line
    assert not (half / "rest of another").exists()
