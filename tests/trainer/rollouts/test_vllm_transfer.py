"""What of a transfer of weights by vLLM may go wrong, and how it is told. What goes well:
test_samplers.py, with a real engine.

Run: python -m pytest tests/trainer/rollouts/test_vllm_transfer.py
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from student_trainer.errors import WeightSyncError
from student_trainer.records import Announced, WrittenTensor
from student_trainer.rollouts.samplers import vllm_transfer
from student_trainer.rollouts.samplers.vllm_transfer import VllmTransfer

NORM = WrittenTensor("norm.weight", "float32", (4,), 16)


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of imports for a base class."""
    monkeypatch.setattr(vllm_transfer._Source, "as_vllm", vllm_transfer._Source.tensors)


CPU = torch.device("cpu")


class Engine:
    """Of which every answer is one that a test chooses."""

    def __init__(self, update: Callable[[], Awaitable[None]]) -> None:
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(world_size=1))
        self._update = update

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        if method == "update_by_handles":
            await self._update()
        return [[[], ""]]


class Sender:
    """vLLM's on this side: asks the engine from another thread, as NCCL's does, then reads."""

    client: Any
    source: Any

    def __init__(self, *, waits: bool = False, disabled: bool = False) -> None:
        self.model_update_group = SimpleNamespace(disabled=disabled)
        self._waits = waits
        self.ended = threading.Event()

    def send_weights(self) -> None:
        asked = threading.Thread(target=self._ask)
        asked.start()
        try:
            list(self.source)
            if self._waits:
                threading.Event().wait(30)
            asked.join()
        finally:
            self.ended.set()

    def _ask(self) -> None:
        try:
            self.client.update_weights({"ipc_handles": {}})
        except BaseException:  # noqa: BLE001 - vLLM's reads it from its future, too late
            return


async def answered(asked: Awaitable[Any]) -> Any:
    return await asked


async def done() -> None:
    """As an engine that has taken them."""


async def refused() -> None:
    raise ValueError("no module or parameter named 'other'")


async def never() -> None:
    await asyncio.Event().wait()


def norm() -> Announced:
    return Announced(iter([(NORM.name, torch.ones(4))]), [NORM])


def transfer_by(sender: Sender) -> VllmTransfer:
    made = VllmTransfer(backend="nccl", device=CPU)
    made._sender = sender  # type: ignore[assignment]
    return made


async def sent(made: VllmTransfer, update: Callable[[], Awaitable[None]], weights: Any) -> Any:
    return await made.send(Engine(update), weights, answered)  # type: ignore[arg-type]


async def test_what_every_worker_kept_is_told() -> None:
    made = transfer_by(Sender())
    assert await sent(made, done, norm()) == [[]]
    assert await sent(made, done, norm()) == [[]]


async def test_an_engine_that_refuses_leaves_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM's helper would broadcast on to a worker that does not come. What it does then is not
    waited for, and another transfer is refused."""
    monkeypatch.setattr(vllm_transfer, "GRACE_S", 0.2)
    made = transfer_by(Sender(waits=True))
    with pytest.raises(WeightSyncError, match=r"\"nccl\": no module .* 'other'; \"host\" needs"):
        await sent(made, refused, norm())
    assert made.is_broken
    with pytest.raises(WeightSyncError, match="has broken off before"):
        await sent(made, done, norm())


async def test_what_the_learner_raises_is_raised_as_it_is() -> None:
    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        yield NORM.name, torch.ones(4)
        raise MemoryError("of the learner")

    made = transfer_by(Sender())
    with pytest.raises(MemoryError, match="of the learner"):
        await sent(made, never, Announced(failing(), [NORM]))
    assert made.is_broken


async def test_one_that_is_given_up_ends_with_its_thread() -> None:
    sender, asked = Sender(), asyncio.Event()
    made = transfer_by(sender)

    async def asks() -> None:
        asked.set()
        await never()

    sending = asyncio.ensure_future(sent(made, asks, norm()))
    await asked.wait()
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert sender.ended.is_set()
    assert made.is_broken


async def test_without_nccl_nothing_is_sent() -> None:
    """Where its library is not found vLLM's communicator passes over what it is asked."""
    sender = Sender(disabled=True)
    with pytest.raises(WeightSyncError, match=r"has no NCCL here: \"host\", or .*VLLM_NCCL_SO"):
        await sent(transfer_by(sender), done, norm())
    assert not sender.ended.is_set()


async def test_weights_of_which_nothing_is_known_are_refused() -> None:
    with pytest.raises(TypeError, match="which weights will come"):
        await sent(transfer_by(Sender()), done, iter([(NORM.name, torch.ones(4))]))
