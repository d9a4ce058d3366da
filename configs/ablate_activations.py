"""ReLU, GELU and SwiGLU with equally many parameters: docs/experiments/activations.md."""

name = "activations"
stage = "pretrain"
base = "steps=300 eval_every=30 warmup=30 compile=off lr=1.6e-2"
cells = [  # three matrices of 128 × 352, or two of 128 × 528
    "feed-forward | SwiGLU | mlp=swiglu d_ff=352",
    "feed-forward | GELU | mlp=gelu d_ff=528",
    "feed-forward | ReLU | mlp=relu d_ff=528",
]
columns = ["val_loss", "bits_per_byte", "bits_per_byte-reference", "parameters", "seconds"]
curves = ["val_loss", "bits_per_byte-reference"]
