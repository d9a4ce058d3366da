"""Experts against dense layers of the same work, and what keeps them at work: docs/experiments/experts.md."""

name = "experts"
stage = "pretrain"
base = "steps=400 eval_every=40 warmup=40 compile=off"
cells = [
    "the work of a token alike | dense | d_ff=352",
    "the work of a token alike | 8 experts, 2 for a token | n_experts=8",
    "the work of a token alike | 1 of 8 experts, 1 shared | n_experts=8 n_experts_per_token=1 n_shared_experts=1",
    "the work of a token alike | dense, four times as wide | d_ff=1408",
    "balancing | a loss for each layer | n_experts=8",
    "balancing | a loss over all layers | n_experts=8 balance=pooled",
    "balancing | over all layers, weight 1 | n_experts=8 balance=pooled balance_weight=1.0",
    "balancing | a bias | n_experts=8 balance=bias",
    "balancing | none | n_experts=8 balance=none",
]
columns = ["bits_per_byte", "bits_per_byte-reference", "busiest", "idlest", "parameters", "active", "seconds"]
curves = ["bits_per_byte-reference", "busiest"]
