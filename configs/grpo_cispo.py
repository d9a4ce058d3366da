"""CISPO: the clipped ratio as a weight, so that no token loses its gradient. (1 + clip_high is TRL's 5.)"""

loss_type = "cispo"
clip_high = 4.0
out_dir = "out/arith/cispo"
