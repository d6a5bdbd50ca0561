"""What every formula asks of the tensors it is given; each check raises ValueError by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def check_mask(mask_BT: Tensor, **others_BT: Tensor) -> None:
    """Raise ValueError unless the mask is bool [B, T] and the others have its shape."""
    if mask_BT.dtype != torch.bool or mask_BT.ndim != 2:
        raise ValueError(
            f"mask_BT must be bool with 2 axes, got {mask_BT.dtype} {tuple(mask_BT.shape)}"
        )
    for name, tensor in others_BT.items():
        if tensor.shape != mask_BT.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, mask_BT has shape {tuple(mask_BT.shape)}"
            )


def check_log_probs(
    ndim: int, *, student: Mapping[str, Tensor], fixed: Mapping[str, Tensor]
) -> None:
    """Raise ValueError unless all share one shape of `ndim` axes and `fixed` carries no gradient.

    Half precision is refused: rounding a log-prob of -10 to bfloat16 moves it by up to 0.03 nats.
    """
    reference, *_ = {**student, **fixed}.items()
    for name, tensor in {**student, **fixed}.items():
        if tensor.ndim != ndim:
            raise ValueError(f"{name} must have {ndim} axes, got shape {tuple(tensor.shape)}")
        if tensor.shape != reference[1].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, "
                f"{reference[0]} has shape {tuple(reference[1].shape)}"
            )
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} must be float32 or float64, got {tensor.dtype}")
        if ndim == 3 and tensor.shape[-1] == 0:
            raise ValueError(f"{name} has an empty support, shape {tuple(tensor.shape)}")
    for name, tensor in fixed.items():
        if tensor.requires_grad:
            raise ValueError(f"{name} must not carry gradient; detach it")


def check_included(included_BTN: Tensor | None, candidates_BTN: Tensor) -> None:
    """Raise ValueError unless the mask, where given, is bool and of the candidates' shape."""
    if included_BTN is None:
        return
    if included_BTN.dtype != torch.bool or included_BTN.shape != candidates_BTN.shape:
        raise ValueError(
            f"included_BTN must be bool of shape {tuple(candidates_BTN.shape)}, "
            f"got {included_BTN.dtype} {tuple(included_BTN.shape)}"
        )
