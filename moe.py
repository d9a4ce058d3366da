"""Mixture of experts: more parameters for the same work.

A feed-forward layer spends the same matrices on every token. Here there are E of them, the experts, and a router (one
linear map) picks k for each token. All experts have to be stored, but a token pays for k only::

    p = softmax(x W_r)                                    over all E experts, in float32
    w_e = p_e / Σ_{chosen} p                              for the k most likely, so that the chosen weights sum to one
    y = Σ_{chosen} w_e · expert_e(x)   ( + shared(x) )    the shared expert sees every token

(Jiang et al. 2024, Mixtral, section 2.1; shared experts: Dai et al. 2024, DeepSeekMoE.) With k = 1 the weight stays
p_e (Switch, eq. 2): divided by itself it would be 1 whatever the router says, and the router would learn nothing. No
expert is ever full: every token gets its k experts.

A router left alone favours the experts that happen to be better at the start, which then learn more. Two ways to keep
all of them at work, over N tokens:

* a loss (Shazeer et al. 2017; Fedus et al. 2021, Switch, eq. 4-6). With f_e = choices of expert e / N and P_e = the
  mean of p_e::

      L_balance = E Σ_e f_e P_e         k when all are equal;  f is a count and has no gradient, P has

  Switch adds one such term for each layer, and so does pretrain.py. Mixtral in transformers counts the tokens of all
  layers together (``--balance pooled``): an expert that is swamped in one layer and idle in the next then looks
  balanced. f is that of the micro-batch at hand, since that of the batch is known too late: this one term depends on
  how a batch is divided.
* a bias without a loss (Wang et al. 2024; DeepSeek-V3). The k experts are chosen by p + b, while the weights stay
  those of p; after each step the bias of an expert with less than the mean load rises by u, that of one with more
  falls::

      b_e ← b_e + u · sign(mean load - load_e)

The router z-loss (Zoph et al. 2022, ST-MoE, eq. 5), mean (log Σ_e exp(logit_e))², keeps the logits small, where
float32 still tells them apart.

Both act in pretraining. The later stages train an expert model as it is, without a term for its balance.

Work grows with the experts used: tokens are sorted by expert, and each expert multiplies one block of rows.

Run ``python moe.py`` to see five tokens routed; train with ``python pretrain.py --n_experts 8``.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from attention import at_least_float32
from layers import ModelConfig, make_feed_forward
from runtime.linear import Linear

# ----------------------------------------------------------------------------------------------------------------------
# The layer


def route(logits: Tensor, k: int, bias: Tensor | None = None, score: str = "softmax") -> tuple[Tensor, Tensor]:
    """The k experts of each token and their weights: logits (N, E) -> weights (N, k) that sum to one (k = 1: the
    score itself), experts (N, k).

    score: "softmax" over all experts (Mixtral), or "sigmoid" of each (DeepSeek-V3). ``bias`` (E,) takes part in the
    choice and never in the weights.

    >>> route(torch.tensor([[2.0, 1.0, 0.0]]).log(), k=2)
    (tensor([[0.6667, 0.3333]]), tensor([[0, 1]]))
    """
    logits = at_least_float32(logits)
    scores = logits.softmax(dim=-1) if score == "softmax" else logits.sigmoid()  # (N, E)
    experts = (scores if bias is None else scores + bias).topk(k, dim=-1).indices  # (N, k)
    weights = scores.gather(1, experts)
    if k > 1:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-20)  # sigmoids may all be 0
    return weights, experts


class MoE(nn.Module):
    """A feed-forward layer of experts, in the place of a dense one: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.k, self.score = config.n_experts_per_token, config.router
        expert = dataclasses.replace(config, d_ff=config.d_expert)
        self.router = Linear(config.d_model, config.n_experts, bias=False)
        self.experts = nn.ModuleList(make_feed_forward(expert) for _ in range(config.n_experts))
        self.shared = None
        if config.n_shared_experts:  # one wide layer is the sum of several narrow ones
            wide = dataclasses.replace(config, d_ff=config.n_shared_experts * config.d_expert)
            self.shared = make_feed_forward(wide)
        self.register_buffer("balance_bias", torch.zeros(config.n_experts))
        never_compile()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)  # (N, D)
        with torch.autocast(x.device.type, enabled=False):  # a choice should not hang on the third digit of a logit
            logits = self.router(at_least_float32(tokens))  # (N, E)
        weights, experts = route(logits, self.k, self.balance_bias, self.score)  # (N, k) each
        # Lay the N·k pairs of a token and one of its experts in the order of the experts.
        order = experts.flatten().argsort(stable=True)  # (N·k,)
        rows = tokens.index_select(0, order // self.k)  # (N·k, D)
        sizes = experts.flatten().bincount(minlength=len(self.experts)).tolist()
        parts = [expert(some) for expert, some in zip(self.experts, rows.split(sizes)) if len(some)]
        # Back in the order of the tokens, and the k outputs of each summed by their weights.
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        outputs = torch.cat(parts).index_select(0, back).view(*experts.shape, -1)  # (N, k, D)
        y = (weights.to(outputs.dtype).unsqueeze(1) @ outputs).squeeze(1)  # (N, D)
        if self.shared is not None:
            y = y + self.shared(tokens)
        return y.view_as(x)


@functools.cache
def never_compile() -> None:
    """Every batch splits differently, so the layer would be compiled again and again. Said when the first one is made:
    to load the compiler takes a second, which a model without experts need not wait for.
    """
    MoE.forward = torch.compiler.disable(MoE.forward)


# ----------------------------------------------------------------------------------------------------------------------
# Keeping all experts at work


def load_balancing_loss(
    router_logits: Tensor | list[Tensor], n_experts_per_token: int, mask: Tensor | None = None, score: str = "softmax"
) -> Tensor:
    """``E Σ_e f_e P_e``: a scalar, k at perfect balance.

    router_logits: (..., E) of one layer, or a list of several whose tokens are counted together, as transformers does
    for Mixtral, blind to an expert that is swamped in one layer and idle in another. mask: (...), 1 = a
    real token (the same for all layers): padding counts neither in f nor in P.

    >>> load_balancing_loss(torch.tensor([[9.0, 0.0], [9.0, 0.0]]), 1)  # both to the first expert: E · 1 · 1
    tensor(1.9998)
    """
    layers = [router_logits] if isinstance(router_logits, Tensor) else router_logits
    logits = at_least_float32(torch.cat([layer.flatten(0, -2) for layer in layers]))  # (N, E), N over all layers
    E = logits.shape[1]
    p = logits.softmax(dim=-1) if score == "softmax" else F.normalize(logits.sigmoid(), p=1, dim=-1)
    _, chosen = route(logits, n_experts_per_token, score=score)  # (N, k): all k choices count, not the first alone
    counts = F.one_hot(chosen, E).sum(dim=1).to(p.dtype)  # (N, E)
    real = _repeat(mask, len(layers), logits)  # (N, 1)
    n = real.sum().clamp(min=1)
    f, P = (counts * real).sum(dim=0) / n, (p * real).sum(dim=0) / n  # (E,) each
    return E * (f * P).sum()


def router_z_loss(router_logits: Tensor | list[Tensor], mask: Tensor | None = None) -> Tensor:
    """Mean over tokens and layers of ``(log Σ_e exp logit_e)²``: a scalar. Arguments as above."""
    layers = [router_logits] if isinstance(router_logits, Tensor) else router_logits
    logits = at_least_float32(torch.cat([layer.flatten(0, -2) for layer in layers]))  # (N, E)
    real = _repeat(mask, len(layers), logits)[:, 0]
    return (logits.logsumexp(dim=-1).square() * real).sum() / real.sum().clamp(min=1)


def _repeat(mask: Tensor | None, n_layers: int, logits: Tensor) -> Tensor:
    if mask is None:
        return logits.new_ones(len(logits), 1)
    return mask.flatten().to(logits.dtype).repeat(n_layers)[:, None]  # (N, 1)


@contextmanager
def watch_routers(model: nn.Module) -> Iterator[dict[int, list[Tensor]]]:
    """Within it, each forward pass adds its router logits (N, E) to a list for each expert layer, in the order of the
    blocks: ``{layer: [logits, ...]}``. Leave it before the backward pass.
    """
    seen: dict[int, list[Tensor]] = {}
    handles = []
    for layer, moe in expert_layers(model).items():
        seen[layer] = []
        handles.append(moe.router.register_forward_hook(lambda module, x, out, keep=seen[layer]: keep.append(out)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def expert_layers(model: nn.Module) -> dict[int, MoE]:
    """The expert layers of a ``Transformer``, by the number of their block."""
    return {i: block.mlp for i, block in enumerate(model.blocks) if isinstance(block.mlp, MoE)}


@torch.no_grad()
def expert_loads(model: nn.Module, seen: dict[int, list[Tensor]]) -> Tensor:
    """How many tokens each expert has got: (expert layers, E), float32; the choices that the layers made themselves."""
    loads = []
    for layer, moe in expert_layers(model).items():
        _, chosen = route(torch.cat(seen[layer]), moe.k, moe.balance_bias, moe.score)
        loads.append(chosen.flatten().bincount(minlength=len(moe.experts)))
    return torch.stack(loads).float()


@torch.no_grad()
def move_balance_bias(model: nn.Module, loads: Tensor, rate: float = 1e-3) -> None:
    """``b += rate · sign(mean load - load)`` in each layer; loads (expert layers, E), of one step and all processes."""
    for moe, load in zip(expert_layers(model).values(), loads, strict=True):
        moe.balance_bias += rate * torch.sign(load.mean() - load)


@torch.no_grad()
def router_statistics(loads: Tensor, seen: dict[int, list[Tensor]]) -> dict[str, float]:
    """For the metrics: the busiest and the idlest expert of any layer as a multiple of the mean load, the entropy of
    the routers' softmax as a share of ln E (1: undecided, 0: certain), and each expert's share of its layer's choices.
    The loads may be of a whole step; the entropy is that of the tokens in ``seen``.
    """
    shares = loads / loads.sum(dim=1, keepdim=True).clamp(min=1)  # (expert layers, E)
    E = loads.shape[1]
    logps = at_least_float32(torch.cat([torch.cat(parts) for parts in seen.values()])).log_softmax(dim=-1)
    entropy = -(logps.exp() * logps).sum(dim=-1).mean() / math.log(max(E, 2))
    figures = {"busiest": float(shares.max() * E), "idlest": float(shares.min() * E), "router_entropy": float(entropy)}
    for layer, row in zip(seen, shares.tolist()):
        figures |= {f"load_{layer}_{expert}": share for expert, share in enumerate(row)}
    return figures


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_printoptions(precision=3, sci_mode=False)
    layer = MoE(ModelConfig(d_model=8, n_heads=2, n_experts=4))
    x = torch.randn(1, 5, 8)
    logits = layer.router(x)[0]
    weights, experts = route(logits, k=2)
    print("five tokens, four experts, two for each token\n", logits.softmax(-1))
    for t in range(5):
        print(f"  token {t}: " + " + ".join(f"{w:.3f} · expert {e}" for w, e in zip(weights[t], experts[t])))
    loads = experts.flatten().bincount(minlength=4).tolist()
    print(f"tokens of each expert: {loads}, {sum(loads)} of 5 · 2: none is dropped")
    print(f"balancing loss {load_balancing_loss(logits, 2):.3f} (2 when balanced), z-loss {router_z_loss(logits):.3f}")
    by_hand = sum(w * layer.experts[e](x[0, 0]) for w, e in zip(weights[0], experts[0].tolist()))
    print(f"the layer's output for token 0 is that sum: {torch.allclose(layer(x)[0, 0], by_hand, atol=1e-6)}")
