"""The dashboard of trainers, which are told apart by their run: `trainer_info` has its name."""

from __future__ import annotations

from scripts.panels import RATE, Board, Panel, Query, Row


def of_run(expr: str) -> str:
    """Of the runs chosen; the answer has `run` for a label. One series an instance on the right."""
    return f'{expr} * on (instance) group_left (run) trainer_info{{run=~"$run"}}'


def step(figure: str) -> Query:
    """A figure of the last step."""
    return Query(of_run(f"trainer_step_{figure}"), f"{{{{run}}}} {figure}")


def run_rate(name: str, *by: str) -> str:
    """A counter of the runs chosen, a second."""
    return of_run(f"sum by ({', '.join(['instance', *by])}) (rate({name}{RATE}))")


def run_share(name: str, by: str) -> str:
    """What each value of a label has of a counter's rate."""
    rate = f"sum by (instance, {by}) (rate({name}{RATE}))"
    whole = f"sum by (instance) (rate({name}{RATE}))"
    return of_run(f"({rate} / on (instance) group_left () {whole})")


def run_quantile(share: float, name: str, by: str) -> str:
    """Of a histogram of the runs chosen."""
    rate = f"sum by (instance, {by}, le) (rate({name}_bucket{RATE}))"
    return of_run(f"histogram_quantile({share:g}, {rate})")


PROGRESS = Row(
    "Progress",
    (
        Panel(
            "Steps",
            "short",
            "Done, those before a resume included, of those that the run has.",
            (
                Query(of_run("trainer_done_steps"), "{{run}} done"),
                Query(of_run("trainer_planned_steps"), "{{run}} of"),
            ),
        ),
        Panel(
            "Since the last step",
            "s",
            "Rises for as long as a step takes; an evaluation or a checkpoint adds to it.",
            (Query(of_run("(time() - trainer_last_step_timestamp_seconds)"), "{{run}}"),),
        ),
        Panel(
            "Warnings",
            "short",
            "Of steps, by kind, in an hour: docs/diagnostics.md.",
            (
                Query(
                    of_run("sum by (instance, kind) (increase(trainer_warnings_total[1h]))"),
                    "{{run}} {{kind}}",
                ),
            ),
        ),
    ),
)
LEARNING = Row(
    "Learning",
    (
        Panel("Loss", "short", "Of the last step.", (step("loss"),), from_zero=False),
        Panel(
            "Reverse KL",
            "short",
            "Nats a token, of sampled tokens.",
            (step("reverse_kl"),),
            from_zero=False,
        ),
        Panel(
            "Accuracy",
            "percentunit",
            "Of the last evaluation: greedy responses that are right.",
            (Query(of_run("trainer_eval_accuracy"), "{{run}}"),),
        ),
        Panel("Gradient", "short", "Norm before it is clipped.", (step("grad_norm"),)),
        Panel("Learning rate", "short", "Of the last update.", (step("learning_rate"),)),
        Panel(
            "Sync gap",
            "short",
            "Nats between log-probs of learner and sampler after a sync.",
            (step("sync_gap_nats"),),
        ),
    ),
)
SPEED = Row(
    "Speed",
    (
        Panel(
            "Tokens a second",
            "short",
            "Of finished steps: generated, kept, and generated past a stop.",
            (Query(run_rate("trainer_tokens_total", "kind"), "{{run}} {{kind}}"),),
        ),
        Panel(
            "Share of each phase",
            "percentunit",
            "Of the wall time of finished steps.",
            (Query(run_share("trainer_phase_seconds_total", "phase"), "{{run}} {{phase}}"),),
            stacked=True,
        ),
        Panel(
            "Staleness",
            "short",
            "Steps by which the oldest weights that a step learnt from were behind.",
            (Query(of_run("trainer_staleness_steps"), "{{run}}"),),
        ),
    ),
)
DRIFT = Row(
    "Drift",
    (
        Panel(
            "Overlap",
            "percentunit",
            "Of the first k entries of student and teacher.",
            (step("overlap"),),
        ),
        Panel(
            "How rollouts end",
            "percentunit",
            "Truncated: stopped in flight. Lost: the teacher scored nothing of them.",
            (Query(run_share("trainer_rollouts_total", "end"), "{{run}} {{end}}"),),
            stacked=True,
        ),
        Panel(
            "Lengths",
            "short",
            "Kept tokens of a response, mean and p90, and the budget.",
            (step("length_mean"), step("length_p90"), step("max_tokens")),
        ),
    ),
)
TEACHERS = Row(
    "Teachers",
    (
        Panel(
            "Round trips",
            "s",
            "From an append to its scores, with what the client tried again.",
            (
                Query(
                    run_quantile(0.5, "trainer_teacher_round_trip_seconds", "teacher"),
                    "{{run}} {{teacher}} p50",
                ),
                Query(
                    run_quantile(0.99, "trainer_teacher_round_trip_seconds", "teacher"),
                    "{{run}} {{teacher}} p99",
                ),
            ),
        ),
        Panel(
            "Where round trips spend their time",
            "percentunit",
            "Waiting at the teacher, in its engine, and on the way.",
            (Query(run_share("trainer_teacher_seconds_total", "part"), "{{run}} {{part}}"),),
            stacked=True,
        ),
        Panel(
            "Replicas",
            "short",
            "1 while a replica is used.",
            (Query(of_run("trainer_replica_up"), "{{run}} {{endpoint}}"),),
        ),
        Panel(
            "Losses and failovers",
            "short",
            "Streams that replicas broke or ended, and sessions that went on elsewhere; in all.",
            (
                Query(of_run("trainer_replica_losses_total"), "{{run}} {{endpoint}} lost"),
                Query(of_run("trainer_failovers_total"), "{{run}} {{teacher}} failovers"),
            ),
        ),
        Panel(
            "Errors",
            "ops",
            "The five most frequent ends of a round trip without scores.",
            (
                Query(
                    of_run(
                        "topk(5, sum by (instance, type) "
                        f"(rate(trainer_teacher_errors_total{RATE})))"
                    ),
                    "{{run}} {{type}}",
                ),
            ),
        ),
        Panel(
            "Resident memory",
            "bytes",
            "Of the trainer's process, without engines.",
            (
                Query(
                    of_run('process_resident_memory_bytes{job="trainer"}'),
                    "{{run}}",
                ),
            ),
        ),
    ),
)
TRAINER = Board(
    name="trainer",
    uid="driftline-trainer",
    title="driftline: trainers",
    variable="run",
    listed_by="trainer_info",
    rows=(PROGRESS, LEARNING, SPEED, DRIFT, TEACHERS),
)
