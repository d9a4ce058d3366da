import contextlib
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import load_npz
from tiny import assert_same_training, tiny_pretrain, tiny_sft

import arithmetic
import pretrain
import sft
from data import epoch_batch, pack
from runtime.errors import UserError
from runtime.run import Run
from sft import sft_loss
from stages import load_stage
from texts import load_chats
from tokenizer import ByteTokenizer, encode_chat
from transformer import ModelConfig, Transformer, token_logps


def test_loss_and_gradient_are_those_of_the_reference():
    fixture = load_npz("trl_sft")
    mask = fixture["labels"][:, 1:] != -100
    logps = fixture["logps"].clone().requires_grad_()
    loss = sft_loss(logps, mask)
    loss.backward()
    torch.testing.assert_close(loss, fixture["nll_nNone::loss"], rtol=1e-7, atol=0)
    torch.testing.assert_close(logps.grad, fixture["nll_nNone::grad"], rtol=1e-7, atol=1e-12)


def test_parts_weighted_by_their_tokens_add_up_to_the_loss_of_a_larger_batch():
    fixture = load_npz("trl_sft")
    mask = fixture["labels"][:, 1:] != -100
    part = sft_loss(fixture["logps"], mask) * mask.sum() / 10  # ten tokens count in the whole batch
    torch.testing.assert_close(part, fixture["nll_n10::loss"], rtol=1e-7, atol=0)


def test_loss_of_logits_is_that_of_transformers():
    fixture = load_npz("trl_sft")
    labels = fixture["labels"]
    logps = fixture["logits"].log_softmax(-1)[:, :-1].gather(2, labels[:, 1:, None].clamp(min=0)).squeeze(2)
    torch.testing.assert_close(sft_loss(logps, labels[:, 1:] != -100), fixture["hf_loss_mean"], rtol=1e-5, atol=0)


def test_loss_by_hand():
    logps = torch.tensor([[-1.0, -2.0, -4.0], [-8.0, -16.0, -32.0]])
    mask = torch.tensor([[0, 1, 1], [0, 0, 1]])
    assert float(sft_loss(logps, mask)) == pytest.approx((2 + 4 + 32) / 3)  # row means would give (3 + 32) / 2
    assert float(sft_loss(logps, torch.zeros_like(mask))) == 0.0


def test_loss_changes_none_of_its_inputs():
    logps, mask = torch.randn(2, 3), torch.ones(2, 3)
    before = logps.clone(), mask.clone()
    sft_loss(logps, mask)
    assert torch.equal(logps, before[0]) and torch.equal(mask, before[1])


def test_validation_is_that_of_each_conversation_alone():
    tokenizer, model = ByteTokenizer(), Transformer(ModelConfig(261, 32, 2, 2))
    chats = [arithmetic.chat(problem) for problem in arithmetic.problems(5, seed=0)]
    run = SimpleNamespace(device="cpu", autocast=contextlib.nullcontext, eager=contextlib.nullcontext)
    figures = sft.validation(run, model, pack(chats, tokenizer, 700), batch=2)
    nats = count = 0
    for chat in chats:
        ids, mask = (torch.tensor([x]) for x in encode_chat(tokenizer, chat))
        nats -= float((token_logps(model, ids) * mask[:, 1:]).sum().detach())
        count += int(mask.sum())
    assert figures["val_loss"] == pytest.approx(nats / count, rel=1e-5)


def test_the_example_by_hand(capsys):
    sft.example()
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert [row[1:] for row in rows if row[0] in ("2+3?", "<assistant>", "5", "<eot>")] == [
        ["0", "0.10", f"{math.log(0.10):.4f}"], ["0", "0.20", f"{math.log(0.20):.4f}"],
        ["1", "0.50", f"{math.log(0.50):.4f}"], ["1", "0.80", f"{math.log(0.80):.4f}"],
    ]  # fmt: skip
    assert f"= {(math.log(2) + math.log(1.25)) / 2:.4f}" in out
    assert rows[-3][-4:] == ["0.0000", "0.0000", "-0.5000", "-0.5000"]
    assert rows[-2][-4:] == ["0.0000", "0.0000", "-0.2500", "-0.1000"]  # -(1 - p) / 2


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    pretrain.main(tiny_pretrain(folder, steps=4))
    return folder


@pytest.mark.parametrize("changes", [{"micro_batch_size": 1}, {"activation_checkpointing": True}])
def test_micro_batches_change_nothing_but_rounding(tmp_path, base, changes):
    sft.main(tiny_sft(tmp_path / "whole", base))
    sft.main(tiny_sft(tmp_path / "parts", base, **changes))
    assert_same_training(tmp_path / "whole", tmp_path / "parts")


def test_fine_tuning_learns_and_remembers_where_it_came_from(tmp_path, base):
    config = tiny_sft(tmp_path, base, epochs=8.0, lr=5e-3, eval_every=5)
    figures = sft.main(config)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.75 * losses[0] and figures["perplexity"] == pytest.approx(math.exp(figures["val_loss"]))
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert [stage["stage"] for stage in state["lineage"]] == ["pretrain"] and state["finished"]
    assert "reference:" in (tmp_path / "samples.txt").read_text()
    packed = pack(load_chats("arith", "train", "", config.seed, 24), load_stage(str(base))[1], config.seq_len)
    steps = math.ceil(8 * len(packed) / 4)
    assert [row["step"] for row in rows if "val_loss" in row] == sorted({*range(5, steps, 5), steps}) and steps % 5
    for step, row in enumerate(row for row in rows if "loss" in row):
        learned = packed.loss_mask[epoch_batch(len(packed), 4, step, config.seed), 1:].sum()
        assert row["share_learned"] == pytest.approx(float(learned) / (4 * config.seq_len))


def test_the_answers_that_are_shown_fit_into_the_context(monkeypatch):
    """Questions of unlike lengths; what has no room for an answer is not asked."""
    run = SimpleNamespace(device="cpu", autocast=contextlib.nullcontext, eager=contextlib.nullcontext)
    model = Transformer(ModelConfig(261, 32, 2, 2, max_seq_len=64))
    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "7"}]
        for text in ("q" * 99, "a" * 61, "b", "c" * 62, "d", "e")
    ]
    room, real = [], sft.generate
    monkeypatch.setattr(sft, "generate", lambda *args, **more: room.append(args[2]) or real(*args, **more))
    lines = sft.answers(run, model, ByteTokenizer(), chats).splitlines()
    assert room == [1]  # behind the longest of them
    assert [line for line in lines if line.startswith("question")] == [f"question:  {x}" for x in ("a" * 61, "b", "d")]
    assert sft.answers(run, model, ByteTokenizer(), chats[:1]) == "every question is longer than the context"


def test_packing_changes_neither_the_step_nor_the_validation(tmp_path, base):
    """All conversations in one step, packed or one in each row: no conversation may see another."""
    state = torch.load(base / "ckpt.pt", weights_only=True)
    for name, weight in state["model"].items():  # an almost untrained model hardly attends: make what it sees matter
        if "attn" in name and weight.dim() == 2:
            weight.mul_(8)
    start = tmp_path / "start"
    start.mkdir()
    torch.save(state, start / "ckpt.pt")
    _, tokenizer, _ = load_stage(str(start))
    figures = []
    for packing in (True, False):
        rows = len(pack(load_chats("arith", "train", "", 0, 24), tokenizer, 256, packing))
        folder = tmp_path / str(packing)
        more = {"n_examples": 24, "packing": packing, "batch_size": rows, "epochs": 1.0, "seq_len": 256}
        last = sft.main(tiny_sft(folder, start, **more))
        first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
        figures.append([rows, first["loss"], first["grad_norm"], last["val_loss"], last["val_token_accuracy"]])
    assert figures[0][0] < figures[1][0]
    assert figures[0][1:] == pytest.approx(figures[1][1:], rel=2e-3)
    # and the validation's rows, which are packed always, have the loss of each conversation on its own
    model, tokenizer, _ = load_stage(str(tmp_path / "False"))
    run = Run(tiny_sft(tmp_path / "x", start), "sft")
    chats = load_chats("arith", "validation", "", 0, 24)[:32]
    one, many = (sft.validation(run, model, pack(chats, tokenizer, 256, packing), 8) for packing in (False, True))
    assert one == pytest.approx(many, rel=1e-5)


def test_unpacked_rows_run(tmp_path, base):
    assert math.isfinite(sft.main(tiny_sft(tmp_path / "b", base, packing=False, epochs=0.5))["val_loss"])


def test_sweep_writes_a_table_and_a_plot(tmp_path, base, capsys):
    sft.sweep(tiny_sft(tmp_path, base, sweep=(1e-4, 5e-3), epochs=1.0))
    rows = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["lr"] for row in rows] == [1e-4, 5e-3]
    best = min(rows, key=lambda row: row["val_loss"])["lr"]
    assert f"| {best:g} (best) |" in (tmp_path / "sweep.md").read_text()
    assert (tmp_path / "sweep.png").stat().st_size > 0


def test_a_missing_base_model_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match="python pretrain.py"):
        sft.main(tiny_sft(tmp_path / "run", tmp_path / "nothing"))


def test_rows_longer_than_the_context_are_refused(tmp_path, base):
    with pytest.raises(UserError, match="max_seq_len"):
        sft.main(tiny_sft(tmp_path / "run", base, seq_len=1024))
