"""The queries that dashboards, alerts and guides hold, and the metrics and labels they name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from tests.tracked_files import ROOT

FOLDER = ROOT / "docker" / "observability"
DASHBOARDS = sorted((FOLDER / "grafana" / "dashboards").glob("*.json"))
GUIDES = sorted((ROOT / "docs").glob("operations*.md"))
FUNCTIONS = {
    *("sum", "max", "count", "topk", "rate", "increase", "histogram_quantile", "time"),
    *("max_over_time", "last_over_time", "absent", "and", "or", "unless"),
    *("by", "on", "ignoring", "group_left", "inf", "nan"),
}
SELECTOR = re.compile(r"\b([a-z_]\w*)\s*(\{[^}]*\})?")
LABELS = re.compile(r"\b(?:by|on|ignoring|group_left)\s*\(([^)]*)\)")
KEPT = re.compile(r"\b(?:by|on|group_left)\s*\(([^)]*)\)")
MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"")


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A query, and where it stands."""

    where: str
    expr: str
    legend: str = ""


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of a dashboard that draw something."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def panel_queries() -> Iterator[Named]:
    """Every query of every panel, as it stands in the file."""
    for path in DASHBOARDS:
        for panel in panels(json.loads(path.read_text(encoding="utf-8"))):
            for target in panel["targets"]:
                where = f"{path.stem}: {panel['title']} {target['refId']}"
                yield Named(where=where, expr=target["expr"], legend=target["legendFormat"])


def alerts() -> list[dict[str, Any]]:
    """The rules of every group."""
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def watched(rule: dict[str, Any]) -> Named:
    """What an alert looks at first, without what it is compared with."""
    expr, compared, _ = re.split(r"(==|>|<)", rule["expr"], maxsplit=1)
    assert compared
    return Named(where=rule["alert"], expr=expr.strip())


def documented_queries() -> Iterator[Named]:
    """What guides tell their reader to ask Prometheus."""
    for path in GUIDES:
        for span in re.findall(r"`([^`\n]+)`", path.read_text(encoding="utf-8")):
            if re.search(r"\b(rate|increase|sum|histogram_quantile) ?\(|teacher_\w+\{", span):
                yield Named(where=path.name, expr=span)


def substituted(expr: str, *, rate_interval: str = "1m") -> str:
    """A query as Grafana sends it with everything chosen."""
    for variable, value in (
        ("$__rate_interval", rate_interval),
        ("$instance", ".*"),
        ("$run", ".*"),
    ):
        expr = expr.replace(variable, value)
    assert "$" not in expr
    return expr


def named_metrics(expr: str) -> dict[str, set[str]]:
    """Metrics that a query names -> the labels by which it selects among each."""
    bare = LABELS.sub("", expr)
    found: dict[str, set[str]] = {}
    for name, matchers in SELECTOR.findall(re.sub(r"\[[^\]]*\]", "", bare)):
        if name not in FUNCTIONS and not re.search(rf"[{{,]\s*{name}\s*(=|!)", bare):
            found.setdefault(name, set()).update(MATCHER.findall(matchers or ""))
    return found


def named_labels(expr: str) -> set[str]:
    """Labels by which a query sums or joins."""
    return {
        label.strip() for group in KEPT.findall(expr) for label in group.split(",") if label.strip()
    }
