"""A 50 M model on all of TinyStories, for one GPU."""

task = "tinystories50m"
data = "tinystories"
vocab_size = 4096
d_model = 512
n_layers = 14
n_heads = 8
n_kv_heads = 8
max_seq_len = 512
seq_len = 512
batch_size = 128
micro_batch_size = 64
steps = 8000
optimizer = "adamw"
lr = 1e-3
warmup = 200
eval_every = 500
eval_windows = 512
save_every = 1000
sample_prompt = "Once upon a time"
