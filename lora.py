"""LoRA and DoRA: fine-tuning by thin matrices beside weights that stay as they are.

What fine-tuning adds to a weight W (out, in) needs few directions (Aghajanyan et al. 2020). LoRA learns it as a product
of two thin matrices, A (r, in) and B (out, r), and never touches W (Hu et al. 2021, section 4.1)::

    y = W x + b + s · B (A x)          s = α / r          A random, B = 0: at the start nothing is changed

so that only A and B have gradients and an optimizer's moments. rsLoRA takes s = α / √r, under which the update does not
shrink as the rank grows (Kalajdzievski 2023). DoRA takes length and direction apart (Liu et al. 2024, eq. 5 and section
4.3): every row of the weight, one for each output, gets a learned length m, and LoRA turns its direction::

    y = m ⊙ (W + s B A) x / ‖W + s B A‖  +  b          ‖·‖ of each row, a constant for the gradient; m starts as ‖W‖

What follows from W staying what it was:

* The model with its adapters off is the start, and so the reference of DPO's and GRPO's KL: no second copy.
* A finished update is one matrix: merged into W it costs nothing, and the model is a plain one again.
* What a run has learned fits into a small file (``adapters.pt``), and many of them share one base.

A layer is wrapped from outside, by its name; ``transformer.py`` knows nothing of it.

    python lora.py                                                       # a worked example
    python sft.py --lora_rank 4 --lr 3e-3 --out_dir out/arith/sft_lora
    python chat.py out/arith/sft_lora                                    # its ckpt.pt is that of a plain model, merged
    python chat.py out/arith/sft_lora/adapters.pt                        # base and adapters, put together
    python lora.py out/arith/sft_lora/adapters.pt --base COPY_OF_THE_BASE --out DIR        # the same, written to DIR
"""

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import torch.nn as nn
import tyro
from torch import Tensor

from attention import at_least_float32
from runtime.checkpoint import (
    ADAPTERS,
    check_checkpoint,
    find_checkpoint,
    fingerprint,
    read_archive,
    save_checkpoint,
    weights_id,
)
from runtime.config import CountOrZero, Positive, TrainConfig, parse
from runtime.errors import UserError, run_main
from runtime.linear import linear
from transformer import ModelConfig, Transformer, count_parameters

TARGETS = ("*_proj",)  # all projections of a block: q, k, v, o, (gate,) up, down, those of each expert too


@dataclass(frozen=True)
class LoRAConfig:
    """The shape of a model's adapters. ``add_lora`` leaves it on the model, as ``model.lora``."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS
    dora: bool = False
    rslora: bool = False

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank {self.rank}: it starts at 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha {self.alpha}: a positive number")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    # What a run asks of a model with adapters, by ``model.lora``, when it saves and when it goes on (runtime/run.py).

    def merged_weights(self, model: nn.Module) -> dict[str, Tensor]:
        return merged_weights(model)

    def adapter_weights(self, model: nn.Module) -> dict[str, Tensor]:
        return adapter_weights(model)

    def load_adapters(self, model: nn.Module, adapters: dict[str, Tensor]) -> None:
        load_adapters(model, adapters)


# ----------------------------------------------------------------------------------------------------------------------
# The formulas


def adapted_weight(weight: Tensor, A: Tensor, B: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    """``W + s B A``; with a magnitude DoRA's ``m (W + s B A) / ‖W + s B A‖``.

    weight: (out, in), A: (r, in), B: (out, r), magnitude: (out,) -> (out, in), with gradient.

    >>> W, A, B = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[2.0], [0.0]])
    >>> adapted_weight(W, A, B, scale=1.0)
    tensor([[3., 4.],
            [0., 1.]])
    >>> adapted_weight(W, A, B, scale=1.0, magnitude=torch.tensor([10.0, 1.0]))
    tensor([[6., 8.],
            [0., 1.]])
    """
    moved = weight + scale * (B @ A)
    return moved if magnitude is None else moved * (magnitude / row_norms(weight, A, B, scale)).unsqueeze(1)


@torch.no_grad()
def row_norms(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """‖W + s B A‖ of each row, (out,), in float32 or better, without gradient (DoRA, section 4.3).

    Every forward pass wants it, so it is taken without making the sum, by ``‖w‖² + 2s w·u + s² ‖u‖²`` with u a row of
    B A: no tensor is larger than (out, r), and the work is that of one more token for each of the r columns.
    """
    with torch.autocast(weight.device.type, enabled=False):
        weight, A, B = (at_least_float32(x) for x in (weight, A, B))
        squares = torch.linalg.vector_norm(weight, dim=1).square()  # (out,)
        crossed = ((weight @ A.t()) * B).sum(dim=1)  # w·u
        moved = ((B @ (A @ A.t())) * B).sum(dim=1)  # ‖u‖²
        smallest = torch.finfo(squares.dtype).tiny  # rounding may take a row that cancels below zero (and one of which
        # less than a hundredth is left is no longer exact: an update that undoes W, which training does not look for)
        return (squares + 2 * scale * crossed + scale**2 * moved).clamp(min=smallest).sqrt()


# ----------------------------------------------------------------------------------------------------------------------
# The layer


class LoRALinear(nn.Module):
    """A linear layer with an adapter: x (..., in) -> (..., out). ``base`` is the layer itself, frozen."""

    def __init__(self, base: nn.Linear, config: LoRAConfig):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), config.scale
        self.off = False  # the base alone: see ``adapters_off``
        self.merged_norms: Tensor | None = None  # not None: the update is in the base's weight
        weight = base.weight
        # U(±1/√in), as a new nn.Linear has it (PEFT; the paper's Gaussian differs in its width alone). Drawn on the
        # CPU: one seed, one start, whatever the device.
        start = torch.empty(config.rank, base.in_features).uniform_(-1, 1) / math.sqrt(base.in_features)
        self.A = nn.Parameter(start.to(weight))  # (r, in)
        self.B = nn.Parameter(weight.new_zeros(base.out_features, config.rank))  # (out, r)
        norms = row_norms(weight, self.A, self.B, self.scale).to(weight) if config.dora else None
        self.magnitude = None if norms is None else nn.Parameter(norms)  # (out,)

    @property
    def weight(self) -> Tensor:
        """What this layer multiplies with, for code that reads the matrix instead of calling the layer: the head's, in
        ``token_logps``. With gradient for A and B."""
        if self.off or self.merged:
            return self.base.weight
        return adapted_weight(self.base.weight, self.A, self.B, self.scale, self.magnitude)

    @property
    def merged(self) -> bool:
        return self.merged_norms is not None

    def forward(self, x: Tensor) -> Tensor:
        if self.merged and torch.is_grad_enabled():
            raise ValueError("merged adapters cannot learn: unmerge_lora(model) first, or use it under torch.no_grad()")
        if self.off or self.merged:
            return self.base(x)
        # B (A x), never (B A) x: two products with r columns instead of a matrix as large as W, and its gradient.
        update = linear(self.scale * linear(x, self.A), self.B)  # (..., out)
        if self.magnitude is None:
            return self.base(x) + update
        y = linear(x, self.base.weight) + update
        norms = row_norms(self.base.weight, self.A, self.B, self.scale)
        y = (y * (self.magnitude / norms)).to(y.dtype)  # float32: a length near 1 moves in steps smaller than bf16's
        return y if self.base.bias is None else y + self.base.bias.to(y.dtype)  # the bias has no part in the direction

    @torch.no_grad()
    def merge(self) -> None:
        if not self.merged:
            norms = row_norms(self.base.weight, self.A, self.B, self.scale)
            self.base.weight.copy_(adapted_weight(self.base.weight, self.A, self.B, self.scale, self.magnitude))
            self.merged_norms = norms

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.merged:
            weight = self.base.weight
            if self.magnitude is not None:
                weight = weight * (self.merged_norms / self.magnitude).unsqueeze(1)
            self.base.weight.copy_(weight - self.scale * (self.B @ self.A))
            self.merged_norms = None


# ----------------------------------------------------------------------------------------------------------------------
# The model


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float,
    targets: tuple[str, ...] = TARGETS,
    dora: bool = False,
    rslora: bool = False,
) -> nn.Module:
    """Give the linear layers that ``targets`` name an adapter and freeze everything else; the model itself, changed.

    A target is the last part of a layer's name, its whole name, or a pattern of either: "q_proj",
    "blocks.0.attn.q_proj", "blocks.*.mlp.*", "*". Only ``nn.Linear`` is looked at. ValueError: a target that no layer
    has; a weight that another layer shares (a tied head: an adapter on one of its uses would leave out the other); a
    model that has adapters already.
    """
    if getattr(model, "lora", None) is not None:
        raise ValueError("this model has adapters already: unload_lora(model) makes them part of its weights")
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    config = LoRAConfig(rank, float(alpha), targets, dora, rslora)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name}
    chosen = {}
    for target in targets:
        found = {n: m for n, m in layers.items() if fnmatchcase(n, target) or fnmatchcase(n.split(".")[-1], target)}
        if not found:
            known = ", ".join(dict.fromkeys(name.split(".")[-1] for name in layers)) or "none"
            raise ValueError(f"no linear layer is called {target!r}; there are {known}")
        chosen |= found
    if not chosen:
        raise ValueError("adapters need a target")
    for name, layer in chosen.items():
        shared = [n for n, p in model.named_parameters(remove_duplicate=False) if p is layer.weight]
        if len(shared) > 1:
            raise ValueError(f"{name} shares its weight with {shared[0]}: an adapter would change one use of it alone")
    model.requires_grad_(False)
    for name, layer in chosen.items():
        replace_module(model, name, LoRALinear(layer, config))
    model.lora = config
    return model


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers with adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def merge_lora(model: nn.Module) -> nn.Module:
    """Put every update into its weight: the same outputs, at the speed of the plain model. To be used, not trained."""
    for layer in lora_layers(model).values():
        layer.merge()
    return model


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Take the updates out again. The weights are what they were up to rounding: a run never merges what it trains."""
    for layer in lora_layers(model).values():
        layer.unmerge()
    return model


def unload_lora(model: nn.Module) -> nn.Module:
    """Merge, and take the wrappers away: a plain model, whose weights have their plain names, all of them trainable."""
    for name, layer in lora_layers(merge_lora(model)).items():
        replace_module(model, name, layer.base)
    model.lora = None
    return model.requires_grad_(True)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model is what it was before ``add_lora``: the reference. (A model without adapters is that anyway.)

    Merged, it cannot be: ValueError."""
    layers = lora_layers(model).values()
    if any(layer.merged for layer in layers):
        raise ValueError("the adapters are merged into the weights and cannot be off: unmerge_lora(model) first")
    before = [layer.off for layer in layers]
    try:
        for layer in layers:
            layer.off = True
        yield model
    finally:
        for layer, off in zip(layers, before):
            layer.off = off


def share_trained(model: nn.Module) -> str:
    """How much of the model learns, for the banner.

    >>> share_trained(add_lora(Transformer(ModelConfig(64, 32, 2, 2)), rank=1, alpha=1.0))
    'trained 1,280 of 32,160 parameters (3.98 %)'
    """
    n, trained = count_parameters(model), sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"trained {trained:,} of {n:,} parameters ({100 * trained / n:.3g} %)"


# ----------------------------------------------------------------------------------------------------------------------
# Saving. A run's ckpt.pt holds the merged weights, so that to everything that loads it it is a plain model's, and the
# adapters beside them, from which the run itself goes on: from the base, bit for bit. adapters.pt has the adapters
# alone.


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of the plain model that merging would give; the model itself stays as it is."""
    weights, layers = {}, lora_layers(model)
    for key, value in model.state_dict().items():
        name, _, last = key.rpartition(".")
        if name in layers:
            continue  # A, B, magnitude
        layer, _, inner = name.rpartition(".")
        if inner == "base" and layer in layers:
            weights[f"{layer}.{last}"] = layers[layer].weight.detach() if last == "weight" else value
        else:
            weights[key] = value
    return weights


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """The adapters alone: {"blocks.0.attn.q_proj.A": (r, in), ...B: (out, r), ...magnitude: (out,)}."""
    layers = lora_layers(model)
    return {key: value for key, value in model.state_dict().items() if key.rpartition(".")[0] in layers}


@torch.no_grad()
def load_adapters(model: nn.Module, adapters: dict[str, Tensor]) -> None:
    """Put ``adapter_weights`` back; ValueError if they are not those of this model, or if it is merged."""
    if any(layer.merged for layer in lora_layers(model).values()):
        raise ValueError("the adapters are merged into the weights: unmerge_lora(model) before others are loaded")
    mine = adapter_weights(model)
    if mine.keys() != adapters.keys():
        other = sorted(mine.keys() ^ adapters.keys())[0]
        raise ValueError(f"the adapters are not those of this model: {other} is in one of them alone")
    for key, value in adapters.items():
        if mine[key].shape != value.shape:
            raise ValueError(f"{key} is {tuple(value.shape)}, here {tuple(mine[key].shape)}")
    model.load_state_dict(adapters, strict=False)


def apply_adapters(weights: dict[str, Tensor], adapters: dict[str, Tensor], config: LoRAConfig) -> dict[str, Tensor]:
    """A plain model's weights with the adapters merged in, as a new dictionary. ValueError: of another shape."""
    weights = dict(weights)
    for name in dict.fromkeys(key.rpartition(".")[0] for key in adapters):
        A, B, magnitude = (adapters.get(f"{name}.{part}") for part in ("A", "B", "magnitude"))
        weight = weights.get(f"{name}.weight")
        fits = weight is not None and A is not None and B is not None and A.dim() == B.dim() == 2
        if not fits or weight.shape != (len(B), A.shape[1]) or B.shape[1] != len(A):
            raise ValueError(f"the base has no layer {name} of the adapter's shape")
        weights[f"{name}.weight"] = adapted_weight(weight, A, B, config.scale, magnitude)
    return weights


def load_state(path: str | Path) -> dict:
    """The checkpoint in a file or a run's folder, checked; of an ``adapters.pt``, what it makes of its base."""
    path = find_checkpoint(path)
    state = read_archive(path)
    return put_together(path) if state.get("magic") == ADAPTERS else check_checkpoint(state, path)


def put_together(path: str | Path, base: str = "") -> dict:
    """The checkpoint that an ``adapters.pt`` and its base make, merged. The base is where it was when the run started
    from it, or in ``base``; its weights must be the very same."""
    path = Path(path) / "adapters.pt" if Path(path).is_dir() else Path(path)
    state = read_archive(path)
    if state.get("magic") != ADAPTERS:
        raise UserError(f"{path} holds no adapters: a LoRA run leaves them as adapters.pt")
    kept = ("stage", "config", "step", "lineage")
    missing = [name for name in ("lora", "adapters", *kept) if not state.get(name)]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    try:
        lora = LoRAConfig(**state["lora"] | {"targets": tuple(state["lora"]["targets"])})
        start = state["lineage"][-1]
        folder, wanted = base or start["path"], start["weights"]
        name = fingerprint(state["adapters"], start=wanted)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__} {error}") from None
    if find_checkpoint(folder).resolve() == path.resolve():
        raise UserError(f"{path} names itself as its base")
    try:
        origin = load_state(folder)
    except UserError as error:
        raise UserError(
            f"{path} holds adapters and needs its base: {error} (python lora.py {path} --base FOLDER --out DIR takes "
            "it from elsewhere)"
        ) from None
    if weights_id(origin) != wanted:
        raise UserError(f"{folder} has other weights than those that the adapters in {path} were trained on")
    try:
        weights = apply_adapters(origin["model"], state["adapters"], lora)
    except ValueError as error:
        raise UserError(f"{path} does not fit {folder}: {error}") from None
    plain = {name: origin[name] for name in ("magic", "model_config", "tokenizer")}
    return plain | {name: state[name] for name in kept} | {"model": weights, "weights_id": name}


# ----------------------------------------------------------------------------------------------------------------------
# What a stage needs


@dataclass(frozen=True)
class LoRARunConfig(TrainConfig):
    """The configuration of a stage that can train adapters."""

    lora_rank: CountOrZero = 0
    """Train adapters of this rank instead of the weights (0: the weights). They want a higher --lr: on the embedded
    task 3e-3 in SFT, where weights want 5e-4, and 1e-3 in GRPO, where weights have 2e-4."""
    lora_alpha: Positive = 16.0
    """The adapters' update is multiplied by lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = TARGETS
    """The linear layers that get adapters: the last part of their name, the whole name, or a pattern of either."""
    dora: bool = False
    """DoRA: a length for each output of a layer, and the adapter for its direction."""
    rslora: bool = False
    """Multiply by lora_alpha / √lora_rank instead."""


def check_lora(config: LoRARunConfig) -> None:
    """Refuse what cannot work, before anything is loaded."""
    if (config.dora or config.rslora) and not config.lora_rank:
        raise UserError(f"--{'dora' if config.dora else 'rslora'} is a kind of adapter: it wants a --lora_rank")
    if not config.lora_targets:
        raise UserError("--lora_targets: adapters need a target")


def start_lora(model: nn.Module, config: LoRARunConfig) -> None:
    """Give the model the adapters that a stage's configuration asks for, if it does: the same in every process."""
    if config.lora_rank:
        torch.manual_seed(config.seed)  # whatever a process has drawn before
        try:
            add_lora(model, config.lora_rank, config.lora_alpha, config.lora_targets, config.dora, config.rslora)
        except ValueError as error:
            raise UserError(f"--lora_targets: {error}") from None


# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Apply:
    """``python lora.py adapters.pt --base BASE --out DIR``."""

    adapters: tyro.conf.Positional[str] = ""
    """The adapters.pt of a LoRA run, or its folder."""
    base: str = ""
    """The run's folder or checkpoint that it started from. Default: where that was then."""
    out: str = ""
    """The folder for the merged checkpoint."""


def apply(config: Apply) -> None:
    if not config.adapters or not config.out:
        raise UserError("python lora.py ADAPTERS.pt --out FOLDER: which adapters, and where to?")
    if (Path(config.out) / "ckpt.pt").exists():
        raise UserError(f"{config.out} holds a checkpoint already: choose another --out")
    path = save_checkpoint(Path(config.out), put_together(config.adapters, config.base))
    print(f"{path}; talk to it: python chat.py {config.out}")


def example() -> None:
    torch.manual_seed(0)
    torch.set_printoptions(precision=3, sci_mode=False)
    layer = nn.Sequential(nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([[1.0, 2.0, 2.0], [0.0, 3.0, 4.0]]))
    x = torch.tensor([[1.0, 1.0, -1.0]])
    print("weight W, 2 outputs of 3 inputs\n", layer[0].weight.data)
    print("x\n", x)
    print("W x\n", layer(x).data)
    add_lora(layer, rank=1, alpha=2.0, targets="*")
    print("the same with an adapter of rank 1, whose B is 0\n", layer(x).data)
    with torch.no_grad():
        layer[0].A.copy_(torch.tensor([[1.0, 0.0, -1.0]]))
        layer[0].B.copy_(torch.tensor([[1.0], [-0.5]]))
        print("A\n", layer[0].A.data)
        print("B, after some training\n", layer[0].B.data)
        print("scale 2 · B (A x), added to W x\n", layer(x))
        with adapters_off(layer):
            print("with the adapters off\n", layer(x))
        print("merged: W + 2 · B A\n", unload_lora(layer)[0].weight.data)
        print("times x\n", layer(x))
    print("\na model of the book's size, and what of it learns:")
    for rank, dora in ((1, False), (4, False), (4, True), (16, False)):
        model = add_lora(Transformer(ModelConfig()), rank, 16.0, dora=dora)
        print(f"  {'DoRA' if dora else 'LoRA'}, rank {rank:2}: {share_trained(model)}")


if __name__ == "__main__":
    run_main(lambda: apply(parse(Apply)) if len(sys.argv) > 1 else example())
