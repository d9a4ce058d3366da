"""GRPO on SmolLM2-135M-Instruct, on a CPU: sums. After examples/sums.py and pretrained.py import."""

task = "smollm2"
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
lr = 1e-5
final_lr = 1.0
warmup = 0
eval_every = 8
eval_prompts = 256
save_every = 8


def right(prompt, answer, row):
    """The number and nothing else, and then the end."""
    return float(answer.strip() == str(row["answer"]) and row["finished"])
