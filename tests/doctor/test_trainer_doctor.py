"""`student-trainer doctor` against a real teacher, and on what is broken; `train` refuses the same
before it loads a student. Run: pytest tests/doctor/test_trainer_doctor.py
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from preflight.ports import listener
from student_trainer import cli
from student_trainer.assembly import parts
from teacher_client.access import (
    TOKEN_FILE_VARIABLE,
    TOKEN_VARIABLE,
    AccessError,
    TeacherAccess,
)
from teacher_client.reaching import reach
from tests.faults.live_server import LiveServer
from tests.faults.made_certificates import Authority
from tests.trainer.learner.tiny_student import write_tiny_student
from tests.waiting import LIMIT_S

pytestmark = pytest.mark.e2e
PLAYGROUND = Path(__file__).resolve().parents[2] / "examples/playground/checkpoints"
SETTINGS = """
[run]
out = "{folder}/run"
steps = 1
[student]
model = "{student}"
device = "cpu"
[sampler]
kind = "hf"
[data]
train = "{folder}/train.jsonl"
[rollout]
prompts_per_step = 1
student_topk = 4
max_context = 40
[teacher]
endpoints = {endpoints}
k = 4
connect_timeout_s = 0.5
[drift]
k = 4
threshold = 0.7
w_drop = 0.01
[budget]
kind = "fixed"
max_tokens = 4
[loss]
kind = "local_support_matching"
[optim]
learning_rate = 1e-3
"""


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (TOKEN_VARIABLE, TOKEN_FILE_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="module")
def authority(place: Path) -> Authority:
    return Authority(place, "ours")


@pytest.fixture(scope="module")
def teachers(place: Path, authority: Authority) -> Iterator[dict[str, LiveServer]]:
    """The playground's vocabulary in the clear, and behind mutual TLS."""
    pair = authority.issue("teacher", hosts=("127.0.0.1",))
    named = authority.issue("elsewhere", hosts=("teacher.example",))
    fake = ("--no-self-test", "--tokenizer", str(PLAYGROUND / "teacher"))
    tls = ("--tls-cert", str(pair.cert), "--tls-key", str(pair.key))
    other = ("--tls-cert", str(named.cert), "--tls-key", str(named.key))
    servers = {
        "plain": LiveServer(place, *fake, "--fake-vocab-size", "64"),
        "mutual": LiveServer(place, "--no-self-test", *tls, "--tls-client-ca", str(authority.ca)),
        "elsewhere": LiveServer(place, "--no-self-test", *other),
    }
    try:
        for server in servers.values():
            server.wait_until_ready()
        yield servers
    finally:
        for server in servers.values():
            server.end()


def written(
    folder: Path, *endpoints: str, student: Path = PLAYGROUND / "student", more: str = ""
) -> Path:
    (folder / "train.jsonl").write_text(json.dumps({"prompt": "1+1=", "answer": "2"}))
    path = folder / "trainer.toml"
    text = SETTINGS.format(folder=folder, student=student, endpoints=json.dumps(endpoints))
    path.write_text(text.replace("connect_timeout_s", f"{more}\nconnect_timeout_s"))
    return path


def doctor(
    capsys: pytest.CaptureFixture[str], path: Path, *flags: str, exits: int
) -> dict[str, list[Any]]:
    """What it finds, by check."""
    capsys.readouterr()
    assert cli.main(["doctor", "--config", str(path), "--json", *flags]) == exits
    told = json.loads(capsys.readouterr().out)
    assert (told["program"], told["problem"]) == ("student-trainer", exits == 2)
    found: dict[str, list[Any]] = {}
    for one in told["findings"]:
        found.setdefault(one["check"], []).append(one)
    return found


def problems(found: dict[str, list[Any]]) -> list[str]:
    return [one["check"] for ones in found.values() for one in ones if one["level"] == "problem"]


@pytest.fixture
def loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is large is not reached."""

    def loads(*_: object, **__: object) -> None:
        raise AssertionError("something large was loaded")

    monkeypatch.setattr(parts, "learner", loads)
    monkeypatch.setattr(parts, "sampler", loads)


def trained(capsys: pytest.CaptureFixture[str], path: Path, *flags: str) -> str:
    """The line with which `train` ends as one that starting again does not mend."""
    capsys.readouterr()
    assert cli.main(["train", "--config", str(path), *flags]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_run_that_would_start(
    tmp_path: Path, teachers: dict[str, LiveServer], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = teachers["plain"]
    path = written(tmp_path, plain.address)
    http = f"http://{plain.http_address}/healthz"
    found = doctor(capsys, path, "--teacher-http", http, exits=0)
    assert "64 tokens are the student's" in found["tokenizer"][0]["seen"]
    assert "serves fake-64" in found["teacher"][1]["seen"]
    assert found["clock"][-1]["level"] == "ok"
    assert found["memory"][0]["seen"].startswith("the student student takes about ")
    assert "3 checkpoints of 5.3 MB" in found["disk"][0]["limit"]
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_kind_is_told_with_both_names(
    tmp_path: Path,
    teachers: dict[str, LiveServer],
    capsys: pytest.CaptureFixture[str],
    loads_nothing: None,
) -> None:
    write_tiny_student(tmp_path / "tiny")
    path = written(tmp_path, teachers["plain"].address, student=tmp_path / "tiny")
    found = doctor(capsys, path, exits=2)
    assert problems(found) == ["tokenizer"]
    told = found["tokenizer"][0]["seen"]
    assert f"the student {tmp_path}/tiny and the teacher fake-64 have different tokenizers" in told
    line = trained(capsys, path)
    assert line.startswith("FingerprintMismatchError: ")
    assert line.partition(": ")[2][:80] in told


def test_teachers_that_are_not_there_or_not_one(
    tmp_path: Path, teachers: dict[str, LiveServer], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = teachers["plain"].address
    found = doctor(capsys, written(tmp_path, "127.0.0.1:1"), exits=2)
    assert problems(found) == ["teacher"]
    # A run begins with the replicas that are there.
    found = doctor(capsys, written(tmp_path, plain, "127.0.0.1:1"), exits=0)
    assert found["teacher"][1]["level"] == "warning"
    assert "127.0.0.1:1 does not answer: " in found["teacher"][1]["seen"]
    port = teachers["plain"].http_address
    found = doctor(capsys, written(tmp_path, port), exits=2)
    assert "teacher.endpoints wants the gRPC port" in found["teacher"][0]["seen"]


def test_replicas_of_different_models_are_refused(
    tmp_path: Path, teachers: dict[str, LiveServer], capsys: pytest.CaptureFixture[str]
) -> None:
    other = LiveServer(
        tmp_path,
        *("--no-self-test", "--tokenizer", str(PLAYGROUND / "teacher")),
        *("--fake-vocab-size", "80"),
    )
    try:
        both = teachers["plain"].address, other.wait_until_ready().address
        found = doctor(capsys, written(tmp_path, *both), exits=2)
    finally:
        other.end()
    (told,) = [one["seen"] for one in found["tokenizer"] if one["level"] == "problem"]
    assert "the run began with" in told


def test_tls_that_does_not_fit(
    tmp_path: Path,
    teachers: dict[str, LiveServer],
    authority: Authority,
    capsys: pytest.CaptureFixture[str],
    loads_nothing: None,
) -> None:
    theirs = Authority(tmp_path, "theirs")
    mine, stranger = authority.issue("vision"), theirs.issue("vision")
    ca = f'tls_ca = "{authority.ca}"'
    mutual = teachers["mutual"].address

    def told(server: str, more: str) -> str:
        path = written(tmp_path, teachers[server].address, more=more)
        found = doctor(capsys, path, exits=2)
        line = trained(capsys, path)
        assert line.startswith("AccessError: ")
        said = found["teacher"][0]["seen"]
        assert line.removeprefix("AccessError: ").partition(" (traceback: ")[0] in said
        return str(said)

    plain = teachers["plain"].address
    assert f"{plain} does not speak TLS, and teacher.tls_ca is set" in told("plain", ca)
    assert f"{mutual} speaks TLS, and teacher.tls_ca is not set" in told("mutual", "")
    assert "is not of the CA in teacher.tls_ca" in told("mutual", f'tls_ca = "{theirs.ca}"')
    assert "is for teacher.example, not for 127.0.0.1" in told("elsewhere", ca)
    assert "asks for a client's certificate, set teacher.tls_cert" in told("mutual", ca)
    wrong = f'{ca}\ntls_cert = "{stranger.cert}"\ntls_key = "{stranger.key}"'
    assert f"does not take the certificate {stranger.cert}" in told("mutual", wrong)
    right = f'{ca}\ntls_cert = "{mine.cert}"\ntls_key = "{mine.key}"'
    found = doctor(capsys, written(tmp_path, mutual, more=right), exits=2)
    assert problems(found) == ["tokenizer"]  # it has none, and its certificate is taken
    seen = found["teacher"][0]["seen"]
    assert seen.startswith(f"[teacher] {mutual} answers; its certificate (127.0.0.1) ends on 20")


def test_tokens_that_are_no_use(
    tmp_path: Path,
    teachers: dict[str, LiveServer],
    capsys: pytest.CaptureFixture[str],
    loads_nothing: None,
) -> None:
    token = tmp_path / "token"
    token.write_text("a-secret-of-many-letters")
    token.chmod(0o644)
    path = written(tmp_path, teachers["plain"].address, more=f'token_file = "{token}"')
    found = doctor(capsys, path, exits=2)
    assert problems(found) == ["access"]
    told = found["access"][0]["seen"]
    assert told == (
        f"teacher.token_file: {token} holds the token and has mode 0644: every user of this "
        f"machine can read it; chmod o-r {token}"
    )
    assert trained(capsys, path) == f"AccessError: {told}"
    token.chmod(0o600)
    assert doctor(capsys, path, exits=0)["access"][0]["seen"] == f"[teacher] token of {token}"
    token.unlink()
    found = doctor(capsys, path, exits=2)
    assert f"teacher.token_file is '{token}': No such file" in found["access"][0]["seen"]


def test_folders_data_and_devices_that_are_not_there(
    tmp_path: Path,
    teachers: dict[str, LiveServer],
    capsys: pytest.CaptureFixture[str],
    loads_nothing: None,
) -> None:
    path = written(tmp_path, teachers["plain"].address)
    flag = f"run.out={tmp_path}/train.jsonl/run"
    found = doctor(capsys, path, "--set", flag, exits=2)
    assert problems(found) == ["folder"]
    told = found["folder"][0]["seen"]
    assert f"{tmp_path}/train.jsonl is a file: choose another folder" in told
    assert trained(capsys, path, "--set", flag) == f"ConfigError: {told}"
    found = doctor(capsys, path, "--set", f"data.train={tmp_path}/none.jsonl", exits=2)
    assert problems(found) == ["data"]
    gpus = '{"kind": "vllm", "gpus": "4,5", "cpu_cores": "0"}'
    found = doctor(capsys, path, "--set", f"sampler={gpus}", exits=2)
    assert "devices" in problems(found)
    assert "sampler.gpus is '4,5', and " in found["devices"][0]["seen"]
    found = doctor(capsys, path, "--set", "run.steps=0", exits=2)
    assert [*found] == ["settings"]
    assert found["settings"][0]["seen"].startswith(f"{path}: run.steps: ")
    found = doctor(capsys, path, "--set", "student.model=nobody/nothing-of-the-kind", exits=0)
    assert "is no folder here and not in the hub's cache" in found["student"][0]["seen"]
    assert [one["level"] for one in found["tokenizer"]] == ["skipped"]


def test_a_metrics_port_that_is_taken(
    tmp_path: Path,
    teachers: dict[str, LiveServer],
    capsys: pytest.CaptureFixture[str],
    loads_nothing: None,
) -> None:
    path = written(tmp_path, teachers["plain"].address)
    with listener("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        flag = f"metrics.port={port}"
        found = doctor(capsys, path, "--set", flag, exits=2)
        told = found["ports"][0]["seen"]
        assert trained(capsys, path, "--set", flag).startswith(f"ConfigError: {told}")
    assert problems(found) == ["ports"]
    assert f"127.0.0.1:{port} cannot be listened on: Address already in use" in told
    found = doctor(capsys, path, "--set", flag, exits=0)
    assert found["ports"][0]["seen"] == f"metrics 127.0.0.1:{port} can be listened on"


def test_endpoints_that_are_no_address_or_one_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for endpoints, wrong in (
        (["teacher..example:50051"], "'teacher..example:50051' names no host"),
        (["127.0.0.1:19551", "127.0.0.1:19551"], "'127.0.0.1:19551' is named twice"),
    ):
        path = written(tmp_path, *endpoints)
        told = doctor(capsys, path, exits=2)["settings"][0]["seen"]
        assert f"teacher.endpoints: {wrong}" in told
        assert wrong in trained(capsys, path)
    with pytest.raises(AccessError, match=r"a\.\.b:1 is no address"):
        reach("a..b:1", TeacherAccess())


def test_a_key_of_ours_that_is_encrypted(tmp_path: Path, authority: Authority) -> None:
    pair, locked = authority.issue("vision"), tmp_path / "locked.key"
    command = ["openssl", "pkcs8", "-topk8", "-passout", "pass:x", "-out", str(locked)]
    subprocess.run([*command, "-in", str(pair.key)], check=True, timeout=LIMIT_S)
    access = TeacherAccess(tls_ca=authority.ca, tls_cert=pair.cert, tls_key=locked)
    with pytest.raises(AccessError, match=rf"teacher\.tls_key {locked} is encrypted, must be"):
        access.ssl_context()


def test_a_student_that_is_nowhere_is_not_to_be_fetched_by_its_path(
    tmp_path: Path, teachers: dict[str, LiveServer], capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, teachers["plain"].address, student=Path("/nosuch/dir"))
    told = doctor(capsys, path, exits=2)["student"][0]
    assert told["seen"] == "'/nosuch/dir' is no folder here, and no name on a hub: mend the path"
    assert told["remedy"] == ""


def test_weights_that_pass_through_a_folder_are_held_against_its_room(
    tmp_path: Path, teachers: dict[str, LiveServer], capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, teachers["plain"].address)
    named = json.dumps({"kind": "vllm", "weights_dir": str(tmp_path), "cpu_cores": "0"})
    found = doctor(capsys, path, "--set", f"sampler={named}", exits=0)
    assert f"as a file in {tmp_path}, which has " in found["weights"][0]["seen"]
    assert [*tmp_path.glob("*weights*")] == []
