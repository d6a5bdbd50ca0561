"""From logits to packed rows: top-K, log-sum-exp, and the log-probs of given ids. Torch, no vLLM.

Two ways to the same rows. At once is short and right, and what a GPU runs; on a CPU it is bound by
memory and by a top-K that looks at every logit, so `score_rows` takes a few rows at a time there,
which stay in cache, and looks for the top-K in few of their logits.

Legend: R = rows, V = vocabulary, K = top-k, C = candidate ids a row, B = logits a block,
X = 1 + K + C.
"""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass

import torch

from teacher_server.engine.row_format import EXTRA_AT

LOGITS_AT_ONCE_CPU = 2**24
LOGITS_AT_ONCE_GPU = 2**26
"""Rows times vocabulary that the head gives in one piece. Each takes 4 bytes at most, and on a GPU
4 more for a float32 copy."""
ROWS_PER_CHUNK = 8
"""Rows of float32 logits worked on at once on a CPU: 5 MB of 152k each."""
BLOCK = 64
"""Logits a block of the two-stage top-k; near sqrt(V / K), where both stages cost the same."""


@dataclass(frozen=True, slots=True)
class _RowFacts:
    """What takes the whole vocabulary of a row to know."""

    top_logits_RK: torch.Tensor
    top_ids_RK: torch.Tensor
    sums_R1: torch.Tensor
    """sum_u exp((z_u - z_top) / temperature)"""
    extras_R1: dict[str, torch.Tensor]
    """int32 or float32"""


def rows_at_once(vocab_size: int, device: str) -> int:
    """Rows to ask the head for in one piece."""
    limit = LOGITS_AT_ONCE_CPU if device == "cpu" else LOGITS_AT_ONCE_GPU
    return max(16, limit // vocab_size)


def score_rows(
    logits_RV: torch.Tensor,
    positions_R: torch.Tensor,
    targets_R: torch.Tensor,
    candidates_RC: torch.Tensor,
    inverse_temperatures_R: torch.Tensor,
    *,
    k: int,
    extras: Set[str],
    at_once: bool | None = None,
) -> torch.Tensor:
    """[R, HEADER + 2k + C] packed rows. On a GPU float32 logits are overwritten.

    log p(v) = (z_v - z_top) / temperature - log sum_u exp((z_u - z_top) / temperature). A NaN or
    +inf among the logits makes every log-prob of its row NaN, so no bad row can look good. Among
    equal logits any may be in the top-k. `at_once` chooses the way: by default the one for the
    device; True, whole-matrix operations only, is the reference.
    """
    if at_once is None:
        at_once = logits_RV.device.type != "cpu"
    target_logits_R1 = logits_RV.gather(1, targets_R[:, None]).float()
    candidate_logits_RC = logits_RV.gather(1, candidates_RC).float()
    facts = (_facts_at_once if at_once else _facts_in_chunks)(
        logits_RV, target_logits_R1, inverse_temperatures_R[:, None], k, extras
    )
    logits_RX = torch.cat([target_logits_R1, facts.top_logits_RK, candidate_logits_RC], dim=1)
    return _packed(positions_R, inverse_temperatures_R[:, None], logits_RX, facts)


def _packed(
    positions_R: torch.Tensor, inverse_R1: torch.Tensor, logits_RX: torch.Tensor, facts: _RowFacts
) -> torch.Tensor:
    zeros_R1 = positions_R.new_zeros(len(positions_R), 1)
    top_R1 = facts.top_logits_RK[:, :1]
    logprobs_RX = (logits_RX - top_R1) * inverse_R1 - facts.sums_R1.log()
    logprob_bits_RX = logprobs_RX.view(torch.int32)
    return torch.cat(
        [
            positions_R[:, None],
            logprob_bits_RX[:, :1],
            *(facts.extras_R1.get(name, zeros_R1).view(torch.int32) for name in EXTRA_AT),
            facts.top_ids_RK.int(),
            logprob_bits_RX[:, 1:],
        ],
        dim=1,
    )


def _facts_at_once(
    logits_RV: torch.Tensor,
    target_logits_R1: torch.Tensor,
    inverse_R1: torch.Tensor,
    k: int,
    extras: Set[str],
) -> _RowFacts:
    top_logits_RK, top_ids_RK = logits_RV.topk(k, dim=-1)
    top_logits_RK = top_logits_RK.float()
    extras_R1 = _of_logits(extras, logits_RV, target_logits_R1)
    weights_RV = logits_RV.float().sub_(top_logits_RK[:, :1]).mul_(inverse_R1).exp_()
    sums_R1 = weights_RV.sum(-1, keepdim=True)
    extras_R1 |= _of_weights(extras, weights_RV, sums_R1)
    return _RowFacts(top_logits_RK, top_ids_RK, sums_R1, extras_R1)


def _facts_in_chunks(
    logits_RV: torch.Tensor,
    target_logits_R1: torch.Tensor,
    inverse_R1: torch.Tensor,
    k: int,
    extras: Set[str],
) -> _RowFacts:
    num_rows, vocab_size = logits_RV.shape
    scratch_rV = torch.empty(min(ROWS_PER_CHUNK, num_rows), vocab_size)
    # Powers of two cost half of what powers of e do.
    scale_R1 = inverse_R1 * math.log2(math.e)
    parts: list[_RowFacts] = []
    for start in range(0, max(num_rows, 1), ROWS_PER_CHUNK):
        chunk = slice(start, start + ROWS_PER_CHUNK)
        logits_rV = logits_RV[chunk]
        # A copy even of float32: what is read again and again is then in cache from the start.
        work_rV = scratch_rV[: len(logits_rV)].copy_(logits_rV)
        top_logits_rK, top_ids_rK = topk_in_blocks(work_rV, k)
        extras_r1 = _of_logits(extras, work_rV, target_logits_R1[chunk])
        weights_rV = work_rV.sub_(top_logits_rK[:, :1]).mul_(scale_R1[chunk]).exp2_()
        sums_r1 = weights_rV.sum(-1, keepdim=True)
        extras_r1 |= _of_weights(extras, weights_rV, sums_r1)
        parts.append(_RowFacts(top_logits_rK, top_ids_rK, sums_r1, extras_r1))
    return parts[0] if len(parts) == 1 else _joined(parts)


def _joined(parts: list[_RowFacts]) -> _RowFacts:
    return _RowFacts(
        torch.cat([part.top_logits_RK for part in parts]),
        torch.cat([part.top_ids_RK for part in parts]),
        torch.cat([part.sums_R1 for part in parts]),
        {name: torch.cat([p.extras_R1[name] for p in parts]) for name in parts[0].extras_R1},
    )


def _of_logits(
    extras: Set[str], logits_RV: torch.Tensor, target_logits_R1: torch.Tensor
) -> dict[str, torch.Tensor]:
    return {
        name: function(logits_RV, target_logits_R1)
        for name, function in _OF_LOGITS.items()
        if name in extras
    }


def _of_weights(
    extras: Set[str], weights_RV: torch.Tensor, sums_R1: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Overwrites the weights with probabilities."""
    if extras.isdisjoint(_OF_PROBS):
        return {}
    probs_RV = weights_RV.div_(sums_R1)
    return {name: function(probs_RV) for name, function in _OF_PROBS.items() if name in extras}


def _token_ranks(logits_RV: torch.Tensor, target_logits_R1: torch.Tensor) -> torch.Tensor:
    return (logits_RV > target_logits_R1).sum(-1, keepdim=True, dtype=torch.int32) + 1


def _entropies(probs_RV: torch.Tensor) -> torch.Tensor:
    each_RV: torch.Tensor = torch.special.entr(probs_RV)
    return each_RV.sum(-1, keepdim=True)


_OF_LOGITS = {"token_ranks": _token_ranks}
"""Extras that take the logits, and those of the actual tokens; [R, 1]."""
_OF_PROBS = {"entropies": _entropies}
"""Extras that take the probabilities alone; [R, 1]."""


def topk_in_blocks(logits_RV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What logits_RV.topk(k) gives; among equal logits perhaps other ids.

    The k blocks with the largest maxima hold a top-k: k logits, those maxima, are at least as large
    as any logit of another block. A NaN counts as the largest, here as there. Block j holds every
    (V // B)-th logit from j on, so that maxima are taken of whole vectors.
    """
    num_rows, vocab_size = logits_RV.shape
    num_blocks = vocab_size // BLOCK
    if num_blocks < 2 * k:
        return logits_RV.topk(k, dim=-1)
    in_blocks = BLOCK * num_blocks
    maxima_RN = logits_RV[:, :in_blocks].view(num_rows, BLOCK, num_blocks).amax(1)
    blocks_RK = maxima_RN.topk(k, dim=-1, sorted=False).indices
    steps_B = torch.arange(0, in_blocks, num_blocks, device=logits_RV.device)
    ids_RY = (blocks_RK[:, None, :] + steps_B[:, None]).view(num_rows, BLOCK * k)
    if in_blocks < vocab_size:
        rest = torch.arange(in_blocks, vocab_size, device=logits_RV.device)
        ids_RY = torch.cat([ids_RY, rest.expand(num_rows, -1)], dim=1)
    top_logits_RK, where_RK = logits_RV.gather(1, ids_RY).topk(k, dim=-1)
    return top_logits_RK, ids_RY.gather(1, where_RK)
