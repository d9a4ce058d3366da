"""The same with adapters of rank 16 in place of all weights: see grpo_smollm2_sums.py."""

task = "smollm2"
out_dir = "out/smollm2/grpo_lora"
data = "sums/train.jsonl"
eval_data = "sums/held_out.jsonl"
init_from = "out/smollm2/start"
steps = 32
prompts_per_step = 16
group_size = 8
max_new_tokens = 6
micro_batch_size = 64
epochs = 1
minibatches = 1
lora_rank = 16
lora_alpha = 32.0
lr = 2e-4
final_lr = 1.0
warmup = 0
eval_every = 8
eval_prompts = 256
save_every = 8


def right(prompt, answer, row):
    """The number and nothing else, and then the end."""
    return float(answer.strip() == str(row["answer"]) and row["finished"])
