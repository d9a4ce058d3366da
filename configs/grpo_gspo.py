"""GSPO: one ratio for each answer. The paper's clips are 3e-4 and 4e-4, for answers of thousands of tokens; these clip
about as large a share of the tokens, 0.15, of ours."""

loss_type = "grpo"
ratio_level = "sequence"
clip_low = 0.02
clip_high = 0.03
out_dir = "out/arith/gspo"
