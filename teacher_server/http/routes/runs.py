"""Recorded rollouts: the runs of `--runs`, their steps, a step's rollouts, one rollout.

Files are read and replies rendered in threads, a few at a time, and in pieces that let this loop
turn meanwhile: it carries the gRPC streams too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import APIRouter, Path, Query, Request, Response
from numpy.typing import NDArray
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from teacher_server.http.analysis import TokenTexts
from teacher_server.http.deps import HttpDeps
from teacher_wire.errors import PermissionDeniedError

PARQUET = "application/vnd.apache.parquet"
MAX_READS = 2
"""Files read at once; the others wait."""
ROWS_AT_A_TIME = 512
"""Of a [T][K] column, rendered without letting another thread in."""
DECIMALS = 5

_Number = Annotated[int, Path(ge=0, le=2**31 - 1)]
_T = TypeVar("_T")
_ID_COLUMNS = ("prompt_ids", "response_ids", "teacher_topk_ids", "student_topk_ids")
_AS_FILE: dict[str, Any] = {
    "response_class": Response,
    "responses": {200: {"content": {"application/json": {}, PARQUET: {}}}},
}
"""What the published schema says of a path that answers with a file where that is accepted."""


def routes(deps: HttpDeps) -> APIRouter:
    """/v1/runs and what is below."""
    router = APIRouter(prefix="/v1/runs", dependencies=deps.token_in_schema())
    texts = TokenTexts(deps.tokenizer)
    turn = asyncio.Semaphore(MAX_READS)

    async def read(request: Request, work: Callable[[], _T]) -> _T:
        if not deps.sees_runs(request.state.tenant):
            raise PermissionDeniedError(
                f"tenant {request.state.tenant!r} does not see runs: that takes runs = true in "
                "the tenants file"
            )
        async with turn:
            return await _told(work)

    def folder() -> Any:
        if deps.runs is None:
            raise HTTPException(404, "this server shows no runs: it was started without --runs")
        return deps.runs

    @router.get("")
    async def list_runs(request: Request) -> dict[str, Any]:
        """The runs with recorded rollouts, the last written first."""
        entries, left_out = await read(request, folder().runs)
        return {"runs": [asdict(entry) for entry in entries], "left_out": left_out}

    @router.get("/{run}")
    async def list_steps(
        request: Request,
        run: str,
        before: Annotated[int, Query(ge=0, le=2**31 - 1)] = 2**31 - 1,
        limit: Annotated[int, Query(ge=1, le=500)] = 100,
    ) -> dict[str, Any]:
        """The last steps of a run, ascending, and whose rollouts they are."""
        of_runs = folder()

        def work() -> dict[str, Any]:
            entries, earlier = of_runs.steps(run, before=before, limit=limit)
            steps = [asdict(entry) for entry in entries]
            return {"run": run, "origin": of_runs.origin(run), "steps": steps, "earlier": earlier}

        return await read(request, work)

    @router.get("/{run}/steps/{step}", **_AS_FILE)
    async def list_rollouts(request: Request, run: str, step: _Number) -> Response:
        """The rollouts of a step without their tokens, or its file."""
        of_runs = folder()
        if _wants_file(request):
            content = await read(request, lambda: of_runs.step_file(run, step))
            return _file(content, f"{run}-step-{step}")

        def work() -> bytes:
            rollouts, left_out, problems = of_runs.rollouts(run, step)
            content = {"run": run, "step": step, "rollouts": rollouts}
            return to_json({**content, "left_out": left_out, "problems": problems})

        return Response(await read(request, work), media_type="application/json")

    @router.get("/{run}/steps/{step}/rollouts/{index}", **_AS_FILE)
    async def show_rollout(request: Request, run: str, step: _Number, index: _Number) -> Response:
        """Every column of one rollout with the texts of its ids, or a file with that row."""
        of_runs = folder()
        if _wants_file(request):
            content = await read(request, lambda: of_runs.rollout_file(run, step, index))
            return _file(content, f"{run}-step-{step}-rollout-{index}")

        def work() -> dict[str, Any]:
            columns, origin = of_runs.rollout(run, step, index)
            return {"run": run, **columns, "origin": origin}

        content = await read(request, work)
        async with deps.tokenizer_turn:
            return await asyncio.to_thread(_rendered, content, texts, deps)

    return router


async def _told(work: Callable[[], _T]) -> _T:
    """The result of a thread; what it says of a recording becomes a 4xx."""
    from rollout_records.errors import RecordingError  # Arrow comes with it

    try:
        return await asyncio.to_thread(work)
    except LookupError as error:
        raise HTTPException(404, str(error.args[0])) from None
    except RecordingError as error:
        raise HTTPException(422, str(error)) from None


def _wants_file(request: Request) -> bool:
    return PARQUET in request.headers.get("accept", "")


def _file(content: bytes, name: str) -> Response:
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name)
    disposition = f'attachment; filename="{plain}.parquet"'
    headers = {"content-disposition": disposition}
    return Response(content, media_type=PARQUET, headers=headers)


def _rendered(content: dict[str, Any], texts: TokenTexts, deps: HttpDeps) -> Response:
    """The JSON of one rollout."""
    origin, warnings = content["origin"], []
    known = _texts(content, texts)
    fingerprint = origin["tokenizer_fingerprint"]
    if fingerprint is not None and fingerprint != deps.info.tokenizer_fingerprint:
        known = {}
        warnings.append(
            {
                "reason": "TOKENIZER",
                "message": "these ids are of another tokenizer than this teacher's: tokens are "
                "shown by their ids",
                "positions": [],
            }
        )
    teachers = origin["teachers"] or {}
    content |= {
        "model_id": teachers.get(content["teacher"] or ""),
        "k": content["teacher_topk_ids"].shape[1],
        "temperature": origin["temperature"],
        "policy": origin["drift_policy"],
        "special_token_ids": deps.info.special_token_ids,
        "texts": known,
        "warnings": warnings,
    }
    return Response(b"".join(_pieces(content)), media_type="application/json")


def _texts(content: dict[str, Any], texts: TokenTexts) -> dict[str, str]:
    """Id -> text, of every id that occurs and that the tokenizer knows."""
    arrays = [content[name] for name in _ID_COLUMNS if content.get(name) is not None]
    ids = np.unique(np.concatenate([array.ravel() for array in arrays])).tolist()
    found = ((i, texts[i]) for i in ids)
    return {str(i): text for i, text in found if text is not None}


def _pieces(content: dict[str, Any]) -> Iterator[bytes]:
    """A JSON object in pieces; arrays by rows, so that other threads get in between."""
    before = b"{"
    for name, value in content.items():
        yield before + to_json(name) + b":"
        before = b","
        if isinstance(value, np.ndarray):
            yield from _array_pieces(value)
        else:
            yield to_json(value, inf_nan_mode="null")
    yield b"}"


def _array_pieces(array: NDArray[Any]) -> Iterator[bytes]:
    before = b"["
    for start in range(0, len(array), ROWS_AT_A_TIME):
        rows = array[start : start + ROWS_AT_A_TIME]
        if rows.dtype.kind == "f":
            rows = np.round(rows.astype(np.float64), DECIMALS)
        yield before + to_json(rows.tolist(), inf_nan_mode="null")[1:-1]
        before = b","
    yield b"]" if len(array) else b"[]"
