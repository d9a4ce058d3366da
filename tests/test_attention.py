"""Attention against transformers and PyTorch, by hand, and by its properties."""

import math

import pytest
import torch
from conftest import load_npz

from attention import (
    KVCache,
    RopeScaling,
    SelfAttention,
    apply_rope,
    attention,
    causal_mask,
    fused_attention,
    may_attend,
    rope_cos_sin,
    sinusoidal_positions,
)

CORE = load_npz("attention_core")
ROPE = load_npz("rope_gqa")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **(tolerance or CLOSE))


def random_qkv(heads=4, kv_heads=2, t_q=5, t_k=5, d=6, dtype=torch.float32):
    q = torch.randn(2, heads, t_q, d, dtype=dtype)
    return q, torch.randn(2, kv_heads, t_k, d, dtype=dtype), torch.randn(2, kv_heads, t_k, d, dtype=dtype)


# ----------------------------------------------------------------------------------------------------------------------
# The operation


def test_the_printed_example_by_hand():
    """The third token of ``python attention.py``: scores (1, 2, 2)/√2, so the weights are 1 : e^(1/√2) : e^(1/√2)."""
    q = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]]])
    k = torch.tensor([[[[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]]]])
    v = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]]])
    out, weights = attention(q, k, v, causal_mask(3, 3))
    e = math.exp(1 / math.sqrt(2))
    second, third = torch.tensor([1.0, e]) / (1 + e), torch.tensor([1.0, e, e]) / (1 + 2 * e)
    close(weights[0, 0, 0], torch.tensor([1.0, 0.0, 0.0]))
    close(weights[0, 0, 1], torch.tensor([*second, 0.0]))
    close(weights[0, 0, 2], third)
    close(weights[0, 0, 1:], torch.tensor([[0.330, 0.670, 0.0], [0.198, 0.401, 0.401]]), atol=6e-4, rtol=0.0)
    close(out[0, 0, 2], torch.tensor([third[0] + 5 * third[2], third[1] + 5 * third[2]]))
    close(out[0, 0], torch.tensor([[1.0, 0.0], [0.330, 0.670], [2.203, 2.407]]), atol=6e-4, rtol=0.0)
    _, windowed = attention(q, k, v, causal_mask(3, 3, window=2))
    close(windowed[0, 0, 2], torch.tensor([0.0, 0.5, 0.5]))


def test_equals_transformers_eager():
    out, weights = attention(CORE["q"], CORE["k"], CORE["v"], CORE["mask_causal_pad"])
    close(out.transpose(1, 2), CORE["eager_out"])
    close(weights, CORE["eager_weights"])


@pytest.mark.parametrize("operation", [lambda *a: attention(*a)[0], fused_attention], ids=["by_hand", "fused"])
def test_equals_torch_sdpa(operation):
    q, k, v = CORE["q"], CORE["k"], CORE["v"]
    close(operation(q, k, v, CORE["mask_causal_pad"]), CORE["sdpa_gqa_out"])
    close(operation(q, k, v, causal_mask(5, 5)), CORE["sdpa_causal_out"])
    last_two = operation(q[:, :, -2:], k, v, causal_mask(2, 5))
    close(last_two, CORE["sdpa_causal_Tq2_Tk5_bottomright_mask"])
    assert (last_two - CORE["sdpa_causal_Tq2_Tk5_is_causal_TOPLEFT"]).abs().max() > 0.1


def test_row_without_keys_is_zero_as_in_sdpa():
    out, weights = attention(CORE["q"], CORE["k"], CORE["v"], CORE["mask_fully_masked_row"])
    close(out, CORE["sdpa_fully_masked_row_out"])
    empty = ~CORE["mask_fully_masked_row"].any(-1).expand(2, 4, 5)
    assert empty.any() and not empty.all()
    assert (out[empty] == 0).all() and (weights[empty] == 0).all()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_row_without_keys_has_finite_gradients():
    """Not in between either: anomaly detection raises at the first NaN in a backward pass."""
    q, k, v = (x.requires_grad_() for x in random_qkv())
    mask = causal_mask(5, 5).clone()
    mask[2] = False
    with torch.autograd.detect_anomaly():
        out, _ = attention(q, k, v, mask)
        (out * torch.randn_like(out)).sum().backward()
    for x in (q, k, v):
        assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert (q.grad[:, :, 2] == 0).all()


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize("mask", [None, causal_mask(5, 5), causal_mask(5, 5, window=2), CORE["mask_causal_pad"]])
def test_by_hand_equals_fused(heads, kv_heads, mask):
    q, k, v = random_qkv(heads, kv_heads, dtype=torch.float64)
    close(attention(q, k, v, mask)[0], fused_attention(q, k, v, mask), atol=1e-6, rtol=1e-6)


def test_fused_causal_flag_equals_mask():
    q, k, v = random_qkv()
    close(fused_attention(q, k, v, causal=True), fused_attention(q, k, v, causal_mask(5, 5)))


def test_fused_causal_flag_refuses_a_cache():
    q, k, v = random_qkv(t_q=2)
    with pytest.raises(ValueError, match="as many queries as keys"):
        fused_attention(q, k, v, causal=True)


def test_scale_is_head_width():
    """Brute force in Python floats, scores divided by √d of one head."""
    q, k, v = random_qkv(t_q=3, t_k=4, dtype=torch.float64)
    out, weights = attention(q, k, v)
    for b, h, i in [(0, 0, 0), (1, 3, 2), (0, 2, 1)]:
        group = h // 2
        exps = [math.exp(sum(a * b for a, b in zip(q[b, h, i], k[b, group, j])) / math.sqrt(6)) for j in range(4)]
        close(weights[b, h, i], torch.tensor(exps, dtype=torch.float64) / sum(exps), atol=1e-6, rtol=1e-6)
        close(out[b, h, i], weights[b, h, i] @ v[b, group])


def test_weights_sum_to_one_and_respect_the_mask():
    q, k, v = random_qkv()
    mask = causal_mask(5, 5, window=2, sinks=1)
    weights = attention(q, k, v, mask)[1]
    close(weights.sum(-1), torch.ones(2, 4, 5))
    assert (weights[:, :, ~mask] == 0).all() and (weights[:, :, mask] > 0).all()


def test_mask_is_not_written():
    mask = CORE["mask_fully_masked_row"].clone()
    q = CORE["q"].clone()
    attention(q, CORE["k"], CORE["v"], mask)
    assert mask.equal(CORE["mask_fully_masked_row"]) and q.equal(CORE["q"])


@pytest.mark.parametrize("mask", [None, causal_mask(3, 3), torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 1]]).bool()])
def test_gradients_are_the_derivatives(mask):
    q, k, v = (x.requires_grad_() for x in random_qkv(heads=2, kv_heads=1, t_q=3, t_k=3, d=2, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, mask)[0], (q, k, v))


@pytest.mark.parametrize("causal", [False, True])
def test_by_hand_and_fused_have_the_same_gradients(causal):
    mask = causal_mask(5, 5) if causal else None
    inputs = random_qkv()
    grads = []
    for operation in (lambda *a: attention(*a)[0], fused_attention):
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        operation(q, k, v, mask).square().sum().backward()
        grads.append((q.grad, k.grad, v.grad))
    for by_hand, fused in zip(*grads):
        close(by_hand, fused, atol=1e-5, rtol=1e-4)


def test_bfloat16_stays_bfloat16():
    q, k, v = random_qkv()
    out, weights = attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert out.dtype == weights.dtype == torch.bfloat16
    close(out.float(), attention(q, k, v)[0], atol=5e-2, rtol=5e-2)


# ----------------------------------------------------------------------------------------------------------------------
# Grouped queries


def test_query_heads_share_in_blocks_not_tiled():
    """Heads 0, 1 read key/value head 0 and heads 2, 3 read head 1."""
    q, k = torch.randn(1, 4, 3, 6), torch.randn(1, 2, 3, 6)
    v = torch.stack([torch.full((3, 6), 1.0), torch.full((3, 6), 2.0)])[None]
    for out in (attention(q, k, v)[0], fused_attention(q, k, v)):
        close(out[0, :, 0, 0], torch.tensor([1.0, 1.0, 2.0, 2.0]))


def test_grouping_equals_repeat_kv_of_transformers():
    q, k = ROPE["q"], ROPE["k"]
    close(attention(q, k, k)[0], attention(q, ROPE["repeat_kv_k_2"], ROPE["repeat_kv_k_2"])[0])


# ----------------------------------------------------------------------------------------------------------------------
# Masks


@pytest.mark.parametrize("t_q, t_k", [(1, 1), (1, 7), (3, 7), (7, 7), (6, 7)])
@pytest.mark.parametrize("window, sinks", [(None, 0), (1, 0), (2, 0), (3, 1), (3, 2), (100, 0)])
def test_causal_mask_equals_loops(t_q, t_k, window, sinks):
    mask = causal_mask(t_q, t_k, window, sinks)
    assert mask.shape == (t_q, t_k) and mask.dtype == torch.bool
    for i in range(t_q):
        position = t_k - t_q + i
        seen = {s for s in range(t_k) if s <= position and (window is None or s > position - window or s < sinks)}
        assert {s for s in range(t_k) if mask[i, s]} == seen


def test_a_window_counts_the_query_itself():
    assert causal_mask(14, 14, window=4).sum(-1).tolist() == [min(i + 1, 4) for i in range(14)]


def test_may_attend_takes_positions_per_row():
    q_positions, k_positions = torch.tensor([[4], [1]]), torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])
    assert may_attend(q_positions, k_positions, window=2).int().tolist() == [[[0, 0, 0, 1, 1]], [[1, 1, 1, 1, 0]]]


# ----------------------------------------------------------------------------------------------------------------------
# Positions


@pytest.mark.parametrize("case, theta", [("theta1e4", 1e4), ("theta5e5", 5e5)])
def test_rope_equals_transformers(case, theta):
    cos, sin = rope_cos_sin(ROPE["position_ids"], 8, theta)
    assert cos.shape == (1, 6, 4) and cos.dtype == sin.dtype == torch.float32
    close(cos, ROPE[f"{case}_cos"][..., :4])
    close(sin, ROPE[f"{case}_sin"][..., :4])
    close(apply_rope(ROPE["q"], cos, sin), ROPE[f"{case}_q_half"])
    close(apply_rope(ROPE["k"], cos, sin), ROPE[f"{case}_k_half"])


def test_rope_relates_to_metas_layout_by_a_permutation():
    permutation = ROPE["perm_interleaved_to_half"]
    cos, sin = rope_cos_sin(ROPE["position_ids"], 8)
    for name in ("q", "k"):
        meta = ROPE[f"theta1e4_{name}_meta_interleaved"]
        close(apply_rope(ROPE[name][..., permutation], cos, sin), meta[..., permutation])
        assert (apply_rope(ROPE[name], cos, sin) - meta).abs().max() > 0.1  # without it the layouts disagree


def test_rope_position_zero_changes_nothing():
    x = torch.randn(1, 2, 1, 8)
    assert apply_rope(x, *rope_cos_sin(torch.tensor([0]), 8)).equal(x)


def test_rope_by_hand():
    """With d = 2 the pair turns by p radians: (1, 0) at position 1 becomes (cos 1, sin 1)."""
    turned = apply_rope(torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]]), *rope_cos_sin(torch.tensor([1, 1]), 2))
    close(turned[0, 0], torch.tensor([[math.cos(1), math.sin(1)], [-math.sin(1), math.cos(1)]]))


def test_rope_keeps_the_norm_of_each_pair():
    x = torch.randn(2, 3, 5, 8)
    turned = apply_rope(x, *rope_cos_sin(torch.tensor([0, 1, 17, 300, 5000]), 8))
    close(turned.unflatten(-1, (2, 4)).norm(dim=-2), x.unflatten(-1, (2, 4)).norm(dim=-2))  # pairs (i, i + 4)
    assert (turned - x).abs().amax(dim=(0, 1, 3))[1:].min() > 0.1


@pytest.mark.parametrize("shift", [1, 13, 200])
def test_rope_products_depend_on_distance_alone(shift):
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def product(m, n):
        a = apply_rope(q, *rope_cos_sin(torch.tensor([m]), 8))
        return (a * apply_rope(k, *rope_cos_sin(torch.tensor([n]), 8))).sum()

    close(product(7, 3), product(7 + shift, 3 + shift), atol=1e-4, rtol=1e-4)
    assert (product(7, 3) - product(3, 7)).abs() > 1e-3


def test_rope_takes_positions_per_row():
    x = torch.randn(2, 3, 4, 8)
    positions = torch.tensor([[0, 1, 2, 3], [5, 6, 9, 9]])
    together = apply_rope(x, *rope_cos_sin(positions, 8))
    for row in range(2):
        close(together[row : row + 1], apply_rope(x[row : row + 1], *rope_cos_sin(positions[row], 8)))


def test_llama_3_slows_down_what_turns_seldom():
    """Pairs that turn four times or more in the original context stay, those that turn less than once are eight times
    slower, and two and a half turns are half of each."""
    scaling = RopeScaling(factor=8.0, low=1.0, high=4.0, original=100)
    turns = torch.tensor([50.0, 4.0, 2.5, 1.0, 0.1])
    slowed = scaling.slowed(turns * 2 * math.pi / 100) * 100 / (2 * math.pi)
    close(slowed, torch.tensor([50.0, 4.0, 2.5 * (0.5 + 0.5 / 8), 1.0 / 8, 0.1 / 8]))
    plain, scaled = (rope_cos_sin(torch.arange(300), 8, 1e4, scaling=s)[0] for s in (None, scaling))
    assert scaled[:, 0].equal(plain[:, 0]) and not scaled[:, 3].allclose(plain[:, 3])


def test_rope_angles_stay_float32_for_a_bfloat16_model():
    cos, _ = rope_cos_sin(torch.tensor([256, 257]), 8)
    assert cos.dtype == torch.float32
    assert (cos[0, 0] - cos[1, 0]).abs() > 0.1
    assert apply_rope(torch.randn(1, 1, 2, 8).bfloat16(), cos, cos).dtype == torch.bfloat16


def test_sinusoidal_equals_the_papers_layout():
    table = sinusoidal_positions(8, 6)
    close(table, CORE["sinusoidal_interleaved_8x6"])
    assert (table - CORE["sinusoidal_halves_8x6"]).abs().max() > 0.1
    for p in range(8):
        for i in range(3):
            angle = p / 10000 ** (2 * i / 6)
            close(table[p, 2 * i : 2 * i + 2], torch.tensor([math.sin(angle), math.cos(angle)]))


def test_sinusoidal_takes_an_odd_width():
    assert sinusoidal_positions(4, 5).shape == (4, 5)
    close(sinusoidal_positions(4, 5)[3, 4], torch.tensor(math.sin(3 / 10000 ** (4 / 5))))


# ----------------------------------------------------------------------------------------------------------------------
# The cache


def test_cache_returns_all_that_was_written():
    cache = KVCache(n_layers=2, batch=3, max_len=6)
    k, v = torch.randn(2, 3, 2, 6, 4), torch.randn(2, 3, 2, 6, 4)  # (layer, B, Hkv, T, d)
    for start, end in [(0, 3), (3, 4), (4, 6)]:
        cache.begin(None, torch.arange(start, end))
        assert (cache.start, cache.length) == (start, end)
        for layer in range(2):
            keys, values = cache.write(layer, k[layer, :, :, start:end], v[layer, :, :, start:end])
            assert keys.equal(k[layer, :, :, :end]) and values.equal(v[layer, :, :, :end])
    assert cache.positions.tolist() == [[0, 1, 2, 3, 4, 5]] * 3 and cache.real.all() and not cache.padded


def test_cache_remembers_padding():
    cache = KVCache(n_layers=1, batch=2, max_len=4)
    real = torch.tensor([[False, True, True], [True, True, True]])
    cache.begin(real, torch.tensor([[0, 0, 1], [0, 1, 2]]))
    assert cache.padded and cache.real[:, :3].equal(real)
    cache.begin(None, torch.tensor([[2], [3]]))
    assert cache.padded and cache.real[:, 3].all() and cache.positions[:, 3].tolist() == [2, 3]


def test_cache_selects_rows_repeatedly_and_in_order():
    cache = KVCache(n_layers=2, batch=3, max_len=4)
    cache.begin(torch.tensor([[False, True]] * 2 + [[True, True]]), torch.tensor([[0, 0], [0, 0], [0, 1]]))
    k, v = torch.randn(3, 2, 2, 4), torch.randn(3, 2, 2, 4)
    cache.write(0, k, v)  # layer 1 has seen nothing yet
    rows = torch.tensor([2, 0, 0, 1])
    cache.select(rows)
    assert cache.k[0][:, :, :2].equal(k[rows]) and cache.v[0][:, :, :2].equal(v[rows]) and cache.k[1] is None
    assert cache.positions[:, :2].tolist() == [[0, 1], [0, 0], [0, 0], [0, 0]]
    assert cache.real[:, :2].tolist() == [[True, True], [False, True], [False, True], [False, True]]
    cache.begin(None, torch.tensor([2]))
    keys, _ = cache.write(0, torch.zeros(4, 2, 1, 4), torch.zeros(4, 2, 1, 4))
    assert keys[:, :, :2].equal(k[rows])


def test_cache_overflow_is_an_error():
    cache = KVCache(n_layers=1, batch=1, max_len=3)
    cache.begin(None, torch.arange(2))
    with pytest.raises(ValueError, match="the cache holds 3 tokens, 4 are needed"):
        cache.begin(None, torch.arange(2, 4))


# ----------------------------------------------------------------------------------------------------------------------
# The layer


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_layer_is_attention_between_projections(kv_heads, qk_norm):
    """The layer redone with the operation by hand, a head at a time."""
    layer = SelfAttention(16, 4, kv_heads, qk_norm=qk_norm)
    x = torch.randn(2, 5, 16)
    cos, sin = rope_cos_sin(torch.arange(5), 4)
    q = torch.stack(layer.q_proj(x).split(4, dim=-1), dim=1)
    k = torch.stack(layer.k_proj(x).split(4, dim=-1), dim=1)
    v = torch.stack(layer.v_proj(x).split(4, dim=-1), dim=1)
    if qk_norm:
        q = q * (q.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        k = k * (k.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    out, _ = attention(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, causal_mask(5, 5))
    close(layer(x, (cos, sin)), layer.o_proj(torch.cat(out.unbind(1), dim=-1)))


def test_layer_stores_rotated_keys_once():
    layer = SelfAttention(16, 4, 2)
    x = torch.randn(1, 5, 16)
    cos, sin = rope_cos_sin(torch.arange(5), 4)
    cache = KVCache(1, 1, 5)
    for t in range(5):
        cache.begin(None, torch.tensor([t]))
        layer(x[:, t : t + 1], (cos[t : t + 1], sin[t : t + 1]), None, cache, 0)
    keys = apply_rope(torch.stack(layer.k_proj(x).split(4, dim=-1), dim=1), cos, sin)
    values = torch.stack(layer.v_proj(x).split(4, dim=-1), dim=1)
    close(cache.k[0], keys)
    close(cache.v[0], values)  # values are not rotated
