"""Windows, sinks and the cache of fixed size: decoding equals the masked pass over the whole text."""

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import load_json, load_npz
from tiny import llama_tiny

import transformer
from attention import KVCache, RollingCache, apply_rope, attention, make_cache, may_attend, rope_cos_sin
from generate import generate, left_pad, prefill, stream
from transformer import ModelConfig, Transformer

SHAPES = [(1, 0), (4, 0), (4, 1), (5, 3), (3, 4)]  # window, sinks


def model_with(window: int | None, sinks: int = 0, **changes) -> Transformer:
    torch.manual_seed(0)
    fields = {"vocab_size": 40, "d_model": 24, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64}
    model = Transformer(ModelConfig(**(fields | changes), window=window, sinks=sinks))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(8.0)  # so that a key too many or too few is seen in the output
    return model.double()


@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal"])
@pytest.mark.parametrize("rolling", [True, False])
@pytest.mark.parametrize("chunks", [[1] * 30, [30], [7, 1, 9, 1, 1, 11], [2, 13, 15], [12, *[1] * 18]], ids=str)
@pytest.mark.parametrize("window, sinks", SHAPES)
@torch.no_grad()
def test_any_split_equals_the_masked_pass(window, sinks, chunks, rolling, positions):
    model = model_with(window, sinks, positions=positions)
    tokens = torch.randint(40, (2, 30))
    whole = model(tokens)
    cache = RollingCache(3, 2, window, sinks) if rolling else KVCache(3, 2, 30)
    parts = [model(part, cache=cache) for part in tokens.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("window, sinks", SHAPES)
@torch.no_grad()
def test_unequal_prompts_wrap_each_at_their_own_time(window, sinks, chunk):
    model = model_with(window, sinks)
    texts = [torch.randint(40, (n,)).tolist() for n in (3, 17, 9)]
    rest = torch.randint(40, (3, 12))
    tokens, real = left_pad(texts, 0)
    cache = RollingCache(3, 3, window, sinks)
    outs = [model.head(prefill(model, tokens, real, cache, chunk))]
    outs += [model(rest[:, t : t + 1], cache=cache)[:, -1] for t in range(12)]
    for row, text in enumerate(texts):
        alone = model(torch.tensor([text + rest[row].tolist()]))[0, len(text) - 1 :]
        torch.testing.assert_close(torch.stack([out[row] for out in outs]), alone)


@pytest.mark.parametrize("window, sinks", SHAPES)
@torch.no_grad()
def test_rows_are_selected_with_all_that_is_theirs(window, sinks):
    model = model_with(window, sinks)
    tokens, real = left_pad([[1, 2, 3], list(range(11))], 0)
    cache = RollingCache(3, 2, window, sinks)
    prefill(model, tokens, real, cache)
    cache.select(torch.tensor([1, 0, 1]))
    out = model(torch.tensor([[5], [6], [7]]), cache=cache)[:, -1]
    for row, text in enumerate([[*range(11), 5], [1, 2, 3, 6], [*range(11), 7]]):
        torch.testing.assert_close(out[row], model(torch.tensor([text]))[0, -1])


@torch.no_grad()
def test_logits_are_those_of_mistral_in_transformers():
    fixture = load_npz("mistral_swa")
    shape = ModelConfig(47, 24, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=32, max_seq_len=64, norm_eps=1e-6, window=4)
    model, tokens = llama_tiny(fixture, config=shape), fixture["input_ids"]
    torch.testing.assert_close(model(tokens), fixture["logits"], rtol=0, atol=1e-4)
    cache = RollingCache(2, 2, 4)
    parts = [model(part, cache=cache) for part in tokens.split([3, *[1] * 11], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), fixture["cached_logits"], rtol=0, atol=1e-4)
    wider = llama_tiny(fixture, config=ModelConfig(**{**vars(shape), "window": 5}))
    assert (wider(tokens) - fixture["logits"]).abs().max() > 1.0
    full = llama_tiny(fixture, config=ModelConfig(**{**vars(shape), "window": None}))
    torch.testing.assert_close(full(tokens), fixture["logits_no_window"], rtol=0, atol=1e-4)


@torch.no_grad()
def test_memory_stays_what_it_is():
    model = model_with(4, 2)
    cache = RollingCache(3, 1, 4, 2)
    sizes = set()
    for _ in range(5):
        model(torch.randint(40, (1, 9)), cache=cache)
        for _ in range(20):
            model(torch.randint(40, (1, 1)), cache=cache)
        sizes.add((cache.k[0].shape, cache.v[2].shape, cache.positions.shape, cache.real.shape))
    assert sizes == {((1, 2, 7, 6), (1, 2, 7, 6), (1, 7), (1, 7))} and cache.length == 145


@torch.no_grad()
def test_slots_are_those_of_mistral_and_of_streaming_llm():
    policies = load_json("kv_cache_policies.json")
    for case in policies["streaming_llm"]:
        window, sinks = case["recent_size"], case["start_size"]
        cache = RollingCache(1, 1, window, sinks)
        for position, expected in enumerate(case["cached_abs_positions_after_each_token"]):
            cache.begin(None, torch.tensor([position]))
            assert sorted(cache.positions[cache.real].tolist()) == expected
            # a query counts distances inside the cache: to the sinks no further than it is full
            assert min(position, sinks + window - 1) == len(expected) - 1
    rolling = policies["mistral_rolling"]
    cache = RollingCache(1, 1, rolling["window"])
    for step in rolling["trace"]:
        cache.begin(None, torch.tensor(step["rope_positions"]))
        written = cache.slots[0] < cache.n_slots
        assert written.tolist() == step["to_cache_mask"] and cache.slots[0, written].tolist() == step["slots_written"]
        assert cache.positions[cache.real].tolist() == step["buffer_after"]
        assert sorted(cache.positions[cache.real].tolist()) == step["unrotated"]
        if len(step["chunk"]) > 1:
            _, seen, real = cache.columns()
            assert sorted(seen[real].tolist()) == step["keys_seen_in_prefill"]
    masks = policies["window_definitions_W3_L6"]
    ours = may_attend(torch.arange(6), torch.arange(6), window=3).int()
    assert ours.equal(torch.tensor(masks["hf_mask"]).int())
    assert not ours.equal(torch.tensor(masks["flex_tutorial_mask"]).int())  # that one has W + 1 keys


@torch.no_grad()
def test_beyond_the_window_sinks_are_seen_from_where_the_cache_ends():
    """One layer by hand: keys at their places in the cache, the query at the last of them (StreamingLLM)."""
    model = model_with(3, 2, n_layers=1)
    tokens = torch.randint(40, (1, 12))
    block, seen = model.blocks[0], torch.tensor([0, 1, 9, 10, 11])
    x = model.embed(tokens)
    h = block.attn_norm(x)[:, seen]
    q, k, v = (
        proj(h).view(1, 5, -1, 6).transpose(1, 2) for proj in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj)
    )
    cos, sin = rope_cos_sin(torch.arange(5), 6)
    out, _ = attention(apply_rope(q, cos, sin)[:, :, -1:], apply_rope(k, cos, sin), v)
    y = x[:, -1] + block.attn.o_proj(out.transpose(1, 2).reshape(1, 24))
    y = y + block.mlp(block.mlp_norm(y))
    torch.testing.assert_close(model(tokens)[:, -1], model.head(model.final_norm(y)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_generation_with_a_window_is_that_of_the_masked_pass():
    model = model_with(5, 2)
    prompts = [[1, 2, 3], list(range(20)), [7]]
    tokens, mask, logps = generate(model, prompts, 15, n_samples=2, eot_id=39, seed=0)
    for i in range(6):
        new = tokens[i, mask[i]].tolist()
        text = torch.tensor([prompts[i // 2] + new])
        expected = model(text)[0, :-1].log_softmax(-1).gather(1, text[0, 1:, None])[-len(new) :, 0]
        torch.testing.assert_close(logps[i, mask[i]].double(), expected, rtol=1e-4, atol=1e-4)
    greedy = list(stream(model, prompts[1], 15, eot_id=39, temperature=0))
    for n, token in enumerate(greedy):
        assert token == int(model(torch.tensor([prompts[1] + greedy[:n]]))[0, -1].argmax())


def test_the_cache_rolls_only_where_the_text_outgrows_the_window():
    assert type(make_cache(2, 1, 10)) is KVCache
    assert type(make_cache(2, 1, 10, window=8, sinks=2)) is KVCache
    assert type(make_cache(2, 1, 11, window=8, sinks=2)) is RollingCache


@pytest.mark.parametrize("sinks", [0, 2])
def test_gradients_flow_through_a_window(sinks):
    """What a token says reaches layers · (W - 1) tokens ahead and no further, and the sinks reach everyone."""
    model = model_with(3, sinks)
    embedded = []
    model.embed.register_forward_hook(lambda *args: embedded.append(args[2]) or args[2].retain_grad())
    model(torch.randint(40, (1, 20)))[0, -1].sum().backward()
    reached = (embedded[0].grad[0].abs().sum(-1) > 1e-9).nonzero().squeeze(1).tolist()
    assert set(range(20 - (3 * 2 + 1), 20)) <= set(reached)
    assert set(reached) - set(range(20 - (3 * 2 + 1), 20)) <= (set(range(6 + sinks)) if sinks else set())
    assert bool({0, 1} & set(reached)) == bool(sinks)


def test_distances_are_the_same_far_out():
    """At position 50,000 as at 0: angles in float32 would be off by thousandths."""
    q, k = torch.randn(1, 1, 64, 32), torch.randn(1, 1, 64, 32)
    products = []
    for start in (0, 50_000, 1_000_003):
        cos, sin = rope_cos_sin(torch.arange(start, start + 64), 32, far=start > 0)
        products.append(apply_rope(q, cos, sin) @ apply_rope(k, cos, sin).transpose(2, 3))
    torch.testing.assert_close(products[1], products[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(products[2], products[0], rtol=0, atol=2e-5)


def test_a_long_text_is_rotated_exactly_and_a_short_one_as_ever(monkeypatch):
    asked = []

    def spy(positions, *args, far=False, **others):
        asked.append((int(positions.max()), far))
        return rope_cos_sin(positions, *args, far=far, **others)

    monkeypatch.setattr(transformer, "rope_cos_sin", spy)
    model, cache = model_with(4, n_layers=1), RollingCache(1, 1, 4)
    with torch.no_grad():
        for n in (4096, 1, 2):
            model(torch.zeros(1, n, dtype=torch.long), cache=cache)
        model(torch.zeros(1, 5, dtype=torch.long))
    assert asked == [(4095, False), (4096, True), (4098, True), (4, False)]


@pytest.mark.parametrize("window, sinks", [(None, 0), (6, 0), (6, 2)])
def test_the_long_stream_measures_what_it_says(monkeypatch, tmp_path, window, sinks):
    bench = Path(__file__).parent.parent / "bench" / "long_stream.py"
    spec = importlib.util.spec_from_file_location("long_stream", bench)
    measured = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(measured)
    monkeypatch.setattr(measured, "BLOCK", 10)
    model, ids, rows = model_with(window, sinks), torch.randint(40, (31,)).tolist(), []
    measured.read(model, ids, "here", rows.append)
    with torch.no_grad():
        logps = model(torch.tensor([ids]))[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert [row["tokens"] for row in rows] == [10, 20, 30]
    for row, part in zip(rows, logps.split(10)):
        assert row["nats"] == pytest.approx(-float(part.mean()), abs=1e-4) and row["ms"] > 0
    sizes = [row["bytes"] for row in rows]
    if window:  # 3 layers, keys and values, 2 heads of width 6, float64
        assert sizes == [3 * 2 * 2 * 6 * 8 * (window + sinks)] * 3
    else:
        assert sizes == [3 * 2 * 2 * 6 * 8 * n for n in (10, 20, 30)]  # what is kept, not the room for more
    text = measured.table([row | {"nats": n} for row, n in zip(rows * 4, [0.0] + [1.0] * 11)])
    assert "| here | 1.00 | 2.72 | 2.72 |" in text
