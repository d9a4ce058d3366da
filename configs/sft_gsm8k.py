"""GSM8K, Dolly and Alpaca together, from the 50 M model, on one GPU."""

task = "gsm8k"
data = "gsm8k+dolly+alpaca"
init_from = "out/tinystories50m/pretrain"
seq_len = 512
batch_size = 64
micro_batch_size = 32
epochs = 3.0
lr = 5e-4
warmup = 50
eval_every = 100
