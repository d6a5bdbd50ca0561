"""Messages of one stream in any order are answered as a model of the sessions says.

Row 8 of the fault table, part e. Run: pytest tests/faults/test_fuzz_order.py; `make fuzz` does
more.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from teacher_wire import codec
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.pb import teacher_pb2_grpc as pb_grpc
from tests.faults.live_server import LiveServer, live_server
from tests.faults.scrape import Scrape
from tests.faults.streams import append_message, hello, open_message, span_at
from tests.rounds import ROUNDS
from tests.waiting import LIMIT_S

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(ROUNDS.timeout_s)]

STEPS = 40
NAMES = st.sampled_from(("a", "b", "never"))
MAX_CONTEXT, MAX_APPEND = 256, 32
PROMPT_TOKENS = 5


class Stream:
    """A stream whose every message waits for its answer; an answer that does not come fails."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        stub = pb_grpc.TeacherServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._out: queue.SimpleQueue[pb.SessionRequest | None] = queue.SimpleQueue()
        self.call = stub.Session(iter(self._out.get, None))

    def tell(self, message: pb.SessionRequest) -> None:
        self._out.put(message)

    def hear(self) -> pb.SessionResponse:
        # The call has no deadline: it is cut here when nothing comes.
        timer = threading.Timer(LIMIT_S, self.call.cancel)
        timer.start()
        try:
            return next(self.call)
        finally:
            timer.cancel()

    def ask(self, message: pb.SessionRequest) -> pb.SessionResponse:
        self.tell(message)
        return self.hear()

    def end(self) -> None:
        """In good order: a stream that breaks leaves its sessions, to be resumed."""
        self._out.put(None)
        with pytest.raises(StopIteration):
            self.hear()
        self._channel.close()


class Conversation(RuleBasedStateMachine):
    """Knows of each open session how long it is and where it was opened."""

    server: LiveServer

    @initialize()
    def greet(self) -> None:
        self.stream = Stream(self.server.address)
        assert self.stream.ask(hello("order")).HasField("welcome")
        self.lengths: dict[str, int] = {}
        self.bases: dict[str, int] = {}

    def refused(self, message: pb.SessionRequest, error: str) -> pb.Error:
        answer = self.stream.ask(message)
        assert answer.WhichOneof("message") == "error", answer
        assert answer.error.type == error, answer.error
        return answer.error

    @rule(name=NAMES.filter(lambda name: name != "never"), scored=st.integers(0, 3))
    def open(self, name: str, scored: int) -> None:
        """Opening again replaces."""
        ids = codec.encode_ids(span_at(0, scored).token_ids)
        drift = pb.DriftState(num_tokens=scored) if scored else None
        answer = self.stream.ask(open_message(name, scored_ids=ids, drift=drift))
        assert answer.opened.next_offset == scored, answer
        self.lengths[name] = self.bases[name] = scored

    @rule(name=NAMES, jump=st.integers(-8, 8), tokens=st.integers(0, MAX_APPEND + 1))
    def append(self, name: str, jump: int, tokens: int) -> None:
        length = self.lengths.get(name, 0)
        offset = max(0, length + jump) if jump > 4 or jump < -4 else length
        message = append_message(name, span_at(offset, tokens))
        if name not in self.lengths:
            self.refused(message, "SessionNotFoundError")
        elif not 1 <= tokens <= MAX_APPEND:
            self.refused(message, "InvalidRequestError")
        elif offset > length:
            error = self.refused(message, "SessionOffsetError")
            assert error.expected_offset == length
        elif offset < self.bases[name]:
            error = self.refused(message, "SessionOffsetError")
            assert error.expected_offset == self.bases[name]
        elif PROMPT_TOKENS + offset + tokens > MAX_CONTEXT:
            self.refused(message, "InvalidRequestError")
        else:
            scores = codec.decode_scores([self.stream.ask(message).scores])
            assert (scores.rows.offset, len(scores.rows)) == (offset, tokens)
            self.lengths[name] = offset + tokens

    @rule(name=NAMES)
    def close(self, name: str) -> None:
        """Closing twice, or what was never open, is no error."""
        message = pb.SessionRequest(close=pb.Close(session_id=name))
        assert self.stream.ask(message).closed.session_id == name
        self.lengths.pop(name, None)

    @rule(amount=st.sampled_from((0, 1, 2**64 - 1)))
    def credit(self, amount: int) -> None:
        """Has no answer; the next message shows that it did no harm."""
        self.stream.tell(pb.SessionRequest(credit=pb.Credit(bytes=amount)))

    @rule()
    def say_nothing(self) -> None:
        self.refused(pb.SessionRequest(), "InvalidRequestError")

    @rule()
    def greet_again(self) -> None:
        self.refused(hello("order"), "InvalidRequestError")

    @rule(name=st.sampled_from(("a", "b")))
    def open_wrongly(self, name: str) -> None:
        """A refused open leaves what was open."""
        self.refused(open_message(name, prompt_ids=b""), "InvalidRequestError")

    @precondition(lambda self: len(self.lengths) > 0)
    @rule()
    def start_over(self) -> None:
        """Sessions end with the stream that opened them."""
        self.stream.end()
        self.greet()

    def teardown(self) -> None:
        if hasattr(self, "stream"):
            self.stream.end()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    limits = ("--max-append-tokens", str(MAX_APPEND), "--max-context", str(MAX_CONTEXT))
    folder: Path = tmp_path_factory.mktemp("order")
    with live_server(folder, *limits) as running:
        yield running


def test_any_order_is_answered_as_the_model_says(server: LiveServer) -> None:
    class Here(Conversation):
        pass

    Here.server = server
    machine = Here.TestCase
    machine.settings = settings(
        max_examples=max(10, int(ROUNDS.fuzz_cases * 0.10 / STEPS)),
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    machine("runTest").runTest()
    assert server.process.poll() is None
    assert server.get("/readyz")[0] == 200
    assert Scrape(server).value("teacher_errors_total", type="EngineError") == 0
