"""What is known of a checkpoint without fetching or loading anything: a folder, or what a hub's
cache has, and whether its files are whole."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OFFLINE = "HF_HUB_OFFLINE"
CONFIGURATION, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
AGAIN = "fetch or save it anew"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_LENGTH_BYTES, _MAX_HEADER_BYTES = 8, 100_000_000
"""Of safetensors: the header's length comes first, and the library takes none that is longer."""
_LFS_POINTER = b"version https://git-lfs"
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken", "tekken.json")
"""One of these holds the tokens; code of its own may have them too."""
_TOKENIZER_CODE = "tokenization_*.py"


class CheckpointFileError(ValueError):
    """A file of a checkpoint that is missing, broken or not whole: which, why, and the remedy."""


def is_hub_name(model: str) -> bool:
    """Whether it may be the name of a repository on a hub."""
    return _HUB_NAME.fullmatch(model) is not None


def folder_of(model: str, revision: str = "") -> Path | None:
    """The folder itself, or that in which a hub's cache has it; None where neither is."""
    folder = Path(model)
    if (folder / CONFIGURATION).is_file():
        return folder
    if folder.exists() or not is_hub_name(model):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, CONFIGURATION, revision=revision or None)
    except HFValidationError:  # the rules of names are more than their letters
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def model_json(model: str, revision: str = "") -> Mapping[str, Any] | None:
    """config.json of a folder or of what is in the cache of the hub; None where neither has it.
    Raises CheckpointFileError for one that is none."""
    folder = folder_of(model, revision)
    if folder is None:
        return None
    path = folder / CONFIGURATION
    found = _object(path)
    for name, part in ((f"{path}", found), (f"text_config of {path}", found.get("text_config"))):
        if not isinstance(part, dict | None):
            raise CheckpointFileError(f"{name} is {part!r}, must be an object: {AGAIN}")
        for size in _SIZES:
            if isinstance(value := (part or {}).get(size), str | bool | dict):
                raise CheckpointFileError(
                    f"{size} of {name} is {value!r}, must be a number: {AGAIN}"
                )
    return found


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointFileError(_unreadable(path, error)) from error
    except UnicodeDecodeError as error:
        raise CheckpointFileError(
            f"{path} is not UTF-8: {error.reason} at byte {error.start}: {AGAIN}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointFileError(f"{path} is no JSON: {error}: {AGAIN}") from error
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise CheckpointFileError(f"{path} holds a JSON {kind}, must be an object: {AGAIN}")
    return found


def _unreadable(path: Path, error: OSError) -> str:
    remedy = "let the user that runs this read it (chmod a+r)"
    why = f"{path} cannot be read by user {os.geteuid()}: {error.strerror}"
    return f"{why}: {remedy}" if isinstance(error, PermissionError) else why


def weight_files(folder: Path) -> list[Path]:
    """The safetensors that are loaded: those of the index, whether or not they are there; else the
    one file of a small model; else all. Raises CheckpointFileError for an index that is none."""
    index = folder / INDEX
    if not index.is_file():
        whole = folder / WEIGHTS
        return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    names = _object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise CheckpointFileError(f"{index} has no weight_map of file names: {AGAIN}")
    return [folder / name for name in sorted({*names.values()})]


def is_at_hand(model: str, revision: str = "") -> bool:
    """Configuration and weights are here, so that nothing is fetched. Raises CheckpointFileError
    for what cannot be read."""
    folder = folder_of(model, revision)
    if folder is None:
        return False
    files = weight_files(folder) or [*folder.glob("*.bin")]
    return bool(files) and all(file.is_file() for file in files)


def check_stored(model: str, revision: str = "") -> None:
    """Raises CheckpointFileError where the checkpoint is here and cannot be loaded: a configuration
    that is none, a file of weights that is missing or not whole. What a hub's cache lacks is
    fetched."""
    if (folder := folder_of(model, revision)) is None:
        return
    model_json(model, revision)
    for file in weight_files(folder):
        if file.is_file():
            check_safetensors(file)
        elif Path(model).is_dir():
            raise CheckpointFileError(f"{file} is not there, and {INDEX} names it: {AGAIN}")


def check_safetensors(path: Path) -> None:
    """Raises CheckpointFileError for a file that is shorter or longer than its header says, or has
    no header; reads no weights."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            first = stream.read(_LENGTH_BYTES)
            length = int.from_bytes(first, "little")
            whole_header = len(first) == _LENGTH_BYTES and length <= size - _LENGTH_BYTES
            header = stream.read(length) if whole_header and length <= _MAX_HEADER_BYTES else b""
            stream.seek(0)
            is_pointer = stream.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError as error:
        raise CheckpointFileError(_unreadable(path, error)) from error
    if is_pointer:
        raise CheckpointFileError(f"{path} is a pointer of Git LFS: fetch it with `git lfs pull`")
    if not header:
        raise CheckpointFileError(
            f"{path} has {size:,} bytes, and ends within its header or has none: {AGAIN}"
        )
    try:
        tensors = json.loads(header)
        ends = [t["data_offsets"][1] for name, t in tensors.items() if name != "__metadata__"]
        wanted = _LENGTH_BYTES + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointFileError(f"{path} has a header that is none: {AGAIN}") from error
    if size != wanted:
        raise CheckpointFileError(
            f"{path} has {size:,} bytes, and its header speaks of {wanted:,}: {AGAIN}"
        )


def check_tokenizer_files(model: str) -> None:
    """Raises CheckpointFileError for a local folder without a tokenizer's files, of which
    transformers makes a tokenizer without tokens."""
    folder = Path(model)
    kinds = (*TOKENIZER_FILES, _TOKENIZER_CODE)
    if folder.is_dir() and not any(True for kind in kinds for _ in folder.glob(kind)):
        raise CheckpointFileError(
            f"{folder} has no tokenizer's file ({', '.join(TOKENIZER_FILES)}): copy those of the "
            "model that it was made of"
        )


@contextmanager
def fetching_nothing() -> Iterator[None]:
    """The libraries that are imported within for the first time ask no hub, and say so at once."""
    before = os.environ.get(OFFLINE)
    os.environ[OFFLINE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[OFFLINE]
        else:
            os.environ[OFFLINE] = before
