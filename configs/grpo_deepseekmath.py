"""GRPO as DeepSeekMath has it: means by answer, a KL to the start. (There 64 answers to a question, lr 1e-6.)"""

loss_type = "grpo"
beta = 0.04
out_dir = "out/arith/grpo_deepseekmath"
