"""What cyclonedx-py tells of an environment, of the product alone: `make sbom`.

Run: python -m scripts.bill_of_materials PYTHON < environment.cdx.json > dist/driftline.cdx.json

A developer's environment holds tests and tools beside it, and this checkout by its path: what only
the extra `dev` asks for goes, and so does every path. The version is that of the checkout.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from teacher_wire import __version__

ROOT = Path(__file__).resolve().parents[1]
NOT_SHIPPED = frozenset({"dev"})
CLIENT = "driftline-client"
_LISTED = """
import json
from importlib.metadata import distributions
print(json.dumps({one.metadata["Name"]: one.requires or [] for one in distributions()}))
"""


class StaleEnvironmentError(ValueError):
    """What is installed is not of this checkout's version."""


def required(project: Mapping[str, Any]) -> list[Requirement]:
    """What the product requires, with every extra but those for its developers."""
    extras: Mapping[str, list[str]] = project.get("optional-dependencies", {})
    lines = list(project["dependencies"])
    lines += [line for name, more in extras.items() if name not in NOT_SHIPPED for line in more]
    return [Requirement(line) for line in lines]


def installed(python: str) -> dict[str, list[str]]:
    """The requirements of every distribution beside an interpreter, by its name. Raises
    CalledProcessError."""
    done = subprocess.run([python, "-c", _LISTED], check=True, stdout=subprocess.PIPE)
    found: dict[str, list[str]] = json.loads(done.stdout)
    return {canonicalize_name(name): lines for name, lines in found.items()}


def closure(roots: Iterable[Requirement], there: Mapping[str, list[str]]) -> frozenset[str]:
    """Names of what is required, of all that is there: an extra counts where somebody asks for
    it."""
    seen: set[tuple[str, str]] = set()
    waiting = [(canonicalize_name(r.name), extra) for r in roots for extra in ("", *r.extras)]
    while waiting:
        if (one := waiting.pop()) in seen or one[0] not in there:
            continue
        seen.add(one)
        for requirement in map(Requirement, there[one[0]]):
            marker = requirement.marker
            if marker is None or marker.evaluate({"extra": one[1]}):
                name = canonicalize_name(requirement.name)
                waiting += [(name, extra) for extra in ("", *requirement.extras)]
    return frozenset(name for name, _ in seen)


def of_the_product(told: Mapping[str, Any], names: frozenset[str], version: str) -> dict[str, Any]:
    """The same bill of `names` alone, and without paths of this machine.

    Raises StaleEnvironmentError.
    """
    by_ref = {one["bom-ref"]: one for one in told["components"]}
    for one in by_ref.values():
        if canonicalize_name(one["name"]) == CLIENT and one["version"] != version:
            raise StaleEnvironmentError(
                f"{CLIENT} {one['version']} is installed there, and this checkout is {version}: "
                "install it anew (`make setup`)"
            )
    asks = {one["ref"]: one.get("dependsOn", []) for one in told["dependencies"]}
    root = {**told["metadata"]["component"], "version": version}
    kept = {ref for ref, one in by_ref.items() if canonicalize_name(one["name"]) in names}
    graph = []
    for ref in (root["bom-ref"], *sorted(kept)):
        on = sorted(kept & {*asks.get(ref, [])})
        graph.append({"ref": ref, "dependsOn": on} if on else {"ref": ref})
    return {
        **told,
        "metadata": {**told["metadata"], "component": _placeless(root)},
        "components": [_placeless(one) for ref, one in by_ref.items() if ref in kept],
        "dependencies": graph,
    }


def _placeless(component: Mapping[str, Any]) -> dict[str, Any]:
    """Without references to files of this machine."""
    references = [
        one for one in component.get("externalReferences", []) if not one["url"].startswith("file:")
    ]
    rest = {key: value for key, value in component.items() if key != "externalReferences"}
    return {**rest, "externalReferences": references} if references else rest


def main() -> int:
    """From standard input to standard output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", nargs="?", default=sys.executable, help="of the environment")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = closure(required(project), installed(parser.parse_args().python))
    try:
        made = of_the_product(json.load(sys.stdin), names, __version__)
    except StaleEnvironmentError as error:
        sys.stderr.write(f"sbom: {error}\n")
        return 2
    sys.stdout.write(json.dumps(made, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
