"""AdamW and Muon, each with its best learning rate, against tokens and against time: docs/experiments/optimizers.md."""

name = "optimizers"
stage = "pretrain"
base = "steps=300 eval_every=30 warmup=30 compile=off"
cells = [
    "AdamW | lr 4e-3 | optimizer=adamw lr=4e-3",
    "AdamW | lr 2e-3 | optimizer=adamw lr=2e-3",
    "AdamW | lr 8e-3 | optimizer=adamw lr=8e-3",
    "Muon | lr 1.6e-2 | optimizer=muon lr=1.6e-2",
    "Muon | lr 8e-3 | optimizer=muon lr=8e-3",
    "Muon | lr 3.2e-2 | optimizer=muon lr=3.2e-2",
    "best of each | AdamW, lr 4e-3 | optimizer=adamw lr=4e-3",
    "best of each | Muon, lr 1.6e-2 | optimizer=muon lr=1.6e-2",
]
columns = ["val_loss", "bits_per_byte", "bits_per_byte-reference", "seconds", "seconds-reference"]
curves = ["val_loss@tokens", "val_loss@seconds"]
