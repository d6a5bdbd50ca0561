"""A server to look at: fake engine, a byte-level tokenizer, and a folder of runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.recorded_rollouts import MadeUp, rollout, write_step
from tests.faults.live_server import LiveServer, live_server

SPECIALS = ["<|end|>"]
TEXTS = [
    "the teacher reads what the student writes, one token at a time\n",
    "def add(a, b):\n\treturn a + b\n",
    "2 + 2 = 4, 3 * 7 = 21; <b>bold</b> & <script>alert(1)</script>\n",
]
LONG = 16_000
"""Tokens of the longest rollout."""


@dataclass(frozen=True, slots=True)
class Site:
    """What a test needs to know of the server."""

    server: LiveServer
    tokenizer: Tokenizer
    runs: Path
    made: MadeUp

    @property
    def url(self) -> str:
        return f"http://{self.server.http_address}/"

    def row(self, step: int, index: int, num_tokens: int) -> dict[str, Any]:
        """What was recorded of a rollout."""
        return rollout(self.made, step=step, index=index, num_tokens=num_tokens, seed=3)


def byte_level(folder: Path) -> Tokenizer:
    """A small BPE over bytes: what it never saw, such as Chinese, is in pieces of characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIALS[0]})
    )
    return tokenizer


LENGTHS = {(1, 0): 120, (1, 1): 80, (1, 2): 200, (2, 0): 150, (2, 1): 60, (3, 0): LONG}
"""Tokens by step and index."""


@contextmanager
def site(folder: Path) -> Iterator[Site]:
    """A server that shows runs; it ends on leaving."""
    model, runs = folder / "models" / "small-teacher", folder / "runs"
    tokenizer = byte_level(model)
    runs.mkdir()
    vocab_size = tokenizer.get_vocab_size()
    arguments = ("--tokenizer", str(model), "--fake-vocab-size", str(vocab_size))
    arguments += ("--max-context", "20000", "--runs", str(runs))
    with live_server(folder, *arguments) as server:
        info = json.loads(server.get("/v1/info")[1])
        words = tuple(tokenizer.encode("".join(TEXTS) + "水は冷たい é 👩‍👩‍👧 e\u0301 end\n").ids)
        made = MadeUp(vocab_size=vocab_size, special_ids=(0,), words=words)
        shown = Site(server, tokenizer, runs, made)
        for step in {step for step, _ in LENGTHS}:
            rows = [shown.row(step, i, n) for (s, i), n in LENGTHS.items() if s == step]
            write_step(runs / "demo", step, rows, fingerprint=info["tokenizer_fingerprint"])
        yield shown
