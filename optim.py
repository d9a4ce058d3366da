"""The optimizer and its schedule, as every stage uses them.

A step of training makes a gradient; this file says what the weights do with it::

    g ← g · min(1, max_norm / ‖g‖)                  one wild batch must not undo a thousand good ones
    lr(step)                                        a linear rise, then half a cosine down
    AdamW for vectors and tables, AdamW or Muon for the matrices inside the blocks; weight decay for matrices alone

Run ``python optim.py`` for a schedule, and for what goes to which optimizer.
"""

import math

import torch
from torch import nn

from runtime import processes
from runtime.errors import UserError
from runtime.run import Run


def learning_rate(step: int, steps: int, peak: float, warmup: int, final: float = 0.1) -> float:
    """Linear rise over ``warmup`` steps, then half a cosine down to ``final`` of the peak. ``step`` counts from 0.

    The rate is that at the end of the step, so the first is not 0 and wastes no batch.

    >>> [round(learning_rate(s, steps=6, peak=1.0, warmup=2, final=0.0), 3) for s in range(6)]
    [0.5, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    done = step + 1
    if done < warmup:
        return peak * done / warmup
    progress = (done - warmup) / max(1, steps - warmup)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizers(
    model: nn.Module, lr: float, weight_decay: float = 0.0, beta2: float = 0.95, kind: str = "adamw"
) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov and Hutter 2019) in two groups: matrices are pulled towards zero, vectors (norms, biases) are
    not. With kind="muon", the matrices inside the blocks go to Muon (Jordan et al. 2024), which makes each update
    nearly orthogonal; its step is scaled to AdamW's, so one learning rate serves both.

    A weight that two modules share is listed once, so it is updated and decayed once.
    """
    if lr * weight_decay >= 1:  # AdamW multiplies the weights by 1 - lr · weight_decay
        raise UserError(f"weight_decay {weight_decay:g} at lr {lr:g} leaves nothing of the weights: lower one of them")
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p in parameters if kind == "muon" and p.dim() == 2 and "blocks." in name]
    chosen = {id(p) for p in hidden}
    rest = [p for _, p in parameters if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=True))
    if hidden:
        optimizers.append(torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def update(
    run: Run, model: nn.Module, optimizers: list[torch.optim.Optimizer], lr: float, max_grad_norm: float
) -> float:  # fmt: skip
    """Sum the gradients of all processes, clip their norm, take a step, clear them. Returns the norm before clipping.

    A gradient that is not finite changes nothing: the step is skipped, with a warning. (With fp16 this is routine:
    the scaler multiplied the loss so that small gradients survive, and now lowers its factor.)
    """
    parameters = list(model.parameters())
    processes.sum_gradients(parameters)  # before unscaling: then every process sees the same infinities
    for optimizer in optimizers:
        run.scaler.unscale_(optimizer)
    norm = float(nn.utils.clip_grad_norm_(parameters, max_grad_norm))
    run.updates += 1
    run.skipped = 0 if math.isfinite(norm) or run.scaler.is_enabled() else run.skipped + 1
    if math.isfinite(norm):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            run.scaler.step(optimizer)
    elif not run.scaler.is_enabled():
        run.print(
            "the gradient is not finite: this step was skipped. If it happens again, lower --lr or --max_grad_norm"
        )
    run.scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return norm


if __name__ == "__main__":
    rates = [learning_rate(step, steps=20, peak=1e-3, warmup=5) for step in range(20)]
    for step, rate in enumerate(rates):
        print(f"step {step:2}  lr {rate:.6f}  {'#' * round(40 * rate / max(rates))}")
    blocks = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(8, 8)]), "head": nn.Linear(8, 16)})
    for optimizer in make_optimizers(blocks, 1e-3, weight_decay=0.1, kind="muon"):
        for group in optimizer.param_groups:
            shapes = [tuple(p.shape) for p in group["params"]]
            print(f"{type(optimizer).__name__}, weight decay {group['weight_decay']}: {shapes}")
