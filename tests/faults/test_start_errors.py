"""What can be foreseen at a start is one line that names cause and remedy, with a documented exit
code; what cannot keeps its traceback in a file that it names.

Ports in use and bad settings: test_lifecycle.py. Run: pytest tests/faults/test_start_errors.py
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.rounds import in_the_long_round
from tests.teacher.engine.engine_models import write_tiny_model

pytestmark = pytest.mark.e2e

START_S = 120
LOADS_TORCH = ("--engine hf --model {folder}", "--engine hf --model {folder}/no-model")
CLI = (sys.executable, "-m", "teacher_server.cli", "serve", "--engine", "fake")
REFUSED = {
    "--ready-file {folder}/absent/ready": "there is no folder '{folder}/absent': make it first",
    "--ready-file {folder}": "that is a folder: name a file in it",
    "--tls-cert {folder}/no.pem --tls-key {folder}/no.key": "tls_cert is '{folder}/no.pem': No",
    "--tenants-file {folder}/no.toml": "tenants_file {folder}/no.toml: ",
    LOADS_TORCH[1]: "cannot read the checkpoint '{folder}/no-model': ",
    LOADS_TORCH[0]: "cannot read the checkpoint '{folder}': ",
    "--engine vllm --model {folder} --hf-sessions 3": "hf_sessions is 3, which engine 'vllm' does",
}


def complaints(stderr: str) -> list[str]:
    """All but what the log says of what it is doing."""
    return [line for line in stderr.splitlines() if " INFO " not in line]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(arguments, marks=in_the_long_round if arguments in LOADS_TORCH else ())
        for arguments in REFUSED
    ],
)
def test_what_the_operator_can_mend_is_one_line(arguments: str, tmp_path: Path) -> None:
    command = [*CLI, *arguments.format(folder=tmp_path).split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = complaints(done.stderr)
    assert line.startswith("teacher-server: ")
    assert REFUSED[arguments].format(folder=tmp_path) in line


def test_a_weight_file_that_the_user_may_not_read_is_named_in_one_line(tmp_path: Path) -> None:
    """A student that another user saved. Here root gives up what lets it read any file."""
    model = write_tiny_model(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.chmod(0)
    command = [*CLI, "--engine", "hf", "--model", str(model)]
    if os.geteuid() == 0:
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert line == (
        f"teacher-server: cannot read the checkpoint '{model}': {weights} cannot be read by user "
        f"{os.geteuid()}: Permission denied: let the user that runs this read it (chmod a+r)"
    )


def test_a_hub_that_does_not_answer_may_be_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers makes of it is an OSError with the connection's beneath: exit 1, not 2."""
    from preflight.network import is_network
    from teacher_server import cli
    from teacher_server.process import app

    def unreachable(config: object) -> None:
        try:
            urllib.request.urlopen("http://127.0.0.1:1/")
        except OSError as error:
            raise OSError("We couldn't connect to load the files") from error

    free = ["--grpc-port", "0", "--http-port", "0"]
    monkeypatch.setattr(app, "build_engine", unreachable)
    assert cli.main(["serve", "--engine", "fake", *free]) == 1
    monkeypatch.setattr(app, "build_engine", lambda config: Path("/no/such").read_text())
    assert cli.main(["serve", "--engine", "fake", *free]) == 2
    assert not is_network(OSError("no such model"))


@in_the_long_round
def test_weights_that_cannot_be_read_end_the_start_with_1_and_one_line_for_it(
    tmp_path: Path,
) -> None:
    model = write_tiny_model(tmp_path / "model")
    # Whole by its header, so that only whoever loads it finds out.
    header = b'{"a": {"dtype": "none", "shape": [0], "data_offsets": [0, 0]}}'
    for weights in model.glob("*.safetensors"):
        weights.write_bytes(len(header).to_bytes(8, "little") + header)
    command = [*CLI, "--engine", "hf", "--model", str(model), "--grpc-port", "0"]
    command += ["--http-port", "0", "--log-level", "warning"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [
        line
        for line in done.stderr.splitlines()
        if "ERROR teacher_server.process.lifecycle" in line
    ]
    assert f"the engine did not start: transformers cannot load {model}: " in line


@in_the_long_round
@pytest.mark.vllm
def test_vllm_that_does_not_start_has_its_cause_in_the_last_line(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    command = [*CLI[:-1], "vllm", "--model", str(model), "--max-context", "192", "--max-k", "16"]
    command += ["--enforce-eager", "--cpu-cores", "0", "--kv-cache-gib", "1000000"]
    command += ["--grpc-port", "0", "--http-port", "0"]
    env = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, env=env)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert f"the engine did not start: vLLM cannot serve {model}: ValueError: Available" in line
    found = re.search(r"; its output is in (\S+)$", line)
    assert found
    assert "Traceback" in Path(found[1]).read_text()


def test_a_full_disk_under_its_standard_output_is_one_line_of_the_log(tmp_path: Path) -> None:
    command = [*CLI, "--grpc-port", "0", "--http-port", "0", "--log-level", "warning"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    cause = "standard output cannot be told the addresses: No space left on device"
    lines = complaints(done.stderr)
    assert lines[-1].endswith(f"ends with exit code 1: {cause}")
    assert all(cause in line for line in lines)


def test_a_full_disk_under_its_log_costs_lines_and_nothing_else(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    command = [*CLI, "--grpc-port", "0", "--http-port", "0", "--ready-file", str(ready)]
    with Path("/dev/full").open("w") as full:
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=full)
    try:
        give_up = time.monotonic() + START_S
        while not ready.exists():
            assert server.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.01)
        server.send_signal(signal.SIGTERM)
        assert server.wait(START_S) == 0
    finally:
        server.kill()
        server.wait()


def test_what_nobody_foresaw_is_one_line_and_a_traceback_in_a_file(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from teacher_server import cli\n"
        "from teacher_server.process import app\n"
        "app.describe = lambda *_: 1 / 0\n"
        "sys.exit(cli.main(['serve', '--engine', 'fake']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 1
    (line,) = complaints(done.stderr)
    found = re.fullmatch(
        r"teacher-server: ZeroDivisionError: division by zero; its traceback is in (.+), for .*",
        line,
    )
    assert found
    assert Path(found[1]).read_text().startswith("Traceback")
