"""vLLM plugin: causal language models that return log-probs of given tokens instead of embeddings.

The only file that knows vLLM's internals. A scoring model is its vLLM causal-LM class, declared a
pooling model, with a pooler that runs the language-model head on the rows asked for and no other.
Logits of a row chunk live for a moment; a packed answer (row_format.py) leaves the worker.

Legend: T = tokens of one engine step over all requests, R = rows of it to score, H = hidden size,
V = vocabulary, K = top-k, C = candidate ids a row, W = columns of a packed answer.
"""

from __future__ import annotations

import importlib
import os
from collections import OrderedDict
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.platforms import current_platform
from vllm.tasks import PoolingTask
from vllm.v1.outputs import PoolerOutput
from vllm.v1.pool.metadata import PoolingMetadata

from teacher_server.engine.base import EXTRAS
from teacher_server.engine.cpu_head import logits_in_blocks
from teacher_server.engine.row_format import HEADER, ZERO_BLOCKS_VARIABLE, RowRequest
from teacher_server.engine.row_scores import rows_at_once, score_rows
from teacher_wire.id_ranges import fill
from vllm_process.children import end_with_parent
from vllm_process.imports import collect_again
from vllm_process.output import write_where_told

TASK: PoolingTask = "token_classify"

KEPT_BYTES = 64 << 20
"""Hidden states that a worker keeps for the appends to come: 8,192 of 4,096 values in bfloat16."""

SCORING_PREFIX = "Scoring"
BASE_MODULES = {
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
"""vLLM module of each checkpoint architecture that can be served."""


def register() -> None:
    """Entry point of vllm.general_plugins; cheap, and harmless when called twice."""
    from vllm import ModelRegistry

    collect_again()
    end_with_parent()
    write_where_told()
    if os.environ.get(ZERO_BLOCKS_VARIABLE) == "1":
        _zero_new_blocks()
    for architecture in BASE_MODULES:
        name = SCORING_PREFIX + architecture
        # A string keeps the model's module, and with it CUDA, out of other processes.
        ModelRegistry.register_model(name, f"{__name__}:{name}")


def _zero_new_blocks() -> None:
    """Makes vLLM clear every cache block that it hands out, as it does for some models only.

    An attention kernel multiplies the unwritten end of a block by 0, and 0 * NaN is NaN: without
    this, one text that overflows leaves NaNs in freed blocks, which spoil the next session's rows.
    """
    from vllm.v1.kv_cache_interface import KVCacheConfig

    KVCacheConfig.needs_kv_cache_zeroing = property(lambda config: True)  # type: ignore[assignment]


def __getattr__(name: str) -> type[torch.nn.Module]:
    """Scoring classes come into being when vLLM first asks for one by name."""
    architecture = name.removeprefix(SCORING_PREFIX)
    if name == architecture or architecture not in BASE_MODULES:
        raise AttributeError(name)
    return _scoring_class(architecture)


def _scoring_class(architecture: str) -> type[torch.nn.Module]:
    module = importlib.import_module(f"vllm.model_executor.models.{BASE_MODULES[architecture]}")
    base: type[torch.nn.Module] = module.__dict__[architecture]

    def __init__(self: Any, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        base.__init__(self, vllm_config=vllm_config, prefix=prefix)
        if current_platform.is_cpu():
            _use_head_in_blocks(self)
        self.pooler = TokenScorer(
            compute_logits=self.compute_logits, vocab_size=vllm_config.model_config.get_vocab_size()
        )

    namespace = {"is_pooling_model": True, "__init__": __init__, "__module__": __name__}
    return type(SCORING_PREFIX + architecture, (base,), namespace)


class HeadInBlocks(UnquantizedEmbeddingMethod):
    """The head's product on a CPU. What comes after it, such as Gemma's cap, stays vLLM's."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing: vLLM's own method packs a second copy of the head for its product."""

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [R, H] -> float32 logits [R, V], V with vLLM's padding."""
        return logits_in_blocks(x, cast("torch.Tensor", layer.weight), bias)


def _use_head_in_blocks(model: torch.nn.Module) -> None:
    """A quantised head is left as it is."""
    layer: Any
    for layer in model.modules():
        if type(getattr(layer, "quant_method", None)) is UnquantizedEmbeddingMethod:
            layer.quant_method = HeadInBlocks()


@dataclass(frozen=True, slots=True)
class _Span:
    """The rows of one request that one engine step can give."""

    request: RowRequest
    hidden_n: NDArray[np.int64]
    """[n] index of each row's hidden state: into the step's T, then into those recalled."""
    first_row: int
    """Token index of the first row."""

    @property
    def num_rows(self) -> int:
        return len(self.hidden_n)

    def targets_n(self) -> NDArray[np.int32]:
        start = self.first_row - self.request.first_row
        return self.request.target_ids[start : start + self.num_rows]

    def candidates_nC(self) -> NDArray[np.int32]:
        start = self.first_row - self.request.first_row
        return self.request.candidate_ids[start : start + self.num_rows]


class KeptStates:
    """Hidden states of tokens that end a cached block, by the digest of the text up to them."""

    def __init__(self) -> None:
        self._states: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def keep(self, text: bytes, hidden_H: torch.Tensor) -> None:
        """Makes room by dropping what was not used for longest."""
        # A view would keep the hidden states of the whole step.
        self._states[text] = hidden_H.clone()
        self._states.move_to_end(text)
        while len(self._states) * hidden_H.nbytes > KEPT_BYTES:
            self._states.popitem(last=False)

    def recall(self, text: bytes) -> torch.Tensor | None:
        """[H], or None for a text that is not there."""
        hidden_H = self._states.get(text)
        if hidden_H is not None:
            self._states.move_to_end(text)
        return hidden_H


class TokenScorer(Pooler):
    """Scores the rows of all requests of a step together, chunk by chunk."""

    def __init__(
        self, *, compute_logits: Callable[[torch.Tensor], torch.Tensor | None], vocab_size: int
    ) -> None:
        super().__init__()
        # A bound method: as a submodule the model would contain itself.
        self._compute_logits = compute_logits
        self._vocab_size = vocab_size
        self._kept = KeptStates()

    def get_supported_tasks(self) -> Set[PoolingTask]:
        return {TASK}

    def forward(
        self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata
    ) -> PoolerOutput:
        """hidden_states [T, H] -> a packed answer for each request that ends with this step."""
        cursor = pooling_metadata.get_pooling_cursor()
        spans, recalled = _spans(pooling_metadata, hidden_states, self._kept)
        if recalled:
            hidden_states = torch.cat([hidden_states, torch.stack(recalled)])
        packed_RW = self._score(hidden_states, spans)
        if packed_RW is None:
            none: list[torch.Tensor | None] = [None] * len(spans)
            return none
        pieces = packed_RW.split([span.num_rows for span in spans])
        outputs: list[torch.Tensor | None] = []
        for span, piece, state, finished in zip(
            spans, pieces, pooling_metadata.pooling_states, cursor.get_finished_mask(), strict=True
        ):
            if span.num_rows:
                # A view would keep, and pickle, the rows of the whole step.
                state.hidden_states_cache.append(_narrow(piece, span.request, spans).clone())
            if not finished:
                outputs.append(None)
                continue
            chunks = state.hidden_states_cache
            outputs.append(chunks[0] if len(chunks) == 1 else torch.cat(chunks))
            state.clean()
        return outputs

    def _score(self, hidden_TH: torch.Tensor, spans: list[_Span]) -> torch.Tensor | None:
        """[R, W] packed rows of all spans; None on a tensor-parallel rank without logits.

        hidden_TH: the step's hidden states, then those recalled.
        """
        num_candidates = max(span.request.candidate_ids.shape[1] for span in spans)
        k, num_rows = max(span.request.k for span in spans), sum(s.num_rows for s in spans)
        if not num_rows:
            # Nor to gather: on a CPU vLLM 0.32 divides by the size of what it gathers.
            return hidden_TH.new_empty((0, HEADER + 2 * k + num_candidates), dtype=torch.int32)
        candidates_RC = np.zeros((num_rows, num_candidates), dtype=np.int64)
        row = 0
        for span in spans:
            candidates_nC = span.candidates_nC()
            candidates_RC[row : row + span.num_rows, : candidates_nC.shape[1]] = candidates_nC
            row += span.num_rows

        def joined(parts: list[NDArray[np.generic]], dtype: torch.dtype) -> torch.Tensor:
            return torch.from_numpy(np.concatenate(parts)).to(hidden_TH.device, dtype)

        hidden_index_R = joined([s.hidden_n for s in spans], torch.int64)
        positions_R = joined(
            [np.arange(s.first_row, s.first_row + s.num_rows) for s in spans], torch.int32
        )
        targets_R = joined([s.targets_n() for s in spans], torch.int64)
        inverse_temperatures_R = joined(
            [np.full(s.num_rows, 1.0 / s.request.temperature) for s in spans], torch.float32
        )
        candidates = torch.from_numpy(candidates_RC).to(hidden_TH.device)
        rows_per_chunk = rows_at_once(self._vocab_size, hidden_TH.device.type)
        chunks: list[torch.Tensor] = []
        for start in range(0, num_rows, rows_per_chunk):
            chunk = slice(start, start + rows_per_chunk)
            logits_RV = self._compute_logits(hidden_TH[hidden_index_R[chunk]])
            if logits_RV is None:
                continue  # other ranks gather the later chunks too, and wait for this one
            _leave_out_(logits_RV, spans, start)
            chunks.append(
                score_rows(
                    logits_RV,
                    positions_R[chunk],
                    targets_R[chunk],
                    candidates[chunk],
                    inverse_temperatures_R[chunk],
                    k=k,
                    extras=frozenset().union(*(span.request.extras for span in spans)),
                )
            )
        if not chunks:
            return None
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


def _leave_out_(logits_RV: torch.Tensor, spans: list[_Span], first_row: int) -> None:
    """In place, of each request what it excludes; the logits are those from first_row on of all."""
    if len(excluded := {span.request.excluded_ids for span in spans}) == 1:
        fill(logits_RV, excluded.pop(), -torch.inf)
        return
    start = -first_row
    for span in spans:
        rows = slice(max(0, start), max(0, start + span.num_rows))
        fill(logits_RV[rows], span.request.excluded_ids, -torch.inf)
        start += span.num_rows


def _spans(
    metadata: PoolingMetadata, hidden_TH: torch.Tensor, kept: KeptStates
) -> tuple[list[_Span], list[torch.Tensor]]:
    """The rows of each request of a step, and the hidden states that were recalled for them."""
    cursor = metadata.get_pooling_cursor()
    spans: list[_Span] = []
    recalled: list[torch.Tensor] = []
    step_offset = 0
    for params, num_scheduled, seq_len in zip(
        metadata.pooling_params,
        cursor.num_scheduled_tokens_cpu.tolist(),
        cursor.seq_lens_cpu.tolist(),
        strict=True,
    ):
        if params.extra_kwargs is None:
            request = _profiling_request(num_scheduled)
        else:
            request = RowRequest.of_kwargs(params.extra_kwargs)
        step_start = seq_len - num_scheduled
        to_hidden = step_offset - step_start
        for text, position in request.boundaries():
            if step_start <= position < seq_len:
                kept.keep(text, hidden_TH[position + to_hidden])
        # Of the last token submitted there may be no row: what follows it is not known yet.
        first = max(step_start, request.first_row - 1)
        hidden_n = np.arange(first, min(seq_len, request.end - 1)) + to_hidden
        before_H = kept.recall(request.before) if step_start == request.first_row else None
        if before_H is not None:
            first -= 1
            hidden_n = np.append(len(hidden_TH) + len(recalled), hidden_n)
            recalled.append(before_H)
        spans.append(_Span(request, hidden_n, first + 1))
        step_offset += num_scheduled
    return spans, recalled


def _profiling_request(num_rows: int) -> RowRequest:
    """Stands in when vLLM measures its memory with requests of its own: every row, all extras."""
    return RowRequest(
        first_row=1,
        k=1,
        temperature=1.0,
        extras=EXTRAS,
        target_ids=np.zeros(num_rows, dtype=np.int32),
        candidate_ids=np.zeros((num_rows, 1), dtype=np.int32),
    )


def _narrow(packed_nW: torch.Tensor, request: RowRequest, spans: list[_Span]) -> torch.Tensor:
    """Columns of one request out of rows as wide as the widest request of the step."""
    if packed_nW.shape[1] == request.width():
        return packed_nW
    k, k_max = request.k, max(span.request.k for span in spans)
    header_nX, ids_nK, logprobs_nK, candidates_nC = packed_nW.split(
        [HEADER, k_max, k_max, packed_nW.shape[1] - HEADER - 2 * k_max], dim=1
    )
    num_candidates = request.candidate_ids.shape[1]
    return torch.cat(
        [header_nX, ids_nK[:, :k], logprobs_nK[:, :k], candidates_nC[:, :num_candidates]], dim=1
    )
