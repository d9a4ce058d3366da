"""The 406 M shape on The Pile with GPT-2's vocabulary: width 1024, 24 blocks, one GPU."""

task = "pile406m"
data = "pile"
max_documents = 6_000_000  # about 8 billion tokens, 20 for each parameter
tokenizer = "r50k"
vocab_size = 50304
d_model = 1024
n_layers = 24
n_heads = 16
n_kv_heads = 16
max_seq_len = 1024
seq_len = 1024
batch_size = 512
micro_batch_size = 32
steps = 16000
optimizer = "adamw"
lr = 4e-4
warmup = 500
activation_checkpointing = False
eval_every = 1000
eval_windows = 256
save_every = 1000
keep_last = 2
sample_prompt = "The history of"
