"""How many trainers and rollouts a teacher serves, as arithmetic. Pure.

A teacher computes in steps: each takes a fixed time and a time for every token in it. A trainer
generates many rollouts at once, each at its own rate, has them scored meanwhile, then learns for a
while, during which it asks for nothing. So trainers share the teacher as machines share a repairer
who works for all that wait at once: with n of N at their rollouts each gets its own rate, or an
nth of what the teacher can, whichever is less. How often n are, follows from the balance between n
and n + 1 (birth and death), whatever the distribution of the learning times.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, comb, log, sqrt

STEADY_ROUNDS = 200
"""At most, until the numbers of bursts in a step are as often as they stay."""
SETTLED = 1e-6

SHARP = 8
"""How soon what is less of a limit stops counting beside what is more of one: at 0.75 of it, a
hundredth is left. Fitted once to the simulation, not derived."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSpeed:
    """What one replica's engine can."""

    tokens_per_s: float
    """Of a step's tokens, beyond its fixed time."""
    step_s: float
    """Fixed time of a step: launches, and the weights read once."""
    step_tokens: int
    """The most tokens of a step (`max_num_batched_tokens`)."""

    @property
    def most_tokens_per_s(self) -> float:
        """Of full steps."""
        return self.step_tokens / (self.step_s + self.step_tokens / self.tokens_per_s)

    def step_seconds(self, tokens: float) -> float:
        """Of a step with so many tokens."""
        return self.step_s + tokens / self.tokens_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerLoad:
    """What one trainer asks for."""

    rollouts: int
    """At once; a step learns from all of them."""
    tokens_per_s: float
    """That each rollout is generated at."""
    response_tokens: float
    """Mean length."""
    longest_tokens: float
    """Mean length of the longest rollout of a step, which the step waits for."""
    chunk_tokens: int
    """`rollout.chunk_tokens`."""
    learn_s: float
    """Mean time of learning and of the weights' way, in which nothing is asked for."""
    prompt_tokens: float = 0.0

    @property
    def step_tokens(self) -> float:
        """Response tokens of a step."""
        return self.rollouts * self.response_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What the arithmetic says of trainers on a teacher."""

    tokens_per_s: float
    """Scored, of all trainers together."""
    step_s: float
    """From the first token of a step to the first of the next one."""
    open_sessions: float
    """Mean, of all trainers."""
    append_s: float
    """Mean time of an append, from being sent to being answered."""
    used_share: float
    """Of the teacher's most tokens a second."""
    alone_step_s: float
    """Of a trainer with a teacher to itself."""

    @property
    def slowdown(self) -> float:
        """Time of a step over that with a teacher of its own."""
        return self.step_s / self.alone_step_s


def forecast(
    load: TrainerLoad, *, trainers: int, speed: TeacherSpeed, replicas: int = 1
) -> Forecast:
    """Trainers alike on replicas alike, over which the sessions of each are spread."""
    times = [
        _rollouts_s(load, present, _fullest(present, load.rollouts, replicas), speed)
        for present in range(1, trainers + 1)
    ]
    alone_s = times[0][0] + load.learn_s
    shares = _presence(load.learn_s, [seconds for seconds, _ in times])
    ends_per_s = sum(
        share * present / times[present - 1][0] for present, share in enumerate(shares) if present
    )
    mean_open = sum(
        share * present * load.rollouts * times[present - 1][1].open_share
        for present, share in enumerate(shares)
        if present
    )
    # An append is as likely to be made at a time as there are trainers that make them.
    weights = [present * share for present, share in enumerate(shares)][1:]
    appends = [weight / wait.between_s for weight, (_, wait) in zip(weights, times, strict=True)]
    waits = [wait.append_s for _, wait in times]
    scored = ends_per_s * load.step_tokens
    return Forecast(
        tokens_per_s=scored,
        step_s=trainers / ends_per_s,
        open_sessions=mean_open,
        append_s=sum(n * s for n, s in zip(appends, waits, strict=True)) / sum(appends),
        used_share=scored / (replicas * speed.most_tokens_per_s),
        alone_step_s=alone_s,
    )


@dataclass(frozen=True, slots=True)
class _Wait:
    append_s: float
    between_s: float
    """From one append of a rollout to its next."""
    open_share: float
    """Of the time of a step's rollouts, in which one of them has a session: from its first append
    to the answer of its last."""

    def towards(self, other: _Wait, share: float) -> _Wait:
        """So much of another, the rest of this."""
        pairs = zip(
            (self.append_s, self.between_s, self.open_share),
            (other.append_s, other.between_s, other.open_share),
            strict=True,
        )
        return _Wait(*((1 - share) * mine + share * its for mine, its in pairs))


def _fullest(present: int, rollouts: int, replicas: int) -> float:
    """Trainers' worth of sessions on the replica that has most: sessions fall where their names
    say, and a step waits for the last of its rollouts."""
    share = 1 / replicas
    spread = sqrt(share * (1 - share) / (present * rollouts))
    return present * (share + 0.68 * sqrt(2 * log(replicas)) * spread)


def _rollouts_s(
    load: TrainerLoad, present: int, on_a_replica: float, speed: TeacherSpeed
) -> tuple[float, _Wait]:
    """Seconds of a trainer's rollouts while `present` trainers are at theirs, and its waits.

    A rollout sends what has come since its last append, once that is answered and chunk_tokens are
    there: so it is held up by no more than its last append, unless the teacher is the limit.
    """
    generate_s = load.longest_tokens / load.tokens_per_s
    first_s = load.chunk_tokens / load.tokens_per_s
    asked = on_a_replica * load.step_tokens
    """Tokens, of all trainers present on this replica."""
    bursts_s = _append_s(load, present, on_a_replica / present, speed)
    append_s = max(bursts_s, 1.5 * _cycle_s(asked / generate_s, speed))
    seconds = generate_s + append_s
    open_share = load.response_tokens / load.longest_tokens
    appends, rate = _growing(load, on_a_replica * load.rollouts * open_share, speed)
    limited_s = asked / rate
    unhindered = _Wait(
        append_s,
        max(first_s, append_s),
        (load.response_tokens / load.tokens_per_s + append_s - first_s) / seconds,
    )
    # Each of the rollouts gets the same rate, so that short ones end first.
    waits_s = limited_s * open_share / appends
    limit = _Wait(waits_s, waits_s, open_share)
    wait = unhindered.towards(limit, limited_s**SHARP / (limited_s**SHARP + seconds**SHARP))
    return _either(seconds, limited_s), wait


def _either(first_s: float, second_s: float) -> float:
    """The longer, and more where they are about as long: what is the limit then changes by the
    moment."""
    return float((first_s**SHARP + second_s**SHARP) ** (1 / SHARP))


def _cycle_s(offered_tokens_per_s: float, speed: TeacherSpeed) -> float:
    """Of steps that follow each other, each with what came during the one before it."""
    full = speed.step_seconds(speed.step_tokens)
    share = offered_tokens_per_s / speed.tokens_per_s
    return min(full, speed.step_s / (1 - share)) if share < 1 else full


def _append_s(load: TrainerLoad, trainers: int, part: float, speed: TeacherSpeed) -> float:
    """Mean time of an append where the teacher keeps up; `part` of each trainer's rollouts are on
    this replica.

    The rollouts of a trainer begin together, so their appends come together, in bursts; the last
    append of each comes alone. A step takes what came during the one before it, or else the next to
    come.
    """
    rollouts = part * load.rollouts
    bursts = load.longest_tokens / load.chunk_tokens
    gap_s = load.longest_tokens / load.tokens_per_s / (bursts + rollouts)
    mean_tokens = rollouts * load.response_tokens / (bursts + rollouts)
    more_tokens = rollouts * load.chunk_tokens - mean_tokens
    """Of a burst, which most appends are in, beyond the mean of what comes at once."""
    lengths = [
        speed.step_seconds(min(n * mean_tokens, speed.step_tokens)) for n in range(trainers + 1)
    ]
    # comes[m][n]: that n bursts come while a step has m, whose trainers send none.
    comes = [
        _binomial(trainers - m, min(1.0, lengths[m] / gap_s)) if m else []
        for m in range(trainers + 1)
    ]
    often = [0.0, 1.0] + [0.0] * (trainers - 1)
    for _ in range(STEADY_ROUNDS):
        after = [0.0] * (trainers + 1)
        for m in range(1, trainers + 1):
            for n, chance in enumerate(comes[m]):
                after[max(n, 1)] += often[m] * chance
        moved = max(abs(now - before) for now, before in zip(after, often, strict=True))
        often = after
        if moved < SETTLED:
            break
    waited = come = 0.0
    for m in range(1, trainers + 1):
        for n, chance in enumerate(comes[m]):
            residual_s = lengths[m] / 2 if n else 0.0
            own_s = lengths[max(n, 1)] + more_tokens / speed.tokens_per_s
            waited += often[m] * chance * max(n, 1) * (residual_s + own_s)
            come += often[m] * chance * max(n, 1)
    return waited / come


def _binomial(number: int, chance: float) -> list[float]:
    return [comb(number, n) * chance**n * (1 - chance) ** (number - n) for n in range(number + 1)]


def _growing(load: TrainerLoad, open_sessions: float, speed: TeacherSpeed) -> tuple[float, float]:
    """Appends of a rollout where the teacher is the limit, and tokens a second of that teacher.

    While an append waits for those of the others its successor grows. Half of the appends are in a
    step and half wait for it, so that steps are not full before appends have grown. The last append
    counts as the part of its size that it has.
    """
    left, size, appends, seconds = load.response_tokens, float(load.chunk_tokens), 0.0, 0.0
    while left > 0:
        step_tokens = min(speed.step_tokens, open_sessions * size / 2)
        rate = step_tokens / speed.step_seconds(step_tokens)
        part = min(1.0, left / size)
        wait_s = open_sessions * size / rate
        appends += part
        seconds += part * wait_s
        left -= size
        size = max(load.chunk_tokens, wait_s * load.tokens_per_s)
    return appends, open_sessions * load.response_tokens / seconds


def _presence(learn_s: float, rollouts_s: list[float]) -> list[float]:
    """How often 0, 1, ... of the trainers are at their rollouts, from the time that these take for
    1, 2, ... of them."""
    trainers = len(rollouts_s)
    weights = [1.0]
    for present, seconds in enumerate(rollouts_s, start=1):
        begin_per_s = (trainers - present + 1) / learn_s if learn_s else float("inf")
        weights.append(weights[-1] * begin_per_s * seconds / present)
    if learn_s == 0:
        return [0.0] * trainers + [1.0]
    total = sum(weights)
    return [weight / total for weight in weights]


def most_trainers(
    load: TrainerLoad, *, speed: TeacherSpeed, replicas: int = 1, slowdown: float = 1.1
) -> int:
    """The most trainers that take at most `slowdown` times a step of their own; 0 for none."""
    found = 0
    limit = 2 + ceil(
        2 * replicas * speed.most_tokens_per_s * (load.learn_s + 1) / load.step_tokens
        + 2 * replicas * speed.most_tokens_per_s / (load.rollouts * load.tokens_per_s)
    )
    for trainers in range(1, limit + 1):
        said = forecast(load, trainers=trainers, speed=speed, replicas=replicas)
        if said.slowdown > slowdown:
            break
        found = trainers
    return found
