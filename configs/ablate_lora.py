"""All weights, LoRA and DoRA in GRPO from one start: docs/experiments/lora.md."""

name = "lora"
stage = "grpo"
base = "steps=30 eval_every=5 eval_prompts=128"
cells = [
    "what learns | all weights | lr=2e-4",
    "what learns | LoRA, rank 1 | lora_rank=1 lr=1e-3",
    "what learns | LoRA, rank 4 | lora_rank=4 lr=1e-3",
    "what learns | LoRA, rank 16 | lora_rank=16 lr=1e-3",
    "what learns | DoRA, rank 4 | lora_rank=4 dora=True lr=1e-3",
    "what learns | LoRA, rank 4, from SFT with LoRA | start=rank4 lora_rank=4 lr=1e-3",
]
starts = ["rank4 | lora_rank=4 lr=3e-3"]
paired = True  # the order of the questions moves all cells alike
goal = 0.8
columns = [
    "start", "accuracy", "accuracy-reference", "accuracy-mean", "accuracy-mean-reference", "correct",
    "correct-reference", "rollouts", "kl", "entropy", "length",
]  # fmt: skip
curves = ["accuracy", "correct"]
