"""A small model on classic books (a local mirror, or any folder of text files with --data), on a CPU."""

task = "books"
data = "books"
vocab_size = 4096
d_model = 192
n_layers = 6
n_heads = 6
n_kv_heads = 3
max_seq_len = 512
seq_len = 256
batch_size = 16
steps = 700
optimizer = "muon"
lr = 4e-3
warmup = 30
eval_windows = 64
sample_prompt = "It was a dark night, and"
