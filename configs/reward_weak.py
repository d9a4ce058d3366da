"""A reward model that has seen next to nothing: 96 pairs, no plain sums. What ppo_hack.py starts from."""

task = "arith"
data = "arith"
out_dir = "out/arith/reward_weak"
n_pairs = 96
n_sums = 0
batch_size = 8
epochs = 4.0
eval_every = 12
