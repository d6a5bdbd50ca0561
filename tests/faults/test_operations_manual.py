"""The manual knows every metric, error and exit that a server has, and no others.

Run: pytest tests/faults/test_operations_manual.py
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from teacher_server.metrics.server import Metrics
from teacher_server.process.lifecycle import Phase
from teacher_server.settings import TeacherConfig
from teacher_wire.errors import ERROR_CODES

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def first_cells(heading: str) -> set[str]:
    """What stands in backticks in the first column below a heading."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))


def exported() -> set[str]:
    """Names as they stand in an answer of /metrics, without those of the process."""
    names = set()
    for family in Metrics().registry.collect():
        if not family.name.startswith(("process_", "python_")):
            names.add(family.name + "_total" * (family.type == "counter"))
    return names


def test_every_metric_is_explained_and_no_other() -> None:
    assert first_cells("Watch") == exported()


def test_every_error_is_explained_with_its_codes() -> None:
    assert first_cells("Errors") == {cls.__name__ for cls in ERROR_CODES}
    for cls, code in ERROR_CODES.items():
        assert f"| `{cls.__name__}` | {code.grpc.name}, {code.http} |" in TEXT


def test_every_phase_is_explained() -> None:
    for phase in Phase:
        assert re.search(rf"^\| {phase.value}\b", TEXT, re.MULTILINE), phase


def test_rules_and_texts_name_metrics_and_settings_that_exist() -> None:
    known = exported() | {f"{name}_bucket" for name in exported()}
    assert set(re.findall(r"\b(?:teacher|grpc_server)_[a-z_]+\b(?!\.)", TEXT)) - known <= {
        "teacher_wire"
    }
    defaults = {name: entry.default for name, entry in TeacherConfig.model_fields.items()}
    named = re.findall(r"`((?:engine|max|drain|session|log|otlp|hf)_[a-z_]+)`", TEXT)
    assert set(named) <= set(defaults)
    for name, value in re.findall(r"`(\w+_s)` \((\d+) s\)", TEXT):
        assert defaults[name] == float(value), name


def test_the_example_is_yaml_with_the_job_that_rules_know() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    (job,) = yaml.safe_load(block)["scrape_configs"]
    assert job["static_configs"][0]["targets"]
    assert f'job="{job["job_name"]}"' in (ROOT / "docker/observability/alerts.yml").read_text()
