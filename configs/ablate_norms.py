"""LayerNorm and RMSNorm, gently and roughly trained: docs/experiments/norms.md."""

name = "norms"
stage = "pretrain"
base = "steps=300 eval_every=30 compile=off"
cells = [
    "gently | RMSNorm | norm=rmsnorm lr=1.6e-2 warmup=30",
    "gently | LayerNorm | norm=layernorm lr=1.6e-2 warmup=30",
    "roughly | RMSNorm | norm=rmsnorm lr=6.4e-2 warmup=0",
    "roughly | LayerNorm | norm=layernorm lr=6.4e-2 warmup=0",
    "roughly | RMSNorm, also of queries and keys | norm=rmsnorm qk_norm=True lr=6.4e-2 warmup=0",
]
columns = ["val_loss", "bits_per_byte", "bits_per_byte-reference", "parameters", "seconds"]
curves = ["val_loss", "val_loss-reference", "start_gradient@layer", "end_gradient@layer"]
