"""A low-rank adapter beside its base in one vLLM engine: what the engine is started with, and how
new matrices take the place of the old.

The matrices come as peft's files in a folder, which is vLLM's own way. It is one adapter by one id,
loaded in place: whoever is generating goes on with it, and what the old one has cached must be
dropped, because vLLM knows cached tokens by the adapter's name alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

NAME, ID = "student", 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInVllm:
    """What the engine has to know of it."""

    rank: int
    """The largest of its layers."""

    def engine_args(self) -> Mapping[str, Any]:
        """Of an engine that takes it, and no other."""
        return {"enable_lora": True, "max_loras": 1, "max_lora_rank": _at_least(self.rank)}


def request(folder: str, *, replaced: bool) -> LoRARequest:
    """Names it to vLLM; where it is to be read anew, it is `replaced`."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=NAME, lora_int_id=ID, lora_path=folder, load_inplace=replaced)


def why_no_adapter(architectures: Collection[str], rank: int) -> str | None:
    """Why vLLM cannot have an adapter beside a base of these classes; None where it can.

    None too for a class that vLLM has no code of its own for: it runs those by transformers'.
    """
    try:
        from vllm.model_executor.models import ModelRegistry, supports_lora
    except ImportError:  # which its start says better
        return None
    if _at_least(rank) is None:
        return f"vLLM takes adapters up to rank {max(_ranks())}, and this one has {rank}"
    for name in architectures:
        known = ModelRegistry.models.get(name)
        if known is not None and not supports_lora(known.load_model_cls()):
            return f"vLLM's {name} takes no adapters"
    return None


def _ranks() -> tuple[int, ...]:
    from vllm.config.lora import MaxLoRARanks

    return get_args(MaxLoRARanks)


def _at_least(rank: int) -> int | None:
    """The smallest that vLLM has room for and that is enough."""
    return min((known for known in _ranks() if known >= rank), default=None)
