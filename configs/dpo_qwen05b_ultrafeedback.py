"""DPO on Qwen2.5-0.5B-Instruct with UltraFeedback's pairs, on one GPU. After pretrained.py import."""

task = "qwen05b"
data = "ultrafeedback"
init_from = "out/qwen05b/start"
n_pairs = 20000
max_length = 1024
batch_size = 32
micro_batch_size = 8
epochs = 1.0
lr = 5e-7
beta = 0.1
warmup = 60
eval_every = 200
eval_pairs = 512
save_every = 200
