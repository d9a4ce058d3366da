"""Learned, sinusoidal and rotary positions, also past the trained length: docs/experiments/positions.md."""

name = "positions"
stage = "pretrain"
base = "steps=300 eval_every=30 warmup=30 compile=off seq_len=64 batch_size=32 max_seq_len=256"
cells = [
    "positions | rotary | positions=rope",
    "positions | rotary, window of 64 | positions=rope window=64",
    "positions | learned | positions=learned",
    "positions | sinusoidal | positions=sinusoidal",
]
columns = ["bits_per_byte", "bits_per_byte-reference", "near", "beyond", "beyond-reference", "parameters"]
curves = ["val_loss", "loss@position"]
