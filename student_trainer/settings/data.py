"""Settings of the data: where the problems are, and how a row becomes a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, JsonValue

from student_trainer.settings.section import ReadBy, Section


class DataSettings(Section):
    """The problems: docs/data.md says what a row may hold and where those of the configurations are
    from."""

    train: Path
    """A file (JSON lines, a JSON list, Parquet; .gz), a folder of such files or one that
    save_to_disk wrote, or the name of a data set."""
    heldout: Path | None = None
    """The same, of the problems that are evaluated, all with answers or all without; none: nothing
    is evaluated."""
    subset: str | None = None
    """Of a data set by name, where it has several."""
    train_split: str = "train"
    """Split that `train` is read from, where it has several."""
    heldout_split: str = "test"
    """Split that `heldout` is read from, where it has several."""
    prompt_field: str | None = None
    """Field that holds the problem; none: the one of prompt, messages and prompt_ids that is there.
    A dot leads into an object."""
    answer_field: str = "answer"
    """Field that holds what the graded part of a response must equal. A dot leads into an object,
    as in reward_model.ground_truth."""
    system: str | None = Field(None, min_length=1)
    """System message of conversations that have none."""
    chat_template: Path | None = None
    """Jinja file, or folder of a checkpoint, whose chat template is used; none: the student's."""
    teacher_chat_template: Path | None = None
    """The same for the teacher's side of every conversation; none: it is given what the student
    is."""
    chat_template_kwargs: dict[str, JsonValue] = Field({})
    """Switches of the chat template, such as enable_thinking; a row may have its own."""
    add_bos: bool | None = None
    """Put the token of beginning (BOS) before a problem that is plain text; none: as the tokenizer
    does by itself. Chat templates write their own."""
    final_assistant: Literal["refuse", "reference"] = "refuse"
    """A conversation that ends with the assistant: an error, or that turn is the answer where the
    row has no other."""
    too_long: Literal["refuse", "skip"] = "refuse"
    """A prompt that leaves no room for the longest response, or turns that have none in it: an
    error, or left out and counted."""
    max_skipped_share: Annotated[float, ReadBy("too_long", "skip")] = Field(0.1, ge=0, le=1)
    """Share of the rows left out above which the data is refused."""
    max_lossy_share: float = Field(0.1, ge=0, le=1)
    """Share of the prompts whose token ids decode to another text, above which the data is
    refused; fewer are counted."""
