"""Fast sampling: a decoding step that a GPU never has to wait for.

``generate`` is the text to read. On a GPU it spends its time on everything but arithmetic: a step for one new token
is a few hundred small kernels, each launched by Python, and at its end the program asks the device whether anybody is
still writing and waits for the answer. Reinforcement learning samples for a third of its time, so this file does the
same step in another way:

* The cache has all its columns from the start (``FixedCache``), and the column to write is a tensor. Every step then
  has the same shapes: a block can be compiled, once for all blocks, to a few kernels, and the step can be recorded as
  a CUDA graph, which launches all of it in one call.
* Token, log-probability and end are decided on the device. Only every 16th step the program looks at who is still
  writing; if half of the rows have ended, the others move together, so that there are few sizes (N, N/2, N/4) and few
  graphs.
* The weights of the linear layers are cast to 16 bits once for a rollout, not once for each token (autocast keeps its
  copies of frozen weights not even for one). Embeddings, norms and the stream stay in float32, as they are in training:
  the policy that samples is the policy that trains.

``fast_generate`` takes and returns what ``generate`` does. Greedy texts of the two are equal, and sampled ones until
the first row leaves the batch (they leave at other times, and then other random numbers meet other rows), as long as
both add up in the same order, which a test asserts on a CPU; on a GPU a fused kernel rounds differently.
"""

import copy
import weakref
from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from attention import KVCache
from generate import cache_for, check_prompts, filter_logits, generate, goes_on, left_pad, prefill
from runtime.device import can_compile
from transformer import ModelConfig, Transformer

LOOK_EVERY = 16  # steps between two looks at who is still writing: the only times when the program waits
BUCKET = 128  # widths of the cache are multiples of this, so that rollouts of similar lengths share a graph


class LayerCache:
    """The keys and values of one layer, (N, Hkv, W, d) each. ``column`` (1,) is where the next token goes."""

    fixed = True

    def __init__(self, k: Tensor, v: Tensor, column: Tensor):
        self.k, self.v, self.column = k, v, column

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k.index_copy_(2, self.column, k)
        self.v.index_copy_(2, self.column, v)
        return self.k, self.v

    def buffers(self, layer: int) -> tuple[Tensor, Tensor, int]:
        return self.k, self.v, self.k.shape[2]


class FixedCache:
    """A key/value cache with all its W columns from the start. Columns that hold nothing are hidden by ``real``. Row i
    is padded where its prompt was."""

    def __init__(self, n_layers: int, rows: int, width: int, n_kv_heads: int, head_dim: int, dtype, device):
        shape = (rows, n_kv_heads, width, head_dim)
        new = lambda: torch.zeros(shape, dtype=dtype, device=device)  # noqa: E731
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.layers = [LayerCache(new(), new(), self.column) for _ in range(n_layers)]
        self.real = torch.zeros(rows, width, dtype=torch.bool, device=device)
        self.n_seen = torch.zeros(rows, 1, dtype=torch.long, device=device)  # real tokens of each row so far

    def fill(self, cache: KVCache, n_samples: int) -> None:
        """Take over the prompts of an ordinary cache, each ``n_samples`` times."""
        T = cache.length
        for layer, k, v in zip(self.layers, cache.k, cache.v):
            layer.k[:, :, :T] = k[:, :, :T].repeat_interleave(n_samples, dim=0)
            layer.v[:, :, :T] = v[:, :, :T].repeat_interleave(n_samples, dim=0)
        self.real.zero_()
        self.real[:, :T] = cache.real[:, :T].repeat_interleave(n_samples, dim=0)
        self.n_seen.copy_(self.real.sum(dim=1, keepdim=True))
        self.column.fill_(T)

    def first(self, rows: int) -> "FixedCache":
        """The same memory, its first rows alone."""
        part = copy.copy(self)
        part.layers = [LayerCache(layer.k[:rows], layer.v[:rows], self.column) for layer in self.layers]
        part.real, part.n_seen = self.real[:rows], self.n_seen[:rows]
        return part

    def select(self, rows: Tensor) -> None:
        """Move these rows to the front, in this order."""
        for layer in self.layers:
            for buffer in (layer.k, layer.v):
                buffer[: len(rows)] = buffer.index_select(0, rows)
        for buffer in (self.real, self.n_seen):
            buffer[: len(rows)] = buffer.index_select(0, rows)


def run_block(block: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: LayerCache) -> Tensor:
    return block.forward(x, rope, mask, cache)


def draw(logits: Tensor, u: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """``sample`` of generate.py from numbers that were drawn before: logits (N, V), u (N, 1) -> tokens (N,) and their
    log-probabilities (N,)."""
    if temperature == 0:
        logps, tokens = logits.float().log_softmax(dim=-1).max(dim=-1)
        return tokens, logps
    probabilities = filter_logits(logits.float(), temperature).softmax(dim=-1)
    cumulated = probabilities.cumsum(dim=-1, dtype=u.dtype)
    tokens = (cumulated <= u * cumulated[:, -1:]).sum(dim=-1).clamp(max=logits.shape[-1] - 1)
    return tokens, probabilities.gather(1, tokens[:, None]).log().squeeze(1)


class Decoder:
    """What is kept from one rollout to the next: the copy of the policy that samples, the cache, and the recorded
    graphs."""

    def __init__(self, model: Transformer):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.device, half = self.kind = kind_of(model)
        if half is not None:
            for module in self.model.modules():
                if isinstance(module, nn.Linear):  # a weight of its own: an embedding that shared it stays float32
                    module.weight = nn.Parameter(module.weight.data.to(half), requires_grad=False)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.run_block, self.draw = run_block, draw
        if self.device.type == "cuda" and can_compile(self.device):
            self.run_block, self.draw = (torch.compile(f, dynamic=True) for f in (run_block, draw))
        self.cache: FixedCache | None = None
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}

    @torch.no_grad()
    def prepare(self, model: Transformer, rows: int, width: int, dtype: torch.dtype) -> None:
        """Copy the policy's weights as they are now; make a cache that is large enough."""
        copies, weights = ([m.get_parameter(name).detach() for name in self.names] for m in (self.model, model))
        torch._foreach_copy_(copies, weights)
        if self.cache is None or self.cache.real.shape != (rows, width) or self.cache.layers[0].k.dtype != dtype:
            c = model.config
            self.cache, self.graphs = None, {}  # the old memory first
            self.cache = FixedCache(c.n_layers, rows, width, c.n_kv_heads, c.head_dim, dtype, self.device)
            self.token = torch.zeros(rows, dtype=torch.long, device=self.device)
            self.going = torch.zeros(rows, dtype=torch.bool, device=self.device)
            self.u = torch.zeros(rows, 1, dtype=torch.float64, device=self.device)
            self.logp = torch.zeros(rows, device=self.device)

    def step(self, rows: int, temperature: float, eot_id: int | Sequence[int]) -> None:
        """Feed the first ``rows`` rows their ``token`` and draw the next one with the numbers in ``u``: ``token``,
        ``logp``, ``going`` (who has not ended yet) and the cache are changed in place."""
        model, cache = self.model, self.cache.first(rows)
        token, going = self.token[:rows], self.going[:rows]
        cache.real.index_fill_(1, cache.column, True)
        far = cache.real.shape[1] > 4096  # as in ``forward_hidden``
        rope = model.rotation(cache.n_seen, far=far)
        mask = cache.real[:, None, None, :]  # (n, 1, 1, W)
        x = model.embed(token[:, None])  # (n, 1, D)
        for block, layer in zip(model.blocks, cache.layers):
            x = self.run_block(block, x, rope, mask, layer)
        logits = model.head(model.final_norm(x)[:, -1])  # (n, V)
        chosen, self.logp[:rows] = self.draw(logits, self.u[:rows], temperature)
        cache.column += 1
        cache.n_seen += 1
        going &= goes_on(token, eot_id)
        token.copy_(torch.where(going, chosen, token))

    def advance(self, rows: int, temperature: float, eot_id: int | Sequence[int]) -> None:
        """One step; on a GPU by replaying its graph, which is recorded when a size is met for the first time."""
        key = (rows, temperature, eot_id if isinstance(eot_id, int) else tuple(eot_id))
        if self.device.type != "cuda":
            self.step(*key)
        else:
            if key not in self.graphs:
                self.graphs[key] = self.record(*key)
            self.graphs[key].replay()

    def give_back_memory(self) -> None:
        """A cache of more than a sixteenth of the card's memory is not kept for the next rollout: updates need it."""
        if self.device.type == "cuda":
            first = self.cache.layers[0].k
            size = 2 * len(self.cache.layers) * first.numel() * first.element_size()
            if size > torch.cuda.get_device_properties(self.device).total_memory / 16:
                self.cache, self.graphs = None, {}

    def record(self, rows: int, temperature: float, eot_id: int | Sequence[int]) -> torch.cuda.CUDAGraph:
        """Run the step on the side until everything is compiled, record it, and put back what the trials changed."""
        state = (self.cache.column, self.cache.n_seen, self.cache.real, self.token, self.going)
        before = [tensor.clone() for tensor in state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.compiler.set_stance("default"):  # stages sample under "force_eager"
            for _ in range(2):
                self.step(rows, temperature, eot_id)
                self.cache.column.copy_(before[0])
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.compiler.set_stance("default"):
            self.step(rows, temperature, eot_id)
        for tensor, value in zip(state, before):
            tensor.copy_(value)
        return graph


def kind_of(model: Transformer) -> tuple[torch.device, torch.dtype | None]:
    """Where a model is, and the 16 bits that autocast would take for its products (None: it is off)."""
    device = model.head.weight.device
    on = torch.is_autocast_enabled(device.type)
    return device, torch.get_autocast_dtype(device.type) if on else None


_decoders: "weakref.WeakKeyDictionary[Transformer, Decoder]" = weakref.WeakKeyDictionary()


def can_decode_fast(model: Transformer) -> bool:
    """Experts are routed by the program, adapters change their weights, and sinks and windows roll their cache: those
    models sample with ``generate``."""
    c = model.config
    plain = not (c.n_experts or c.window is not None or c.post_norm or getattr(model, "lora", None))
    return plain and c.positions == "rope" and c.causal


@torch.no_grad()
def fast_generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    n_samples: int = 1,
    temperature: float = 1.0,
    *,
    eot_id: int | Sequence[int],
    pad_id: int | None = None,
    seed: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``generate`` without top-k, top-p and min-p: the same arguments, the same three (N, C) tensors."""
    check_prompts(prompts, max_new_tokens)
    if pad_id is None:
        pad_id = eot_id if isinstance(eot_id, int) else eot_id[0]
    if model not in _decoders or _decoders[model].kind != kind_of(model):
        _decoders[model] = Decoder(model)
    decoder = _decoders[model]
    device, N = decoder.device, len(prompts) * n_samples
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    uniform = lambda n: torch.rand(n, 1, generator=generator, dtype=torch.float64, device=device)  # noqa: E731

    # The prompts are read as ``generate`` reads them.
    prompt, real = left_pad(prompts, pad_id, device)
    cache = cache_for(model, len(prompts), prompt.shape[1] + max_new_tokens)
    hidden = prefill(model, prompt, real, cache)  # (P, D)
    width = -(-(prompt.shape[1] + max_new_tokens) // BUCKET) * BUCKET
    decoder.prepare(model, N, width, cache.k[0].dtype)
    decoder.cache.fill(cache, n_samples)
    del cache

    tokens = torch.full((N, max_new_tokens), pad_id, device=device)
    mask = torch.zeros(N, max_new_tokens, dtype=torch.bool, device=device)
    logps = torch.zeros(N, max_new_tokens, device=device)
    chosen, logp = draw(model.head(hidden).repeat_interleave(n_samples, dim=0), uniform(N), temperature)
    decoder.token.copy_(chosen)
    decoder.logp.copy_(logp)
    decoder.going.fill_(True)

    index, n = torch.arange(N, device=device), N  # rows of the result that the first n rows of the cache belong to
    for t in range(max_new_tokens):
        token, going = decoder.token[:n], decoder.going[:n]  # going: had not ended before this token
        tokens[index, t] = torch.where(going, token, pad_id)
        mask[index, t] = going
        logps[index, t] = torch.where(going, decoder.logp[:n], 0.0)
        if t + 1 == max_new_tokens:
            break
        if (t + 1) % LOOK_EVERY == 0:
            left = going & goes_on(token, eot_id)
            alive = int(left.sum())  # the program waits here
            if alive == 0:
                break
            if alive <= n // 2 and n // 2 >= max(1, N // 4):
                keep = left.to(torch.int8).argsort(descending=True, stable=True)[: n // 2]
                decoder.cache.select(keep)
                for buffer in (decoder.token, decoder.going, decoder.logp):
                    buffer[: n // 2] = buffer.index_select(0, keep)
                index, n = index[keep], n // 2
        if temperature > 0:
            decoder.u[:n] = uniform(n)
        decoder.advance(n, temperature, eot_id)
    decoder.give_back_memory()
    C = int(mask.sum(dim=1).max())
    return tokens[:, :C], mask[:, :C], logps[:, :C]


if __name__ == "__main__":
    torch.manual_seed(0)
    policy = Transformer(ModelConfig(64, 32, n_layers=2, n_heads=4, n_kv_heads=2))
    questions = [[1, 2, 3], [4, 5]]
    slow = generate(policy, questions, 8, n_samples=2, eot_id=0, seed=1)
    fast = fast_generate(policy, questions, 8, n_samples=2, eot_id=0, seed=1)
    for i, (a, b) in enumerate(zip(slow[0].tolist(), fast[0].tolist())):
        print(f"answer {i % 2} to {questions[i // 2]}\n  generate      {a}\n  fast_generate {b}")
    cache = _decoders[policy].cache
    print(f"the cache: {cache.real.shape[1]} columns from the start, {int(cache.column)} of them written")
    print("columns that hold a token, by row:", cache.n_seen.flatten().tolist())
    print("equal:", torch.equal(slow[0], fast[0]))
