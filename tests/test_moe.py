"""Experts: the router and the losses against Mixtral, Switch and DeepSeek, the layer against a loop over tokens."""

import copy
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import load_npz
from test_processes import on_two_processes
from tiny import NAMES, assert_exact_resume, tiny_pretrain
from torch.utils.flop_counter import FlopCounterMode

import pretrain
from attention import make_cache
from layers import ModelConfig, SwiGLU
from moe import (
    MoE,
    expert_layers,
    expert_loads,
    load_balancing_loss,
    move_balance_bias,
    route,
    router_statistics,
    router_z_loss,
    watch_routers,
)
from optim import make_optimizers
from runtime.checkpoint import load_checkpoint
from runtime.config import parse
from runtime.errors import UserError
from stages import load_stage
from transformer import Transformer, active_parameters, count_parameters, flops_per_token

MIXTRAL = load_npz("moe_mixtral")


def close(a, b, atol=1e-5, rtol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


def layer(**fields) -> MoE:
    torch.manual_seed(1)
    shape = {"d_model": 12, "n_heads": 2, "n_experts": 5, "n_experts_per_token": 2, "d_expert": 7}
    moe = MoE(ModelConfig(**(shape | fields)))
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(0, 0.5)
    return moe.double()


def model(**fields) -> Transformer:
    torch.manual_seed(1)
    shape = {"vocab_size": 23, "d_model": 16, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 32}
    shape |= {"n_experts": 4, "n_experts_per_token": 2, "d_expert": 10}
    made = Transformer(ModelConfig(**(shape | fields)))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


def by_loop(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    """One token and one expert at a time."""
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            p = (x[b, t] @ moe.router.weight.T).softmax(-1)
            chosen = sorted(range(len(p)), key=lambda e: -float((p[e] + moe.balance_bias[e]).detach()))[: moe.k]
            for e in chosen:
                expert = moe.experts[e]
                gate, up = expert.gate_proj.weight @ x[b, t], expert.up_proj.weight @ x[b, t]
                y = expert.down_proj.weight @ (gate * torch.sigmoid(gate) * up)
                share = p[e] / sum(p[c] for c in chosen) if len(chosen) > 1 else p[e]
                out[b, t] = out[b, t] + share * y
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Mixtral, Switch and DeepSeek, in transformers


def mixtral() -> Transformer:
    config = ModelConfig(
        41, 16, 2, 2, n_kv_heads=1, d_ff=20, max_seq_len=64, n_experts=4, n_experts_per_token=2, d_expert=20
    )
    weights = {}
    for key, value in MIXTRAL.items():
        if not key.startswith("w::"):
            continue
        name = key.removeprefix("w::").replace("mlp.gate.", "mlp.router.")
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if "experts." not in name:
            weights[name] = value
            continue
        block, kind = name.split("experts.")
        for e, matrix in enumerate(value):
            if kind == "down_proj":
                weights[f"{block}experts.{e}.down_proj.weight"] = matrix
            else:
                gate, up = matrix.chunk(2)
                weights[f"{block}experts.{e}.gate_proj.weight"] = gate
                weights[f"{block}experts.{e}.up_proj.weight"] = up
    weights |= {f"blocks.{i}.mlp.balance_bias": torch.zeros(4) for i in range(2)}
    made = Transformer(config)
    made.load_state_dict(weights)
    return made


def test_mixtrals_logits_router_and_balancing_loss():
    made = mixtral()
    with watch_routers(made) as seen:
        close(made(MIXTRAL["input_ids"]), MIXTRAL["logits"], atol=1e-4)
    for i in range(2):
        close(seen[i][0], MIXTRAL[f"router_logits_{i}"], atol=1e-4)
    logits = [parts[0] for parts in seen.values()]
    close(load_balancing_loss(logits, 2), MIXTRAL["aux_loss"], atol=1e-4)
    apart = torch.stack([load_balancing_loss(one, 2) for one in logits]).mean()
    assert abs(apart - MIXTRAL["aux_loss"]) > 1e-3  # the tokens of all layers are counted together


def test_mixtral_with_padding():
    made, mask = mixtral(), MIXTRAL["attention_mask"]
    with watch_routers(made) as seen:
        logits = made(MIXTRAL["input_ids"], mask=mask)
    close(logits[mask.bool()], MIXTRAL["masked_logits"][mask.bool()], atol=1e-4)
    routers = [MIXTRAL[f"masked_router_logits_{i}"] for i in range(2)]
    for ours, theirs in zip(seen.values(), routers):
        close(ours[0][mask.flatten().bool()], theirs[mask.flatten().bool()], atol=1e-4)
    close(load_balancing_loss(routers, 2, mask), MIXTRAL["masked_aux_loss"], atol=1e-4)
    assert abs(load_balancing_loss(routers, 2) - MIXTRAL["masked_aux_loss"]) > 1e-3  # padding counted
    with_aux, without = MIXTRAL["masked_loss_with_aux"], MIXTRAL["masked_loss_no_aux"]
    close(with_aux - without, 0.02 * load_balancing_loss(routers, 2, mask), atol=1e-4)


def test_mixtrals_layer():
    moe, x = mixtral().blocks[0].mlp, MIXTRAL["moe_block_x"]
    close(moe(x), MIXTRAL["moe_block_out"], atol=1e-4)
    weights, experts = route(MIXTRAL["moe_gate_logits"], 2)
    assert torch.equal(experts, MIXTRAL["moe_gate_indices"])
    close(weights, MIXTRAL["moe_gate_weights"])


def test_the_losses_of_mixtral_and_switch():
    layers = [MIXTRAL[f"lb_logits_{i}"] for i in range(3)]
    close(load_balancing_loss(layers, 2), MIXTRAL["lb_top2"])
    close(load_balancing_loss(layers, 1), MIXTRAL["lb_top1"])
    close(load_balancing_loss(layers, 2, MIXTRAL["lb_mask"]), MIXTRAL["lb_top2_masked"])
    close(load_balancing_loss(layers[0], 2), MIXTRAL["lb_single_layer_0"])
    close(load_balancing_loss([torch.zeros(10, 4)], 2), MIXTRAL["lb_uniform_top2"])


def test_switchs_losses():
    layers = [MIXTRAL[f"lb_logits_{i}"] for i in range(3)]
    apart = torch.stack([load_balancing_loss(one, 1) for one in layers])  # Switch takes each layer by itself
    close(apart.mean(), MIXTRAL["switch_lb_top1"])
    close(router_z_loss(layers), MIXTRAL["switch_z_loss"])


@pytest.mark.parametrize("kind", ["nobias", "bias"])
def test_deepseeks_router(kind):
    logits = MIXTRAL["ds_x"] @ MIXTRAL["ds_weight"].T
    close(logits, MIXTRAL["ds_logits"], atol=1e-4)
    bias = MIXTRAL[f"ds_{kind}_bias"]
    # Theirs first keeps 2 of 4 groups of experts, by the sum of a group's best two; ours has no groups.
    groups = (logits.sigmoid() + bias).view(7, 4, 2).sum(-1).topk(2).indices
    kept = torch.zeros(7, 4).scatter(1, groups, 1.0).repeat_interleave(2, dim=1)
    weights, experts = route(logits, 2, bias + kept.log(), score="sigmoid")
    order = experts.argsort(dim=1)
    assert torch.equal(experts.gather(1, order), MIXTRAL[f"ds_{kind}_indices_sorted"])
    close(2.5 * weights.gather(1, order), MIXTRAL[f"ds_{kind}_weights_sorted"])  # they scale the routed part by 2.5


# ----------------------------------------------------------------------------------------------------------------------
# The layer


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("biased", [False, True])
def test_the_layer_is_a_loop_over_tokens_and_experts(k, biased):
    moe, x = layer(n_experts_per_token=k), torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)
    if biased:
        moe.balance_bias.copy_(torch.tensor([0.3, -0.2, 0.0, 0.5, -0.4]))
    out, slow = moe(x), by_loop(moe, x)
    close(out, slow, atol=1e-12, rtol=1e-10)
    push = torch.randn_like(out)
    wanted = torch.autograd.grad((slow * push).sum(), [x, *moe.parameters()], allow_unused=True)
    got = torch.autograd.grad((out * push).sum(), [x, *moe.parameters()], allow_unused=True)
    for a, b in zip(got, wanted):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b, atol=1e-11, rtol=1e-9)


def test_the_order_of_the_tokens_does_not_matter():
    moe, x = layer(), torch.randn(1, 30, 12, dtype=torch.float64)
    order = torch.randperm(30)
    close(moe(x[:, order]), moe(x)[:, order], atol=1e-12)


def test_no_expert_is_ever_full():
    """All tokens want the same two experts, and all get them."""
    moe, x = layer(), torch.rand(1, 40, 12, dtype=torch.float64)
    moe.router.weight.data.zero_()
    moe.router.weight.data[1] = 5.0
    moe.router.weight.data[3] = 4.0
    close(moe(x), by_loop(moe, x), atol=1e-11)
    assert route(moe.router(x[0]), 2)[1].flatten().bincount(minlength=5).tolist() == [0, 40, 0, 40, 0]


@pytest.mark.parametrize("n_shared", [1, 2])
def test_a_shared_expert_sees_every_token(n_shared):
    moe = layer(n_shared_experts=n_shared)
    x = torch.randn(2, 4, 12, dtype=torch.float64)
    assert moe.shared.up_proj.weight.shape == (7 * n_shared, 12)
    close(moe(x) - moe.shared(x), by_loop(moe, x), atol=1e-12)


def test_experts_of_another_kind():
    moe = layer(mlp="gelu", bias=True)
    x = torch.randn(1, 6, 12, dtype=torch.float64)
    weights, experts = route(moe.router(x[0]), 2)
    wanted = sum(
        w * F.one_hot(experts[:, j], 5).to(x).T[e][:, None] * moe.experts[e](x[0])
        for j, w in enumerate(weights.T[:, :, None])
        for e in range(5)
    )
    close(moe(x)[0], wanted, atol=1e-12)
    assert moe.router.bias is None


def test_work_grows_with_the_experts_used():
    def work(**fields):
        moe = layer(d_model=16, d_expert=32, **fields)  # in float64, whose products the counter knows
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            moe(torch.randn(64, 16, dtype=torch.float64))
        return counter.get_total_flops() - 2 * 64 * 16 * len(moe.experts)  # the router asks all of them

    assert work(n_experts=4) == work(n_experts=32) > 0
    assert work(n_experts=4, n_experts_per_token=4) > 1.9 * work(n_experts=4)


def test_the_weights_sum_to_one_and_come_from_all_experts():
    logits = torch.randn(50, 6)
    weights, experts = route(logits, 3)
    close(weights.sum(1), torch.ones(50))
    p = logits.softmax(-1).gather(1, experts)
    close(weights, p / p.sum(1, keepdim=True))
    assert weights.dtype == torch.float32 and route(logits.bfloat16(), 3)[0].dtype == torch.float32


def test_one_expert_is_weighed_by_its_probability_so_that_the_router_learns():
    logits = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
    weights, experts = route(logits, 1)
    assert experts.tolist() == [[0]]
    close(weights[0, 0], logits.softmax(-1)[0, 0])
    moe = layer(n_experts_per_token=1)
    moe(torch.randn(1, 8, 12, dtype=torch.float64)).sum().backward()
    assert moe.router.weight.grad.abs().max() > 1e-4


def test_scores_that_are_all_zero_are_no_nan():
    weights, _ = route(torch.full((1, 3), -1e4), 2, score="sigmoid")
    assert weights.tolist() == [[0.0, 0.0]]


def test_a_router_decides_in_float32_under_autocast():
    """Two logits that differ by less than bfloat16 can tell."""
    made = Transformer(ModelConfig(64, 32, 1, 2, n_experts=4))
    moe = made.blocks[0].mlp
    x = 1 + torch.rand(1, 50, 32)
    moe.router.weight.data[:] = torch.rand(32) + 1e-4 * torch.arange(4.0)[:, None]
    plain, _ = route(moe.router(x[0]), 2), None
    with torch.autocast("cpu", dtype=torch.bfloat16), watch_routers(made) as seen:
        moe(x)
        moe(x.bfloat16())  # from a layer whose output is that narrow
    assert seen[0][0].dtype == torch.float32
    assert torch.equal(route(seen[0][0], 2)[1], plain[1]) and plain[1].eq(torch.tensor([3, 2])).all()


def test_the_bias_chooses_and_does_not_weigh():
    logits, bias = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([0.0, 0.0, 0.0, 9.0])
    weights, experts = route(logits, 2, bias)
    assert set(experts[0].tolist()) == {0, 3}
    p = logits.softmax(-1)[0]
    wanted = {0: p[0] / (p[0] + p[3]), 3: p[3] / (p[0] + p[3])}
    for e, w in zip(experts[0].tolist(), weights[0]):
        close(w, wanted[e])


# ----------------------------------------------------------------------------------------------------------------------
# Balancing


def test_the_balancing_loss_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.2, 0.7, 0.1]]).log()
    # choices {0, 1}, {0, 2}, {1, 0}: f = (1, 2/3, 1/3); P = (1.3, 1.1, 0.6) / 3
    wanted = 3 * (1 * 1.3 + 2 / 3 * 1.1 + 1 / 3 * 0.6) / 3
    assert float(load_balancing_loss(logits, 2)) == pytest.approx(wanted, rel=1e-6)
    # of the first two tokens alone: f = (1, 1/2, 1/2); P = (1.1, 0.4, 0.5) / 2
    mask = torch.tensor([1, 1, 0])
    assert float(load_balancing_loss(logits, 2, mask)) == pytest.approx(3 * (1.1 + 0.2 + 0.25) / 2, rel=1e-6)
    sigmoid = torch.tensor([[0.5, 0.25, 0.25]]).logit()
    assert float(load_balancing_loss(sigmoid, 2, score="sigmoid")) == pytest.approx(3 * (0.5 + 0.25), rel=1e-6)


def test_the_balancing_loss_of_sigmoids_takes_them_as_shares():
    """Sigmoids (0.6, 0.2) and (0.9, 0.1) are shares of (0.75, 0.25) and (0.9, 0.1); both tokens go to the first."""
    logits = torch.tensor([[0.6, 0.2], [0.9, 0.1]]).logit()
    close(load_balancing_loss(logits, 1, score="sigmoid"), torch.tensor(2 * (0.75 + 0.9) / 2))


def test_the_gradient_of_the_balancing_loss_goes_through_the_mean_probability_alone():
    logits = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(load_balancing_loss(logits, 2), logits)
    p = logits.detach().softmax(-1)
    f = F.one_hot(p.topk(2).indices, 4).sum((0, 1)) / 7.0
    close(grad, 4 / 7 * p * (f - (p * f).sum(1, keepdim=True)), atol=1e-12)  # d softmax, by hand
    assert torch.autograd.gradcheck(lambda x: load_balancing_loss(x, 2), logits)


def test_the_z_loss_by_hand_and_under_a_mask():
    logits = torch.tensor([[math.log(2.0), math.log(3.0)], [0.0, 0.0]])
    assert float(router_z_loss(logits)) == pytest.approx((math.log(5) ** 2 + math.log(2) ** 2) / 2)
    assert float(router_z_loss(logits, torch.tensor([1, 0]))) == pytest.approx(math.log(5) ** 2)
    assert float(router_z_loss([logits, logits], torch.tensor([0, 1]))) == pytest.approx(math.log(2) ** 2)


def test_descending_the_loss_balances_a_router():
    torch.manual_seed(0)
    x, weight = torch.randn(256, 8) + 1.0, torch.randn(6, 8, requires_grad=True)
    before = float(load_balancing_loss(x @ weight.detach().T, 2))
    optimizer = torch.optim.Adam([weight], 0.02)
    for _ in range(200):
        optimizer.zero_grad()
        load_balancing_loss(x @ weight.T, 2).backward()
        optimizer.step()
    assert before > 2.5 and float(load_balancing_loss(x @ weight.detach().T, 2)) < 2.1


def test_each_layer_is_balanced_by_itself_unless_they_are_pooled():
    """Layer 0 sends everything to the first expert and layer 1 to the second: together they look balanced."""
    layers = [torch.tensor([[4.0, 0.0], [4.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 4.0]])]
    seen = {0: [layers[0][:1], layers[0][1:]], 3: [layers[1]]}
    p = float(layers[0][0].softmax(-1)[0])
    fields = {"n_experts": 2, "n_experts_per_token": 1, "balance_weight": 0.5, "z_weight": 0.0}
    for balance, wanted in (("loss", 0.5 * 2 * 2 * p), ("pooled", 0.5 * 1.0), ("bias", 0.0), ("none", 0.0)):
        found = float(pretrain.balancing(seen, pretrain.Config(balance=balance, **fields)))
        assert found == pytest.approx(wanted, abs=1e-6), balance


def test_training_balances_each_layer(tmp_path):
    """The busiest expert of any layer, after some steps with a heavy loss: of each layer, or pooled."""
    busiest = {}
    for balance in ("loss", "pooled"):
        more = EXPERTS | {"balance": balance, "balance_weight": 1.0, "steps": 40, "eval_every": 40, "lr": 5e-3}
        pretrain.main(tiny_pretrain(tmp_path / balance, **more))
        rows = [json.loads(line) for line in (tmp_path / balance / "metrics.jsonl").read_text().splitlines()]
        rows = [row["busiest"] for row in rows if "busiest" in row][-5:]
        busiest[balance] = sum(rows) / len(rows)
    assert busiest["loss"] < 1.3 and busiest["loss"] < busiest["pooled"] - 0.15, busiest


def test_the_bias_moves_by_the_sign_of_the_missing_load():
    made = model(n_layers=1)
    moe = made.blocks[0].mlp
    move_balance_bias(made, torch.tensor([[10.0, 2.0, 4.0, 8.0]]), rate=0.5)  # the mean is 6
    assert moe.balance_bias.tolist() == [-0.5, 0.5, 0.5, -0.5]
    move_balance_bias(made, torch.tensor([[6.0, 6.0, 12.0, 0.0]]), rate=0.25)
    assert moe.balance_bias.tolist() == [-0.5, 0.5, 0.25, -0.25]
    assert "balance_bias" not in dict(moe.named_parameters()) and "balance_bias" in moe.state_dict()


def test_moving_the_bias_balances_a_router():
    made = model(n_layers=1)
    tokens = torch.randint(23, (8, 30))

    def busiest():
        with watch_routers(made) as seen, torch.no_grad():
            made(tokens)
        loads = expert_loads(made, seen)
        return loads, router_statistics(loads, seen)["busiest"]

    first = busiest()[1]
    for _ in range(300):
        move_balance_bias(made, busiest()[0], rate=0.005)
    assert first > 1.4 and busiest()[1] < 1.1


def test_the_statistics_are_those_of_the_choices():
    made = model(expert_layers=(0, 2))
    made.blocks[2].mlp.balance_bias.copy_(torch.tensor([9.0, 0.0, 0.0, 9.0]))
    with watch_routers(made) as seen, torch.no_grad():
        made(torch.randint(23, (2, 8)))
        made(torch.randint(23, (1, 8)))  # two parts of a batch
    assert [len(parts) for parts in seen.values()] == [2, 2]
    loads = expert_loads(made, seen)
    assert loads.sum(1).tolist() == [48, 48]  # 24 tokens to 2 experts each, in both layers: none is dropped
    assert loads[1].tolist() == [24, 0, 0, 24]
    figures = router_statistics(loads, seen)
    assert figures["load_2_0"] == 0.5 and figures["load_2_1"] == 0 and "load_1_0" not in figures
    assert figures["busiest"] == pytest.approx(2.0) and figures["idlest"] == 0.0
    logits = torch.cat([one for parts in seen.values() for one in parts])
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean() / math.log(4)
    assert figures["router_entropy"] == pytest.approx(float(entropy), rel=1e-5)


def test_watching_leaves_nothing_behind():
    made, dense = model(), model(n_experts=0, d_expert=None)
    tokens = torch.randint(23, (1, 5))
    with pytest.raises(RuntimeError), watch_routers(made) as seen:
        made(tokens)
        raise RuntimeError
    made(tokens)
    assert all(len(parts) == 1 for parts in seen.values())
    copy.deepcopy(made)  # a reference model is made so
    with watch_routers(dense) as seen:
        dense(tokens)
    assert seen == {}


# ----------------------------------------------------------------------------------------------------------------------
# The model


def test_the_default_expert_is_as_wide_as_its_share():
    config = ModelConfig(d_model=48, d_ff=128, n_experts=8, n_experts_per_token=2)
    assert config.d_expert == 64
    assert ModelConfig(d_ff=128, n_experts=8, n_experts_per_token=2, n_shared_experts=2).d_expert == 32
    dense = Transformer(ModelConfig(d_ff=128))
    made = Transformer(ModelConfig(d_ff=128, n_experts=8))
    routers = sum(p.numel() for name, p in made.named_parameters() if "router" in name)
    assert active_parameters(made) == count_parameters(dense) + routers and active_parameters(
        dense
    ) == count_parameters(dense)
    assert count_parameters(made) > 2 * count_parameters(dense)
    assert flops_per_token(made, 64) == flops_per_token(dense, 64) + 6 * routers


@pytest.mark.parametrize("layers", [None, (1,), (0, 2)])
def test_hybrid_models(layers):
    made = model(expert_layers=layers)
    assert list(expert_layers(made)) == list(range(3) if layers is None else layers)
    for i, block in enumerate(made.blocks):
        assert isinstance(block.mlp, MoE if layers is None or i in layers else SwiGLU)
    stored = json.loads(json.dumps(dataclasses.asdict(made.config)))
    again = Transformer(ModelConfig(**stored))
    again.load_state_dict(made.state_dict())
    tokens = torch.randint(23, (2, 6))
    assert torch.equal(again(tokens), made(tokens))


@pytest.mark.parametrize("window", [{}, {"window": 4}, {"window": 4, "sinks": 1}], ids=str)
def test_causal_and_the_same_with_a_cache(window):
    made = model(**window).eval().double()
    tokens = torch.randint(23, (2, 12))
    with torch.no_grad():
        full = made(tokens)
        changed = tokens.clone()
        changed[:, 7] = (changed[:, 7] + 1) % 23
        assert torch.equal(made(changed)[:, :7], full[:, :7])
        cache = make_cache(3, 2, 12, made.config.window, made.config.sinks)
        parts = [made(tokens[:, :5], cache=cache), *(made(tokens[:, t : t + 1], cache=cache) for t in range(5, 12))]
    close(torch.cat(parts, dim=1), full, atol=1e-10)


def test_recomputed_blocks_have_the_same_gradients():
    made, tokens = model(), torch.randint(23, (2, 9))
    grads = []
    for checkpointing in (False, True):
        made.activation_checkpointing = checkpointing
        made.zero_grad()
        with watch_routers(made) as seen:
            loss = made(tokens).square().mean()
        logits = [part for parts in seen.values() for part in parts]
        (loss + load_balancing_loss(logits, 2) + router_z_loss(logits)).backward()
        grads.append([p.grad.clone() for p in made.parameters() if p.grad is not None])
    for a, b in zip(*grads):
        close(a, b, atol=1e-6)


def test_muon_takes_each_expert_as_a_matrix_of_its_own():
    made = model()
    _, muon = make_optimizers(made, 1e-3, kind="muon")
    chosen = {id(p) for group in muon.param_groups for p in group["params"]}
    assert all(id(p) in chosen for name, p in made.named_parameters() if ".experts." in name)


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"n_experts": 4, "n_experts_per_token": 5}, "5 of 4 experts"),
        ({"n_experts": 4, "n_experts_per_token": 0}, "0 of 4 experts"),
        ({"n_experts": 4, "expert_layers": (4,)}, "blocks are 0 to 3"),
        ({"n_shared_experts": 1}, "want n_experts"),
        ({"expert_layers": (1,)}, "want n_experts"),
        ({"n_experts": 2, "router": "tanh"}, "softmax or sigmoid"),
        ({"n_experts": -1}, "fewer than no"),
        ({"n_experts": 2, "expert_layers": ()}, "names no block"),
        ({"d_ff": 0}, "at least 1 wide"),
        ({"window": 8, "sinks": -1}, "sinks -1: at least 0"),
    ],
)
def test_shapes_that_cannot_be(fields, says):
    with pytest.raises(ValueError, match=says):
        ModelConfig(**fields)


# ----------------------------------------------------------------------------------------------------------------------
# Training


EXPERTS = {"n_experts": 4, "d_expert": 16, "z_weight": 1e-3}


@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_a_stopped_run_goes_on_exactly(tmp_path, monkeypatch, balance):
    more = EXPERTS | {
        "balance": balance,
        "balance_rate": 0.05,
        "expert_layers": (1,),
        "micro_batch_size": 2,
        "steps": 5,
    }
    whole, stopped = (tiny_pretrain(tmp_path / name, **more) for name in ("whole", "stopped"))
    one, _ = assert_exact_resume(monkeypatch, pretrain, whole, stopped, saves=2)
    bias = one["model"]["blocks.1.mlp.balance_bias"]
    assert bool(bias.any()) == (balance == "bias")
    made, _, state = load_stage(whole.out_dir)
    assert state["model_config"]["n_experts"] == 4 and torch.equal(made.blocks[1].mlp.balance_bias, bias)


def test_the_metrics_say_how_the_experts_are_used(tmp_path):
    pretrain.main(tiny_pretrain(tmp_path / "run", **EXPERTS))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    for row in rows:
        for block in range(2):
            assert sum(row[f"load_{block}_{e}"] for e in range(4)) == pytest.approx(1.0)
        assert row["busiest"] >= 1 >= row["idlest"] >= 0 and 0 < row["router_entropy"] <= 1
    assert (tmp_path / "run" / "curves.png").stat().st_size > 0


def test_the_z_loss_and_the_loads_of_micro_batches_are_those_of_the_batch(tmp_path):
    """A mean over tokens: each part counts by its share of them. And a sum."""
    rows = []
    for size in (0, 1):
        more = EXPERTS | {"balance": "none", "z_weight": 10.0, "micro_batch_size": size, "steps": 1}
        pretrain.main(tiny_pretrain(tmp_path / f"{size}", **more))
        rows.append(json.loads((tmp_path / f"{size}" / "metrics.jsonl").read_text().splitlines()[0]))
    for name in ("grad_norm", "busiest", "idlest", "load_0_0", "load_1_3"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-3)


def pretrain_run(config) -> None:
    pretrain.main(config)


def test_two_processes_move_the_bias_of_one(tmp_path):
    """The loads that count are those of the whole batch."""
    more = EXPERTS | {"balance": "bias", "balance_rate": 0.05, "z_weight": 0.0, "seq_len": 8, "steps": 5}
    one, two = (tiny_pretrain(tmp_path / name, **more) for name in ("one", "two"))
    pretrain.main(one)
    on_two_processes(tmp_path, pretrain_run, two)
    biases = [
        torch.stack([value for name, value in load_checkpoint(c.out_dir)["model"].items() if "balance_bias" in name])
        for c in (one, two)
    ]
    close(*biases, atol=1e-6)
    assert biases[0].abs().max() > 0.04


def test_the_logged_loss_is_that_of_the_words(tmp_path):
    """Heavy balancing must not hide in the figure that is compared between models."""
    losses = []
    for name, weight in (("without", 0.0), ("with", 50.0)):
        pretrain.main(tiny_pretrain(tmp_path / name, steps=1, **(EXPERTS | {"balance_weight": weight})))
        row = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])
        losses.append((row["loss"], row["grad_norm"]))
    assert losses[0][0] == losses[1][0] and losses[1][1] > 2 * losses[0][1]


def test_refused_before_anything_is_loaded(tmp_path):
    for arguments, says in [
        (["--n_experts", "4", "--n_experts_per_token", "9"], "9 of 4"),
        (["--expert_layers", "1"], "want n_experts"),
        (["--n_experts", "4", "--balance_weight", "-1"], "balance_weight"),
    ]:
        with pytest.raises(UserError, match=says):
            pretrain.main(parse(pretrain.Config, ["--out_dir", str(tmp_path / "x"), *arguments]))
    assert not (tmp_path / "x").exists()
