"""A low-rank adapter (LoRA, arXiv 2106.09685) on a frozen student: made, loaded, merged, saved.

peft puts it into the student's own layers, so that whoever calls the student computes with it, and
what calls it needs to know nothing of that. Only its matrices are learnt. It is never merged in
place: a base in bfloat16 would not be the same again. On disk it is what peft's own programs read.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from student_trainer.errors import CheckpointError, ConfigError, one_line, some
from student_trainer.learner.sharding import own_part, whole

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

ADAPTER_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
ALL_LINEAR: Literal["all-linear"] = "all-linear"
NAME = "default"
"""Of the one adapter of a model in peft; it is in no file."""
BASE = ".base_layer"
"""What peft puts into the names of a layer's own tensors."""
CHANGED_A, CHANGED_B = 1.25, 1 / 16
"""What A is multiplied by, and what takes the place of B, for a proof that both arrive: nearly a
nat at least, at SmolLM2 with ranks 8 to 64."""
OF_A_PLAIN_ONE = frozenset(
    {
        "r",
        "lora_alpha",
        "target_modules",
        "use_rslora",
        "lora_dropout",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "runtime_config",
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    }
)
"""Fields of peft's configuration that change nothing of what is computed, or are read here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraShape:
    """A new adapter: the factor is alpha / rank, with `rslora` alpha / sqrt(rank)."""

    rank: int
    alpha: float
    targets: tuple[str, ...] | Literal["all-linear"]
    rslora: bool


class Adapter:
    """The adapter of one student."""

    def __init__(self, wrapped: PeftModel) -> None:
        self._wrapped = wrapped

    def parameters(self) -> list[nn.Parameter]:
        """What is learnt."""
        return [p for p in self._wrapped.parameters() if p.requires_grad]

    def tensors(self) -> dict[str, Tensor]:
        """By peft's names, whole."""
        from peft import get_peft_model_state_dict

        found: dict[str, Tensor] = get_peft_model_state_dict(
            self._wrapped, adapter_name=NAME, save_embedding_layers=False
        )
        return {name: whole(tensor.detach()) for name, tensor in found.items()}

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Within it every matrix is another, behind it the very same bits.

        However little was learnt: with a few per cent of a B near 0 a token is what it was, to what
        bfloat16 rounds.
        """
        learnt = [(n, p) for n, p in self._wrapped.named_parameters() if p.requires_grad]
        before = [own_part(parameter.detach()).clone() for _, parameter in learnt]
        with torch.no_grad():
            for name, parameter in learnt:
                own = own_part(parameter)
                own.fill_(CHANGED_B) if ".lora_B." in name else own.mul_(CHANGED_A)
        try:
            yield
        finally:
            with torch.no_grad():
                for (_, parameter), own in zip(learnt, before, strict=True):
                    own_part(parameter).copy_(own)

    @property
    def config(self) -> LoraConfig:
        """peft's, with the targets that were found."""
        config: Any = self._wrapped.peft_config[NAME]
        return config  # type: ignore[no-any-return]

    def save(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """In peft's format: its `tensors` in float32, and its configuration."""
        on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(on_cpu, folder / ADAPTER_FILE, metadata={"format": "pt"})
        self.config.save_pretrained(str(folder))

    def load(self, folder: Path) -> None:
        """Takes the matrices of another one of its shape. Raises CheckpointError naming what does
        not fit."""
        from peft import set_peft_model_state_dict

        found, own = adapter_tensors(folder), self.tensors()
        if unknown := sorted(found.keys() - own.keys()):
            raise CheckpointError(
                f"{folder}: an adapter of another base: the student has no {some(unknown)}"
            )
        if lacking := sorted(own.keys() - found.keys()):
            raise CheckpointError(f"{folder}: an adapter without {some(lacking)}")
        for name, tensor in found.items():
            if tensor.shape != own[name].shape:
                raise CheckpointError(
                    f"{folder}: an adapter of another base: {name} is of {[*tensor.shape]}, and "
                    f"the student's of {[*own[name].shape]}"
                )
        set_peft_model_state_dict(self._wrapped, found, adapter_name=NAME)


def new_config(shape: LoraShape, base: str) -> LoraConfig:
    """peft's configuration of a new adapter. Raises ConfigError where peft is not installed."""
    _check_installed()
    from peft import LoraConfig, TaskType

    is_integer = shape.alpha == int(shape.alpha)
    return LoraConfig(
        r=shape.rank,
        lora_alpha=int(shape.alpha) if is_integer else shape.alpha,  # type: ignore[arg-type]
        target_modules=shape.targets if shape.targets == ALL_LINEAR else [*shape.targets],
        use_rslora=shape.rslora,
        base_model_name_or_path=base,
        task_type=TaskType.CAUSAL_LM,
    )


def config_of(folder: Path) -> LoraConfig:
    """The configuration of an adapter on disk.

    Raises CheckpointError for one that is none, or more than a plain LoRA.
    """
    _check_installed()
    from peft import LoraConfig, PeftConfig

    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder}: no {CONFIG_FILE}, not an adapter in peft's format")
    try:
        with warnings.catch_warnings(action="ignore"):
            config = PeftConfig.from_pretrained(str(folder))
    # Whatever the library makes of a malformed file.
    except Exception as error:
        raise CheckpointError(f"{folder}: cannot read {CONFIG_FILE}: {one_line(error)}") from error
    if not isinstance(config, LoraConfig):
        raise CheckpointError(f"{folder}: an adapter of type {config.peft_type}, not LoRA")
    plain = _fields(LoraConfig())
    more = [
        f"{name} = {value!r}"
        for name, value in _fields(config).items()
        if name not in OF_A_PLAIN_ONE and value != plain.get(name)
    ]
    if isinstance(start := config.init_lora_weights, str) and start != "gaussian":
        more.append(f"init_lora_weights = {start!r}")
    if more:
        raise CheckpointError(
            f"{folder}: more than a plain LoRA ({some(more)}): merge it into its base with peft "
            "and begin with that"
        )
    return config


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The matrices of an adapter on disk, in float32. Raises CheckpointError."""
    try:
        found = load_file(folder / ADAPTER_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot read {ADAPTER_FILE}: {error}") from error
    return {name: tensor.float() for name, tensor in found.items()}


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter rather than a student."""
    return (path / CONFIG_FILE).is_file()


def check_base(folder: Path, config: LoraConfig, base: str) -> None:
    """Raises CheckpointError for an adapter that says it is of another base.

    Folders and names of a hub count as one where they end alike. Shapes alone would not tell a
    model from one that was trained on from it.
    """
    said = config.base_model_name_or_path
    if said and Path(said).name != Path(base).name:
        raise CheckpointError(
            f"{folder}: an adapter of {said}, and the student is {base}; if that is the same under "
            f'another name, student.lora.base_name = "{said}"'
        )


def adapted(model: PreTrainedModel, config: LoraConfig) -> Adapter:
    """Puts a new adapter, which changes nothing yet, into a model and freezes all else of it.

    Raises ConfigError for targets that are not there, or are no linear layers below the head.
    """
    from peft import get_peft_model

    _check_targets(model, config.target_modules)
    base = config.base_model_name_or_path
    try:
        with warnings.catch_warnings(action="ignore"):
            wrapped = get_peft_model(model, config, adapter_name=NAME)
    except ValueError as error:
        raise ConfigError(f"student.lora: {one_line(error)}") from error
    # Which peft takes for the folder that the model was loaded from.
    config.base_model_name_or_path = base
    head = model.get_output_embeddings()
    wrong = [
        name
        for name, module in model.named_modules()
        if hasattr(module, "base_layer")
        and (module is head or not isinstance(module.base_layer, nn.Linear | Conv1D))
    ]
    if wrong:
        raise ConfigError(
            f"student.lora.targets: {some(wrong)} would be adapted, and only linear layers below "
            "the head can be: the head's gradient is made in blocks"
        )
    return Adapter(wrapped)


def _check_targets(model: nn.Module, targets: Any) -> None:
    """peft passes over a name that nothing has, as long as another one is found."""
    if isinstance(targets, str):  # all-linear, or a pattern, of which peft says whether it matches
        return
    names = [name for name, _ in model.named_modules()]
    for target in sorted(targets):
        if not any(_is_meant(name, target) for name in names):
            known = sorted(
                {n.rpartition(".")[2] for n, m in model.named_modules() if _is_linear(m)}
            )
            raise ConfigError(
                f"student.lora.targets: no layer of the student is called {target!r}; its linear "
                f"layers are {', '.join(known)}"
            )


def num_adapted(model: nn.Module, shape: LoraShape, head: nn.Module | None) -> int:
    """Parameters that an adapter has on a model, which may be without memory (meta)."""
    return sum(
        shape.rank * sum(module.weight.shape)
        for name, module in model.named_modules()
        if _is_linear(module)
        and module is not head
        and (
            shape.targets == ALL_LINEAR or any(_is_meant(name, target) for target in shape.targets)
        )
    )


def _is_meant(name: str, target: str) -> bool:
    """Whether a target is a layer's name or its end, as peft has it."""
    return name == target or name.endswith(f".{target}")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def own_name(name: str) -> str | None:
    """What a tensor of an adapted model is called in the model alone; None for the adapter's."""
    return None if ".lora_" in name else name.replace(BASE, "")


def merged(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A tensor of a model, whole, by its own name, with what an adapter adds: W + factor * B A.

    In float32 where there is an adapter, and a new one; else the tensor itself.
    """
    parent, _, last = name.rpartition(".")
    layer: Any = model.get_submodule(parent) if last == "weight" else None
    if not hasattr(layer, "get_delta_weight"):
        return whole(tensor)
    with torch.no_grad():
        added: Tensor = layer.get_delta_weight(NAME)
        return whole(tensor).float() + whole(added).float()


def written_config(config: LoraConfig) -> str:
    """As peft writes it, for a sampler that reads it from a file."""

    def plain(value: object) -> object:
        return sorted(value) if isinstance(value, set | frozenset) else str(value)

    return json.dumps(_fields(config), default=plain, indent=2)


def _fields(config: LoraConfig) -> Mapping[str, Any]:
    fields: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call]
    return fields


def _check_installed() -> None:
    if find_spec("peft") is None:
        raise ConfigError("student.lora needs peft: pip install 'driftline[lora]'")
