"""The columns of recorded rollouts: one row a rollout, one Parquet file a step and process.

Legend: p = prompt tokens, T = response tokens kept, K = teacher's top-k, J = student's top-k.
Index t is response token t; log-probs are in nats, given the prompt and the tokens before t, at the
temperature of sampling. All of a row's columns of a token have T entries. What is missing is null,
never a number.

Names and types are the format: a change of one that is there raises VERSION, a new one does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import pyarrow as pa

VERSION = 1
"""Of the columns; readers refuse a higher one."""
METADATA_KEY = b"driftline"
"""Of the file's metadata: a JSON object that says whose rollouts these are (`Origin`)."""
FOLDER = "rollouts"
"""In the folder of a run."""

ID = pa.int32()
TOKEN_BITS, LIST_BITS = 10, 7
"""What a float16 has, right to 0.004 at -8; in the lists, which are most of a file, what a bfloat16
has: right to 0.03 there, to 0.004 at -1.5, and a probability to 0.0007."""


class Shape(Enum):
    """What a cell holds."""

    SCALAR = "one value"
    PROMPT = "[p]"
    TOKENS = "[T]"
    LISTS = "[T][K]"


@dataclass(frozen=True, slots=True)
class Column:
    """One column."""

    name: str
    kind: pa.DataType
    """Of an element."""
    shape: Shape
    is_required: bool
    """Otherwise null where it is not known."""
    about: str
    bits: int | None = None
    """Of the mantissa that are kept of a float32, so that it packs (`writing.rounded`); None: all.
    Not every reader takes a float16."""

    @property
    def type(self) -> pa.DataType:
        """Of a cell."""
        if self.shape is Shape.SCALAR:
            return self.kind
        inner = pa.list_(pa.field("element", self.kind, nullable=False))
        if self.shape is Shape.LISTS:
            return pa.list_(pa.field("element", inner, nullable=False))
        return inner

    @property
    def field(self) -> pa.Field:
        """Of the schema."""
        return pa.field(self.name, self.type, nullable=not self.is_required)


def _scalar(name: str, kind: pa.DataType, about: str) -> Column:
    return Column(name.rstrip("?"), kind, Shape.SCALAR, not name.endswith("?"), about)


def _tokens(name: str, kind: pa.DataType, about: str, shape: Shape = Shape.TOKENS) -> Column:
    return Column(name.rstrip("?"), kind, shape, not name.endswith("?"), about)


def _measured(name: str, about: str, shape: Shape = Shape.TOKENS) -> Column:
    """In nats, or a share."""
    bits = LIST_BITS if shape is Shape.LISTS else TOKEN_BITS
    return Column(name.rstrip("?"), pa.float32(), shape, not name.endswith("?"), about, bits)


def _lists(name: str, kind: pa.DataType, about: str) -> Column:
    return _tokens(name, kind, about, Shape.LISTS)


COLUMNS: tuple[Column, ...] = (
    _scalar("step", pa.int32(), "the step that learnt from it; the first is 1"),
    _scalar("index", pa.int32(), "its place among the rollouts of the step, from 0"),
    _scalar("prompt_id", pa.string(), "the problem's id in the data"),
    _scalar("prompt", pa.string(), "text of the prompt, chat template included"),
    _scalar("answer?", pa.string(), "what the graded part of a response must equal"),
    _scalar("teacher?", pa.string(), "which of several teachers scored it"),
    _scalar("response", pa.string(), "text of `response_ids`, special tokens included"),
    _scalar(
        "finish",
        pa.string(),
        "why it ended: stop (the student), length (the budget), truncated (the drift policy), "
        "unscored (the teacher stayed away); unknown of rollouts from elsewhere",
    ),
    _scalar("verdict", pa.string(), "the teacher's last word: continue or truncate"),
    _scalar("num_tokens", pa.int32(), "T, tokens kept"),
    _scalar(
        "num_generated",
        pa.int32(),
        "tokens that the student sampled, those past a truncation included",
    ),
    _scalar("num_bad_events?", pa.int32(), "by the drift policy, of the tokens kept"),
    _scalar(
        "exhausted_at?", pa.int32(), "tokens up to and with the one at which R reached 0; else null"
    ),
    _scalar("policy_version?", pa.int32(), "optimiser rounds of the weights that sampled"),
    _scalar("correct?", pa.bool_(), "whether the response has the right answer, where it is known"),
    _scalar("mean_overlap?", pa.float32(), "of `overlap`, where `sampled`"),
    _scalar(
        "mean_teacher_logprob?", pa.float32(), "of `teacher_logprobs`, where `mask`; null for none"
    ),
    _scalar("mean_reverse_kl?", pa.float32(), "of `reverse_kl`, where `mask`"),
    _scalar("started_at?", pa.timestamp("ms", tz="UTC"), "when its generation began"),
    _scalar("generate_s?", pa.float32(), "seconds until generation ended"),
    _scalar("score_wait_s?", pa.float32(), "seconds from then until its last score was there"),
    _scalar(
        "round_trip_tokens?",
        pa.int32(),
        "tokens generated while the deciding append was under way; 0 if not truncated",
    ),
    _scalar(
        "verdict_span_tokens?", pa.int32(), "tokens of the deciding append; 0 if not truncated"
    ),
    _tokens("prompt_ids", ID, "what the student was given", Shape.PROMPT),
    _tokens("response_ids", ID, "what was kept of the response"),
    _tokens(
        "mask", pa.bool_(), "whether the token counts: false for special tokens that are masked"
    ),
    _tokens(
        "sampled?",
        pa.bool_(),
        "false for what others said between the student's answers; null: all is the student's",
    ),
    _measured("behavior_logprobs?", "of the token, by the policy that sampled it"),
    _measured("teacher_logprobs", "of the token, by the teacher"),
    _measured(
        "reverse_kl?",
        "sum over the student's top-k of q (log q - log p), q the student's and p the teacher's, "
        "and over all other tokens as if they were one: at least 0, at most KL(q || p)",
    ),
    _measured(
        "overlap?",
        "share of the first d entries that the student's and the teacher's top-k have in common, "
        "d the drift policy's k",
    ),
    _tokens("bad_events?", pa.bool_(), "where the drift policy saw one"),
    _measured("reliability?", "R_t = clip(1 - w_drop * bad events up to t, 0, 1)"),
    _tokens(
        "weight?",
        pa.float32(),
        "what multiplied the token's loss, the first time that it was learnt from: the product of "
        "the position weights and of its teacher's, before the step's sum is divided; 0 where "
        "masked",
    ),
    _measured("entropies?", "of the teacher's whole distribution, in nats"),
    _tokens("ranks?", pa.int32(), "of the token in the teacher's distribution; 1 is most likely"),
    _lists("teacher_topk_ids", ID, "most likely first"),
    _measured("teacher_topk_logprobs", "of these, by the teacher", Shape.LISTS),
    _lists("student_topk_ids?", ID, "of the policy that sampled, most likely first; [T][J]"),
    _measured("student_topk_logprobs?", "of these, by the policy that sampled", Shape.LISTS),
    _measured("teacher_logprobs_at_student_topk?", "of these, by the teacher", Shape.LISTS),
)
BY_NAME = {column.name: column for column in COLUMNS}
SCALARS = tuple(column.name for column in COLUMNS if column.shape is Shape.SCALAR)
SCHEMA = pa.schema([column.field for column in COLUMNS])


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Whose rollouts a file holds: its metadata. None: not known."""

    version: int = VERSION
    tokenizer: str | None = None
    """Folder or name of the checkpoint whose tokenizer gave the ids."""
    tokenizer_fingerprint: str | None = None
    student: str | None = None
    teachers: dict[str, str] | None = None
    """Model of each teacher, by what `teacher` calls it; "" for the one without a name."""
    drift_policy: dict[str, object] | None = None
    """Settings of the drift policy, in full."""
    settings_digest: str | None = None
    """SHA-256 of the run's settings."""
    commit: str | None = None
    """Of the work tree from which the run was started."""
    temperature: float | None = None
    """Of sampling."""
    run: str | None = None
    """Name of the run."""


def file_name(step: int, rank: int = 0) -> str:
    """Of the rollouts of a step that one of several processes learnt from."""
    return f"step-{step:06d}.parquet" if rank == 0 else f"step-{step:06d}.{rank}.parquet"
