"""The dialogues of HH-RLHF, harmless-base, on a CPU: the start of the preference experiments on real pairs."""

task = "hh"
data = "hh-harmless"
tokenizer = "bpe"
vocab_size = 4096
d_model = 256
n_layers = 4
n_heads = 8
n_kv_heads = 4
max_seq_len = 512
seq_len = 256
batch_size = 16
steps = 1200
lr = 2e-3
warmup = 50
eval_every = 200
eval_windows = 64
sample_prompt = "\n\nHuman: How are you?\n\nAssistant:"
