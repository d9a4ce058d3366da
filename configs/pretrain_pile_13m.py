"""The 13 M shape on The Pile with GPT-2's vocabulary: width 128, 1 block, one GPU."""

task = "pile13m"
data = "pile"
max_documents = 1_000_000
tokenizer = "r50k"
vocab_size = 50304
d_model = 128
n_layers = 1
n_heads = 4
n_kv_heads = 4
max_seq_len = 1024
seq_len = 1024
batch_size = 256
micro_batch_size = 32
steps = 10000
optimizer = "adamw"
lr = 2e-3
warmup = 500
activation_checkpointing = False
eval_every = 1000
eval_windows = 256
save_every = 1000
keep_last = 2
sample_prompt = "The history of"
