"""GRPO as DeepSeekMath has it, on the embedded task: means by answer, a KL to the start, two updates on each
rollout."""

loss_type = "grpo"
beta = 0.04
updates_per_rollout = 2
out_dir = "out/arith/grpo_kl"
