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
columns = ["start", "accuracy", "correct", "kl", "entropy", "length"]
curves = ["accuracy", "correct"]
