#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.19.0: a name in `target_modules` that no layer has is passed over without a word, as
# long as another name is found; alone it is an error.
#
# What is done: a small random Qwen3 gets LoRA by get_peft_model, once with target_modules ["q_proj", "vproj"], of which
# the second is misspelt, and once with ["vproj"] alone, all warnings shown.
# Seen: the first adapts the two q_proj and nothing else, and no warning names "vproj"; the second raises a ValueError.
# A run that was meant to train queries and values trains queries.
# Exits with 0 while that is so, with 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check peft==0.21.2 transformers==5.19.0 torch==2.13.0 numpy
cat >targets.py <<'PY'
import sys
import warnings

from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM


def model() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
    )


def adapted(targets: list[str]) -> tuple[set[str], list[str]]:
    """The layers that have an adapter, by the ends of their names, and what was warned of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = get_peft_model(model(), LoraConfig(r=4, target_modules=targets))
    names = {name.split(".lora_A")[0] for name, _ in found.named_parameters() if ".lora_A" in name}
    return {name.rpartition(".")[2] for name in names}, [str(w.message) for w in said]


layers, said = adapted(["q_proj", "vproj"])
try:
    adapted(["vproj"])
    alone = "accepted"
except ValueError:
    alone = "ValueError"
named = any("vproj" in text for text in said)
print(f'["q_proj", "vproj"]: adapted {sorted(layers)}, "vproj" named in a warning: {named}')
print(f'["vproj"]: {alone}')
sys.exit(0 if layers == {"q_proj"} and not named and alone == "ValueError" else 1)
PY
env/bin/python targets.py
