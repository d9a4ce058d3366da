"""The parts that a transformer is built from, and ``ModelConfig``, which says how.

A block of a transformer has two halves: attention (the chapter before this one), in which tokens exchange information,
and a feed-forward network, in which each token is changed on its own. Each half reads a normalised copy of the stream::

    RMSNorm      x / √(mean(x²) + eps) · w                          LayerNorm also subtracts the mean
    FeedForward  down( act(up(x)) )                                 two matrices, act = GELU or ReLU
    SwiGLU       down( silu(gate(x)) ⊙ up(x) )                      a third matrix opens and closes each hidden unit

The default form is Llama's (Touvron et al. 2023): RMSNorm and SwiGLU, without biases. The older forms (LayerNorm, GELU,
ReLU, biases: GPT-2, Radford et al. 2019) are fields of the same ``ModelConfig``, because the book compares them.

Run ``python layers.py`` to see one token pass through them.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from attention import RopeScaling
from runtime.linear import Linear  # nn.Linear, faster on some CPUs


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. Stored in every checkpoint, so a model can be rebuilt from the file alone."""

    vocab_size: int = 512
    d_model: int = 128  # width of the stream
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int | None = None  # None: as many as query heads
    d_ff: int | None = None  # None: 4·d_model; SwiGLU, of three matrices, 2/3 of that, up to a multiple of 32
    head_dim: int | None = None  # width of one head; None: d_model / n_heads
    max_seq_len: int = 256
    positions: str = "rope"  # rope | learned | sinusoidal
    norm: str = "rmsnorm"  # rmsnorm | layernorm
    mlp: str = "swiglu"  # swiglu | gelu (exact) | gelu_tanh (GPT-2) | relu
    bias: bool = False  # biases in the linear layers
    qkv_bias: bool = False  # biases in those of queries, keys and values alone (Qwen2)
    qk_norm: bool = False  # normalise queries and keys
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None  # slows rotations down for texts longer than pretraining's (Llama 3)
    norm_eps: float = 1e-5
    tie_embeddings: bool = False  # one matrix reads tokens in and scores them on the way out
    window: int | None = None  # each token sees the last `window` tokens, itself included; None: all
    sinks: int = 0  # with a window: the first tokens that stay visible
    n_experts: int = 0  # more than 0: feed-forward layers are mixtures of experts (moe.py)
    n_experts_per_token: int = 2
    n_shared_experts: int = 0  # experts that see every token, besides
    d_expert: int | None = None  # width of one; None: so that a token's experts together are as wide as d_ff
    expert_layers: tuple[int, ...] | None = None  # which blocks have experts; None: all
    router: str = "softmax"  # softmax | sigmoid
    causal: bool = True  # False: an encoder, whose tokens see the whole text
    post_norm: bool = False  # normalise the sum after each half (BERT) instead of what the half reads

    def __post_init__(self):
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if self.d_ff is None:
            wide = 4 * self.d_model if self.mlp != "swiglu" else -(-(8 * self.d_model // 3) // 32) * 32
            object.__setattr__(self, "d_ff", wide)
        if self.n_experts and self.d_expert is None:
            active = self.n_experts_per_token + self.n_shared_experts
            object.__setattr__(self, "d_expert", -(-self.d_ff // max(1, active)))
        if self.expert_layers is not None:  # a checkpoint gives a list
            object.__setattr__(self, "expert_layers", tuple(self.expert_layers))
        if isinstance(self.rope_scaling, dict):  # and a dictionary
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        d, heads, kv_heads, positions = self.d_model, self.n_heads, self.n_kv_heads, self.positions
        uneven = self.head_dim is None and d % heads
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", max(1, d // heads))
        experts, k, layers, last = self.n_experts, self.n_experts_per_token, self.expert_layers, self.n_layers - 1
        of_experts = self.n_shared_experts or self.d_expert or layers is not None
        problems = [
            (heads < 1, f"n_heads {heads}: at least one head"),
            (uneven, f"d_model {d} is not a multiple of n_heads {heads}"),
            (heads % kv_heads, f"n_heads {heads} is not a multiple of n_kv_heads {kv_heads}"),
            (positions not in ("rope", "learned", "sinusoidal"), f"positions {positions!r}: rope, learned, sinusoidal"),
            (self.norm not in ("rmsnorm", "layernorm"), f"norm {self.norm!r}: rmsnorm or layernorm"),
            (self.mlp not in ("swiglu", *ACTIVATIONS), f"mlp {self.mlp!r}: swiglu, {', '.join(ACTIVATIONS)}"),
            (self.head_dim < 1, f"head_dim {self.head_dim}: a head is at least 1 wide"),
            (positions == "rope" and self.head_dim % 2, f"rope turns pairs: head_dim {self.head_dim} must be even"),
            (self.rope_scaling and positions != "rope", "rope_scaling is for positions = rope"),
            (experts < 0 or self.n_shared_experts < 0, "there cannot be fewer than no experts"),
            (experts and not 1 <= k <= experts, f"{k} of {experts} experts cannot be chosen for a token"),
            (self.n_layers > 10_000, f"n_layers {self.n_layers}: at most 10,000 blocks"),
            (self.d_ff < 1, f"d_ff {self.d_ff}: a feed-forward layer is at least 1 wide"),
            (experts and self.d_expert < 1, "an expert is at least 1 wide"),
            (layers == (), "expert_layers names no block: leave n_experts out"),
            (not experts and of_experts, "n_shared_experts, d_expert and expert_layers want n_experts"),
            (any(not 0 <= i <= last for i in layers or ()), f"expert_layers {layers}: the blocks are 0 to {last}"),
            (self.router not in ("softmax", "sigmoid"), f"router {self.router!r}: softmax or sigmoid"),
            (self.window is not None and self.window < 1, "a window holds at least the token itself"),
            (self.sinks < 0, f"sinks {self.sinks}: at least 0"),
            (self.sinks and self.window is None, "sinks need a window"),
            (self.window is not None and not self.causal, "a window looks back: it needs causal attention"),
        ]
        for wrong, why in problems:
            if wrong:
                raise ValueError(why)


ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


# ----------------------------------------------------------------------------------------------------------------------
# Parts


class RMSNorm(nn.Module):
    """``x / rms(x) · weight``, rms(x) = √(mean(x²) + eps) over the last dimension (Zhang and Sennrich 2019).

    The statistics are taken in float32 and the result is cast back before the weight multiplies it, as Llama does.
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype) * self.weight


class FeedForward(nn.Module):
    """Two matrices with a nonlinearity between them: ``down(act(up(x)))``."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up_proj = Linear(config.d_model, config.d_ff, bias=config.bias)
        self.down_proj = Linear(config.d_ff, config.d_model, bias=config.bias)
        self.activation = ACTIVATIONS[config.mlp]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


class SwiGLU(nn.Module):
    """A third matrix opens and closes each hidden unit: ``down(silu(gate(x)) ⊙ up(x))`` (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.d_model, config.d_ff, bias=config.bias)
        self.up_proj = Linear(config.d_model, config.d_ff, bias=config.bias)
        self.down_proj = Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def make_feed_forward(config: ModelConfig) -> nn.Module:
    return SwiGLU(config) if config.mlp == "swiglu" else FeedForward(config)


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_printoptions(precision=3, sci_mode=False)
    config = ModelConfig(d_model=4, n_heads=2, d_ff=6)
    x = torch.tensor([1.0, -2.0, 3.0, 0.5])
    rms = math.sqrt(float(x.square().mean()))
    print(f"a token's stream, 4 wide\n {x}")
    print(f"RMSNorm divides it by {rms:.3f}\n {make_norm(config)(x).detach()}")
    layer_norm = make_norm(dataclasses.replace(config, norm="layernorm"))
    print(f"LayerNorm subtracts {float(x.mean()):.3f} first\n {layer_norm(x).detach()}")
    mlp = SwiGLU(config)
    print(f"the gates of SwiGLU's 6 hidden units\n {F.silu(mlp.gate_proj(x)).detach()}")
    print(f"what it adds to the stream\n {mlp(x).detach()}")
    for kind in ("swiglu", "gelu"):
        wide = dataclasses.replace(ModelConfig(d_model=128, n_heads=4, mlp=kind))
        n = sum(p.numel() for p in make_feed_forward(wide).parameters())
        print(f"{kind}: 128 -> {wide.d_ff} -> 128, {n:,} parameters")
