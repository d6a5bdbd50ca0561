"""A teacher in a notebook: rollouts in, one table of their tokens out, over HTTP. No torch.

`Teacher` for scripts and notebooks, `AsyncTeacher` for code with an event loop; the same questions.
Rollouts that grow are for `TeacherClient`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar

import httpx

from teacher_client.http_messages import told
from teacher_client.questions import Asking, OnError, Policy, Questions
from teacher_wire.errors import TeacherError

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")


class Teacher:
    """One teacher, asked without an event loop; use it as a context manager, or close it.

    Every method raises the TeacherError that the teacher answered, after trying again where that
    can help: NotReadyError when nobody answers, DeadlineError after timeout_s without an answer,
    AccessError for a token or certificate that cannot be used.
    """

    def __init__(self, address: str, **how: Any) -> None:
        """`address` is that of the HTTP port, such as "127.0.0.1:8080", or a URL, whose user part
        is the token: "https://TOKEN@teacher.example".

        Further: `token`, which stands before that of the address; `access`, a TeacherAccess with
        certificates or a token in a file; `timeout_s` (600) of one request; `limits`, a
        RetryLimits.
        """
        self._questions = Questions(address, **how)
        self._client = httpx.Client(**self._questions.client_options())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connections."""
        self._client.close()

    def info(self) -> dict[str, Any]:
        """What the teacher serves, its limits, and whether it knows texts."""
        return self._run(self._questions.info())

    def analyze(
        self,
        rollouts: Any = None,
        *,
        k: int = 8,
        temperature: float = 1.0,
        policy: Policy | None = None,
        on_error: OnError = "raise",
        **common: Any,
    ) -> pd.DataFrame:
        """One row for each token of each rollout, numbered in `rollout`.

        `rollouts` is what teacher_client.rollout_items takes: mappings, texts or ids, or a table.
        `common` is what all share: prompt, messages, prompt_ids, add_special_tokens,
        chat_template_kwargs; or, without rollouts, all of one. A rollout that the teacher does not
        answer raises its error, or with on_error "skip" stands in `attrs["errors"]`.
        """
        asked = {"k": k, "temperature": temperature, **common}
        return self._run(self._questions.table(rollouts, policy, on_error, **asked))

    def reports(
        self,
        rollouts: Any = None,
        *,
        k: int = 8,
        temperature: float = 1.0,
        policy: Policy | None = None,
        **common: Any,
    ) -> list[dict[str, Any]]:
        """As analyze, without pandas: one AnalyzeReply of /openapi.json a rollout, in columns."""
        asked = {"k": k, "temperature": temperature, **common}
        return self._run(self._questions.reports(rollouts, policy, **asked))

    def compare(
        self,
        responses: Any,
        *,
        policies: Sequence[Policy] = (),
        k: int = 8,
        temperature: float = 1.0,
        on_error: OnError = "raise",
        **prompt: Any,
    ) -> pd.DataFrame:
        """Several responses to one prompt, each scored once and judged by every policy: one row a
        token, response and policy. `prompt` is one of prompt, messages, prompt_ids."""
        asked = {"k": k, "temperature": temperature, **prompt}
        return self._run(self._questions.comparison(responses, policies, on_error, **asked))

    def _run(self, asking: Asking[T]) -> T:
        try:
            step = next(asking)
            while True:
                if isinstance(step, float):
                    time.sleep(step)
                    step = asking.send(None)
                    continue
                try:
                    with told(step.where, self._questions.timeout_s):
                        reply = self._client.request(**step.arguments)
                except TeacherError as error:
                    step = asking.throw(error)
                else:
                    step = asking.send(reply)
        except StopIteration as end:
            answer: T = end.value
            return answer


class AsyncTeacher:
    """As Teacher, for code with an event loop: `async with AsyncTeacher(address) as teacher`."""

    def __init__(self, address: str, **how: Any) -> None:
        self._questions = Questions(address, **how)
        self._client = httpx.AsyncClient(**self._questions.client_options())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends the connections."""
        await self._client.aclose()

    async def info(self) -> dict[str, Any]:
        """As Teacher.info."""
        return await self._run(self._questions.info())

    async def analyze(
        self,
        rollouts: Any = None,
        *,
        k: int = 8,
        policy: Policy | None = None,
        on_error: OnError = "raise",
        **common: Any,
    ) -> pd.DataFrame:
        """As Teacher.analyze."""
        return await self._run(self._questions.table(rollouts, policy, on_error, k=k, **common))

    async def reports(
        self, rollouts: Any = None, *, k: int = 8, policy: Policy | None = None, **common: Any
    ) -> list[dict[str, Any]]:
        """As Teacher.reports."""
        return await self._run(self._questions.reports(rollouts, policy, k=k, **common))

    async def compare(
        self,
        responses: Any,
        *,
        policies: Sequence[Policy] = (),
        k: int = 8,
        on_error: OnError = "raise",
        **prompt: Any,
    ) -> pd.DataFrame:
        """As Teacher.compare."""
        asking = self._questions.comparison(responses, policies, on_error, k=k, **prompt)
        return await self._run(asking)

    async def _run(self, asking: Asking[T]) -> T:
        try:
            step = next(asking)
            while True:
                if isinstance(step, float):
                    await asyncio.sleep(step)
                    step = asking.send(None)
                    continue
                try:
                    with told(step.where, self._questions.timeout_s):
                        reply = await self._client.request(**step.arguments)
                except TeacherError as error:
                    step = asking.throw(error)
                else:
                    step = asking.send(reply)
        except StopIteration as end:
            answer: T = end.value
            return answer
