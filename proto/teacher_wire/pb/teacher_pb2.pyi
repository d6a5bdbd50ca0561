from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LogprobDtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LOGPROB_DTYPE_UNSPECIFIED: _ClassVar[LogprobDtype]
    LOGPROB_DTYPE_F16: _ClassVar[LogprobDtype]
    LOGPROB_DTYPE_F32: _ClassVar[LogprobDtype]

class Verdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERDICT_UNSPECIFIED: _ClassVar[Verdict]
    VERDICT_CONTINUE: _ClassVar[Verdict]
    VERDICT_TRUNCATE: _ClassVar[Verdict]
LOGPROB_DTYPE_UNSPECIFIED: LogprobDtype
LOGPROB_DTYPE_F16: LogprobDtype
LOGPROB_DTYPE_F32: LogprobDtype
VERDICT_UNSPECIFIED: Verdict
VERDICT_CONTINUE: Verdict
VERDICT_TRUNCATE: Verdict

class GetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetInfoResponse(_message.Message):
    __slots__ = ("info",)
    INFO_FIELD_NUMBER: _ClassVar[int]
    info: TeacherInfo
    def __init__(self, info: _Optional[_Union[TeacherInfo, _Mapping]] = ...) -> None: ...

class GetTokensRequest(_message.Message):
    __slots__ = ("first_id", "count")
    FIRST_ID_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    first_id: int
    count: int
    def __init__(self, first_id: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class GetTokensResponse(_message.Message):
    __slots__ = ("ids", "tokens")
    IDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    tokens: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ids: _Optional[_Iterable[int]] = ..., tokens: _Optional[_Iterable[str]] = ...) -> None: ...

class TeacherInfo(_message.Message):
    __slots__ = ("model_id", "revision", "weights_digest", "dtype", "vocab_size", "tokenizer_fingerprint", "special_token_ids", "max_k", "max_context", "engine", "engine_version", "instance_id", "max_sessions", "max_append_tokens", "protocol_version", "server_version", "block_tokens", "end_token_ids", "token_digests")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SPECIAL_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_K_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_VERSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_APPEND_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    END_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    revision: str
    weights_digest: str
    dtype: str
    vocab_size: int
    tokenizer_fingerprint: str
    special_token_ids: _containers.RepeatedScalarFieldContainer[int]
    max_k: int
    max_context: int
    engine: str
    engine_version: str
    instance_id: str
    max_sessions: int
    max_append_tokens: int
    protocol_version: int
    server_version: str
    block_tokens: int
    end_token_ids: _containers.RepeatedScalarFieldContainer[int]
    token_digests: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model_id: _Optional[str] = ..., revision: _Optional[str] = ..., weights_digest: _Optional[str] = ..., dtype: _Optional[str] = ..., vocab_size: _Optional[int] = ..., tokenizer_fingerprint: _Optional[str] = ..., special_token_ids: _Optional[_Iterable[int]] = ..., max_k: _Optional[int] = ..., max_context: _Optional[int] = ..., engine: _Optional[str] = ..., engine_version: _Optional[str] = ..., instance_id: _Optional[str] = ..., max_sessions: _Optional[int] = ..., max_append_tokens: _Optional[int] = ..., protocol_version: _Optional[int] = ..., server_version: _Optional[str] = ..., block_tokens: _Optional[int] = ..., end_token_ids: _Optional[_Iterable[int]] = ..., token_digests: _Optional[_Iterable[str]] = ...) -> None: ...

class IdRange(_message.Message):
    __slots__ = ("start", "end")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class ScoreOptions(_message.Message):
    __slots__ = ("k", "temperature", "logprob_dtype", "want_entropy", "want_rank", "excluded_ids")
    K_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_DTYPE_FIELD_NUMBER: _ClassVar[int]
    WANT_ENTROPY_FIELD_NUMBER: _ClassVar[int]
    WANT_RANK_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_IDS_FIELD_NUMBER: _ClassVar[int]
    k: int
    temperature: float
    logprob_dtype: LogprobDtype
    want_entropy: bool
    want_rank: bool
    excluded_ids: _containers.RepeatedCompositeFieldContainer[IdRange]
    def __init__(self, k: _Optional[int] = ..., temperature: _Optional[float] = ..., logprob_dtype: _Optional[_Union[LogprobDtype, str]] = ..., want_entropy: _Optional[bool] = ..., want_rank: _Optional[bool] = ..., excluded_ids: _Optional[_Iterable[_Union[IdRange, _Mapping]]] = ...) -> None: ...

class OverlapRatio(_message.Message):
    __slots__ = ("k", "threshold")
    K_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    k: int
    threshold: float
    def __init__(self, k: _Optional[int] = ..., threshold: _Optional[float] = ...) -> None: ...

class TeacherTopPAccept(_message.Message):
    __slots__ = ("k", "top_p")
    K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    k: int
    top_p: float
    def __init__(self, k: _Optional[int] = ..., top_p: _Optional[float] = ...) -> None: ...

class DriftPolicy(_message.Message):
    __slots__ = ("w_drop", "stop_in_flight", "overlap_ratio", "teacher_top_p_accept")
    W_DROP_FIELD_NUMBER: _ClassVar[int]
    STOP_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_RATIO_FIELD_NUMBER: _ClassVar[int]
    TEACHER_TOP_P_ACCEPT_FIELD_NUMBER: _ClassVar[int]
    w_drop: float
    stop_in_flight: bool
    overlap_ratio: OverlapRatio
    teacher_top_p_accept: TeacherTopPAccept
    def __init__(self, w_drop: _Optional[float] = ..., stop_in_flight: _Optional[bool] = ..., overlap_ratio: _Optional[_Union[OverlapRatio, _Mapping]] = ..., teacher_top_p_accept: _Optional[_Union[TeacherTopPAccept, _Mapping]] = ...) -> None: ...

class DriftState(_message.Message):
    __slots__ = ("num_tokens", "num_bad_events", "exhausted_at")
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BAD_EVENTS_FIELD_NUMBER: _ClassVar[int]
    EXHAUSTED_AT_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    num_bad_events: int
    exhausted_at: int
    def __init__(self, num_tokens: _Optional[int] = ..., num_bad_events: _Optional[int] = ..., exhausted_at: _Optional[int] = ...) -> None: ...

class ScoreRows(_message.Message):
    __slots__ = ("offset", "count", "k", "num_candidates", "logprob_dtype", "topk_ids", "topk_logprobs", "token_logprobs", "candidate_logprobs", "overlap_counts", "bad_events", "entropies", "token_ranks")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    NUM_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_DTYPE_FIELD_NUMBER: _ClassVar[int]
    TOPK_IDS_FIELD_NUMBER: _ClassVar[int]
    TOPK_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_COUNTS_FIELD_NUMBER: _ClassVar[int]
    BAD_EVENTS_FIELD_NUMBER: _ClassVar[int]
    ENTROPIES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_RANKS_FIELD_NUMBER: _ClassVar[int]
    offset: int
    count: int
    k: int
    num_candidates: int
    logprob_dtype: LogprobDtype
    topk_ids: bytes
    topk_logprobs: bytes
    token_logprobs: bytes
    candidate_logprobs: bytes
    overlap_counts: bytes
    bad_events: bytes
    entropies: bytes
    token_ranks: bytes
    def __init__(self, offset: _Optional[int] = ..., count: _Optional[int] = ..., k: _Optional[int] = ..., num_candidates: _Optional[int] = ..., logprob_dtype: _Optional[_Union[LogprobDtype, str]] = ..., topk_ids: _Optional[bytes] = ..., topk_logprobs: _Optional[bytes] = ..., token_logprobs: _Optional[bytes] = ..., candidate_logprobs: _Optional[bytes] = ..., overlap_counts: _Optional[bytes] = ..., bad_events: _Optional[bytes] = ..., entropies: _Optional[bytes] = ..., token_ranks: _Optional[bytes] = ...) -> None: ...

class TokenSpan(_message.Message):
    __slots__ = ("offset", "token_ids", "num_candidates", "candidate_ids", "event_mask")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_IDS_FIELD_NUMBER: _ClassVar[int]
    EVENT_MASK_FIELD_NUMBER: _ClassVar[int]
    offset: int
    token_ids: bytes
    num_candidates: int
    candidate_ids: bytes
    event_mask: bytes
    def __init__(self, offset: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., num_candidates: _Optional[int] = ..., candidate_ids: _Optional[bytes] = ..., event_mask: _Optional[bytes] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("prompt_ids", "span", "options", "policy", "run_id")
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    SPAN_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    prompt_ids: bytes
    span: TokenSpan
    options: ScoreOptions
    policy: DriftPolicy
    run_id: str
    def __init__(self, prompt_ids: _Optional[bytes] = ..., span: _Optional[_Union[TokenSpan, _Mapping]] = ..., options: _Optional[_Union[ScoreOptions, _Mapping]] = ..., policy: _Optional[_Union[DriftPolicy, _Mapping]] = ..., run_id: _Optional[str] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("rows", "last", "drift", "verdict", "keep_tokens", "timing")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    KEEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    rows: ScoreRows
    last: bool
    drift: DriftState
    verdict: Verdict
    keep_tokens: int
    timing: Timing
    def __init__(self, rows: _Optional[_Union[ScoreRows, _Mapping]] = ..., last: _Optional[bool] = ..., drift: _Optional[_Union[DriftState, _Mapping]] = ..., verdict: _Optional[_Union[Verdict, str]] = ..., keep_tokens: _Optional[int] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queue_us", "engine_us", "computed_tokens")
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    ENGINE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    queue_us: int
    engine_us: int
    computed_tokens: int
    def __init__(self, queue_us: _Optional[int] = ..., engine_us: _Optional[int] = ..., computed_tokens: _Optional[int] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("hello", "open", "append", "close", "credit", "batch")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    APPEND_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    open: Open
    append: Append
    close: Close
    credit: Credit
    batch: bytes
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., open: _Optional[_Union[Open, _Mapping]] = ..., append: _Optional[_Union[Append, _Mapping]] = ..., close: _Optional[_Union[Close, _Mapping]] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ..., batch: _Optional[bytes] = ...) -> None: ...

class RequestBatch(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, requests: _Optional[_Iterable[bytes]] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("welcome", "opened", "scores", "closed", "error", "go_away", "batch")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    GO_AWAY_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    opened: Opened
    scores: Scores
    closed: Closed
    error: Error
    go_away: GoAway
    batch: ResponseBatch
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., opened: _Optional[_Union[Opened, _Mapping]] = ..., scores: _Optional[_Union[Scores, _Mapping]] = ..., closed: _Optional[_Union[Closed, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., go_away: _Optional[_Union[GoAway, _Mapping]] = ..., batch: _Optional[_Union[ResponseBatch, _Mapping]] = ...) -> None: ...

class ResponseBatch(_message.Message):
    __slots__ = ("responses",)
    RESPONSES_FIELD_NUMBER: _ClassVar[int]
    responses: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, responses: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_version", "tokenizer_fingerprint", "vocab_size", "run_id", "credit_bytes", "accepts_batches")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    CREDIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACCEPTS_BATCHES_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    tokenizer_fingerprint: str
    vocab_size: int
    run_id: str
    credit_bytes: int
    accepts_batches: bool
    def __init__(self, protocol_version: _Optional[int] = ..., tokenizer_fingerprint: _Optional[str] = ..., vocab_size: _Optional[int] = ..., run_id: _Optional[str] = ..., credit_bytes: _Optional[int] = ..., accepts_batches: _Optional[bool] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("info", "accepts_batches")
    INFO_FIELD_NUMBER: _ClassVar[int]
    ACCEPTS_BATCHES_FIELD_NUMBER: _ClassVar[int]
    info: TeacherInfo
    accepts_batches: bool
    def __init__(self, info: _Optional[_Union[TeacherInfo, _Mapping]] = ..., accepts_batches: _Optional[bool] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("session_id", "prompt_ids", "scored_ids", "drift", "options", "policy")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    SCORED_IDS_FIELD_NUMBER: _ClassVar[int]
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    prompt_ids: bytes
    scored_ids: bytes
    drift: DriftState
    options: ScoreOptions
    policy: DriftPolicy
    def __init__(self, session_id: _Optional[str] = ..., prompt_ids: _Optional[bytes] = ..., scored_ids: _Optional[bytes] = ..., drift: _Optional[_Union[DriftState, _Mapping]] = ..., options: _Optional[_Union[ScoreOptions, _Mapping]] = ..., policy: _Optional[_Union[DriftPolicy, _Mapping]] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("session_id", "next_offset")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NEXT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    next_offset: int
    def __init__(self, session_id: _Optional[str] = ..., next_offset: _Optional[int] = ...) -> None: ...

class Append(_message.Message):
    __slots__ = ("session_id", "span", "deadline_ms", "traceparent")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    SPAN_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    span: TokenSpan
    deadline_ms: int
    traceparent: str
    def __init__(self, session_id: _Optional[str] = ..., span: _Optional[_Union[TokenSpan, _Mapping]] = ..., deadline_ms: _Optional[int] = ..., traceparent: _Optional[str] = ...) -> None: ...

class Scores(_message.Message):
    __slots__ = ("session_id", "rows", "last", "drift", "verdict", "keep_tokens", "timing")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    KEEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    rows: ScoreRows
    last: bool
    drift: DriftState
    verdict: Verdict
    keep_tokens: int
    timing: Timing
    def __init__(self, session_id: _Optional[str] = ..., rows: _Optional[_Union[ScoreRows, _Mapping]] = ..., last: _Optional[bool] = ..., drift: _Optional[_Union[DriftState, _Mapping]] = ..., verdict: _Optional[_Union[Verdict, str]] = ..., keep_tokens: _Optional[int] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ...) -> None: ...

class Close(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class Closed(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class Credit(_message.Message):
    __slots__ = ("bytes",)
    BYTES_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    def __init__(self, bytes: _Optional[int] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("session_id", "type", "message", "retryable", "retry_after_ms", "expected_offset", "offset")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_OFFSET_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    type: str
    message: str
    retryable: bool
    retry_after_ms: int
    expected_offset: int
    offset: int
    def __init__(self, session_id: _Optional[str] = ..., type: _Optional[str] = ..., message: _Optional[str] = ..., retryable: _Optional[bool] = ..., retry_after_ms: _Optional[int] = ..., expected_offset: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class GoAway(_message.Message):
    __slots__ = ("reason", "deadline_ms")
    REASON_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    deadline_ms: int
    def __init__(self, reason: _Optional[str] = ..., deadline_ms: _Optional[int] = ...) -> None: ...
