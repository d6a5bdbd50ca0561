"""The processes that train one student together, as torchrun starts them: who this one is, and what
all of them agree on.

Alone a process agrees with itself, and PyTorch's distributed package is not even imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from student_trainer.errors import ConfigError, ProcessLostError, TrainerError, one_line

T = TypeVar("T")
LOST = re.compile(r"closed by peer|Connection (reset|refused)|gloo|NCCL", re.IGNORECASE)
"""In what PyTorch's backends say when another process is gone."""
RENDEZVOUS_S = 120.0
"""How long processes that started wait for those that have not."""
OPERATION_S = 7200.0
"""How long one waits for what another computes, an evaluation say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """One of several processes; each calls what follows, in the same order."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Among those of this host."""

    @property
    def is_first(self) -> bool:
        """The one that writes, and that says what all do."""
        return self.rank == 0

    def gathered(self, own: T) -> list[T]:
        """What every process has, by rank."""
        if self.world == 1:
            return [own]
        import torch.distributed as dist

        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, own)
        return found

    def agreed(self, decide: Callable[[], T]) -> T:
        """What the first process decides; the others do not ask. What it raises ends them all."""
        if self.world == 1:
            return decide()
        failed, found = None, None
        if self.is_first:
            try:
                found = decide()
            except TrainerError as error:
                failed = error
        decided, refused = self.gathered((found, None if failed is None else str(failed)))[0]
        if failed is not None:
            raise failed
        if refused is not None:
            raise ConfigError(f"process 0 has refused: {refused}")
        return decided  # type: ignore[return-value]

    def any(self, own: bool) -> bool:
        """Whether it is so in one of them."""
        return any(self.gathered(own))

    def check_same(self, settings: Mapping[str, str]) -> None:
        """Raises ConfigError naming the settings in which a process differs from the first."""
        first, *rest = self.gathered(dict(settings))
        for rank, others in enumerate(rest, 1):
            different = sorted(n for n in {*first, *others} if first.get(n) != others.get(n))
            if different:
                name = different[0]
                raise ConfigError(
                    f"process {rank} has other settings than process 0: {name} is "
                    f"{others.get(name)}, and {first.get(name)} in process 0: start all with one "
                    "configuration"
                )


ALONE = Ranks()


def place_on_host() -> tuple[int, int]:
    """Which of the processes of this host this one is, from 0, and how many they are."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def joined() -> Iterator[Ranks]:
    """Who this process is by the environment that torchrun makes, once all are there.

    Raises ConfigError for an environment that is not whole, or when one does not come.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} and {', '.join(missing)} not set: start "
            "with torchrun, or without WORLD_SIZE"
        )
    import torch
    import torch.distributed as dist

    ranks = Ranks(
        rank=int(os.environ["RANK"]),
        world=int(os.environ["WORLD_SIZE"]),
        local_rank=place_on_host()[0],
    )
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank)
    try:
        _meet(ranks)
        yield ranks
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, TrainerError) or not LOST.search(str(error)):
            raise
        raise ProcessLostError(
            f"a process that trains with this one has ended: {one_line(error)}; what it says of "
            "itself is the cause, and `train --resume` goes on from the last checkpoint"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _meet(ranks: Ranks) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    wait = timedelta(seconds=RENDEZVOUS_S)
    try:
        store, _, _ = next(iter(rendezvous("env://", timeout=wait)))
        store.set(f"driftline/{ranks.rank}", "here")
        store.wait([f"driftline/{rank}" for rank in range(ranks.world)], wait)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=store,
            rank=ranks.rank,
            world_size=ranks.world,
            timeout=timedelta(seconds=OPERATION_S),
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConfigError(
            f"process {ranks.rank} of {ranks.world} has not met the others at {where} within "
            f"{RENDEZVOUS_S:.0f} s: {error}; all must be started with one address and WORLD_SIZE"
        ) from error
