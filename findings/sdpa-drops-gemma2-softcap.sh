#!/usr/bin/env bash
# transformers 5.19.0 with torch 2.13.0: Gemma 2 with sdpa, its default, has no soft-cap of the attention's
# scores, and says nothing.
#
# What is done: one small random Gemma 2 with `attn_logit_softcapping`, the same weights with sdpa and with eager
# attention. The model passes `softcap` on; the function of sdpa takes it into its keyword arguments and does
# nothing with it.
# Seen: log-probs that differ by 0.1 nats; without the cap both agree to 1e-5.
# Exits with 0 while that is so, with 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.19.0 numpy
cat >gap.py <<'PY'
import sys

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM


def gap(cap: float | None) -> float:
    """Largest difference of log-probs between the default attention and eager."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
        attn_logit_softcapping=cap,
    )
    model = Gemma2ForCausalLM(config).eval()
    ids = torch.randint(3, 96, (1, 24))
    with torch.no_grad():
        default = model(ids).logits.log_softmax(-1)
        chosen = model.config._attn_implementation
        model.set_attn_implementation("eager")
        eager = model(ids).logits.log_softmax(-1)
    found = float((default - eager).abs().max())
    sys.stdout.write(f"attn_logit_softcapping {cap}: {chosen} is {found:.2g} nats off eager\n")
    return found


sys.exit(0 if gap(2.0) > 1e-3 and gap(None) < 1e-4 else 1)
PY
env/bin/python gap.py
