"""Messages of a Session stream as bytes, several in one where the other side accepts that.

A write costs grpc.aio the same few hundred microseconds whatever it holds, and the answers of one
engine step are ready together, as are the appends of one step of a sampler.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError

from teacher_wire.codec import MAX_REPLY_BYTES
from teacher_wire.errors import InvalidRequestError
from teacher_wire.pb import teacher_pb2 as pb

MAX_BATCH_MESSAGES = 1024
_MAX_ENCODED_BYTES = MAX_REPLY_BYTES
MAX_BATCH_BYTES = _MAX_ENCODED_BYTES - 8 * MAX_BATCH_MESSAGES
"""Of the messages in a batch, framing aside; one that is larger goes by itself."""


_REQUEST_BATCH_TAG = b"\x32"
"""SessionRequest.batch, field 6, length-delimited."""
_RESPONSE_BATCH_TAG = b"\x3a"
"""SessionResponse.batch, field 7."""
_ELEMENT_TAG = b"\x0a"
"""RequestBatch.requests and ResponseBatch.responses, field 1."""


def encode_requests(requests: list[bytes]) -> bytes:
    """One SessionRequest that holds all of these; at least one."""
    return requests[0] if len(requests) == 1 else _framed(_REQUEST_BATCH_TAG, requests)


def encode_responses(responses: list[bytes]) -> bytes:
    """One SessionResponse that holds all of these; at least one."""
    return responses[0] if len(responses) == 1 else _framed(_RESPONSE_BATCH_TAG, responses)


def slow_encode_requests(requests: list[bytes]) -> bytes:
    """What encode_requests writes for several, by protobuf itself."""
    batch = pb.RequestBatch(requests=requests).SerializeToString()
    return pb.SessionRequest(batch=batch).SerializeToString()


def slow_encode_responses(responses: list[bytes]) -> bytes:
    """What encode_responses writes for several, by protobuf itself: it copies each three times, and
    takes 600 us for eight answers of 25 kB instead of 20."""
    return pb.SessionResponse(batch=pb.ResponseBatch(responses=responses)).SerializeToString()


def _framed(tag: bytes, messages: list[bytes]) -> bytes:
    elements: list[bytes] = []
    for message in messages:
        elements += (_ELEMENT_TAG, _varint(len(message)), message)
    return b"".join((tag, _varint(sum(map(len, elements))), *elements))


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def decode_request(raw: bytes) -> pb.SessionRequest:
    """Without content when the bytes are no message: what that means is for the reader to say."""
    try:
        return pb.SessionRequest.FromString(raw)
    except DecodeError:
        return pb.SessionRequest()


def decode_requests(raw: bytes) -> list[tuple[pb.SessionRequest, int]]:
    """The messages in one, each with its size in bytes; a batch in a batch stays one.

    Raises InvalidRequestError for a batch that is too large, holds too many or cannot be read.
    """
    message = decode_request(raw)
    if not message.HasField("batch"):
        return [(message, len(raw))]
    size = len(message.batch)
    if size > _MAX_ENCODED_BYTES:
        raise InvalidRequestError(f"a batch has {size} bytes, the limit is {_MAX_ENCODED_BYTES}")
    try:
        requests = pb.RequestBatch.FromString(message.batch).requests
    except DecodeError:
        raise InvalidRequestError("a batch cannot be read") from None
    if len(requests) > MAX_BATCH_MESSAGES:
        raise InvalidRequestError(
            f"a batch has {len(requests)} messages, the limit is {MAX_BATCH_MESSAGES}"
        )
    return [(decode_request(one), len(one)) for one in requests]


def decode_responses(raw: bytes) -> list[tuple[pb.SessionResponse, int]]:
    """The messages in one, each with its size in bytes. Raises DecodeError."""
    message = pb.SessionResponse.FromString(raw)
    if not message.HasField("batch"):
        return [(message, len(raw))]
    return [(pb.SessionResponse.FromString(one), len(one)) for one in message.batch.responses]
