import copy
import json
import math
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import load_json, load_npz
from test_dpo import tiny as tiny_dpo
from test_grpo import tiny_grpo
from test_processes import on_two_processes
from tiny import assert_exact_resume, assert_same_training, but_slow, tiny_pretrain, tiny_sft

import chat
import dpo
import evaluate
import gdpo
import grpo
import lora
import optim
import ppo
import pretrain
import reward
import sft
from generate import generate
from grpo import accumulate_gradients, group_advantages, sample_answers
from lora import (
    TARGETS,
    Apply,
    LoRAConfig,
    LoRALinear,
    adapter_weights,
    adapters_off,
    add_lora,
    apply,
    load_adapters,
    load_state,
    lora_layers,
    merge_lora,
    merged_weights,
    row_norms,
    share_trained,
    unload_lora,
    unmerge_lora,
)
from runtime.checkpoint import fingerprint, load_checkpoint, weights_id
from runtime.config import parse
from runtime.device import can_compile
from runtime.errors import UserError, run_main
from runtime.linear import Linear
from runtime.run import start
from stages import load_stage
from tokenizer import ByteTokenizer
from transformer import ModelConfig, Transformer, flops_per_token, model_size, token_logps
from watch import sampler_gap

PEFT = load_npz("peft_lora_dora")
SCALE = load_json("peft_lora_dora.meta.json")
CASES = [f"{kind}_{form}" for kind in ("lora", "rslora", "dora") for form in ("lin", "nobias")]
KINDS = [{}, {"rslora": True}, {"dora": True}]
TINY = ModelConfig(64, 32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=32)


def close(a, b, atol=1e-12, rtol=1e-10):
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


def train_a_little(model: nn.Module) -> nn.Module:
    """As if trained: B is not 0 any more, and DoRA's lengths have moved."""
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.B.normal_(0, 0.1)
            if layer.magnitude is not None:
                layer.magnitude.mul_(torch.empty_like(layer.magnitude).uniform_(0.8, 1.2))
    return model


# ----------------------------------------------------------------------------------------------------------------------
# The layer, against PEFT


def peft_layer(case: str, trained: bool = True) -> LoRALinear:
    """The layer of the fixture: 10 inputs, 6 outputs, rank 3, alpha 12."""
    weight, bias = PEFT[f"{case}_base_weight"], PEFT.get(f"{case}_base_bias")
    base = Linear(10, 6, bias=bias is not None, dtype=torch.float64)
    with torch.no_grad():
        base.weight.copy_(weight)
        if bias is not None:
            base.bias.copy_(bias)
        layer = LoRALinear(base, LoRAConfig(3, 12.0, dora=case.startswith("dora"), rslora=case.startswith("rslora")))
        assert layer.scale == pytest.approx(SCALE[f"{case}_scaling"], rel=1e-15)
        if trained:
            layer.A.copy_(PEFT[f"{case}_A"])
            layer.B.copy_(PEFT[f"{case}_B"])
            if layer.magnitude is not None:
                layer.magnitude.copy_(PEFT[f"{case}_m"])
    return layer


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_peft(case):
    close(peft_layer(case, trained=False)(PEFT["x"]), PEFT[f"{case}_init_out"])
    layer, x = peft_layer(case), PEFT["x"].clone().requires_grad_()
    out = layer(x)
    close(out, PEFT[f"{case}_out"])
    (out * PEFT["dy"]).sum().backward()
    found = {"gx": x.grad, "gA": layer.A.grad, "gB": layer.B.grad}
    if layer.magnitude is not None:
        found["gm"] = layer.magnitude.grad
    for name, gradient in found.items():
        close(gradient, PEFT[f"{case}_{name}"])
    assert layer.base.weight.grad is None and (layer.base.bias is None or layer.base.bias.grad is None)


@pytest.mark.parametrize("case", CASES)
def test_merged_and_unmerged_weights_are_those_of_peft(case):
    layer = peft_layer(case)
    close(layer.weight, PEFT[f"{case}_merged_weight"])
    layer.merge()
    layer.merge()  # once is enough
    close(layer.base.weight, PEFT[f"{case}_merged_weight"])
    with torch.no_grad():
        close(layer(PEFT["x"]), PEFT[f"{case}_merged_out"])
        close(layer(PEFT["x"]), PEFT[f"{case}_out"])
    layer.unmerge()
    layer.unmerge()
    close(layer.base.weight, PEFT[f"{case}_unmerged_weight"], atol=1e-9)
    close(layer(PEFT["x"]), PEFT[f"{case}_out"], atol=1e-9)


def test_by_hand():
    """W = [[3, 0], [0, 1]], A = [0, 2], B = [2, 0], s = 1: the first row becomes (3, 4), of length 5."""
    base = nn.Linear(2, 2)
    layer = LoRALinear(base, LoRAConfig(1, 1.0, dora=True))
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        base.bias.copy_(torch.tensor([100.0, 200.0]))
        layer.A.copy_(torch.tensor([[0.0, 2.0]]))
        layer.B.copy_(torch.tensor([[2.0], [0.0]]))
        layer.magnitude.copy_(torch.tensor([10.0, 1.0]))
    x = torch.tensor([1.0, 1.0])
    close(layer(x[None]), torch.tensor([[10 * 7 / 5 + 100, 1 + 200.0]]), atol=1e-4)
    close(row_norms(base.weight, layer.A, layer.B, 1.0), torch.tensor([5.0, 1.0]), atol=1e-5)
    layer(x[None])[0, 0].backward()
    close(layer.magnitude.grad, torch.tensor([7 / 5, 0.0]), atol=1e-5)
    close(layer.B.grad, torch.tensor([[10 / 5 * 2.0], [0.0]]), atol=1e-5)  # as if the length 5 were a constant


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scale(rslora):
    assert LoRAConfig(16, 32.0, rslora=rslora).scale == (8.0 if rslora else 2.0)


def test_norms_are_those_of_the_whole_sum_in_float32_also_under_autocast():
    weight, A, B = torch.randn(7, 20), torch.randn(3, 20), torch.randn(7, 3)
    expected = (weight + 0.7 * B @ A).norm(dim=1)
    close(row_norms(weight, A, B, 0.7), expected, atol=1e-5, rtol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        close(row_norms(weight, A, B, 0.7), expected, atol=1e-5, rtol=1e-6)
    assert row_norms(weight.bfloat16(), A.bfloat16(), B.bfloat16(), 0.7).dtype == torch.float32
    gone = torch.randn(7, 3)
    assert row_norms(-(gone @ A), A, gone, 1.0).isfinite().all()  # a row that cancels


@pytest.mark.parametrize("dora", [False, True])
def test_no_matrix_as_large_as_the_weight_is_made_or_kept(dora):
    """Only thin products in the forward pass, and nothing of the size of W is kept for the backward pass but W."""
    layer = LoRALinear(Linear(64, 96, bias=False), LoRAConfig(2, 4.0, dora=dora))
    train_a_little(nn.Sequential(layer))
    kept, made = [], []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() >= 64 * 96:
                made.append((function, out.data_ptr()))
            return out

    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    with hooks, Watch():
        layer(torch.randn(5, 64))
    ours = layer.base.weight.data_ptr()
    assert all(pointer == ours for _, pointer in made)  # a transposed view of W itself is no new matrix
    assert kept and all(x.numel() < 64 * 96 or x.data_ptr() == ours for x in kept)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_under_autocast_the_layer_gives_what_its_base_gives(kind, bias):
    base = Linear(8, 6, bias=bias)
    layer, x = LoRALinear(copy.deepcopy(base), LoRAConfig(2, 4.0, **kind)), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        assert out.dtype == base(x).dtype == torch.bfloat16
        close(out, base(x), atol=2e-2, rtol=1e-2)


# ----------------------------------------------------------------------------------------------------------------------
# The model


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("targets", [TARGETS, ("*",)], ids=["default", "all"])
def test_at_the_start_the_model_is_what_it_was_bit_for_bit(kind, targets):
    model, tokens = Transformer(TINY), torch.randint(64, (3, 20))
    before = model(tokens), token_logps(model, tokens)
    assert add_lora(model, 4, 8.0, targets, **kind) is model
    assert torch.equal(model(tokens), before[0]) and torch.equal(token_logps(model, tokens), before[1])
    assert all(layer.A.abs().max() > 0 for layer in lora_layers(model).values())  # or B would never get a gradient


def test_at_the_start_with_biases():
    model, tokens = Transformer(replace(TINY, bias=True, mlp="gelu")), torch.randint(64, (3, 20))
    nn.init.normal_(model.blocks[0].mlp.up_proj.bias)
    before = model(tokens)
    close(add_lora(model, 4, 8.0, ("up_proj", "q_proj"), dora=True)(tokens), before, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_only_the_adapters_learn(kind):
    model, tokens = add_lora(Transformer(TINY), 2, 4.0, **kind), torch.randint(64, (4, 20))
    parts = {"A", "B"} | ({"magnitude"} if kind.get("dora") else set())
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns == {f"{name}.{part}" for name in lora_layers(model) for part in parts} and len(learns) >= 28
    before = copy.deepcopy(model.state_dict())
    optimizers = optim.make_optimizers(model, 1e-2, weight_decay=0.1)
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}  # no moments for what is frozen
    for _ in range(2):  # while B is 0, A has no gradient
        (-token_logps(model, tokens).mean()).backward()
        for name, p in model.named_parameters():
            assert (p.grad is not None) == (name in learns), name
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in learns), name


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("q_proj",), ["blocks.0.attn.q_proj", "blocks.1.attn.q_proj"]),
        (("blocks.1.attn.q_proj",), ["blocks.1.attn.q_proj"]),
        (("blocks.*.attn.[kv]_proj",), [f"blocks.{i}.attn.{p}_proj" for i in (0, 1) for p in "kv"]),
        (("blocks.0.mlp.*", "head"), [*(f"blocks.0.mlp.{p}_proj" for p in ("gate", "up", "down")), "head"]),
        ("up*", ["blocks.0.mlp.up_proj", "blocks.1.mlp.up_proj"]),
    ],
    ids=str,
)
def test_layers_are_chosen_by_their_names(targets, names):
    model = add_lora(Transformer(TINY), 1, 1.0, targets)
    assert list(lora_layers(model)) == names
    assert model.lora == LoRAConfig(1, 1.0, (targets,) if isinstance(targets, str) else targets)


def test_what_cannot_be_is_said():
    model = Transformer(TINY)
    with pytest.raises(ValueError, match=r"called 'query'; there are q_proj, k_proj, .*, head"):
        add_lora(model, 1, 1.0, ("q_proj", "query"))
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())  # nothing half done
    for arguments, words in [((0, 1.0), "rank 0"), ((1, 0.0), "alpha 0"), ((1, 1.0, ()), "need a target")]:
        with pytest.raises(ValueError, match=words):
            add_lora(model, *arguments)
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(add_lora(model, 1, 1.0), 1, 1.0)


def test_a_tied_head_is_refused_and_the_rest_of_such_a_model_is_not():
    tied = replace(TINY, tie_embeddings=True)
    for targets in ("head", "*"):
        with pytest.raises(ValueError, match="head shares its weight with embed.weight"):
            add_lora(Transformer(tied), 1, 1.0, targets)
    model = add_lora(Transformer(tied), 1, 1.0)
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("targets", [TARGETS, ("*",)], ids=["default", "the router too"])
def test_experts_have_adapters_that_merge_and_go_off(kind, targets):
    config = replace(TINY, n_experts=4, n_experts_per_token=2, n_shared_experts=1, d_expert=16)
    plain, tokens = Transformer(config), torch.randint(64, (3, 20))
    model = add_lora(copy.deepcopy(plain), 2, 4.0, targets, **kind)
    names = set(lora_layers(model))
    assert {f"blocks.1.mlp.{part}.up_proj" for part in ("experts.0", "experts.3", "shared")} < names
    assert ("blocks.1.mlp.router" in names) == (targets == ("*",))
    train_a_little(model)
    on = model(tokens)
    with adapters_off(model):
        assert torch.equal(model(tokens), plain(tokens)) and not torch.equal(on, plain(tokens))
    merged = Transformer(config)
    merged.load_state_dict(merged_weights(model))
    close(merged(tokens), on, atol=1e-5, rtol=1e-4)
    close(unload_lora(model)(tokens), on, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_adapter_of_the_head_counts_wherever_the_head_is_read_or_called(kind):
    """``token_logps`` reads the head's matrix; ``forward`` calls the head."""
    model = train_a_little(add_lora(Transformer(TINY), 2, 4.0, ("head",), **kind))
    tokens = torch.randint(64, (2, 12))
    called = model(tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    close(token_logps(model, tokens), called, atol=1e-5, rtol=1e-5)
    close(token_logps(model, tokens, max_logits=256), called, atol=1e-5, rtol=1e-5)
    gradients = []
    for value in (token_logps(model, tokens), called):
        value.sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    for one, other in zip(*gradients):
        assert one.abs().max() > 0
        close(one, other, atol=1e-4, rtol=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Merged, and off


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_merging_changes_no_output_and_unmerging_gives_the_base_back(kind):
    plain = Transformer(TINY)
    model = train_a_little(add_lora(copy.deepcopy(plain), 4, 8.0, ("*",), **kind))
    tokens = torch.randint(64, (3, 20))
    with torch.no_grad():
        expected, away = model(tokens), plain(tokens)
        assert float((expected - away).abs().max()) > 0.05  # the adapters do something
        close(merge_lora(model)(tokens), expected, atol=1e-5, rtol=1e-5)
        close(unmerge_lora(model)(tokens), expected, atol=1e-5, rtol=1e-5)
        with adapters_off(model):
            close(model(tokens), away, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_unloaded_it_is_a_plain_model(kind):
    plain = Transformer(TINY)
    model = train_a_little(add_lora(copy.deepcopy(plain), 4, 8.0, ("*",), **kind))
    tokens = torch.randint(64, (3, 20))
    expected, weights = model(tokens), merged_weights(model)
    close(model(tokens), expected, atol=0)  # taking the merged weights changed nothing
    assert unload_lora(model) is model and model.lora is None and not lora_layers(model)
    assert list(model.state_dict()) == list(plain.state_dict()) == list(weights)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    plain.load_state_dict(weights)
    close(plain(tokens), expected, atol=1e-5, rtol=1e-5)
    assert lora_layers(add_lora(model, 1, 1.0))  # and may get new adapters


def test_merged_adapters_do_not_train():
    model, tokens = merge_lora(add_lora(Transformer(TINY), 2, 4.0)), torch.randint(64, (2, 8))
    with pytest.raises(ValueError, match="merged adapters cannot learn"):
        token_logps(model, tokens)
    with torch.no_grad():
        token_logps(model, tokens)
    with pytest.raises(ValueError, match="merged into the weights and cannot be off"), adapters_off(model):
        pass


def test_with_the_adapters_off_the_model_is_its_reference():
    plain, tokens = Transformer(TINY), torch.randint(64, (3, 20))
    model = train_a_little(add_lora(copy.deepcopy(plain), 4, 8.0, ("*",), dora=True))
    on = model(tokens)
    with adapters_off(model) as same:
        assert same is model and torch.equal(model(tokens), plain(tokens))
        assert torch.equal(token_logps(model, tokens), token_logps(plain, tokens))  # reads the head's weight
        with adapters_off(model):
            pass
        assert torch.equal(model(tokens), plain(tokens))  # the inner one leaves them off
    assert torch.equal(model(tokens), on)
    with pytest.raises(KeyError), adapters_off(model):
        raise KeyError
    assert torch.equal(model(tokens), on)
    alone = plain(tokens)
    with adapters_off(plain):
        assert torch.equal(plain(tokens), alone)


def test_a_copy_and_generation():
    model = train_a_little(add_lora(Transformer(TINY), 4, 8.0, ("*",)))
    twin = copy.deepcopy(model)
    train_a_little(twin)
    tokens = torch.randint(64, (2, 9))
    assert twin.lora == model.lora and not torch.equal(twin(tokens), model(tokens))
    _, _, logps = generate(model, tokens.tolist(), 5, eot_id=63, seed=1)
    new, mask, merged = generate(merge_lora(model), tokens.tolist(), 5, eot_id=63, seed=1)
    close(logps, merged, atol=1e-4, rtol=1e-4)
    assert new.shape == mask.shape


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no C++ compiler")
@pytest.mark.parametrize("dora", [False, True])
def test_compiled_equals_eager(dora):
    model, x = (
        train_a_little(nn.Sequential(LoRALinear(Linear(16, 8), LoRAConfig(2, 4.0, dora=dora)))),
        torch.randn(5, 16),
    )
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    torch.compile(model)(x).square().sum().backward()
    for p, gradient in zip((p for p in model.parameters() if p.requires_grad), expected):
        close(p.grad, gradient, atol=1e-4, rtol=1e-4)


def test_the_share_that_learns():
    model = add_lora(Transformer(TINY), 1, 1.0, ("q_proj", "k_proj"), dora=True)
    # q: 32 -> 32, k: 32 -> 16, in two blocks; A, B and the lengths
    trained = 2 * ((32 + 32 + 32) + (32 + 16 + 16))
    n = sum(p.numel() for p in Transformer(TINY).parameters()) + trained
    assert share_trained(model) == f"trained {trained} of {n:,} parameters ({100 * trained / n:.3g} %)"


# ----------------------------------------------------------------------------------------------------------------------
# Adapters alone


def test_adapters_go_from_one_model_to_another():
    plain, tokens = Transformer(TINY), torch.randint(64, (2, 9))
    model = train_a_little(add_lora(copy.deepcopy(plain), 2, 4.0, dora=True))
    other = add_lora(copy.deepcopy(plain), 2, 4.0, dora=True)
    assert not torch.equal(other(tokens), model(tokens))
    load_adapters(other, adapter_weights(model))
    assert torch.equal(other(tokens), model(tokens))
    applied = lora.apply_adapters(plain.state_dict(), adapter_weights(model), model.lora)
    assert all(torch.equal(value, applied[name]) for name, value in merged_weights(model).items())
    for wrong, words in [
        (add_lora(Transformer(TINY), 2, 4.0), "alone"),
        (add_lora(Transformer(TINY), 3, 4.0, dora=True), r"is \(2, 32\), here \(3, 32\)"),
    ]:
        with pytest.raises(ValueError, match=words):
            load_adapters(wrong, adapter_weights(model))
    for base in (Transformer(replace(TINY, d_model=16)), Transformer(replace(TINY, mlp="gelu"))):
        with pytest.raises(ValueError, match="has no layer"):
            lora.apply_adapters(base.state_dict(), adapter_weights(model), model.lora)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "pretrain"
    pretrain.main(tiny_pretrain(folder))
    return folder


RANK = {"lora_rank": 2, "lora_alpha": 8.0, "lr": 2e-2}


@pytest.fixture(scope="module")
def tuned(base):
    folder = base.parent / "sft"
    sft.main(tiny_sft(folder, base, **RANK))
    return folder


def equal_weights(one: dict, other: dict) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_leaves_merged_weights_and_its_adapters(base, tuned):
    before, after = load_checkpoint(base), load_checkpoint(tuned)
    assert list(after["model"]) == list(before["model"])  # the names of a plain model
    changed = {name for name in before["model"] if not torch.equal(before["model"][name], after["model"][name])}
    assert changed == {name for name in before["model"] if "proj" in name or name == "head.weight"}
    alone = torch.load(tuned / "adapters.pt", weights_only=True)
    assert equal_weights(alone["adapters"], after["adapters"])
    assert alone["lora"] == {"rank": 2, "alpha": 8.0, "targets": [*TARGETS, "head"], "dora": False, "rslora": False}
    assert alone["lineage"][-1] == {
        "stage": "pretrain", "path": str(base), "step": before["step"], "weights": fingerprint(before["model"])
    }  # fmt: skip
    assert set(alone) == {"magic", "stage", "config", "step", "lineage", "lora", "adapters"}
    assert sum(p.numel() for p in alone["adapters"].values()) < 0.2 * sum(p.numel() for p in after["model"].values())
    # Moments of what learns, and of nothing else.
    assert sum(len(o["state"]) for o in after["optimizers"]) == len(alone["adapters"])


def test_adapters_alone_are_applied_to_their_base_wherever_a_checkpoint_is_loaded(tuned, monkeypatch, capsys):
    merged, alone = load_checkpoint(tuned), load_state(tuned / "adapters.pt")
    assert equal_weights(merged["model"], alone["model"])
    for name in ("model_config", "tokenizer", "stage", "config", "step", "lineage"):
        assert merged[name] == alone[name]
    tokens = torch.randint(64, (2, 9))
    (one, _, _), (other, _, _) = load_stage(str(tuned)), load_stage(str(tuned / "adapters.pt"))
    assert torch.equal(one(tokens), other(tokens))
    said = []
    for path in (tuned, tuned / "adapters.pt", tuned / "best.pt"):
        line = [
            "chat.py",
            str(path),
            "--prompt",
            "Hi",
            "--temperature",
            "0",
            "--max_new_tokens",
            "8",
            "--device",
            "cpu",
        ]
        monkeypatch.setattr(sys, "argv", line)
        chat.main()
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    exam = evaluate.Config(n=8, device="cpu", max_new_tokens=8)
    rows = [evaluate.measure(str(path), exam) for path in (tuned, tuned / "adapters.pt")]
    assert {k: v for k, v in rows[0].items() if k != "path"} == {k: v for k, v in rows[1].items() if k != "path"}


def refusal(function, *arguments) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_base_that_moved_or_changed(base, tuned, tmp_path, capsys):
    state = torch.load(tuned / "adapters.pt", weights_only=True)
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "ckpt.pt").write_bytes((base / "ckpt.pt").read_bytes())
    state["lineage"][-1]["path"] = str(tmp_path / "gone")
    path = tmp_path / "adapters.pt"
    torch.save(state, path)
    text = refusal(load_stage, str(path))
    assert "needs its base: there is no checkpoint" in text and "python lora.py" in text and "--base" in text
    # Named anew, it is as before; what comes out is a checkpoint like any other.
    apply(Apply(str(path), str(tmp_path / "moved"), str(tmp_path / "out")))
    assert "chat.py" in capsys.readouterr().out
    assert equal_weights(load_checkpoint(tmp_path / "out")["model"], load_checkpoint(tuned)["model"])
    assert "holds a checkpoint already" in refusal(
        apply, Apply(str(path), str(tmp_path / "moved"), str(tmp_path / "out"))
    )
    assert "where to" in refusal(apply, Apply(str(path)))
    # The same shape with other weights, and another shape.
    changed = torch.load(base / "ckpt.pt", weights_only=True)
    changed["model"]["blocks.0.attn.q_proj.weight"][0, 0] += 1e-3
    torch.save(changed, tmp_path / "moved" / "ckpt.pt")
    assert "has other weights than those" in refusal(apply, Apply(str(path), str(tmp_path / "moved"), "x"))
    del changed["model"]["blocks.0.attn.q_proj.weight"]
    state["lineage"][-1]["weights"] = fingerprint(changed["model"])
    torch.save(state, path)
    torch.save(changed, tmp_path / "moved" / "ckpt.pt")
    assert "has no layer blocks.0.attn.q_proj" in refusal(apply, Apply(str(path), str(tmp_path / "moved"), "x"))
    assert "holds no adapters" in refusal(apply, Apply(str(base / "ckpt.pt"), "", "x"))
    assert "there is no checkpoint" in refusal(apply, Apply(str(tmp_path / "nothing.pt"), "", "x"))
    torch.save(state | {"lineage": []}, path)
    assert refusal(load_stage, str(path)).endswith("adapters.pt lacks lineage")
    path.write_bytes((tuned / "adapters.pt").read_bytes()[:1000])
    assert "damaged" in refusal(load_stage, str(path))


def test_adapters_on_adapters_are_known_by_their_parts_not_by_the_last_digits_of_their_sum(
    tuned, tmp_path, monkeypatch
):
    """Another processor adds base and adapters up to other last digits; the chain and a resume go on there."""
    first = tmp_path / "first.pt"
    first.write_bytes((tuned / "adapters.pt").read_bytes())
    config = replace(tiny_sft(tmp_path / "second", str(first)), **RANK | {"epochs": 1.0})
    sft.main(config)
    assert weights_id(load_state(first)) != weights_id(load_checkpoint(tuned))  # two names for one model
    merge = lora.adapted_weight
    monkeypatch.setattr(lora, "adapted_weight", lambda *a: merge(*a) * (1 + 1e-6))
    assert load_state(tmp_path / "second" / "adapters.pt")["stage"] == "sft"
    sft.main(config)
    state = torch.load(first, weights_only=True)  # other adapters are refused all the same
    next(iter(state["adapters"].values())).add_(0.1)
    torch.save(state, first)
    assert "has other weights than those" in refusal(load_state, tmp_path / "second" / "adapters.pt")
    assert "was started from other weights" in refusal(sft.main, config)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s["lora"].pop("targets"), "damaged"),
        (lambda s: s["lora"].update(rank=0), "damaged"),
        (lambda s: s["lora"].update(colour="red"), "damaged"),
        (lambda s: s["lineage"][-1].pop("path"), "damaged"),
        (lambda s: s["lineage"][-1].pop("weights"), "damaged"),
        (lambda s: s.update(adapters=list(s["adapters"].values())), "damaged"),
        (lambda s: s["adapters"].update({Q_A: s["adapters"][Q_A][0]}), "does not fit"),
        (lambda s: s["adapters"].update({Q_A: s["adapters"][Q_A][:1]}), "does not fit"),
        (lambda s: s["adapters"].pop(Q_A), "does not fit"),
    ],
    ids=range(9),
)
def test_a_wrong_file_is_refused_in_one_line(tuned, tmp_path, change, says):
    state = torch.load(tuned / "adapters.pt", weights_only=True)
    change(state)
    torch.save(state, tmp_path / "adapters.pt")
    assert says in refusal(load_state, tmp_path / "adapters.pt")


Q_A = "blocks.0.attn.q_proj.A"


def test_a_file_that_names_itself_as_its_base(tuned, tmp_path):
    state = torch.load(tuned / "adapters.pt", weights_only=True)
    state["lineage"][-1]["path"] = str(tmp_path / "adapters.pt")
    torch.save(state, tmp_path / "adapters.pt")
    assert "names itself" in refusal(load_state, tmp_path / "adapters.pt")


def test_the_command_line_of_the_chapter(tuned, tmp_path, monkeypatch, capsys):
    line = ["lora.py", str(tuned), "--out", str(tmp_path / "out")]  # the folder means its adapters.pt
    monkeypatch.setattr(sys, "argv", line)
    runpy.run_path(lora.__file__, run_name="__main__")
    assert equal_weights(load_checkpoint(tmp_path / "out")["model"], load_checkpoint(tuned)["model"])
    monkeypatch.setattr(sys, "argv", [*line[:2], "--bse", "x"])
    with pytest.raises(SystemExit):
        runpy.run_path(lora.__file__, run_name="__main__")
    assert "did you mean base?" in capsys.readouterr().err
    config = replace(tiny_sft(tmp_path / "out", load_checkpoint(tuned)["lineage"][-1]["path"]), **RANK)
    assert "merged adapters, not a run that could go on" in refusal(sft.main, config)


# ----------------------------------------------------------------------------------------------------------------------
# The stages


def of_stage(stage: str, folder: Path, start: Path, **changes):
    changes = RANK | changes
    if stage == "sft":
        return tiny_sft(folder, start, **changes)
    if stage == "dpo":
        return tiny_dpo(folder, start, **{"eval_every": 100} | changes)
    made = tiny_grpo(
        folder, start, **{"beta": 0.05, "max_new_tokens": 8, "lr": 5e-2, "warmup": 1, "save_every": 1} | changes
    )
    return gdpo.Config(**vars(made)) if stage == "gdpo" else made


STAGES = {"sft": sft, "dpo": dpo, "grpo": grpo, "gdpo": gdpo}


@pytest.fixture
def some_reward(monkeypatch):
    """One that an untrained policy earns now and then."""

    def score(texts, golds, finished, verifier="strict"):
        return torch.tensor([float(text.count("e")) for text in texts]), torch.zeros(len(texts))

    monkeypatch.setattr(grpo, "score", score)


@pytest.mark.parametrize(("stage", "dora"), but_slow([("sft", True), ("dpo", False), ("grpo", True)], ("grpo", True)))
def test_a_resumed_run_ends_with_the_same_weights(stage, dora, base, tmp_path, monkeypatch, some_reward):
    whole, stopped = (of_stage(stage, tmp_path / name, base, dora=dora) for name in ("whole", "stopped"))
    one, two = assert_exact_resume(monkeypatch, STAGES[stage], whole, stopped, saves=1)
    assert equal_weights(one["adapters"], two["adapters"])
    assert equal_weights(
        one["adapters"], torch.load(tmp_path / "stopped" / "adapters.pt", weights_only=True)["adapters"]
    )
    assert all(float(value.abs().max()) > 0 for name, value in one["adapters"].items() if name.endswith(".B"))
    STAGES[stage].main(stopped)  # it is finished: examined again, not trained
    three = torch.load(tmp_path / "stopped" / "ckpt.pt", weights_only=True)
    assert equal_weights(two["adapters"], three["adapters"])


@pytest.mark.parametrize("stage", but_slow(["dpo", "gdpo"], "gdpo"))
def test_a_stage_starts_from_a_lora_run_and_trains_new_adapters(stage, tuned, tmp_path, some_reward, capsys):
    """On its ckpt.pt, and on its adapters.pt: the same run."""
    for name, origin in (("a", tuned), ("b", tuned / "adapters.pt")):
        STAGES[stage].main(of_stage(stage, tmp_path / name, origin, lora_rank=3, lora_targets=("q_proj",)))
    assert re.search(r"trained [\d,]+ of [\d,]+ parameters \(\d\S+ %\)", capsys.readouterr().out)
    one, two, before = (load_checkpoint(path) for path in (tmp_path / "a", tmp_path / "b", tuned))
    assert equal_weights(one["model"], two["model"])
    changed = {name for name in one["model"] if not torch.equal(one["model"][name], before["model"][name])}
    assert changed == {name for name in one["model"] if "q_proj" in name}
    assert [row["stage"] for row in one["lineage"]] == ["pretrain", "sft"]
    assert {tuple(value.shape)[0] for name, value in one["adapters"].items() if name.endswith(".A")} == {3}
    assert equal_weights(load_state(tmp_path / "b" / "adapters.pt")["model"], one["model"])  # a chain of two


def test_stages_without_adapters_start_from_a_lora_run(tuned, tmp_path):
    small = {"out_dir": str(tmp_path / "r"), "init_from": str(tuned), "device": "cpu", "eval_every": 2}
    pairs = {"data": "arith", "n_pairs": 8, "n_sums": 4, "normalize_on": 4, "max_new_tokens": 4, "epochs": 1.0}
    reward.main(reward.Config(**small | pairs | {"batch_size": 4, "eval_pairs": 4, "max_length": 64}))
    small |= {"out_dir": str(tmp_path / "p"), "steps": 1, "prompts_per_step": 4, "n_prompts": 8, "eval_prompts": 2}
    ppo.main(ppo.Config(**small | {"max_new_tokens": 6}))
    sft.main(tiny_sft(tmp_path / "s", tuned, epochs=0.5))  # and whole weights again
    state = load_checkpoint(tmp_path / "s")
    assert "adapters" not in state and not (tmp_path / "s" / "adapters.pt").exists()


def test_a_folder_is_continued_in_its_own_way_alone(base, tuned, tmp_path):
    sft.main(tiny_sft(tmp_path, base))
    assert "lora_rank=0, now 2" in refusal(sft.main, tiny_sft(tmp_path, base, lora_rank=2))
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    for name in ("lora_rank", "lora_alpha", "lora_targets", "dora", "rslora"):
        del state["config"][name]  # written before there were adapters
    torch.save(state, tmp_path / "ckpt.pt")
    assert "trains whole weights" in refusal(sft.main, tiny_sft(tmp_path, base, lora_rank=2))
    sft.main(tiny_sft(tmp_path, base))
    for changes in ({"lora_rank": 3}, {"dora": True}, {"lora_alpha": 4.0}, {"lora_targets": ("q_proj",)}):
        assert "holds a run with" in refusal(sft.main, replace(tiny_sft(tuned, base, **RANK), **changes))


def test_grpo_keeps_no_second_model_and_its_reference_is_the_start(base, tmp_path, monkeypatch, some_reward):
    """The KL to the reference is 0 at first, and then not; and equal to that of a copy of the start."""

    def no_copy(*_):
        raise AssertionError("a second model")

    monkeypatch.setattr(grpo, "frozen_copy", no_copy)
    seen, real = [], grpo.policy_logps

    def policy_logps(run, model, rollout, config, wanted=None, group=1):
        found = real(run, model, rollout, config, wanted, group)
        if any(layer.off for layer in lora_layers(model).values()):
            seen.append((rollout, found))
        return found

    monkeypatch.setattr(grpo, "policy_logps", policy_logps)
    grpo.main(of_stage("grpo", tmp_path, base, save_every=100, eval_every=100, epochs=2, minibatches=2))
    monkeypatch.undo()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "kl_ref" in row]
    assert rows[-1]["kl_ref"] > 1e-4 and all(row["sampler_gap"] < 1e-3 for row in rows)
    origin, _, _ = load_stage(str(base))
    assert len(seen) == 3
    for rollout, found in seen:
        with torch.no_grad():
            expected = token_logps(origin, rollout.tokens, where=rollout.mask)
        close(found[rollout.mask], expected[rollout.mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_rank": -1}, "lora_rank is -1: at least 0"),
        ({"lora_alpha": 0.0}, "lora_alpha is 0.0"),
        ({"lora_alpha": math.inf}, "lora_alpha is inf"),
        ({"lora_rank": 0, "dora": True}, "--dora is a kind of adapter"),
        ({"lora_rank": 0, "rslora": True}, "--rslora is a kind of adapter"),
        ({"lora_targets": ()}, "need a target"),
        ({"lora_targets": ("q_prj",)}, "no linear layer is called 'q_prj'; there are q_proj"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo", "gdpo"])
def test_what_cannot_work_is_refused_in_one_line(stage, changes, words, base, tmp_path):
    assert words in refusal(STAGES[stage].main, of_stage(stage, tmp_path / "x", base, **changes))


def test_sft_of_a_tied_model_names_the_head(tmp_path):
    pretrain.main(tiny_pretrain(tmp_path / "tied", steps=1, tie_embeddings=True, eval_every=1))
    assert "head shares its weight" in refusal(sft.main, tiny_sft(tmp_path / "x", tmp_path / "tied", lora_rank=1))
    sft.main(tiny_sft(tmp_path / "y", tmp_path / "tied", lora_rank=1, lora_targets=TARGETS, epochs=0.5))
    weights = load_checkpoint(tmp_path / "y")["model"]
    assert torch.equal(weights["head.weight"], weights["embed.weight"])


def test_the_command_line_of_a_stage():
    config = parse(grpo.Config, ["--lora_rank", "4", "--lora_targets", "q_proj", "blocks.0.*", "--dora"])
    assert (config.lora_rank, config.lora_targets, config.dora) == (4, ("q_proj", "blocks.0.*"), True)
    assert parse(grpo.Config, []).lora_targets == TARGETS and parse(sft.Config, []).lora_targets == (*TARGETS, "head")


def sft_run(config) -> None:
    sft.main(config)


def test_two_processes_train_the_adapters_of_one(base, tmp_path):
    one, two = (
        tiny_sft(tmp_path / name, base, packing=False, epochs=1.0, dora=True, **RANK) for name in ("one", "two")
    )
    sft.main(one)
    on_two_processes(tmp_path, sft_run, two)
    assert_same_training(Path(one.out_dir), Path(two.out_dir))


def test_the_start_of_adapters_hangs_on_the_seed_alone():
    """One of several processes may have drawn more than the others before: DPO's own pairs are sampled by the first."""
    starts = []
    for drawn in (0, 3):
        torch.rand(drawn)
        made = Transformer(ModelConfig(64, 32, 1, 2))
        lora.start_lora(made, sft.Config(lora_rank=2, seed=5))
        starts.append(made.blocks[0].attn.q_proj.A.detach().clone())
    assert torch.equal(*starts)


def test_a_small_change_of_length_is_felt_in_16_bits():
    """DoRA's lengths begin at a ratio of 1, next to which bfloat16 knows 1.0078 and 0.9961."""
    made = nn.Sequential(nn.Linear(8, 200, bias=False))
    add_lora(made, 1, 1.0, targets="*", dora=True)
    x = torch.randn(500, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        before = made(x)
        made[0].magnitude *= 1.003
        after = made(x)
    grown = float(after.float().norm() / before.float().norm())
    assert before.dtype == torch.bfloat16 and grown == pytest.approx(1.003, abs=5e-4)


def test_adapters_are_not_loaded_under_merged_weights():
    made = add_lora(nn.Sequential(nn.Linear(4, 4)), 1, 1.0, targets="*")
    kept = {key: value.clone() for key, value in adapter_weights(made).items()}
    merge_lora(made)
    with pytest.raises(ValueError, match="unmerge_lora"):
        load_adapters(made, kept)


# ----------------------------------------------------------------------------------------------------------------------
# Learning


@pytest.mark.parametrize("dora", [False, True])
def test_grpo_on_adapters_raises_a_reward_and_lowers_it_when_it_is_negated(tmp_path, dora):
    """Answer with as many letters "a" as possible: the share of "a" before and after."""
    tokenizer, found = ByteTokenizer(), {}
    for sign in (1.0, -1.0):
        torch.manual_seed(0)
        model = Transformer(ModelConfig(tokenizer.vocab_size, 32, 1, 2, max_seq_len=32))
        with torch.no_grad():
            model.head.weight[ord("a")] = 0.7  # "a" is not too rare to begin with, and its row stays as it is
        before = copy.deepcopy(model.state_dict())
        add_lora(model, 4, 16.0, dora=dora)
        config = grpo.Config(out_dir=str(tmp_path / f"{sign}"), device="cpu", max_new_tokens=6, micro_batch_size=64)
        run = start(config, "grpo")
        optimizers = optim.make_optimizers(model, 2e-2)
        shares = []
        for step in range(25):
            rollout = sample_answers(model, tokenizer, [[ord(c)] for c in "wxyz"], 16, 6, 1.0, seed=step)
            share = torch.tensor([text.count("a") / 6 for text in rollout.texts])
            shares.append(float(share.mean()))
            old = grpo.policy_logps(run, model, rollout, config)
            assert sampler_gap(rollout, old) < 1e-4
            for _ in range(2):
                advantages = group_advantages(sign * share, 16)
                accumulate_gradients(run, model, rollout, advantages, config, old)
                optim.update(run, model, optimizers, 2e-2, 1.0)
        with adapters_off(model):
            assert all(torch.equal(value, before[name]) for name, value in plain_part(model).items())
        found[sign] = shares[0], shares[-1]
    assert found[1.0][1] > found[1.0][0] + 0.3 and found[-1.0][1] < 0.5 * found[-1.0][0], found


def plain_part(model) -> dict:
    """The weights of the base."""
    parts = adapter_weights(model)
    return {name.replace(".base", ""): value for name, value in model.state_dict().items() if name not in parts}


def test_a_frozen_head_cannot_tell_tokens_apart_whose_rows_are_alike():
    """Why SFT adapts the head too: tokens that pretraining never showed have such rows. Here "b" and "c"; learn
    "ab"."""
    lesson = torch.tensor([[*b"ab"] * 4])
    losses = {}
    for targets in (TARGETS, (*TARGETS, "head")):
        torch.manual_seed(0)
        model = Transformer(ModelConfig(256, 32, 2, 2, max_seq_len=32))
        with torch.no_grad():
            model.head.weight.mul_(30)  # as far apart as those of a trained head
            model.head.weight[ord("c")] = model.head.weight[ord("b")]
        optimizers = optim.make_optimizers(add_lora(model, 4, 16.0, targets), 1e-2)
        for _ in range(60):
            loss = -token_logps(model, lesson)[0, ::2].mean()  # of "b"
            loss.backward()
            optimizers[0].step()
            optimizers[0].zero_grad()
        losses[targets] = float(loss.detach())
    assert losses[TARGETS] == pytest.approx(math.log(2), abs=0.05) and losses[(*TARGETS, "head")] < 0.1


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    root = tmp_path_factory.mktemp("embedded")
    pretrain.main(pretrain.Config(out_dir=str(root / "pretrain"), device="cpu", eval_every=1000))
    return root


@pytest.mark.slow
def test_on_the_embedded_task_adapters_learn_the_form_and_then_to_be_right_or_wrong(embedded, tmp_path):
    fields = {"device": "cpu", "lora_rank": 4, "lr": 3e-3}
    early = {"n_examples": 192, "epochs": 5.0}  # it knows the form by then, and leaves something to reinforce
    sft.main(sft.Config(out_dir=str(embedded / "sft"), init_from=str(embedded / "pretrain"), **early, **fields))
    tuned = evaluate.measure(str(embedded / "sft"), evaluate.Config(n=256, device="cpu"))
    assert tuned["accuracy"] > 0.4 and tuned["unreadable"] < 0.1
    fields |= {"init_from": str(embedded / "sft"), "lr": 2e-3}
    for sign in (1.0, -1.0):
        steps = 25 if sign > 0 else 20
        fields |= {"steps": steps, "eval_every": steps}
        grpo.main(grpo.Config(out_dir=str(tmp_path / f"{sign}"), correct_weight=sign, **fields))
        rows = [json.loads(line) for line in (tmp_path / f"{sign}" / "metrics.jsonl").read_text().splitlines()]
        right = [row["correct"] for row in rows if "correct" in row]  # of sampled answers, 256 in a rollout
        first, last = sum(right[:5]) / 5, sum(right[-5:]) / 5
        assert last > first + 0.05 if sign > 0 else last < 0.5 * first, (sign, right)


# ----------------------------------------------------------------------------------------------------------------------
# What the chapter prints


def test_the_numbers_that_the_example_prints_are_right(capsys):
    lora.example()
    out = capsys.readouterr().out

    def below(heading):
        after = out.split(heading, 1)[1].split("tensor(", 1)[1].split(")", 1)[0]
        return torch.tensor([[float(x) for x in re.findall(r"-?\d+\.?\d*", row)] for row in after.split("\n")])

    W, x, A, B = (below(heading) for heading in ("weight W", "x\n", "A\n", "B, after"))
    close(below("W x\n"), x @ W.T)
    close(below("whose B is 0"), x @ W.T)
    close(below("added to W x"), x @ W.T + 2 * (x @ A.T) @ B.T)
    close(below("adapters off"), x @ W.T)
    close(below("merged: W + 2"), W + 2 * B @ A)
    close(below("times x"), x @ (W + 2 * B @ A).T)
    shares = [int(n.replace(",", "")) for n in re.findall(r"trained ([\d,]+) of", out)]
    widths = [(128, 128)] * 4 + [(128, 352)] * 3  # ModelConfig's: four blocks, as many key heads as query heads
    expected = [4 * r * sum(a + b for a, b in widths) for r in (1, 4, 16)]
    assert shares == [expected[0], expected[1], expected[1] + 4 * (4 * 128 + 2 * 352 + 128), expected[2]]


def test_a_wrong_command_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lora.py"])
    with pytest.raises(SystemExit):
        run_main(lambda: parse(Apply, ["a.pt", "b.pt"]))
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_work_of_a_step_leaves_out_the_gradients_of_frozen_matrices(tmp_path):
    """In SFT of a model with experts and adapters: 6 operations for each weight of a token but 4 for each frozen
    one."""
    shape = ModelConfig(64, 32, 2, 2, n_experts=4, n_experts_per_token=2)
    model = Transformer(shape)
    before = flops_per_token(model, 16)
    D, w, kv = 32, shape.d_expert, 32
    frozen = 2 * (2 * D * D + 2 * D * kv + 4 * D + 2 * 3 * D * w) + 64 * D  # attention, router, two experts; the head
    add_lora(model, 2, 4.0)
    thin = 2 * 2 * (4 * (D + D) + 2 * 3 * (D + w))  # A and B of rank 2, in two blocks
    assert flops_per_token(model, 16) == before + 6 * thin - 2 * frozen
    run = start(sft.Config(out_dir=str(tmp_path), device="cpu"), "sft")
    run.banner(model_size(model, 16), 1, 1)
    assert run.metrics.flops_per_token == before + 6 * thin - 2 * frozen
