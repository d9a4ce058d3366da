"""PPO without a leash on a weak reward model: the score rises, the answers get worse.

First make the weak model: python reward.py --n_pairs 96 --out_dir out/arith/reward_weak
"""

reward = "out/arith/reward_weak"
out_dir = "out/arith/ppo_hack"
beta = 0.0
lr = 6e-4
steps = 100
