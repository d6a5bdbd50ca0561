#!/usr/bin/env bash
# transformers 5.19.0 with tokenizers 0.23.3: a checkpoint's `tokenizer_class` decides over its own `tokenizer.json`.
#
# What is done: a byte-level BPE tokenizer is saved as tokenizer.json, beside a tokenizer_config.json that names
# `LlamaTokenizerFast` (as published distillates into Llama 3 and Qwen3 do) and a config.json of model_type llama or
# qwen3. `AutoTokenizer` loads the folder.
# Seen: the class rebuilds the tokenizer from vocabulary and merges alone, with the text handling of Llama 2. Every
# space of the text is lost: "the cat sat" becomes "thecatsat", without a warning. As `PreTrainedTokenizerFast` the
# same folder gives the ids of its file.
# Exits with 0 while that is so, with 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -qq --disable-pip-version-check transformers==5.19.0 tokenizers==0.23.3
cat >spaces.py <<'PY'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEXT = "the cat sat"

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=300,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=["</s>"],
    show_progress=False,
)
tokenizer.train_from_iterator([TEXT] * 9, trainer)
expected = tokenizer.encode(TEXT).ids

as_seen = True
for model_type in ("llama", "qwen3"):
    folder = Path(model_type)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "LlamaTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    auto = AutoTokenizer.from_pretrained(folder)
    plain = PreTrainedTokenizerFast.from_pretrained(folder)
    back = auto.decode(auto.encode(TEXT, add_special_tokens=False))
    right = plain.encode(TEXT, add_special_tokens=False) == expected
    sys.stdout.write(f"{model_type}: {type(auto).__name__} {back!r}, plainly right: {right}\n")
    as_seen = as_seen and back == "thecatsat" and right
sys.exit(0 if as_seen else 1)
PY
env/bin/python spaces.py
