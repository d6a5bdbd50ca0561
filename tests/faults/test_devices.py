"""An engine over several devices: what cannot be is refused before anything starts.

Run: python -m pytest tests/faults/test_devices.py. What can be: test_several_devices.py
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from student_trainer.assembly import from_settings, vllm_devices
from student_trainer.errors import ConfigError
from student_trainer.rollouts.samplers.vllm_adapter import AdapterInVllm
from student_trainer.rollouts.samplers.vllm_transfer import VllmTransfer
from student_trainer.settings.config import load_config
from student_trainer.settings.sampler import VllmSamplerSettings
from teacher_server.engine.vllm_engine import VllmEngine
from teacher_server.process import loading
from teacher_server.process.loading import build_engine
from teacher_server.settings import ConfigError as TeacherConfigError
from teacher_server.settings import TeacherConfig
from tests.teacher.engine.engine_models import write_tiny_model
from tests.trainer.learner.tiny_student import write_tiny_student
from tests.trainer.settings.smallest_config import SMALLEST
from vllm_process import cores as cores_module
from vllm_process.cores import CoresError, check_cores, children_on, executor_on
from vllm_process.devices import (
    DevicesError,
    check_data_parallel,
    check_gpus,
    check_pipeline_parallel,
    check_tensor_parallel,
    gpus_of,
)

HERE = sorted(os.sched_getaffinity(0))
TP = "tensor_parallel_size"


def shape(**other: Any) -> SimpleNamespace:
    """A model that can be cut in 1, 2, 4 and 8."""
    numbers = {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 1000,
        "num_hidden_layers": 3,
    }
    return SimpleNamespace(**numbers | other)


@pytest.mark.parametrize(
    ("size", "other", "why"),
    [
        (3, {}, "8 attention heads, which do not divide by it"),
        (16, {}, "8 attention heads, which do not divide by it"),
        (4, {"num_key_value_heads": 6, "num_attention_heads": 12}, "6 key/value heads, which nei"),
        (8, {"intermediate_size": 100}, "intermediate_size 100, which does not divide by it"),
        (
            8,
            {"num_experts": 16, "moe_intermediate_size": 12},
            "moe_intermediate_size 12, which does not divide by it",
        ),
        (8, {"num_local_experts": 4}, "4 experts, which are fewer"),
        (
            5,
            {"num_attention_heads": 5, "num_key_value_heads": None, "intermediate_size": 50},
            "1000 vocabulary entries, 1024 with vLLM's padding, which do not divide by it",
        ),
    ],
)
def test_a_model_that_cannot_be_cut_is_told_with_the_sizes_that_can_be(
    size: int, other: dict[str, Any], why: str
) -> None:
    with pytest.raises(DevicesError, match=rf"^{TP} is {size}, and the model has {why}") as caught:
        check_tensor_parallel(TP, size, shape(**other))
    possible = str(caught.value).partition("it can be ")[2].split(", ")
    assert possible[0] == "1"
    for n in map(int, possible):
        check_tensor_parallel(TP, n, shape(**other))
    assert str(size) not in possible


def test_a_model_that_can_be_cut_is_taken() -> None:
    for size in (1, 2, 4, 8):
        check_tensor_parallel(TP, size, shape())
    check_tensor_parallel(TP, 2, shape(num_experts=4, moe_intermediate_size=6, intermediate_size=7))
    check_pipeline_parallel("pipeline_parallel_size", 3, shape())
    check_data_parallel("data_parallel_size", 9, shape())
    check_data_parallel("data_parallel_size", 1, shape(num_experts=4))


def test_too_many_stages_and_copies_of_a_mixture_are_refused() -> None:
    with pytest.raises(DevicesError, match="is 4, and the model has 3 layers: it can be at most 3"):
        check_pipeline_parallel("pipeline_parallel_size", 4, shape())
    with pytest.raises(DevicesError, match=r"is 2, and the model has 4 experts, .*: 1, and a serv"):
        check_data_parallel("data_parallel_size", 2, shape(num_experts=4))


def test_more_gpus_than_there_are_are_told_with_how_they_were_asked_for() -> None:
    sizes = {TP: 2, "pipeline_parallel_size": 1, "data_parallel_size": 3}
    check_gpus(sizes, 6)
    with pytest.raises(
        DevicesError,
        match=r"^tensor_parallel_size 2 times data_parallel_size 3 takes 6 GPUs, and this process "
        r"sees 4: ask for at most 4",
    ):
        check_gpus(sizes, 4)


def gpus(given: str, size: int = 1, own: int = 0, place: tuple[int, int] = (0, 1)) -> Any:
    """Of a process that sees 8."""
    return gpus_of(("sampler.gpus", given), (TP, size), own=own, place=place, num_gpus=8)


def test_an_engine_has_the_gpu_of_its_process_or_its_share_of_those_that_are_named() -> None:
    assert [gpus("auto", own=n, place=(n, 8)) for n in range(8)] == [(n,) for n in range(8)]
    assert gpus("auto", 4) == (0, 1, 2, 3)
    assert [gpus("7,6,5,4", place=(n, 4)) for n in range(4)] == [(7,), (6,), (5,), (4,)]
    assert [gpus("4,5,6,7", 2, own=n, place=(n, 2)) for n in range(2)] == [(4, 5), (6, 7)]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (("auto", 9), f"{TP} 9 takes 9 GPUs, and this process sees 8"),
        (("auto", 2, 0, (0, 4)), f"{TP} is 2, and 4 processes .*: name the 8 GPUs of their eng"),
        (("1,1",), "sampler.gpus is '1,1': each must be there once, and be less than 8"),
        (("8",), "sampler.gpus is '8': each must be there once, and be less than 8"),
        (("4,5", 1), rf"is '4,5', and the engines of this host take 1 GPUs \(1 times {TP} 1\): n"),
        (("4,5", 2, 0, (1, 2)), rf"take 4 GPUs \(2 times {TP} 2\): name as many"),
    ],
)
def test_gpus_that_an_engine_cannot_have_are_told_with_those_that_it_can(
    asked: tuple[Any, ...], told: str
) -> None:
    with pytest.raises(DevicesError, match=told):
        gpus(*asked)


def test_each_process_of_an_engine_has_as_many_cores_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    for given in ("0,1", "5,4,3,2", "shared", "shared:4"):
        check_cores(given, 2)
    check_cores("shared", 4)
    for given, told in {
        "0": "names 1 core for 2 processes, each with as many of its own: a multiple of 2, and",
        "0,1,2": "names 3 cores for 2 processes",
        "0,0": "names 1 core for 2",
        "shared:1": "is 1 thread for 2 processes",
        "shared:3": "is 3 threads for 2 processes",
    }.items():
        with pytest.raises(CoresError, match=told):
            check_cores(given, 2)
    with pytest.raises(CoresError, match="is 6 threads for 7 processes"):
        check_cores("shared", 7)


def test_vllm_has_a_numa_node_for_each_process_or_is_told_how_to_bind_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    nodes = cores_module._num_nodes()
    check_cores("auto", nodes)
    with pytest.raises(
        CoresError,
        match=rf"leaves {nodes + 1} processes to vLLM, which gives each a NUMA node of its own, "
        rf"and this process may use {nodes}: name {nodes + 1} cores, or .shared",
    ):
        check_cores("auto", nodes + 1)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    check_cores("auto", nodes + 1)


@pytest.mark.parametrize(
    ("cores", "count", "threads", "binding"),
    [
        ("0", 1, "1", None),
        ("0,1", 2, "1", "0|1"),
        ("3,2,1,0", 2, "2", "3,2|1,0"),
        ("shared", 2, "3", "nobind"),
        ("shared:2", 2, "1", "nobind"),
        ("auto", 2, "77", None),
    ],
)
def test_cores_are_divided_among_the_processes(
    cores: str, count: int, threads: str, binding: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    with children_on(cores, count):
        assert os.environ["OMP_NUM_THREADS"] == threads
        assert os.environ.get("VLLM_CPU_OMP_THREADS_BIND") == binding
    assert "VLLM_CPU_OMP_THREADS_BIND" not in os.environ
    assert (executor_on(cores, count) is None) == (count > 1 or cores == "auto")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({TP: 3}, "tensor_parallel_size is 3, and the model has 4 attention heads"),
        ({"pipeline_parallel_size": 3}, "pipeline_parallel_size is 3, and the model has 2 layers"),
        (
            {"pipeline_parallel_size": 2, "enforce_eager": True},
            "enforce_eager is True with pipeline_parallel_size 2 on a CPU.*: leave enforce_eager",
        ),
        (
            {TP: 2, "cpu_cores": str(HERE[0])},
            f"cpu_cores is '{HERE[0]}', which names 1 core for 2 processes",
        ),
        (
            {"data_parallel_size": 99, "cpu_cores": "shared"},
            f"cpu_cores is 'shared', which is {len(HERE)} threads? for 99 processes",
        ),
    ],
)
def test_a_teacher_that_cannot_be_spread_is_not_built(
    settings: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    model = str(write_tiny_model(tmp_path))
    with pytest.raises(TeacherConfigError, match=told):
        build_engine(TeacherConfig(model=model, **settings))


def test_a_teacher_on_fewer_gpus_than_it_asks_for_is_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cores are nobody's affair there."""
    model = str(write_tiny_model(tmp_path))
    config = TeacherConfig(model=model, tensor_parallel_size=2, pipeline_parallel_size=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(TeacherConfigError, match="takes 4 GPUs, and this process sees 3"):
        build_engine(config)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    build_engine(config)


def test_a_teacher_over_nodes_has_the_gpus_of_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TeacherConfig(
        model=str(write_tiny_model(tmp_path)), tensor_parallel_size=4, executor="ray"
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(TeacherConfigError, match="executor is 'ray', and Ray is not installed"):
        build_engine(config)
    monkeypatch.setattr(loading, "find_spec", lambda name: name)
    engine = build_engine(config)
    assert isinstance(engine, VllmEngine)
    assert engine.executor == "ray"


@pytest.mark.parametrize(
    ("size", "gpus", "told"),
    [
        (3, 0, "sampler.tensor_parallel_size is 3, and the model has 2 attention heads"),
        (2, 0, f"sampler.cpu_cores is '{HERE[0]}', which names 1 core for 2 processes"),
        (2, 1, "sampler.tensor_parallel_size 2 takes 2 GPUs, and this process sees 1"),
    ],
)
def test_a_sampler_that_cannot_be_spread_is_not_built(
    size: int, gpus: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    student = str(write_tiny_student(tmp_path / "student"))
    path = tmp_path / "smallest.toml"
    path.write_text(SMALLEST)
    own = [f"sampler.tensor_parallel_size={size}", f'sampler.cpu_cores="{HERE[0]}"']
    config = load_config(path, [*own, f"student.model={student}"])
    with pytest.raises(ConfigError, match=told):
        from_settings.sampler(config, student)


@pytest.mark.parametrize(
    ("own", "gpus", "asked", "told"),
    [
        ("cpu", (), {"weight_transfer": "ipc"}, 'is "ipc", and .* on cpu.* on a CPU: .* CUDA'),
        ("cpu", (0,), {"weight_transfer": "nccl"}, 'is "nccl", and .* on cpu.*; "host"'),
        ("cuda:0", (1,), {"weight_transfer": "ipc"}, 'on cuda:1: .*gpus = "auto".*; "nccl" or "h'),
        ("cuda:0", (0, 1), {"weight_transfer": "ipc"}, "on cuda:0, cuda:1: .*_parallel_size = 1"),
        ("cuda:1", (1,), {"weight_transfer": "nccl"}, 'is "nccl".* on cuda:1: .*others .*; "ipc"'),
        ("cuda:0", (0, 1), {"weight_transfer": "nccl"}, "NCCL joins different GPUs"),
        ("cpu", (), {"sleep_level": 1}, "sleep_level is 1, and the learner is on cpu.*; 0$"),
        ("cuda:0", (1,), {"sleep_level": 2}, "sleep_level is 2, and .* the engine on cuda:1: .*0$"),
    ],
)
def test_a_way_for_weights_that_is_not_there_is_refused(
    own: str, gpus: tuple[int, ...], asked: dict[str, Any], told: str
) -> None:
    settings = VllmSamplerSettings(**asked)
    with pytest.raises(ConfigError, match=told):
        ways(settings, own, gpus)


def test_an_adapter_beside_its_base_comes_as_files_and_needs_its_base() -> None:
    adapter = AdapterInVllm(rank=8)
    by_ipc = VllmSamplerSettings(weight_transfer="ipc")
    with pytest.raises(ConfigError, match=r'is "ipc", and the adapter .* files: "host"'):
        ways(by_ipc, "cuda:0", (0,), adapter)
    deep = VllmSamplerSettings(sleep_level=2)
    with pytest.raises(ConfigError, match=r"sleep_level is 2, and the adapter's base .*: 1, or"):
        ways(deep, "cuda:0", (0,), adapter)
    assert ways(VllmSamplerSettings(sleep_level=1), "cuda:0", (0,), adapter) == (None, 1)


@pytest.mark.parametrize(
    ("way", "gpus", "own"), [("ipc", (0,), 0), ("nccl", (1,), 0), ("nccl", (2, 3), 1)]
)
def test_a_way_that_is_there_is_taken(way: Any, gpus: tuple[int, ...], own: int) -> None:
    settings = VllmSamplerSettings(weight_transfer=way, sleep_level=1 if way == "ipc" else 0)
    found, level = ways(settings, f"cuda:{own}", gpus)
    assert found is not None
    assert (found.backend, found.device, level) == (
        way,
        torch.device("cuda", own),
        settings.sleep_level,
    )


def test_it_is_refused_before_an_engine_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    student = str(write_tiny_student(tmp_path / "student"))
    path = tmp_path / "smallest.toml"
    path.write_text(SMALLEST)
    for way in ("ipc", "nccl"):
        asked = [f"student.model={student}", f"sampler.weight_transfer={way}"]
        config = load_config(path, [*asked, "student.device=cpu"])
        with pytest.raises(ConfigError, match=f'weight_transfer is "{way}", and .*needs CUDA'):
            from_settings.sampler(config, student)
        assert from_settings.weight_format(config).is_announced


def ways(
    settings: VllmSamplerSettings,
    own: str,
    gpus: tuple[int, ...],
    adapter: AdapterInVllm | None = None,
) -> tuple[VllmTransfer | None, int]:
    """By which weights come, and to which level the engine sleeps."""
    device = torch.device(own)
    found = vllm_devices.transfer(settings, device, gpus, adapter)
    return found, vllm_devices.sleep_level(settings, device, gpus, adapter)
