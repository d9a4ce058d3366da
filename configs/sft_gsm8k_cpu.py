"""GSM8K, Dolly and Alpaca together, a few minutes on two CPU cores, from the small TinyStories model."""

task = "gsm8k_cpu"
data = "gsm8k+dolly+alpaca"
n_examples = 1500
init_from = "out/tinystories/pretrain"
seq_len = 512
batch_size = 8
epochs = 1.0
eval_every = 50
