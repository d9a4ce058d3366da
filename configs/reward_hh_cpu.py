"""A reward model on 10,000 pairs of HH-RLHF, harmless-base. After pretrain_hh_cpu.py and sft_hh_cpu.py."""

task = "hh"
data = "hh-harmless"
max_length = 256
batch_size = 16
epochs = 1.0
token_weight = 0.0
optimizer = "adamw"
lr = 3e-4
warmup = 30
weight_decay = 0.1
center = 0.01
eval_every = 100
eval_pairs = 200
normalize_on = 64
max_new_tokens = 64
