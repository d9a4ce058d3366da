"""GDPO on GSM8K on one GPU, with the rewards of its authors' demonstration: right, in form, a whole number."""

task = "gsm8k"
data = "gsm8k"
integer_weight = 1.0
length_weight = 0.0
steps = 600
arith_warmup = 50
arith_fade = 100
prompts_per_step = 64
group_size = 16
max_new_tokens = 200
micro_batch_size = 256
lr = 5e-5
warmup = 10
eval_every = 50
eval_prompts = 512
save_every = 50
epochs = 1
minibatches = 1
