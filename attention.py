"""Attention: how a token gathers what it needs from the tokens before it.

Each position asks a question (the query q) of every position it may see; each of those answers how well it fits (its
key k) and what it has to say (its value v). The fit becomes weights that sum to one, and the output is the weighted
sum of the values::

    attention(q, k, v) = softmax(q kᵀ / √d_head + M) v          M = 0 where attention is allowed, -∞ where it is not

(Vaswani et al. 2017, section 3.2.1). The √d_head keeps the scores of random vectors near unit variance, so that the
softmax starts neither flat nor saturated; d_head is the width of one head, not of the model.

In this file, in order: attention by hand and by PyTorch's fused kernel; the masks; the two ways to tell a model where
a token stands (sinusoids added to the input, rotations applied to q and k); the cache that makes generation cheap;
and the layer with many heads, where groups of query heads may share one key/value head (Ainslie et al. 2023).

Run ``python attention.py`` for a worked example with three tokens.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from runtime.linear import Linear  # nn.Linear, faster on some CPUs

# ----------------------------------------------------------------------------------------------------------------------
# The operation


def at_least_float32(x: Tensor) -> Tensor:
    """Half precisions as float32: a softmax or a log-probability in bfloat16 has two or three digits."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention, by hand.

    q (B, H, Tq, d); k and v (B, Hkv, Tk, d), where H is a multiple of Hkv and query head h reads key/value head h //
    (H / Hkv); mask: boolean, broadcastable to (B, H, Tq, Tk), True = may attend. Returns the output (B, H, Tq, d) and
    the weights (B, H, Tq, Tk). A query that may attend to nothing gets zeros, not NaN.
    """
    repeats = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(repeats, dim=1)  # (B, H, Tk, d): heads 0,0,1,1 and not 0,1,0,1
    v = v.repeat_interleave(repeats, dim=1)
    scores = at_least_float32(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]))  # (B, H, Tq, Tk)
    if mask is None:
        weights = scores.softmax(dim=-1)
    else:
        alive = mask.any(dim=-1, keepdim=True)  # rows that may attend to something
        scores = scores.masked_fill(~mask & alive, float("-inf"))  # a row of -inf alone would be NaN on the way
        weights = scores.softmax(dim=-1).masked_fill(~mask, 0.0)
    weights = weights.to(v.dtype)
    return weights @ v, weights


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """The same output from PyTorch's fused kernel, which never stores the (Tq, Tk) weights. A test holds the two equal.

    ``causal`` is for Tq == Tk only: PyTorch aligns its causal mask top-left, so with a cache (Tq < Tk) a new token
    would see the first keys instead of the last.
    """
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError("causal=True needs as many queries as keys; pass causal_mask(t_q, t_k) instead")
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )


def one_query_attention(q: Tensor, k: Tensor, v: Tensor, length: int, mask: Tensor | None = None) -> Tensor:
    """The same output for a single new token (Tq = 1), as generation on a CPU needs it: with one row of scores there is
    nothing to fuse, and two plain products of whole buffers are up to twice as fast as the fused kernel for a batch.

    q (B, H, 1, d); k and v (B, Hkv, R, d), of which the first ``length`` columns hold something; mask (B, 1, 1, length)
    boolean. Every query may attend to something. The query heads of a group stand in for the queries of their
    key/value head, so that nothing is repeated.
    """
    B, H, _, d = q.shape
    q = q.reshape(B, k.shape[1], -1, d) / math.sqrt(d)  # (B, Hkv, H / Hkv, d)
    scores = at_least_float32(q @ k.transpose(-2, -1))  # (B, Hkv, H / Hkv, R)
    scores[..., length:] = float("-inf")
    if mask is not None:
        scores[..., :length].masked_fill_(~mask, float("-inf"))
    return (scores.softmax(dim=-1).to(v.dtype) @ v).reshape(B, H, 1, d)


# ----------------------------------------------------------------------------------------------------------------------
# Who may see whom


def may_attend(q_positions: Tensor, k_positions: Tensor, window: int | None = None, sinks: int = 0) -> Tensor:
    """True where the query at position p may see the key at position s: not in the future (s <= p) and, with a window
    of W, among the last W positions including p itself (p - s < W), or one of the first ``sinks`` positions (Xiao et
    al. 2023).

    (..., Tq) and (..., Tk) integers -> (..., Tq, Tk) boolean.
    """
    distance = q_positions[..., :, None] - k_positions[..., None, :]
    allowed = distance >= 0
    if window is not None:
        allowed = allowed & ((distance < window) | (k_positions[..., None, :] < sinks))
    return allowed


def causal_mask(t_q: int, t_k: int, window: int | None = None, sinks: int = 0, device=None) -> Tensor:
    """(t_q, t_k) boolean for the last ``t_q`` of ``t_k`` positions: aligned at the bottom right, as a cache needs it.

    >>> causal_mask(2, 4).int()
    tensor([[1, 1, 1, 0],
            [1, 1, 1, 1]], dtype=torch.int32)
    >>> causal_mask(4, 4, window=2, sinks=1).int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 0],
            [1, 0, 1, 1]], dtype=torch.int32)
    """
    positions = torch.arange(t_k, device=device)
    return may_attend(positions[t_k - t_q :], positions, window, sinks)


# ----------------------------------------------------------------------------------------------------------------------
# Where a token stands


def sinusoidal_positions(t: int, d: int) -> Tensor:
    """Sine and cosine of each position at d/2 wavelengths from 2π to 10000·2π (Vaswani et al. 2017, section 3.5)::

        PE(p, 2i) = sin(p / 10000^(2i/d))        PE(p, 2i+1) = cos(p / 10000^(2i/d))

    Returns (t, d) float32, sine and cosine interleaved.
    """
    angles = torch.arange(t)[:, None] / 10000 ** (torch.arange(0, d, 2) / d)  # (t, ceil(d/2))
    table = torch.empty(t, d)
    table[:, 0::2] = angles.sin()
    table[:, 1::2] = angles.cos()[:, : d // 2]
    return table


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 and its successors read texts longer than those they were pretrained on (Grattafiori et al. 2024;
    the rule is in Meta's code). A pair of coordinates that turns once within few tokens tells neighbours apart, and
    stays as it is. One that has not even turned once in ``original`` tokens would meet angles that it has never seen,
    so it turns ``factor`` times slower. Between ``high`` and ``low`` turns in the original context, a mixture::

        s = clamp((turns - low) / (high - low), 0, 1)        f ← f · (s + (1 - s) / factor)
    """

    factor: float
    low: float
    high: float
    original: int  # the context of pretraining, in tokens

    def __post_init__(self):
        if not (1 <= self.factor < math.inf and 0 < self.low < self.high < math.inf and self.original >= 1):
            raise ValueError(f"{self}: factor and original start at 1, and 0 < low < high")

    def slowed(self, frequencies: Tensor) -> Tensor:
        """Radians a token, of each pair, in the same precision."""
        turns = frequencies * (self.original / (2 * math.pi))
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


def rope_cos_sin(
    positions: Tensor, head_dim: int, theta: float = 10000.0, far: bool = False, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of ``p · θ^(-2i/d)`` for i = 0 .. d/2 - 1 (Su et al. 2021): integers (...) -> two float32 (...,
    head_dim/2). scaling: what slows these frequencies down.

    Never in bfloat16, where position 257 would be 256. Float32 serves the lengths of training; far out it is off (by
    0.001 to 0.003 at position 50,000, and a long stream would slowly lose its distances), so ``far`` takes the angles
    in float64 where the device has it.
    """
    exact = torch.float64 if far and positions.device.type != "mps" else torch.float32
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=exact) / head_dim)
    if scaling is not None:
        frequencies = scaling.slowed(frequencies)
    angles = positions[..., None].to(exact) * frequencies
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i+d/2}) of each head by the angle of its position: x (B, H, T, d), cos and sin (...,
    T, d/2).

    After rotation the product q·k depends only on the distance between the two positions. Which coordinates form a
    pair is a convention: ours is the half-split layout of Llama in transformers; Meta's own code pairs neighbours
    (x_2i, x_2i+1). The two differ by a permutation of the rows of the q and k projections, and mixing them up breaks
    a loaded model without an error.
    """
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)  # (..., 1, T, d/2): the same for every head
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def look_at_sinks(q: Tensor, q_far: Tensor, k: Tensor, is_sink: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of twice the width, whose products are ``q_far·k`` where the key is a sink, else ``q·k``.

    A model that is trained on short texts has never met a distance of 50,000, and sinks move that far away. So
    StreamingLLM counts distances inside the cache (Xiao et al. 2023, section 3.2): between the window and the sinks
    there is no gap, and a query is never further from them than ``window + sinks - 1``. Tokens in the window keep their
    distances; only for the sinks the query is rotated as if it stood at that position.

    q, q_far (B, H, T, d), k (B, Hkv, Tk, d), is_sink (Tk,) or (B, Tk). The factor √2 undoes that attention divides by
    the root of the width.
    """
    is_sink = is_sink.unsqueeze(-2).unsqueeze(-1) if is_sink.dim() == 2 else is_sink[:, None]  # (B, 1, Tk, 1), (Tk, 1)
    k = torch.cat([k.masked_fill(is_sink, 0.0), k.masked_fill(~is_sink, 0.0)], dim=-1)
    return torch.cat([q, q_far], dim=-1) * math.sqrt(2), k


# ----------------------------------------------------------------------------------------------------------------------
# The memory of generation


class KVCache:
    """Keys and values of the tokens so far, so that a new token costs one row and not the whole text. The buffers
    have some room to spare; when it is used up they double, so that what was written is rarely copied.

    Column j of every row is one step of the model. Prompts of unequal length are padded on the left, so all rows
    write to the same column; ``real`` says which columns hold a token, ``positions`` where that token stands in its
    own text. Keys are stored after rotation and never rotated again. The model calls ``begin`` once per forward pass
    and ``write`` once per layer.
    """

    fixed = False  # do the buffers keep one shape for the whole text? (engine.py)

    def __init__(self, n_layers: int, batch: int, max_len: int, device=None):
        self.k: list[Tensor | None] = [None] * n_layers  # (B, Hkv, R, d) each, zeros past length
        self.v: list[Tensor | None] = [None] * n_layers
        self.real = torch.zeros(batch, max_len, dtype=torch.bool, device=device)
        self.positions = torch.zeros(batch, max_len, dtype=torch.long, device=device)
        self.max_len = max_len
        self.start = self.length = 0  # columns before this pass, and after it
        self.padded = False  # does any row hold padding? (then a mask is needed)

    def begin(self, real: Tensor | None, positions: Tensor) -> None:
        """Announce T new columns: ``real`` (B, T) boolean, or None if no row is padded there; ``positions`` (B, T) or
        (T,).
        """
        self.start, self.length = self.length, self.length + positions.shape[-1]
        if self.length > self.max_len:
            raise ValueError(f"the cache holds {self.max_len} tokens, {self.length} are needed")
        self.positions[:, self.start : self.length] = positions
        self.real[:, self.start : self.length] = True if real is None else real
        self.padded = self.padded or (real is not None and not bool(real.all()))

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values (B, Hkv, T, d) of a layer; return all of them so far (B, Hkv, length, d)."""
        if self.k[layer] is None:
            self.k[layer], self.v[layer] = k[:, :, :0], v[:, :, :0]
        room = self.k[layer].shape[2]
        if self.length > room:
            more = min(self.length + max(32, self.length), self.max_len) - room
            shape = (k.shape[0], k.shape[1], more, k.shape[3])
            self.k[layer] = torch.cat([self.k[layer], k.new_zeros(shape)], dim=2)
            self.v[layer] = torch.cat([self.v[layer], v.new_zeros(shape)], dim=2)
        self.k[layer][:, :, self.start : self.length] = k
        self.v[layer][:, :, self.start : self.length] = v
        return self.k[layer][:, :, : self.length], self.v[layer][:, :, : self.length]

    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of this pass: where its queries (B, T) and its keys (B, Tk) stand, and which keys are real (B, Tk)."""
        seen = slice(0, self.length)
        return self.positions[:, self.start : self.length], self.positions[:, seen], self.real[:, seen]

    def counts(self) -> Tensor:
        """(B, 1): how many real tokens each row has had."""
        return self.real[:, : self.length].sum(dim=1, keepdim=True)

    def buffers(self, layer: int) -> tuple[Tensor, Tensor, int]:
        """All that is stored, (B, Hkv, R, d) each, and how many of the R columns hold something."""
        return self.k[layer], self.v[layer], self.length

    def select(self, rows: Tensor) -> None:
        """Keep these rows in this order; a row may be named several times (samples of one prompt share its prefill)."""
        self.k = [k if k is None else k.index_select(0, rows) for k in self.k]
        self.v = [v if v is None else v.index_select(0, rows) for v in self.v]
        self.real, self.positions = self.real[rows], self.positions[rows]


class RollingCache(KVCache):
    """The same for a model with a window, in a fixed number of slots however long the text becomes (Mistral 7B, Jiang
    et al. 2023, section 2; with sinks, StreamingLLM, Xiao et al. 2023).

    The first ``sinks`` tokens of a text have a slot each, for ever; the token at position p after them goes into slot
    ``sinks + p mod window``, over the token that stood ``window`` before it and that nobody may see any
    more. Slots are out of order as soon as they wrap around, which does not matter: who may see whom is decided by
    positions. A row's slots follow its own positions, so rows with prompts of unequal length wrap at different
    times, and padding is stored nowhere.

    A chunk of several tokens sees the slots as they were and the chunk itself, and is stored after that: its last
    tokens may overwrite what its first ones still had to see.
    """

    def __init__(self, n_layers: int, batch: int, window: int, sinks: int = 0, device=None):
        self.window, self.sinks, self.n_slots = window, sinks, window + sinks
        super().__init__(n_layers, batch, self.n_slots + 1, device)  # the last slot takes what is thrown away
        self.n_seen = torch.zeros(batch, 1, dtype=torch.long, device=device)

    def begin(self, real: Tensor | None, positions: Tensor) -> None:
        B, T = len(self.real), positions.shape[-1]
        self.start, self.length = self.length, self.length + T
        self.padded = self.padded or (real is not None and not bool(real.all()))
        positions = positions.expand(B, T)
        real = torch.ones(B, T, dtype=torch.bool, device=positions.device) if real is None else real
        last = positions[:, -1:]  # padding stands on the left, so this is the largest
        kept = real & ((positions < self.sinks) | (positions > last - self.window))
        slots = torch.where(positions < self.sinks, positions, self.sinks + positions % self.window)
        self.slots = torch.where(kept, slots, self.n_slots)  # (B, T)
        before = self.positions[:, : self.n_slots], self.real[:, : self.n_slots]
        self.positions = self.positions.scatter(1, self.slots, positions)
        self.real = self.real.scatter(1, self.slots, real)
        self.real[:, self.n_slots] = False
        self.n_seen = self.n_seen + real.sum(dim=1, keepdim=True)
        if T == 1:  # nothing that it may see is overwritten: it looks at the slots, itself among them
            seen = self.positions[:, : self.n_slots], self.real[:, : self.n_slots]
        elif self.start == 0:
            seen = positions, real
        else:
            seen = torch.cat([before[0], positions], dim=1), torch.cat([before[1], real], dim=1)
        self.pass_columns = positions, *seen

    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.pass_columns

    def counts(self) -> Tensor:
        return self.n_seen

    def buffers(self, layer: int) -> tuple[Tensor, Tensor, int]:
        return self.k[layer], self.v[layer], self.n_slots

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values (B, Hkv, T, d) of a layer; return all that this pass may look at (B, Hkv, Tk,
        d).
        """
        B, H, T, d = k.shape
        if self.k[layer] is None:
            self.k[layer], self.v[layer] = (
                k.new_zeros(B, H, self.n_slots + 1, d),
                v.new_zeros(B, H, self.n_slots + 1, d),
            )
        if T == 1:
            seen = self.k[layer][:, :, : self.n_slots], self.v[layer][:, :, : self.n_slots]  # views: written below
        elif self.start == 0:
            seen = k, v
        else:
            seen = tuple(
                torch.cat([old[layer][:, :, : self.n_slots], new], dim=2) for old, new in ((self.k, k), (self.v, v))
            )
        index = self.slots[:, None, :, None].expand(B, H, T, d)
        self.k[layer].scatter_(2, index, k)
        self.v[layer].scatter_(2, index, v)
        return seen

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.n_seen = self.n_seen[rows]


class LearningCache(KVCache):
    """The same with a gradient, for training on texts that begin alike: nothing is overwritten, so the backward pass
    finds what the forward pass had.
    """

    def begin(self, real: Tensor | None, positions: Tensor) -> None:
        self.padded = self.padded or real is not None  # without asking whether all are: a GPU would have to wait
        super().begin(real, positions)

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.k[layer] is not None:
            k, v = torch.cat([self.k[layer], k], dim=2), torch.cat([self.v[layer], v], dim=2)
        self.k[layer], self.v[layer] = k, v
        return k, v


def make_cache(
    n_layers: int, batch: int, max_len: int, window: int | None = None, sinks: int = 0, device=None
) -> KVCache:
    """A cache for texts of up to ``max_len`` tokens: one that rolls if the text outgrows the model's window."""
    if window is None or window + sinks >= max_len:
        return KVCache(n_layers, batch, max_len, device)
    return RollingCache(n_layers, batch, window, sinks, device)


# ----------------------------------------------------------------------------------------------------------------------
# The layer


class SelfAttention(nn.Module):
    """Many heads side by side, each with its own projection to d_head, by default d_model / n_heads, their outputs
    joined and mixed.

    With n_kv_heads < n_heads, n_heads / n_kv_heads query heads share one key/value head: the cache shrinks by that
    factor. ``qk_norm`` normalises every q and k to unit root mean square before the rotation, which bounds the
    scores.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        bias: bool = False,
        qk_norm: bool = False,
        eps: float = 1e-5,
        causal: bool = True,
        head_dim: int | None = None,
        qkv_bias: bool = False,
    ):
        super().__init__()
        self.causal = causal
        self.head_dim = head_dim or d_model // n_heads
        self.q_proj = Linear(d_model, n_heads * self.head_dim, bias=bias or qkv_bias)
        self.k_proj = Linear(d_model, n_kv_heads * self.head_dim, bias=bias or qkv_bias)
        self.v_proj = Linear(d_model, n_kv_heads * self.head_dim, bias=bias or qkv_bias)
        self.o_proj = Linear(n_heads * self.head_dim, d_model, bias=bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=eps) if qk_norm else None

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        far: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D). ``mask`` (B, 1, T, Tk) boolean; None = causal among the T tokens (all of
        them, if the layer is not causal), or, for a single new token with a cache, everything before it. ``far``:
        once sinks have left the window, the rotation with which queries look at them, and which keys they are (Tk,)
        or (B, Tk).
        """
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, Hkv, T, d)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q_far = apply_rope(q, *far[:2]) if far is not None else None
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is not None:
            k, v = cache.write(layer, k, v)  # (B, Hkv, Tk, d)
        if far is not None:
            q, k = look_at_sinks(q, q_far, k, far[2])  # (..., 2d) each
            out = fused_attention(q, k, v, mask)
        elif T == 1 and cache is not None and (x.device.type == "cpu" or cache.fixed):
            out = one_query_attention(q, *cache.buffers(layer), mask)  # (B, H, 1, d)
        else:
            out = fused_attention(q, k, v, mask, causal=mask is None and T > 1 and self.causal)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


if __name__ == "__main__":
    torch.set_printoptions(precision=3, sci_mode=False)
    q = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]]])  # one sequence, one head, three tokens, d = 2
    k = torch.tensor([[[[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]]]])
    v = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]]])
    out, weights = attention(q, k, v, causal_mask(3, 3))
    print("queries\n", q[0, 0], "\nkeys\n", k[0, 0], "\nvalues\n", v[0, 0])
    print("scores q·k / √2\n", (q @ k.transpose(-2, -1) / math.sqrt(2))[0, 0])
    print("who may see whom\n", causal_mask(3, 3).int())
    print("weights: the softmax over what may be seen; each row sums to 1\n", weights[0, 0])
    print("output: the weighted sum of the values; the first token can only repeat itself\n", out[0, 0])
    print(
        "a window of 2: the third token no longer sees the first\n",
        attention(q, k, v, causal_mask(3, 3, window=2))[1][0, 0],
    )
    cos, sin = rope_cos_sin(torch.arange(3), head_dim=2)
    turned = apply_rope(torch.ones(1, 1, 3, 2), cos, sin)
    print("rotary positions turn the same vector by 0, 1 and 2 radians\n", turned[0, 0])
    print(
        "so products depend on distance alone:",
        (turned[0, 0, 0] @ turned[0, 0, 1]).item(),
        (turned[0, 0, 1] @ turned[0, 0, 2]).item(),
    )
    torch.manual_seed(0)
    print("\nfour query heads share two key/value heads: 0 and 1 read the first, 2 and 3 the second")
    layer = SelfAttention(d_model=8, n_heads=4, n_kv_heads=2)
    x = torch.randn(1, 3, 8)
    q_heads = layer.q_proj(x).view(1, 3, 4, 2).transpose(1, 2)
    k_heads = layer.k_proj(x).view(1, 3, 2, 2).transpose(1, 2)
    print("q", tuple(q_heads.shape), " k and v", tuple(k_heads.shape))
    whole = layer(x)
    cache = KVCache(n_layers=1, batch=1, max_len=3)
    print("the same layer with a cache, one token at a time; the keys that it keeps, (B, Hkv, length, d):")
    for t in range(3):
        cache.begin(None, torch.tensor([t]))
        out = layer(x[:, t : t + 1], cache=cache)
        print(f"  token {t}: keys {tuple(cache.k[0][:, :, : cache.length].shape)}", end="")
        print(f", output as in the whole pass: {torch.allclose(out[0, 0], whole[0, t], atol=1e-6)}")
