"""Generation: from a distribution over the next token to text.

A model gives logits; sampling turns them into a token; the token is appended, and the model is asked again. Four
knobs reshape the distribution first, always in this order, each on what the one before it left over:

* temperature: ``softmax(logits / τ)``. Below 1 sharper, above 1 flatter; 0 stands for always taking the most likely
  token.
* top-k: only the k most likely tokens (ties with the k-th stay).
* top-p: the smallest set of most likely tokens whose probability reaches p (Holtzman et al. 2020).
* min-p: only tokens at least min_p times as likely as the most likely one (Nguyen et al. 2024).

``generate`` also returns the log-probability with which each token was drawn. Reinforcement learning needs it, and
needs it of the distribution that was really sampled: with top-k, top-p or min-p the policy that sampled is not the
policy ``softmax(logits / τ)`` that training can differentiate. The RL chapters therefore sample with temperature
alone.

Run ``python generate.py`` to see the four knobs on one small distribution.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attention import KVCache, make_cache
from transformer import Transformer


def filter_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Logits (..., V) after the four knobs: scaled, and -inf where a token was removed. At least one token survives.

    >>> filter_logits(torch.tensor([0.5, 0.25, 0.125, 0.125]).log(), top_p=0.6).softmax(-1)
    tensor([0.6667, 0.3333, 0.0000, 0.0000])
    """
    if temperature <= 0:
        raise ValueError("temperature must be positive; greedy decoding is generate(temperature=0)")
    if temperature != 1.0:
        logits = logits / temperature
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1.0:
        # Keep a token iff the probability of the tokens before it, from the most likely on, is below p: the one that
        # crosses p stays.
        descending, order = logits.sort(dim=-1, descending=True)
        probabilities = descending.softmax(dim=-1)
        removed = probabilities.cumsum(dim=-1) - probabilities >= top_p
        removed[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(removed).scatter(-1, order, removed), float("-inf"))
    if min_p > 0.0:
        probabilities = logits.softmax(dim=-1)
        least = min_p * probabilities.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, float("-inf"))
    return logits


def sample(logits: Tensor, generator: torch.Generator | None = None, **knobs) -> tuple[Tensor, Tensor]:
    """One token for each row of logits (B, V), and its log-probability: (B,) integers, (B,) float32.

    We draw by the inverse of the cumulative distribution: one uniform number u a row, and the first token at which
    the cumulated probability exceeds u. (``torch.multinomial`` draws a random number for every word of the
    vocabulary.) With ``temperature=0`` the most likely token is taken, and its log-probability is that under
    temperature 1.
    """
    if knobs.get("temperature", 1.0) == 0:
        logps, tokens = logits.float().log_softmax(dim=-1).max(dim=-1, keepdim=True)  # (B, 1) each
    else:
        probabilities = filter_logits(logits.float(), **knobs).softmax(dim=-1)
        exact = torch.float32 if logits.device.type == "mps" else torch.float64  # 50,000 summands need the digits
        cumulated = probabilities.cumsum(dim=-1, dtype=exact)
        u = torch.rand(len(logits), 1, generator=generator, dtype=exact, device=logits.device)
        tokens = torch.searchsorted(cumulated, u * cumulated[:, -1:], right=True)  # right: never one of probability 0
        tokens = tokens.clamp(max=logits.shape[-1] - 1)  # (B, 1)
        logps = probabilities.gather(1, tokens).log()
    return tokens.squeeze(1), logps.squeeze(1)


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int, device=None) -> tuple[Tensor, Tensor | None]:
    """Prompts as one (P, T) tensor that ends where each prompt ends, and a mask of the real tokens (None if all are
    equally long).
    """
    longest = max(map(len, prompts))
    tokens = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    real = torch.arange(longest, device=device) >= (longest - lengths)[:, None]
    return tokens, None if min(map(len, prompts)) == longest else real


def cache_for(model: Transformer, batch: int, max_len: int) -> KVCache:
    """Of fixed size if the model's window is shorter than the text."""
    shape = model.config
    return make_cache(shape.n_layers, batch, max_len, shape.window, shape.sinks, model.head.weight.device)


@torch.no_grad()
def prefill(model: Transformer, tokens: Tensor, real: Tensor | None, cache: KVCache, chunk: int = 1024) -> Tensor:
    """Read prompts (P, T) into a cache, ``chunk`` columns at a time, so that the scores of a long prompt need no (T, T)
    memory. real: (P, T), or None if nothing is padded. Returns the stream at the last token, (P, D).
    """
    for first in range(0, tokens.shape[1], chunk):
        some = slice(first, first + chunk)
        hidden = model.forward_hidden(tokens[:, some], mask=None if real is None else real[:, some], cache=cache)
    return hidden[:, -1]


def goes_on(tokens: Tensor, eot_id: int | Sequence[int]) -> Tensor:
    """Whether a text goes on after each of these tokens; a published model may have several that end it."""
    first, *others = (eot_id,) if isinstance(eot_id, int) else eot_id
    going = tokens != first
    for other in others:
        going = going & (tokens != other)
    return going


def check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """ValueError for what cannot be continued."""
    if not len(prompts) or not all(len(p) for p in prompts):
        raise ValueError("every prompt needs at least one token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: at least 1")


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    n_samples: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    *,
    eot_id: int | Sequence[int],
    pad_id: int | None = None,
    seed: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Continue every prompt ``n_samples`` times, until end-of-text or ``max_new_tokens``.

    prompts: P lists of ids, of any lengths; eot_id: the token that ends a text, or several of which each does. Returns
    three (N, C) tensors, N = P · n_samples with the samples of one prompt side by side and C the length of the longest
    continuation: the tokens (``pad_id`` after the end; by default the first ``eot_id``), a boolean mask (True on every
    sampled token, the end-of-text among them), and the float32 log-probabilities of the distribution sampled from (0
    where the mask is False). The same seed gives the same text. A row whose last token is real but no ``eot_id`` was
    cut off.

    Each prompt is read once, whatever n_samples; rows that have finished leave the batch.
    """
    check_prompts(prompts, max_new_tokens)
    device = model.head.weight.device
    generator = None
    if seed is not None:
        generator = torch.Generator(device).manual_seed(seed)
    knobs = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    if pad_id is None:
        pad_id = eot_id if isinstance(eot_id, int) else eot_id[0]

    prompt, real = left_pad(prompts, pad_id, device)
    cache = cache_for(model, len(prompts), prompt.shape[1] + max_new_tokens)
    hidden = prefill(model, prompt, real, cache)  # (P, D)
    if n_samples > 1:
        cache.select(torch.arange(len(prompts), device=device).repeat_interleave(n_samples))
    logits = model.head(hidden).repeat_interleave(n_samples, dim=0)  # (N, V)

    N = len(logits)
    tokens = torch.full((N, max_new_tokens), pad_id, device=device)
    mask = torch.zeros(N, max_new_tokens, dtype=torch.bool, device=device)
    logps = torch.zeros(N, max_new_tokens, device=device)
    rows = torch.arange(N, device=device)  # the rows of the result that are still in the batch ...
    going = torch.ones(N, dtype=torch.bool, device=device)  # ... and which of those have not ended
    for t in range(max_new_tokens):
        token, logp = sample(logits, generator, **knobs)
        tokens[rows, t] = torch.where(going, token, pad_id)
        logps[rows, t] = torch.where(going, logp, 0.0)
        mask[rows, t] = going
        going = going & goes_on(token, eot_id)
        alive = int(going.sum())
        if alive == 0 or t + 1 == max_new_tokens:
            break
        if alive <= 0.75 * len(rows):  # moving the cache costs as much as a step or two: only when it saves more
            keep = going.nonzero().squeeze(1)
            cache.select(keep)
            rows, token, going = rows[keep], token[keep], going[keep]
        logits = model.head(model.forward_hidden(token[:, None], cache=cache)[:, -1])
    return tokens[:, : t + 1], mask[:, : t + 1], logps[:, : t + 1]


def stream(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    eot_id: int | Sequence[int],
    seed: int | None = None,
    **knobs,
) -> Iterator[int]:
    """The ids of one continuation, one by one as they are drawn; ends after ``eot_id``, which is not given out."""
    for token, _ in stream_with_probs(model, prompt, max_new_tokens, eot_id=eot_id, seed=seed, **knobs):
        yield token


@torch.no_grad()
def stream_with_probs(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    eot_id: int | Sequence[int],
    seed: int | None = None,
    **knobs,
) -> Iterator[tuple[int, float]]:
    """The same with the probability that the model itself gave each token, before temperature and cuts."""
    device = model.head.weight.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    cache = cache_for(model, 1, len(prompt) + max_new_tokens)
    hidden = prefill(model, torch.tensor([list(prompt)], device=device), None, cache)
    for n in range(1, max_new_tokens + 1):
        logits = model.head(hidden)  # (1, V)
        token, _ = sample(logits, generator, **knobs)
        if not goes_on(token, eot_id):
            return
        yield int(token), float(logits.float().softmax(dim=-1)[0, token])
        if n < max_new_tokens:
            hidden = model.forward_hidden(token[:, None], cache=cache)[:, -1]


if __name__ == "__main__":
    words = ["apples", "pears", "plums", "nuts", "stones"]
    logits = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()
    print(f"{'':34}" + "".join(f"{word:>9}" for word in words))
    for knobs in (
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 2},
        {"top_p": 0.8},
        {"min_p": 0.25},
        {"temperature": 2.0, "top_k": 4, "top_p": 0.8},
    ):
        left = filter_logits(logits, **knobs).softmax(-1)
        print(
            f"{', '.join(f'{k} {v}' for k, v in knobs.items()) or 'as the model has it':34}"
            + "".join(f"{p:9.3f}" for p in left)
        )
    draws, _ = sample(logits.expand(10000, -1), torch.Generator().manual_seed(0))
    print(f"{'10,000 draws with no knob':34}" + "".join(f"{n / 10000:9.3f}" for n in draws.bincount(minlength=5)))
