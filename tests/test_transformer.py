"""The transformer against Llama, GPT-2 and TRL, and by what must hold for every form of it."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import load_npz
from torch import nn

from attention import KVCache, RopeScaling
from engine import fast_generate
from generate import generate
from layers import ACTIVATIONS, FeedForward, ModelConfig, RMSNorm, SwiGLU
from transformer import (
    Transformer,
    count_parameters,
    estimate_memory,
    flops_per_token,
    for_inference,
    frozen_copy,
    shared_logps,
    token_logps,
)

LLAMA, GPT2, NORM, TRL = (load_npz(name) for name in ("llama_tiny", "gpt2_tiny", "norm_act", "trl_logps"))

FORMS = [
    {"positions": positions, "norm": norm, "mlp": mlp, "bias": mlp != "swiglu", "tie_embeddings": norm == "layernorm"}
    for positions, (norm, mlp) in itertools.product(
        ("rope", "learned", "sinusoidal"),
        (("rmsnorm", "swiglu"), ("layernorm", "gelu"), ("layernorm", "gelu_tanh"), ("rmsnorm", "relu")),
    )
]
KINDS = [{"positions": positions} for positions in ("rope", "learned", "sinusoidal")]
WINDOWS = [{}, {"window": 3}, {"window": 3, "sinks": 1}]


def close(a, b, atol=1e-5, rtol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


def name_of(form):
    return "-".join(f"{v}" if isinstance(v, str) else f"{k}{v}" for k, v in form.items()) or "full"


def small(**fields) -> Transformer:
    """A random model whose attention is far from uniform: at the usual 0.02 a wrong mask would hardly show."""
    torch.manual_seed(1)
    shape = {"vocab_size": 23, "d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 16}
    model = Transformer(ModelConfig(**(shape | fields)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def renamed_llama(weights: dict) -> dict:
    renames = [
        ("model.embed_tokens", "embed"),
        ("model.layers", "blocks"),
        ("self_attn", "attn"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "mlp_norm"),
        ("model.norm", "final_norm"),
        ("lm_head", "head"),
    ]
    out = {}
    for name, value in weights.items():
        for theirs, ours in renames:
            name = name.replace(theirs, ours)
        out[name] = value
    return out


def llama() -> Transformer:
    model = Transformer(ModelConfig(61, 32, 2, 4, n_kv_heads=2, d_ff=44, max_seq_len=64))
    model.load_state_dict(renamed_llama({k[3:]: v for k, v in LLAMA.items() if k.startswith("w::")}))
    return model


def gpt2() -> Transformer:
    config = ModelConfig(
        39, 20, 2, 4, d_ff=80, max_seq_len=16, positions="learned", norm="layernorm", mlp="gelu_tanh", bias=True,
        tie_embeddings=True,
    )  # fmt: skip
    w = {k.removeprefix("w::").removeprefix("transformer."): v for k, v in GPT2.items() if k.startswith("w::")}
    state = {"embed.weight": w["wte.weight"], "head.weight": w["lm_head.weight"]}
    state |= {"position_embed.weight": w["wpe.weight"]}
    state |= {f"final_norm.{kind}": w[f"ln_f.{kind}"] for kind in ("weight", "bias")}
    for i, kind in itertools.product(range(2), ("weight", "bias")):
        theirs, ours = f"h.{i}", f"blocks.{i}"
        for q_k_v, part in zip("qkv", w[f"{theirs}.attn.c_attn.{kind}"].chunk(3, dim=-1)):
            state[f"{ours}.attn.{q_k_v}_proj.{kind}"] = part.T if kind == "weight" else part
        for a, b in [
            ("attn.c_proj", "attn.o_proj"),
            ("mlp.c_fc", "mlp.up_proj"),
            ("mlp.c_proj", "mlp.down_proj"),
        ]:
            part = w[f"{theirs}.{a}.{kind}"]
            state[f"{ours}.{b}.{kind}"] = part.T if kind == "weight" else part
        state[f"{ours}.attn_norm.{kind}"] = w[f"{theirs}.ln_1.{kind}"]
        state[f"{ours}.mlp_norm.{kind}"] = w[f"{theirs}.ln_2.{kind}"]
    model = Transformer(config)
    model.load_state_dict(state)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Llama, in transformers


def test_llama_logits_and_hidden():
    model, ids = llama(), LLAMA["input_ids"]
    close(model(ids), LLAMA["logits"], atol=1e-4)
    close(model.forward_hidden(ids), LLAMA["hidden_2"], atol=1e-4)
    stream = model.embed(ids)
    close(stream, LLAMA["hidden_0"], atol=1e-4)
    rope = torch.arange(12)[:, None] * 10000.0 ** (-torch.arange(4) / 4)
    close(model.blocks[0](stream, (rope.cos(), rope.sin())), LLAMA["hidden_1"], atol=1e-4)


@pytest.mark.parametrize("side", ["rp", "lp"])
def test_llama_padded_logits(side):
    mask = LLAMA[f"{side}_attention_mask"]
    logits = llama()(LLAMA[f"{side}_input_ids"], mask=mask)
    real = mask.bool()
    assert not real.all()
    close(logits[real], LLAMA[f"{side}_logits"][real], atol=1e-4)


def test_llama_position_ids_come_from_the_mask():
    mask = LLAMA["lp_attention_mask"].bool()
    positions = llama()._positions(LLAMA["lp_input_ids"], mask, None, None)
    assert positions.equal(LLAMA["lp_position_ids"])


def test_llama_right_padding_needs_no_mask():
    real = LLAMA["rp_attention_mask"].bool()
    close(llama()(LLAMA["rp_input_ids"])[real], LLAMA["rp_logits"][real], atol=1e-4)


def test_llama_cached_logits():
    model, ids = llama(), LLAMA["input_ids"]
    cache = KVCache(2, 2, 12)
    parts = [model(chunk, cache=cache) for chunk in ids.split([5, 1, 1, 1, 1, 1, 1, 1], dim=1)]
    close(torch.cat(parts, dim=1), LLAMA["cached_logits"], atol=1e-4)


def test_llama_loss_and_gradients():
    model, labels = llama(), LLAMA["labels"]
    counts = labels[:, 1:] != -100
    logps = token_logps(model, torch.where(labels == -100, LLAMA["input_ids"], labels), where=counts)
    total = -(logps * counts).sum()
    close(total / counts.sum(), LLAMA["loss_mean"], atol=1e-4)
    close(total / 20, LLAMA["loss_num_items_20"], atol=1e-4)
    (total / counts.sum()).backward()
    grads = renamed_llama({k[6:]: v for k, v in LLAMA.items() if k.startswith("grad::")})
    assert len(grads) == 5
    ours = dict(model.named_parameters())
    for name, expected in grads.items():
        close(ours[name].grad, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logps_equal_trl(temperature):
    labels, ids = TRL["e2e_labels"], TRL["e2e_input_ids"]
    counts = labels[:, 1:] != -100
    expected = TRL[f"e2e_logps_T{temperature}"]
    model = llama()
    logps = token_logps(model, ids, temperature)
    assert logps.shape == (2, 8) and logps.dtype == torch.float32
    close(logps[counts], expected[counts], atol=1e-4)
    close(token_logps(model, ids, temperature, where=counts), expected, atol=1e-4)
    close(-logps[counts].mean(), TRL[f"e2e_loss_T{temperature}"], atol=1e-4)


def test_gpt2_logits_and_loss():
    model, ids = gpt2(), GPT2["input_ids"]
    close(model(ids), GPT2["logits"], atol=1e-4)
    close(-token_logps(model, ids).mean(), GPT2["loss"], atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def test_rmsnorm_equals_llama():
    norm = RMSNorm(16, 1e-5)
    norm.weight.data = NORM["weight"].clone()
    close(norm(NORM["x"]), NORM["rms_llama_f32"])


def test_rmsnorm_casts_down_before_the_weight():
    """Llama's order; multiplying in float32 first, as torch and Gemma do, differs in the last bit of bfloat16."""
    norm = RMSNorm(16).bfloat16()
    norm.weight.data = NORM["weight"].bfloat16()
    out = norm(NORM["x"].bfloat16())
    assert out.dtype == torch.bfloat16
    assert out.float().equal(NORM["rms_llama_bf16"])
    assert not out.float().equal(NORM["rms_torch_bf16"])


def test_rmsnorm_with_float32_weight_gives_float32():
    norm = RMSNorm(16)
    norm.weight.data = NORM["weight"].clone()
    out = norm(NORM["x"].bfloat16())
    assert out.dtype == torch.float32
    close(out, NORM["rms_llama_bf16in_f32weight"])


def test_layernorm_equals_torch():
    model = small(norm="layernorm", d_model=16, bias=True)
    norm = model.final_norm
    norm.weight.data, norm.bias.data = NORM["weight"].clone(), NORM["bias"].clone()
    close(norm(NORM["x"]), NORM["layernorm_eps1e-5"])
    norm = small(norm="layernorm", d_model=16, bias=False).final_norm
    assert norm.bias is None
    norm.weight.data = NORM["weight"].clone()
    close(norm(NORM["x"]), NORM["layernorm_nobias"])


@pytest.mark.parametrize("ours, theirs", [("gelu", "gelu"), ("gelu_tanh", "gelu_new"), ("relu", "relu")])
def test_activations_equal_transformers(ours, theirs):
    close(ACTIVATIONS[ours](NORM["x"]), NORM[f"act_{theirs}"], atol=1e-6)


def test_feed_forward_uses_its_activation():
    config = ModelConfig(d_model=16, mlp="gelu_tanh", d_ff=24, bias=True)
    mlp, x = FeedForward(config), NORM["x"]
    hidden = F.linear(x, mlp.up_proj.weight, mlp.up_proj.bias)
    close(mlp(x), F.linear(F.gelu(hidden, approximate="tanh"), mlp.down_proj.weight, mlp.down_proj.bias))
    assert not torch.allclose(F.gelu(hidden), F.gelu(hidden, approximate="tanh"), atol=1e-6, rtol=0)


def test_swiglu_equals_llama():
    mlp = SwiGLU(ModelConfig(d_model=16, d_ff=24))
    mlp.load_state_dict({k.removeprefix("swiglu::"): v for k, v in NORM.items() if k.startswith("swiglu::")})
    close(mlp(NORM["x"]), NORM["swiglu_out"])


# ----------------------------------------------------------------------------------------------------------------------
# Configuration, sizes, initialisation


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"d_model": 30, "n_heads": 4}, "d_model 30 is not a multiple of n_heads 4"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
        ({"positions": "alibi"}, "positions 'alibi'"),
        ({"norm": "batchnorm"}, "norm 'batchnorm'"),
        ({"mlp": "silu"}, "mlp 'silu'"),
        ({"d_model": 12, "n_heads": 4}, "must be even"),
        ({"head_dim": 0}, "a head is at least 1 wide"),
        ({"head_dim": 5}, "head_dim 5 must be even"),
        ({"rope_scaling": RopeScaling(8, 1, 4, 64), "positions": "learned"}, "rope_scaling is for positions = rope"),
        ({"rope_scaling": {"factor": 8, "low": 4, "high": 4, "original": 64}}, "0 < low < high"),
        ({"window": 0}, "a window holds at least the token itself"),
        ({"sinks": 2}, "sinks need a window"),
    ],
)
def test_impossible_shapes_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        ModelConfig(**fields)


def test_default_hidden_width():
    """Two thirds of 4 d for the three matrices of SwiGLU, rounded up to a multiple of 32; Llama-7B's rule and size."""
    assert ModelConfig(d_model=128).d_ff == 352
    assert ModelConfig(d_model=4096, n_heads=32).d_ff in range(10922, 11008 + 1)
    assert ModelConfig(d_model=128, mlp="gelu").d_ff == 512
    assert ModelConfig(d_model=128, d_ff=96).d_ff == 96


def test_rope_theta_reaches_the_rotation():
    model, tokens = small(n_layers=1, rope_theta=50.0), torch.randint(23, (1, 9))
    angles = torch.arange(9)[:, None] * 50.0 ** (-torch.arange(2) / 2)
    hidden = model.final_norm(model.blocks[0](model.embed(tokens), (angles.cos(), angles.sin())))
    close(model.forward_hidden(tokens), hidden)
    assert (small(n_layers=1).forward_hidden(tokens) - hidden).abs().max() > 1e-3


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_norm_eps_reaches_every_norm(norm):
    model = Transformer(ModelConfig(norm=norm, norm_eps=0.25, qk_norm=True, n_layers=2))
    eps = [module.eps for module in model.modules() if hasattr(module, "eps")]
    assert eps == [0.25] * (2 * 4 + 1)


def test_config_survives_a_round_trip():
    config = ModelConfig(d_model=64, n_kv_heads=2, window=5, sinks=1, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64))
    assert ModelConfig(**dataclasses.asdict(config)) == config


def test_a_config_from_before_these_fields_is_the_same_model():
    old = dataclasses.asdict(ModelConfig(d_model=64, n_kv_heads=2, bias=True))
    for name in ("head_dim", "qkv_bias", "rope_scaling"):
        del old[name]
    assert ModelConfig(**old) == ModelConfig(d_model=64, n_kv_heads=2, bias=True)
    assert ModelConfig(**old).head_dim == 16


def test_a_head_of_any_width():
    """Twice and three times d_model / n_heads (and d_model no multiple of n_heads): shapes, cache, work, memory."""
    wide = small(d_model=18, n_heads=4, n_kv_heads=2, head_dim=12, qk_norm=True)
    attn, tokens = wide.blocks[0].attn, torch.randint(23, (2, 9))
    assert attn.q_proj.weight.shape == (48, 18) and attn.k_proj.weight.shape == (24, 18)
    assert attn.o_proj.weight.shape == (18, 48) and len(attn.q_norm.weight) == 12
    cache = KVCache(2, 2, 9)
    close(torch.cat([wide(some, cache=cache) for some in tokens.split([4, 1, 1, 3], dim=1)], dim=1), wide(tokens))
    assert cache.k[0].shape[-1] == 12
    narrow = ModelConfig(61, 32, 2, 4, 2, 44)
    broad = dataclasses.replace(narrow, head_dim=16)
    more = 6 * 2 * (2 * 32 * 32 + 2 * 32 * 16) + 12 * 2 * 32 * 6  # weights of q, k, v, o; scores of 6 keys on average
    assert flops_per_token(Transformer(broad), 12) == flops_per_token(Transformer(narrow), 12) + more
    kept = [estimate_memory(config, batch=1, seq_len=10)["activations"] for config in (narrow, broad)]
    assert kept[1] - kept[0] == 10 * 4 * 2 * (3 * 32 + 2 * 16)


def test_a_bias_on_queries_keys_and_values_alone():
    model, tokens = small(qkv_bias=True), torch.randint(23, (1, 9))
    biased = {name.split(".")[-2] for name, _ in model.named_parameters() if name.endswith("bias")}
    assert biased == {"q_proj", "k_proj", "v_proj"}
    without = copy.deepcopy(model)
    for block in without.blocks:
        block.attn.v_proj.bias.data.zero_()
    assert (without(tokens) - model(tokens)).abs().max() > 1e-3


def test_scaled_rotations_reach_the_model_and_its_cache():
    """Also through the fixed cache of engine.py; without them other logits."""
    scaling = RopeScaling(factor=8.0, low=1.0, high=4.0, original=12)
    model, tokens = small(rope_scaling=scaling), torch.randint(23, (1, 14))
    angles = torch.arange(14)[:, None] * scaling.slowed(10000.0 ** (-torch.arange(2) / 2))
    stream = model.blocks[0](model.embed(tokens), (angles.cos(), angles.sin()))
    close(model.forward_hidden(tokens), model.final_norm(model.blocks[1](stream, (angles.cos(), angles.sin()))))
    cache = KVCache(2, 1, 14)
    close(torch.cat([model(some, cache=cache) for some in tokens.split([4, 1, 9], dim=1)], dim=1), model(tokens))
    plain = small()
    assert (plain(tokens) - model(tokens)).abs().max() > 1e-3
    asked = {"max_new_tokens": 8, "temperature": 0.0, "eot_id": -1}
    assert fast_generate(model, tokens.tolist(), **asked)[0].equal(generate(model, tokens.tolist(), **asked)[0])


def test_parameter_count_by_hand():
    d, ff, v, layers = 32, 44, 61, 2
    block = d * d + 2 * d * 16 + d * d + 3 * d * ff + 2 * d  # q, k and v (two heads of 8), o, SwiGLU, two norms
    assert count_parameters(llama()) == v * d + layers * block + d + v * d
    tied = Transformer(ModelConfig(61, 32, 2, 4, 2, 44, tie_embeddings=True))
    assert count_parameters(tied) == v * d + layers * block + d
    learned = Transformer(ModelConfig(61, 32, 2, 4, 2, 44, max_seq_len=64, positions="learned"))
    assert count_parameters(learned) == count_parameters(llama()) + 64 * d
    sinusoidal = Transformer(ModelConfig(61, 32, 2, 4, 2, 44, max_seq_len=64, positions="sinusoidal"))
    assert count_parameters(sinusoidal) == count_parameters(llama())


def test_flops_by_hand():
    d, ff, v = 32, 44, 61
    used = 2 * (d * d + 2 * d * 16 + d * d + 3 * d * ff + 2 * d) + d + v * d  # without the table that is read
    assert flops_per_token(llama(), 12) == 6 * used + 6 * 2 * d * 12
    tied = Transformer(ModelConfig(61, 32, 2, 4, 2, 44, tie_embeddings=True))
    assert flops_per_token(tied, 12) == flops_per_token(llama(), 12)
    learned = Transformer(ModelConfig(61, 32, 2, 4, 2, 44, positions="learned"))
    assert flops_per_token(learned, 12) == flops_per_token(llama(), 12)
    assert flops_per_token(llama(), 12, words=0.0) == flops_per_token(llama(), 12) - 6 * v * d  # no head is asked
    assert flops_per_token(tied, 12, words=0.25) == pytest.approx(flops_per_token(llama(), 12) - 0.75 * 6 * v * d)
    near = Transformer(ModelConfig(61, 32, 2, 4, 2, 44, window=3, sinks=1))
    assert flops_per_token(near, 12) == 6 * used + 12 * 2 * d * 4  # three in the window and a sink
    reader = Transformer(ModelConfig(61, 32, 2, 4, 2, 44, tie_embeddings=True, causal=False))
    assert flops_per_token(reader, 12) == 6 * used + 12 * 2 * d * 12  # every query sees every key
    frozen = llama().requires_grad_(False)
    matrices = 2 * (2 * d * d + 2 * d * 16 + 3 * d * ff) + v * d
    assert flops_per_token(frozen, 12) == flops_per_token(llama(), 12) - 2 * matrices


def test_memory_estimate_adds_up():
    config = ModelConfig(d_model=64, n_layers=2)
    parts = estimate_memory(config, batch=2, seq_len=32)
    n = count_parameters(Transformer(config))
    assert parts["weights"] + parts["gradients"] + parts["optimizer"] == 16 * n
    assert parts["total"] == sum(v for k, v in parts.items() if k != "total")
    twice = estimate_memory(config, batch=4, seq_len=32)
    assert twice["activations"] == 2 * parts["activations"] and twice["weights"] == parts["weights"]


def test_memory_estimate_by_hand():
    """Floats that a token leaves behind in a block 32 wide, with two of four heads for keys and values: ten rows of the
    stream (norms, queries, output, sums), two of 16 for keys and values, and the feed-forward layer's hidden rows."""
    shape = {"vocab_size": 61, "d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "d_ff": 44}
    attention = 10 * 32 + 2 * 16
    dense = {"swiglu": 4 * 44, "gelu": 3 * 44}  # three matrices or two, and the activation between them
    for mlp, hidden in dense.items():
        parts = estimate_memory(ModelConfig(**shape, mlp=mlp), batch=2, seq_len=10)
        assert parts["activations"] == 20 * 3 * (attention + hidden) * 4
        assert parts["logits"] == 3 * 20 * 61 * 4
    parts = estimate_memory(ModelConfig(**shape), batch=2, seq_len=10, bytes_per_activation=2)
    assert parts["activations"] == 20 * 3 * (attention + dense["swiglu"]) * 2
    experts = ModelConfig(**shape, n_experts=4, n_experts_per_token=2, n_shared_experts=1, d_expert=12)
    mixed = 4 * 3 * 12 + 2 * 2 * 32  # two chosen and the shared one; for each chosen, the row it reads and writes
    parts = estimate_memory(experts, batch=2, seq_len=10)
    assert parts["activations"] == 20 * 3 * (attention + mixed) * 4
    parts = estimate_memory(dataclasses.replace(experts, expert_layers=(1,)), batch=2, seq_len=10)
    assert parts["activations"] == 20 * (3 * attention + 2 * dense["swiglu"] + mixed) * 4
    wide = estimate_memory(ModelConfig(vocab_size=50_304, d_model=32, n_heads=4), batch=64, seq_len=256)
    assert wide["logits"] == 3 * 2**24 * 4  # a chunk at a time


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("d_model", [64, 512])
def test_initial_standard_deviations(d_model, tied):
    model = Transformer(ModelConfig(1000, d_model, 8, 8, mlp="gelu", bias=True, norm="layernorm", tie_embeddings=tied))
    head = min(0.02, 0.32 / math.sqrt(d_model))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == (0 if name.endswith("bias") else 1)).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            expected = 0.02
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                expected = 0.02 / math.sqrt(2 * 8)  # 0.005, as measured on a fresh GPT-2 of 8 layers
            elif name == "head.weight" or (tied and name == "embed.weight"):
                expected = head
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.1 * expected


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "d_model, form",
    [
        (64, {}),
        (128, {"positions": "learned", "norm": "layernorm", "mlp": "gelu"}),
        (256, {"positions": "sinusoidal"}),
        (512, {}),
        (512, {"mlp": "relu"}),
    ],
)
def test_first_loss_is_ln_vocabulary(d_model, form, tied):
    model = Transformer(ModelConfig(512, d_model, 2, 4, max_seq_len=64, tie_embeddings=tied, **form))
    with torch.no_grad():
        loss = -token_logps(model, torch.randint(512, (8, 64))).mean()
    assert loss.item() == pytest.approx(math.log(512), abs=0.1)


def test_tied_weights_are_one_parameter():
    model = small(tie_embeddings=True)
    assert model.head.weight is model.embed.weight
    assert len([n for n, _ in model.named_parameters() if n in ("embed.weight", "head.weight")]) == 1
    for other in (copy.deepcopy(model), model.double()):
        assert other.head.weight is other.embed.weight
    fresh = small(tie_embeddings=True, n_layers=1)
    fresh.load_state_dict(fresh.state_dict())
    assert fresh.head.weight is fresh.embed.weight


def test_tied_gradients_add():
    tied, untied = small(tie_embeddings=True), small()
    untied.load_state_dict(tied.state_dict())
    tokens = torch.randint(23, (2, 8))
    for model in (tied, untied):
        token_logps(model, tokens).sum().backward()
    close(tied.embed.weight.grad, untied.embed.weight.grad + untied.head.weight.grad, atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# What must hold for every form


@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_shapes(form):
    model, tokens = small(**form), torch.randint(23, (3, 7))
    assert model(tokens).shape == (3, 7, 23)
    assert model.forward_hidden(tokens).shape == (3, 7, 16)
    assert token_logps(model, tokens).shape == (3, 6)
    close(model(tokens), model.head(model.forward_hidden(tokens)))
    for parameter in model.parameters():
        assert parameter.requires_grad


def reach(model, tokens, **context):
    """(T, T): does a change of token t (row) change the hidden state at p (column)?"""
    T = tokens.shape[1]
    rows = tokens.repeat(T + 1, 1)
    rows[range(T), range(T)] = (tokens[0] + 1) % 23  # row t differs at t; the last row is as it was
    hidden = model.forward_hidden(rows, **context)
    return (hidden[:-1] - hidden[-1]).abs().amax(dim=-1) > 1e-5


@pytest.mark.parametrize("form", FORMS + [k | w for k in KINDS for w in WINDOWS[1:]], ids=name_of)
@torch.no_grad()
def test_changing_a_token_changes_nothing_before_it(form):
    moved = reach(small(**form), torch.randint(23, (1, 10)))
    assert not moved.tril(-1).any() and moved.diagonal().all()
    if "window" not in form:
        assert moved.equal(torch.ones(10, 10).triu().bool())


@pytest.mark.parametrize("form", WINDOWS[1:], ids=name_of)
@torch.no_grad()
def test_a_window_sees_w_tokens(form):
    """In one layer the token at t reaches the last W positions and the sinks; L layers reach L·(W-1) back."""
    for layers, back in [(1, 2), (2, 4)]:
        moved = reach(small(n_layers=layers, **form), torch.randint(23, (1, 12)))
        sinks = form.get("sinks", 0)
        for t in range(12):
            assert moved[t].tolist() == [t <= p <= t + back or (p >= t and t < sinks) for p in range(12)]


@pytest.mark.parametrize("window", WINDOWS, ids=name_of)
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@torch.no_grad()
def test_packed_documents_equal_each_alone(kind, window):
    model = small(**kind, **window)
    rows, segments = [[5, 4, 3], [1, 2, 9]], []
    tokens = torch.randint(23, (2, 12))
    for lengths in rows:
        segments.append([i for i, n in enumerate(lengths) for _ in range(n)])
    together = model.forward_hidden(tokens, segments=torch.tensor(segments))
    for row, lengths in enumerate(rows):
        start = 0
        for n in lengths:
            alone = model.forward_hidden(tokens[row : row + 1, start : start + n])
            close(together[row : row + 1, start : start + n], alone)
            start += n


@torch.no_grad()
def test_packed_documents_cannot_see_each_other():
    segments = torch.tensor([[7, 7, 7, 7, 3, 3, 3, 9, 9]])
    moved = reach(small(), torch.randint(23, (1, 9)), segments=segments.expand(10, 9))
    assert moved.equal(torch.ones(9, 9).triu().bool() & (segments == segments.T))


@pytest.mark.parametrize("window", WINDOWS, ids=name_of)
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@torch.no_grad()
def test_left_padding_equals_no_padding(kind, window):
    model, lengths = small(**kind, **window), [7, 4, 1]
    texts = [torch.randint(23, (1, n)) for n in lengths]
    tokens, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7)
    for row, (text, n) in enumerate(zip(texts, lengths)):
        tokens[row, 7 - n :], mask[row, 7 - n :] = text, 1
    hidden = model.forward_hidden(tokens, mask=mask)
    assert hidden.isfinite().all()
    for row, (text, n) in enumerate(zip(texts, lengths)):
        close(hidden[row : row + 1, 7 - n :], model.forward_hidden(text))


def test_left_padding_has_finite_gradients():
    model = small()
    tokens, mask = torch.randint(23, (2, 6)), torch.tensor([[0, 0, 0, 0, 1, 1], [1] * 6])
    token_logps(model, tokens, mask=mask, where=mask[:, 1:]).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def splits(total: int):
    """Every way to cut a sequence into chunks."""
    for cuts in itertools.product([False, True], repeat=total - 1):
        edges = [0] + [i + 1 for i, cut in enumerate(cuts) if cut] + [total]
        yield [b - a for a, b in zip(edges, edges[1:])]


@pytest.mark.parametrize("window", WINDOWS, ids=name_of)
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(kind, window):
    model, tokens = small(**kind, **window), torch.randint(23, (2, 6))
    full = model.forward_hidden(tokens)
    for chunks in splits(6):
        cache = KVCache(2, 2, 6)
        parts = [model.forward_hidden(part, cache=cache) for part in tokens.split(chunks, dim=1)]
        close(torch.cat(parts, dim=1), full)


@pytest.mark.parametrize("window", WINDOWS, ids=name_of)
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@torch.no_grad()
def test_cached_decoding_with_unequal_prompts(kind, window):
    """Left-padded prompts of 4, 2 and 1 tokens, read in any chunks, then four more tokens."""
    model, tokens = small(**kind, **window), torch.randint(23, (3, 8))
    mask = torch.arange(8) >= torch.tensor([[0], [2], [3]])
    full = model.forward_hidden(tokens, mask=mask)
    for first, then in itertools.product(splits(4), ([1, 1, 1, 1], [1, 3])):
        cache = KVCache(2, 3, 8)
        parts, start = [], 0
        for n in first + then:
            chunk = slice(start, start + n)
            real = mask[:, chunk] if start < 4 else None  # only the prompt is padded
            parts.append(model.forward_hidden(tokens[:, chunk], mask=real, cache=cache))
            start += n
        close(torch.cat(parts, dim=1)[mask], full[mask])


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@torch.no_grad()
def test_cached_rows_can_be_selected(kind):
    model, tokens = small(**kind), torch.randint(23, (3, 7))
    mask = torch.arange(7) >= torch.tensor([[0], [2], [1]])
    rows = torch.tensor([1, 1, 2])
    cache = KVCache(2, 3, 7)
    model.forward_hidden(tokens[:, :5], mask=mask[:, :5], cache=cache)
    cache.select(rows)
    last = model.forward_hidden(tokens[rows, 5:], cache=cache)
    close(last, model.forward_hidden(tokens[rows], mask=mask[rows])[:, 5:])


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_the_position_table_ends(positions):
    model = small(positions=positions, max_seq_len=6)
    model(torch.randint(23, (1, 6)))
    with pytest.raises(ValueError, match="max_seq_len is 6"):
        model(torch.randint(23, (1, 7)))
    cache = KVCache(2, 1, 10)
    model(torch.randint(23, (1, 5)), cache=cache)
    with pytest.raises(ValueError, match="2 tokens after 5: max_seq_len is 6"):
        model(torch.randint(23, (1, 2)), cache=cache)


def test_rotary_positions_do_not_end():
    assert small(max_seq_len=6)(torch.randint(23, (1, 9))).isfinite().all()


@pytest.mark.parametrize("form", [{}, {"window": 3}, {"positions": "learned"}], ids=name_of)
def test_activation_checkpointing_gives_the_same_gradients(form):
    plain, thrifty = small(**form), small(**form)
    thrifty.activation_checkpointing = True
    tokens = torch.randint(23, (2, 9))
    mask = torch.arange(9) >= torch.tensor([[0], [3]])
    losses = [token_logps(model, tokens, mask=mask).sum() for model in (plain, thrifty)]
    assert losses[0].equal(losses[1])
    for loss in losses:
        loss.backward()
    for a, b in zip(plain.parameters(), thrifty.parameters()):
        close(a.grad, b.grad, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Log-probabilities


def naive(model, tokens, temperature, **context):
    logps = (model(tokens, **context)[:, :-1] / temperature).log_softmax(-1)
    return torch.stack([torch.stack([logps[b, t, tokens[b, t + 1]] for t in range(logps.shape[1])]) for b in range(2)])


@pytest.mark.parametrize("where", [None, [[1, 0, 0, 1, 1], [0, 1, 0, 1, 0]], [[0] * 5, [0] * 5]])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("max_logits", [2**24, 23 * 3, 1])
def test_token_logps_equal_naive(max_logits, temperature, where):
    """In chunks or whole, of all tokens or of some: the same values and the same gradients."""
    model, reference = small().double(), small().double()
    tokens, weights = torch.randint(23, (2, 6)), torch.randn(2, 5)
    where = None if where is None else torch.tensor(where)
    counts = torch.ones(2, 5) if where is None else where
    logps = token_logps(model, tokens, temperature, where=where, max_logits=max_logits)
    expected = naive(reference, tokens, temperature) * counts
    assert logps.shape == (2, 5) and logps.dtype == torch.float64
    close(logps, expected, atol=1e-12)
    (logps * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(model.parameters(), reference.parameters()):
        close(a.grad, b.grad, atol=1e-7, rtol=1e-6)


def test_token_logps_column_t_scores_token_t_plus_one():
    model, tokens = small(), torch.randint(23, (2, 6))
    logps = token_logps(model, tokens)
    changed = tokens.clone()
    changed[:, 3] = (tokens[:, 3] + 1) % 23
    moved = (token_logps(model, changed) - logps).abs() > 1e-6
    assert not moved[:, :2].any()  # tokens 1 and 2 are scored from what stands before token 3
    assert moved[:, 2:].all()  # token 3 itself, and all that follow it


def test_token_logps_are_probabilities():
    """Summed over every possible second token they are 1, at any temperature."""
    model = small()
    tokens = torch.stack([torch.full((23,), 5), torch.arange(23)], dim=1)
    for temperature in (0.5, 1.0, 2.0):
        close(token_logps(model, tokens, temperature).exp().sum(), torch.tensor(1.0))


def test_token_logps_pass_the_mask_on():
    model, text = small(positions="learned"), torch.randint(23, (1, 5))
    padded, mask = F.pad(text, (3, 0)), F.pad(torch.ones(1, 5), (3, 0))
    close(token_logps(model, padded, mask=mask)[:, 3:], token_logps(model, text))


@pytest.mark.parametrize("max_logits", [2**24, 64])
def test_token_logps_are_float32_under_bfloat16(max_logits):
    """The logits are bfloat16, the log-softmax over them is not: it equals a float64 one of the same logits."""
    model = Transformer(ModelConfig(512, 32, 2, 4, max_seq_len=64))
    tokens = torch.randint(512, (2, 16))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logps = token_logps(model, tokens, 0.7, max_logits=max_logits)
        logits = model(tokens)
    assert logits.dtype == torch.bfloat16 and logps.dtype == torch.float32
    exact = (logits[:, :-1].double() / 0.7).log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    close(logps.double(), exact, atol=1e-5)
    assert (logps - logps.bfloat16()).abs().max() > 1e-4  # more digits than bfloat16 has


def test_selective_log_softmax_equals_trl():
    """The fixture's logits through a model whose hidden states are the logits and whose head is the identity."""

    class Given(nn.Module):
        head = nn.Linear(11, 11, bias=False)

        def forward_hidden(self, tokens):
            return F.pad(TRL["logits"].float(), (0, 0, 0, 1))

    Given.head.weight.data = torch.eye(11)
    tokens = F.pad(TRL["index"], (1, 0))
    close(token_logps(Given(), tokens), TRL["logps"].float(), atol=1e-5)
    close(token_logps(Given(), tokens, 0.7), TRL["logps_T0_7"].float(), atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Several answers to one prompt


def answers_to_prompts(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, where) of 5 + 3 + 1 answers of 1 to 20 tokens to three prompts of 4, 9 and 13 tokens, in any order."""
    draw = torch.Generator().manual_seed(seed)
    tokens, where = torch.randint(1, 60, (9, 40), generator=draw), torch.zeros(9, 39, dtype=torch.bool)
    for rows, prompt in (([0, 1, 2, 3, 4], 4), ([5, 6, 7], 9), ([8], 13)):
        for i in rows:
            length = int(torch.randint(2, 20, (1,), generator=draw)) if i else 1
            tokens[i, :prompt] = tokens[rows[0], :prompt]
            where[i, prompt - 1 : prompt - 1 + length] = True
            tokens[i, prompt + length :] = 0
    order = torch.randperm(9, generator=draw)
    return tokens[order], where[order]


SHARED_FORMS = [
    {}, {"n_kv_heads": 1, "qk_norm": True}, {"positions": "learned"}, {"positions": "sinusoidal", "norm": "layernorm"},
    {"window": 6}, {"window": 6, "sinks": 2}, {"n_experts": 3}, {"tie_embeddings": True, "bias": True},
]  # fmt: skip


@pytest.mark.parametrize("form", SHARED_FORMS, ids=str)
@pytest.mark.parametrize("holes", [False, True])
def test_a_prompt_that_is_read_once_gives_the_same_numbers_and_gradients(form, holes):
    model = Transformer(ModelConfig(61, 32, 2, 4, max_seq_len=40, **form))
    with torch.no_grad():  # far from the start, where attention hardly looks at anything
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    tokens, where = answers_to_prompts()
    if holes:  # tokens inside an answer that do not count, and an answer of which none does
        first = where.int().argmax(dim=1)
        where[:5] &= torch.arange(39) % 3 != (first[:5, None] + 1) % 3
        where[7] = False
    found = []
    for logps_of in (shared_logps, lambda *args: token_logps(args[0], args[1], args[3], args[2])):
        model.zero_grad()
        logps = logps_of(model, tokens, where, 0.7)
        (logps * torch.linspace(-1, 1, 39)).sum().backward()
        found.append([logps.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) and bool((found[0][0][~where] == 0).all())
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-4)


def test_a_shared_prompt_goes_through_the_blocks_once():
    model, seen = Transformer(ModelConfig(61, 32, 1, 4)), []
    model.blocks[0].mlp.register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape[:2])))
    tokens, where = answers_to_prompts()
    shared_logps(model, tokens, where)
    longest = int(where.sum(dim=1).max())
    assert seen == [(3, 13), (9, longest)]  # three prompts, nine answers
    seen.clear()
    shared_logps(model, tokens[[0]], where[[0]])  # nothing to share: the row as it is
    shared_logps(model, tokens, torch.ones_like(where))  # one token to share: it does not pay
    model.activation_checkpointing = True
    shared_logps(model, tokens, where)
    assert seen == [(1, 40), (9, 40), (9, 40)]


def test_answers_of_one_token_need_no_second_pass():
    model, (tokens, where) = Transformer(ModelConfig(61, 32, 2, 4)), answers_to_prompts()
    first = torch.zeros_like(where).scatter(1, where.int().argmax(dim=1, keepdim=True), True)
    torch.testing.assert_close(shared_logps(model, tokens, first), token_logps(model, tokens, where=first))


def test_a_shared_prompt_in_half_precision():
    model, (tokens, where) = Transformer(ModelConfig(61, 32, 2, 4)), answers_to_prompts()
    with torch.autocast("cpu", torch.bfloat16):
        ours = shared_logps(model, tokens, where)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, token_logps(model, tokens, where=where), atol=0.03, rtol=0.03)


def test_a_prompt_is_not_shared_where_positions_would_end():
    """The longest prompt and the longest answer of a batch may be too long together, though no row is."""
    model = Transformer(ModelConfig(61, 32, 2, 4, max_seq_len=64, positions="learned"))
    tokens, where = torch.randint(1, 60, (4, 62)), torch.zeros(4, 61, dtype=torch.bool)
    for rows, prompt, lengths in (([0, 1], 50, (12, 10)), ([2, 3], 5, (25, 24))):
        for i, length in zip(rows, lengths):
            tokens[i, :prompt] = tokens[rows[0], :prompt]
            where[i, prompt - 1 : prompt - 1 + length] = True
    torch.testing.assert_close(shared_logps(model, tokens, where), token_logps(model, tokens, where=where))


@pytest.mark.parametrize(
    "form", [{}, {"tie_embeddings": True}, {"bias": True, "qk_norm": True}, {"n_experts": 3}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_frozen_copy_in_sixteen_bits_says_the_same(form, dtype):
    """Digit for digit, where products are in those bits anyway; routers and a tied head keep theirs."""
    model, tokens = small(**form), torch.randint(23, (2, 12))
    copied = frozen_copy(model, dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        expected = token_logps(model, tokens)
        assert token_logps(copied, tokens).equal(expected)
        assert not token_logps(model, tokens.flip(1)).equal(expected)
        assert token_logps(for_inference(copy.deepcopy(model), dtype), tokens).equal(expected)
    thin = {name for name, p in copied.named_parameters() if p.dtype == dtype}
    assert "blocks.0.attn.q_proj.weight" in thin and not any("router" in name or "norm" in name for name in thin)
    assert ("head.weight" in thin) != model.config.tie_embeddings and copied.embed.weight.dtype == torch.float32
    assert not any(p.requires_grad for p in copied.parameters()) and all(p.requires_grad for p in model.parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_frozen_copy_in_float32_is_a_copy():
    model = small()
    copied = frozen_copy(model, torch.float32)
    assert all(p.equal(q) and p is not q for p, q in zip(model.parameters(), copied.parameters()))
