"""Replicas of the shapes in which other systems send a teacher's top-k: bytes from rows, and back.

Shapes only, made from arrays as cheaply as each shape allows: no server of another project runs
here. Theirs start from a Python object a log-prob, which these do not pay for.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from numpy.typing import NDArray

from teacher_server.engine.base import EngineRows

Ids = NDArray[np.int32]
Logprobs = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a learner wants to hold."""

    topk_ids: Ids | None
    """None where the shape does not carry them."""
    topk_logprobs: Logprobs
    token_logprobs: Logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One way to send rows."""

    name: str
    description: str
    encode: Callable[[EngineRows, Ids], bytes]
    decode: Callable[[bytes], Decoded]


def _vllm_encode(rows: EngineRows, token_ids: Ids) -> bytes:
    """A dict a position, one object an entry; position 0 has none."""
    positions: list[dict[str, Any] | None] = [None]
    for ids, logprobs in zip(rows.topk_ids.tolist(), rows.topk_logprobs.tolist(), strict=True):
        positions.append(
            {
                str(token): {"logprob": logprob, "rank": rank, "decoded_token": f" t{token}"}
                for rank, (token, logprob) in enumerate(zip(ids, logprobs, strict=True), start=1)
            }
        )
    choice = {"index": 0, "prompt_logprobs": positions, "prompt_token_ids": token_ids.tolist()}
    return json.dumps({"choices": [choice]}).encode()


def _vllm_decode(raw: bytes) -> Decoded:
    choice = json.loads(raw)["choices"][0]
    positions = choice["prompt_logprobs"][1:]
    ids = np.array([[int(token) for token in entries] for entries in positions], np.int32)
    logprobs = np.array(
        [[entry["logprob"] for entry in entries.values()] for entries in positions], np.float32
    )
    at_tokens = [
        entries[str(token)]["logprob"]
        for entries, token in zip(positions, choice["prompt_token_ids"], strict=True)
    ]
    return Decoded(ids, logprobs, np.array(at_tokens, np.float32))


def _sglang_encode(rows: EngineRows, token_ids: Ids) -> bytes:
    """Triples of log-prob, id and a text that is null."""
    tokens = [
        [logprob, token, None]
        for logprob, token in zip(rows.token_logprobs.tolist(), token_ids.tolist(), strict=True)
    ]
    top = [
        [[logprob, token, None] for logprob, token in zip(logprobs, ids, strict=True)]
        for logprobs, ids in zip(rows.topk_logprobs.tolist(), rows.topk_ids.tolist(), strict=True)
    ]
    meta = {"input_token_logprobs": tokens, "input_top_logprobs": top}
    return json.dumps({"text": "", "meta_info": meta}).encode()


def _sglang_decode(raw: bytes) -> Decoded:
    meta = json.loads(raw)["meta_info"]
    top = meta["input_top_logprobs"]
    return Decoded(
        np.array([[entry[1] for entry in entries] for entries in top], np.int32),
        np.array([[entry[0] for entry in entries] for entries in top], np.float32),
        np.array([entry[0] for entry in meta["input_token_logprobs"]], np.float32),
    )


def _trl_encode(rows: EngineRows, token_ids: Ids) -> bytes:
    answer = {
        "logprobs": [rows.topk_logprobs.tolist()],
        "logprob_token_ids": [rows.topk_ids.tolist()],
        "actual_logprobs": [rows.token_logprobs.tolist()],
    }
    return json.dumps(answer).encode()


def _trl_decode(raw: bytes) -> Decoded:
    answer = json.loads(raw)
    return Decoded(
        np.array(answer["logprob_token_ids"][0], np.int32),
        np.array(answer["logprobs"][0], np.float32),
        np.array(answer["actual_logprobs"][0], np.float32),
    )


def _b64(array: NDArray[Any]) -> str:
    return base64.b64encode(array).decode("ascii")


def _trl_b64_encode(rows: EngineRows, token_ids: Ids) -> bytes:
    answer = {
        "logprobs_b64": _b64(rows.topk_logprobs),
        "token_ids_b64": _b64(rows.topk_ids),
        "actual_logprobs_b64": _b64(rows.token_logprobs),
        "actual_token_ids_b64": _b64(token_ids),
        "shape": rows.topk_ids.shape,
    }
    return json.dumps(answer).encode()


def _trl_b64_decode(raw: bytes) -> Decoded:
    answer = json.loads(raw)

    def array(name: str, dtype: str) -> NDArray[Any]:
        return np.frombuffer(base64.b64decode(answer[name]), dtype)

    return Decoded(
        array("token_ids_b64", "<i4").reshape(answer["shape"]),
        array("logprobs_b64", "<f4").reshape(answer["shape"]),
        array("actual_logprobs_b64", "<f4"),
    )


def _npy_encode(rows: EngineRows, token_ids: Ids) -> bytes:
    """Log-probs at ids that the caller named; the last column is the actual token's."""
    file = io.BytesIO()
    np.save(file, np.concatenate([rows.topk_logprobs, rows.token_logprobs[:, None]], axis=1))
    return json.dumps({"prompt_logprobs": base64.b64encode(file.getvalue()).decode()}).encode()


def _npy_decode(raw: bytes) -> Decoded:
    array = np.load(io.BytesIO(base64.b64decode(json.loads(raw)["prompt_logprobs"])))
    return Decoded(None, array[:, :-1], array[:, -1])


@cache
def _smg_message() -> Any:
    """InputLogProbs: a wrapper message a token, a message of two packed lists a position."""
    field = descriptor_pb2.FieldDescriptorProto
    kinds = {"float": field.TYPE_FLOAT, "int32": field.TYPE_INT32, "uint32": field.TYPE_UINT32}
    shape = {
        "Token": [("value", "float", False)],
        "Top": [("values", "float", True), ("token_ids", "uint32", True)],
        "InputLogProbs": [
            ("token_logprobs", ".replica.Token", True),
            ("token_ids", "int32", True),
            ("top_logprobs", ".replica.Top", True),
        ],
    }
    file = descriptor_pb2.FileDescriptorProto(name="replica.proto", package="replica")
    file.syntax = "proto3"
    for name, fields in shape.items():
        message = file.message_type.add(name=name)
        for number, (field_name, kind, repeated) in enumerate(fields, start=1):
            label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            added = message.field.add(name=field_name, number=number, label=label)
            added.type = kinds.get(kind, field.TYPE_MESSAGE)
            if kind not in kinds:
                added.type_name = kind
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("replica.InputLogProbs"))


def _smg_encode(rows: EngineRows, token_ids: Ids) -> bytes:
    message = _smg_message()()
    message.token_ids.extend(token_ids.tolist())
    for value in rows.token_logprobs.tolist():
        message.token_logprobs.add().value = value
    for ids, logprobs in zip(rows.topk_ids.tolist(), rows.topk_logprobs.tolist(), strict=True):
        top = message.top_logprobs.add()
        top.values.extend(logprobs)
        top.token_ids.extend(ids)
    return message.SerializeToString()  # type: ignore[no-any-return]


def _smg_decode(raw: bytes) -> Decoded:
    message = _smg_message().FromString(raw)
    return Decoded(
        np.array([top.token_ids for top in message.top_logprobs], np.int32),
        np.array([top.values for top in message.top_logprobs], np.float32),
        np.array([token.value for token in message.token_logprobs], np.float32),
    )


SHAPES = (
    Shape(
        name="vllm_json",
        description="vLLM prompt_logprobs, JSON (wire format replica)",
        encode=_vllm_encode,
        decode=_vllm_decode,
    ),
    Shape(
        name="sglang_json",
        description="SGLang input_top_logprobs, JSON triples (wire format replica)",
        encode=_sglang_encode,
        decode=_sglang_decode,
    ),
    Shape(
        name="trl_json",
        description="TRL up to 1.10, JSON lists (wire format replica)",
        encode=_trl_encode,
        decode=_trl_decode,
    ),
    Shape(
        name="trl_b64",
        description="TRL up to 1.10, base64 arrays (wire format replica)",
        encode=_trl_b64_encode,
        decode=_trl_b64_decode,
    ),
    Shape(
        name="npy_b64",
        description="vLLM token-id scoring, base64 .npy of log-probs alone (wire format replica)",
        encode=_npy_encode,
        decode=_npy_decode,
    ),
    Shape(
        name="smg_proto",
        description="vLLM's gRPC server, repeated messages, bytes over HTTP (wire format replica)",
        encode=_smg_encode,
        decode=_smg_decode,
    ),
)
