"""Seconds, memory and the rate of products on one device, and rows of what was measured there.

A GPU's seconds are between two events of its stream, its peak is that of PyTorch's allocator; a
CPU's are of the clock, its peak is of resident memory (Linux only).
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from benchmarks.memory_child import forget_peak, status_bytes

REPEATS = 3
PRODUCTS = 10
"""In one timing of the rate: a single one is over before the clock is exact."""
PEAKS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "GH200": 989.0,
    "GB200": 2500.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
}
"""Dense bfloat16 TFLOP/s by the makers' sheets, of the first name that a card's has in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement, or why there is none."""

    name: str
    figures: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    fails: bool = False
    """Whether its error is one of the part."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Of several runs: the median of the seconds, the most memory above what was held before."""

    seconds: float
    extra_gib: float


def timed(
    work: Callable[[], object],
    device: str,
    *,
    repeats: int = REPEATS,
    before: Callable[[], object] = lambda: None,
) -> Timing:
    """Of `work`, which is warm; `before` each run is not counted."""
    seconds, peaks = [], []
    for _ in range(repeats):
        before()
        took, peak = (_on_cpu if device == "cpu" else _on_gpu)(work)
        seconds.append(took)
        peaks.append(peak)
    return Timing(median(seconds), max(0, *peaks) / 2**30)


def _on_gpu(work: Callable[[], object]) -> tuple[float, int]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000, torch.cuda.max_memory_allocated() - held


def _on_cpu(work: Callable[[], object]) -> tuple[float, int]:
    held = status_bytes("VmRSS")
    forget_peak()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started, status_bytes("VmHWM") - held


def held_gib(device: str) -> float:
    """What is allocated now; on a CPU what is resident."""
    held = status_bytes("VmRSS") if device == "cpu" else torch.cuda.memory_allocated()
    return held / 2**30


def arithmetic(device: str) -> torch.dtype:
    """What is measured in: few CPUs have 16 bits."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def product_rate(device: str, size: int) -> float:
    """TFLOP/s of a large product."""
    left, right = (
        torch.randn(size, size, device=device, dtype=arithmetic(device)) for _ in range(2)
    )

    def work() -> None:
        for _ in range(PRODUCTS):
            torch.mm(left, right)

    work()
    return PRODUCTS * 2 * size**3 / timed(work, device).seconds / 1e12


def copy_rate(device: str, num_bytes: int) -> float:
    """TB/s read and written by a copy."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    into = torch.empty_like(source)
    into.copy_(source)
    return 2 * num_bytes / timed(lambda: into.copy_(source), device).seconds / 1e12


def peak_of(card: str) -> float | None:
    """TFLOP/s that the maker gives; None for a card that is not known."""
    return next((peak for name, peak in PEAKS.items() if name in card), None)


def about(device: str) -> dict[str, Any]:
    """The card and what drives it."""
    import transformers

    found: dict[str, Any] = {
        "device": device,
        "card": "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if device == "cpu":
        return found
    properties = torch.cuda.get_device_properties(0)
    return found | {
        "card": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


def attempted(
    name: str, work: Callable[[], Mapping[str, float]], *, may_lack_memory: bool = False
) -> Row:
    """A row of what `work` returns or raises; what it held is free again."""
    try:
        return Row(name=name, figures=dict(work()))
    except torch.OutOfMemoryError as error:
        failed = Row(name=name, error=f"out of memory: {_first(error)}", fails=not may_lack_memory)
    except Exception as error:  # noqa: BLE001 - whatever fails in a measurement is its result
        failed = Row(name=name, error=f"{type(error).__name__}: {_first(error)}", fails=True)
    free()
    return failed


def checked(name: str, gap: Callable[[], float], limit: float) -> Row:
    """A row of a gap; an error where it is above the limit or no number."""
    row = attempted(name, lambda: {"gap": gap(), "limit": limit})
    if row.error or row.figures["gap"] <= limit:
        return row
    found = row.figures["gap"]
    said = "no number" if math.isnan(found) else f"{found:.3g} above {limit:g}"
    return Row(name=name, figures=row.figures, error=f"the gap is {said}", fails=True)


def free() -> None:
    """What nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["without a word"])[0][:300]
