"""Settings of a low-rank adapter (LoRA): trained in place of the student's own weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from student_trainer.settings.section import MayChange, Section

OF_A_NEW_ONE = ("rank", "alpha", "targets", "rslora")
"""Settings that an adapter which is there already brings along."""


class LoraSettings(Section):
    """LoRA (arXiv 2106.09685) by peft: W + alpha / rank * B A, the student's own W frozen."""

    rank: int = Field(16, gt=0)
    """Columns of B and rows of A."""
    alpha: float = Field(32, gt=0)
    """Of the factor alpha / rank."""
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Linear layers that are adapted, by the ends of their names, such as "q_proj"; "all-linear" is
    every one but the head."""
    rslora: bool = False
    """The factor is alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732)."""
    adapter: Path | None = None
    """Folder of an adapter in peft's format to go on from; rank, alpha, targets and rslora are
    its own then."""
    base_name: str | None = None
    """What that adapter calls its base, where it is the student under another name."""
    sync: Annotated[Literal["auto", "adapter", "merged"], MayChange()] = "auto"
    """How it comes to the sampler: "adapter" alone, beside the frozen base (vLLM), or "merged" into
    a copy of the weights; "auto" is adapter where vLLM takes it, but for float32: on a CPU vLLM
    generates much slower with one, and on a GPU only in 16 bits."""

    @model_validator(mode="after")
    def _reads_what_is_given(self) -> Self:
        given = [name for name in OF_A_NEW_ONE if name in self.model_fields_set]
        if self.adapter is not None and given:
            raise ValueError(
                f"{', '.join(given)} and adapter: an adapter that is there has its own; "
                "leave one of them out"
            )
        if self.adapter is None and self.base_name is not None:
            raise ValueError(
                "base_name without adapter: it is what an adapter that is there calls its base"
            )
        return self
