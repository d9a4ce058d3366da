"""PPO on the weak reward model of reward_weak.py, without a leash: the score rises, the answers get worse."""

task = "arith"
reward = "out/arith/reward_weak"
out_dir = "out/arith/ppo_hack"
beta = 0.0
steps = 60
eval_every = 5
