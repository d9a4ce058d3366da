"""DPO on SmolLM2-135M-Instruct, with 400 of UltraFeedback's pairs and adapters, on a CPU. After pretrained.py."""

task = "smollm2"
data = "ultrafeedback"
n_pairs = 400
init_from = "out/smollm2/start"
max_length = 384
batch_size = 8
micro_batch_size = 2
epochs = 1.0
lora_rank = 16
lr = 2e-4
beta = 0.1
eval_every = 25
eval_pairs = 64
