"""Memory that a model takes on a GPU, from its configuration alone: before anything is loaded.

A configuration is a checkpoint's config.json, or what transformers' `to_dict()` gives of it, which
also has the values that the file leaves out. Sizes are bytes. What is divided among devices is
counted as vLLM 0.32 divides it: attention heads, the width of the layers between and the padded
vocabulary among the ranks of tensor parallelism, whole layers among the stages of a pipeline.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_process.devices import PADDED_VOCABULARY

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
ALLOWANCE_BYTES = 3 << 29
"""The driver's context, kernels' workspaces and captured graphs: an allowance of 1.5 GiB, not a
measurement."""
LOGIT_PIECES_BYTES = 1 << 30
"""Logits of the rows that the scoring pooler takes at once (at most 2**26 values) and what is made
of them, in float32."""


class ModelMemoryError(ValueError):
    """A model whose size does not follow from its configuration here; the message says why."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """What a family's decoder has beside the matrices that all have."""

    num_norms: int = 2
    """Of width H, a layer."""
    head_norms: bool = False
    """One of a head's width for queries, one for keys."""
    always_biased: bool = False
    """Queries, keys and values have a bias whatever the configuration says; the output has none."""
    always_tied: bool = False


_LAYOUTS = {
    "llama": _Layout(),
    "mistral": _Layout(),
    "qwen2": _Layout(always_biased=True),
    "qwen3": _Layout(head_norms=True),
    "qwen3_moe": _Layout(head_norms=True),
    "gemma2": _Layout(num_norms=4, always_tied=True),
    "gemma3_text": _Layout(num_norms=4, head_norms=True, always_tied=True),
}
_KEYED = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers that keep keys and values."""
_MIXED = ("full_attention_interval", "attn_layer_period", "ssm_cfg", "mamba_d_state", "state_size")
"""Names in a configuration by which older files say that some layers keep none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeed:
    """Of the GPU that has the most, in bytes."""

    weights_bytes: int
    kv_cache_bytes: int
    working_bytes: int
    """Activations of an engine step and the logits of a piece of its rows."""
    allowance_bytes: int = ALLOWANCE_BYTES
    num_gpus: int
    """That the model is divided among; data parallelism takes as many again for each copy."""

    @property
    def total_bytes(self) -> int:
        parts = (self.weights_bytes, self.kv_cache_bytes, self.working_bytes, self.allowance_bytes)
        return sum(parts)


def weights_bytes(config: Mapping[str, Any], dtype: str) -> int:
    """All weights on one device. Raises ModelMemoryError for a family whose layers are not known
    here, and for quantised weights: `stored_weights_bytes` has those."""
    return _weights_of_stage(config, dtype, ranks=1, stage=0, stages=1)


def stored_weights_bytes(folder: Path) -> int | None:
    """Tensors of a checkpoint's folder in the dtype that they are stored in; None of a folder
    without safetensors."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        total = json.loads(index.read_text("utf-8")).get("metadata", {}).get("total_size")
        if total is not None:
            return int(total)
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    return sum(sizes) if sizes else None


def kv_bytes_per_token(
    config: Mapping[str, Any],
    dtype: str,
    *,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
) -> int:
    """Keys and values of a token, in all layers of the GPU that has most of them.

    Layers with a window are counted as if they kept everything, which is the most they can. Raises
    ModelMemoryError for layers that keep a state instead.
    """
    text = text_part(config)
    states = {kind for kind in text.get("layer_types") or () if kind not in _KEYED}
    states |= {name for name in _MIXED if text.get(name)}
    if states:
        raise ModelMemoryError(
            f"{_family(text)} has layers that keep a state in place of keys and values "
            f"({', '.join(sorted(states))}): that does not grow by the token; vLLM says at "
            "its start how many tokens it has room for"
        )
    layers = max(_layers_of_stages(_size(text, "num_hidden_layers"), pipeline_parallel_size))
    width = DTYPE_BYTES[_dtype(text, dtype)]
    if rank := text.get("kv_lora_rank"):  # latent attention: one vector, which every rank has
        return int(layers * (rank + _size(text, "qk_rope_head_dim")) * width)
    heads = _kv_heads(text, tensor_parallel_size)
    return int(2 * layers * heads * _head_dim(text) * width)


def needed_bytes(
    config: Mapping[str, Any],
    dtype: str,
    *,
    max_model_len: int,
    num_tokens: int = 0,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    max_num_batched_tokens: int = 8192,
) -> MemoryNeed:
    """What a model takes that keeps `num_tokens` in its cache, those of all sessions that are not
    to be computed twice; at least max_model_len, without which vLLM does not start.

    A GPU is large enough when the total is at most its memory times gpu_memory_utilization. Raises
    ModelMemoryError as `weights_bytes` and `kv_bytes_per_token` do.
    """
    ranks, stages = tensor_parallel_size, pipeline_parallel_size
    text = text_part(config)
    token = kv_bytes_per_token(
        config, dtype, tensor_parallel_size=ranks, pipeline_parallel_size=stages
    )
    # Residual, its norm and queries, and the widest product of a layer, of a step's tokens.
    widest = 3 * _size(text, "hidden_size") + 2 * -(-_width(text) // ranks)
    activations = max_num_batched_tokens * widest * DTYPE_BYTES[_dtype(text, dtype)]
    return MemoryNeed(
        weights_bytes=max(
            _weights_of_stage(config, dtype, ranks=ranks, stage=stage, stages=stages)
            for stage in range(stages)
        ),
        kv_cache_bytes=token * max(max_model_len, num_tokens),
        working_bytes=activations + LOGIT_PIECES_BYTES,
        num_gpus=ranks * stages,
    )


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that reads text, of a model with towers of other kinds around it."""
    part = config.get("text_config")
    if not part:
        return config
    saved = config.get("dtype") or config.get("torch_dtype")
    return {**part, "dtype": part.get("dtype") or part.get("torch_dtype") or saved}


def _weights_of_stage(
    config: Mapping[str, Any], dtype: str, *, ranks: int, stage: int, stages: int
) -> int:
    """Of one rank of a stage of the pipeline."""
    text = text_part(config)
    family = _family(text)
    if family not in _LAYOUTS or text.get("kv_lora_rank"):
        raise ModelMemoryError(
            f"the weights of a {family} are not counted here (those of {', '.join(_LAYOUTS)} are): "
            "take the size of its safetensors"
        )
    if text.get("quantization_config") or config.get("quantization_config"):
        raise ModelMemoryError(
            "the weights are quantised, and their size is not that of their dtype: take the size "
            "of the safetensors"
        )
    layers = _layers_of_stages(_size(text, "num_hidden_layers"), stages)
    first = sum(layers[:stage])
    hidden = _size(text, "hidden_size")
    padded = _round_up(_size(text, "vocab_size"), PADDED_VOCABULARY) // ranks
    # One device needs no padding of what it does not divide.
    table = hidden * (_size(text, "vocab_size") if ranks == 1 else padded)
    tied = _LAYOUTS[family].always_tied or bool(text.get("tie_word_embeddings"))
    tables = (stage == 0) + (stage == stages - 1 and not (tied and stages == 1))
    last = hidden if stage == stages - 1 else 0
    values = sum(_layer_values(text, i, ranks) for i in range(first, first + layers[stage]))
    return int((values + tables * table + last) * DTYPE_BYTES[_dtype(text, dtype)])


def _layer_values(text: Mapping[str, Any], index: int, ranks: int) -> int:
    """Weights of a layer on one rank."""
    layout = _LAYOUTS[_family(text)]
    hidden, head_dim = _size(text, "hidden_size"), _head_dim(text)
    queries = -(-_size(text, "num_attention_heads") // ranks) * head_dim
    keys = _kv_heads(text, ranks) * head_dim
    values = 2 * hidden * (queries + keys)
    if layout.always_biased or text.get("attention_bias"):
        values += queries + 2 * keys
    if text.get("attention_bias") and not layout.always_biased:
        values += hidden
    values += layout.num_norms * hidden + 2 * head_dim * layout.head_norms
    if _is_sparse(text, index):
        experts = _num_experts(text)
        width = -(-_size(text, "moe_intermediate_size") // ranks)
        return values + hidden * experts + 3 * hidden * width * experts
    width = -(-_size(text, "intermediate_size") // ranks)
    bias = 2 * width + hidden if text.get("mlp_bias") else 0
    return values + 3 * hidden * width + bias


def _num_experts(text: Mapping[str, Any]) -> int:
    """0 of a dense model."""
    return int(text.get("num_experts") or text.get("num_local_experts") or 0)


def _is_sparse(text: Mapping[str, Any], index: int) -> bool:
    """Whether a layer has experts, as transformers' Qwen3-MoE decides it."""
    return bool(
        _num_experts(text)
        and index not in (text.get("mlp_only_layers") or ())
        and (index + 1) % (text.get("decoder_sparse_step") or 1) == 0
    )


def _layers_of_stages(layers: int, stages: int) -> list[int]:
    """As vLLM 0.32 divides them: what is left over goes to the stages before the last."""
    shares = [layers // stages] * stages
    for i in range(2, layers % stages + 2):
        shares[-i] += 1
    return shares


def _kv_heads(text: Mapping[str, Any], ranks: int) -> int:
    """Of one rank; fewer heads than ranks are held several times."""
    heads = text.get("num_key_value_heads") or _size(text, "num_attention_heads")
    return max(1, -(-int(heads) // ranks))


def _head_dim(text: Mapping[str, Any]) -> int:
    return int(
        text.get("head_dim") or _size(text, "hidden_size") // _size(text, "num_attention_heads")
    )


def _width(text: Mapping[str, Any]) -> int:
    """Of the widest layer between: all experts of a token together."""
    experts = (text.get("moe_intermediate_size") or 0) * (text.get("num_experts_per_tok") or 0)
    return max(int(text.get("intermediate_size") or 0), int(experts))


def _dtype(text: Mapping[str, Any], dtype: str) -> str:
    """ "auto" is what the checkpoint was saved in, float32 when it does not say."""
    if dtype == "auto":
        saved = text.get("dtype") or text.get("torch_dtype") or "float32"
        dtype = str(saved).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise ModelMemoryError(f"dtype {dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
    return dtype


def _family(text: Mapping[str, Any]) -> str:
    return str(text.get("model_type") or "model without a model_type")


def _size(text: Mapping[str, Any], name: str) -> int:
    value = text.get(name)
    if not isinstance(value, int) or value < 1:
        raise ModelMemoryError(
            f"{name} is {value!r} in the configuration of a {_family(text)}: read it with "
            "transformers' AutoConfig, which fills in what config.json leaves out"
        )
    return value


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
