"""What a notebook is told when a rollout, or the address of the teacher, cannot be taken.

Run: pytest tests/client/test_teacher_refusals.py
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from teacher_client import RetryLimits, Teacher
from teacher_wire.errors import InvalidRequestError, NotReadyError
from tests.faults.live_server import live_server

pytestmark = pytest.mark.e2e
PROMPT = "37+4*3-8x12>"
REFUSED = {
    0: {"prompt": PROMPT, "response": ""},
    2: {"prompt": PROMPT, "response_ids": []},
    3: {"response": "01"},
}
"""By the schema: the whole request with them is."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Teacher]:
    folder = tmp_path_factory.mktemp("teacher")
    with (
        live_server(folder, program=("tests.client.playground_teacher",)) as running,
        Teacher(running.http_address) as made,
    ):
        yield made


def test_a_rollout_that_the_schema_refuses_takes_no_other_along(teacher: Teacher) -> None:
    good = {"prompt": PROMPT, "response": "01:37"}
    many = [REFUSED.get(index, good) for index in range(6)]
    frame = teacher.analyze(many, k=2, on_error="skip")
    assert frame.groupby("rollout").size().to_dict() == {1: 5, 4: 5, 5: 5}
    assert set(frame.attrs["errors"]) == set(REFUSED)
    assert "response_ids" in frame.attrs["errors"][2]
    assert "prompt" in frame.attrs["errors"][3]
    with pytest.raises(InvalidRequestError) as caught:
        teacher.analyze(many[1:], k=2)
    assert caught.value.__notes__ == ["of rollout 1"]


def test_nobody_at_the_address_is_told_without_streams() -> None:
    limits = RetryLimits(max_resends=1, first_backoff_s=0.001)
    with Teacher("127.0.0.1:1", limits=limits) as nobody:
        with pytest.raises(NotReadyError, match="given up after 1 further attempts: http://127"):
            nobody.info()


@pytest.mark.parametrize("address", ["h:abc", "secret@h:abc", "http://secret@[h"])
def test_an_address_that_is_none_is_named_without_its_token(address: str) -> None:
    with pytest.raises(
        InvalidRequestError, match=r"h(:abc)?' is no address of a teacher"
    ) as caught:
        Teacher(address)
    assert "secret" not in str(caught.value)
