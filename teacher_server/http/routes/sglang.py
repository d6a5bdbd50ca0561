"""SGLang's /generate as slime and miles ask a teacher: log-probs of the tokens of a text, the
teacher's likeliest, and those of ids that the caller names, for all positions or for each.

Legend: L = tokens of a text, C = ids named at a position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray

from teacher_server.http.clients import asking, openai_bodies
from teacher_server.http.clients.prompt_logprobs import numbers
from teacher_server.http.clients.sglang_bodies import SglangBody, SglangReply, Wanted, wanted
from teacher_server.http.clients.token_strings import TokenStrings
from teacher_server.http.clients.writing import dumps, json_stream
from teacher_server.http.deps import HttpDeps
from teacher_server.http.json_route import JsonRoute
from teacher_server.scoring.texts import TextScores
from teacher_server.scoring.validation import check_ids
from teacher_wire.errors import InvalidRequestError
from teacher_wire.records import ScoreOptions

PIECE_TOKENS = 256
"""Tokens that are written at a time."""


def routes(deps: HttpDeps) -> APIRouter:
    """/generate, by POST and by PUT."""
    router = APIRouter(responses=openai_bodies.FAILURES, route_class=JsonRoute)
    strings = TokenStrings(deps.tokenizer)

    async def generate(body: SglangBody, request: Request) -> Response:
        """The log-probs of one text or a batch, at temperature 1 unless the server is set to follow
        the request's."""
        deps.refuse_unless_ready()
        asking.refuse_unsupported(body.model_extra)
        several, is_batch = wanted(body)
        token_ids = await _token_ids(several, deps)
        texts = [_scored(want, ids, deps) for want, ids in zip(several, token_ids, strict=True)]
        asking.refuse_too_many(len(texts), sum(text.num_entries for text in texts))
        scores = await asking.score_all(deps, [text.asked for text in texts], request.state.tenant)
        if body.return_text_in_logprobs:
            await strings.learn(
                *(array for t, s in zip(texts, scores, strict=True) for array in t.ids(s))
            )
        told = strings if body.return_text_in_logprobs else TokenStrings(None)
        pieces = _reply(texts, scores, told, request.state.request_id, is_batch=is_batch)
        return json_stream(pieces)

    for method, operation in (("POST", "generate"), ("PUT", "generate_by_put")):
        router.add_api_route(
            "/generate",
            generate,
            methods=[method],
            operation_id=operation,
            response_model=SglangReply | list[SglangReply],
            dependencies=deps.token_in_schema(),
        )
    return router


@dataclass(frozen=True, slots=True, kw_only=True)
class _Text:
    """One text, and what is told of it."""

    want: Wanted
    asked: asking.Asked
    start: int
    """The first token that is told of; L where none is."""
    widths: NDArray[np.int64] | None
    """[L - start - 1] ids named at each position after the first; None: none are."""

    @property
    def num_entries(self) -> int:
        """Of the answer."""
        named = 0 if self.widths is None else int(self.widths.sum())
        return (len(self.asked.token_ids) - self.start) * (1 + self.want.top_num) + named

    def ids(self, scores: TextScores) -> list[NDArray[np.int32]]:
        """All that are told of."""
        named = self.asked.candidate_ids
        top_ids = scores.rows.topk_ids[:, : self.want.top_num]
        return [self.asked.token_ids, top_ids, *([] if named is None else [named])]


async def _token_ids(several: Sequence[Wanted], deps: HttpDeps) -> list[NDArray[np.int32]]:
    given = [want.given for want in several]
    if isinstance(given[0], str):
        given = await asking.ids_of(given, True, deps)
    return [
        asking.text_ids(ids, want.name, deps.info) for want, ids in zip(several, given, strict=True)
    ]


def _scored(want: Wanted, token_ids: NDArray[np.int32], deps: HttpDeps) -> _Text:
    """What is scored of one text. Raises InvalidRequestError."""
    asking.refuse_unsupported(want.sampling.model_extra, "sampling_params.")
    asking.refuse_generating("sampling_params.max_new_tokens", want.sampling.max_new_tokens)
    length = len(token_ids)
    if want.start > length:
        raise InvalidRequestError(
            f"logprob_start_len is {want.start}, must be at most {length}, the tokens of "
            f"{want.name}"
        )
    start = length if want.start < 0 else want.start
    width = asking.width_of(want.top_num, "top_logprobs_num", deps.info)
    temperature = asking.scored_at(want.sampling.temperature, followed=deps.follow_temperature)
    candidate_ids, widths = _candidates(want, max(length - start - 1, 0), deps)
    asked = asking.Asked(
        token_ids=token_ids,
        options=ScoreOptions(k=max(width, 1), temperature=temperature),
        first_row=min(start + 1, length),
        candidate_ids=candidate_ids,
    )
    return _Text(want=want, asked=asked, start=start, widths=widths)


def _candidates(
    want: Wanted, num_rows: int, deps: HttpDeps
) -> tuple[NDArray[np.int32] | None, NDArray[np.int64] | None]:
    """The named ids of each row, [num_rows, C], padded to one width, and how many each has."""
    if want.positions is not None:
        if want.ids is not None:
            raise InvalidRequestError(
                "token_ids_logprob and token_ids_logprob_positions are both given: send one"
            )
        return _by_position(want.positions, num_rows, deps)
    if want.ids is None:
        return None, None
    field, num_ids = "token_ids_logprob", len(want.ids)
    if num_ids > deps.info.max_k:
        raise InvalidRequestError(
            f"{field} has {num_ids} ids, the limit is {deps.info.max_k}: send the ids of each "
            "position in token_ids_logprob_positions, or start the teacher with a larger --max-k"
        )
    ids = np.array(want.ids, np.int32)
    check_ids(ids, field, deps.info.vocab_size)
    widths = np.full(num_rows, num_ids)
    return (np.tile(ids, (num_rows, 1)) if num_ids and num_rows else None), widths


def _by_position(
    positions: list[list[int]], num_rows: int, deps: HttpDeps
) -> tuple[NDArray[np.int32] | None, NDArray[np.int64]]:
    field = "token_ids_logprob_positions"
    if len(positions) != num_rows + 1:
        raise InvalidRequestError(
            f"{field} has {len(positions)} lists, must have {num_rows + 1}, one for each token "
            "from logprob_start_len on"
        )
    widths = np.array([len(ids) for ids in positions[1:]], np.int64)
    width = int(widths.max(initial=0))
    if width > deps.info.max_k:
        raise InvalidRequestError(
            f"{field} has {width} ids at a position, the limit is {deps.info.max_k}: send fewer, "
            "or start the teacher with a larger --max-k"
        )
    if not width:
        return None, widths
    padded = np.zeros((num_rows + 1, max(width, len(positions[0]))), np.int32)
    for row, ids in enumerate(positions):
        padded[row, : len(ids)] = ids
    check_ids(padded, field, deps.info.vocab_size)
    return padded[1:, :width], widths


def _reply(
    texts: list[_Text],
    scores: list[TextScores],
    strings: TokenStrings,
    request_id: str,
    *,
    is_batch: bool,
) -> Iterator[str]:
    if is_batch:
        yield "["
    for index, (text, scored) in enumerate(zip(texts, scores, strict=True)):
        yield "," if index else ""
        rid = text.want.rid or (f"{request_id}-{index}" if is_batch else request_id)
        yield '{"text":"","output_ids":[],"meta_info":' + _meta(text, scored, rid)[:-1]
        own_ids = text.asked.token_ids[text.start :]
        yield ',"input_token_logprobs":'
        own = (own_ids[1:, None], scored.rows.token_logprobs[:, None])
        yield from _arrays(_first(own_ids, strings), *own, None, strings, flat=True)
        first = ["null"] if len(own_ids) else []
        if text.want.top_num:
            yield ',"input_top_logprobs":'
            top = slice(0, text.want.top_num)
            tops = (scored.rows.topk_ids[:, top], scored.rows.topk_logprobs[:, top])
            yield from _arrays(first, *tops, None, strings)
        if text.widths is not None:
            yield ',"input_token_ids_logprobs":'
            ids, logprobs = text.asked.candidate_ids, scored.rows.candidate_logprobs
            if ids is None or logprobs is None:
                ids = np.zeros((len(text.widths), 0), np.int32)
                logprobs = np.zeros(ids.shape, np.float32)
            yield from _arrays(first, ids, logprobs, text.widths, strings)
        yield "}}"
    if is_batch:
        yield "]"


def _first(token_ids: NDArray[np.int32], strings: TokenStrings) -> list[str]:
    """The entry of the first token that is told of, which has no log-prob."""
    return [f"[null,{i},{strings[i]}]" for i in token_ids[:1].tolist()]


def _meta(text: _Text, scored: TextScores, rid: str) -> str:
    return dumps(
        {
            "id": rid,
            "finish_reason": {"type": "length", "length": 0},
            "prompt_tokens": len(text.asked.token_ids),
            "weight_version": "default",
            "completion_tokens": 0,
            "cached_tokens": scored.num_kept,
            "temperature": text.asked.options.temperature,
            "output_token_logprobs": [],
            "output_token_logprobs_length": 0,
        }
    )


def _arrays(
    first: list[str],
    ids: NDArray[np.int32],
    logprobs: NDArray[np.float32],
    widths: NDArray[np.int64] | None,
    strings: TokenStrings,
    *,
    flat: bool = False,
) -> Iterator[str]:
    """A JSON array of `first` and an entry a row: [log-prob, id, text] where rows are flat, else a
    list of them, of as many as `widths` says."""
    yield "[" + "".join(first)
    separator = "," if first else ""
    for start in range(0, len(ids), PIECE_TOKENS):
        part = slice(start, start + PIECE_TOKENS)
        rows = []
        nums = None if widths is None else widths[part].tolist()
        for row, (some_ids, values) in enumerate(
            zip(ids[part].tolist(), numbers(logprobs[part]), strict=True)
        ):
            entries = [
                f"[{value!r},{i},{strings[i]}]" for i, value in zip(some_ids, values, strict=True)
            ]
            if nums is not None:
                entries = entries[: nums[row]]
            text = ",".join(entries)
            rows.append(text if flat else f"[{text}]")
        yield separator + ",".join(rows)
        separator = ","
    yield "]"
