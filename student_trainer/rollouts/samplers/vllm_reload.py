"""What vLLM's workers do when weights are reloaded: the part of the sampler that runs inside them.

vLLM mixes the class into its worker (`worker_extension_cls`), so that its methods can be called
there. It imports nothing of vLLM before it runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from student_trainer.rollouts.weight_buffer import received


class ReloadsWeights:
    """Mixed into a worker of vLLM, of which it uses `get_model` and `reload_weights`."""

    def reload_every_weight(self: Any, where: str) -> list[str]:
        """Reloads from a folder, or from the address of a buffer; a head that is the embedding
        comes once. Returns the names of parameters that did not come.

        vLLM only writes a warning to its log of those.
        """
        model = self.get_model()
        expected = {name for name, _ in model.named_parameters()}
        loaded: set[str] = set()
        load_weights = model.load_weights

        def recorded(weights: Iterable[tuple[str, Any]]) -> set[str] | None:
            found: set[str] | None = load_weights(weights)
            # A family that does not say what it loaded is believed, as vLLM does.
            loaded.update(expected if found is None else found)
            return found

        _pack_experts_again(model)
        model.load_weights = recorded
        try:
            with _given(where) as given:
                self.reload_weights(**given)
        finally:
            del model.load_weights
        _pack_heads_again(model)
        return sorted(expected - loaded)


@contextmanager
def _given(where: str) -> Iterator[dict[str, Any]]:
    """What vLLM's `reload_weights` is called with."""
    if where.startswith("@"):
        with closing(received(where)) as weights:
            yield {"weights_iterator": weights}
    else:
        yield {"weights_path": where}


def _pack_heads_again(model: Any) -> None:
    """For a tied head, whose tensor is the embedding's and was overwritten in place: on a CPU vLLM
    0.32 multiplies by a packed copy of it, and renews that only for a layer that the file names."""
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        UnquantizedEmbeddingMethod,
    )

    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(layer, ParallelLMHead) and isinstance(method, UnquantizedEmbeddingMethod):
            method.process_weights_after_loading(layer)


def _pack_experts_again(model: Any) -> None:
    """Makes vLLM 0.32 lay out a mixture's experts for its kernel on a CPU when it reloads them.

    It does so only for a layer without a kernel, which after the first load each has: later weights
    would be read in a layout that they are not in, without an error.
    """
    if next(model.parameters()).device.type != "cpu":
        return
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None
