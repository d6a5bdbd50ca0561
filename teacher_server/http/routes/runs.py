"""Recorded rollouts: the runs of `--runs`, their steps, a step's rollouts, one rollout.

Files are read and replies rendered in threads, a few at a time, and in pieces that let this loop
turn meanwhile: it carries the gRPC streams too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
from fastapi import APIRouter, Path, Query, Request, Response
from starlette.exceptions import HTTPException

from teacher_server.http.analysis import ids_in
from teacher_server.http.deps import HttpDeps
from teacher_server.http.rendering import JSON, json_bytes
from teacher_server.http.texts import TokenTexts
from teacher_wire.errors import PermissionDeniedError

if TYPE_CHECKING:
    from teacher_server.http.recordings import RunFolder

PARQUET = "application/vnd.apache.parquet"
MAX_READS = 2
"""Files read at once; the others wait."""
DECIMALS = 5

_Run = Annotated[str, Path(examples=["demo"])]
_Number = Annotated[int, Path(ge=0, le=2**31 - 1, examples=[1])]
_T = TypeVar("_T")
_FOREIGN = {
    "reason": "tokenizer",
    "field": "texts",
    "message": "these ids are of another tokenizer than this teacher's: they have no texts here",
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
    desk = _Desk(deps)
    _add_lists(router, desk)
    _add_steps(router, desk)
    return router


class _Desk:
    """Reads what a tenant may see."""

    def __init__(self, deps: HttpDeps) -> None:
        self._deps = deps
        self._turn = asyncio.Semaphore(MAX_READS)
        self._texts = TokenTexts(deps.tokenizer)

    async def read(self, request: Request, work: Callable[[RunFolder], _T]) -> _T:
        """What the work makes of the folder, in a thread. Raises PermissionDeniedError, and
        HTTPException for what there is not or what is cut short."""
        folder, tenant = self._deps.runs, request.state.tenant
        if folder is None:
            raise HTTPException(404, "this server shows no runs: it was started without --runs")
        if not self._deps.sees_runs(tenant):
            raise PermissionDeniedError(
                f"tenant {tenant!r} does not see runs: that takes runs = true in the tenants file"
            )
        from rollout_records.errors import RecordingError  # Arrow comes with it

        try:
            async with self._turn:
                return await asyncio.to_thread(work, folder)
        except LookupError as error:
            raise HTTPException(404, str(error.args[0])) from None
        except FileNotFoundError:
            message = "what was asked for was taken away meanwhile: ask for the list again"
            raise HTTPException(404, message) from None
        except RecordingError as error:
            raise HTTPException(422, str(error)) from None

    def rendered(self, content: dict[str, Any]) -> bytes:
        """The JSON of one rollout; measured numbers to DECIMALS, missing ones null."""
        origin = content["origin"]
        fingerprint = origin["tokenizer_fingerprint"]
        is_foreign = fingerprint not in (None, self._deps.info.tokenizer_fingerprint)
        ids = ids_in(*map(content.get, _ID_COLUMNS))
        teachers = origin["teachers"] or {}
        return json_bytes(
            {
                **{name: _rounded(value) for name, value in content.items()},
                "model_id": teachers.get(content["teacher"] or ""),
                "k": content["teacher_topk_ids"].shape[1],
                "temperature": origin["temperature"],
                "policy": origin["drift_policy"],
                "texts": {} if is_foreign else self._texts.of(ids),
                "warnings": [_FOREIGN] if is_foreign else [],
            }
        )


def _add_lists(router: APIRouter, desk: _Desk) -> None:
    @router.get("")
    async def list_runs(request: Request) -> dict[str, Any]:
        """The runs with recorded rollouts, the last written first."""
        entries, left_out = await desk.read(request, lambda folder: folder.runs())
        return {"runs": [asdict(entry) for entry in entries], "left_out": left_out}

    @router.get("/{run}")
    async def list_steps(
        request: Request,
        run: _Run,
        before: Annotated[int, Query(ge=0, le=2**31 - 1)] = 2**31 - 1,
        limit: Annotated[int, Query(ge=1, le=500)] = 100,
    ) -> dict[str, Any]:
        """The last steps of a run, ascending, and whose rollouts they are."""

        def work(folder: RunFolder) -> dict[str, Any]:
            entries, earlier = folder.steps(run, before=before, limit=limit)
            steps = [asdict(entry) for entry in entries]
            return {"run": run, "origin": folder.origin(run), "steps": steps, "earlier": earlier}

        return await desk.read(request, work)


def _add_steps(router: APIRouter, desk: _Desk) -> None:
    @router.get("/{run}/steps/{step}", **_AS_FILE)
    async def list_rollouts(request: Request, run: _Run, step: _Number) -> Response:
        """The rollouts of a step without their tokens, or its file."""
        if _wants_file(request):
            content = await desk.read(request, lambda folder: folder.step_file(run, step))
            return _file(content, f"{run}-step-{step}")

        def work(folder: RunFolder) -> bytes:
            rollouts, left_out, problems = folder.rollouts(run, step)
            content = {"run": run, "step": step, "rollouts": rollouts}
            return json_bytes({**content, "left_out": left_out, "problems": problems})

        return Response(await desk.read(request, work), media_type=JSON)

    @router.get("/{run}/steps/{step}/rollouts/{index}", **_AS_FILE)
    async def show_rollout(request: Request, run: _Run, step: _Number, index: _Number) -> Response:
        """Every column of one rollout with the texts of its ids, or a file with that row."""
        if _wants_file(request):
            content = await desk.read(request, lambda folder: folder.rollout_file(run, step, index))
            return _file(content, f"{run}-step-{step}-rollout-{index}")

        def work(folder: RunFolder) -> bytes:
            columns, origin = folder.rollout(run, step, index)
            return desk.rendered({"run": run, **columns, "origin": origin})

        return Response(await desk.read(request, work), media_type=JSON)


def _rounded(value: Any) -> Any:
    is_measured = isinstance(value, np.ndarray) and value.dtype.kind == "f"
    return np.round(value, DECIMALS) if is_measured else value


def _wants_file(request: Request) -> bool:
    return PARQUET in request.headers.get("accept", "")


def _file(content: bytes, name: str) -> Response:
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name)
    disposition = f'attachment; filename="{plain}.parquet"'
    headers = {"content-disposition": disposition}
    return Response(content, media_type=PARQUET, headers=headers)
