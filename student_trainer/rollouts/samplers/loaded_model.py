"""What the samplers over transformers ask of a loaded model: where it ends, and to take weights."""

from __future__ import annotations

from transformers import PreTrainedModel

from student_trainer.errors import WeightSyncError, some
from student_trainer.rollouts.samplers.base import Weights


def end_ids(model: PreTrainedModel) -> set[int]:
    """The end tokens of a model's generation_config."""
    stop = model.generation_config.eos_token_id
    return set(stop) if isinstance(stop, list) else set() if stop is None else {stop}


def load_sent_weights(model: PreTrainedModel, weights: Weights) -> None:
    """Replaces a model's weights by the learner's, under their own names.

    Raises WeightSyncError for those of another model.
    """
    own = model.state_dict()
    # A tied head need not be sent: it is the embedding.
    lacking = {tensor.data_ptr(): name for name, tensor in own.items()}
    for name, tensor in weights:
        if name not in own or own[name].shape != tensor.shape:
            known = f"of {[*own[name].shape]}" if name in own else "not at all"
            raise WeightSyncError(
                f"the sampler cannot load them: {name} is sent of {[*tensor.shape]}, the "
                f"sampler has it {known}"
            )
        own[name].copy_(tensor)
        lacking.pop(own[name].data_ptr(), None)
    if lacking:
        names = sorted(lacking.values())
        raise WeightSyncError(f"the sampler cannot load them: {some(names)} are not sent")
