"""The transformer: attention and feed-forward layers on a shared stream, and the log-probabilities that all of
alignment is made of.

::

    x = embedding(tokens)
    for each block:   x = x + attention(norm(x))          tokens exchange information
                      x = x + feed_forward(norm(x))       each token thinks about what it has
    logits = head(norm(x))                                how likely each next token is, before the softmax

The default form is Llama's (Touvron et al. 2023): rotary positions, RMSNorm, SwiGLU, no biases, separate q, k and v,
so that another tool can load the weights after renaming them. The older forms (learned or sinusoidal positions,
LayerNorm, GELU, ReLU, biases: GPT-2, Radford et al. 2019) are fields of the same ``ModelConfig``, because the book
compares them.

Every later chapter uses two functions of this file. ``Transformer.forward_hidden`` is the model without its head;
reward models and value heads sit on it. ``token_logps`` is log p(next token), in float32, without storing the
logits of a large batch.

Run ``python transformer.py`` for the sizes of the book's models.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from attention import (
    KVCache,
    LearningCache,
    SelfAttention,
    at_least_float32,
    may_attend,
    rope_cos_sin,
    sinusoidal_positions,
)
from layers import ModelConfig, RMSNorm, make_feed_forward, make_norm  # noqa: F401
from moe import MoE
from runtime.linear import Linear, linear  # nn.Linear and F.linear, faster on some CPUs

# ----------------------------------------------------------------------------------------------------------------------
# The block


def make_mlp(config: ModelConfig, layer: int) -> nn.Module:
    """The second half of block ``layer``: a mixture of experts where ``config`` wants one, or one network."""
    if config.n_experts and (config.expert_layers is None or layer in config.expert_layers):
        return MoE(config)
    return make_feed_forward(config)


class Block(nn.Module):
    """Pre-norm: each half reads a normalised copy of the stream and adds to the stream itself, which stays an open
    path for gradients. With ``post_norm``, as in the first transformers and in BERT, the stream itself is normalised
    after each half, and so is the sum of embeddings that enters the first block.
    """

    def __init__(self, config: ModelConfig, layer: int = 0):
        super().__init__()
        self.attn_norm = make_norm(config)
        self.attn = SelfAttention(
            config.d_model,
            config.n_heads,
            config.n_kv_heads,
            config.bias,
            config.qk_norm,
            config.norm_eps,
            config.causal,
            config.head_dim,
            config.qkv_bias,
        )
        self.mlp_norm = make_norm(config)
        self.mlp = make_mlp(config, layer)
        self.post_norm = config.post_norm

    def forward(self, x, rope=None, mask=None, cache=None, layer=0, far=None) -> Tensor:
        if self.post_norm:
            x = self.attn_norm(x + self.attn(x, rope, mask, cache, layer, far))
            return self.mlp_norm(x + self.mlp(x))
        x = x + self.attn(self.attn_norm(x), rope, mask, cache, layer, far)
        return x + self.mlp(self.mlp_norm(x))


# ----------------------------------------------------------------------------------------------------------------------
# The model


class Transformer(nn.Module):
    """A decoder: each position predicts the token after it, from itself and what stands before it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # recompute each block in the backward pass instead of storing its inside
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        if config.positions == "learned":
            self.position_embed = nn.Embedding(config.max_seq_len, config.d_model)
        elif config.positions == "sinusoidal":
            self.register_buffer(
                "position_table", sinusoidal_positions(config.max_seq_len, config.d_model), persistent=False
            )
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        if config.post_norm:  # the last block ends with a norm
            self.embed_norm = make_norm(config)
        else:
            self.final_norm = make_norm(config)
        self.head = Linear(config.d_model, config.vocab_size, bias=False)
        self.compiled_logps = _logps  # until ``compile_blocks`` on a GPU
        if config.tie_embeddings:
            self.head.weight = self.embed.weight  # the same Parameter, not a copy: gradients of both uses add
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Weights N(0, 0.02), biases 0; what is added to the stream N(0, 0.02/√(2·n_layers)), so that the stream of
        2·n_layers additions starts no wider than that of one (Radford et al. 2019, section 2.3).

        The final norm has unit scale, so logits start with a standard deviation of 0.02·√d_model times its weight,
        and the first loss above ln V by half its square. For wide models we shrink the head: it must start near ln V.
        """
        head_std = min(0.02, 0.32 / math.sqrt(self.config.d_model))
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.normal_(0, 0.02 / math.sqrt(2 * self.config.n_layers))
            elif name == "head.weight" or (name == "embed.weight" and self.config.tie_embeddings):
                parameter.normal_(0, head_std)
            elif parameter.dim() == 2:
                parameter.normal_(0, 0.02)
            elif name.endswith("bias"):
                parameter.zero_()

    def forward(self, tokens: Tensor, **context) -> Tensor:
        """tokens (B, T) -> logits (B, T, V). The keyword arguments are those of ``forward_hidden``."""
        return self.head(self.forward_hidden(tokens, **context))

    def forward_hidden(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """tokens (B, T) -> the stream after the final norm (B, T, D).

        * mask: (B, T), 1 = a real token; needed for padding on the left (what is padded on the right is never seen by
          what stands before it, unless the model is an encoder: that needs the mask for any padding).
        * segments: (B, T) integers, one number for each document of a row that holds several: a token sees its own
          document only, and positions restart.
        * positions: (B, T) or (T,); by default they count the real tokens of each document, or continue the cache's.
        * cache: appended to; tokens see what it holds. Not together with segments.

        Learned and sinusoidal positions end at ``max_seq_len`` (ValueError past it); rotary ones go on, untrained.
        """
        B, T = tokens.shape
        real = None if mask is None else mask.bool()
        if positions is None:
            positions = self._positions(tokens, real, segments, cache)  # (B, T) or (T,)
        if T + (cache.length if cache is not None else 0) > self.config.max_seq_len and self.config.positions != "rope":
            raise ValueError(
                f"{T} tokens after {cache.length if cache else 0}: max_seq_len is {self.config.max_seq_len}"
            )
        if cache is not None:
            if not self.config.causal:
                raise ValueError("an encoder's tokens see those after them: it cannot read or write one by one")
            cache.begin(real, positions)
        allowed = self._attention_mask(T, positions, real, segments, cache)  # (B, 1, T, Tk), or None: plain causal

        x = self.embed(tokens)  # (B, T, D)
        rope = far = None
        if self.config.positions == "rope":
            end = T + (0 if cache is None else cache.start)
            rope = self.rotation(positions, far=end > 4096)
            far = self._far_from_sinks(positions, cache)
        elif self.config.positions == "learned":
            x = x + self.position_embed(positions)
        else:
            x = x + self.position_table[positions]
        if self.config.post_norm:
            x = self.embed_norm(x)
        for layer, block in enumerate(self.blocks):
            if self.activation_checkpointing and torch.is_grad_enabled() and cache is None:
                x = checkpoint(block, x, rope, allowed, None, layer, far, use_reentrant=False)
            elif cache is None:
                x = block(x, rope, allowed, far=far)
            else:  # past torch.compile, which would compile again for the growing lengths of generation
                x = block.forward(x, rope, allowed, cache, layer, far)
        return x if self.config.post_norm else self.final_norm(x)

    def _far_from_sinks(self, positions: Tensor, cache: KVCache | None) -> tuple[Tensor, Tensor, Tensor] | None:
        """How queries look at sinks that have left the window (``look_at_sinks``); None as long as none has."""
        sinks, longest = self.config.sinks, positions.shape[-1] if cache is None else cache.length
        if not sinks or longest <= sinks + self.config.window:
            return None
        nearest = positions.clamp(max=sinks + self.config.window - 1)
        k_positions = positions if cache is None else cache.columns()[1]
        return *self.rotation(nearest), k_positions < sinks

    def rotation(self, positions: Tensor, far: bool = False) -> tuple[Tensor, Tensor]:
        """What ``apply_rope`` turns the queries and keys of these positions by, see ``rope_cos_sin``."""
        c = self.config
        return rope_cos_sin(positions, c.head_dim, c.rope_theta, far=far, scaling=c.rope_scaling)

    def _positions(self, tokens, real, segments, cache) -> Tensor:
        T = tokens.shape[1]
        if segments is not None:  # count from the column where the document begins
            column = torch.arange(T, device=tokens.device)
            new = torch.ones_like(segments, dtype=torch.bool)
            new[:, 1:] = segments[:, 1:] != segments[:, :-1]
            return column - (column * new).cummax(dim=1).values  # (B, T)
        if cache is not None and cache.padded:
            real = torch.ones_like(tokens, dtype=torch.bool) if real is None else real
            before = cache.counts()
            return (before + real.cumsum(dim=1) - 1).clamp(min=0)
        if real is not None:
            before = 0 if cache is None else cache.length
            return (before + real.cumsum(dim=1) - 1).clamp(min=0)  # padding gets 0; nobody looks at it
        start = 0 if cache is None else cache.length
        return torch.arange(start, start + T, device=tokens.device)  # (T,)

    def _attention_mask(self, T, positions, real, segments, cache) -> Tensor | None:
        window, sinks = self.config.window, self.config.sinks
        if cache is not None:
            if not cache.padded and window is None and (T == 1 or cache.start == 0):
                return None  # one new token sees everything; a first chunk is plain causal
            q_positions, k_positions, k_real = cache.columns()
            allowed = may_attend(q_positions, k_positions, window, sinks) & k_real[:, None, :]
        else:
            if real is None and segments is None and window is None:
                return None
            if self.config.causal:
                allowed = may_attend(positions, positions, window, sinks)  # (B, T, T) or (T, T)
            else:
                allowed = torch.ones(1, 1, dtype=torch.bool, device=positions.device)  # (1, 1)
            if segments is not None:
                allowed = allowed & (segments[:, :, None] == segments[:, None, :])
            if real is not None:
                allowed = allowed & real[:, None, :]
        # Padding that sees nothing may look at everything: no row is empty, so no kernel can make it NaN and pass that
        # on to the next layer's values.
        allowed = allowed | ~allowed.any(dim=-1, keepdim=True)
        return allowed.unsqueeze(-3)  # the same for every head


# ----------------------------------------------------------------------------------------------------------------------
# Log-probabilities


def token_logps(
    model: Transformer,
    tokens: Tensor,
    temperature: float = 1.0,
    where: Tensor | None = None,
    max_logits: int | None = None,
    **context,
) -> Tensor:
    """log p(token t+1 | tokens ≤ t) under ``softmax(logits / temperature)``: (B, T) -> (B, T-1), float32 or better,
    with gradient.

    Column t scores token t+1. where: (B, T-1), 1 = wanted; the others are not computed and come back as 0. The
    temperature must be the one that the tokens were sampled with, or the policy that trains is not the policy that
    sampled.

    The logits of a batch are its largest tensor by far: 8 × 1,024 tokens × 50,304 words are 1.6 GB in float32, and
    the backward pass wants them again. So we take the positions in chunks of at most ``max_logits`` logits (None: as
    many as the device works on well) and recompute each chunk in the backward pass. Keyword arguments go to
    ``forward_hidden``.
    """
    return hidden_logps(model, model.forward_hidden(tokens, **context), tokens, temperature, where, max_logits)


def hidden_logps(
    model: Transformer,
    hidden: Tensor,
    tokens: Tensor,
    temperature: float = 1.0,
    where: Tensor | None = None,
    max_logits: int | None = None,
) -> Tensor:
    """``token_logps`` from the stream (B, T, D) that ``forward_hidden`` gave, for those who need that for more."""
    hidden = hidden[:, :-1]  # (B, T-1, D)
    targets = tokens[:, 1:]
    wanted = torch.ones_like(targets, dtype=torch.bool) if where is None else where.bool()
    if where is None:
        hidden, picked = hidden.flatten(0, 1), targets.flatten()  # (N, D), (N,)
    else:
        chosen = wanted.nonzero(as_tuple=True)  # a GPU has to count them: once, not at each use of the mask
        hidden, picked = hidden[chosen], targets[chosen]
    weight = model.head.weight  # once: an adapter's is made anew at each reading
    logps_of = getattr(model, "compiled_logps", _logps)
    rows = max(1, (max_logits or logits_at_once(weight.device)) // weight.shape[0])
    if len(picked) <= rows:
        logps = logps_of(hidden, weight, picked, temperature)  # small enough: keep the logits
    else:
        chunks = [
            checkpoint(logps_of, h, weight, t, temperature, use_reentrant=False)
            for h, t in zip(hidden.split(rows), picked.split(rows))
        ]
        logps = torch.cat(chunks)
    if where is None:
        return logps.view_as(targets)
    return torch.zeros(targets.shape, dtype=logps.dtype, device=logps.device).masked_scatter(wanted, logps)


def logits_at_once(device: torch.device) -> int:
    """How many logits are computed in one piece: what a CPU's caches like, or what fills a GPU and takes no more than a
    sixteenth of its memory (16 bytes each, with what the backward pass needs)."""
    if device.type != "cuda":
        return 2**24
    return min(2**28, max(2**24, torch.cuda.get_device_properties(device).total_memory // 256))


def _logps(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    logits = at_least_float32(linear(hidden, weight))  # (N, V); never a softmax over bfloat16
    if temperature != 1.0:  # a pass over the largest tensor of all, forward and backward
        logits = logits / temperature
    return -F.cross_entropy(logits, targets, reduction="none")  # log_softmax, then the target's entry


def answer_logps(model: Transformer, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities of the answers that ``mask`` (N, T-1) marks, and their lengths: (N,) each."""
    return shared_logps(model, tokens, mask).sum(dim=1), mask.sum(dim=1)


def shared_logps(model: Transformer, tokens: Tensor, where: Tensor, temperature: float = 1.0) -> Tensor:
    """``token_logps`` of rows [prompt | answer | padding], for the answers that ``where`` (B, T-1) marks, from
    ``shared_hidden``: (B, T) -> (B, T-1), 0 elsewhere."""
    return hidden_logps(model, shared_hidden(model, tokens, where), tokens, temperature, where)


def shared_hidden(model: Transformer, tokens: Tensor, where: Tensor) -> Tensor:
    """``forward_hidden`` of rows [prompt | answer | padding], in which each prompt that several rows begin with is read
    once, as in generation: the answers go on from its keys and values. With R different prompts of P tokens and B
    answers of A, the blocks compute R·P + B·A tokens and not B·(P + A): with four answers to each, as long as their
    prompts, five of eight.

    tokens: (B, T); where: (B, T-1), true on the tokens of the answers (column t is about token t+1); the prompt is what
    stands before the first of them. Returns (B, T, D), right at the answers' tokens and at the one before them; what
    stands elsewhere is not to be used.
    """
    device, (B, T) = tokens.device, tokens.shape
    # The rows are laid out on the CPU, so that a GPU has to be waited for only here.
    rows, marks = torch.cat([tokens, where.bool()], dim=1).cpu().split([T, T - 1], dim=1)
    starts = (marks.argmax(dim=1) + 1).tolist()  # of each answer the first token: mark t is about token t+1
    ends = (marks * torch.arange(2, T + 1)).amax(dim=1).clamp(min=1).tolist()  # one past the last; no marks: no answer
    number_of: dict[tuple, int] = {}  # the different prompts, in the order in which they are met
    prompt_of = [number_of.setdefault(tuple(row[:s]), len(number_of)) for row, s in zip(rows.tolist(), starts)]  # B
    R, P, A = len(number_of), max(map(len, number_of)), max(e - s for s, e in zip(starts, ends))
    pays = A > 0 and R < B and R * P + B * A < 0.9 * B * T  # by a tenth, for what two passes cost besides
    fits = model.config.positions == "rope" or model.config.max_seq_len >= P + A  # with the padding, too
    if not (pays and fits) or model.activation_checkpointing:  # computing a block again would write its keys again
        return model.forward_hidden(tokens)

    prompts = [torch.tensor(prompt) for prompt in number_of]
    real = pad_sequence([torch.ones_like(p) for p in prompts], True, padding_side="left").to(device)
    prompts = pad_sequence(prompts, True, padding_side="left").to(device)  # (R, P), as generation has them
    answers = pad_sequence([row[s:e] for row, s, e in zip(rows, starts, ends)], True).to(device)  # (B, A)
    prompt_of = torch.tensor(prompt_of, device=device)
    cache = LearningCache(len(model.blocks), R, P + A, device)  # through it the answers' losses reach their prompts
    last = model.forward_hidden(prompts, mask=real, cache=cache)[:, -1:]  # (R, 1, D): it foretells the first token
    last = last.index_select(0, prompt_of)  # (B, 1, D); by [prompt_of] a CPU would add gradients in any order
    cache.select(prompt_of)  # a copy for each answer
    hidden = torch.cat([last, model.forward_hidden(answers, cache=cache)], dim=1)  # (B, 1 + A, D)

    # Back to the places in the rows: hidden[b, k] belongs to the k-th token of the answer, hidden[b, 0] to the one
    # before it.
    starts, ends = torch.tensor(starts), torch.tensor(ends)
    row, k = (torch.arange(1 + A) <= (ends - starts)[:, None]).nonzero(as_tuple=True)
    row, k, column = (index.to(device) for index in (row, k, starts[row] - 1 + k))
    return hidden.new_zeros(B, T, hidden.shape[2]).index_put((row, column), hidden[row, k])


# ----------------------------------------------------------------------------------------------------------------------
# Models that do not learn


def thin_weights(model: Transformer, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """The weights that products in ``dtype`` can have in that precision, without gradient: of the linear layers, but
    for routers, which choose in float32, and a head that is the embedding too. Autocast rounds a weight at each use, so
    that the model says the same, digit for digit, from half the memory and without the rounding. None in float32."""
    if dtype == torch.float32:
        return {}
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and not name.endswith("router")}
    return {
        f"{name}.weight": nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
        for name, module in linears.items() if module.weight is not model.embed.weight
    }  # fmt: skip


def frozen_copy(model: Transformer, dtype: torch.dtype) -> Transformer:
    """What the model is now, for good: a reference. dtype: of its run's products; see ``thin_weights``."""
    thin = {id(model.get_parameter(name)): weight for name, weight in thin_weights(model, dtype).items()}
    return copy.deepcopy(model, thin).requires_grad_(False)  # the memo: what was copied already


def for_inference(model: Transformer, dtype: torch.dtype) -> Transformer:
    """The model itself, no longer to be trained; dtype as above."""
    for name, weight in thin_weights(model.requires_grad_(False), dtype).items():
        layer, _, last = name.rpartition(".")
        setattr(model.get_submodule(layer), last, weight)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Sizes


def count_parameters(model: nn.Module) -> int:
    """Each parameter once, also when two modules share it."""
    return sum(p.numel() for p in model.parameters())


def active_parameters(model: Transformer, weight: Callable[[str, nn.Parameter], float] = lambda name, p: 1.0) -> int:
    """Those that one token meets, each times its ``weight``: of an expert layer, its share of the experts."""
    total = 0.0
    for name, p in model.named_parameters():
        expert = ".experts." in name
        share = model.config.n_experts_per_token / model.config.n_experts if expert else 1.0
        total += weight(name, p) * share * p.numel()
    return round(total)


def flops_per_token(model: Transformer, seq_len: int, words: float = 1.0) -> float:
    """Floating-point operations of one training token: 6 for each weight that multiplies it (2 forward, 4 backward; 2
    fewer for one that is frozen and wants no gradient), and 12·H·d a layer for each key that it attends to: T, on
    average half of them if attention is causal, no more than a window shows (Kaplan et al. 2020; Chowdhery et al. 2022,
    appendix B).

    words: the share of tokens at which one is predicted. A reward model or a classifier uses no head.
    """
    c = model.config
    head = "embed.weight" if c.tie_embeddings else "head.weight"

    def share(name: str) -> float:  # a table that is looked up multiplies nothing
        return words if name == head else 0.0 if name in ("embed.weight", "position_embed.weight") else 1.0

    used = active_parameters(model, lambda name, p: share(name))
    frozen = active_parameters(model, lambda name, p: share(name) * (p.dim() == 2 and not p.requires_grad))
    keys = min(seq_len / 2 if c.causal else seq_len, math.inf if c.window is None else c.window + c.sinks)
    return 6.0 * used - 2.0 * frozen + 12.0 * c.n_layers * c.n_heads * c.head_dim * keys


@dataclass(frozen=True)
class ModelSize:
    """What the start of a run says of its model."""

    parameters: int
    active: int  # of them, those that one token meets
    trained: int  # of them, those that learn
    flops_per_token: float  # of one training token


def model_size(model: Transformer, seq_len: int, words: float = 1.0) -> ModelSize:
    """The size of a model that trains on rows of ``seq_len`` tokens; ``words`` as in ``flops_per_token``."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    flops = flops_per_token(model, seq_len, words)
    return ModelSize(count_parameters(model), active_parameters(model), trained, flops)


def estimate_memory(config: ModelConfig, batch: int, seq_len: int, bytes_per_activation: int = 4) -> dict[str, float]:
    """Bytes of one training step with AdamW, an estimate: weights, gradients and two moments in float32; activations
    kept for the backward pass; one chunk of logits with its softmax (see ``token_logps``).
    """
    with torch.device("meta"):
        n = count_parameters(Transformer(config))
    kv = config.n_kv_heads * config.head_dim
    matrices = 3 if config.mlp == "swiglu" else 2
    dense = (matrices + 1) * config.d_ff
    experts, k = 0, config.n_experts_per_token  # an expert layer also keeps a token's row and output k times
    if config.n_experts:
        experts = (matrices + 1) * (k + config.n_shared_experts) * config.d_expert + 2 * k * config.d_model
    mixed = len(config.expert_layers or range(config.n_layers)) if config.n_experts else 0
    # of width d_model: norms, outputs, the two sums; of the heads': q, q rotated, what they say; k, v; the MLPs
    per_token = (
        config.n_layers * (7 * config.d_model + 3 * config.n_heads * config.head_dim + 2 * kv)
        + (config.n_layers - mixed) * dense
        + mixed * experts
    )
    tokens = batch * seq_len
    logits = 3 * min(tokens * config.vocab_size, 2**24) * 4
    parts = {"weights": 4.0 * n, "gradients": 4.0 * n, "optimizer": 8.0 * n}
    parts |= {"activations": float(tokens * per_token * bytes_per_activation), "logits": float(logits)}
    return parts | {"total": sum(parts.values())}


if __name__ == "__main__":
    print(f"{'shape':34} {'parameters':>12} {'training step of 8 × 512 tokens':>34}")
    for d_model, n_layers, n_heads, vocab_size in [
        (128, 4, 4, 512),
        (512, 8, 8, 4096),
        (128, 1, 4, 50304),
        (512, 8, 8, 50304),
        (1024, 24, 16, 50304),
    ]:
        config = ModelConfig(vocab_size, d_model, n_layers, n_heads, max_seq_len=512)
        with torch.device("meta"):
            n = count_parameters(Transformer(config))
        memory = estimate_memory(config, batch=8, seq_len=512)["total"]
        shape = f"d {d_model:5d}, {n_layers:2d} blocks, vocabulary {vocab_size:6d}"
        print(f"{shape} {n / 1e6:10.2f} M {memory / 1e9:31.2f} GB")
    torch.manual_seed(0)
    model = Transformer(ModelConfig(n_kv_heads=2))
    tokens = torch.randint(512, (4, 64))
    print("\none forward pass, B = 4 sequences of T = 64 tokens:")
    rope = rope_cos_sin(torch.arange(64), model.config.head_dim)
    x, block = model.embed(tokens), model.blocks[0]
    shapes = {"tokens (B, T)": tokens, "stream after the embedding (B, T, D)": x, "cosines of the positions": rope[0]}
    shapes["queries, all heads (B, T, H·d)"] = block.attn.q_proj(x)
    shapes["keys, two heads for four queries (B, T, Hkv·d)"] = block.attn.k_proj(x)
    shapes["what attention adds (B, T, D)"] = block.attn(block.attn_norm(x), rope)
    shapes["hidden units of the feed-forward layer"] = block.mlp.up_proj(x)
    shapes["stream after the last block and norm (B, T, D)"] = model.forward_hidden(tokens)
    shapes["logits (B, T, V)"] = model(tokens)
    shapes["log-probabilities of the next tokens (B, T-1)"] = token_logps(model, tokens)
    for name, tensor in shapes.items():
        print(f"  {name:50} {tuple(tensor.shape)}")
    loss = -token_logps(model, tokens).mean()
    print(f"\nan untrained model is as good as guessing: loss {loss:.3f}, ln 512 = {math.log(512):.3f}")
