"""DAPO: clip-higher, means over all tokens, flat groups replaced, answers that grow too long or are cut off.

DAPO has a buffer of 4,096 of 20,480 tokens: the share here is the same. Its rewards are 1 and -1: twice ours, but for a
shift that the group's mean takes away. Replacing flat groups, a step takes 500 to 800 answers of the embedded task
instead of 256: so 56 steps are the budget of the other presets' 140."""

loss_type = "dapo"
clip_high = 0.28
draws = 4
steps = 56
eval_every = 8
mask_truncated = True
overlong_buffer = 10
correct_weight = 2.0
out_dir = "out/arith/dapo"
