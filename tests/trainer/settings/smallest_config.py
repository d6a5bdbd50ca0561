"""Every required setting of a trainer and next to nothing else."""

SMALLEST = """
[run]
out = "runs/x"
steps = 3
[student]
model = "student"
[data]
train = "train.jsonl"
[rollout]
prompts_per_step = 4
max_context = 200
[teacher]
endpoints = ["127.0.0.1:1"]
[budget]
kind = "fixed"
max_tokens = 100
[loss]
kind = "local_support_matching"
[optim]
learning_rate = 1e-3
"""
