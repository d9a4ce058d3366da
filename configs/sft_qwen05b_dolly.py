"""SFT of Qwen2.5-0.5B-Instruct on Dolly, on one GPU. After pretrained.py import."""

task = "qwen05b"
data = "dolly"
init_from = "out/qwen05b/start"
seq_len = 1024
batch_size = 32
micro_batch_size = 8
epochs = 2.0
lr = 1e-5
weight_decay = 0.0
warmup = 30
eval_every = 100
save_every = 200
