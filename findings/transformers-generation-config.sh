#!/usr/bin/env bash
# transformers 5.19.0 with torch 2.13.0: a model whose generation config it loads with a warning it refuses to save.
#
# What is done: a model's generation_config.json has a `temperature` and no `do_sample`, as those of many published
# models; the model is loaded, as one would to train it, and saved.
# Seen: loading says that the flag "may be ignored"; save_pretrained raises ValueError and leaves a folder with
# config.json alone. Whoever trained for days meets it at the end, with the weights unsaved.
# Exits with 0 while that is so, with 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -qq --disable-pip-version-check torch==2.13.0 transformers==5.19.0
cat >save.py <<'PY'
import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
model, saved = Path("model"), Path("saved")
LlamaForCausalLM(LlamaConfig(**SMALL, num_attention_heads=1)).save_pretrained(model)
config = model / "generation_config.json"
config.write_text(json.dumps(json.loads(config.read_text()) | {"temperature": 0.6}))
loaded = AutoModelForCausalLM.from_pretrained(model)
try:
    loaded.save_pretrained(saved)
except ValueError as error:
    left = sorted(path.name for path in saved.iterdir())
    said = " ".join(str(error).split("\n")[:2])
    sys.stdout.write(f"refused, leaving {left}: {said}\n")
    sys.exit(0 if left == ["config.json"] else 1)
sys.stdout.write("saved\n")
sys.exit(1)
PY
env/bin/python save.py
