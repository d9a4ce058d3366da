"""GRPO on Qwen2.5-0.5B-Instruct with GSM8K, on one GPU. After: python pretrained.py import Qwen/Qwen2.5-0.5B-Instruct
out/qwen05b/start"""

from verify import lax_correctness_reward

task = "qwen05b"
data = "gsm8k"
init_from = "out/qwen05b/start"
steps = 200
prompts_per_step = 64
group_size = 8
max_new_tokens = 320
micro_batch_size = 64
epochs = 1
minibatches = 1
lr = 1e-6
warmup = 10
clip_high = 0.28
eval_every = 50
eval_prompts = 512
save_every = 50


def right(prompt, answer, row):
    """The last number that it says. A model that was trained by others writes no answer part."""
    return lax_correctness_reward(answer, row["answer"].rpartition("####")[2].strip(), "last") * row["finished"]
