"""What other trainers' clients send and how they read the answer, written from docs/clients.md:
the shape of each, and none of their code."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Body = dict[str, Any]


def trl_body(prompts: list[list[int]] | list[int], k: int, temperature: float = 1.0) -> Body:
    """TRL from 1.11 on; its asynchronous worker sends one flat list of ids."""
    return {
        "model": "fake",
        "prompt": prompts,
        "max_tokens": 1,
        "temperature": temperature,
        "prompt_logprobs": k,
    }


def trl_parsed(
    choice: Body, sequence: list[int], prompt_length: int
) -> tuple[list[list[int]], list[list[float]], list[float]]:
    """Ids and log-probs of each completion token by rank, and its own log-prob, found by its id."""
    ids, logprobs, own = [], [], []
    for position in range(prompt_length, len(choice["prompt_logprobs"])):
        entries = choice["prompt_logprobs"][position] or {}
        ranked = sorted(entries.items(), key=lambda entry: entry[1]["rank"])
        ids.append([int(token_id) for token_id, _ in ranked])
        logprobs.append([entry["logprob"] for _, entry in ranked])
        own.append(entries[str(sequence[position])]["logprob"])
    return ids, logprobs, own


def prime_rl_body(token_ids: list[int]) -> Body:
    sampling = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "prompt_logprobs": 1}
    return {"model": "fake", "token_ids": token_ids, "sampling_params": sampling}


def prime_rl_parsed(reply: Body) -> list[float]:
    """One log-prob a token: that of the first entry, whichever it is; 0.0 where there is none."""
    return [
        next(iter(entry.values()))["logprob"] if entry else 0.0
        for entry in reply["prompt_logprobs"] or []
    ]


def slime_body(token_ids: list[int], temperature: float = 1.0) -> Body:
    return {
        "input_ids": token_ids,
        "sampling_params": {
            "temperature": temperature,
            "max_new_tokens": 0,
            "skip_special_tokens": False,
        },
        "return_logprob": True,
        "logprob_start_len": 0,
    }


def slime_parsed(reply: Body, response_length: int) -> list[float]:
    entries = reply["meta_info"]["input_token_logprobs"][1:]
    return [entry[0] for entry in entries][-response_length:]


def miles_body(token_ids: list[int], k: int, **ids: Any) -> Body:
    """`ids`: token_ids_logprob, or token_ids_logprob_positions."""
    return slime_body(token_ids, 0) | ({"top_logprobs_num": k} if k else {}) | ids


def miles_parsed(reply: Body, field: str, response_length: int) -> list[dict[int, float]]:
    """Log-probs by id at each response token."""
    entries = reply["meta_info"][field][1:][-response_length:]
    return [{int(entry[1]): float(entry[0]) for entry in row or []} for row in entries]


def scored(reply: Body) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Of an answer of /v1/score: the teacher's top-K ids and log-probs, and those of the tokens."""
    rows = reply["rows"]
    return (
        np.array(rows["topk_ids"]),
        np.array(rows["topk_logprobs"]),
        np.array(rows["token_logprobs"]),
    )
