"""GSM8K's test questions for the two small models of the CPU presets."""

checkpoints = ("out/gsm8k_cpu/sft", "out/gsm8k_cpu/grpo")
data = "gsm8k"
n = 64
max_new_tokens = 128
batch_size = 64
