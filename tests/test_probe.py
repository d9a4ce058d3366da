import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_pretrain

import ablate
import optim
import pretrain
import probe
from data import TokenFile
from probe import gradient_norms, in_spans, loss_by_position, validation_windows
from runtime.errors import run_main
from stages import load_stage
from transformer import ModelConfig, Transformer

SHAPE = ModelConfig(vocab_size=19, d_model=16, n_layers=3, n_heads=2, max_seq_len=32)


def windows(n, length, seed=0):
    return torch.randint(19, (n, length), generator=torch.Generator().manual_seed(seed))


def test_loss_by_position_is_the_mean_surprise_of_the_next_token():
    model, tokens = Transformer(SHAPE), windows(40, 11)  # 40: more than goes through the model at once
    losses = loss_by_position(model, tokens)
    assert losses.shape == (10,) and not losses.requires_grad
    for t in range(10):
        with torch.no_grad():
            logps = model(tokens[:, : t + 1])[:, -1].double().log_softmax(-1)  # sees t+1 tokens and no more
        assert float(losses[t]) == pytest.approx(-float(logps[range(40), tokens[:, t + 1]].mean()), rel=1e-5)


def test_a_model_that_guesses_and_one_that_repeats():
    model = Transformer(SHAPE)
    with torch.no_grad():
        model.head.weight.zero_()
    assert loss_by_position(model, windows(3, 6)).tolist() == pytest.approx([math.log(19)] * 5)
    with torch.no_grad():  # nothing is added to the stream, and each token scores itself highest
        for block in model.blocks:
            block.attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.embed.weight.normal_()
        model.head.weight.copy_(20 * model.embed.weight)
    tokens = torch.tensor([[4, 4, 4, 4, 7, 7], [9, 9, 9, 9, 2, 2]])
    losses = loss_by_position(model, tokens)
    assert losses[[0, 1, 2, 4]].max() < 1e-3 and losses[3] > 10  # only the change surprises: the token after four


def test_gradient_norms_are_those_of_autograd():
    model, tokens = Transformer(SHAPE), windows(4, 9)
    model(tokens).square().sum().backward()  # what stood there before does not count
    found = gradient_norms(model, tokens)
    logps = model(tokens[:, :-1]).log_softmax(-1)
    loss = -logps.gather(-1, tokens[:, 1:, None]).mean()
    for layer, block in enumerate(model.blocks):
        parts = torch.autograd.grad(loss, list(block.parameters()), retain_graph=True)
        assert found[layer] == pytest.approx(float(torch.cat([g.flatten() for g in parts]).norm()), rel=1e-4)
    assert len(found) == 3 and all(p.grad is None for p in model.parameters())
    assert gradient_norms(model, tokens) == found  # nothing of the first call is added to the second


def test_an_expert_that_nobody_chose_has_no_gradient_to_measure():
    model = Transformer(replace(SHAPE, n_experts=8, n_experts_per_token=1))
    assert all(math.isfinite(norm) and norm > 0 for norm in gradient_norms(model, windows(1, 4)))


def test_spans_at_the_end_of_the_trained_length():
    where, losses = in_spans(torch.arange(1.0, 17.0), 4)  # the loss at position t is t
    assert where == losses == [2.5, 6.5, 10.5, 14.5]
    assert in_spans(torch.tensor([1.0, 3.0, 8.0]), 2) == ([1.5, 3.0], [2.0, 8.0])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Learned positions, whose table ends at max_seq_len."""
    folder = tmp_path_factory.mktemp("probe")
    config = tiny_pretrain(folder, seq_len=32, max_seq_len=128, positions="learned", seed=3)
    return folder, config, pretrain.main(config)


def test_the_figures_of_a_run(run):
    folder, config, figures = run
    row, curves = probe.measure(str(folder))
    assert row["val_loss"] == pytest.approx(figures["val_loss"])
    assert row["bits_per_byte"] == pytest.approx(figures["bits_per_byte"])
    model = load_stage(str(folder))[0]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert row["loss"] == [r["loss"] for r in rows if "loss" in r][-1] != rows[0]["loss"]
    assert row["parameters"] == sum(p.numel() for p in model.parameters()) and row["trained_length"] == 32
    file = TokenFile(folder / "tokens.bin")
    losses = loss_by_position(model, validation_windows(file, 512, 128))
    assert len(losses) == 127  # the last token that a table of 128 rows may be asked to predict
    assert row["near"] == pytest.approx(float(losses[16:32].mean()))  # after 17 to 32 tokens
    assert row["beyond"] == pytest.approx(float(losses[32:].mean()))
    where, spans = curves["loss@position"]
    assert len(where) == 32 and where[7] == 30.5 and spans[7] == pytest.approx(float(losses[28:32].mean()))
    batch = validation_windows(file, 4, 33)
    file.close()
    assert curves["end_gradient@layer"] == ([1, 2], gradient_norms(model, batch))
    torch.manual_seed(3)
    assert curves["start_gradient@layer"] == ([1, 2], gradient_norms(Transformer(model.config), batch))


def test_a_step_takes_the_median_of_its_repeats_and_changes_nothing(run, monkeypatch):
    folder, _, _ = run
    model, _, state = load_stage(str(folder))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    clock = iter([0, 5, 10, 11, 20, 22, 30, 33, 40, 49])  # 5, 1, 2, 3 and 9 seconds
    monkeypatch.setattr(probe.time, "process_time", lambda: next(clock))
    assert probe.step_seconds(model, state["config"], torch.randint(200, (2, 33)), n=5) == 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_step_is_one_of_the_optimizer_that_the_run_had(run, monkeypatch):
    folder, _, _ = run
    model, _, state = load_stage(str(folder))
    made = []
    monkeypatch.setattr(probe, "make_optimizers", lambda *args: made.extend(optim.make_optimizers(*args)) or made)
    probe.step_seconds(model, state["config"] | {"weight_decay": 0.25, "beta2": 0.5}, torch.randint(200, (2, 33)), n=1)
    adamw, muon = made
    assert isinstance(muon, torch.optim.Muon) and muon.param_groups[0]["lr"] == 0
    assert adamw.param_groups[0]["weight_decay"] == 0.25 and adamw.param_groups[0]["betas"] == (0.9, 0.5)
    assert all(adamw.state[p]["step"] == 1 for p in adamw.param_groups[0]["params"])


def test_curves_against_tokens_and_seconds(run, monkeypatch):
    folder, _, _ = run
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    monkeypatch.setattr(probe, "step_seconds", lambda model, settings, tokens: 0.25 * len(tokens))  # 1 second
    row, curves = probe.measure(str(folder))
    assert row["seconds"] == 6
    values = [row["val_loss"] for row in rows if "val_loss" in row]
    assert curves["val_loss"] == ([3, 6], values)
    assert curves["val_loss@tokens"] == ([384, 768], values)
    assert curves["val_loss@seconds"] == ([3, 6], values)
    assert len(curves["loss@seconds"][0]) == 6


def test_the_start_is_the_one_that_the_run_had(run):
    """The loss that the run noted before its first update is that of the weights rebuilt here."""
    folder, config, _ = run
    shape = load_stage(str(folder))[0].config
    torch.manual_seed(3)
    model = Transformer(shape)
    file = TokenFile(folder / "tokens.bin")
    starts = file.random_starts("train", config.batch_size, config.seq_len + 1, (3, 0))
    tokens = file.windows("train", starts, config.seq_len + 1)
    file.close()
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1 and first["loss"] == pytest.approx(
        float(loss_by_position(model, tokens).mean()), rel=1e-5
    )


def test_what_a_run_cannot_tell_is_left_out(run, tmp_path):
    """No length past the trained one; a last validation that was no number."""
    config = tiny_pretrain(tmp_path, seq_len=32, max_seq_len=33)
    pretrain.main(config)
    path = Path(tmp_path, "metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    last = max(i for i, row in enumerate(rows) if "val_loss" in row)
    rows[last]["val_loss"] = math.nan
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    row, curves = probe.measure(str(tmp_path))
    config = ablate.Config(stage="pretrain")
    assert ablate.figure(config, row | {"curves": curves}, "val_loss") is None  # not the mean of those before
    assert row["beyond"] is None and row["val_loss"] is None and row["bits_per_byte"] > 0
    assert len(curves["loss@position"][0]) == 8 and curves["val_loss"][0] == [3]


def test_the_script_looks_at_the_runs_it_is_given(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    pretrain.main(tiny_pretrain(folder, steps=2, max_documents=60, vocab_size=270))
    capsys.readouterr()

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["probe.py", *map(str, arguments)])
        status = 0
        try:
            run_main(probe.main)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    status, out, _ = call(folder)
    row, curves = probe.measure(str(folder))
    assert status == 0 and f"{row['parameters']:,} parameters, validation loss {row['val_loss']:.3f}" in out
    assert f"{curves['loss@position'][1][0]:8.3f}" in out and "gradient after training" in out
    assert "each row repeats" not in out
    status, out, err = call("--steps")
    assert status == 1 and "no options" in err and len(err.splitlines()) == 1
    assert "there is no checkpoint" in call(tmp_path / "nothing")[2]
    (folder / "tokens.bin").unlink()
    assert "tokens.bin is missing" in call(folder)[2]
