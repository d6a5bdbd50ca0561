"""Every family's log-probs are its model's own: pytest tests/trainer/learner/test_families.py

float32 through other kernels: 1e-4 nats, as the check at load.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from student_trainer.errors import CheckpointError, ConfigError
from student_trainer.learner import families
from student_trainer.learner.families import (
    attention_for,
    check_family,
    logit_transform,
    turn_dropout_off,
)
from student_trainer.learner.head import LogitTransform
from student_trainer.learner.student import Gathered, student_forward
from student_trainer.pretrained import load_student
from tests.trainer.learner.tiny_families import FAMILIES, VOCAB_SIZE, tiny_config, tiny_family

CPU = torch.device("cpu")
PROMPT, LENGTHS = 3, (12, 8)
"""One prompt length; responses of two rows, the second padded: longer than a sliding window."""


def loaded(folder: Path, family: str, **options: bool) -> PreTrainedModel:
    """As a run loads it."""
    tiny_family(family).save_pretrained(folder)
    return load_student(str(folder), dtype=torch.float32, device=CPU, **options)  # type: ignore[arg-type]


def rows() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(2, VOCAB_SIZE, (PROMPT + n,), generator=draw) for n in LENGTHS]


def forward(
    model: PreTrainedModel, padding_id: int = 0, dtype: torch.dtype = torch.float32
) -> Gathered:
    input_ids = torch.full((2, PROMPT + max(LENGTHS)), padding_id)
    response = torch.zeros(2, max(LENGTHS), dtype=torch.long)
    mask = torch.zeros(2, max(LENGTHS), dtype=torch.bool)
    for b, row in enumerate(rows()):
        input_ids[b, : len(row)] = row
        response[b, : LENGTHS[b]], mask[b, : LENGTHS[b]] = row[PROMPT:], True
    every = torch.arange(VOCAB_SIZE).expand(2, max(LENGTHS), -1)
    prompts = torch.tensor([PROMPT, PROMPT])
    return student_forward(
        model, input_ids, prompts, response, mask, (every,), temperature=1.0, dtype=dtype
    )


def gradient(model: PreTrainedModel, padding_id: int = 0) -> dict[str, Tensor]:
    """Of a loss that weighs every log-prob differently."""
    model.zero_grad()
    gathered = forward(model, padding_id)
    factor = torch.linspace(-1, 1, gathered.logprobs_BT.numel()).view_as(gathered.logprobs_BT)
    (gathered.logprobs_BT * factor).sum().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedModel]:
    return {family: loaded(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_right_with_padding_in_training_mode(
    models: dict[str, PreTrainedModel], family: str
) -> None:
    model = models[family]
    assert model.training
    (logprobs_BTV,) = forward(model).logprobs_at_BTN
    reference = tiny_family(family).eval()
    reference.set_attn_implementation("eager")
    for b, row in enumerate(rows()):
        with torch.no_grad():
            expected = reference(row[None]).logits[0].log_softmax(-1)[PROMPT - 1 : -1]
        torch.testing.assert_close(logprobs_BTV[b, : LENGTHS[b]], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["qwen3", "mistral", "mixtral", "gemma2"])
def test_padding_has_no_gradient_whatever_stands_there(
    models: dict[str, PreTrainedModel], family: str
) -> None:
    zeros, others = (gradient(models[family], padding_id) for padding_id in (0, 95))
    assert zeros.keys() == others.keys()
    embedding = next(name for name in zeros if "embed" in name)
    assert zeros[embedding].norm() > 0
    for name, tensor in zeros.items():
        gap = (tensor - others[name]).abs().max()
        assert gap <= 1e-5 * tensor.abs().max(), name


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen embeddings"])
@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "mixtral"])
def test_checkpointing_gives_the_same_gradient(family: str, frozen: bool, tmp_path: Path) -> None:
    plain = loaded(tmp_path, family)
    saving = loaded(tmp_path, family, gradient_checkpointing=True)
    layers = [m for m in saving.modules() if getattr(m, "gradient_checkpointing", False)]
    assert layers
    for model in (plain, saving):
        model.get_input_embeddings().weight.requires_grad_(not frozen)
    left, right = gradient(plain), gradient(saving)
    assert left.keys() == right.keys()
    assert len(left) > 10
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, atol=1e-6, rtol=1e-5)


def test_dropout_of_modules_is_off_too() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Sequential(torch.nn.Dropout1d(0.1)))
    turn_dropout_off(model)
    assert torch.equal(model(torch.ones(1, 9, 9)), torch.ones(1, 9, 9))


def test_transforms_of_the_families() -> None:
    expected = {
        "gemma2": LogitTransform(soft_cap=3.0),
        "granite": LogitTransform(scale=1 / 8),
        "cohere2": LogitTransform(scale=0.25),
    }
    for family in FAMILIES:
        assert logit_transform(tiny_config(family)) == expected.get(family, LogitTransform())


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("gemma2", "final_logit_softcapping"),
        ("granite", "logits_scaling"),
        ("cohere2", "logit_scale"),
    ],
)
def test_a_transform_that_is_not_known_is_refused_by_name(
    family: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "logit_transform", lambda config: LogitTransform())
    model = tiny_family(family)
    model.set_attn_implementation("eager")
    with pytest.raises(
        CheckpointError, match=rf"{family} .* nats off .*{named}.* cannot be trained"
    ):
        check_family(model)


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "mixtral"])
def test_randomness_of_training_mode_would_be_seen(family: str) -> None:
    with pytest.raises(CheckpointError, match="nats off"):
        check_family(tiny_family(family))


def test_a_head_that_is_no_plain_matrix_is_refused() -> None:
    model = tiny_family("llama")

    class Doubled(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model.set_output_embeddings(Doubled(32, VOCAB_SIZE, bias=False))
    with pytest.raises(CheckpointError, match=r"llama .* the head is Doubled"):
        check_family(model)


def test_a_model_that_looks_ahead_is_refused() -> None:
    model = tiny_family("llama")
    model.config.is_causal = False
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(CheckpointError, match="not causal"):
        check_family(model)


def test_attention_is_right_or_refused() -> None:
    def chosen(family: str, asked: families.Attention, device: str = "cpu") -> str | None:
        return attention_for(
            tiny_config(family), asked, dtype=torch.float32, device=torch.device(device)
        )

    assert chosen("qwen3", "auto") is None
    assert chosen("qwen3", "eager") == chosen("gemma2", "auto") == "eager"
    assert chosen("qwen3", "sdpa", "cuda") == chosen("qwen3", "auto", "cuda:1")
    with pytest.raises(ConfigError, match=r"student\.attention is 'sdpa'.*soft-cap.*gemma2"):
        chosen("gemma2", "sdpa")
    with pytest.raises(ConfigError, match=r"flash_attention_2.*flash-attn is not installed"):
        chosen("qwen3", "flash_attention_2")


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gpt_neox"])
def test_repeated_heads_are_grouped_heads(models: dict[str, PreTrainedModel], family: str) -> None:
    model = models[family]
    with torch.no_grad():
        grouped = forward(model).logprobs_BT
        model.set_attn_implementation(families.REPEATED_HEADS)
        repeated = forward(model).logprobs_BT
        model.set_attn_implementation("sdpa")
    torch.testing.assert_close(repeated, grouped, atol=1e-5, rtol=0)


def test_bfloat16_is_the_arithmetic_and_float32_what_is_kept(
    models: dict[str, PreTrainedModel],
) -> None:
    model = models["qwen3"]
    exact, rounded = forward(model), forward(model, dtype=torch.bfloat16)
    gap = (exact.logprobs_BT - rounded.logprobs_BT).abs().max()
    assert 1e-4 < gap < 0.3
    assert rounded.logprobs_BT.dtype == torch.float32
    rounded.logprobs_BT.sum().backward()
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
    model.zero_grad()
