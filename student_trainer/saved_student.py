"""A student on disk, as everybody else's programs open it: weights, tokenizer, chat template and
generation config.

What cannot be saved is found out when the student is loaded, and not after it is trained.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from contextlib import suppress
from copy import deepcopy
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from student_trainer.errors import CheckpointError, one_line
from student_trainer.train_state import replaced
from teacher_wire.end_tokens import united

IDS = ("bos_token_id", "eos_token_id", "decoder_start_token_id")


def save_student(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    stop_ids: Collection[int] = (),
    save: Callable[[Path], object] | None = None,
) -> None:
    """In Hugging Face format; `stop_ids` end its responses besides those that it has already.

    `save` writes the weights, where it is not the model's own way; the generation config stands
    beside an adapter too, for whoever loads it on its base.

    Files may be read by whom the umask lets: safetensors gives them to their owner alone.
    """
    if (config := model.generation_config) is not None:
        ends = list(united(config.eos_token_id, [*stop_ids]))
        config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    (save or model.save_pretrained)(folder)
    if config is not None:
        config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    readable = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(readable)


def save_around(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """What stands beside the weights, as far as each part lets itself be written."""
    for part in (model.config, model.generation_config, tokenizer):
        with suppress(Exception):
            part.save_pretrained(folder)


def check_saveable(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> str | None:
    """Saves everything but the weights once, to a folder that is thrown away.

    Returns what was mended, in words; None for nothing. Raises CheckpointError naming what of the
    student `name` could not be saved after the training.
    """
    mended = _mend_generation_config(model)
    try:
        with tempfile.TemporaryDirectory(prefix="driftline-save-") as folder:
            for part in (model.config, model.generation_config, tokenizer):
                if part is not None:
                    part.save_pretrained(folder)
    # Whatever its own code and the libraries' checks make of it.
    except Exception as error:
        reason = one_line(error)
        raise CheckpointError(f"{name}: could be trained but not saved: {reason}") from error
    return mended


def _mend_generation_config(model: PreTrainedModel) -> str | None:
    """transformers loads a generation config that it refuses to save: made valid here, at once."""
    config = model.generation_config
    if config is None or (reason := _why_invalid(config)) is None:
        return None
    sampled = deepcopy(config)
    sampled.do_sample = True
    bare = GenerationConfig(**{name: getattr(config, name, None) for name in IDS})
    if _why_invalid(sampled) is None:
        model.generation_config, how = sampled, "do_sample is set to true"
    else:
        model.generation_config, how = bare, "all of it but the token ids is dropped"
    return f"the student's generation config could not be saved ({reason}): {how}"


def _why_invalid(config: GenerationConfig) -> str | None:
    try:
        config.validate(strict=True)
    except ValueError as error:
        reason = one_line(error).removeprefix("GenerationConfig is invalid: - ")
        return reason.partition(" -- ")[0][:200]
    return None


def save_or_rescue(
    final: Path, save: Callable[[Path], None], save_what_can_be: Callable[[Path], None]
) -> None:
    """Saves a trained student beside `final` and renames it.

    Where that fails, whatever the reason, at least the weights are written: beside it, else to the
    folder of temporary files. Raises CheckpointError, which says where they are.
    """
    try:
        with replaced(final) as folder:
            save(folder)
    except Exception as error:
        reason = one_line(error)
        where = _rescued(final, save_what_can_be)
        kept = f"its weights are in {where}" if where else "nor could its bare weights"
        unsaved = CheckpointError(f"the trained student could not be saved, {kept}: {reason}")
        unsaved.may_pass = True
        raise unsaved from error


def _rescued(final: Path, save_what_can_be: Callable[[Path], None]) -> Path | None:
    for place in (final.with_name(f"{final.name}-weights"), None):
        with suppress(Exception):
            target = place or Path(tempfile.mkdtemp(prefix="driftline-student-")) / "weights"
            with replaced(target) as folder:
                save_what_can_be(folder)
            return target
    return None
