"""Data: rows of files, tables and data sets in, prompts as token ids out.

`files` and `tables` read, `rows` says what a row may hold, `prompts` makes ids of it, `order` says
which of them a step takes. Nothing here knows settings.
"""

from __future__ import annotations

from student_trainer.data.order import PromptOrder
from student_trainer.data.prompts import Limits, PromptFormat, load_prompts
from student_trainer.data.rows import RowFields
from student_trainer.data.sources import Source

__all__ = ["Limits", "PromptFormat", "PromptOrder", "RowFields", "Source", "load_prompts"]
