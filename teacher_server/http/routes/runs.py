"""Recorded rollouts: the runs of `--runs`, their steps, a step's rollouts, one rollout.

Files are read and replies rendered in threads, a few at a time, and in pieces that let this loop
turn meanwhile: it carries the gRPC streams too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import APIRouter, Path, Query, Request, Response
from starlette.exceptions import HTTPException

from teacher_server.http.analysis import ids_in
from teacher_server.http.deps import HttpDeps
from teacher_server.http.rendering import JSON, json_bytes
from teacher_server.http.texts import TokenTexts
from teacher_wire.errors import PermissionDeniedError

PARQUET = "application/vnd.apache.parquet"
MAX_READS = 2
"""Files read at once; the others wait."""
DECIMALS = 5

_Number = Annotated[int, Path(ge=0, le=2**31 - 1)]
_T = TypeVar("_T")
_FOREIGN = {
    "reason": "tokenizer",
    "field": "texts",
    "message": "these ids are of another tokenizer than this teacher's: tokens are shown by their ids",
    "positions": [],
}
_ID_COLUMNS = ("prompt_ids", "response_ids", "teacher_topk_ids", "student_topk_ids")
_AS_FILE: dict[str, Any] = {
    "response_class": Response,
    "responses": {200: {"content": {JSON: {}, PARQUET: {}}}},
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
            return json_bytes({**content, "left_out": left_out, "problems": problems})

        return Response(await read(request, work), media_type=JSON)

    @router.get("/{run}/steps/{step}/rollouts/{index}", **_AS_FILE)
    async def show_rollout(request: Request, run: str, step: _Number, index: _Number) -> Response:
        """Every column of one rollout with the texts of its ids, or a file with that row."""
        of_runs = folder()
        if _wants_file(request):
            content = await read(request, lambda: of_runs.rollout_file(run, step, index))
            return _file(content, f"{run}-step-{step}-rollout-{index}")

        def work() -> bytes:
            columns, origin = of_runs.rollout(run, step, index)
            return _rendered({"run": run, **columns, "origin": origin}, texts, deps)

        return Response(await read(request, work), media_type=JSON)

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


def _rendered(content: dict[str, Any], texts: TokenTexts, deps: HttpDeps) -> bytes:
    """The JSON of one rollout; measured numbers to DECIMALS, missing ones null."""
    origin = content["origin"]
    fingerprint = origin["tokenizer_fingerprint"]
    is_foreign = fingerprint is not None and fingerprint != deps.info.tokenizer_fingerprint
    teachers = origin["teachers"] or {}
    shown = {
        name: np.round(value, DECIMALS)
        if isinstance(value, np.ndarray) and value.dtype.kind == "f"
        else value
        for name, value in content.items()
    }
    return json_bytes(
        {
            **shown,
            "model_id": teachers.get(content["teacher"] or ""),
            "k": content["teacher_topk_ids"].shape[1],
            "temperature": origin["temperature"],
            "policy": origin["drift_policy"],
            "special_token_ids": deps.info.special_token_ids,
            "texts": {} if is_foreign else texts.of(ids_in(*map(content.get, _ID_COLUMNS))),
            "warnings": [_FOREIGN] if is_foreign else [],
        }
    )
