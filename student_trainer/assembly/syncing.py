"""How learner and sampler are kept equal: what is sent, what is held against what, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from student_trainer.assembly import adapting, from_settings
from student_trainer.assembly.from_settings import Problems
from student_trainer.learner.export import export_bytes, exported
from student_trainer.learner.learner import Learner
from student_trainer.pretrained import load_student, tensor_names
from student_trainer.rollouts.probe import (
    LONGEST_WINDOW_ON_A_CPU,
    PROBE_TOKENS,
    Proof,
    probe_prompts,
)
from student_trainer.rollouts.samplers.base import Sampler
from student_trainer.rollouts.stream import LoopThread
from student_trainer.rollouts.weight_sync import WeightSync
from student_trainer.settings.config import TrainerConfig

NUM_PROBE_PROMPTS = 2


def sync(
    config: TrainerConfig,
    learner: Learner,
    sampler: Sampler,
    problems: Problems,
    say: Callable[[str], None],
    *,
    shares_weights: bool = False,
) -> WeightSync:
    """What moves the weights, step after step, unless the sampler shares them. Its probes fit the
    context, with what they sample; of a longer prompt the beginning."""
    room = max(1, config.rollout.max_context - PROBE_TOKENS)
    return WeightSync(
        learner,
        sampler,
        probe_prompts=[prompt.token_ids[:room] for prompt in problems.train[:NUM_PROBE_PROMPTS]],
        max_logprob_gap=from_settings.max_sync_gap_nats(config),
        written=None if shares_weights else from_settings.weight_format(config),
        say=say,
        excluded_ids=learner.excluded_ids,
    )


def load_adapter(
    config: TrainerConfig, sampler: Sampler, loop: LoopThread, say: Callable[[str], None]
) -> None:
    """Has a sampler that runs generate with the adapter that the settings name, as it is there.

    Raises ConfigError, CheckpointError, WeightSyncError.
    """
    written = from_settings.weight_format(config)
    model = load_student(
        config.student.model,
        dtype=from_settings.dtype(config),
        device=torch.device("cpu"),
        attention=config.student.attention,
    )
    adapter = adapting.adapter(config, model, None)
    sampler.make_room(export_bytes(model, written, adapter), say)
    loop.run(sampler.load_weights(exported(model, written, adapter)))


def proof(
    config: TrainerConfig,
    learner: Learner,
    problems: Problems,
    start_from: str,
    is_fresh: bool,
    is_as_loaded: bool,
) -> Proof:
    """What is proven before the first rollout."""
    lora = config.student.lora
    if lora is not None and (lora.adapter is not None or not is_fresh):
        # The sampler has loaded the base, and the learner begins with what was learnt of it.
        is_as_loaded = False
    as_saved = from_settings.weight_format(config).as_saved
    window = learner.sliding_window
    return Proof(
        prompts=probe_prompts(
            [prompt.token_ids for prompt in problems.train[:NUM_PROBE_PROMPTS]],
            max_context=config.rollout.max_context,
            sliding_window=window if _is_probed(config, window) else None,
        ),
        is_fresh=is_fresh,
        is_as_loaded=is_as_loaded,
        checkpoint_names=tensor_names(start_from) if as_saved else None,
    )


def warnings(config: TrainerConfig, learner: Learner) -> Iterator[str]:
    """What the proof leaves out."""
    yield from _of_a_merged_adapter(config)
    window = learner.sliding_window
    if _is_passed(config, window) and not _is_probed(config, window):
        yield (
            f"the student's sliding window is {window} tokens: that the sampler computes more than "
            f"that as the learner does is not proven on a CPU (at most {LONGEST_WINDOW_ON_A_CPU}). "
            f"rollout.max_context up to {window} needs no proof"
        )


def _of_a_merged_adapter(config: TrainerConfig) -> Iterator[str]:
    """Base and adapter one after the other are not what they are in one matrix of 16 bits."""
    dtype, settings = from_settings.sampler_dtype(config), config.student.lora
    if settings is None or dtype == "float32" or from_settings.shares_weights(config):
        return
    if not from_settings.weight_format(config).adapter_alone:
        yield (
            f"the sampler has the adapter merged into weights in {dtype}, the learner has it "
            f"beside its base: a difference of tenths of a nat is rounding and may be as large as "
            "the adapter's whole effect, so that the sync is not proven. student.lora.sync = "
            '"adapter" compares like with like, and so does float32'
        )


def _is_passed(config: TrainerConfig, window: int | None) -> bool:
    return window is not None and window < config.rollout.max_context


def _is_probed(config: TrainerConfig, window: int | None) -> bool:
    if window is None or not _is_passed(config, window):
        return False
    on_a_cpu = from_settings.device(config).type == "cpu"
    return not on_a_cpu or window <= LONGEST_WINDOW_ON_A_CPU
