"""The surface, frozen: settings, and the numbers of the contract. A change here is a decision.

A setting that is not in the table was added by accident or needs a line in the documentation; a
field number that moved breaks every deployed peer. Run: python -m pytest tests/test_surface.py
"""

from __future__ import annotations

import typing
from collections.abc import Iterator

from pydantic import BaseModel

from student_trainer.settings.config import TrainerConfig
from teacher_server.settings import TeacherConfig
from teacher_wire.pb import teacher_pb2 as pb

TRAINER_SETTINGS = {
    "budget": (
        "boundary every_steps hit_ratio increment initial kind margin max_tokens maximum "
        "minimum patience quantile rate"
    ),
    "checkpoint": "best_metric every_minutes every_steps keep keep_best",
    "data": (
        "add_bos answer_field chat_template chat_template_kwargs final_assistant heldout "
        "heldout_split max_lossy_share max_skipped_share prompt_field subset system "
        "teacher_chat_template too_long train train_split"
    ),
    "drift": "k metric stop_in_flight threshold top_p w_drop",
    "eval": (
        "answer_pattern every_steps grader max_tokens num_prompts pass_k teacher_samples "
        "temperature texts unicode_normalize"
    ),
    "loss": (
        "advantage baseline beta clip_epsilon clip_log_ratio coefficient dual_clip "
        "entropy_threshold kind options path reverse share support tail weight_mode"
    ),
    "metrics": "host port",
    "optim": (
        "betas epochs final_learning_rate kind learning_rate max_grad_norm max_sync_gap_nats "
        "micro_batch_tokens updates_per_epoch warmup_steps weight_decay"
    ),
    "recording": "max_bytes rollouts_per_step",
    "rollout": (
        "chunk_tokens max_context max_staleness prompts_per_step rollouts_per_prompt stop_strings "
        "stop_tokens student_topk temperature tokens_per_step top_p"
    ),
    "run": "otlp_endpoint out seed steps texts",
    "sampler": (
        "cpu_cores cpu_threads dtype enforce_eager gpu_memory_utilization kind kv_cache_gib "
        "max_num_seqs sleep_level stream_interval gpus tensor_parallel_size weight_transfer "
        "weights weights_dir"
    ),
    "special_tokens": "occurrences tokens",
    "student": "attention device dtype gradient_checkpointing model",
    "student.lora": "adapter alpha base_name rank rslora sync targets",
    "teacher": (
        "connect_timeout_s endpoints k logprob_dtype max_replica_gap_nats on_absent tls_ca "
        "tls_cert tls_key token_file"
    ),
    # Of each [teachers.NAME].
    "teachers": (
        "connect_timeout_s endpoints k logprob_dtype loss_weight max_replica_gap_nats on_absent "
        "tls_ca tls_cert tls_key token_file"
    ),
    "teachers.drift": "k metric stop_in_flight threshold top_p w_drop",
    "trackers": "entity name project report_to",
    "weights.block_gate": "aggregate block_size granularity max_span min_span newline_tokens tau",
    "weights.entropy_top": "ratio",
    "weights.importance_ratio": "granularity max_ratio min_ratio mode",
    "weights.position_window": "end_share start_share",
    "weights.prefix_importance": "alpha gamma kind max_gap_nats normalize prefix_share tau_nats",
    "weights.prune": "normalize w_base",
}
TEACHER_SETTINGS = """
analysis_weight block_size cpu_cores data_parallel_size device drain_s dtype enforce_eager engine
engine_lost_s engine_stall_s event_loop evict_idle_s executor fake_latency_s fake_step_tokens
fake_tokens_per_s fake_vocab_size follow_temperature gpu_memory_utilization grpc_port head_dtype
hf_sessions host http_port insecure kept_rows_mib kv_cache_gib log_format log_level
max_append_tokens max_context max_k max_num_batched_tokens max_num_seqs max_queued_tokens
max_reply_bytes max_running max_running_tokens max_sessions model open_metrics otlp_endpoint
pipeline_parallel_size ready_file reflection resume_window_s revision runs self_test
served_model_name session_ttl_s slow_client_s tenants_file tensor_parallel_size tls_cert
tls_client_ca tls_key tokenizer
"""
MESSAGES = {
    "Append": "session_id=1 span=2 deadline_ms=3 traceparent=4",
    "Close": "session_id=1",
    "Closed": "session_id=1",
    "Credit": "bytes=1",
    "DriftPolicy": ("w_drop=1 stop_in_flight=2 overlap_ratio=3 teacher_top_p_accept=4"),
    "DriftState": "num_tokens=1 num_bad_events=2 exhausted_at=3",
    "Error": (
        "session_id=1 type=2 message=3 retryable=4 retry_after_ms=5 expected_offset=6 offset=7"
    ),
    "GetInfoRequest": "",
    "GetInfoResponse": "info=1",
    "GetTokensRequest": "first_id=1 count=2",
    "GetTokensResponse": "ids=1 tokens=2",
    "GoAway": "reason=1 deadline_ms=2",
    "Hello": (
        "protocol_version=1 tokenizer_fingerprint=2 vocab_size=3 run_id=4 credit_bytes=5 "
        "accepts_batches=6"
    ),
    "IdRange": "start=1 end=2",
    "Open": "session_id=1 prompt_ids=2 scored_ids=3 drift=4 options=5 policy=6",
    "Opened": "session_id=1 next_offset=2",
    "OverlapRatio": "k=1 threshold=2",
    "RequestBatch": "requests=1",
    "ResponseBatch": "responses=1",
    "ScoreOptions": ("k=1 temperature=2 logprob_dtype=3 want_entropy=4 want_rank=5 excluded_ids=6"),
    "ScoreRequest": "prompt_ids=1 span=2 options=3 policy=4 run_id=5",
    "ScoreResponse": "rows=1 last=2 drift=3 verdict=4 keep_tokens=5 timing=6",
    "ScoreRows": (
        "offset=1 count=2 k=3 num_candidates=4 logprob_dtype=5 topk_ids=6 topk_logprobs=7 "
        "token_logprobs=8 candidate_logprobs=9 overlap_counts=10 bad_events=11 entropies=12 "
        "token_ranks=13"
    ),
    "Scores": "session_id=1 rows=2 last=3 drift=4 verdict=5 keep_tokens=6 timing=7",
    "SessionRequest": "hello=1 open=2 append=3 close=4 credit=5 batch=6",
    "SessionResponse": "welcome=1 opened=2 scores=3 closed=4 error=5 go_away=6 batch=7",
    "TeacherInfo": (
        "model_id=1 revision=2 weights_digest=3 dtype=4 vocab_size=5 "
        "tokenizer_fingerprint=6 special_token_ids=7 max_k=8 max_context=9 engine=10 "
        "engine_version=11 instance_id=12 max_sessions=13 max_append_tokens=14 "
        "protocol_version=15 server_version=16 block_tokens=17 "
        "end_token_ids=18 token_digests=19"
    ),
    "TeacherTopPAccept": "k=1 top_p=2",
    "Timing": "queue_us=1 engine_us=2 computed_tokens=3",
    "TokenSpan": "offset=1 token_ids=2 num_candidates=3 candidate_ids=4 event_mask=5",
    "Welcome": "info=1 accepts_batches=2",
}
ENUMS = {
    "LogprobDtype": "LOGPROB_DTYPE_UNSPECIFIED=0 LOGPROB_DTYPE_F16=1 LOGPROB_DTYPE_F32=2",
    "Verdict": "VERDICT_UNSPECIFIED=0 VERDICT_CONTINUE=1 VERDICT_TRUNCATE=2",
}
METHODS = {
    "GetInfo": "GetInfoRequest -> GetInfoResponse",
    "GetTokens": "GetTokensRequest -> GetTokensResponse",
    "Score": "ScoreRequest -> stream ScoreResponse",
    "Session": "stream SessionRequest -> stream SessionResponse",
}


def sections(annotation: object) -> list[type[BaseModel]]:
    """The groups of settings that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in sections(part)]


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings below a section; alternatives share a name."""
    for name, field in section.model_fields.items():
        below = sections(field.annotation)
        if not below:
            yield prefix + name
        for group in below:
            yield from leaves(group, f"{prefix}{name}.")


def test_trainer_has_these_settings_and_no_others() -> None:
    expected = {
        f"{section}.{name}" for section, names in TRAINER_SETTINGS.items() for name in names.split()
    }
    assert set(leaves(TrainerConfig)) == expected


def test_teacher_has_these_settings_and_no_others() -> None:
    assert sorted(TeacherConfig.model_fields) == TEACHER_SETTINGS.split()


def test_messages_have_these_fields_with_these_numbers() -> None:
    found = {
        name: " ".join(f"{f.name}={f.number}" for f in message.fields)
        for name, message in pb.DESCRIPTOR.message_types_by_name.items()
    }
    assert found == MESSAGES
    assert not any(m.nested_types for m in pb.DESCRIPTOR.message_types_by_name.values())


def test_enums_have_these_values() -> None:
    found = {
        name: " ".join(f"{v.name}={v.number}" for v in enum.values)
        for name, enum in pb.DESCRIPTOR.enum_types_by_name.items()
    }
    assert found == ENUMS
    assert all(values.split()[0].endswith("_UNSPECIFIED=0") for values in found.values())


def test_service_has_these_methods() -> None:
    service = pb.DESCRIPTOR.services_by_name["TeacherService"]
    assert service.full_name == "opd.teacher.v1.TeacherService"
    found = {
        m.name: f"{'stream ' * m.client_streaming}{m.input_type.name} -> "
        f"{'stream ' * m.server_streaming}{m.output_type.name}"
        for m in service.methods
    }
    assert found == METHODS


def test_every_group_of_settings_refuses_unknown_names() -> None:
    pending: list[type[BaseModel]] = [TrainerConfig]
    while pending:
        section = pending.pop()
        assert section.model_config.get("extra") == "forbid", section
        assert section.model_config.get("frozen"), section
        pending += [s for f in section.model_fields.values() for s in sections(f.annotation)]
