"""How much is a short answer worth? Frontiers over the weight of length: docs/experiments/pareto.md."""

name = "pareto"
stage = "gdpo"
base = "steps=45 eval_every=15 eval_prompts=256"
cells = [
    f"{weight} | {method} | conditioned=False length_weight={weight} combine={combine}"
    for weight in (0.1, 0.25, 0.5, 0.7, 1, 2)
    for method, combine in (("added", "sum"), ("GDPO", "gdpo"))
]
columns = ["accuracy", "correct", "correct-reference", "formatted", "short", "short-reference", "all", "length"]
scatter = ["short", "correct"]
