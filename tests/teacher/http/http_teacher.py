"""A teacher behind its HTTP side, in memory: fake engine, real scheduler and sessions."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from typing import Any

import httpx
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from teacher_server.access.caller import TenantOf
from teacher_server.admission.scheduler import Scheduler, SchedulerLimits
from teacher_server.engine.fake_engine import FakeEngine
from teacher_server.http import middleware
from teacher_server.http.app import create_app
from teacher_server.http.deps import HttpDeps
from teacher_server.metrics.server import Metrics
from teacher_server.scoring.sessions import SessionTable
from teacher_server.scoring.texts import Texts
from teacher_wire.records import Scores, TeacherInfo

SYMBOLS = "0123456789+*=; é"
SPECIALS = ["<|bos|>", "<|eos|>"]
V = len(SYMBOLS) + len(SPECIALS)
TEMPLATE = """{% for message in messages %}{% if message.role == "tool" %}\
{{ raise_exception("no tools here") }}{% endif %}{{ message.content }};{% endfor %}\
{% if add_generation_prompt %}{{ "=" * (times or 1) }}{% endif %}"""
PROMPT, RESPONSE = [0, 1, 10], [2, 12, 5, 13, 7, 7]

INFO = TeacherInfo(
    model_id="fake",
    revision="",
    weights_digest="w" * 64,
    dtype="float32",
    vocab_size=V,
    tokenizer_fingerprint="t" * 64,
    special_token_ids=(V - 2, V - 1),
    max_k=V,
    max_context=4096,
    engine="fake",
    engine_version="1",
    instance_id="i",
    max_sessions=8,
    # Below the length of RESPONSE, so that a whole response takes more than one append.
    max_append_tokens=4,
)


@functools.cache
def symbol_tokenizer() -> PreTrainedTokenizerFast:
    """One token a symbol."""
    vocabulary = {token: i for i, token in enumerate([*SYMBOLS, *SPECIALS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIALS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=SPECIALS[0], chat_template=TEMPLATE
    )


class TroubledSessions(SessionTable):
    """A session table that can be told to fail, or to let a number through that is not finite."""

    failure: Exception | None = None
    poison: float | None = None

    async def score_in_pieces(self, *args: Any, **kwargs: Any) -> AsyncIterator[Scores]:
        if self.failure is not None:
            raise self.failure
        async for scores in super().score_in_pieces(*args, **kwargs):
            if self.poison is not None and not scores.rows.offset:
                scores.rows.token_logprobs[2] = self.poison
            yield scores


class Teacher:
    """One application, its parts, and a client."""

    def __init__(
        self,
        *,
        has_tokenizer: bool = True,
        authenticate: TenantOf | None = None,
        max_body_bytes: int = middleware.MAX_BODY_BYTES,
        kept_bytes: int = 1 << 20,
        **options: Any,
    ) -> None:
        """`options`: further fields of HttpDeps."""
        self.engine = FakeEngine(vocab_size=V, max_k=V)
        self.metrics = Metrics()
        scheduler = Scheduler(self.engine, SchedulerLimits())
        self.sessions = TroubledSessions(scheduler, INFO, metrics=self.metrics)
        self.texts = Texts(self.sessions, metrics=self.metrics, max_bytes=kept_bytes)
        self.is_ready = True
        deps = HttpDeps(
            info=INFO,
            sessions=self.sessions,
            texts=self.texts,
            ready=lambda: self.is_ready,
            metrics=self.metrics,
            tokenizer=symbol_tokenizer() if has_tokenizer else None,
            authenticate=authenticate,
            **options,
        )
        self.app = create_app(deps, max_body_bytes=max_body_bytes)
        transport = httpx.ASGITransport(app=self.app)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://teacher")

    async def post(self, path: str, content: dict[str, Any]) -> httpx.Response:
        return await self.client.post(path, json=content)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a response, which must have the one shape."""
    content = response.json()
    assert set(content) == {"error"}
    assert set(content["error"]) == {"type", "reason", "message", "retryable", "retry_after_ms"}
    return content["error"]


def no_constants(name: str) -> None:
    """For json.loads: NaN and the infinities are not JSON."""
    raise AssertionError(f"{name} left the server as a JSON number")
