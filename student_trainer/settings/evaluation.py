"""Settings of evaluations: what is asked of the student, and what makes an answer right."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from student_trainer.settings.section import MayChange, Section


def _as_tuple(value: Any) -> Any:
    """A single k is a list of one, and 0 an empty one."""
    return ([value] if value else []) if isinstance(value, int) else value


class EvalSettings(Section):
    """How the held-out problems are evaluated; without `data.heldout` nothing is."""

    every_steps: Annotated[int, MayChange()] = Field(10, gt=0)
    """Steps between evaluations; before the first and after the last step there is one too."""
    num_prompts: int = Field(128, gt=0)
    """Problems evaluated: the first so many."""
    max_tokens: int = Field(512, gt=0)
    """Tokens a response may have."""
    grader: Literal["auto", "exact", "math"] = "auto"
    r"""What makes an answer right: the same text or number (exact), or the same mathematics by
    math-verify (math). auto is math for answers in `\boxed{}`, exact where there is an
    answer_pattern."""
    answer_pattern: str | None = None
    r"""Regular expression; the last match's first group is the answer. Without one the answer is
    what the last `\boxed{}` holds, braces within it included."""
    unicode_normalize: bool = False
    """Compare after Unicode NFKC normalisation."""
    pass_k: Annotated[tuple[Annotated[int, Field(gt=0)], ...], BeforeValidator(_as_tuple)] = (4,)
    """Every k of pass@k, one or a list, in the first and the last evaluation; the largest is the
    number of samples a problem, and of avg@k. 0 for none."""
    temperature: float = Field(1.0, gt=0)
    """Of the samples for avg@k and pass@k; accuracy is greedy."""
    teacher_samples: int = Field(1, ge=0)
    """Responses a problem that the teacher scores for the held-out divergences, sampled at
    rollout.temperature; 0 for none."""
    texts: Annotated[int, MayChange()] = Field(256, ge=0)
    """Responses of an evaluation whose text is kept in the run's folder."""

    @field_validator("answer_pattern")
    @classmethod
    def _has_a_group(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        try:
            num_groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        if num_groups == 0:
            raise ValueError("the pattern needs a group: that is the answer")
        return pattern

    @property
    def num_samples(self) -> int:
        """Samples a problem."""
        return max(self.pass_k, default=0)

    @property
    def compares_mathematics(self) -> bool:
        """What auto comes to."""
        return self.grader == "math" or (self.grader == "auto" and self.answer_pattern is None)
