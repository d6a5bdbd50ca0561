"""README's two commands, as printed, where their models and their data are.

The models are random and small, in folders of the names that the commands use; the data are eight
rows; ports are free ones and the run is two steps long. Everything else is as printed: two real
programs, vLLM in both. Run: make try
"""

from __future__ import annotations

import json
import os
import shutil
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tests.test_configs import ROOT, printed_commands

pytestmark = [pytest.mark.e2e, pytest.mark.vllm]

PAD, EOS = "<pad>", "<eos>"
CHARACTERS = f"{string.digits}{string.ascii_letters} +-*/=?.\n"
TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
STEPS = 2


def write_model(folder: Path, *, seed: int) -> None:
    """A random Qwen3 whose tokens are all about as likely, so that a response ends by itself."""
    tokens = [PAD, EOS, *CHARACTERS]
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokens.index(EOS),
        pad_token_id=tokens.index(PAD),
        dtype="bfloat16",
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = models.WordLevel({token: i for i, token in enumerate(tokens)}, PAD)
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([PAD, EOS])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=PAD
    )
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder with the repository's configurations, the models, and eight problems."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    write_model(tmp_path / "Qwen" / "Qwen3-0.6B", seed=0)
    write_model(tmp_path / "Qwen" / "Qwen3-4B", seed=1)
    (tmp_path / "data").mkdir()
    rows = [
        {"messages": [{"role": "user", "content": f"What is {i} + {i}?"}], "answer": str(2 * i)}
        for i in range(8)
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "data" / "dapo-math-17k.jsonl").write_text(lines)
    return tmp_path


def program(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "proto"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


@contextmanager
def teacher(machine: Path, arguments: list[str]) -> Iterator[str]:
    """The teacher's address, once it serves."""
    ready, log = machine / "ready.json", machine / "teacher.log"
    ports = ["--grpc-port", "0", "--http-port", "0", "--ready-file", str(ready)]
    command = program("teacher_server.cli", *arguments, *ports)
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=machine, env=environment(), stdout=output, stderr=output
        )
        try:
            while not ready.exists():
                assert process.poll() is None, log.read_text()
                time.sleep(0.2)
            yield json.loads(ready.read_text())["grpc_address"]
        finally:
            process.terminate()
            process.wait(60)


@pytest.mark.timeout(900)
def test_the_readmes_two_commands_train_on_eight_rows(machine: Path) -> None:
    commands = printed_commands()
    with teacher(machine, commands["teacher-server"]) as address:
        overrides = [f'teacher.endpoints=["{address}"]', f"run.steps={STEPS}"]
        arguments = [part for override in overrides for part in ("--set", override)]
        done = subprocess.run(
            program("student_trainer.cli", *commands["student-trainer"], *arguments),
            cwd=machine,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (machine / "runs").iterdir()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["step"] for record in steps] == [1, 2]
    assert all(record["rollouts"] == 32 and record["loss"] > 0 for record in steps)
    assert (run / "student" / "model.safetensors").is_file()
