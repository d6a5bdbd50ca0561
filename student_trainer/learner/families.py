"""What differs between families of models: where decoder and head are, what happens to the logits,
what is random in training mode, which attention is right.

Found in general rather than by name, and proven when a model is loaded: `check_family` holds hidden
state, head and transform against the model's own logits.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from student_trainer.errors import CheckpointError, ConfigError
from student_trainer.learner.head import Head, LogitTransform
from student_trainer.learner.head_logprobs import reference_logprobs

Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
RANDOM = re.compile(r"drop|jitter_noise")
"""Of the names of config fields that make a forward pass in training mode random."""
MULTIPLIERS, DIVISORS = ("logit_scale", "output_multiplier"), ("logits_scaling",)
"""Config fields of the factor between the head's product and the logits."""
TELLING = re.compile(r"logit|scal|cap$|capping|multiplier|sliding_window$|experts|norm_topk")
"""Of the names of config fields by which families differ."""
CHECK_TOKENS, CHECK_PADDING = 12, 4
CHECK_TOLERANCE = 1e-4
"""Of the largest logit: float32 through other kernels."""


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The part between ids and the last hidden state, the text part where there are several."""
    decoder: nn.Module = model.get_decoder()
    return decoder


def head_of(model: PreTrainedModel) -> Head:
    """Raises CheckpointError for a head that is not one plain matrix."""
    module = model.get_output_embeddings()
    if module is None or type(module).forward is not nn.Linear.forward:
        found = "none" if module is None else type(module).__name__
        raise CheckpointError(
            f"{_family(model)}: the head is {found}, and must be a torch.nn.Linear, whose gradient "
            "can be made in blocks"
        )
    return Head(
        weight_VD=module.weight, bias_V=module.bias, transform=logit_transform(model.config)
    )


def logit_transform(config: PretrainedConfig) -> LogitTransform:
    """What the family does to its logits. The one place that knows the config's fields of it."""
    text = config.get_text_config(decoder=True)
    scale = 1.0
    for name in MULTIPLIERS:
        scale *= getattr(text, name, None) or 1.0
    for name in DIVISORS:
        scale /= getattr(text, name, None) or 1.0
    return LogitTransform(scale=scale, soft_cap=getattr(text, "final_logit_softcapping", None))


def attention_for(
    config: PretrainedConfig, asked: Attention, *, dtype: torch.dtype, device: torch.device
) -> str | None:
    """The attention that transformers is told to use; None for its own choice.

    Its sdpa passes over a soft-cap of the attention's scores without a word; in float32 on CUDA its
    grouped heads rule out every kernel that does not hold the scores. Raises ConfigError for an
    attention that is not installed, or not right for the family.
    """
    text = config.get_text_config(decoder=True)
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    if asked == "flash_attention_2":
        if find_spec("flash_attn") is None:
            raise ConfigError(
                "student.attention is 'flash_attention_2', and the package flash-attn is not "
                "installed: 'auto' takes PyTorch's own fused attention"
            )
        if dtype == torch.float32:
            raise ConfigError(
                "student.attention 'flash_attention_2' needs student.dtype 'bfloat16', it is "
                "'float32'"
            )
        return asked
    if capped and asked == "sdpa":
        raise ConfigError(
            f"student.attention is 'sdpa', which leaves out the soft-cap of the attention of "
            f"{config.model_type}: 'eager' or 'flash_attention_2'"
        )
    if capped or asked == "eager":
        return "eager"
    if dtype == torch.float32 and device.type == "cuda":
        return REPEATED_HEADS
    return None if asked == "auto" else asked


def without_randomness(config: PretrainedConfig) -> PretrainedConfig:
    """Dropout and the like off, in place, before the model is made: a log-prob is a number."""
    nested = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    for part in (config, *nested):
        for name, value in vars(part).items():
            is_rate = isinstance(value, int | float) and not isinstance(value, bool)
            if RANDOM.search(name) and is_rate:
                setattr(part, name, 0.0)
    return config


def turn_dropout_off(model: nn.Module) -> None:
    """Of modules with a rate of their own, which no config field names."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


def check_family(model: PreTrainedModel) -> None:
    """Proves that the learner's log-probs are the model's own.

    In training mode and with padding behind it, hidden state, head and transform give a few random
    ids the logits of plain `model(ids).logits` in evaluation mode and with eager attention. Float32
    only. Raises CheckpointError naming the family and the likely cause.
    """
    head, vocab_size = head_of(model), model.get_output_embeddings().weight.shape[0]
    ids_S = torch.randint(vocab_size, (CHECK_TOKENS,), generator=torch.Generator().manual_seed(0))
    input_ids_BS = ids_S.repeat(2, 1).to(head.weight_VD.device)
    input_ids_BS[1, -CHECK_PADDING:] = 0
    with torch.no_grad():
        output = decoder_of(model)(input_ids=input_ids_BS, use_cache=False)
        hidden_BSD = getattr(output, "last_hidden_state", None)
        if not isinstance(hidden_BSD, Tensor):
            raise CheckpointError(f"{_family(model)}: its decoder returns no last_hidden_state")
        every_id = torch.arange(vocab_size, device=head.weight_VD.device)
        logprobs_RV, _ = reference_logprobs(
            head, hidden_BSD.flatten(0, 1), every_id.expand(2 * CHECK_TOKENS, -1)
        )
        plain_SV = plain_logits(model, input_ids_BS[:1])[0].float()
    logprobs_BSV = logprobs_RV.unflatten(0, (2, CHECK_TOKENS))
    expected_SV = plain_SV.log_softmax(-1)
    limit = CHECK_TOLERANCE * max(1.0, plain_SV.abs().max().item())
    real = CHECK_TOKENS - CHECK_PADDING
    gap = (logprobs_BSV[0] - expected_SV).abs().max().item()
    padding_gap = (logprobs_BSV[1, :real] - expected_SV[:real]).abs().max().item()
    if not gap <= limit:
        raise CheckpointError(
            f"{_family(model)}: the learner's log-probs are {gap:.2g} nats off the model's own "
            f"(limit {limit:.2g}): {_likely_cause(model, hidden_BSD[:1], plain_SV)}. This family "
            "cannot be trained"
        )
    if not padding_gap <= limit:
        raise CheckpointError(
            f"{_family(model)}: padding on the right moves the log-probs before it by "
            f"{padding_gap:.2g} nats: its attention is not causal. This family cannot be trained"
        )


def plain_logits(
    model: PreTrainedModel, input_ids_BS: Tensor, *, num_last: int | None = None
) -> Tensor:
    """[B, S, V] as the family's own code has them: evaluation mode, eager attention.

    No more than the last `num_last` positions where the model can leave the others out: those of a
    long prompt would be gigabytes.
    """
    can_leave_out = "logits_to_keep" in signature(model.forward).parameters
    kept = {"logits_to_keep": num_last} if num_last is not None and can_leave_out else {}
    attention, training = model.config._attn_implementation, model.training
    model.eval()
    model.set_attn_implementation("eager")
    try:
        logits: Tensor = model(input_ids=input_ids_BS, use_cache=False, **kept).logits
    finally:
        model.set_attn_implementation(attention)
        model.train(training)
    return logits


def _likely_cause(model: PreTrainedModel, hidden_BSD: Tensor, plain_SV: Tensor) -> str:
    module = model.get_output_embeddings()
    product_SV = nn.functional.linear(hidden_BSD[0].float(), module.weight.float())
    ratio = (plain_SV / product_SV).median().item()
    return (
        f"its logits are about {ratio:.3g} times the head's product, so that they are scaled, "
        "capped or come from another hidden state, or training mode is random, or its attention is "
        f"not what eager attention gives{_told(model)}"
    )


def family_of(model: PreTrainedModel) -> str:
    """Its name, and the fields of its config by which families differ."""
    return f"{_family(model)}{_told(model)}"


def _told(model: PreTrainedModel) -> str:
    text = model.config.get_text_config(decoder=True).to_dict()
    names = [name for name in sorted(text) if TELLING.search(name) and text[name]]
    fields = [f"{name} {text[name]}" for name in names]
    return f"; its config has {', '.join(fields)}" if fields else ""


def _family(model: PreTrainedModel) -> str:
    return f"{model.config.model_type} ({type(model).__name__})"


REPEATED_HEADS = "sdpa_with_repeated_heads"


class _WithoutGroups(nn.Module):
    """In place of the attention's module, so that nothing is grouped again."""

    def __init__(self, *, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal


def _repeated_heads(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    groups = getattr(module, "num_key_value_groups", 1)
    plain = _WithoutGroups(is_causal=getattr(module, "is_causal", True))
    found: tuple[Tensor, None] = sdpa_attention_forward(
        plain, query, repeat_kv(key, groups), repeat_kv(value, groups), mask, **options
    )
    return found


AttentionInterface.register(REPEATED_HEADS, _repeated_heads)
AttentionMaskInterface.register(REPEATED_HEADS, sdpa_mask)
