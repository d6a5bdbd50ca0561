"""One measurement of memory in a fresh process: prints bytes as JSON. Linux only.

python -m benchmarks.memory_child rows --vocab 151936 --tokens 2048
python -m benchmarks.memory_child hf --vocab 151936 --tokens 1024
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from pathlib import Path

HIDDEN = 64
K = 32


def status_bytes(field: str, pid: int | str = "self") -> int:
    """VmRSS or VmHWM of a process."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/{pid}/status has no {field}")


def forget_peak() -> None:
    """VmHWM starts again at what is held now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def rows(vocab_size: int, num_tokens: int) -> dict[str, int]:
    """Peak of the head and the rows of a whole prefill, in the row chunks of the vLLM plugin."""
    import torch

    from teacher_server.engine.base import EXTRAS
    from teacher_server.engine.cpu_head import logits_in_blocks
    from teacher_server.engine.row_scores import rows_at_once, score_rows

    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(num_tokens, HIDDEN, generator=generator)
    head_VH = torch.randn(vocab_size, HIDDEN, generator=generator).bfloat16()
    ids_TK = torch.randint(vocab_size, (num_tokens, K), generator=generator)
    rows_per_chunk = rows_at_once(vocab_size, "cpu")

    def score(last: int) -> None:
        packed = []
        for start in range(0, last, rows_per_chunk):
            chunk = slice(start, min(start + rows_per_chunk, last))
            num_rows = chunk.stop - chunk.start
            packed.append(
                score_rows(
                    logits_in_blocks(hidden_TH[chunk], head_VH),
                    torch.arange(num_rows, dtype=torch.int32),
                    ids_TK[chunk, 0],
                    ids_TK[chunk],
                    torch.ones(num_rows),
                    k=K,
                    extras=EXTRAS,
                )
            )
        torch.cat(packed)

    with torch.inference_mode():
        score(1)
        forget_peak()
        before = status_bytes("VmRSS")
        score(num_tokens)
    return {"before": before, "extra": status_bytes("VmHWM") - before}


def hf(vocab_size: int, num_tokens: int) -> dict[str, int]:
    """Peak of the transformers engine with all rows, above its peak with the last row alone."""
    from dataclasses import replace

    import numpy as np
    from transformers.utils import logging

    from teacher_server.engine.base import EXTRAS, ScoreQuery
    from teacher_server.engine.hf_engine import HfEngine

    logging.disable_progress_bar()

    async def run(model: str) -> dict[str, int]:
        engine = HfEngine(model=model, max_context=num_tokens, device="cpu")
        await engine.start()
        rng = np.random.default_rng(0)
        ids = rng.integers(0, vocab_size, num_tokens).astype(np.int32)
        candidate_ids = rng.integers(0, vocab_size, (num_tokens - 1, K)).astype(np.int32)
        every_row = ScoreQuery(
            token_ids=ids,
            first_row=1,
            candidate_ids=candidate_ids,
            k=K,
            temperature=0.9,
            extras=EXTRAS,
        )
        last_row = replace(every_row, first_row=num_tokens - 1, candidate_ids=candidate_ids[-1:])
        peaks = []
        for query in (last_row, last_row, every_row):
            forget_peak()
            await engine.score(query)
            peaks.append(status_bytes("VmHWM"))
        await engine.close()
        return {"before": peaks[1], "extra": max(0, peaks[2] - peaks[1])}

    with tempfile.TemporaryDirectory() as folder:
        _write_model(Path(folder), vocab_size, num_tokens)
        return asyncio.run(run(folder))


def _write_model(folder: Path, vocab_size: int, num_tokens: int) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=num_tokens,
        tie_word_embeddings=True,
        dtype="float32",
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory_child")
    parser.add_argument("kind", choices=("rows", "hf"))
    parser.add_argument("--vocab", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    arguments = parser.parse_args()
    measure = rows if arguments.kind == "rows" else hf
    print(json.dumps(measure(arguments.vocab, arguments.tokens)))


if __name__ == "__main__":
    main()
