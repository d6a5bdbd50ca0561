"""Imports what teacher and trainer import at their start, so that its bytecode stays beside it.

For the build of the images, as root, before the root becomes read-only. A module that cannot be
imported where there is no GPU is named and left out.
"""

from __future__ import annotations

import importlib
import os
import sys

MODULES = (
    "fastapi",
    "grpc_health.v1.health",
    "grpc_reflection.v1alpha.reflection",
    "huggingface_hub.constants",
    "math_verify",
    "orjson",
    "prometheus_client",
    "pyarrow.parquet",
    "pydantic_settings",
    "rich.console",
    "rich.progress",
    "tensorboard.compat.proto.event_pb2",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch._inductor.codecache",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "transformers.generation",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
    "uvicorn.protocols.http.h11_impl",
    "uvloop",
    "vllm.entrypoints.llm",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.qwen3",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.gpu_worker",
)


def main() -> None:
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    for module in MODULES:
        try:
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 - of any kind: libraries look for devices
            sys.stdout.write(f"{module}: {error}\n")


if __name__ == "__main__":
    main()
