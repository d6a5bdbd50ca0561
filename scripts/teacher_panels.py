"""The dashboard of teachers, which are told apart by `instance`."""

from __future__ import annotations

from scripts.panels import RATE, Board, Panel, Query, Row

TEACHERS = 'instance=~"$instance"'


def teacher(name: str, **labels: str) -> str:
    """A metric of the teachers chosen."""
    return f"{name}{{{', '.join([TEACHERS, *_matched(labels)])}}}"


def rated(name: str, *by: str, **labels: str) -> str:
    """A counter of the teachers chosen, a second, summed by these labels and the instance."""
    return f"sum by ({', '.join(['instance', *by])}) (rate({teacher(name, **labels)}{RATE}))"


def quantile(share: float, name: str, *by: str) -> str:
    """Of a histogram of the teachers chosen."""
    return f"histogram_quantile({share:g}, {rated(f'{name}_bucket', *by, 'le')})"


def used(gauge: str, setting: str) -> str:
    """A gauge as a share of the limit that a setting gives it."""
    return f"{gauge} / ignoring (setting, state) {teacher('teacher_limit', setting=setting)}"


def _matched(labels: dict[str, str]) -> list[str]:
    return [f'{name}="{value}"' for name, value in labels.items()]


LOAD = Row(
    "Load",
    (
        Panel(
            "Phase",
            "short",
            "1 for the phase a teacher is in.",
            (Query(f"{teacher('teacher_phase')} == 1", "{{instance}} {{phase}}"),),
        ),
        Panel(
            "Use of limits",
            "percentunit",
            "At 1 the next one is refused (sessions, queue) or waits (engine).",
            (
                Query(
                    used(teacher("teacher_sessions", state="open"), "max_sessions"),
                    "{{instance}} sessions",
                ),
                Query(
                    used(teacher("teacher_queue_tokens"), "max_queued_tokens"),
                    "{{instance}} queued tokens",
                ),
                Query(
                    used(teacher("teacher_batch_sessions"), "max_running"),
                    "{{instance}} queries in the engine",
                ),
                Query(
                    used(teacher("teacher_batch_tokens"), "max_running_tokens"),
                    "{{instance}} tokens in the engine",
                ),
            ),
        ),
        Panel(
            "Sessions",
            "short",
            "Held, and among them those with an append under way.",
            (
                Query(teacher("teacher_sessions"), "{{instance}} {{state}}"),
                Query(teacher("teacher_limit", setting="max_sessions"), "{{instance}} limit"),
            ),
        ),
        Panel(
            "Queries",
            "short",
            "Waiting for the engine, and in it.",
            (
                Query(teacher("teacher_queue_depth"), "{{instance}} waiting"),
                Query(teacher("teacher_batch_sessions"), "{{instance}} in the engine"),
            ),
        ),
        Panel(
            "Messages",
            "ops",
            "From clients and to them; a batch is one.",
            (
                Query(rated("grpc_server_msg_received_total"), "{{instance}} received"),
                Query(rated("grpc_server_msg_sent_total"), "{{instance}} sent"),
            ),
        ),
        Panel(
            "Streams and calls begun",
            "ops",
            "By method; a Session stream lasts as long as its trainer.",
            (
                Query(
                    rated("grpc_server_started_total", "grpc_method"),
                    "{{instance}} {{grpc_method}}",
                ),
            ),
        ),
    ),
)
LATENCY = Row(
    "Latency",
    (
        Panel(
            "Wait for the engine",
            "s",
            "Of an append.",
            (
                Query(quantile(0.5, "teacher_queue_wait_seconds"), "{{instance}} p50"),
                Query(quantile(0.99, "teacher_queue_wait_seconds"), "{{instance}} p99"),
            ),
        ),
        Panel(
            "Time in the engine",
            "s",
            "Of an append: one step or several.",
            (
                Query(quantile(0.5, "teacher_engine_step_seconds"), "{{instance}} p50"),
                Query(quantile(0.99, "teacher_engine_step_seconds"), "{{instance}} p99"),
            ),
        ),
        Panel(
            "Event loop, HTTP, silence",
            "s",
            "How late the loop is, requests over HTTP, and how long the engine has owed an answer.",
            (
                Query(quantile(0.99, "teacher_event_loop_lag_seconds"), "{{instance}} loop p99"),
                Query(quantile(0.99, "teacher_http_request_seconds"), "{{instance}} HTTP p99"),
                Query(teacher("teacher_engine_silent_seconds"), "{{instance}} silence"),
            ),
        ),
    ),
)
SCORING = Row(
    "Scoring",
    (
        Panel(
            "Tokens a second",
            "short",
            "Scored, and those that the model was run on.",
            (
                Query(rated("teacher_tokens_scored_total"), "{{instance}} scored"),
                Query(rated("teacher_computed_tokens_total"), "{{instance}} computed"),
            ),
        ),
        Panel(
            "Computed for each scored",
            "short",
            "1 and the prompts' share; more: prefixes leave the KV cache between appends.",
            (
                Query(
                    f"{rated('teacher_computed_tokens_total')} / "
                    f"{rated('teacher_tokens_scored_total')}",
                    "{{instance}}",
                ),
            ),
        ),
        Panel(
            "Rows of texts",
            "short",
            "Of other trainers' clients, over HTTP: made, or kept from an earlier call.",
            (Query(rated("teacher_text_rows_total", "source"), "{{instance}} {{source}}"),),
        ),
    ),
)
DRIFT = Row(
    "Drift",
    (
        Panel(
            "Verdicts a second",
            "short",
            "Of appends with a drift policy. Truncate is repeated until the client has stopped.",
            (Query(rated("teacher_verdicts_total", "verdict"), "{{instance}} {{verdict}}"),),
        ),
        Panel(
            "Share of truncate",
            "percentunit",
            "Near 1 the student drifts at once: drift.threshold does not fit the pair.",
            (
                Query(
                    f"{rated('teacher_verdicts_total', 'tenant', verdict='truncate')} / "
                    f"({rated('teacher_verdicts_total', 'tenant')} > 0)",
                    "{{instance}} {{tenant}}",
                ),
            ),
        ),
    ),
)
MEMORY = Row(
    "Memory and KV",
    (
        Panel(
            "KV in use",
            "percentunit",
            "What queries under way need of the cache, at the moment of the scrape.",
            (Query(teacher("teacher_kv_used_ratio"), "{{instance}}"),),
        ),
        Panel(
            "Do the sessions fit the cache?",
            "short",
            "Tokens of open sessions above what the cache holds: prefixes are computed again.",
            (
                Query(teacher("teacher_session_tokens"), "{{instance}} of open sessions"),
                Query(teacher("teacher_kv_capacity_tokens"), "{{instance}} the cache holds"),
            ),
        ),
        Panel(
            "Resident memory",
            "bytes",
            "Of the service's process, without the engine's own.",
            (Query(teacher("process_resident_memory_bytes", job="teacher"), "{{instance}}"),),
        ),
        Panel(
            "Replies and kept rows",
            "bytes",
            "Replies that clients have not accepted, and rows of texts that are kept.",
            (
                Query(teacher("teacher_send_queue_bytes"), "{{instance}} replies"),
                Query(teacher("teacher_kept_rows_bytes"), "{{instance}} kept rows"),
            ),
        ),
        Panel(
            "Open files",
            "short",
            "Flat; one that rises is a leak.",
            (Query(teacher("process_open_fds", job="teacher"), "{{instance}}"),),
        ),
    ),
)
ERRORS = Row(
    "Errors",
    (
        Panel(
            "Errors told to clients",
            "ops",
            "The five most frequent: docs/operations.md says what each means.",
            (Query(f"topk(5, {rated('teacher_errors_total', 'type')})", "{{instance}} {{type}}"),),
        ),
        Panel(
            "Dropped and evicted",
            "ops",
            "Queries and streams dropped, and sessions ended unasked.",
            (
                Query(rated("teacher_dropped_total", "reason"), "{{instance}} dropped: {{reason}}"),
                Query(
                    rated("teacher_evictions_total", "reason"), "{{instance}} evicted: {{reason}}"
                ),
            ),
        ),
        Panel(
            "Sessions that go on",
            "ops",
            "Opened with scored tokens: held here still, rebuilt from the prefix, or refused.",
            (Query(rated("teacher_resumes_total", "result"), "{{instance}} {{result}}"),),
        ),
        Panel(
            "Calls ended",
            "ops",
            "By gRPC status.",
            (Query(rated("grpc_server_handled_total", "grpc_code"), "{{instance}} {{grpc_code}}"),),
        ),
    ),
)
TENANTS = Row(
    "Tenants",
    (
        Panel(
            "Tokens a second",
            "short",
            "Scored, by tenant.",
            (Query(rated("teacher_tokens_scored_total", "tenant"), "{{instance}} {{tenant}}"),),
        ),
        Panel(
            "Outcome of queries",
            "ops",
            "Refused: something is full.",
            (
                Query(
                    rated("teacher_admission_total", "tenant", "outcome"),
                    "{{instance}} {{tenant}} {{outcome}}",
                ),
            ),
        ),
        Panel(
            "Sessions and their limits",
            "short",
            "Of tenants; the limit where they have one.",
            (
                Query(teacher("teacher_tenant_sessions"), "{{instance}} {{tenant}}"),
                Query(
                    teacher("teacher_tenant_limit", setting="max_sessions"),
                    "{{instance}} {{tenant}} limit",
                ),
            ),
        ),
    ),
)
TEACHER = Board(
    name="teacher",
    uid="driftline-teacher",
    title="driftline: teacher",
    variable="instance",
    listed_by="teacher_phase",
    rows=(LOAD, LATENCY, SCORING, DRIFT, MEMORY, ERRORS, TENANTS),
)
