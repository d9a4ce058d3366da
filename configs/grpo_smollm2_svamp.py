"""GRPO on SmolLM2-135M-Instruct, on a CPU: SVAMP's questions, in its own words. After pretrained.py import."""

from verify import lax_correctness_reward

task = "smollm2"
out_dir = "out/smollm2/grpo_svamp"
data = "svamp"
init_from = "out/smollm2/start"
steps = 60
prompts_per_step = 16
group_size = 8
max_new_tokens = 64
micro_batch_size = 16
epochs = 1
minibatches = 1
lr = 5e-6
warmup = 2
eval_every = 20
eval_prompts = 128
save_every = 20
reward_weights = ("ends=0.1",)


def right(prompt, answer, row):
    """The last number that it says. A model that was trained by others writes no answer part."""
    return lax_correctness_reward(answer, row["Answer"], "last")


def ends(prompt, answer, row):
    """An answer that was cut off has not been given."""
    return float(row["finished"])
