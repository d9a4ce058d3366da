"""SFT of SmolLM2-135M-Instruct on 500 of Dolly's conversations, with adapters, on a CPU. After pretrained.py import."""

task = "smollm2"
data = "dolly"
n_examples = 500
init_from = "out/smollm2/start"
seq_len = 512
batch_size = 8
micro_batch_size = 2
epochs = 1.0
lora_rank = 16
lora_targets = ("*_proj",)
lr = 3e-4
eval_every = 25
