"""Reports of a teacher as pandas DataFrames, one row a token. pandas is asked for by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from teacher_wire.report_columns import IN_TABLE

if TYPE_CHECKING:
    import pandas as pd

STUDENT_COLUMNS = {
    "behavior_logprobs": "behavior_logprob",
    "candidate_logprobs": "candidate_logprobs",
    "student_topk_logprobs": "candidate_logprobs",
}
"""What a rollout may bring along for its tokens, and its name in the table."""


def pandas() -> Any:
    """The module. Raises ModuleNotFoundError with the extra that brings it."""
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a table of tokens is a pandas DataFrame, and pandas is not installed: "
            "pip install 'driftline-client[pandas]', or ask for reports()",
            name="pandas",
        ) from error
    return pandas


def frame_of(
    reports: Mapping[int, Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> pd.DataFrame:
    """One row a token of every report, by the number of its rollout. `attrs["rollouts"]` has what
    is not of a token, a dict a rollout."""
    parts = []
    for index, report in sorted(reports.items()):
        columns = {"rollout": index} | _of_tokens(report, report["texts"])
        parts.append(columns | _students(rows[index], len(report["response_ids"])))
    frame = _joined(parts)
    frame.attrs["rollouts"] = [
        {"rollout": index} | _whole(report) for index, report in sorted(reports.items())
    ]
    return frame


def comparison_frame(answer: Mapping[str, Any]) -> pd.DataFrame:
    """One row for each token of each response under each policy; `policy` is its number, None
    without any. `attrs["responses"]` has what is not of a token."""
    parts, wholes = [], []
    for index, report in enumerate(answer["responses"]):
        if "error" in report:
            continue
        bare = dict.fromkeys(("overlap", "bad_events", "reliability"))
        for number, judged in enumerate(report["judgements"] or [bare]):
            policy = number if report["judgements"] else None
            marks = {"response": index, "name": report["name"], "policy": policy}
            parts.append(marks | _of_tokens({**report, **judged}, answer["texts"]))
        wholes.append({"response": index} | _whole(report))
    frame = _joined(parts)
    frame.attrs["responses"] = wholes
    return frame


def _of_tokens(report: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, Any]:
    def shown(ids: Iterable[int]) -> list[str | None]:
        return [texts.get(str(token_id)) for token_id in ids]

    ids = report["response_ids"]
    columns: dict[str, Any] = {"position": list(range(len(ids))), "text": shown(ids)}
    for name, singular in IN_TABLE.items():
        values = report[name]
        columns[singular] = [None] * len(ids) if values is None else values
        if name in ("teacher_topk_ids", "candidate_ids"):
            given = values is not None
            texts_name = singular.replace("_ids", "_texts")
            columns[texts_name] = list(map(shown, values)) if given else [None] * len(ids)
    return columns


def _students(row: Mapping[str, Any], num_tokens: int) -> dict[str, Any]:
    """Columns that the rollout itself brings; raises ValueError for one of another length."""
    columns = {}
    for name, singular in STUDENT_COLUMNS.items():
        values = row.get(name)
        if values is None or isinstance(values, float):
            continue
        if len(values) != num_tokens:
            raise ValueError(f"{name} has {len(values)} entries, the response {num_tokens} tokens")
        columns[singular] = list(values)
    return columns


def _joined(parts: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The columns of all parts one below the other; a value that is no list is of every row."""
    names = list(dict.fromkeys(name for part in parts for name in part))
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for part in parts:
        count = len(part["position"])
        for name in names:
            value = part.get(name)
            columns[name] += value if isinstance(value, list) else [value] * count
    made: pd.DataFrame = pandas().DataFrame(columns)
    return made


def _whole(report: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if name not in (*IN_TABLE, "texts")}
