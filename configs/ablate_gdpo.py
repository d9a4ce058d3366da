"""One reward, three added, three by GDPO, in conflict and not: docs/experiments/gdpo.md."""

name = "gdpo"
stage = "gdpo"
base = "steps=45 eval_every=5 eval_prompts=256"
_alone = "combine=sum format_weight=0 length_weight=0"
_sixteen = "group_size=16 prompts_per_step=16"
cells = [  # GDPO, the reference, first
    "short for itself | GDPO | conditioned=False",
    "short for itself | added | conditioned=False combine=sum",
    "short for itself | added, no std | conditioned=False combine=sum scale=none",
    f"short for itself | right alone | conditioned=False {_alone}",
    "short if right | GDPO | conditioned=True",
    "short if right | added | conditioned=True combine=sum",
    "short if right | added, no std | conditioned=True combine=sum scale=none",
    "short if right, weak start | GDPO | start=sft_96",
    "short if right, weak start | added | start=sft_96 combine=sum",
    "short if right, weak start | added, no std | start=sft_96 combine=sum scale=none",
    "short if right, weak start | added, std of the batch | start=sft_96 combine=sum scale=batch",
    f"short if right, weak start | right alone | start=sft_96 {_alone}",
    f"short for itself, groups of 16 | GDPO | conditioned=False {_sixteen}",
    f"short for itself, groups of 16 | added | conditioned=False combine=sum {_sixteen}",
]
starts = ["sft_96 | n_examples=96"]
columns = [
    "start", "accuracy", "accuracy-reference", "correct", "correct-mean", "correct-mean-reference", "formatted",
    "short", "all", "length", "kl", "distinct_advantages-mean",
]  # fmt: skip
curves = ["correct", "formatted", "short", "distinct_advantages"]
