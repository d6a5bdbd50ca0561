"""Recorded rollouts over HTTP. Run: pytest tests/teacher/http/test_runs_api.py"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.recorded_rollouts import POLICY, MadeUp, rollout, write_step
from rollout_records import reading
from rollout_records.schema import COLUMNS, SCALARS
from teacher_server.access.tenants import OpenTenants, Tenant
from teacher_server.access.tenants_file import read_tenants
from teacher_server.http import recordings
from teacher_server.http.recordings import RunFolder
from teacher_server.http.routes.runs import PARQUET
from teacher_server.settings import ConfigError
from tests.teacher.http.http_teacher import INFO, Teacher, V, error_of

MADE = MadeUp(vocab_size=V, k=4, special_ids=INFO.special_token_ids)
FINGERPRINT = INFO.tokenizer_fingerprint
ONE = "/v1/runs/demo/steps/2/rollouts/1"


def rows(step: int, count: int = 3, first: int = 0, num_tokens: int = 9) -> list[dict[str, Any]]:
    return [
        rollout(MADE, step=step, index=first + i, num_tokens=num_tokens + i, seed=7)
        for i in range(count)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Runs, and a secret beside them."""
    runs = tmp_path / "runs"
    for step in (1, 2):
        write_step(runs / "demo", step, rows(step), fingerprint=FINGERPRINT)
    write_step(tmp_path / "secret", 1, rows(1))
    return runs


def second_step(folder: Path) -> Path:
    return folder / "demo/rollouts/step-000002.parquet"


def teacher(folder: Path, **options: Any) -> Teacher:
    return Teacher(runs=RunFolder(folder), **options)


async def get(folder: Path, path: str, status: int = 200) -> Any:
    reply = await teacher(folder).client.get(path)
    assert reply.status_code == status, reply.text
    return reply.json() if status == 200 else error_of(reply)["message"]


async def test_runs_and_steps_are_listed_with_what_was_made_of_them(folder: Path) -> None:
    listed = await get(folder, "/v1/runs")
    assert [run["run"] for run in listed["runs"]] == ["demo"]
    assert listed["runs"][0] | {"updated_at": 0} == {
        **{"run": "demo", "num_steps": 2, "first_step": 1, "last_step": 2, "updated_at": 0}
    }
    steps = await get(folder, "/v1/runs/demo")
    assert [step["step"] for step in steps["steps"]] == [1, 2]
    expected = np.mean([row["mean_overlap"] for row in rows(2)])
    assert steps["steps"][1]["mean_overlap"] == pytest.approx(expected, abs=1e-5)
    assert steps["steps"][1]["num_tokens"] == sum(row["num_tokens"] for row in rows(2))
    assert (steps["steps"][1]["num_correct"], steps["steps"][1]["problems"]) == (1, [])
    assert steps["origin"]["drift_policy"]["k"] == POLICY.metric.k
    earlier = await get(folder, "/v1/runs/demo?before=2&limit=1")
    assert [step["step"] for step in earlier["steps"]] == [1]
    last = await get(folder, "/v1/runs/demo?limit=1")
    assert ([step["step"] for step in last["steps"]], last["earlier"]) == ([2], 1)


async def test_a_step_lists_scalars_and_a_rollout_all_that_was_recorded(folder: Path) -> None:
    listed = (await get(folder, "/v1/runs/demo/steps/2"))["rollouts"]
    assert [row["index"] for row in listed] == [0, 1, 2]
    assert set(listed[0]) == set(SCALARS)
    shown, made = await get(folder, ONE), rows(2)[1]
    assert {column.name for column in COLUMNS} <= set(shown)
    for name in ("response_ids", "mask", "teacher_topk_ids", "student_topk_ids", "prompt_ids"):
        np.testing.assert_array_equal(shown[name], made[name])
    for name in ("teacher_logprobs", "teacher_topk_logprobs", "overlap", "reliability"):
        np.testing.assert_allclose(shown[name], made[name], rtol=4e-3)  # 8 bits of mantissa
    assert (shown["verdict"], shown["sampled"], shown["k"]) == (made["verdict"], None, MADE.k)
    assert shown["policy"]["w_drop"] == POLICY.w_drop
    ids = {i for name in ("response_ids", "teacher_topk_ids") for i in np.ravel(shown[name])}
    assert ids <= {int(i) for i in shown["texts"]}
    assert (shown["texts"]["1"], shown["warnings"]) == ("1", [])


async def test_nothing_that_leaves_says_where_a_file_is(folder: Path) -> None:
    for path in ("/v1/runs", "/v1/runs/demo", "/v1/runs/demo/steps/2", ONE):
        text = (await teacher(folder).client.get(path)).text
        assert str(folder.parent) not in text
        assert "/models/" not in text
        assert "/data/" not in text
    assert (await get(folder, ONE))["model_id"] == "teacher-large"


async def test_ids_of_another_tokenizer_have_no_texts(folder: Path) -> None:
    write_step(folder / "other", 1, rows(1), fingerprint="f" * 64)
    shown = await get(folder, "/v1/runs/other/steps/1/rollouts/0")
    assert shown["texts"] == {}
    assert "another tokenizer" in shown["warnings"][0]["message"]


async def test_a_file_is_given_where_it_is_accepted(folder: Path) -> None:
    client = teacher(folder).client
    one = await client.get(ONE, headers={"accept": PARQUET})
    assert one.headers["content-type"] == PARQUET
    assert 'filename="demo-step-2-rollout-1.parquet"' in one.headers["content-disposition"]
    assert pq.read_table(io.BytesIO(one.content))["index"].to_pylist() == [1]
    path = folder.parent / "one.parquet"
    path.write_bytes(one.content)
    assert reading.origin(path).drift_policy == reading.origin(second_step(folder)).drift_policy
    again = reading.read_rollout([path], 1)
    np.testing.assert_array_equal(again["response_ids"], rows(2)[1]["response_ids"])
    whole = await client.get("/v1/runs/demo/steps/2", headers={"accept": PARQUET})
    assert whole.content == second_step(folder).read_bytes()
    write_step(folder / "demo", 2, rows(2, first=3), rank=1, fingerprint=FINGERPRINT)
    both = await client.get("/v1/runs/demo/steps/2", headers={"accept": PARQUET})
    assert pq.read_table(io.BytesIO(both.content))["index"].to_pylist() == list(range(6))


@pytest.mark.parametrize(
    "run",
    ["%2e", "%2e%2e", "..%2fsecret", "%2Fetc", "demo%00", ".hidden", "x" * 200, "..\\secret"],
)
async def test_a_name_cannot_lead_outside(folder: Path, run: str) -> None:
    for rest in ("", "/steps/1", "/steps/1/rollouts/0"):
        reply = await teacher(folder).client.get(f"/v1/runs/{run}{rest}")
        assert reply.status_code == 404, run
        assert "train.jsonl" not in reply.text


async def test_a_link_cannot_lead_outside(folder: Path) -> None:
    secret = folder.parent / "secret"
    (folder / "linked").symlink_to(secret)
    (folder / "half").mkdir()
    (folder / "half" / "rollouts").symlink_to(secret / "rollouts")
    (folder / "third" / "rollouts").mkdir(parents=True)
    file = "step-000001.parquet"
    (folder / "third" / "rollouts" / file).symlink_to(secret / "rollouts" / file)
    assert [run["run"] for run in (await get(folder, "/v1/runs"))["runs"]] == ["demo"]
    for run in ("linked", "half", "third"):
        assert "there are demo" in await get(folder, f"/v1/runs/{run}/steps/1", 404)
    # One that stays inside is a run by another name.
    (folder / "again").symlink_to(folder / "demo")
    assert (await get(folder, "/v1/runs/again"))["steps"][0]["num_rollouts"] == 3


@pytest.mark.parametrize("kept", [0, 3, 400, -20])
async def test_a_file_that_is_cut_short_is_told_beside_what_can_be_read(
    folder: Path, kept: int
) -> None:
    path = second_step(folder)
    path.write_bytes(path.read_bytes()[:kept])
    steps = (await get(folder, "/v1/runs/demo"))["steps"]
    assert "demo/rollouts/step-000002.parquet" in steps[1]["problems"][0]
    assert steps[0]["num_rollouts"] == 3
    listed = await get(folder, "/v1/runs/demo/steps/2")
    assert (listed["rollouts"], len(listed["problems"])) == ([], 1)
    for path_of in ("/v1/runs/demo/steps/2/rollouts/0",):
        assert "cut short" in await get(folder, path_of, 422)
    reply = await teacher(folder).client.get("/v1/runs/demo/steps/2", headers={"accept": PARQUET})
    assert reply.status_code == 422
    # What another process recorded of the step is there all the same.
    write_step(folder / "demo", 2, rows(2, first=3), rank=1)
    listed = await get(folder, "/v1/runs/demo/steps/2")
    assert [row["index"] for row in listed["rollouts"]] == [3, 4, 5]
    assert (await get(folder, "/v1/runs/demo/steps/2/rollouts/4"))["index"] == 4


async def test_what_is_still_being_written_is_not_seen(folder: Path) -> None:
    rollouts = folder / "demo" / "rollouts"
    (rollouts / "step-000003.parquet.partial").write_bytes(b"PAR1")
    (rollouts / ".step-000003.parquet.tmp").write_bytes(b"PAR1")
    (folder / "begun" / "rollouts").mkdir(parents=True)
    listed = await get(folder, "/v1/runs")
    assert [(run["run"], run["last_step"]) for run in listed["runs"]] == [("demo", 2)]
    # The next step is there as soon as it is whole.
    write_step(folder / "demo", 3, rows(3), fingerprint=FINGERPRINT)
    assert (await get(folder, "/v1/runs"))["runs"][0]["last_step"] == 3


async def test_what_is_taken_away_meanwhile_is_no_failure_of_the_server(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer thins its recordings out, and somebody may delete a run."""
    gone = folder / "demo/rollouts/step-000003.parquet"
    there = reading.steps

    def steps(of: Path) -> dict[int, list[Path]]:
        return {**there(of), 3: [gone]} if of.parent.name == "demo" else there(of)

    monkeypatch.setattr(reading, "steps", steps)
    monkeypatch.setattr(Path, "is_file", lambda self: True)  # as it was a moment ago
    assert (await get(folder, "/v1/runs"))["runs"][0]["run"] == "demo"
    listed = (await get(folder, "/v1/runs/demo"))["steps"]
    assert [(step["step"], step["num_rollouts"]) for step in listed] == [(1, 3), (2, 3), (3, 0)]
    for path in ("steps/3/rollouts/0", "steps/3"):
        reply = await teacher(folder).client.get(
            f"/v1/runs/demo/{path}", headers={"accept": PARQUET}
        )
        assert (reply.status_code, "meanwhile" in error_of(reply)["message"]) == (404, True)


async def test_a_link_that_leads_to_itself_is_no_run(folder: Path) -> None:
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "other").mkdir()
    (folder / "other" / "rollouts").symlink_to(folder / "other" / "rollouts")
    assert [run["run"] for run in (await get(folder, "/v1/runs"))["runs"]] == ["demo"]
    for run in ("loop", "other"):
        await get(folder, f"/v1/runs/{run}", 404)


async def test_what_there_is_not_is_said_with_what_there_is(folder: Path) -> None:
    assert "there are demo" in await get(folder, "/v1/runs/dmo", 404)
    assert "there are 1, 2" in await get(folder, "/v1/runs/demo/steps/7", 404)
    assert "there are 0, 1, 2" in await get(folder, "/v1/runs/demo/steps/2/rollouts/9", 404)
    for path in ("steps/-1", "steps/x", "steps/2/rollouts/-1", "steps/2/rollouts/4294967296"):
        await get(folder, f"/v1/runs/demo/{path}", 400)
    for query in ("limit=0", "limit=501", "before=-1", "limit=x"):
        assert query.split("=")[0] in await get(folder, f"/v1/runs/demo?{query}", 400)


async def test_replies_and_files_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordings, "MAX_ROLLOUTS", 2)
    listed = await get(folder, "/v1/runs/demo/steps/2")
    assert (len(listed["rollouts"]), listed["left_out"]) == (2, 1)
    monkeypatch.setattr(recordings, "MAX_FILE_BYTES", 100)
    assert "the limit is 100" in await get(folder, ONE, 422)
    reply = await teacher(folder).client.get("/v1/runs/demo/steps/2", headers={"accept": PARQUET})
    assert (reply.status_code, error_of(reply)["type"]) == (413, "MessageTooLargeError")


async def test_long_texts_are_cut_in_a_list_and_whole_in_a_rollout(folder: Path) -> None:
    long = [{**row, "response": "x" * 1000} for row in rows(5)]
    write_step(folder / "demo", 5, long)
    listed = await get(folder, "/v1/runs/demo/steps/5")
    assert len(listed["rollouts"][0]["response"]) == recordings.EXCERPT
    assert (await get(folder, "/v1/runs/demo/steps/5/rollouts/0"))["response"] == "x" * 1000


async def test_numbers_that_json_has_not_are_null(folder: Path) -> None:
    row = rows(6)[0]
    row["teacher_logprobs"][2] = -np.inf
    row["mean_overlap"] = np.nan
    write_step(folder / "demo", 6, [row])
    shown = await get(folder, "/v1/runs/demo/steps/6/rollouts/0")
    assert (shown["teacher_logprobs"][2], shown["mean_overlap"]) == (None, None)
    assert (await get(folder, "/v1/runs/demo/steps/6"))["rollouts"][0]["mean_overlap"] is None


async def test_runs_are_seen_by_tenants_that_may_and_by_all_where_there_are_none(
    folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tenants.toml"
    digests = ["a" * 64, "b" * 64]
    path.write_text(
        f'[tenants.one]\ntoken_sha256 = ["{digests[0]}"]\nruns = true\n'
        f'[tenants.two]\ntoken_sha256 = ["{digests[1]}"]\n'
    )
    os.chmod(path, 0o600)
    entries = read_tenants(path)
    assert {name: entry.tenant.runs for name, entry in entries.items()} == {
        **{"one": True, "two": False}
    }
    assert OpenTenants().get("anybody").runs is True
    assert Tenant(name="x").runs is False
    path.write_text(f'[tenants.one]\ntoken_sha256 = ["{digests[0]}"]\nruns = 1\n')
    with pytest.raises(ConfigError, match=r"tenants\.one\.runs is 1, must be true or false"):
        read_tenants(path)

    closed = teacher(folder, sees_runs=lambda tenant: tenant == "one")
    for place in ("/v1/runs", "/v1/runs/demo", "/v1/runs/demo/steps/2", ONE):
        refused = await closed.client.get(place)
        assert (refused.status_code, error_of(refused)["type"]) == (403, "PermissionDeniedError")
        assert "runs = true" in error_of(refused)["message"]
    assert (await closed.client.get("/v1/info")).json()["shows_runs"] is False
    assert (await teacher(folder).client.get("/v1/info")).json()["shows_runs"] is True


async def test_without_a_folder_there_are_no_runs() -> None:
    reply = await Teacher().client.get("/v1/runs")
    assert (reply.status_code, "--runs" in error_of(reply)["message"]) == (404, True)


def test_a_folder_that_cannot_be_is_refused_at_the_start(folder: Path) -> None:
    with pytest.raises(ConfigError, match="must be a folder"):
        RunFolder(folder / "nowhere")
    with pytest.raises(ConfigError, match="which is a run: name the folder that it is in"):
        RunFolder(folder / "demo")
