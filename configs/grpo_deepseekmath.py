"""GRPO as DeepSeekMath has it: means by answer, a KL to the start, one update of each rollout. (There 64 answers to a
question, lr 1e-6.)"""

loss_type = "grpo"
beta = 0.04
epochs = 1
minibatches = 1
out_dir = "out/arith/grpo_deepseekmath"
