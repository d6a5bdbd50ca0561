"""`teacher-server analyze`: rollouts of a file, scored by a checkpoint in this process or by a
teacher that runs, and the report of them."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teacher_server.analyze.rows import Given
    from teacher_server.process.scorers import Teacher
    from teacher_wire.records import DriftPolicy, ScoreOptions, Scores, TokenSpan

EXIT_FAILED = 1
AT_ONCE = 16
"""Rollouts that a running teacher is asked for at a time."""
MAX_K = 4096
"""Entries and candidates that a checkpoint in this process takes, or as many as its vocabulary."""
DEFAULT_POLICY = {"metric": "overlap_ratio", "k": 8, "threshold": 0.5, "w_drop": 0.01}
"""The trainer's for language; of a recorded file its own counts."""


def add_parser(commands: Any) -> None:
    """The command and its flags."""
    parser = commands.add_parser(
        "analyze",
        help="score the rollouts of a file and write a report of them",
        description="Scores the rollouts of a file (JSON lines or Parquet; docs/analyze.md has the "
        "columns, and rollouts that a trainer recorded are taken as they are) and writes a report: "
        "one HTML file, nothing else needed.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help=".jsonl or .parquet")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="checkpoint that scores: a folder or a hub name")
    source.add_argument("--address", metavar="HOST:PORT", help="gRPC address of a running teacher")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default FILE.html)")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="Parquet file of scored rows")
    parser.add_argument("--pngs", type=Path, metavar="DIR", help="a PNG file of every picture")
    parser.add_argument("--tokenizer", help="of texts; default: the model's")
    parser.add_argument("--k", type=int, default=8, help="size of the teacher's top-k (default 8)")
    parser.add_argument(
        "--temperature", type=float, help="default: that of recorded rollouts, or 1"
    )
    parser.add_argument(
        "--policy", type=_json, metavar="JSON",
        help=f"drift policy, null for none; default: that of recorded rollouts, or "
        f"{json.dumps(DEFAULT_POLICY)}",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="with --model: auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", help="with --model: arithmetic (default auto)")
    parser.add_argument(
        "--max-context", type=int, help="with --model: longest row (default 8192, or the model's)"
    )
    parser.add_argument(
        "--skip-invalid",
        action="store_true",
        help="leave rows out that cannot be scored, and say so",
    )
    for name, text in (("token-file", "token"), ("tls-ca", "CA of the teacher's certificate")):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"with --address: {text}")
    parser.set_defaults(policy=DEFAULT_POLICY)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(
            f"must be a JSON object or null, is {text!r}: {error}"
        ) from None


def analyze(arguments: argparse.Namespace) -> int:
    """Runs the command; what is wrong with file or teacher is one line on stderr, exit code 1."""
    from rollout_records.errors import RecordingError
    from teacher_client.access import AccessError
    from teacher_server.settings import ConfigError
    from teacher_wire.errors import TeacherError

    try:
        return asyncio.run(analyzed(arguments))
    except (RecordingError, TeacherError, AccessError, ConfigError) as error:
        print(f"teacher-server: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"teacher-server: {where}{error.strerror or error}", file=sys.stderr)  # noqa: T201
    return EXIT_FAILED


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How the rows are scored."""

    options: ScoreOptions
    policy: DriftPolicy | None


async def analyzed(arguments: argparse.Namespace) -> int:
    from rollout_records.schema import Origin
    from rollout_records.writing import table_of, write_table
    from run_report.page import report
    from run_report.token_pieces import pieces_of
    from teacher_server.analyze.results import figures, scored_row

    path: Path = arguments.file
    notes: list[str] = []
    recorded = _origin(path)
    tokenizer_name = arguments.tokenizer or arguments.model or recorded.tokenizer
    rows = _given(arguments, tokenizer_name, notes)
    asked = _asked(arguments, recorded)
    async with _teacher(arguments) as teacher:
        scored = await _scored(rows, teacher, asked, arguments.skip_invalid, notes)
        model_id = teacher.model_id
    if not scored:
        from rollout_records.errors import RecordingError

        raise RecordingError(f"{path}: no row was scored: {notes[-1] if notes else 'it is empty'}")
    table = table_of(
        [scored_row(row, number, scores, asked.policy) for number, row, scores in scored]
    )
    policy = _told(asked.policy)
    if arguments.rows:
        origin = Origin(
            tokenizer=tokenizer_name, student=recorded.student, teachers={"": model_id},
            drift_policy=policy, temperature=asked.options.temperature, run=recorded.run,
        )  # fmt: skip
        write_table(arguments.rows, table, origin)
    about = [
        ("rollouts", str(path.name)),
        ("teacher", model_id),
        ("student", recorded.student or "-"),
        ("temperature", f"{asked.options.temperature:g}"),
        ("drift policy", "none" if policy is None else json.dumps(policy)),
    ]
    pieces = pieces_of(Path(tokenizer_name)) if tokenizer_name else None
    made = report(
        [figures(path.name, table, about=about, pieces=pieces, notes=notes)],
        f"{path.name}, scored by {model_id}",
    )
    page = made.write(arguments.out or path.with_suffix(".html"))
    if arguments.pngs:
        made.save_charts(arguments.pngs)
    print(f"{len(scored)} rollouts scored: {page}")  # noqa: T201
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)  # noqa: T201
    return 0


def _origin(path: Path) -> Any:
    """Of recorded rollouts what they say of themselves; nothing of other files."""
    from rollout_records.reading import RecordingError, origin
    from rollout_records.schema import Origin

    try:
        return origin(path)
    except RecordingError:
        return Origin()


def _given(arguments: argparse.Namespace, tokenizer: str | None, notes: list[str]) -> list[Given]:
    """The rows of the file as ids. Raises RecordingError for the first that is none, unless such
    are skipped."""
    from rollout_records.errors import RecordingError
    from teacher_server.analyze.rows import given, read_rows

    found, lossy, skipped = [], [], []
    loaded: Any = None
    for where, row in read_rows(arguments.file, notes):
        try:
            if isinstance(row, RecordingError):
                raise row
            if loaded is None and tokenizer is not None and _needs_tokenizer(row):
                loaded = _tokenizer(tokenizer)
            made = given(where, row, loaded)
        except RecordingError as error:
            if not arguments.skip_invalid:
                raise
            skipped.append(str(error))
            continue
        found.append(made)
        lossy += [where] * made.loses_text
    if skipped:
        notes.append(f"{len(skipped)} rows are left out; the first: {skipped[0]}.")
    if lossy:
        notes.append(
            f"The tokenizer does not keep the text of {len(lossy)} rows, {lossy[0]} the first: "
            "what is scored reads otherwise."
        )
    return found


def _needs_tokenizer(row: Mapping[str, Any]) -> bool:
    sides = ("prompt", "response")
    return any(row.get(s) is None or row.get(f"{s}_ids") is None for s in sides)


def _tokenizer(name: str) -> Any:
    from teacher_server.process.loading import load_tokenizer
    from teacher_server.settings import ConfigError, TeacherConfig

    try:
        return load_tokenizer(TeacherConfig(engine="hf", model=name))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the tokenizer of {name!r}: {error}") from error


def _asked(arguments: argparse.Namespace, recorded: Any) -> Asked:
    """Options and policy: as asked for, else as the rollouts were recorded. Raises
    InvalidRequestError."""
    from teacher_wire.errors import InvalidRequestError
    from teacher_wire.records import ScoreOptions

    if arguments.k < 1:
        raise InvalidRequestError(f"--k is {arguments.k}, must be at least 1")
    settings = arguments.policy
    if settings is DEFAULT_POLICY and recorded.drift_policy is not None:
        settings = recorded.drift_policy
    temperature = arguments.temperature
    if temperature is None:
        temperature = 1.0 if recorded.temperature is None else recorded.temperature
    policy = None if settings is None else drift_policy(settings)
    k = arguments.k if policy is None else max(arguments.k, policy.metric.k)
    options = ScoreOptions(k=k, temperature=temperature, want_entropy=True, want_rank=True)
    return Asked(options=options, policy=policy)


def drift_policy(settings: Mapping[str, Any]) -> DriftPolicy:
    """A policy that observes, by the names of its settings. Raises InvalidRequestError naming what
    is wrong."""
    from teacher_wire.drift_metrics import METRICS
    from teacher_wire.errors import InvalidRequestError
    from teacher_wire.records import DriftPolicy

    if not isinstance(settings, Mapping):
        raise InvalidRequestError(f"--policy must be an object or null, is {settings!r}")
    name = settings.get("metric", "overlap_ratio")
    if not isinstance(name, str) or name not in METRICS:
        raise InvalidRequestError(f"drift metric is {name!r}, must be one of {', '.join(METRICS)}")
    known = {field.name for field in fields(METRICS[name])}
    common = {"metric", "w_drop", "stop_in_flight"}
    if unknown := sorted(set(settings) - known - common):
        raise InvalidRequestError(
            f"drift {', '.join(unknown)}: not read by {name}, which reads "
            f"{', '.join(sorted(known | common))}"
        )
    for setting, value in settings.items():
        kind, what = (int, "a whole number") if setting == "k" else ((int, float), "a number")
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        if setting in known | {"w_drop"} and not is_number:
            raise InvalidRequestError(f"drift {setting} is {value!r}, must be {what}")
    metric = METRICS[name](**{n: value for n, value in settings.items() if n in known})
    return DriftPolicy(metric=metric, w_drop=settings.get("w_drop", 0.01), stop_in_flight=False)


def _told(policy: DriftPolicy | None) -> dict[str, object] | None:
    from rollout_records.measures import policy_settings

    return None if policy is None else policy_settings(policy)


async def _scored(
    rows: Sequence[Given], teacher: Teacher, asked: Asked, skips: bool, notes: list[str]
) -> list[tuple[int, Given, Scores]]:
    """Every row with its number and its scores. Raises RecordingError for one that does not fit the
    teacher, unless such are skipped."""
    from rollout_records.errors import RecordingError
    from teacher_server.analyze.rows import check_fits

    fitting, unfit = [], []
    for number, row in enumerate(rows):
        try:
            check_fits(
                row,
                vocab_size=teacher.vocab_size,
                max_context=teacher.max_context,
                max_k=teacher.max_k,
            )
        except RecordingError as error:
            if not skips:
                raise
            unfit.append(str(error))
        else:
            fitting.append((number, row))
    if unfit:
        notes.append(f"{len(unfit)} rows do not fit the teacher; the first: {unfit[0]}.")
    without = sum(row.candidate_ids is None for _, row in fitting)
    compares = asked.policy is not None and asked.policy.metric.compares_candidates
    if without and compares:
        notes.append(
            f"{without} of {len(fitting)} rows have no candidate_ids: they have no overlap, and no "
            "drift by a policy that compares them."
        )
    gate = asyncio.Semaphore(AT_ONCE)

    async def score(row: Given) -> Scores:
        policy = None if compares and not _can_compare(row, asked.policy) else asked.policy
        async with gate:
            return await teacher.score(row.prompt_ids, _span(row), asked.options, policy)

    scores = await asyncio.gather(*(score(row) for _, row in fitting))
    return [(n, row, got) for (n, row), got in zip(fitting, scores, strict=True)]


def _can_compare(row: Given, policy: DriftPolicy | None) -> bool:
    return (
        row.candidate_ids is not None
        and policy is not None
        and row.candidate_ids.shape[1] >= policy.metric.k
    )


def _span(row: Given) -> TokenSpan:
    from teacher_wire.records import TokenSpan

    return TokenSpan(
        offset=0,
        token_ids=row.response_ids,
        candidate_ids=row.candidate_ids,
        event_mask=None if row.mask.all() else row.mask,
    )


def _teacher(arguments: argparse.Namespace) -> AbstractAsyncContextManager[Teacher]:
    """A checkpoint in this process, or a teacher that runs."""
    from teacher_server.process.scorers import loaded, running
    from teacher_server.settings import TeacherConfig

    if not arguments.model:
        return running(arguments.address, token_file=arguments.token_file, tls_ca=arguments.tls_ca)
    given = {} if arguments.max_context is None else {"max_context": arguments.max_context}
    return loaded(
        TeacherConfig(
            engine="hf",
            model=arguments.model,
            device=arguments.device,
            dtype=arguments.dtype,
            max_k=MAX_K,
            **given,
        )
    )
