"""The parts, most important first: what each is called, what it needs, and which rows it has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.gpu.device import Row
    from benchmarks.gpu.sizes import Sizes

SERVICE = (
    "grpc",
    "grpc_status",
    "grpc_health",
    "grpc_reflection",
    "pydantic",
    "pydantic_settings",
    "fastapi",
    "uvicorn",
    "uvloop",
    "prometheus_client",
    "rich",
)
"""What a teacher server and a trainer import besides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one child measures."""

    letter: str
    title: str
    module: str
    function: str = "rows"
    needs: tuple[str, ...] = ()
    """Packages besides torch and transformers."""
    asks_rate: bool = False
    """Whether it is told what a product reaches here, and on which card."""

    def missing(self) -> list[str]:
        """Of what it needs."""
        return [name for name in self.needs if not has(name)]

    def rows(self, sizes: Sizes, device: str, rate: float, card: str) -> Iterator[Row]:
        """One after another, as they are measured."""
        made = getattr(import_module(f"benchmarks.gpu.{self.module}"), self.function)
        found: Iterator[Row] = made(sizes, device, *((rate, card) if self.asks_rate else ()))
        return found


PARTS = {
    "parity": Part(letter="a", title="beside a CPU, gaps in nats", module="parity"),
    "scoring": Part(letter="b", title="head, top-K and gather of the teacher", module="scoring"),
    "learner": Part(letter="c", title="an update of all weights", module="learner", asks_rate=True),
    "lora": Part(
        letter="c",
        title="an update of an adapter",
        module="learner",
        function="lora_rows",
        needs=("peft",),
        asks_rate=True,
    ),
    "sharded": Part(letter="d", title="FSDP2 on one process", module="sharded"),
    "step": Part(letter="e", title="whole steps over gRPC", module="step", needs=SERVICE),
    "vllm": Part(letter="f", title="vLLM", module="engine", needs=("vllm", "grpc", "pydantic")),
}


def has(name: str) -> bool:
    """Whether a package can be imported, as far as its place tells."""
    try:
        return find_spec(name) is not None
    except ImportError:
        return False
