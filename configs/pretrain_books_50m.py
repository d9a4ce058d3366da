"""A 50 M model on TinyStories and classic books, two minutes on one H200: the start of GSM8K where there is no Pile."""

task = "books50m"
data = "tinystories+books"
vocab_size = 4096
d_model = 512
n_layers = 14
n_heads = 8
n_kv_heads = 8
max_seq_len = 512
seq_len = 512
batch_size = 128
micro_batch_size = 128
steps = 1200
optimizer = "adamw"
lr = 1e-3
warmup = 100
eval_every = 200
eval_windows = 256
save_every = 400
sample_prompt = "It was a dark night, and"
