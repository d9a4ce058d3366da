import contextlib
import json
import math
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import load_npz
from tiny import assert_same_training, tiny_pretrain

import optim
import pretrain
from optim import learning_rate, make_optimizers
from runtime.errors import UserError
from runtime.progress import Progress
from runtime.run import Run
from tokenizer import ByteTokenizer
from transformer import ModelConfig, Transformer


@pytest.mark.parametrize(("name", "final"), [("lr_cosine_w4_t20", 0.0), ("lr_cosine_min0.1_w4_t20", 0.1)])
def test_schedule_is_that_of_the_reference_one_step_on(name, final):
    reference = load_npz("optim")[
        name
    ]  # its first step has rate 0 and is wasted; ours begins where its second one does
    ours = [learning_rate(step, 20, 1.0, 4, final) for step in range(19)]
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), reference[1:], rtol=1e-7, atol=1e-9)
    assert learning_rate(19, 20, 1.0, 4, final) == pytest.approx(final)
    assert [learning_rate(step, 3, 1.0, 2, final) for step in range(3)] == pytest.approx([0.5, 1.0, final])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizer_takes_the_steps_of_the_reference(kind):
    fixture = load_npz("optim")
    holder = torch.nn.Module()
    holder.blocks = torch.nn.Module()
    holder.blocks.weight = torch.nn.Parameter(fixture["p0"].clone())
    if kind == "adamw":
        optimizers, name, tolerance = make_optimizers(holder, 1e-2, 0.1, 0.95), "adamw_lr1e-2_b.9_.95_wd.1", 1e-5
    else:
        optimizers, name, tolerance = (
            make_optimizers(holder, 2e-2, 0.1, kind="muon"),
            "torch_muon_match_rms_lr2e-2",
            2e-2,
        )
        optimizers = [o for o in optimizers if isinstance(o, torch.optim.Muon)]
        assert len(optimizers) == 1
    for gradient, expected in zip(fixture["grads"], fixture[name]):
        holder.blocks.weight.grad = gradient.clone()
        optimizers[-1].step()
        torch.testing.assert_close(holder.blocks.weight.data, expected, rtol=tolerance, atol=tolerance * 0.1)


def test_clipping_scales_by_the_global_norm():
    fixture = load_npz("optim")
    run = Run.__new__(Run)
    run.scaler = torch.amp.GradScaler("cpu", enabled=False)
    module = torch.nn.Module()
    scale = fixture["clip_total_norm"]  # the gradients before clipping had this norm
    grads = [fixture["clip_g0"] * scale, fixture["clip_g1"] * scale]
    module.a, module.b = (torch.nn.Parameter(torch.zeros_like(g)) for g in grads)
    module.a.grad, module.b.grad = (g.clone() for g in grads)
    optimizer = torch.optim.SGD(module.parameters(), lr=123.0)  # the schedule's rate counts, not this one
    norm = optim.update(run, module, [optimizer], lr=1.0, max_grad_norm=1.0)
    total = math.sqrt(sum(float(g.square().sum()) for g in grads))
    assert norm == pytest.approx(total, rel=1e-5)
    moved = torch.cat([module.a.data, module.b.data]).norm()  # a step of rate 1 moves by the clipped gradient
    assert float(moved) == pytest.approx(1.0, rel=1e-4)
    assert module.a.grad is None


def test_vectors_do_not_decay_and_tied_weights_are_listed_once():
    model = Transformer(ModelConfig(64, 32, 2, 4, bias=True, tie_embeddings=True))
    groups = make_optimizers(model, 1e-3, 0.1)[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.dim() >= 2 for p in groups[0]["params"]) and all(p.dim() < 2 for p in groups[1]["params"])
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == len(list(model.parameters()))


def test_muon_gets_the_matrices_of_the_blocks_and_nothing_else():
    model = Transformer(ModelConfig(64, 32, 2, 4))
    adamw, muon = make_optimizers(model, 1e-3, 0.1, kind="muon")
    chosen = {id(p) for group in muon.param_groups for p in group["params"]}
    expected = {id(p) for n, p in model.named_parameters() if n.startswith("blocks.") and p.dim() == 2}
    assert chosen == expected
    others = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert id(model.embed.weight) in others and id(model.head.weight) in others and not chosen & others


def test_a_gradient_that_is_not_finite_changes_nothing(capsys):
    run = Run.__new__(Run)
    run.scaler = torch.amp.GradScaler("cpu", enabled=False)
    run.progress = Progress("pretrain", Path(), world=1, is_main=True)
    layer = torch.nn.Linear(2, 2)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.full((2, 2), float("nan"))
    norm = optim.update(run, layer, make_optimizers(layer, 0.1), lr=0.1, max_grad_norm=1.0)
    assert math.isnan(norm) and torch.equal(layer.weight, before) and layer.weight.grad is None
    assert "not finite" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes", [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"activation_checkpointing": True}]
)
def test_accumulation_and_checkpointing_change_nothing_but_rounding(tmp_path, changes):
    pretrain.main(tiny_pretrain(tmp_path / "whole", steps=2))
    pretrain.main(tiny_pretrain(tmp_path / "parts", steps=2, **changes))
    assert_same_training(tmp_path / "whole", tmp_path / "parts")


def test_a_run_leaves_what_the_book_promises(tmp_path):
    figures = pretrain.main(tiny_pretrain(tmp_path, steps=7))
    for name in ("config.json", "metrics.jsonl", "ckpt.pt", "samples.txt", "curves.png", "best.pt"):
        assert (tmp_path / name).stat().st_size > 0, name
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "grad_norm", "lr", "tokens_per_second", "mfu"} <= rows[0].keys()
    assert rows[-1]["bits_per_byte"] == pytest.approx(figures["bits_per_byte"])
    assert "=== step 3 ===" in (tmp_path / "samples.txt").read_text()
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 6, 7]


@pytest.mark.parametrize(("prompt", "room"), [("x" * 100, 32), ("", 60), ("x" * 20, 44)])
def test_a_sample_goes_on_behind_its_prompt_as_far_as_there_is_room(monkeypatch, prompt, room):
    run = types.SimpleNamespace(autocast=contextlib.nullcontext, eager=contextlib.nullcontext)
    model, seen, real = Transformer(ModelConfig(261, 32, 2, 2, max_seq_len=64)), [], pretrain.generate
    monkeypatch.setattr(pretrain, "generate", lambda *args, **more: seen.append(args) or real(*args, **more))
    text = pretrain.continuation(run, model, ByteTokenizer(), prompt)
    (_, (ids,), n), *_ = seen
    assert n == room and text.startswith(prompt) and len(text) > len(prompt)
    assert ids == (ByteTokenizer().encode(prompt)[-32:] or [ByteTokenizer().eot_id])


def test_the_size_of_a_tokenizer_that_is_fixed_need_not_be_said(tmp_path):
    for size in (512, 50304):  # the default, and its own
        pretrain.check(tiny_pretrain(tmp_path, tokenizer="r50k", vocab_size=size))


def test_first_loss_is_that_of_guessing_and_training_lowers_it(tmp_path):
    pretrain.main(tiny_pretrain(tmp_path, steps=40, eval_every=40, save_every=40, lr=5e-3))
    losses = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in losses if "loss" in row]
    assert losses[0] == pytest.approx(math.log(300), abs=0.1)
    assert losses[-1] < losses[0] - 1.0


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"seq_len": 512}, "max_seq_len"),
        ({"d_model": 30, "n_heads": 4}, "n_heads"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads"),
        ({"batch_size": 0}, "batch_size"),
        ({"data": "no/such/file.txt"}, "no/such/file.txt"),
        ({"precision": "fp16"}, "fp16"),
        ({"device": "toaster"}, "toaster"),
        ({"tokenizer": "r50k", "vocab_size": 300}, "50,304"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(tmp_path, changes, word):
    with pytest.raises(UserError) as error:
        pretrain.main(tiny_pretrain(tmp_path / "run", **changes))
    assert word in str(error.value) and "\n" not in str(error.value)


def test_a_folder_with_another_run_is_not_overwritten(tmp_path):
    pretrain.main(tiny_pretrain(tmp_path / "run", steps=2))
    with pytest.raises(UserError, match="lr=0.004, now 0.1"):
        pretrain.main(tiny_pretrain(tmp_path / "run", steps=2, lr=0.1))
    pretrain.main(tiny_pretrain(tmp_path / "run", steps=2, lr=0.1, fresh=True))
    assert (tmp_path / "run.old1" / "ckpt.pt").exists() and (tmp_path / "run" / "ckpt.pt").exists()


def test_bf16_trains_too(tmp_path):
    assert math.isfinite(pretrain.main(tiny_pretrain(tmp_path, steps=2, precision="bf16"))["val_loss"])


def test_other_tokenizers_and_old_model_forms_train(tmp_path):
    old = {"positions": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "bias": True, "tie_embeddings": True}
    assert math.isfinite(pretrain.main(tiny_pretrain(tmp_path, steps=2, tokenizer="bytes", **old))["val_loss"])


def test_last_checkpoints_are_kept(tmp_path):
    pretrain.main(tiny_pretrain(tmp_path, steps=6, save_every=1, keep_last=2))
    assert sorted(p.name for p in tmp_path.glob("ckpt_*.pt")) == ["ckpt_0000005.pt", "ckpt_0000006.pt"]


def test_profile_writes_a_trace(tmp_path):
    pretrain.main(tiny_pretrain(tmp_path, steps=4, profile_steps=1))
    assert "traceEvents" in (tmp_path / "trace.json").read_text()


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rope"])
def test_a_table_of_positions_holds_a_whole_window(tmp_path, positions):
    """The last token of a window is predicted and not read, but the model is given it."""
    config = tiny_pretrain(tmp_path / "run", positions=positions, seq_len=64, max_seq_len=64, steps=1)
    if positions == "rope":
        pretrain.main(config)
        return
    with pytest.raises(UserError, match="must be above seq_len"):
        pretrain.main(config)
    assert not (tmp_path / "run").exists()
    pretrain.main(replace(config, max_seq_len=65))
