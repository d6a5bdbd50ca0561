"""`teacher-server doctor` on things that are really broken, and `serve`, which refuses the same
before it loads anything. Run: pytest tests/doctor/test_teacher_doctor.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from preflight.checkpoints import model_json
from preflight.gpus import Driver, Gpu
from preflight.ports import listener
from teacher_server import cli
from teacher_server.process import start_checks
from teacher_server.process.model_size import fit_on_gpu
from teacher_server.settings import ConfigError, TeacherConfig
from tests.faults.made_certificates import Authority
from tests.rounds import in_the_long_round
from tests.waiting import LIMIT_S

CHECKPOINT = Path(__file__).resolve().parents[2] / "examples/playground/checkpoints/teacher"
FREE = ("--grpc-port", "0", "--http-port", "0")
TENANT = '[tenants.a]\ntoken_sha256 = ["' + "0" * 64 + '"]\n'
GIB = 1 << 30
QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40960,
    "dtype": "bfloat16",
}


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("TEACHER_"):
            monkeypatch.delenv(name)


def doctor(capsys: pytest.CaptureFixture[str], *flags: str, exits: int) -> dict[str, list[Any]]:
    """What it finds, by check."""
    assert cli.main(["doctor", "--json", *flags]) == exits
    told = json.loads(capsys.readouterr().out)
    assert (told["program"], told["problem"]) == ("teacher-server", exits == 2)
    found: dict[str, list[Any]] = {}
    for one in told["findings"]:
        found.setdefault(one["check"], []).append(one)
    return found


def problems(found: dict[str, list[Any]]) -> list[str]:
    return [one["check"] for ones in found.values() for one in ones if one["level"] == "problem"]


def refused(**settings: Any) -> str:
    """What `serve` says before it loads."""
    with pytest.raises(ConfigError) as caught:
        start_checks.refuse_early(TeacherConfig(grpc_port=0, http_port=0, **settings))
    return str(caught.value)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A checkpoint whose weights are more than any machine's memory: its configuration alone."""
    about = {**QWEN3_8B, "hidden_size": 1 << 18, "intermediate_size": 1 << 20, "dtype": "float32"}
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(json.dumps(about))
    (tmp_path / "large" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return tmp_path / "large"


def test_a_teacher_that_would_start_has_its_arithmetic_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ("--engine", "hf", "--model", str(CHECKPOINT), "--max-context", "1024")
    found = doctor(capsys, *flags, *FREE, exits=0)
    assert {"settings", "versions", "compiler", "gpu", "ports", "tls", "tenants", "clock"} < {
        *found
    }
    memory = found["memory"][0]
    assert memory["level"] == "ok"
    assert memory["seen"].startswith("weights 2.6 MB + KV 3.1 MB (3,072 B a token x 1,024 tokens")
    assert memory["limit"].endswith("of memory are free")
    assert "64 tokens" in found["tokenizer"][0]["seen"]
    assert "torch 2" in found["versions"][0]["seen"]


def test_a_setting_that_is_none_is_a_finding(capsys: pytest.CaptureFixture[str]) -> None:
    found = doctor(capsys, "--engine", "fake", "--max-k", "0", exits=2)
    assert found["settings"][0]["seen"] == "max_k is 0, must be at least 1"
    found = doctor(capsys, "--engine", "fake", "--max-kk", "0", exits=2)
    assert "did you mean '--max-k'" in found["settings"][0]["seen"]


@pytest.mark.parametrize("name", ["grpc", "http"])
def test_a_port_that_is_taken(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with listener("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        flags = ("--engine", "fake", *FREE, f"--{name}-port", str(port))
        found = doctor(capsys, *flags, exits=2)
    assert problems(found) == ["ports"]
    told = found["ports"][-1]["seen"]
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in told
    assert told.endswith(f"choose another {name}_port")


@pytest.mark.parametrize("host", ["nohost.invalid", "a..b"])
def test_a_host_that_has_no_address(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--engine", "fake", *FREE, "--insecure", "--host", host)
    told = doctor(capsys, *flags, exits=2)["ports"][0]["seen"]
    assert told.startswith(f"gRPC cannot listen on {host}:0: ")
    assert told.endswith("host must be an address of this machine, or 0.0.0.0")


def test_certificates_that_are_no_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = Authority(tmp_path, "ours")
    good, other = (ours.issue(name, hosts=("127.0.0.1",)) for name in ("a", "b"))
    ended = ours.issue("old", hosts=("127.0.0.1",), lasts=timedelta(minutes=-1))
    soon = ours.issue("soon", hosts=("127.0.0.1",), lasts=timedelta(days=2))
    torn = tmp_path / "torn.pem"
    torn.write_text("-----BEGIN CERTIFICATE-----\nno\n-----END CERTIFICATE-----\n")

    def tls(cert: Path, key: Path, exits: int) -> str:
        flags = ("--engine", "fake", *FREE, "--tls-cert", str(cert), "--tls-key", str(key))
        found = doctor(capsys, *flags, exits=exits)
        assert problems(found) == ["tls"] * (exits == 2)
        (one,) = found["tls"]
        return f"{one['level']}: {one['seen']}; {one['remedy']}"

    assert tls(good.cert, good.key, 0).startswith("warning: ")  # for an hour
    assert "ends on 20" in tls(soon.cert, soon.key, 0)
    assert f"tls_key {other.key} does not match" in tls(good.cert, other.key, 2)
    assert f"tls_cert {torn} must be PEM certificates" in tls(torn, good.key, 2)
    told = tls(good.cert, torn, 2)
    assert f"tls_key {torn} must be the PEM key of tls_cert {good.cert}" in told
    assert "None" not in told
    assert f"tls_cert is '{tmp_path}/no.pem': No such file" in tls(tmp_path / "no.pem", good.key, 2)
    told = tls(ended.cert, ended.key, 2)
    assert "(127.0.0.1) ended on 20" in told
    assert told.endswith("put a new one in its place: it is read without a restart")
    good.key.chmod(0o644)
    told = tls(good.cert, good.key, 2)
    assert f"tls_key: {good.key} holds the server's private key and has mode 0644" in told
    assert f"chmod o-r {good.key}" in told


def test_tenants_files_that_are_no_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tenants.toml"

    def tenants(text: str, mode: int, exits: int) -> list[tuple[str, str]]:
        path.write_text(text)
        path.chmod(mode)
        flags = ("--engine", "fake", *FREE, "--tenants-file", str(path))
        found = doctor(capsys, *flags, exits=exits)
        return [(one["level"], one["seen"]) for one in found["tenants"]]

    assert tenants(TENANT, 0o600, 0) == [("ok", f"{path}: 1 tenants")]
    readable = tenants(TENANT, 0o644, 0)[1]
    assert readable == (
        "warning",
        f"{path} can be read by every user of this machine; it holds hashes only",
    )
    ended = tenants(f"{TENANT}expires = 2020-01-01T00:00:00Z\n", 0o600, 0)[1]
    assert ended == ("warning", "tokens that have expired: a")
    ((level, told),) = tenants("[tenants.a]\n", 0o600, 2)
    assert level == "problem"
    assert "tenants.a.token_sha256 must be a list" in told


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    """On a machine with a GPU there is nothing to refuse."""
    if start_checks.driver().is_there:
        pytest.skip("there is a GPU")
    flags = ("--engine", "hf", "--model", str(CHECKPOINT), "--device", "cuda", "--max-context=64")
    found = doctor(capsys, *flags, *FREE, exits=2)
    assert problems(found) == ["gpu"]
    told = refused(engine="hf", model=str(CHECKPOINT), device="cuda")
    assert found["gpu"][0]["seen"] == told
    assert "device is 'cuda', and no NVIDIA GPU is seen here" in told
    assert "--gpus" in told


def test_a_model_that_is_too_large(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = doctor(capsys, "--engine", "vllm", "--model", str(large), *FREE, exits=2)
    assert problems(found)[0] == "memory"
    memory = found["memory"][0]
    told = refused(engine="vllm", model=str(large))
    assert memory["seen"].startswith("weights ")
    assert memory["seen"] in told
    assert f"the model '{large}' is too large: weights " in told
    assert told.endswith("or a smaller model")


def test_a_cache_without_room_for_one_session(capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"model": str(CHECKPOINT), "kv_cache_gib": 0.002, "max_context": 1024}
    flags = [w for k, v in settings.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    found = doctor(capsys, *flags, *FREE, "--enforce-eager", exits=2)
    told = found["memory"][-1]["seen"]
    assert told == (
        "kv_cache_gib is 0.002, and one session of max_context 1,024 takes 0.00293 GiB: raise "
        "kv_cache_gib to that, or lower max_context"
    )
    assert refused(engine="vllm", **settings) == told


@in_the_long_round
def test_weights_that_may_not_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN3_8B))
    (folder / "model.safetensors").touch(mode=0o600)
    (folder / "model.safetensors").chmod(0)
    command = [sys.executable, "-m", "teacher_server.cli", "doctor", "--engine", "hf", "--json"]
    command += ["--model", str(folder), *FREE]
    if os.geteuid() == 0:
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 2, done.stderr
    found = [one for one in json.loads(done.stdout)["findings"] if one["check"] == "model"]
    assert [one["remedy"] for one in found] == [f"chmod a+r {folder}/*"]
    assert "cannot read model.safetensors" in found[0]["seen"]


def gpus(*totals_gib: float, used_gib: float = 0.0) -> Driver:
    return Driver(
        version="580",
        gpus=tuple(
            Gpu(
                index=i,
                name="H100",
                total_bytes=int(total * GIB),
                used_bytes=int(used_gib * GIB),
            )
            for i, total in enumerate(totals_gib)
        ),
    )


def qwen3_8b(**settings: Any) -> TeacherConfig:
    return TeacherConfig(model="Qwen/Qwen3-8B", **settings)


def test_a_model_is_held_against_the_gpu_that_has_least() -> None:
    """By hand: 8.19 G weights in bfloat16, and 147,456 bytes of keys and values a token."""
    fit = fit_on_gpu(qwen3_8b(max_context=16384), QWEN3_8B, gpus(80))
    assert "weights 16.4 GB + KV 2.4 GB (147,456 B a token x 16,384 tokens)" in fit.terms
    assert fit.room == "GPU 0 (H100) has 85.9 GB x 0.9 = 77.3 GB"
    assert (fit.never, fit.hardly) == (False, False)
    fit = fit_on_gpu(qwen3_8b(max_context=40960), QWEN3_8B, gpus(80, 24))
    assert fit.room.startswith("GPU 0")
    small = fit_on_gpu(qwen3_8b(max_context=40960), QWEN3_8B, gpus(24))
    assert (small.never, small.hardly) == (False, True)
    tiny = fit_on_gpu(qwen3_8b(), QWEN3_8B, gpus(16))
    assert tiny.never
    two = fit_on_gpu(qwen3_8b(tensor_parallel_size=2), QWEN3_8B, gpus(80, 16))
    assert not two.never
    assert "on each of 2 GPUs" in two.terms
    assert two.room.startswith("GPU 1")


def test_what_others_have_of_a_gpu_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GPU cannot be here: its driver's words, and a build of vLLM for it, are made up."""
    monkeypatch.setattr("teacher_server.process.doctor.driver", lambda: gpus(80, used_gib=30))
    monkeypatch.setattr("preflight.software.installed", {"vllm": "0.32.0"}.get)
    flags = ("--model", str(CHECKPOINT), "--max-context", "1024", *FREE)
    found = doctor(capsys, *flags, exits=2)
    assert found["memory"][0]["level"] == "ok"
    assert found["memory"][1]["seen"] == "32.2 GB of GPU 0 are taken by others"
    assert "wants 77.3 GB of 85.9 GB free" in found["memory"][1]["limit"]


def test_a_checkpoint_that_is_nowhere_is_known_as_such(tmp_path: Path) -> None:
    assert model_json("nobody/nothing-of-the-kind", "") is None
    assert model_json(str(CHECKPOINT), "") is not None
    with pytest.raises(ConfigError, match=r"ready_file is .* there is no folder"):
        start_checks.refuse_early(
            TeacherConfig(engine="fake", ready_file=str(tmp_path / "no" / "file"))
        )


def doctor_to(stdout: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "teacher_server.cli", "doctor", "--engine", "fake", *FREE]
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=LIMIT_S
    )


def test_output_that_cannot_be_written_is_one_line_or_none() -> None:
    with Path("/dev/full").open("w") as full:
        done = doctor_to(full)
    assert done.returncode == 1
    assert done.stderr == "teacher-server: standard output: No space left on device\n"
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        done = doctor_to(closed)
    assert (done.returncode, done.stderr) == (1, "")


def test_ctrl_c_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        yield from ()

    monkeypatch.setattr("preflight.software.versions", pressed)
    assert cli.main(["doctor", "--engine", "fake", *FREE]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.fixture
def serving(large: Path) -> list[str]:
    """A command that would take long to fail, were it to import an engine."""
    code = (
        "import sys; from teacher_server import cli\n"
        "code = cli.main(sys.argv[1:])\n"
        "print(*{'torch', 'vllm', 'transformers'} & {*sys.modules}, file=sys.stderr)\n"
        "sys.exit(code)"
    )
    return [sys.executable, "-c", code, "serve", "--model", str(large)]


@pytest.mark.e2e
def test_serve_refuses_before_anything_large_is_imported(serving: list[str]) -> None:
    with listener("127.0.0.1", 0) as held:
        port = str(held.getsockname()[1])
        for flags, told in (
            (("--grpc-port", port, "--http-port", "0"), f"gRPC cannot listen on 127.0.0.1:{port}"),
            (FREE, "is too large: weights "),
        ):
            done = subprocess.run(
                [*serving, *flags], capture_output=True, text=True, timeout=LIMIT_S
            )
            assert done.returncode == 2
            line, imported = done.stderr.split("\n")[-3:-1]
            assert told in line
            assert imported == ""
