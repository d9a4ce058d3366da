"""DPO on the pairs of HH-RLHF, harmless-base."""

task = "hh"
data = "hh-harmless"
max_length = 256
batch_size = 16
epochs = 1.0
lr = 1e-4
beta = 0.1
warmup = 50
eval_every = 100
eval_pairs = 200
