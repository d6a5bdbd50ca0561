"""vLLM's own weight transfer without a GPU: all of its code on both sides, but for what only a GPU
has. In the places of that: a file for the memory that CUDA IPC shares, a store of torch for NCCL's
communicator, nothing for streams.

The worker imports this module, because its extension is here, and so has the backend and the
replacements.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from student_trainer.rollouts.samplers.vllm_reload import ReloadsWeights
from student_trainer.rollouts.samplers.vllm_transfer import VllmTransfer

if TYPE_CHECKING:
    import pytest

BACKEND = "either, on a CPU"
UUID = "GPU-of-a-CPU"


class OnACpu(ReloadsWeights):
    """The extension of a worker that takes weights by either way."""


EXTENSION = f"{OnACpu.__module__}.{OnACpu.__qualname__}"


class CpuTransfer(VllmTransfer):
    """Starts an engine that takes weights by either way."""

    def engine_args(self) -> Mapping[str, Any]:
        from vllm.config.weight_transfer import WeightTransferConfig

        return {"weight_transfer_config": WeightTransferConfig(backend=BACKEND)}


@contextmanager
def no_gpu(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    """This process sends without one; what it shares is in a folder."""
    with monkeypatch.context() as patch:
        for target, name, value in replacements(folder):
            patch.setattr(target, name, value)
        yield


def replacements(folder: Path | None = None) -> Iterator[tuple[Any, str, Any]]:
    """Of what only a GPU has, in vLLM's modules and torch."""
    from torch.multiprocessing import reductions
    from vllm.distributed.weight_transfer import ipc_engine, nccl_engine, packed_tensor

    yield torch.accelerator, "synchronize", lambda *device: None
    yield torch.accelerator, "current_device_index", lambda: 0
    cuda = SimpleNamespace(
        current_stream=_Stream,
        stream=torch.cuda.stream,
        get_device_properties=lambda index: SimpleNamespace(uuid=UUID),
        ipc_collect=lambda: None,
        is_available=lambda: False,
    )
    yield packed_tensor, "torch", _Torch(cuda, partial(_shared, folder))
    yield packed_tensor, "reduce_tensor", lambda shared: (None, shared.handle)
    yield packed_tensor, "_get_streams", lambda index, number: (_Stream(),) * number
    yield ipc_engine, "torch", _Torch(cuda, torch.empty)
    yield reductions, "rebuild_cuda_tensor", lambda path, size, *_: _mapped(path, size)
    yield nccl_engine, "open_trainer_endpoint", lambda info: _Group(info, rank=0)
    yield nccl_engine, "worker_init_process_group", lambda info, _: _Group(info, info.rank_offset)


class _Stream:
    def synchronize(self) -> None:
        """All is done."""


class _Torch:
    """torch, but for the names that are given."""

    def __init__(self, cuda: Any, empty: Callable[..., torch.Tensor]) -> None:
        self.cuda, self.empty = cuda, empty

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _Shared(torch.Tensor):
    """Memory with a handle by which another process finds it: as many values as CUDA's has, of
    which vLLM sets the seventh."""

    handle: tuple[Any, ...]


def _shared(folder: Path | None, size: Any, *, dtype: torch.dtype, device: Any) -> torch.Tensor:
    if str(device) != "cuda":
        return torch.empty(size, dtype=dtype, device=device)
    number, path = tempfile.mkstemp(dir=folder)
    os.ftruncate(number, size)
    os.close(number)
    memory = _mapped(path, size).as_subclass(_Shared)
    # A class of torch is among CUDA's values, which no plain message carries.
    memory.handle = (path, size, torch.Tensor, None, None, None, 0)
    return memory


def _mapped(path: str, size: int) -> torch.Tensor:
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)


class _Group:
    """In place of PyNcclCommunicator, over vLLM's own way to meet."""

    disabled = False

    def __init__(self, info: Any, rank: int) -> None:
        from vllm.distributed.utils import StatelessProcessGroup

        self._group = StatelessProcessGroup.create(
            host=info.master_address, port=info.master_port, rank=rank, world_size=info.world_size
        )

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        received = self._group.broadcast(tensor, src)
        if received is not tensor:
            tensor.copy_(received)

    def destroy(self) -> None:
        """Its sockets go with it."""


def _register() -> None:
    """In a worker, before it makes its engine of weight transfer."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    class Either(WeightTransferEngine[Any, Any]):
        """vLLM's own two, of which the sender chooses by what it begins with."""

        def __init__(self, *of: Any) -> None:
            super().__init__(*of)
            self._ipc = IPCWeightTransferEngine(*of)
            self._nccl = NCCLWeightTransferEngine(*of)
            self._chosen: WeightTransferEngine[Any, Any] = self._ipc

        def parse_init_info(self, init_dict: dict[str, Any]) -> Any:
            self._chosen = self._nccl if "master_address" in init_dict else self._ipc
            return self._chosen.parse_init_info(init_dict)

        def init_transfer_engine(self, init_info: Any) -> None:
            self._chosen.init_transfer_engine(init_info)

        def start_weight_update(self) -> None:
            self._chosen.start_weight_update()

        def update_weights(self, update_info: dict[str, Any]) -> None:
            self._chosen.update_weights(update_info)

        def receive_weights(self, update_info: Any) -> None:
            raise NotImplementedError

        def finish_weight_update(self) -> None:
            self._chosen.finish_weight_update()

        def shutdown(self) -> None:
            self._chosen.shutdown()

    WeightTransferEngineFactory.register_engine(BACKEND, Either)
    for target, name, value in replacements():
        setattr(target, name, value)


if multiprocessing.parent_process() is not None:
    _register()
