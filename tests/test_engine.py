"""The engine writes what ``generate`` writes, token for token."""

import pytest
import torch

import engine
from engine import FixedCache, can_decode_fast, fast_generate
from generate import cache_for, generate, left_pad, prefill
from transformer import ModelConfig, Transformer, token_logps

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [8]]
NEVER = 64  # an end-of-text outside the vocabulary


def policy(device="cpu", **form) -> Transformer:
    torch.manual_seed(1)
    shape = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64}
    model = Transformer(ModelConfig(**(shape | form)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "form", [{}, {"n_kv_heads": 4, "qk_norm": True}, {"norm": "layernorm", "mlp": "gelu"}], ids=str
)
def test_greedy_text_is_that_of_generate(device, form):
    model = policy(device, **form)
    for eot in (
        NEVER,
        int(generate(model, PROMPTS, 6, temperature=0, eot_id=NEVER, pad_id=0)[0][0, 3]),
    ):  # one that occurs
        slow = generate(model, PROMPTS, 40, 2, 0, eot_id=eot, pad_id=0)
        fast = fast_generate(model, PROMPTS, 40, 2, 0, eot_id=eot, pad_id=0)
        for a, b in zip(slow[:2], fast[:2]):
            assert torch.equal(a, b)
        torch.testing.assert_close(slow[2], fast[2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_text_is_that_of_generate_as_long_as_nobody_leaves(device, temperature):
    model = policy(device)
    slow = generate(model, PROMPTS, 30, 4, temperature, eot_id=NEVER, pad_id=0, seed=3)
    fast = fast_generate(model, PROMPTS, 30, 4, temperature, eot_id=NEVER, pad_id=0, seed=3)
    assert torch.equal(slow[0], fast[0]) and torch.equal(slow[1], fast[1])
    torch.testing.assert_close(slow[2], fast[2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_ended_are_padded_and_the_others_keep_their_own_text(device, monkeypatch):
    """Many rows, many ends: half of the batch leaves, twice. Every row's log-probabilities are still its own."""
    model = policy(device)
    monkeypatch.setattr(engine, "LOOK_EVERY", 4)
    sizes = []
    select = FixedCache.select
    monkeypatch.setattr(FixedCache, "select", lambda self, rows: (sizes.append(len(rows)), select(self, rows))[1])
    eot = 5
    with torch.no_grad():
        model.head.weight[eot] *= 5.0  # ends come early
    tokens, mask, logps = fast_generate(model, PROMPTS, 48, 16, 1.0, eot_id=eot, pad_id=0, seed=0)
    assert sizes == [24, 12]
    lengths = mask.sum(dim=1)
    assert lengths.max() == tokens.shape[1] and len(set(lengths.tolist())) > 5
    for i, (row, real) in enumerate(zip(tokens.tolist(), mask.tolist())):
        n = int(lengths[i])
        assert real == [True] * n + [False] * (len(real) - n)
        assert eot not in row[: n - 1] and (row[n - 1] == eot or n == 48)
        assert row[n:] == [0] * (len(row) - n)
        prompt = PROMPTS[i // 16]
        again = token_logps(model, torch.tensor([prompt + row[:n]], device=device))[0, len(prompt) - 1 :]
        torch.testing.assert_close(again, logps[i, :n], atol=1e-4, rtol=1e-4)
    assert (logps[~mask] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_the_policy_may_change_between_rollouts(device):
    model = policy(device)
    before = fast_generate(model, PROMPTS, 12, temperature=0, eot_id=NEVER, pad_id=0)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    after = fast_generate(model, PROMPTS, 12, temperature=0, eot_id=NEVER, pad_id=0)[0]
    assert not torch.equal(before, after)
    assert torch.equal(after, generate(model, PROMPTS, 12, temperature=0, eot_id=NEVER, pad_id=0)[0])


def test_draws_follow_the_distribution():
    logits = torch.tensor([[2.0, 0.0, -1.0, float("-inf")]]).expand(20000, -1)
    u = torch.rand(20000, 1, dtype=torch.float64)
    tokens, logps = engine.draw(logits, u, 1.0)
    p = logits[0].softmax(-1)
    torch.testing.assert_close(tokens.bincount(minlength=4) / 20000, p, atol=0.02, rtol=0)
    torch.testing.assert_close(logps, p.log()[tokens])
    assert (engine.draw(logits, torch.full_like(u, 1 - 1e-12), 1.0)[0] == 2).all()  # never one of probability 0
    assert (engine.draw(logits, torch.zeros_like(u), 1.0)[0] == 0).all()


def test_a_fixed_cache_takes_over_what_was_read():
    model = policy()
    prompt, real = left_pad(PROMPTS, 0)
    cache = cache_for(model, 3, 16)
    prefill(model, prompt, real, cache)
    fixed = FixedCache(2, 6, 16, 2, 8, torch.float32, "cpu")
    fixed.fill(cache, 2)
    assert fixed.n_seen.flatten().tolist() == [5, 5, 2, 2, 1, 1] and int(fixed.column) == 5
    assert fixed.real.sum(dim=1).tolist() == [5, 5, 2, 2, 1, 1]
    assert torch.equal(fixed.layers[1].k[2, :, :5], cache.k[1][1, :, :5])


def test_models_that_the_engine_does_not_serve():
    assert can_decode_fast(policy())
    assert not can_decode_fast(policy(n_experts=2))
    assert not can_decode_fast(policy(window=8))
    assert not can_decode_fast(policy(positions="learned"))


def test_a_shared_embedding_stays_in_float32_under_autocast():
    """Only the products are in 16 bits, as in training: the stream is not."""
    model = policy(tie_embeddings=True)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, mask, logps = fast_generate(model, PROMPTS, 20, 4, eot_id=NEVER, pad_id=0, seed=0)
        rows = torch.tensor([PROMPTS[0] + row for row in tokens[:4].tolist()])
        again = token_logps(model, rows)[:, len(PROMPTS[0]) - 1 :]
    decoder = engine._decoders[model]
    assert decoder.model.embed.weight.dtype == torch.float32 and decoder.model.head.weight.dtype == torch.bfloat16
    assert float((again - logps[:4]).abs().mean()) < 0.05
    with torch.no_grad():
        model.embed.weight.mul_(2.0)  # one weight, two uses: both copies follow
    with torch.autocast("cpu", torch.bfloat16):
        fast_generate(model, PROMPTS, 2, eot_id=NEVER, pad_id=0)
    assert torch.equal(decoder.model.embed.weight, model.embed.weight)
    assert torch.equal(decoder.model.head.weight, model.embed.weight.bfloat16())


def test_the_precision_may_change_from_call_to_call():
    model = policy()
    with torch.autocast("cpu", torch.bfloat16):
        fast_generate(model, PROMPTS, 4, temperature=0, eot_id=NEVER, pad_id=0)
    found = fast_generate(model, PROMPTS, 12, temperature=0, eot_id=NEVER, pad_id=0)[0]
    assert torch.equal(found, generate(model, PROMPTS, 12, temperature=0, eot_id=NEVER, pad_id=0)[0])


@pytest.mark.parametrize(("prompts", "new"), [([], 4), ([[1], []], 4), ([[1]], 0)])
def test_what_generate_refuses_is_refused(prompts, new):
    for one in (generate, fast_generate):
        with pytest.raises(ValueError):
            one(policy(), prompts, new, eot_id=0)
