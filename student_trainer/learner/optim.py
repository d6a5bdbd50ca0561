"""One optimiser step: scale the summed gradients, check them, clip, step, follow the schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from student_trainer.errors import ConfigError, NonFiniteLossError
from student_trainer.learner.sharding import spread_like, whole

OptimizerKind = Literal["adamw", "adamw_8bit"]
STATE_BYTES: dict[OptimizerKind, float] = {"adamw": 8.0, "adamw_8bit": 2 + 2 * 4 / 256}
"""Of the two running means, a parameter: float32, or a byte and a scale for 256."""


class Optimizer:
    """AdamW with warm-up and a cosine to the final learning rate over `total_updates`.

    Weights and gradients are float32, whatever the arithmetic; so are its two running means, or a
    byte each with `adamw_8bit`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        learning_rate: float,
        final_learning_rate: float,
        warmup_updates: int,
        total_updates: int,
        betas: tuple[float, float],
        weight_decay: float,
        max_grad_norm: float,
        kind: OptimizerKind = "adamw",
    ) -> None:
        """Raises ConfigError for a kind whose library is not installed."""
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._kind = kind
        made = _adamw_8bit if kind == "adamw_8bit" else _adamw
        self._adamw = made(self._parameters, learning_rate, betas, weight_decay)
        self._max_grad_norm = max_grad_norm
        self._learning_rate, self._final_learning_rate = learning_rate, final_learning_rate
        self._warmup_updates, self._total_updates = warmup_updates, total_updates
        self._num_updates = 0

    @property
    def learning_rate(self) -> float:
        """Of the coming update."""
        update, warmup = self._num_updates, self._warmup_updates
        if update < warmup:
            return self._learning_rate * ((update + 1) / warmup)
        done = (update - warmup) / max(1, self._total_updates - warmup)
        floor = self._final_learning_rate / self._learning_rate
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self._learning_rate * (floor + (1 - floor) * cosine)

    @property
    def bytes_per_parameter(self) -> float:
        """Of its state."""
        return STATE_BYTES[self._kind]

    def step(self, scale: float) -> float:
        """Applies the accumulated gradients times `scale`; returns their norm before clipping.

        Of a student that is spread over processes, each has its part of every gradient, summed over
        all sequences, and `scale` is of the sums over all.

        Raises NonFiniteLossError, with the weights untouched, when the norm is not finite.
        """
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = float(whole(torch.nn.utils.get_total_norm(gradients))) * scale
        if not math.isfinite(norm):
            self._adamw.zero_grad(set_to_none=True)
            raise NonFiniteLossError(
                f"the gradient norm is {norm}; the weights are left as they were"
            )
        # Scaled and clipped in one pass over gradients that no cache holds.
        clipped = scale * min(1.0, self._max_grad_norm / (norm + 1e-6))
        if gradients:
            torch._foreach_mul_(gradients, clipped)
        for group in self._adamw.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.learning_rate)
            else:
                group["lr"] = self.learning_rate
        self._adamw.step()
        self._num_updates += 1
        self._adamw.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict[str, Any]:
        """What a resumed run needs: the moments, and how many updates there were. Whole, on however
        many processes the student is; all of them ask at once."""
        moments = {
            number: {name: whole(v) if isinstance(v, Tensor) else v for name, v in moment.items()}
            for number, moment in self._adamw.state_dict()["state"].items()
        }
        return {"kind": self._kind, "moments": moments, "updates": self._num_updates}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from there with the settings of this optimiser, should they have changed.

        Raises ValueError for the moments of another kind.
        """
        if (kind := state.get("kind", "adamw")) != self._kind:
            raise ValueError(f"optim.kind was {kind!r} and is {self._kind!r}")
        groups = self._adamw.state_dict()["param_groups"]
        moments = {
            number: {
                name: spread_like(v, self._parameters[number]) if isinstance(v, Tensor) else v
                for name, v in moment.items()
            }
            for number, moment in state["moments"].items()
        }
        self._adamw.load_state_dict({"state": moments, "param_groups": groups})
        self._num_updates = state["updates"]


def _adamw(
    parameters: list[torch.nn.Parameter],
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    # Fused where there is a kernel: on two cores a ninth of the time, and no temporary tensors.
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    return torch.optim.AdamW(
        parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=fused
    )


def _adamw_8bit(
    parameters: list[torch.nn.Parameter],
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    if find_spec("torchao") is None:
        raise ConfigError(
            "optim.kind is 'adamw_8bit', which needs torchao: pip install 'driftline[eightbit]'"
        )
    from torchao.optim import AdamW8bit

    made: torch.optim.Optimizer = AdamW8bit(
        parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay
    )
    return made
