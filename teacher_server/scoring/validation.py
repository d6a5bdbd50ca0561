"""What a teacher refuses before any work: ids, k, lengths and states that can never succeed.

Everything is checked before it reaches the engine: an id outside the vocabulary would poison a CUDA
context, not one request.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from teacher_wire import drift
from teacher_wire.errors import InvalidRequestError
from teacher_wire.id_ranges import IdRanges, inside, num_ids
from teacher_wire.records import DriftPolicy, DriftState, ScoreOptions, TeacherInfo, TokenSpan

MAX_SESSION_ID_BYTES = 256


def check_ids(ids: NDArray[np.int32], field: str, vocab_size: int) -> None:
    """Every id is in 0 <= id < vocab_size; names the first that is not."""
    # Read without its sign a negative id is larger than any vocabulary: one pass, not two.
    if not ids.size or ids.view(np.uint32).max() < vocab_size:
        return
    first = _first(ids, field, (ids < 0) | (ids >= vocab_size))
    raise InvalidRequestError(f"{first}, must be in 0..{vocab_size - 1}")


def check_part_taken(ids: NDArray[np.int32], field: str, excluded: IdRanges) -> None:
    """No id is among the excluded ones; names the first that is."""
    if excluded and (found := inside(excluded, ids)).any():
        raise InvalidRequestError(f"{_first(ids, field, found)}, one of excluded_ids")


def num_taking_part(vocab_size: int, excluded: IdRanges) -> int:
    """Ids that are left in; raises InvalidRequestError for a range beyond the vocabulary."""
    if excluded and excluded[-1][1] > vocab_size:
        raise InvalidRequestError(
            f"excluded_ids goes up to {excluded[-1][1]}, the vocabulary has {vocab_size} ids"
        )
    return vocab_size - num_ids(excluded)


def _first(ids: NDArray[np.int32], field: str, found: NDArray[np.bool_]) -> str:
    """The place and the value of the first that was found."""
    where = tuple(int(index) for index in np.argwhere(found)[0])
    return f"{field}[{', '.join(map(str, where))}] is {ids[where]}"


def check_total_length(info: TeacherInfo, num_tokens: int) -> None:
    """Prompt and response together fit the context."""
    if num_tokens > info.max_context:
        raise InvalidRequestError(
            f"prompt and response have {num_tokens} tokens, the limit is {info.max_context}"
        )


def check_open(
    info: TeacherInfo,
    session_id: str,
    prompt_ids: NDArray[np.int32],
    scored_ids: NDArray[np.int32],
    options: ScoreOptions,
    policy: DriftPolicy | None,
) -> None:
    """What an Open says can be served."""
    size = len(session_id.encode())
    if not 1 <= size <= MAX_SESSION_ID_BYTES:
        raise InvalidRequestError(
            f"session_id has {size} bytes, must have 1..{MAX_SESSION_ID_BYTES}"
        )
    if not len(prompt_ids):
        raise InvalidRequestError("prompt_ids has 0 tokens, must have at least 1")
    check_total_length(info, len(prompt_ids) + len(scored_ids))
    check_ids(prompt_ids, "prompt_ids", info.vocab_size)
    check_ids(scored_ids, "scored_ids", info.vocab_size)
    check_part_taken(scored_ids, "scored_ids", options.excluded_ids)
    limit = min(info.max_k, num_taking_part(info.vocab_size, options.excluded_ids))
    if options.k > limit:
        raise InvalidRequestError(f"k is {options.k}, the limit is {limit}")
    if policy is not None and policy.metric.k > options.k:
        raise InvalidRequestError(
            f"drift k is {policy.metric.k}, the limit is k, which is {options.k}"
        )


def check_drift(
    policy: DriftPolicy | None, state: DriftState | None, num_scored: int
) -> DriftState:
    """The state to go on from; a state that no sequence of events leads to is refused."""
    if policy is None or (state is None and not num_scored):
        return DriftState(num_tokens=num_scored)
    if state is None:
        raise InvalidRequestError(f"drift is missing, must cover the {num_scored} scored tokens")
    if state.num_tokens != num_scored:
        raise InvalidRequestError(
            f"drift covers {state.num_tokens} tokens, must cover the {num_scored} scored ones"
        )
    if not 0 <= state.num_bad_events <= num_scored:
        raise InvalidRequestError(
            f"drift has {state.num_bad_events} bad events, must have 0..{num_scored}"
        )
    budget = drift.bad_event_budget(policy.w_drop)
    exhausted = state.num_bad_events >= budget
    if exhausted != (state.exhausted_at is not None):
        raise InvalidRequestError(
            f"drift has {state.num_bad_events} bad events and exhausted_at {state.exhausted_at}, "
            f"but R reaches 0 at {budget}"
        )
    if state.exhausted_at is not None and not budget <= state.exhausted_at <= num_scored:
        raise InvalidRequestError(
            f"drift exhausted_at is {state.exhausted_at}, must be in {budget}..{num_scored}"
        )
    return state


def check_span(
    info: TeacherInfo, options: ScoreOptions, policy: DriftPolicy | None, span: TokenSpan
) -> None:
    """What an Append says can be scored."""
    num_tokens = len(span)
    if not 1 <= num_tokens <= info.max_append_tokens:
        raise InvalidRequestError(
            f"token_ids has {num_tokens} tokens, must have 1..{info.max_append_tokens}"
        )
    check_ids(span.token_ids, "token_ids", info.vocab_size)
    check_part_taken(span.token_ids, "token_ids", options.excluded_ids)
    width = 0
    if span.candidate_ids is not None:
        width = span.candidate_ids.shape[1]
        if not 1 <= width <= info.max_k:
            raise InvalidRequestError(
                f"candidate_ids has {width} ids a row, must have 1..{info.max_k}"
            )
        check_ids(span.candidate_ids, "candidate_ids", info.vocab_size)
        check_part_taken(span.candidate_ids, "candidate_ids", options.excluded_ids)
    metric = None if policy is None else policy.metric
    if metric is not None and metric.compares_candidates and width < metric.k:
        raise InvalidRequestError(
            f"candidate_ids has {width} ids a row, the drift policy compares {metric.k}"
        )
