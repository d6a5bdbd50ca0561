"""What Prometheus is told of a run: a sink like the others, read when somebody asks.

A step is told by its report once it is over, a round trip to a teacher when its answer is there;
nothing happens for a token. Every figure of the last step and the last evaluation is a gauge of the
name that metrics.jsonl calls it by, behind `trainer_step_` and `trainer_eval_`. Every label is
bounded: by the settings, by the kinds of warnings and by the table of errors.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client import Counter as CounterMetric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from student_trainer.diagnostics.alarms import KINDS, Alarm
from student_trainer.diagnostics.replicas import ReplicaReading
from student_trainer.diagnostics.step_report import PHASES, EvalReport, StepReport
from student_trainer.errors import ConfigError
from student_trainer.recording.metrics_server import answering
from student_trainer.records import Finish
from teacher_wire import __version__
from teacher_wire.errors import ERRORS_BY_NAME
from teacher_wire.records import Timing

ROUND_TRIP_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120)
LOST = "lost"
"""End of a rollout that the teacher scored nothing of."""
PARTS = ("queue", "engine", "way")
"""Of a round trip: waiting at the teacher, in its engine, and all else."""


class TrainerMetrics(Collector):
    """Everything of one run, on a registry of its own."""

    def __init__(
        self, *, run: str, student: str, steps: int, clock: Callable[[], float] = time.time
    ) -> None:
        """`clock` gives seconds since 1970."""
        self.registry = CollectorRegistry()
        self._info = {"version": __version__, "run": run, "student": student}
        self._planned = steps
        self._clock = clock
        self._last_step: StepReport | None = None
        self._last_step_at = clock()
        self._evaluation: EvalReport | None = None
        self._steps: Counter[str] = Counter({"step": 0, "skipped": 0})
        self._tokens: Counter[str] = Counter({"generated": 0, "kept": 0, "overshoot": 0})
        self._ends: Counter[str] = Counter({**{end.value: 0 for end in Finish}, LOST: 0})
        self._phases = dict.fromkeys(PHASES, 0.0)
        self._warnings: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        self._read: Callable[[], Sequence[ReplicaReading]] = tuple
        self._failovers: Callable[[], Mapping[str, int]] = dict
        self._round_trips = Histogram(
            "trainer_teacher_round_trip_seconds",
            "From an append to its scores, with what the client tried again.",
            ("teacher",),
            buckets=ROUND_TRIP_S,
            registry=self.registry,
        )
        self._parts = CounterMetric(
            "trainer_teacher_seconds",
            "Where the time of round trips went.",
            ("teacher", "part"),
            registry=self.registry,
        )
        self._errors = CounterMetric(
            "trainer_teacher_errors",
            "Round trips that ended in an error.",
            ("teacher", "type"),
            registry=self.registry,
        )
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def watch(
        self,
        replicas: Callable[[], Sequence[ReplicaReading]],
        failovers: Callable[[], Mapping[str, int]],
    ) -> None:
        """Which replicas are up, and the sessions of each teacher that had to move, are read at
        every scrape."""
        self._read, self._failovers = replicas, failovers

    def round_trips(self, teacher: str) -> Callable[[float, Timing | None, str], None]:
        """What is told of each: seconds, the teacher's own account, or the class of its error."""
        seconds = self._round_trips.labels(teacher)
        parts = {part: self._parts.labels(teacher, part) for part in PARTS}
        errors = {name: self._errors.labels(teacher, name) for name in ERRORS_BY_NAME}
        other = self._errors.labels(teacher, "other")

        def tell(took_s: float, timing: Timing | None, error: str) -> None:
            if timing is None:
                errors.get(error, other).inc()
                return
            seconds.observe(took_s)
            queue_s, engine_s = timing.queue_us / 1e6, timing.engine_us / 1e6
            parts["queue"].inc(queue_s)
            parts["engine"].inc(engine_s)
            parts["way"].inc(max(0.0, took_s - queue_s - engine_s))

        return tell

    def step(self, report: StepReport) -> None:
        """Adds a step to the counts."""
        self._steps[report.kind] += 1
        self._last_step, self._last_step_at = report, self._clock()
        self._ends[LOST] += report.unscored_rollouts
        for phase in PHASES:
            self._phases[phase] += getattr(report.seconds, phase) or 0.0
        if (rollouts := report.generation) is not None:
            self._tokens["generated"] += rollouts.generated_tokens
            self._tokens["kept"] += rollouts.kept_tokens
            self._tokens["overshoot"] += rollouts.overshoot_tokens
        if report.profile is not None:
            self._ends.update(report.profile.finish)

    def evaluation(self, report: EvalReport) -> None:
        """The last one is shown."""
        self._evaluation = report

    def alarm(self, step: int, alarm: Alarm) -> None:
        """Counts a warning."""
        self._warnings[alarm.kind] += 1

    def close(self) -> None:
        """Whoever serves them ends that."""

    def collect(self) -> Iterator[Metric]:
        yield from self._progress_families()
        yield _counter("trainer_tokens", "Response tokens of finished steps.", "kind", self._tokens)
        yield _counter("trainer_rollouts", "Rollouts by what ended them.", "end", self._ends)
        text = "Wall time of finished steps."
        yield _counter("trainer_phase_seconds", text, "phase", self._phases)
        yield _counter("trainer_warnings", "Warnings of steps.", "kind", self._warnings)
        yield from self._replica_families()
        yield from self._figure_families()

    def _progress_families(self) -> Iterator[Metric]:
        info = GaugeMetricFamily("trainer_info", "Always 1.", labels=[*self._info])
        info.add_metric([*self._info.values()], 1)
        yield info
        yield _counter("trainer_steps", "Steps of this process.", "kind", self._steps)
        yield GaugeMetricFamily("trainer_planned_steps", "Steps that the run has.", self._planned)
        text = "When the last step was done, or the process began."
        yield GaugeMetricFamily("trainer_last_step_timestamp_seconds", text, self._last_step_at)
        if (last := self._last_step) is None:
            return
        yield GaugeMetricFamily("trainer_done_steps", "Steps done, those resumed too.", last.step)
        if (rollouts := last.generation) is not None:
            text = "Steps by which the oldest weights of the last step's rollouts were behind."
            behind = last.step - 1 - rollouts.staleness_min_version
            yield GaugeMetricFamily("trainer_staleness_steps", text, behind)

    def _replica_families(self) -> Iterator[Metric]:
        labels = ["teacher", "endpoint"]
        up = GaugeMetricFamily("trainer_replica_up", "1 while a teacher is used.", labels=labels)
        losses = CounterMetricFamily(
            "trainer_replica_losses", "Streams that a replica broke or ended.", labels=labels
        )
        for replica in self._read():
            up.add_metric([replica.teacher, replica.endpoint], float(replica.up))
            losses.add_metric([replica.teacher, replica.endpoint], replica.losses)
        text = "Sessions that went on at another replica."
        yield from (up, losses, _counter("trainer_failovers", text, "teacher", self._failovers()))

    def _figure_families(self) -> Iterator[Metric]:
        for name, report in (("step", self._last_step), ("eval", self._evaluation)):
            for figure, value in report.values().items() if report is not None else ():
                text = f"{figure} in metrics.jsonl, the last."
                yield GaugeMetricFamily(f"trainer_{name}_{figure}", text, value)


def _counter(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family


@contextmanager
def served(metrics: TrainerMetrics, host: str, port: int) -> Iterator[None]:
    """Answers on the port within the block. Raises ConfigError where it cannot be had."""
    with ExitStack() as stack:
        try:
            stack.enter_context(answering(host, port, metrics.registry))
        except OSError as error:
            raise ConfigError(
                f"metrics.port is {port}, and {host}:{port} cannot be listened on: "
                f"{error.strerror}; take another port, or 0 for none"
            ) from error
        yield
