"""What a dashboard is made of: rows of panels, and the queries of each."""

from __future__ import annotations

from dataclasses import dataclass

RATE = "[$__rate_interval]"


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a panel, and what its curves are called."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves over time, in a unit of Grafana's."""

    title: str
    unit: str
    text: str
    queries: tuple[Query, ...]
    stacked: bool = False
    from_zero: bool = True


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """One dashboard, and the label by which what it shows is chosen."""

    name: str
    """Of its file."""
    uid: str
    title: str
    variable: str
    listed_by: str
    """Metric that has every value of the variable."""
    rows: tuple[Row, ...]
