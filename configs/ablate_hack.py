"""What a policy writes when the verifier is too kind: docs/experiments/hack.md."""

name = "hack"
stage = "grpo"
base = "steps=90 eval_every=5 eval_prompts=256 format_weight=0 max_new_tokens=48"
cells = [
    "verifier | strict | verifier=strict",
    "verifier | last number | verifier=last",
    "verifier | any number | verifier=any",
]
columns = [
    "believed", "correct", "correct-reference", "accuracy", "accuracy-reference", "accuracy-mean",
    "accuracy-mean-reference", "formatted", "finished", "length", "kl",
]  # fmt: skip
curves = ["correct", "accuracy", "length"]
