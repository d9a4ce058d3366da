"""A few steps of GRPO on GSM8K on a CPU, after two on the embedded task: to see the path work, not to learn GSM8K."""

task = "gsm8k_cpu"
data = "gsm8k"
steps = 6
arith_warmup = 2
prompts_per_step = 4
group_size = 4
max_new_tokens = 128
micro_batch_size = 8
lr = 5e-5
eval_every = 3
eval_prompts = 16
save_every = 3
epochs = 1
minibatches = 1
