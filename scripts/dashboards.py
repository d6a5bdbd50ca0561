"""Writes Grafana's dashboards of teacher and trainers from the tables of panels beside it.

Run: make docs. A test compares the files with `dashboard()`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts.panels import Board, Panel, Row
from scripts.teacher_panels import TEACHER
from scripts.trainer_panels import TRAINER

FOLDER = Path(__file__).resolve().parent.parent / "docker" / "observability" / "grafana"
DASHBOARDS = FOLDER / "dashboards"
SOURCE = {"type": "prometheus", "uid": "prometheus"}
"""As docker/observability/grafana/provisioning names it."""
COLUMNS, WIDTH, HEIGHT = 3, 8, 7
"""Panels beside each other; Grafana's grid has 24 columns."""
SCHEMA_VERSION = 39


def dashboard(board: Board) -> dict[str, Any]:
    """One dashboard as Grafana reads it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row in board.rows:
        panels.append(_row(row, len(panels) + 1, y))
        y += 1
        for index, panel in enumerate(row.panels):
            place = {"x": index % COLUMNS * WIDTH, "y": y + index // COLUMNS * HEIGHT}
            panels.append(_panel(panel, len(panels) + 1, place))
        y += -(-len(row.panels) // COLUMNS) * HEIGHT
    return {
        "uid": board.uid,
        "title": board.title,
        "tags": ["driftline"],
        "timezone": "browser",
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_variable(board)]},
        "panels": panels,
    }


def _variable(board: Board) -> dict[str, Any]:
    query = f"label_values({board.listed_by}, {board.variable})"
    return {
        "name": board.variable,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": "variable"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _row(row: Row, number: int, y: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": "row",
        "title": row.title,
        "collapsed": False,
        "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
        "panels": [],
    }


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    custom: dict[str, Any] = {"drawStyle": "line", "fillOpacity": 70 if panel.stacked else 5}
    if panel.stacked:
        custom["stacking"] = {"mode": "normal", "group": "A"}
    defaults: dict[str, Any] = {"unit": panel.unit, "custom": custom}
    defaults |= {"min": 0} if panel.from_zero else {}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "gridPos": {**place, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": SOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
            }
            for index, query in enumerate(panel.queries)
        ],
    }


def text_of(board: Board) -> str:
    """The file."""
    return json.dumps(dashboard(board), indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    for board in (TEACHER, TRAINER):
        (DASHBOARDS / f"{board.name}.json").write_text(text_of(board), encoding="utf-8")


if __name__ == "__main__":
    main()
