"""Settings of the teachers: where one is, and what it is asked for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from student_trainer.settings.drift import OverlapRatioSettings, TeacherTopPAcceptSettings
from student_trainer.settings.section import MayChange, Section, default_kind
from teacher_wire.drift_metrics import OverlapRatio

ENDPOINT = re.compile(r"([^\s/:\[\]]+|\[[0-9a-fA-F:.]+\]):([0-9]{1,5})")
"""host:port, an IPv6 address in brackets."""


class TeacherSettings(Section):
    """Where the teacher is, and what it is asked for."""

    endpoints: Annotated[tuple[str, ...], MayChange()] = Field(min_length=1)
    """host:port of each replica; all serve the same weights, sessions spread over those that are
    up."""
    max_replica_gap_nats: Annotated[float | None, MayChange()] = Field(None, gt=0)
    """Largest difference between two replicas' log-probs of the same text, before the first
    rollout and whenever one comes back, nats; a tenth of it on average. None: 0.001 for a teacher
    in float32, else 0.5."""
    k: int = Field(64, gt=0)
    """Size of the teacher's top-k in every row (K). At temperature 1, 16 entries of a language
    model hold 0.90 of its mass, 32 hold 0.94 and 64 hold 0.96 (measured)."""
    logprob_dtype: Literal["f16", "f32"] = "f32"
    """Of the log-probs on the wire; f16 halves their bytes and rounds them."""
    connect_timeout_s: Annotated[float, MayChange()] = Field(60.0, gt=0)
    """Seconds a teacher may be away before the run does not start, or on_absent applies."""
    on_absent: Literal["wait", "finish_unscored", "fail"] = "wait"
    """When every replica stays away: wait for one; end the rollouts without the scores that are
    missing, and learn from what was scored; or end the run."""
    token_file: Annotated[Path | None, MayChange()] = None
    """File with the bearer token alone. Without it DRIFTLINE_TEACHER_TOKEN_FILE names the file, or
    DRIFTLINE_TEACHER_TOKEN holds the token."""
    tls_ca: Annotated[Path | None, MayChange()] = None
    """PEM file of the CA of the teacher's certificate; without it there is no TLS."""
    tls_cert: Annotated[Path | None, MayChange()] = None
    """PEM file of the trainer's own certificate, for a teacher with mutual TLS."""
    tls_key: Annotated[Path | None, MayChange()] = None
    """PEM file of its private key."""

    @field_validator("endpoints")
    @classmethod
    def _are_addresses(cls, endpoints: tuple[str, ...]) -> tuple[str, ...]:
        for endpoint in endpoints:
            match = ENDPOINT.fullmatch(endpoint)
            if match is None or not 1 <= int(match[2]) <= 65535:
                scheme = ", without a scheme: it is gRPC, and tls_ca alone makes it TLS"
                raise ValueError(
                    f"{endpoint!r} must be host:port, such as 127.0.0.1:50051"
                    f"{scheme if '://' in endpoint else ''}"
                )
            try:
                match[1].encode("idna")
            except UnicodeError as error:
                raise ValueError(
                    f"{endpoint!r} names no host: what is between its dots must have 1 to 63 "
                    "letters"
                ) from error
        if twice := [one for one in endpoints if endpoints.count(one) > 1]:
            raise ValueError(f"{twice[0]!r} is named twice, must be one endpoint of each replica")
        return endpoints

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key must be given together")
        if self.tls_cert is not None and self.tls_ca is None:
            raise ValueError("tls_cert needs tls_ca: without it there is no TLS")
        return self


class NamedTeacherSettings(TeacherSettings):
    """A further teacher, of the rows whose `teacher` is its name; its vocabulary may be wider or
    narrower than the student's and differ in a few tokens, which then take no part in the run."""

    loss_weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """What a token of its rollouts counts in the loss, where one of `[teacher]` counts 1."""
    drift: Annotated[
        OverlapRatioSettings | TeacherTopPAcceptSettings | None,
        Field(discriminator="metric"),
        default_kind("metric", OverlapRatio.name),
    ] = None
    """Its own drift policy, of the same k; none: that of `[drift]`."""


TeacherName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""As a row's `teacher` says it, and a bare key of TOML may be."""
