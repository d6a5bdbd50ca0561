"""The tables of docs/scaling.md: models on GPUs, trainers on teachers, up to 10,000 rollouts.

What is measured stands in docs/gpu.md and docs/benchmarks.md, and is named here as such; the rest
are assumptions, and named as those.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil, sqrt
from typing import Any

from benchmarks.capacity.arithmetic import Forecast, TeacherSpeed, TrainerLoad, forecast
from benchmarks.provenance import ROOT
from vllm_process.model_memory import kv_bytes_per_token, needed_bytes, weights_bytes

DOCUMENT = ROOT / "docs" / "scaling.md"
RESULTS = ROOT / "benchmarks" / "results"
GIB = 2**30

STEP_TOKENS = 8192
FORWARD_1_7B_S, ROWS_S, HEAD_2048_S = 0.084, 0.0263, 0.0071
"""Measured on one H200: a forward pass of 8,192 tokens without head, and of their head and rows
what does not grow with the hidden size, and what does, at 2,048."""
BYTES_PER_S = 4.3e12
"""Measured: one reading of all logits."""
LEARNER_1_7B_TOKENS_PER_S = 20_900
"""Measured: an update of 1.7B in bfloat16 on one H200."""
SERVER_S_A_TOKEN = 9.0e-6
"""Measured: processor time of the server a token, K 32 with candidates and a verdict."""
BYTES_A_TOKEN = 261
"""Measured: both ways, K 32 in f16 with 32 candidates and a verdict (195 without candidates)."""
LAUNCH_S, RANKS_SHARE = 0.005, 0.85
"""Assumed: fixed time of a step beside the reading of the weights; and what several ranks reach of
so many times one."""
CARDS = {"H100, 80 GB": 78.0, "H200": 139.0}
"""GiB that a process sees."""
USED_SHARE = 0.9
"""`gpu_memory_utilization`."""


def _qwen3(hidden: int, width: int, layers: int, heads: int, **other: Any) -> dict[str, Any]:
    shape = {"hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128}
    return {"model_type": "qwen3", "vocab_size": 151_936, **shape, **other}


MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "Qwen3-1.7B": (_qwen3(2048, 6144, 28, 16, tie_word_embeddings=True), 1),
    "Qwen3-8B": (_qwen3(4096, 12_288, 36, 32), 1),
    "Qwen3-30B-A3B": (
        _qwen3(
            2048,
            6144,
            48,
            32,
            model_type="qwen3_moe",
            num_key_value_heads=4,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
        ),
        1,
    ),
    "Qwen3-32B": (_qwen3(5120, 25_600, 64, 64), 2),
}
"""Shape, and ranks of tensor parallelism on an H200."""

LOAD = TrainerLoad(
    rollouts=256,
    tokens_per_s=30.0,
    response_tokens=4096,
    longest_tokens=8192,
    chunk_tokens=32,
    learn_s=256 * 4096 / LEARNER_1_7B_TOKENS_PER_S,
    prompt_tokens=512,
)
"""A trainer with a student of 1.7B: one GPU generates (its rate a rollout is assumed), one learns
(at the rate measured)."""
FLEET_SIZES = (1, 4, 16, 40)
SLOWDOWN = 1.1
"""Of a step, beside that of a trainer with a teacher to itself, that is still called served."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """A model on the GPUs of one replica."""

    config: Mapping[str, Any]
    ranks: int
    card_gib: float

    @property
    def speed(self) -> TeacherSpeed:
        """The measured 1.7B, by the weights that a token passes."""
        forward_s = FORWARD_1_7B_S * _passed(self.config) / _passed(MODELS["Qwen3-1.7B"][0])
        head_s = HEAD_2048_S * self.config["hidden_size"] / 2048
        ranks = 1.0 if self.ranks == 1 else self.ranks * RANKS_SHARE
        # The rows are made by every rank.
        full_s = (forward_s + head_s) / ranks + ROWS_S
        read_s = weights_bytes(self.config, "bfloat16") / self.ranks / BYTES_PER_S
        return TeacherSpeed(
            tokens_per_s=STEP_TOKENS / full_s, step_s=LAUNCH_S + read_s, step_tokens=STEP_TOKENS
        )

    @property
    def kv_tokens(self) -> int:
        """Room beside weights, activations and what else a GPU holds; below 0 where these do not
        fit."""
        need = needed_bytes(
            self.config, "bfloat16", max_model_len=1, tensor_parallel_size=self.ranks
        )
        free = self.card_gib * GIB * USED_SHARE - (need.total_bytes - need.kv_cache_bytes)
        token = kv_bytes_per_token(self.config, "bfloat16", tensor_parallel_size=self.ranks)
        return int(free // token)


def _passed(config: Mapping[str, Any]) -> int:
    """Weights that a token is multiplied with, but for the head."""
    active = dict(config)
    if experts := config.get("num_experts_per_tok"):
        active["num_experts"] = experts
    tables = 1 if config.get("tie_word_embeddings") else 2
    values = weights_bytes(active, "bfloat16") // 2
    return int(values - tables * config["vocab_size"] * config["hidden_size"])


@dataclass(frozen=True, slots=True)
class Plan:
    """Replicas for so many trainers."""

    by_speed: int
    by_memory: int
    said: Forecast

    @property
    def replicas(self) -> int:
        """What both ask for."""
        return max(self.by_speed, self.by_memory)


def plan(teacher: Teacher, load: TrainerLoad, trainers: int) -> Plan:
    """The fewest replicas that serve so many trainers, and hold what their sessions hold."""
    speed, step_s = teacher.speed, load.longest_tokens / load.tokens_per_s + load.learn_s
    least = trainers * load.step_tokens / step_s / speed.most_tokens_per_s
    by_speed = max(1, int(least))
    while (said := forecast(load, trainers=trainers, speed=speed, replicas=by_speed)).step_s > (
        SLOWDOWN * step_s
    ):
        by_speed += 1
    return Plan(by_speed, ceil(_held_tokens(load, trainers, said) / teacher.kv_tokens), said)


def _held_tokens(load: TrainerLoad, trainers: int, said: Forecast) -> float:
    """What open sessions hold at most: one trainer's all of its texts, just before the first of
    them ends; of several, whose phases differ, their mean and two deviations, taken as half of the
    way from a trainer's mean to its most."""
    mean = said.open_sessions / trainers * (load.prompt_tokens + load.response_tokens / 2)
    most = load.rollouts * (load.prompt_tokens + load.response_tokens)
    return trainers * mean + sqrt(trainers) * (most - mean)


def models_table() -> list[str]:
    """Memory and speed of each model."""
    lines = [
        "| model | weights, GiB | KV, KiB a token | GPUs of a replica | room for KV, tokens | "
        "of sessions with 2,560 | tokens/s |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    for name, (config, ranks) in MODELS.items():
        weights = weights_bytes(config, "bfloat16") / GIB
        token = kv_bytes_per_token(config, "bfloat16") / 1024
        for card, gib in CARDS.items():
            number = ranks
            while (teacher := Teacher(config, number, gib)).kv_tokens < 50_000:
                number *= 2
            lines.append(
                f"| {name} | {weights:.1f} | {token:.0f} | {number} x {card} | "
                f"{teacher.kv_tokens:,} | {teacher.kv_tokens // 2560:,} | "
                f"{teacher.speed.most_tokens_per_s:,.0f} |"
            )
    return lines


@cache
def _plans() -> dict[tuple[str, int], Plan]:
    return {
        (name, trainers): plan(Teacher(config, ranks, CARDS["H200"]), LOAD, trainers)
        for name, (config, ranks) in MODELS.items()
        for trainers in FLEET_SIZES
    }


def fleets_table() -> list[str]:
    """Replicas for a number of trainers, and what flows."""
    lines = [
        "| teacher | trainers | rollouts | tokens/s | open sessions | replicas by speed "
        "| by memory | H200s | a step, s | a server's core | network, Mbit/s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (name, trainers), made in _plans().items():
        said = made.said
        core = said.tokens_per_s / made.replicas * SERVER_S_A_TOKEN
        lines.append(
            f"| {name} | {trainers} | {trainers * LOAD.rollouts:,} | {said.tokens_per_s:,.0f} | "
            f"{said.open_sessions:,.0f} | {made.by_speed} | {made.by_memory} | "
            f"{made.replicas * MODELS[name][1]} | {said.step_s:.0f} | {core:.2f} | "
            f"{said.tokens_per_s * BYTES_A_TOKEN * 8 / 1e6:,.0f} |"
        )
    return lines


def seen_table() -> list[str]:
    """The arithmetic beside the simulation, from its result file."""
    result = json.loads((RESULTS / "capacity.json").read_text("utf-8"))
    lines = [
        "| fleet | used | tokens/s | seen | a step, s | seen | open sessions | seen "
        "| an append, s | seen |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, arm in result["arms"].items():
        figures = {key: value["median"] for key, value in arm["figures"].items()}
        cells = [f"{figures['forecast_used_share']:.0%}"]
        for figure, form in (
            ("tokens_per_s", ".0f"),
            ("step_s", ".1f"),
            ("open_sessions", ".1f"),
            ("append_s", ".2f"),
        ):
            share = figures[figure] / figures[f"forecast_{figure}"]
            cells += [format(figures[f"forecast_{figure}"], form)]
            cells += [f"{format(figures[figure], form)} ({share:.2f})"]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return lines


def day_table() -> list[str]:
    """What a day of trainers that come and go came to, from its result file."""
    day = json.loads((RESULTS / "capacity-day.json").read_text("utf-8"))["day"]
    limits, most, memory = day["limits"], day["most"], day["rss_mb_by_hour"]
    rows = [
        ("rows asked for", f"{day['rows_asked']:,}", ""),
        ("of trainers that were gone before the answer", f"{day['given_up_rows']:,}", ""),
        ("rows lost", f"{day['rows_lost']}", "0"),
        ("errors; refusals", f"{len(day['errors'])}; {len(day['refused'])}", "0"),
        (
            "rollouts; appends; steps",
            f"{day['rollouts']:,}; {day['appends']:,}; {day['steps']:,}",
            "",
        ),
        (
            "trainers; of them gone without a word",
            f"{day['trainers']}; {day['killed']}",
            "",
        ),
        ("open sessions, at most", f"{most['sessions']:.0f}", f"{limits['--max-sessions']}"),
        (
            "tokens in the queue, at most",
            f"{most['queued_tokens']:,.0f}",
            f"{limits['--max-queued-tokens']:,}",
        ),
        (
            "queries in the engine, at most",
            f"{most['in_the_engine']:.0f}",
            f"{limits['--max-running']}",
        ),
        ("names of trainers that metrics know", f"{day['tenants']}", "32 and `other`"),
        (
            "sessions, queue and replies left at the end",
            f"{sum(day['left'].values()):.0f}",
            "0",
        ),
        (
            "memory of the server, MB: first hour, most, last hour",
            f"{memory[0]:.1f}, {max(memory):.1f}, {memory[-1]:.1f}",
            "",
        ),
    ]
    return ["| | seen | bound |", "|---|---:|---|", *(f"| {' | '.join(row)} |" for row in rows)]


TABLES: dict[str, Callable[[], Sequence[str]]] = {
    "models": models_table,
    "fleets": fleets_table,
    "seen": seen_table,
    "day": day_table,
}


def with_tables(text: str) -> str:
    """A document with each table anew, between its two comments."""
    for name, table in TABLES.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if len(mark.findall(text)) != 1:
            raise ValueError(f"{DOCUMENT.name} must have one <!-- {name} --> with its <!-- end -->")
        body = "\n".join(table())
        text = mark.sub(lambda found, body=body: f"{found[1]}{body}\n{found[2]}", text)
    return text


def write_tables() -> None:
    """Into the document."""
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text("utf-8")), "utf-8")
