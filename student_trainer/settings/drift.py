"""Settings of the drift policy: one section a metric. What one means is in docs/methods.md.

Defaults and ranges are those of the records that travel to the teacher, which are the paper's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from student_trainer.settings.section import Section
from teacher_wire.drift_metrics import MAX_DRIFT_K, MIN_SHARE, OverlapRatio, TeacherTopPAccept
from teacher_wire.records import DriftPolicy

Share = Annotated[float, Field(ge=MIN_SHARE, le=1)]


class DriftSection(Section):
    """What every metric has."""

    k: int = Field(OverlapRatio().k, gt=0, le=MAX_DRIFT_K)
    """Leading entries of student and teacher that are compared."""
    w_drop: Share = DriftPolicy().w_drop
    """Reliability lost a bad event."""
    stop_in_flight: bool = DriftPolicy().stop_in_flight
    """Stop a rollout at the first position where its reliability is 0."""


class OverlapRatioSettings(DriftSection):
    metric: Literal["overlap_ratio"] = "overlap_ratio"
    threshold: Share = OverlapRatio().threshold
    """Overlap ratio below which a position is a bad event."""


class TeacherTopPAcceptSettings(DriftSection):
    metric: Literal["teacher_top_p_accept"]
    top_p: Share = TeacherTopPAccept().top_p
    """Mass of the teacher's nucleus; a token outside is a bad event."""


_AnyMetric = OverlapRatioSettings | TeacherTopPAcceptSettings
_BY_METRIC: dict[str, type[DriftSection]] = {
    get_args(section.model_fields["metric"].annotation)[0]: section
    for section in get_args(_AnyMetric)
}


def _of_its_metric(settings: Any) -> Any:
    """Settings without a metric have the usual one; what the metric does not read is refused."""
    if not isinstance(settings, dict):
        return settings
    metric = settings.get("metric", OverlapRatio.name)
    section = _BY_METRIC.get(metric) if isinstance(metric, str) else None
    if section is None:
        return settings  # which the union refuses
    unread = []
    for name in settings.keys() - section.model_fields.keys():
        readers = [of for of, other in _BY_METRIC.items() if name in other.model_fields]
        if readers:
            problem = PydanticCustomError(
                "unread_setting",
                "is read by metric {readers} only; metric is {metric}",
                {"readers": " and ".join(readers), "metric": metric},
            )
            unread.append(InitErrorDetails(type=problem, loc=(name,), input=settings[name]))
    if unread:
        raise ValidationError.from_exception_data("drift", unread)
    return section.model_validate(settings)


DriftSettings = Annotated[
    _AnyMetric, Field(discriminator="metric"), BeforeValidator(_of_its_metric)
]
