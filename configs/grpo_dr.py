"""Dr. GRPO: no division by the group's std, and by a constant instead of by lengths."""

loss_type = "dr_grpo"
scale = "none"
out_dir = "out/arith/dr_grpo"
