"""A reward model on 10,000 pairs of HH-RLHF, harmless-base."""

task = "hh"
data = "hh-harmless"
max_length = 256
batch_size = 16
epochs = 1.0
lr = 2e-4
warmup = 50
weight_decay = 0.1
center = 0.01
eval_every = 100
eval_pairs = 200
normalize_on = 64
max_new_tokens = 64
