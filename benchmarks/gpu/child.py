"""Parts in a process of their own: prints a line of JSON a row; of `card`, what it runs on.

python -m benchmarks.gpu.child card --device cuda --size full
python -m benchmarks.gpu.child parity --device cpu --size small
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.gpu.parts import PARTS
from benchmarks.trainers.task import telling
from vllm_process.cores import wait_briefly

CARD = "card"
"""What is asked first: which card, and how fast it multiplies and copies."""


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.child")
    parser.add_argument("parts", nargs="+", choices=(CARD, *PARTS))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--size", default="")
    parser.add_argument("--rate", type=float, default=1.0, help="TFLOP/s of a product")
    parser.add_argument("--card", default="")
    arguments = parser.parse_args(words)
    wait_briefly()  # as the command lines do
    with telling() as tell:
        import torch

        from benchmarks.gpu.device import about, copy_rate, peak_of, product_rate
        from benchmarks.gpu.sizes import SIZES

        device = arguments.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        size = arguments.size or ("small" if device == "cpu" else "full")
        sizes = SIZES[size]
        for name in arguments.parts:
            if name == CARD:
                known = about(device)
                rates = {
                    "product_tflops": product_rate(device, sizes.product),
                    "copy_tb_per_s": copy_rate(device, sizes.copied),
                    "peak_tflops": peak_of(known["card"]),
                }
                tell(CARD, size=size, **known, **rates)
                continue
            for row in PARTS[name].rows(sizes, device, arguments.rate, arguments.card):
                tell("row", **asdict(row))
        tell("done")


if __name__ == "__main__":
    main()
