"""GRPO on GSM8K on one GPU: arithmetic first, where a small model finds reward at all, then less and less of it."""

task = "gsm8k"
data = "gsm8k"
steps = 600
arith_warmup = 50
arith_fade = 100
prompts_per_step = 64
group_size = 16
max_new_tokens = 200
micro_batch_size = 256
beta = 0.001
clip_high = 0.28
lr = 5e-5
warmup = 10
eval_every = 50
eval_prompts = 512
save_every = 50
epochs = 1
minibatches = 1
