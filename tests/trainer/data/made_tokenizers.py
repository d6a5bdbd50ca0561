"""Small tokenizers that behave as published ones do: byte-level, with and without a beginning."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ bos_token }}{% if tools %}[tools {{ tools | tojson }}]\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)


@cache
def byte_level_json(*, adds_bos: bool) -> str:
    """A tokenizer.json: byte-level BPE, `<s>` 0, `</s>` 1, `<stop>` 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<stop>"],
    )
    tokenizer.train_from_iterator(["what is 1 + 2? the cat sat on the mat"] * 20, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return str(tokenizer.to_str())


def byte_level(*, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """That tokenizer with CHAT_TEMPLATE; by habit it begins, and ends, a text if `adds_bos`."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_level_json(adds_bos=adds_bos)),
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_byte_level(folder: Path, *, tokenizer_class: str, model_type: str) -> Path:
    """The same as a checkpoint that names a class and a model."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(byte_level_json(adds_bos=False), encoding="utf-8")
    named = {"tokenizer_class": tokenizer_class, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    return folder
