"""DAPO: clip-higher, means over all tokens, flat groups replaced, answers that grow too long or are cut off.

DAPO has a buffer of 4,096 of 20,480 tokens: the share here is the same."""

loss_type = "dapo"
clip_high = 0.28
draws = 4
mask_truncated = True
overlong_buffer = 10
out_dir = "out/arith/dapo"
