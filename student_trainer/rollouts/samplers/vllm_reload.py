"""What vLLM's workers do when weights are reloaded: the part of the sampler that runs inside them.

vLLM mixes the class into its worker (`worker_extension_cls`), so that its methods can be called
there. It imports nothing of vLLM before it runs.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any, TypeAlias

from student_trainer.errors import one_line
from student_trainer.rollouts.samplers.vllm_adapter import request
from student_trainer.rollouts.weight_buffer import SENDER_GONE, received

log = logging.getLogger(__name__)
Answer: TypeAlias = tuple[list[str], str]
"""Of one worker: names of what it kept as it was, and what went wrong, empty for nothing. An error
that is raised leaves the answers of the other workers behind, for whoever asks next."""


class ReloadsWeights:
    """Mixed into a worker of vLLM, of which it uses `get_model`, `reload_weights` and `add_lora`.
    Each of several workers reads all weights, and keeps its part."""

    def reload_every_weight(self: Any, where: str) -> Answer:
        """Reloads from a folder, or from the address of a buffer; a head that is the embedding
        comes once. Kept are parameters that did not come.

        vLLM only writes a warning to its log of those.
        """
        return _answer(lambda: _reload(self, where))

    def expect_weights(self: Any) -> Answer:
        """Notes what of the model comes from here on, by vLLM's own weight transfer."""

        def expect() -> list[str]:
            self.expected_weights = _Expected(self.get_model())
            return []

        return _answer(expect)

    def update_by_handles(self: Any, pickled: bytes) -> Answer:
        """vLLM's `update_weights` with handles of CUDA IPC, from the process that started it."""

        def update() -> list[str]:
            self.update_weights(pickle.loads(pickled))
            return []

        return _answer(update)

    def kept_weights(self: Any) -> Answer:
        """Kept are parameters that did not come since `expect_weights`."""
        return _answer(lambda: self.expected_weights.kept())

    def take_adapter(self: Any, folder: str) -> Answer:
        """Puts the adapter in a folder in the place of the one before."""

        def take() -> list[str]:
            self.add_lora(request(folder, replaced=True))
            return []

        return _answer(take)


def _answer(act: Callable[[], list[str]]) -> Answer:
    try:
        return act(), ""
    # Whatever the model's code makes of them.
    except Exception as error:
        log.exception("nothing was taken")
        return [], one_line(error) or type(error).__name__


def _reload(worker: Any, where: str) -> list[str]:
    """The names of parameters that did not come."""
    expected = _Expected(worker.get_model())
    try:
        with _given(where) as given:
            worker.reload_weights(**given)
    except BaseException:
        expected.forget()
        raise
    return expected.kept()


class _Expected:
    """Weights of a model that are to be replaced, all of them."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._names = {name for name, _ in model.named_parameters()}
        self._loaded: set[str] = set()
        self._load_weights = model.load_weights
        _pack_experts_again(model)
        model.load_weights = self._recorded

    def _recorded(self, weights: Iterable[tuple[str, Any]]) -> set[str] | None:
        found: set[str] | None = self._load_weights(weights)
        # A family that does not say what it loaded is believed, as vLLM does.
        self._loaded.update(self._names if found is None else found)
        return found

    def kept(self) -> list[str]:
        """The names of those that did not come. Nothing is expected any more."""
        self.forget()
        _pack_heads_again(self._model)
        return sorted(self._names - self._loaded)

    def forget(self) -> None:
        """Nothing is expected any more."""
        del self._model.load_weights


def cause(answers: Iterable[Answer]) -> str | None:
    """What went wrong first; None where nothing did. Where one worker fails the sender stops, which
    the others then complain of."""
    errors = [error for _, error in answers if error]
    return min(errors, key=lambda error: SENDER_GONE in error, default=None)


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
