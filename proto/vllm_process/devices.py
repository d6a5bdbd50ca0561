"""Which GPUs an engine has, and whether it can be spread over several devices: they are there, and
the model can be cut.

Sizes come with the name of their setting, by which the errors call them. "text" is the
configuration of a model's text part, as transformers reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

GPUS_PATTERN = r"auto|\d+(,\d+)*"
PADDED_VOCABULARY = 64
"""vLLM 0.32 pads a vocabulary to a multiple of this before it cuts it."""


class DevicesError(ValueError):
    """An engine that cannot be spread so; the message names setting, value, limit and remedy."""


def check_gpus(sizes: Mapping[str, int], num_gpus: int) -> None:
    """Raises DevicesError for more GPUs than this process sees: each size takes that many times
    what the others take."""
    if (needed := prod(sizes.values())) <= num_gpus:
        return
    asked = " times ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    raise DevicesError(
        f"{asked} takes {needed} GPUs, and this process sees {num_gpus}: ask for at most "
        f"{num_gpus}, or show it more (CUDA_VISIBLE_DEVICES)"
    )


def gpus_of(
    named: tuple[str, str],
    sized: tuple[str, int],
    *,
    own: int,
    place: tuple[int, int],
    num_gpus: int,
) -> tuple[int, ...]:
    """The GPUs of the engine of one process, by their numbers among those that it sees.

    `named` and `sized` are names of settings with what they are: "auto" or numbers for the engines
    of all processes of this host, and how many an engine takes. `own` is the GPU of the process,
    `place` which one it is of how many on its host. "auto" is the process's own GPU; of an engine
    that takes several the first that one process alone sees. Raises DevicesError.
    """
    (name, given), (size_name, size), (number, num_processes) = named, sized, place
    if given == "auto":
        if size == 1:
            return (own,)
        check_gpus({size_name: size}, num_gpus)
        if num_processes > 1:
            raise DevicesError(
                f"{size_name} is {size}, and {num_processes} processes of this host have a GPU "
                f"each: name the {size * num_processes} GPUs of their engines, {name}"
            )
        return tuple(range(size))
    gpus = tuple(map(int, given.split(",")))
    if len(set(gpus)) < len(gpus) or max(gpus) >= num_gpus:
        raise DevicesError(
            f"{name} is {given!r}: each must be there once, and be less than {num_gpus}, which is "
            "how many GPUs this process sees"
        )
    if len(gpus) != size * num_processes:
        raise DevicesError(
            f"{name} is {given!r}, and the engines of this host take {size * num_processes} GPUs "
            f"({num_processes} times {size_name} {size}): name as many"
        )
    return gpus[number * size : (number + 1) * size]


def check_tensor_parallel(name: str, size: int, text: Any) -> None:
    """Raises DevicesError for a model that cannot be cut into so many parts of every layer."""
    if (why := next(_why_not(size, text), None)) is None:
        return
    possible = [n for n in range(1, _num_heads(text) + 1) if not any(_why_not(n, text))]
    raise DevicesError(
        f"{name} is {size}, and the model has {why}: it can be {', '.join(map(str, possible))}"
    )


def check_pipeline_parallel(name: str, size: int, text: Any) -> None:
    """Raises DevicesError for a model with fewer layers than stages."""
    if size > (layers := text.num_hidden_layers):
        raise DevicesError(
            f"{name} is {size}, and the model has {layers} layers: it can be at most {layers}"
        )


def check_data_parallel(name: str, size: int, text: Any) -> None:
    """Raises DevicesError for copies of a mixture of experts: vLLM 0.32 does not keep those apart,
    but divides the experts among them and has all copies step together."""
    if size > 1 and _num_experts(text):
        raise DevicesError(
            f"{name} is {size}, and the model has {_num_experts(text)} experts, which vLLM would "
            "divide among its copies: 1, and a server for each copy"
        )


def _num_experts(text: Any) -> int:
    return _first(text, "num_experts", "num_local_experts")


def _num_heads(text: Any) -> int:
    return int(text.num_attention_heads)


def _why_not(size: int, text: Any) -> Iterator[str]:
    """What of a model vLLM 0.32 does not cut into `size` parts; nothing of one that it cuts."""
    if _num_heads(text) % size:
        yield f"{_num_heads(text)} attention heads, which do not divide by it"
    heads = getattr(text, "num_key_value_heads", None) or _num_heads(text)
    # Fewer heads than parts are held several times.
    if heads % size and size % heads:
        yield f"{heads} key/value heads, which neither divide by it nor divide it"
    experts = _num_experts(text)
    width_name = "moe_intermediate_size" if experts else "intermediate_size"
    width = _first(text, width_name, "intermediate_size")
    if width % size:
        yield f"{width_name} {width}, which does not divide by it"
    if experts and experts < size:
        yield f"{experts} experts, which are fewer"
    padded = -(-text.vocab_size // PADDED_VOCABULARY) * PADDED_VOCABULARY
    if padded % size:
        yield (
            f"{text.vocab_size} vocabulary entries, {padded} with vLLM's padding, which do not "
            "divide by it"
        )


def _first(text: Any, *names: str) -> int:
    """The first of these that the model has; 0 where it has none."""
    return next((value for name in names if (value := getattr(text, name, None))), 0)
