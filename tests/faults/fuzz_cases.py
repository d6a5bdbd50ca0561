"""What a hostile or broken client may send. Every generator is a function of its Random alone."""

from __future__ import annotations

import json
import math
import random
import struct
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from teacher_wire import codec
from teacher_wire.pb import teacher_pb2 as pb
from tests.faults.streams import PROMPT, append_message, batch_of, open_message, span_at

NUMBERS = (0, 1, 2, 3, 5, 16, 127, 128, 255, 256, 4096, 2**31 - 1, 2**31, 2**32 - 1)
DOUBLES = (0.0, -0.0, 1.0, -1.0, 1e-320, 1e308, math.inf, -math.inf, math.nan, 0.5, 1e-9)
NAMES = ("s", "t", "", "x" * 300, "a\x00b", "\n", "né", "../..", "%s%n")
_DEEP = "deep"
"""Stands for lists in lists: json.dumps would not write so many."""
LEAKS = ("Traceback", 'File "', ".py", "site-packages")
"""What no client may be told."""
H2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def valid_messages() -> list[pb.SessionRequest]:
    """A conversation that a server likes, and all of it in one message."""
    messages = [
        open_message("s"),
        append_message("s", span_at(0, 5, k=16)),
        append_message("s", span_at(5, 7, k=16), deadline_ms=1000),
        pb.SessionRequest(credit=pb.Credit(bytes=1000)),
        pb.SessionRequest(close=pb.Close(session_id="s")),
    ]
    return [*messages, pb.SessionRequest(batch=batch_of(messages))]


def score_request() -> pb.ScoreRequest:
    """One that is answered."""
    opened = open_message("s").open
    return pb.ScoreRequest(
        prompt_ids=codec.encode_ids(PROMPT),
        span=codec.encode_span(span_at(0, 6)),
        options=opened.options,
        policy=opened.policy,
        run_id="fuzz",
    )


def mutated(rng: random.Random, raw: bytes) -> bytes:
    """Bytes that were a message once."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at:at] = rng.randbytes(rng.randint(1, 8))
        elif kind == 2:
            del data[at : at + rng.randint(1, 16)]
        elif kind == 3:
            data[at:at] = data[at : at + rng.randint(1, 64)]
        elif kind == 4:
            data[at : at + 1] = b"\xff" * rng.randint(1, 10)  # varints that do not end
        elif kind == 5:
            del data[at:]
        else:
            data = bytearray(rng.randbytes(rng.randint(0, 200)))
    return bytes(data)


def hostile(rng: random.Random, kind: type[Message], like: Message | None = None) -> Message:
    """A message that parses, with lengths and numbers that nobody meant."""
    message = kind()
    if like is not None:
        message.CopyFrom(like)
    for field in message.DESCRIPTOR.fields:
        if rng.random() < (0.25 if like is not None else 0.7):
            _fill(rng, message, field)
    return message


def _fill(rng: random.Random, message: Message, field: FieldDescriptor) -> None:
    if field.message_type is not None:
        if not field.is_repeated:
            below = getattr(message, field.name)
            below.CopyFrom(hostile(rng, type(below), below if rng.random() < 0.6 else None))
            below.SetInParent()
        return
    value: Any
    if field.type == FieldDescriptor.TYPE_BYTES:
        value = _hostile_bytes(rng, getattr(message, field.name))
    elif field.type == FieldDescriptor.TYPE_STRING:
        value = rng.choice(NAMES)
    elif field.type == FieldDescriptor.TYPE_DOUBLE:
        value = rng.choice(DOUBLES)
    elif field.type == FieldDescriptor.TYPE_BOOL:
        value = rng.random() < 0.5
    elif field.type == FieldDescriptor.TYPE_ENUM:
        value = rng.choice((0, 1, 2, 3, 99, -1))
    else:
        value = rng.choice(NUMBERS)
    if not field.is_repeated:
        setattr(message, field.name, value)


def _hostile_bytes(rng: random.Random, now: bytes) -> bytes:
    kind = rng.randrange(6)
    if kind == 0:
        return now[:-1]
    if kind == 1:
        return now + rng.randbytes(rng.randint(1, 5))
    if kind == 2:
        return b""
    if kind == 3:
        count = rng.randint(1, 300)
        ids = (rng.choice((0, 1, 511, 512, -1, 2**31 - 1, -(2**31))) for _ in range(count))
        return struct.pack(f"<{count}i", *ids)
    if kind == 4:
        return bytes(rng.choice((1, 4, 1024, 40_000)))
    return rng.randbytes(rng.randint(1, 64))


def hostile_request(rng: random.Random) -> pb.SessionRequest:
    """A hostile message of a session that was valid, or one made up."""
    if rng.random() < 0.8:
        like = rng.choice(valid_messages())
        kind = str(like.WhichOneof("message"))
        if kind == "batch":
            return _hostile_batch(rng)
        below = getattr(like, kind)
        request = pb.SessionRequest()
        getattr(request, kind).CopyFrom(hostile(rng, type(below), below))
        return request
    request = hostile(rng, pb.SessionRequest)
    assert isinstance(request, pb.SessionRequest)
    return request


def _hostile_batch(rng: random.Random) -> pb.SessionRequest:
    """Of valid, hostile and broken messages, of too many, or of batches."""
    kind = rng.randrange(4)
    if kind == 0:
        return pb.SessionRequest(batch=mutated(rng, batch_of(valid_messages())))
    if kind == 1:
        return pb.SessionRequest(batch=batch_of([pb.SessionRequest()] * rng.choice((30, 2000))))
    if kind == 2:
        messages = [hostile_request(rng) for _ in range(rng.randint(1, 5))]
        return pb.SessionRequest(batch=batch_of(messages))
    return pb.SessionRequest(batch=batch_of(valid_messages()[::-1]))


def _frame(rng: random.Random) -> bytes:
    """An HTTP/2 frame, right or wrong."""
    payload = rng.randbytes(rng.choice((0, 4, 5, 6, 8, 40)))
    length = len(payload) if rng.random() < 0.7 else rng.choice((0, 1, 2**14 + 1, 2**24 - 1))
    kind = rng.randrange(12)
    stream = rng.choice((0, 1, 2, 3, 2**31 - 1))
    return (
        struct.pack(">I", length)[1:]
        + bytes((kind, rng.randrange(256)))
        + struct.pack(">I", stream)
        + payload
    )


def garbage(rng: random.Random) -> bytes:
    """What is no gRPC at all, or only at first."""
    kind = rng.randrange(5)
    if kind == 0:
        return rng.randbytes(rng.randint(1, 400))
    if kind == 1:
        return H2_PREFACE[: rng.randint(1, len(H2_PREFACE))]
    if kind == 2:
        return b"GET / HTTP/1.1\r\nHost: x\r\n" + rng.randbytes(30) + b"\r\n\r\n"
    settings = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    return H2_PREFACE + settings + b"".join(_frame(rng) for _ in range(rng.randint(1, 12)))


SCORED = {"prompt_ids": [1, 2, 3], "response_ids": [4, 5], "k": 4}
HTTP_BODIES: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("/v1/score", SCORED, ("candidate_ids", "policy", "temperature", "event_mask")),
    ("/v1/analyze", SCORED, ("candidate_ids", "policy", "temperature", "items", "messages")),
    ("/v1/analyze", {"items": [SCORED, SCORED]}, ("k", "policy")),
    (
        "/v1/compare",
        {"prompt_ids": [1], "responses": [{"response_ids": [4, 5]}], "policies": [{}]},
        ("messages", "temperature"),
    ),
    (
        "/v1/completions",
        {"prompt": [[1, 2, 3], [4]], "max_tokens": 1, "prompt_logprobs": 3},
        ("temperature", "echo", "logprobs", "stream", "n"),
    ),
    (
        "/inference/v1/generate",
        {"token_ids": [1, 2, 3], "sampling_params": {"prompt_logprobs": 1}},
        ("features", "request_id", "return_token_ids"),
    ),
    (
        "/generate",
        {"input_ids": [1, 2, 3], "return_logprob": True, "logprob_start_len": 0},
        ("token_ids_logprob", "token_ids_logprob_positions", "top_logprobs_num", "text"),
    ),
    (
        "/get_sequence_logprobs/",
        {"sequences": [[1, 2, 3]], "prompt_lengths": [1], "top_logprobs": 3},
        ("temperature", "response_format"),
    ),
)
"""Paths with a body that each likes, and further fields of it."""


def http_body(rng: random.Random) -> tuple[str, bytes]:
    """A path, and a body that it likes bent byte by byte or in its values."""
    path, liked, others = rng.choice(HTTP_BODIES)
    value = dict(liked)
    if rng.random() < 0.5:
        name = rng.choice((*value, *others))
        value[name] = rng.choice((None, True, -1, math.inf, 10**30, "x", [], {"a": {}}, _DEEP))
    depth = rng.choice((1, 60, 5000))
    deep = "[" * depth + "]" * depth
    raw = json.dumps(value).replace(json.dumps(_DEEP), deep).encode()
    return path, mutated(rng, raw) if rng.random() < 0.5 else raw
