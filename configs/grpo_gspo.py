"""GSPO: one ratio for each answer. (There clip_low 3e-4 and clip_high 4e-4, for much longer answers.)"""

loss_type = "grpo"
ratio_level = "sequence"
out_dir = "out/arith/gspo"
