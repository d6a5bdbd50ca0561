"""What of the trainer's settings and environment reaches its teacher, and what is never shown.

Run: pytest tests/client/test_teacher_access.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from student_trainer.assembly.teachers import teacher_access
from student_trainer.cli import main
from student_trainer.errors import ConfigError
from student_trainer.settings.config import TrainerConfig, load_config
from tests.trainer.settings.smallest_config import SMALLEST

TOKEN = "a-token-nobody-may-see"


def config(folder: Path, *overrides: str) -> TrainerConfig:
    path = folder / "trainer.toml"
    path.write_text(SMALLEST)
    return load_config(path, [f"teacher.{override}" for override in overrides])


def shown(made: TrainerConfig) -> tuple[tuple[str, str], ...]:
    return teacher_access(made.teacher).metadata()


def test_the_file_of_the_settings_wins_over_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / "first", tmp_path / "second"]
    for path in files:
        path.write_text(f"{path.name}\n")
    assert shown(config(tmp_path)) == ()
    monkeypatch.setenv("DRIFTLINE_TEACHER_TOKEN", TOKEN)
    assert shown(config(tmp_path)) == (("authorization", f"Bearer {TOKEN}"),)
    monkeypatch.setenv("DRIFTLINE_TEACHER_TOKEN_FILE", str(files[1]))
    assert shown(config(tmp_path)) == (("authorization", "Bearer second"),)
    made = config(tmp_path, f"token_file={files[0]}")
    assert shown(made) == (("authorization", "Bearer first"),)
    files[0].write_text("renewed")
    assert shown(made) == (("authorization", "Bearer renewed"),)


def test_no_token_is_in_a_printed_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN)
    monkeypatch.setenv("DRIFTLINE_TEACHER_TOKEN", TOKEN)
    made = config(tmp_path, f"token_file={path}")
    assert main(["show-config", "--config", str(tmp_path / "trainer.toml")]) == 0
    assert TOKEN not in capsys.readouterr().out + repr(made) + repr(teacher_access(made.teacher))


def test_tls_settings_reach_the_connection(tmp_path: Path) -> None:
    access = teacher_access(config(tmp_path, "tls_ca=ca", "tls_cert=c", "tls_key=k").teacher)
    assert (access.tls_ca, access.tls_cert, access.tls_key) == (Path("ca"), Path("c"), Path("k"))


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (("tls_ca=ca", "tls_cert=c"), "tls_cert and tls_key must be given together"),
        (("tls_ca=ca", "tls_key=k"), "tls_cert and tls_key must be given together"),
        (("tls_cert=c", "tls_key=k"), "tls_cert needs tls_ca"),
    ],
)
def test_half_of_a_tls_configuration_is_refused(
    overrides: tuple[str, ...], text: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=text):
        config(tmp_path, *overrides)
