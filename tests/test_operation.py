"""Nothing lost, nothing wrong accepted, every fault one line: what a run does when the machine or a file fails it."""

import errno
import json
import multiprocessing
import os
import random
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import content, tiny_pretrain, tiny_sft

import pretrain
import sft
from attention import RopeScaling
from optim import make_optimizers
from runtime import checkpoint, lock
from runtime.checkpoint import check_optimizer, load_checkpoint, read_archive
from runtime.config import read_preset
from runtime.errors import UserError, run_main
from runtime.folder import append_sample, cut_back, has_sample
from runtime.metrics import whole_row
from runtime.plots import read_metrics
from runtime.progress import printable
from stages import load_stage, shape_in
from tokenizer import load_tokenizer
from transformer import ModelConfig, Transformer
from verify import load_rewards

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of pretraining, of four steps."""
    folder = tmp_path_factory.mktemp("operation") / "run"
    pretrain.main(tiny_pretrain(folder, steps=4))
    return folder


def copy_of(run: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "metrics.jsonl", "ckpt.pt", "best.pt", "samples.txt", "tokens.bin"):
        (folder / name).write_bytes((run / name).read_bytes())
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# What a checkpoint holds


def test_no_flipped_bit_changes_a_number(run, tmp_path):
    """Each is refused in one line, or changes nothing that is read (a bit of the padding, or of a date)."""
    whole, want, refused = (run / "ckpt.pt").read_bytes(), content(load_checkpoint(run)), 0
    draw = random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path = tmp_path / "ckpt.pt"
        path.write_bytes(damaged)
        try:
            assert content(load_checkpoint(path)) == want
        except UserError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1 and "damaged" in str(error)
    assert refused > 40


def test_a_flipped_weight_is_refused_by_who_starts_from_it(run, tmp_path):
    folder = copy_of(run, tmp_path / "run")
    archive = zipfile.ZipFile(folder / "ckpt.pt")
    largest = max(archive.infolist(), key=lambda part: part.file_size)
    data = bytearray((folder / "ckpt.pt").read_bytes())
    data[largest.header_offset + 400] ^= 0x40  # behind the header and its padding: the exponent of some weight
    (folder / "ckpt.pt").write_bytes(data)
    with pytest.raises(UserError, match="checksums do not fit"):
        sft.main(tiny_sft(tmp_path / "sft", folder))


def test_a_packed_archive_is_refused(run, tmp_path):
    """PyTorch stores its parts as they are; a packed one could unpack to more than the machine holds."""
    with zipfile.ZipFile(run / "ckpt.pt") as old, zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    with pytest.raises(UserError, match="packed"):
        read_archive(tmp_path / "x.pt")


def wrong_states(saved: dict) -> list[dict]:
    """The state of an optimizer, forged in several ways."""
    first = saved["param_groups"][0]["params"][0]

    def with_moment(value):
        return saved | {"state": saved["state"] | {first: saved["state"][first] | {"exp_avg": value}}}

    moment = saved["state"][first]["exp_avg"]
    return [
        with_moment(moment[:1].clone()),
        with_moment(moment.flatten()),
        with_moment(moment.double()),
        with_moment(torch.zeros(3)),
        saved | {"state": {99: saved["state"][first]}},
        saved | {"param_groups": saved["param_groups"][:1]},
        saved | {"param_groups": [saved["param_groups"][0] | {"params": [0, 0]}, *saved["param_groups"][1:]]},
        {"state": None, "param_groups": None},
        {"state": {}, "param_groups": torch.zeros(3)},
        {},
    ]


@pytest.mark.parametrize("n", range(10))
def test_a_forged_optimizer_is_refused(n):
    """Moments of another shape than their weights let a fused kernel read and write beyond them."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    (optimizer,) = make_optimizers(model, 1e-3)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    check_optimizer(optimizer, optimizer.state_dict(), "here")
    wrong = wrong_states(optimizer.state_dict())
    assert len(wrong) == 10
    with pytest.raises(UserError, match="does not fit the model"):
        check_optimizer(optimizer, wrong[n], "here")


def test_a_model_larger_than_its_weights_is_refused(run, tmp_path):
    """Ten million blocks would be made, one by one, before the weights were found not to fit."""
    folder = copy_of(run, tmp_path / "run")
    whole = torch.load(folder / "ckpt.pt", weights_only=True)
    sizes = {"n_layers": 10**7, "vocab_size": 2**40, "d_ff": 10**9, "max_seq_len": 10**12, "rope_theta": float("nan")}
    sizes |= {"head_dim": 2**40, "qkv_bias": 3, "rope_scaling": {"factor": "x", "low": 1, "high": 4, "original": 8}}
    for name, value in (sizes | {"norm": 3, "n_layers ": 1, "n_heads": 0, "bias": "x"}).items():
        torch.save(whole | {"model_config": whole["model_config"] | {name: value}}, folder / "ckpt.pt")
        with pytest.raises(UserError, match="do(es)? not fit its weights|does not know"):
            load_stage(str(folder))
    torch.save(whole, folder / "ckpt.pt")
    load_stage(str(folder))


@pytest.mark.parametrize(
    "shape",
    [
        {"d_model": 256, "n_experts": 8},
        {"head_dim": 50, "qkv_bias": True},
        {"rope_scaling": RopeScaling(32.0, 1.0, 4.0, 8192)},
        {"window": 1024, "sinks": 700, "max_seq_len": 4096},
        {"max_seq_len": 100_000},
    ],
    ids=str,
)
def test_a_valid_shape_is_not_refused(shape):
    """Experts share d_ff out among them, and a window is no weight."""
    model = Transformer(ModelConfig(**({"vocab_size": 300, "d_model": 32, "n_layers": 1} | shape)))
    assert shape_in({"model": model.state_dict(), "model_config": vars(model.config)}, "x") == model.config


@pytest.mark.parametrize(
    "merges",
    [[[256 + i - 1, 256 + i - 1] if i else [0, 0] for i in range(60)], [[0, 300]], [[-1, 0]], [[1]], [["a", 0]], 3],
)
def test_a_forged_tokenizer_is_refused(merges):
    """Sixty merges, each of the last token with itself, would make a token of 2^60 bytes."""
    with pytest.raises(UserError, match="its tokenizer cannot be made"):
        load_tokenizer({"kind": "bpe", "merges": merges})


def test_a_tokenizer_of_more_tokens_than_the_model_has_is_refused(run, tmp_path):
    folder = copy_of(run, tmp_path / "run")
    whole = torch.load(folder / "ckpt.pt", weights_only=True)
    whole["tokenizer"]["merges"] += [[0, 0]] * 3
    torch.save(whole, folder / "ckpt.pt")
    with pytest.raises(UserError, match="more tokens than its model"):
        load_stage(str(folder))


@pytest.mark.parametrize(
    "name, value",
    [("step", 1.5), ("step", -1), ("model", {"a": 1}), ("lineage", ["x"]), ("rng", None), ("best", "x"), ("extra", [])],
)
def test_a_field_of_another_kind_is_refused(name, value, run, tmp_path):
    folder = copy_of(run, tmp_path / "run")
    torch.save(torch.load(folder / "ckpt.pt", weights_only=True) | {name: value}, folder / "ckpt.pt")
    with pytest.raises(UserError, match="cannot be what was written"):
        load_checkpoint(folder)


def test_a_damaged_random_state_ends_a_resumed_run_in_one_line(run, tmp_path):
    folder = copy_of(run, tmp_path / "run")
    state = torch.load(folder / "ckpt.pt", weights_only=True) | {"finished": False, "step": 2}
    torch.save(state | {"rng": state["rng"][:10]}, folder / "ckpt.pt")
    with pytest.raises(UserError, match="the random state in .* is damaged"):
        pretrain.main(tiny_pretrain(folder, steps=4))


def test_a_weight_decay_that_leaves_nothing_is_refused():
    """AdamW multiplies by 1 - lr · weight_decay, which is below zero from there on."""
    model = torch.nn.Linear(4, 3)
    make_optimizers(model, 1e-3, 999.0)
    with pytest.raises(UserError, match="weight_decay 1000 at lr 0.001"):
        make_optimizers(model, 1e-3, 1000.0)


def test_a_whole_number_may_stand_for_another_and_a_new_key_be_missing():
    """A preset's ``weight_decay = 0`` is 0.0 on a command line; another PyTorch may know more of an optimizer."""
    model = torch.nn.Linear(4, 3)
    (optimizer,) = make_optimizers(model, 1e-3, 0)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group |= {"weight_decay": float(group["weight_decay"]), "lr": 0}
        del group["maximize"]
    check_optimizer(optimizer, saved, "here")
    optimizer.load_state_dict(saved)
    saved["param_groups"][0]["lr"] = "0"
    with pytest.raises(UserError, match="does not fit the model"):
        check_optimizer(optimizer, saved, "here")


def test_a_forged_optimizer_ends_a_resumed_run_in_one_line(run, tmp_path):
    folder = copy_of(run, tmp_path / "run")
    state = torch.load(folder / "ckpt.pt", weights_only=True) | {"finished": False, "step": 2}
    for one in state["optimizers"][0]["state"].values():
        one["exp_avg"] = one["exp_avg"].flatten()[:1]
    torch.save(state, folder / "ckpt.pt")
    with pytest.raises(UserError, match="the optimizer in .* does not fit"):
        pretrain.main(tiny_pretrain(folder, steps=4))


def test_a_kill_between_the_last_and_the_best_is_mended(run, tmp_path):
    """The best step's checkpoint was written and its second name was not."""
    folder = copy_of(run, tmp_path / "run")
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    assert state["best_step"] == state["step"] == 4  # a run this short gets better to its end
    (folder / "best.pt").unlink()
    pretrain.main(tiny_pretrain(folder, steps=4))
    assert load_checkpoint(folder / "best.pt")["step"] == 4
    (folder / "best.pt").unlink()  # it is another name of the same bytes
    torch.save(state | {"best_step": 2}, folder / "ckpt.pt")  # the best was an earlier one: it is let alone
    (folder / "best.pt").write_text("another")
    pretrain.main(tiny_pretrain(folder, steps=4))
    assert (folder / "best.pt").read_text() == "another"


# ----------------------------------------------------------------------------------------------------------------------
# The folder


def holder(folder: str, ready, leave) -> None:
    lock.hold(Path(folder))
    ready.set()
    leave.wait(60)


@pytest.mark.skipif(lock.fcntl is None, reason="no locks on this system")
@pytest.mark.parametrize("fresh", [False, True])
def test_a_second_run_in_a_folder_is_told_who_is_there(run, tmp_path, fresh):
    folder = copy_of(run, tmp_path / "run")
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    process = context.Process(target=holder, args=(str(folder), ready, leave))
    process.start()
    assert ready.wait(60) and lock.is_held(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=f"in use by process {process.pid} on"):
        pretrain.main(tiny_pretrain(folder, steps=4, fresh=fresh))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    process.kill()  # however it ends, the folder is free
    process.join()
    assert not lock.is_held(folder)
    pretrain.main(tiny_pretrain(folder, steps=4, fresh=fresh))
    assert (tmp_path / "run.old1").exists() == fresh


@pytest.mark.skipif(lock.fcntl is None, reason="no locks on this system")
def test_who_is_refused_leaves_no_lock_behind(run, tmp_path, capsys):
    folder = copy_of(run, tmp_path / "run")
    with pytest.raises(SystemExit):
        run_main(lambda: pretrain.main(tiny_pretrain(folder, steps=4, seed=1)))
    assert "holds a run with seed" in capsys.readouterr().err and not (folder / ".lock").exists()


@pytest.mark.skipif(lock.fcntl is None, reason="no locks on this system")
def test_this_process_may_come_back(tmp_path):
    for _ in range(2):
        lock.hold(tmp_path / "run")
    assert lock.is_held(tmp_path / "run")
    lock.release(tmp_path / "run")
    assert not lock.is_held(tmp_path / "run") and not lock.is_held(tmp_path / "nowhere")


def test_without_locks_a_run_works_all_the_same(tmp_path, monkeypatch):
    """On Windows, where there is no fcntl."""
    monkeypatch.setattr(lock, "fcntl", None)
    config = tiny_pretrain(tmp_path / "new" / "run", steps=2)
    pretrain.main(config)
    pretrain.main(replace(config, fresh=True))
    assert load_checkpoint(tmp_path / "new" / "run")["finished"] and (tmp_path / "new" / "run.old1").exists()
    assert not lock.is_held(tmp_path / "new" / "run")


def test_what_a_killed_process_had_begun_to_write_is_removed(run, tmp_path):
    folder = copy_of(run, tmp_path / "run")
    (folder / ".ckpt.pt.12345.tmp").write_text("half")
    pretrain.main(tiny_pretrain(folder, steps=4))
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("fault", ["write", "fsync", "replace"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(tmp_path, monkeypatch, capsys, fault):
    """At the second checkpoint: the first one stays, nothing half-written keeps the disk full."""
    pretrain.main(tiny_pretrain(tmp_path / "whole", steps=4))
    config = tiny_pretrain(tmp_path / "run", steps=4)
    real = {"write": torch.save, "fsync": os.fsync, "replace": os.replace}
    calls = []

    def fails(*args, **kwargs):
        second = isinstance(args[0], dict) or str(args[-1]).endswith("ckpt.pt") or fault == "fsync"
        calls.append(second and (tmp_path / "run/ckpt.pt").exists())
        if calls[-1]:
            if fault == "write":
                Path(args[1]).write_text("half")
                raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real[fault](*args, **kwargs)

    place = {
        "write": (checkpoint.torch, "save"),
        "fsync": (checkpoint.os, "fsync"),
        "replace": (checkpoint.os, "replace"),
    }
    monkeypatch.setattr(*place[fault], fails)
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: pretrain.main(config))
    monkeypatch.undo()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 1 and len(said) == 1 and "could not be written" in said[0] and any(calls)
    assert not list((tmp_path / "run").glob(".*.tmp")) and load_checkpoint(tmp_path / "run")["step"] == 2
    pretrain.main(config)
    one, two = (load_checkpoint(tmp_path / name) for name in ("whole", "run"))
    assert content(one["model"]) == content(two["model"])


# ----------------------------------------------------------------------------------------------------------------------
# Figures and texts


def test_a_damaged_line_of_metrics_stops_nothing(tmp_path):
    lines = ['{"step": 1, "loss": 2.0}', "null", "[1]", '{"loss": 1}', '{"step": "x"}', '{"step": tr', "[" * 100_000]
    lines += ['{"step": 2, "loss": null}', '{"step": 3, "loss": 1.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b"\n\xff\xfe\n")
    assert read_metrics(tmp_path / "metrics.jsonl") == {"loss": ([1, 3], [2.0, 1.0])}
    cut_back(tmp_path, 2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}]
    assert whole_row('{"step": true}') is None


def test_half_of_a_surrogate_pair_can_be_written(tmp_path):
    append_sample(tmp_path, 1, "a \ud800 b")
    assert has_sample(tmp_path, 1) and "a ? b" in (tmp_path / "samples.txt").read_text()


def test_a_prompt_with_half_of_a_surrogate_pair_does_not_stop_a_run(run, tmp_path):
    rows = [{"prompt": f"say \ud800 {i}", "completion": "\udfff yes"} for i in range(60)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft.main(tiny_sft(tmp_path / "sft", run, data=str(tmp_path / "chats.jsonl")))
    assert load_checkpoint(tmp_path / "sft")["finished"]


# ----------------------------------------------------------------------------------------------------------------------
# Weights that are no numbers


def test_a_run_whose_weights_are_no_numbers_ends_with_its_last_good_checkpoint(tmp_path, monkeypatch):
    config = tiny_pretrain(tmp_path / "run", steps=6)
    update = pretrain.update

    def spoiled(run, model, optimizers, lr, max_grad_norm):
        norm = update(run, model, optimizers, lr, max_grad_norm)
        if run.saved_step >= 1:
            with torch.no_grad():
                next(model.parameters())[0, 0] = float("inf")
        return norm

    monkeypatch.setattr(pretrain, "update", spoiled)
    with pytest.raises(UserError, match="the weights are no numbers any more: .* the checkpoint of step 2 is whole"):
        pretrain.main(config)
    assert load_checkpoint(tmp_path / "run")["step"] == 2


def test_a_run_without_one_whole_gradient_is_not_called_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, most: torch.tensor(float("nan")))
    with pytest.raises(UserError, match="the gradients of the last 4 updates were no numbers"):
        pretrain.main(tiny_pretrain(tmp_path / "run", steps=4))
    assert not load_checkpoint(tmp_path / "run")["finished"]


def test_another_number_of_processes_is_said(run, tmp_path, capsys):
    folder = copy_of(run, tmp_path / "run")
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    torch.save(state | {"world": 2, "finished": False, "step": 2}, folder / "ckpt.pt")
    pretrain.main(tiny_pretrain(folder, steps=4))
    assert "note: 2 processes until here, 1 from here on" in capsys.readouterr().out


def test_who_interrupts_a_run_is_told_what_is_saved(run, tmp_path, monkeypatch, capsys):
    def interrupted(step):
        def update(*args):
            raise KeyboardInterrupt

        real, calls = pretrain.update, []
        monkeypatch.setattr(
            pretrain, "update", lambda *a: (calls.append(1), update() if len(calls) > step else real(*a))[1]
        )
        with pytest.raises(SystemExit) as stop:
            run_main(lambda: pretrain.main(tiny_pretrain(tmp_path / f"run{step}", steps=4)))
        monkeypatch.setattr(pretrain, "update", real)
        assert stop.value.code == 130
        return capsys.readouterr().err

    assert "run0 had nothing to save yet: the same command starts again" in interrupted(0)
    assert "run3 is saved at step 3, and the same command goes on from there" in interrupted(3)


def test_a_file_that_ends_the_program_is_told(tmp_path):
    """A preset or a reward file that calls sys.exit(0) would end the run in silence, with status 0."""
    (tmp_path / "p.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(UserError, match="p.py does not run: SystemExit"):
        read_preset(pretrain.Config, str(tmp_path / "p.py"))
    with pytest.raises(UserError, match="p.py does not run: SystemExit"):
        load_rewards(str(tmp_path / "p.py"))


def test_an_error_is_one_line_whatever_a_name_holds(capsys):
    def fails():
        raise UserError("there is no\nfile")

    with pytest.raises(SystemExit):
        run_main(fails)
    assert capsys.readouterr().err == "error: there is no file\n"


def test_the_script_says_it_too(run, tmp_path):
    """As a user meets it."""
    folder = copy_of(run, tmp_path / "run")
    data = bytearray((folder / "ckpt.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "ckpt.pt").write_bytes(data)
    command = [sys.executable, "evaluate.py", str(folder), "--device", "cpu", "--n", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1 and "damaged" in done.stderr


def test_half_of_a_surrogate_pair_can_be_printed():
    """As a word of the command line may hold it that is no UTF-8."""
    assert printable("a\udcffb\x1b[2J") == r"a\udcffb\x1b[2J"
