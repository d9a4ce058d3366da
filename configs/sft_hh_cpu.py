"""The chosen dialogues of HH-RLHF, harmless-base, in the chat template."""

task = "hh"
data = "hh-harmless"
seq_len = 512
batch_size = 8
epochs = 1.0
lr = 5e-4
warmup = 20
eval_every = 100
