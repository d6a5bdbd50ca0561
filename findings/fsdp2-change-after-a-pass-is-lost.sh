#!/usr/bin/env bash
# torch 2.13.0, FSDP2 (`fully_shard`): a change of `model.parameters()` in place is lost, if the last thing that the
# model did was a forward pass without gradient.
#
# What is done: one linear layer, fully_shard on two gloo processes. Under no_grad: a forward pass, then 1 is added to
# every parameter, then the same pass again, once at once and once after `model.reshard()`.
# Seen: before any pass `parameters()` gives DTensors, and the change lasts. After a pass without gradient it gives
# plain, whole tensors, because a root module keeps what it gathered until a backward pass (reshard_after_forward is
# None, which for a root is False): the pass at once shows the change, after reshard() it is gone, and the state dict
# never had it. So an evaluation between two updates decides whether an in-place change of weights (an average, a
# quantisation, a probe) reaches the model. `model.reshard()` after such a pass is the remedy.
# Exits with 0 while that is so, with 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check torch==2.13.0 numpy
cat >change.py <<'PY'
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

dist.init_process_group("gloo")


def changed(*, pass_before: bool) -> tuple[bool, bool, bool]:
    """Whether parameters are spread, and whether the change shows at once, and after reshard()."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
    x = torch.ones(1, 4)
    expected = model(x).detach() + 4.0
    fully_shard(model)
    with torch.no_grad():
        if pass_before:
            model(x)
        is_spread = all(isinstance(p, DTensor) for p in model.parameters())
        for parameter in model.parameters():
            parameter.add_(1.0)
        at_once = torch.allclose(model(x), expected)
        model.reshard()
        after = torch.allclose(model(x), expected)
    return is_spread, at_once, after


found = changed(pass_before=False), changed(pass_before=True)
if dist.get_rank() == 0:
    for when, (is_spread, at_once, after) in zip(("no pass", "a pass without gradient"), found):
        print(f"after {when}: DTensors {is_spread}; shows at once {at_once}, after reshard {after}")
dist.destroy_process_group()
sys.exit(0 if found == ((True, True, True), (False, True, False)) else 1)
PY
OMP_NUM_THREADS=1 env/bin/torchrun --standalone --nproc-per-node 2 change.py
