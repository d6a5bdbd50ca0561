"""One trace from the trainer's rollout through an append to the engine.

Run: pytest tests/faults/test_traces.py
"""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing

import pytest

from student_trainer.data import PromptOrder
from student_trainer.records import Prompt, SamplingOptions
from student_trainer.rollouts.budget import FixedBudget
from student_trainer.rollouts.stream import LoopThread, RolloutStream
from student_trainer.settings.budget import FixedBudgetSettings
from teacher_client.client import TeacherClient
from teacher_server import logs
from teacher_server.engine.fake_engine import FakeEngine, Fault
from teacher_server.testing import local_teacher
from teacher_wire import tracing
from teacher_wire.errors import EngineError
from tests.faults.streams import OPTIONS, POLICY, PROMPT, span_at
from tests.trainer.in_memory import InMemorySampler, ScriptedSession, prompt, rules
from tests.waiting import LIMIT_S

sdk = pytest.importorskip("opentelemetry.sdk.trace")
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import (  # noqa: E402
    InMemorySpanExporter,
)


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.trace_with(provider)
    yield exporter
    tracing.trace_with(None)


async def connect(address: str) -> TeacherClient:
    return await TeacherClient.connect(
        [address], tokenizer_fingerprint="", vocab_size=512, run_id="t"
    )


async def test_one_trace_from_the_step_to_the_engine(spans: InMemorySpanExporter) -> None:
    engine = FakeEngine(base_latency_s=0.05)
    async with local_teacher(engine) as teacher:
        client = await connect(teacher.address)
        session = client.open(PROMPT, OPTIONS, POLICY)
        with tracing.span("step", step=7):
            for offset in (0, 4):
                await session.append(span_at(offset, 4))
        await client.aclose()
    finished = spans.get_finished_spans()
    assert len({one.context.trace_id for one in finished}) == 1
    by_id = {one.context.span_id: one for one in finished}
    lines = []
    for one in finished:
        if one.name == "engine":
            line = [one.name]
            while one.parent is not None:
                one = by_id[one.parent.span_id]
                line.append(one.name)
            lines.append(line)
    assert lines == [["engine", "teacher append", "append", "step"]] * 2
    for one in finished:
        if one.name == "engine":
            assert 0.05e9 <= one.end_time - one.start_time < 5e9
        if one.name == "queue":
            assert one.end_time >= one.start_time
    assert {one.name for one in finished} == {"step", "append", "teacher append", "queue", "engine"}


async def test_a_failed_append_ends_its_span_with_the_error(spans: InMemorySpanExporter) -> None:
    engine = FakeEngine()
    async with local_teacher(engine) as teacher:
        client = await connect(teacher.address)
        engine.inject(Fault.RAISE, times=100)
        with pytest.raises(EngineError):
            await client.open(PROMPT, OPTIONS, POLICY).append(span_at(0, 4))
        await client.aclose()
    failed = [one for one in spans.get_finished_spans() if one.name == "teacher append"]
    assert failed
    assert failed[0].status.description == "EngineError"


def test_a_rollout_of_the_trainer_is_a_span_and_its_session_is_below_it(
    spans: InMemorySpanExporter,
) -> None:
    headers: list[str] = []

    def open_session(_: Prompt) -> ScriptedSession:
        headers.append(tracing.traceparent())
        return ScriptedSession()

    with closing(LoopThread()) as loop:
        stream = RolloutStream(
            loop=loop,
            sampler=InMemorySampler(),
            open_session=open_session,
            prompts=PromptOrder([prompt(2, 3)], prompts_per_step=1, seed=0),
            rules={None: rules()},
            budget=FixedBudget(FixedBudgetSettings(max_tokens=4)),
            options=lambda max_tokens: SamplingOptions(max_tokens=max_tokens, num_topk=2),
            rollouts_per_prompt=1,
            max_staleness=0,
            seed=0,
            num_steps=1,
        )
        stream.take(1)
    (rollout,) = spans.get_finished_spans()
    assert (rollout.name, dict(rollout.attributes or {})) == ("rollout", {"step": 0, "index": 0})
    assert [tracing.trace_id_of(h) for h in headers] == [f"{rollout.context.trace_id:032x}"]


async def test_log_lines_name_the_trace(spans: InMemorySpanExporter) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter())
    logging.getLogger().addHandler(handler)
    engine = FakeEngine()
    try:
        async with local_teacher(engine) as teacher:
            client = await connect(teacher.address)
            engine.inject(Fault.CRASH)
            with pytest.raises(EngineError):
                await client.open(PROMPT, OPTIONS, POLICY).append(span_at(0, 4))
            await client.aclose()
    finally:
        logging.getLogger().removeHandler(handler)
    trace_id = spans.get_finished_spans()[0].context.trace_id
    assert f'"trace": "{trace_id:032x}"' in stream.getvalue()


@pytest.mark.parametrize("header", ["", "x" * 55, "00-" + "g" * 32 + "-" + "0" * 16 + "-01", "é"])
def test_a_header_that_is_none_makes_no_span(header: str, spans: InMemorySpanExporter) -> None:
    assert tracing.trace_id_of(header) == ""
    with tracing.append_span(header, 1) as span:
        span.scored(None)  # type: ignore[arg-type]
    assert spans.get_finished_spans() == ()


def test_off_imports_nothing() -> None:
    code = (
        "import sys; from teacher_wire import tracing\n"
        "with tracing.span('x'): assert tracing.traceparent() == ''\n"
        "with tracing.append_span('00-' + '1' * 32 + '-' + '1' * 16 + '-01', 1): pass\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LIMIT_S)
