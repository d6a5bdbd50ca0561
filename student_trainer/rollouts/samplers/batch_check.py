"""Proves, when a sampler is started, that a batch of its model gives what each row gives alone.

What could be wrong is a family's: positions of its own, a past that is not keys and values, a mask
that it does not take. Float32 only: what rounds more differs more.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from student_trainer.errors import SamplerError
from student_trainer.learner.families import CHECK_TOLERANCE, family_of, plain_logits
from student_trainer.records import SamplingOptions
from student_trainer.rollouts.samplers.running_batch import Request, RunningBatch
from student_trainer.rollouts.samplers.slot_cache import kinds_of_state

PROMPT_LENGTHS = (9, 3, 1)
NUM_TOKENS = 4
REMEDY = 'sampler.kind = "vllm", or "hf" for the reference'


def check_state(model: PreTrainedModel) -> None:
    """Raises SamplerError for a family whose past is more than keys and values."""
    if kinds := kinds_of_state(model.config):
        raise SamplerError(
            f"{family_of(model)}: it keeps {', '.join(sorted(kinds))} of its past, and a batch has "
            f"keys and values alone: {REMEDY}"
        )


@torch.no_grad()
def check_batch(model: PreTrainedModel) -> None:
    """Raises SamplerError, naming the family, where rows of a batch are not as they are alone."""
    batch = RunningBatch(
        model, max_num_seqs=4, stream_interval=NUM_TOKENS, max_cache_bytes=2**40, end_ids=()
    )
    vocab_size = model.get_output_embeddings().weight.shape[0]
    rng = np.random.default_rng(0)
    options = SamplingOptions(max_tokens=NUM_TOKENS, seed=0)
    events = []
    for length in PROMPT_LENGTHS:
        prompt_ids = rng.integers(vocab_size, size=length, dtype=np.int32)
        batch.add(Request(prompt_ids=prompt_ids, options=options))
        events += batch.step()
    while not batch.is_idle:
        events += batch.step()
    for request, delta in events:
        ids = np.concatenate([request.prompt_ids, delta.token_ids]).astype(np.int64)
        ids_S = torch.from_numpy(ids).to(model.device)
        logits_TV = plain_logits(model, ids_S[None])[0, -NUM_TOKENS - 1 : -1].float()
        rows = torch.arange(NUM_TOKENS)
        plain_T = logits_TV.log_softmax(-1).cpu()[rows, torch.from_numpy(delta.token_ids).long()]
        limit = CHECK_TOLERANCE * max(1.0, logits_TV.abs().max().item())
        gap = np.abs(plain_T.numpy() - delta.logprobs).max()
        if not gap <= limit:
            raise SamplerError(
                f"{family_of(model)}: in a batch with others a row's log-probs are {gap:.2g} nats "
                f"off those of plain model(ids).logits (limit {limit:.2g}): {REMEDY}"
            )
