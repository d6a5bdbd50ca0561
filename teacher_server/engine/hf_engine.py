"""The reference engine: transformers, one KV cache per session, obvious and slow.

One query at a time, in one worker thread. It exists to be right: vllm_engine must agree with it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from teacher_server.engine.base import EngineInfo, EngineRows, ScoreQuery, check_finite, check_query
from teacher_server.engine.checkpoint import (
    num_entries,
    read_config,
    resolve_dtype,
    right_attention,
    warn_if_emulated,
)
from teacher_server.engine.extras import DEFINITIONS, Distribution
from teacher_server.engine.float32_head import widen_head
from teacher_wire.errors import EngineError
from teacher_wire.id_ranges import fill
from teacher_wire.records import MODEL_COLUMNS, ModelRows

MAX_FORWARD_TOKENS = 512
"""Tokens per forward pass."""
MAX_LOGITS = 2**24
"""Rows times vocabulary of a forward pass; five float32 copies of them live at once."""


@dataclass(slots=True)
class _Session:
    """Keys and values of a prefix; the two grow and are cropped together."""

    token_ids: NDArray[np.int32]
    cache: DynamicCache


class HfEngine:
    """Scores with any causal language model that transformers can load and cache."""

    def __init__(
        self,
        *,
        model: str,
        revision: str | None = None,
        dtype: str = "auto",
        max_context: int = 4096,
        max_k: int = 128,
        device: str = "auto",
        max_sessions: int = 64,
    ) -> None:
        """Reads the checkpoint's configuration, nothing else.

        device        "auto" is cuda where there is one
        max_sessions  KV caches kept; the least recently used goes first, to be computed anew
        """
        config = read_config(model, revision)
        self._model_id = model
        self._revision = revision
        self._device = device
        self._max_sessions = max_sessions
        self._attention = right_attention(config)
        self._info = EngineInfo(
            name="hf",
            version=metadata.version("transformers"),
            dtype=resolve_dtype(dtype, config),
            vocab_size=num_entries(config),
            max_context=max_context,
            max_k=min(max_k, num_entries(config)),
        )
        self._model: PreTrainedModel | None = None
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        # The only thread that touches model and sessions.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hf-engine")

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def start(self) -> None:
        try:
            self._model = await asyncio.get_running_loop().run_in_executor(self._worker, self._load)
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise EngineError(f"transformers cannot load {self._model_id}: {error}") from error

    def _load(self) -> PreTrainedModel:
        device = self._device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            warn_if_emulated(self._info.dtype)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            self._model_id,
            revision=self._revision,
            dtype=self._info.dtype,
            attn_implementation=self._attention,
        )
        torch.nn.Module.to(model, device)
        widen_head(model)
        model.eval()
        return model

    async def score(self, query: ScoreQuery) -> EngineRows:
        check_query(query, self._info)
        if self._model is None:
            raise EngineError("the engine is not running")
        loop = asyncio.get_running_loop()
        try:
            rows = await loop.run_in_executor(self._worker, self._score, self._model, query)
        except torch.OutOfMemoryError as error:
            raise MemoryError(f"transformers ran out of memory: {error}") from error
        except RuntimeError as error:
            raise EngineError(f"transformers failed: {error}") from error
        check_finite(rows, query.first_row)
        return rows

    @torch.inference_mode()
    def _score(self, model: PreTrainedModel, query: ScoreQuery) -> EngineRows:
        """The row of token i comes from the model's output at token i - 1."""
        session = self._take_session(query)
        num_kept, last = len(session.token_ids), len(query.token_ids) - 1
        pieces: list[ModelRows] = []
        for start, end in self._passes(num_kept, query.first_row - 1, last):
            num_rows = min(end - start, max(0, end + 1 - query.first_row))
            input_ids = torch.from_numpy(query.token_ids[start:end].astype(np.int64))[None]
            output = model(
                input_ids.to(model.device),
                past_key_values=session.cache,
                use_cache=True,
                logits_to_keep=max(num_rows, 1),
            )
            if num_rows:
                pieces.append(_rows(output.logits[0], query, end + 1 - num_rows))
        session.token_ids = query.token_ids[:last].copy()
        self._put_session(query.session, session)
        return EngineRows(computed_tokens=last - num_kept, **MODEL_COLUMNS.joined(pieces))

    def _passes(self, start: int, first_output: int, last: int) -> Iterator[tuple[int, int]]:
        """Pieces of [start, last) for one forward pass each, smaller from first_output on."""
        max_rows = min(MAX_FORWARD_TOKENS, max(16, MAX_LOGITS // self._info.vocab_size))
        while start < last:
            if start < first_output:
                end = min(start + MAX_FORWARD_TOKENS, first_output)
            else:
                end = min(start + max_rows, last)
            yield start, end
            start = end

    def _take_session(self, query: ScoreQuery) -> _Session:
        """The cache of the query's session, cropped to the tokens before the first row's input."""
        session = None if query.session is None else self._sessions.pop(query.session, None)
        num_kept = 0
        if session is not None:
            num_compared = min(len(session.token_ids), query.first_row - 1)
            same = session.token_ids[:num_compared] == query.token_ids[:num_compared]
            num_kept = num_compared if same.all() else int(np.argmin(same))
        if session is None or num_kept == 0:
            # Without the model's configuration every layer keeps all keys; sliding windows, which
            # could not be cropped, remain the attention mask's affair.
            return _Session(np.empty(0, dtype=np.int32), DynamicCache())
        if num_kept < len(session.token_ids):
            session.cache.crop(num_kept - len(session.token_ids))
        session.token_ids = session.token_ids[:num_kept]
        return session

    def _put_session(self, name: str | None, session: _Session) -> None:
        if name is None:
            return
        self._sessions[name] = session
        while len(self._sessions) > self._max_sessions:
            self._sessions.popitem(last=False)

    def forget(self, session: str) -> None:
        if self._model is not None:  # else nothing is held, and the worker may have ended
            self._worker.submit(self._sessions.pop, session, None)

    async def healthy(self) -> bool:
        return self._model is not None

    def kv_used_ratio(self) -> float | None:
        """In sessions, each with a cache as long as its text."""
        return len(self._sessions) / self._max_sessions

    def kv_capacity_tokens(self) -> int | None:
        """Sessions are what is limited, however long they are."""
        return None

    async def close(self) -> None:
        self._model = None
        await asyncio.to_thread(self._worker.shutdown)
        self._sessions.clear()


def _rows(logits_nV: torch.Tensor, query: ScoreQuery, first_token: int) -> ModelRows:
    """Rows of the tokens from first_token on."""
    num_rows = len(logits_nV)
    logits_nV = logits_nV.float()
    fill(logits_nV, query.excluded_ids, -torch.inf)
    logprobs_nV = torch.log_softmax(logits_nV / query.temperature, dim=-1)
    target_ids = query.token_ids[first_token : first_token + num_rows].astype(np.int64)
    targets_n1 = torch.from_numpy(target_ids)[:, None].to(logits_nV.device)
    topk_logprobs_nK, topk_ids_nK = logprobs_nV.topk(query.k, dim=-1)
    columns = {
        "topk_ids": topk_ids_nK,
        "topk_logprobs": topk_logprobs_nK,
        "token_logprobs": logprobs_nV.gather(1, targets_n1)[:, 0],
    }
    if query.candidate_ids is not None:
        start = first_token - query.first_row
        candidate_ids = query.candidate_ids[start : start + num_rows].astype(np.int64)
        candidates_nC = torch.from_numpy(candidate_ids).to(logits_nV.device)
        columns["candidate_logprobs"] = logprobs_nV.gather(1, candidates_nC)
    if query.extras:
        whole = Distribution(
            logits_nV, logprobs_nV, logprobs_nV.exp(), logits_nV.gather(1, targets_n1)
        )
        columns |= {name: DEFINITIONS[name](whole) for name in query.extras}
    arrays = {name: tensor.cpu().numpy() for name, tensor in columns.items()}
    return ModelRows(**MODEL_COLUMNS.typed(arrays))
