"""What vLLM's worker has to do besides, when weights are replaced. Runs in vLLM's process."""

from __future__ import annotations

from typing import Any


class WeightReload:
    """Mixed into vLLM's worker, by its name."""

    def reload_with_tied_heads(self: Any, weights_path: str) -> None:
        """Loads a folder of weights in which a head that is the embedding stands once.

        Such a head shares the embedding's tensor, which is overwritten in place. On a CPU vLLM 0.32
        multiplies by a packed copy of it, and renews that only for a layer that the file names.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            ParallelLMHead,
            UnquantizedEmbeddingMethod,
        )

        self.reload_weights(weights_path=weights_path)
        for layer in self.get_model().modules():
            method = getattr(layer, "quant_method", None)
            if isinstance(layer, ParallelLMHead) and isinstance(method, UnquantizedEmbeddingMethod):
                method.process_weights_after_loading(layer)
