"""A student spread over the processes of torch.distributed, by FSDP2 (`fully_shard`).

Each process holds a part of every weight, gradient and running mean; a layer's whole weights are
there while it computes. Gradients are summed, not averaged: the loss has its denominators over all
processes already. What is read of a weight outside of a forward pass is read whole here, by all
processes at once, in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from student_trainer.process.stopping import Stopped, StopRequest
from student_trainer.records import Rollout

FORWARD = "response_logprobs"
"""The method of a sharded model by which its hooks see the learner's own forward pass."""


def is_distributed() -> bool:
    """Whether this process is one of several that train one student."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_spread(model: nn.Module) -> bool:
    """Whether each process has a part of it."""
    return isinstance(model, FSDPModule)


def shard(model: PreTrainedModel, forward: Callable[..., tuple[Tensor, ...]]) -> None:
    """In place; unchanged for a process alone. `forward(model, ...)` is what the learner calls
    instead of the model.

    Layer by layer as the family says what must stay together (`_no_split_modules`).
    """
    if not is_distributed():
        return
    kind = next(model.parameters()).device.type
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    together = {*(getattr(model, "_no_split_modules", None) or ())}
    for module in [m for m in model.modules() if type(m).__name__ in together]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    setattr(model, FORWARD, MethodType(forward, model))
    register_fsdp_forward_method(model, FORWARD)


def through_hooks(
    model: PreTrainedModel, forward: Callable[..., tuple[Tensor, ...]]
) -> Callable[..., tuple[Tensor, ...]]:
    """`forward(model, ...)` as it is to be called: by the sharded model's own method."""
    if not is_spread(model):
        return MethodType(forward, model)

    def called(*inputs: Any, **options: Any) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = getattr(model, FORWARD)(*inputs, **options)
        if not torch.is_grad_enabled():
            give_back_the_ends(model)
        return found

    return called


def give_back_the_ends(model: nn.Module) -> None:
    """After a forward pass that no backward pass follows: until then embedding and head are whole
    in every process, and what is read or written of them is not what the student is."""
    if isinstance(model, FSDPModule):
        model.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process has a part; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process has of it, the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor as another of its shape is spread."""
    if not isinstance(pattern, DTensor) or tensor.shape != pattern.shape:
        return tensor
    return distribute_tensor(
        tensor.to(pattern.device), pattern.device_mesh, pattern.placements, src_data_rank=None
    )


def own_share(rollouts: Sequence[Rollout]) -> Sequence[Rollout]:
    """Those of an update that this process learns from: of every length as many as the others.

    One that would have none gets one in which no token counts: all take part in every pass.
    """
    if not is_distributed():
        return rollouts
    by_length = sorted(rollouts, key=lambda r: len(r.prompt.token_ids) + len(r), reverse=True)
    rank, world = dist.get_rank(), dist.get_world_size()
    # There and back, so that no process has the longer one every time.
    own = (rank, 2 * world - 1 - rank)
    share = [r for i, r in enumerate(by_length) if i % (2 * world) in own]
    shortest = by_length[-1]
    return share or [replace(shortest, mask=np.zeros_like(shortest.mask))]


def most(count: int, device: torch.device) -> int:
    """The largest of the numbers that the processes give."""
    if not is_distributed():
        return count
    found = torch.tensor(count, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def stop_together(stop: StopRequest) -> None:
    """Where one of the processes was asked to stop all are, and raise Stopped, at the same place:
    each calls this there. Nothing for a process alone."""
    # Over the CPU's backend: asked on a GPU, all that is under way there would be waited for.
    if is_distributed() and most(int(stop.requested), torch.device("cpu")):
        stop.requested = True
        raise Stopped
