"""The replicas of a teacher: which are up, a stream to each of those, and who serves whom. No
torch, no sessions.

Every endpoint is kept by a task of its own, which connects, waits until the stream is of no more
use, and connects again after a back-off with jitter. Who needs a stream names a session and gets
the endpoint that rendezvous hashing ranks highest among those that are up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from teacher_client.agreement import Agreement
from teacher_client.rendezvous import ranked
from teacher_client.retry import BrokenStreamError, RetryLimits, backoff_s
from teacher_client.stream import Handshake, TeacherStream
from teacher_wire.errors import (
    CapacityError,
    FingerprintMismatchError,
    InvalidRequestError,
    NotReadyError,
    TeacherError,
)
from teacher_wire.records import TeacherInfo

log = logging.getLogger(__name__)

_SAME_TEACHER = ("weights_digest", "dtype", "vocab_size", "tokenizer_fingerprint")
"""Two servers that differ in one of these give different rows."""
_SAME_NAME = ("model_id", "revision")
"""What stands for the weights of a teacher without a digest."""
_SHARED_LIMITS = ("max_k", "max_context", "max_append_tokens")
"""A session that moves must fit where it moves to."""

_ATTEMPT_S = 10.0
"""A connection that takes longer is given up and tried anew."""
_SETTLE_S = 1.0
"""How long the first replica waits for the others, so that the first sessions spread over all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One endpoint at one moment."""

    address: str
    up: bool
    losses: int
    """Streams to it that broke, or that it said goodbye to."""


class _Endpoint:
    """One replica as it is now."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.stream: TeacherStream | None = None
        """None while it is not up."""
        self.tried = False
        self.losses = 0
        self.missed = False
        """A person was told that it is not up."""
        self.answers = False
        """It has shaken hands, and is being compared with the others."""
        self.trouble: TeacherError = NotReadyError(f"{address} has not answered yet")
        """Why it is not up."""

    @property
    def up(self) -> bool:
        return self.stream is not None and self.stream.usable

    @property
    def refused(self) -> bool:
        """It answers, but not as the teacher of this run; time does not mend that."""
        return not self.up and not isinstance(self.trouble, NotReadyError | CapacityError)


class TeacherEndpoints:
    """Streams to the replicas of one teacher."""

    def __init__(
        self,
        addresses: Sequence[str],
        handshake: Handshake,
        *,
        connect_timeout_s: float,
        absent_timeout_s: float | None,
        limits: RetryLimits,
        agreement: Agreement[TeacherStream] | None = None,
    ) -> None:
        """The times to wait for the first replica, and for one when all are gone in mid-run; None
        waits for ever. With an agreement every replica of several is compared with the first one
        that answered before it is used. Nothing is connected before `start`."""
        if not addresses:
            raise InvalidRequestError("endpoints is empty, must name at least one teacher")
        if len(set(addresses)) < len(addresses):
            raise InvalidRequestError(f"endpoints names one twice: {', '.join(addresses)}")
        self._endpoints = {address: _Endpoint(address) for address in addresses}
        self._handshake = handshake
        self._connect_timeout_s = connect_timeout_s
        self._attempt_s = min(connect_timeout_s, _ATTEMPT_S)
        self._absent_timeout_s = absent_timeout_s
        self._limits = limits
        self._agreement = agreement if len(addresses) > 1 else None
        self._info: TeacherInfo | None = None
        self._settled = False
        """The limits that the run counts on are known; a replica may not have lower ones."""
        self._changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._keepers: list[asyncio.Task[None]] = []
        self._failure: BaseException | None = None
        self._absence_told = False
        self.num_failovers = 0
        """Sessions that went on at another endpoint than the one they were on."""
        self._retiring: dict[asyncio.Task[None], TeacherStream] = {}
        self._closed = False

    async def start(self) -> None:
        """Returns after the first handshake; the other replicas get a second to follow, and those
        that have answered the time to be compared. One that does not answer is warned of.

        Raises NotReadyError naming the endpoints when none is ready in time, and
        FingerprintMismatchError when one of them refuses or differs from the others.
        """
        try:
            await self._start()
        except BaseException:
            await self.aclose()
            raise

    @property
    def info(self) -> TeacherInfo:
        """What the teacher serves; of its limits the lowest among the first replicas."""
        if self._info is None:
            raise NotReadyError("the client is not connected")
        return self._info

    @property
    def replicas(self) -> list[Replica]:
        """Every endpoint as it is now; may be asked from any thread."""
        return [
            Replica(address=each.address, up=each.up, losses=each.losses)
            for each in self._endpoints.values()
        ]

    async def stream_for(self, key: str) -> TeacherStream:
        """The stream to the endpoint that is up and ranked highest for this key.

        Waits for one. Raises NotReadyError when none is up in time, and FingerprintMismatchError or
        what else they say when every one of them refuses this client.
        """
        timeout_s = self._absent_timeout_s
        give_up = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        while True:
            if self._closed:
                raise NotReadyError("the client is closed")
            if self._failure is not None:
                raise self._failure
            for address in ranked(key, self._endpoints):
                stream = self._endpoints[address].stream
                if stream is not None and stream.usable:
                    return stream
            if all(endpoint.refused for endpoint in self._endpoints.values()):
                refusal = next(iter(self._endpoints.values())).trouble
                raise type(refusal)(self._troubles())
            if not await self._change(give_up):
                raise self._absent(timeout_s)

    async def aclose(self) -> None:
        """Ends every stream; who waits for one gets NotReadyError."""
        self._closed = True
        self._tell()
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        retiring = dict(self._retiring)
        streams = [endpoint.stream for endpoint in self._endpoints.values()]
        open_streams = [stream for stream in (*streams, *retiring.values()) if stream is not None]
        await asyncio.gather(*(stream.aclose() for stream in open_streams))
        await asyncio.gather(*retiring, return_exceptions=True)

    async def _start(self) -> None:
        timeout_s = self._connect_timeout_s
        endpoints = self._endpoints.values()
        for endpoint in endpoints:
            keeper = asyncio.create_task(self._keep(endpoint))
            keeper.add_done_callback(self._keeper_ended)
            self._keepers.append(keeper)
        give_up = asyncio.get_running_loop().time() + timeout_s
        while not any(endpoint.up for endpoint in endpoints):
            self._refuse_strangers()
            if self._failure is not None:
                raise self._failure
            if not await self._change(give_up):
                raise self._absent(timeout_s)
        settled = asyncio.get_running_loop().time() + _SETTLE_S
        while not all(endpoint.tried for endpoint in endpoints):
            compared = any(endpoint.answers for endpoint in endpoints)
            if not await self._change(max(settled, give_up) if compared else settled):
                break
        self._refuse_strangers()
        self._settled = True
        for endpoint in endpoints:
            self._miss(endpoint)

    def _refuse_strangers(self) -> None:
        for endpoint in self._endpoints.values():
            if endpoint.refused:
                raise endpoint.trouble

    async def _keep(self, endpoint: _Endpoint) -> None:
        loop = asyncio.get_running_loop()
        attempt = 0
        while not self._closed:
            began = loop.time()
            connected = await self._serve(endpoint)
            # A server that drops its clients at once is waited for like one that is absent.
            if connected and loop.time() - began > self._limits.max_backoff_s:
                attempt = 0
            await asyncio.sleep(backoff_s(self._limits, attempt))
            attempt += 1

    async def _serve(self, endpoint: _Endpoint) -> bool:
        """Keeps one stream from its handshake to its end; False when there was no handshake."""
        try:
            stream = await self._connected(endpoint)
        except TeacherError as error:
            self._note(endpoint, error)
            return False
        endpoint.stream, endpoint.tried = stream, True
        if self._absence_told or endpoint.missed:
            self._absence_told = endpoint.missed = False
            log.warning("%s is up", endpoint.address)
        self._tell()
        await stream.until_unusable()
        endpoint.stream = None
        endpoint.losses += 1
        task = asyncio.create_task(_retire(stream))
        self._retiring[task] = stream
        task.add_done_callback(self._retiring.pop)
        self._note(endpoint, stream.broken or NotReadyError(f"{endpoint.address} goes away"))
        return True

    async def _connected(self, endpoint: _Endpoint) -> TeacherStream:
        address = endpoint.address
        stream, info = await TeacherStream.connect(address, self._handshake, self._attempt_s)
        try:
            self._accept(address, info)
            if self._agreement is not None:
                endpoint.answers = True
                await self._compared(self._agreement, address, stream, info)
        except BaseException:
            await stream.aclose()
            raise
        finally:
            endpoint.answers = False
        return stream

    async def _compared(
        self,
        agreement: Agreement[TeacherStream],
        address: str,
        stream: TeacherStream,
        info: TeacherInfo,
    ) -> None:
        """Raises FingerprintMismatchError for other rows than the first replica's, and what a text
        that cannot be scored now comes to."""
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await agreement.check(address, stream, info)
        except (BrokenStreamError, TimeoutError) as error:
            raise NotReadyError(
                f"{address} has not scored the text by which replicas are compared, within "
                f"{self._connect_timeout_s:.1f} s: {error or 'no answer'}"
            ) from error

    def _accept(self, address: str, info: TeacherInfo) -> None:
        first = self._info or info
        names = _SAME_TEACHER if first.weights_digest else (*_SAME_NAME, *_SAME_TEACHER)
        for name in names:
            before, now = getattr(first, name), getattr(info, name)
            if before != now:
                raise FingerprintMismatchError(
                    f"{address} now serves {name} {now!r}, the run began with {before!r} (models "
                    f"{info.model_id!r} and {first.model_id!r})"
                )
        lowest = {name: min(getattr(first, name), getattr(info, name)) for name in _SHARED_LIMITS}
        for name, value in lowest.items():
            if self._settled and value < getattr(first, name):
                raise FingerprintMismatchError(
                    f"{address} allows {name} {value}, the run counts on {getattr(first, name)}"
                )
        self._info = replace(info, **lowest)

    def _note(self, endpoint: _Endpoint, trouble: TeacherError) -> None:
        new = trouble.message != endpoint.trouble.message
        endpoint.trouble, endpoint.tried = trouble, True
        if new:
            level = logging.ERROR if endpoint.refused else logging.INFO
            log.log(level, "%s is not used: %s", endpoint.address, trouble.message)
        if self._settled:
            self._miss(endpoint)
        if not self._absence_told and not any(other.up for other in self._endpoints.values()):
            self._absence_told = True
            log.warning("no teacher is up: %s", self._troubles())
        self._tell()

    def _miss(self, endpoint: _Endpoint) -> None:
        """Says once that a replica is away while others are up: nothing else would show it."""
        num_up = sum(other.up for other in self._endpoints.values())
        if num_up and not endpoint.missed and not endpoint.up and not endpoint.refused:
            endpoint.missed = True
            log.warning(
                "%s is not up, its sessions go on at the %d of %d that are: %s",
                endpoint.address,
                num_up,
                len(self._endpoints),
                endpoint.trouble.message,
            )

    def _absent(self, waited_s: float | None) -> NotReadyError:
        names = ", ".join(self._endpoints)
        return NotReadyError(
            f"no teacher at {names} is ready after {waited_s:.1f} s: {self._troubles()}"
        )

    def _troubles(self) -> str:
        return "; ".join(endpoint.trouble.message for endpoint in self._endpoints.values())

    def _tell(self) -> None:
        """Wakes all who wait for a change."""
        self._changed.set_result(None)
        self._changed = asyncio.get_running_loop().create_future()

    async def _change(self, give_up: float | None) -> bool:
        """Returns after the next change; False when it is past the time to give up."""
        left = None if give_up is None else give_up - asyncio.get_running_loop().time()
        if left is not None and left <= 0:
            return False
        await asyncio.wait({self._changed}, timeout=left)
        return True

    def _keeper_ended(self, keeper: asyncio.Task[None]) -> None:
        """A keeper ends by being cancelled; a mistake in it must not leave anybody waiting."""
        if not keeper.cancelled():
            self._failure = keeper.exception()
            self._tell()


async def _retire(stream: TeacherStream) -> None:
    """Lets a stream that goes away answer what it still owes, then closes it."""
    while stream.busy and stream.broken is None:
        await asyncio.sleep(0.05)
    await stream.aclose()
