"""A checkpoint survives a crash, and a bad file is refused in one line."""

import os
import pickle
import zipfile

import pytest
import torch

from runtime.checkpoint import FIELDS, MAGIC, find_checkpoint, load_checkpoint, save_checkpoint, write_atomically
from runtime.checkpoint import write_text as write_text_atomically
from runtime.errors import UserError

CKPT = "ckpt.pt"


def state(step: int = 1) -> dict:
    return {
        "model": {"w": torch.full((3, 2), float(step)), "b": torch.zeros(2, dtype=torch.bfloat16)},
        "model_config": {"d_model": 16, "n_kv_heads": None},
        "tokenizer": {"kind": "bpe", "merges": [[1, 2]]},
        "stage": "sft",
        "config": {"lr": 1e-3, "betas": (0.9, 0.95), "fresh": False},
        "step": step,
        "lineage": [{"stage": "pretrain"}],
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}},
        "random": torch.get_rng_state(),
    }


def refusal(path) -> str:
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    text = str(error.value)
    assert len(text.splitlines()) == 1 and str(path) in text
    return text


def leftovers(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


# ----------------------------------------------------------------------------------------------------------------------
# What is written is read


def test_a_checkpoint_is_read_back(tmp_path):
    path = save_checkpoint(tmp_path / "new" / "folder", state(7))
    assert path == tmp_path / "new" / "folder" / CKPT and leftovers(path.parent) == []
    read = load_checkpoint(path)
    assert read["magic"] == MAGIC and read["step"] == 7 and read["config"] == state(7)["config"]
    assert read["model"]["w"].equal(state(7)["model"]["w"]) and read["model"]["b"].dtype == torch.bfloat16
    assert set(read) == {"magic", *state()}
    assert torch.load(path, weights_only=True)["step"] == 7  # plain PyTorch reads it too, without running code


def test_the_callers_dictionary_is_not_changed(tmp_path):
    mine = state()
    save_checkpoint(tmp_path, mine)
    assert "magic" not in mine


def test_a_folder_means_its_checkpoint(tmp_path):
    save_checkpoint(tmp_path, state(3))
    assert load_checkpoint(tmp_path)["step"] == load_checkpoint(str(tmp_path))["step"] == 3
    assert find_checkpoint(tmp_path / "best.pt").name == "best.pt"
    assert find_checkpoint("out/arith/sft").name == CKPT


# ----------------------------------------------------------------------------------------------------------------------
# Crashes


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    write_text_atomically(path, "old")

    def fails(temporary):
        assert temporary != path and temporary.parent == path.parent
        temporary.write_text("half of the ne")
        raise OSError("the disk is full")

    with pytest.raises(UserError, match=r"could not be written \(the disk is full\)$"):
        write_atomically(path, fails)
    assert path.read_text() == "old" and leftovers(tmp_path) == []
    write_text_atomically(path, "new")
    assert path.read_text() == "new" and leftovers(tmp_path) == []


def test_a_crash_in_the_middle_of_saving_keeps_the_last_good_one(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, state(1), best=True)
    real = torch.save

    def crashes(value, file):
        real(value, file)
        with open(file, "rb+") as half:
            half.truncate(100)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", crashes)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, state(2), best=True)
    assert load_checkpoint(tmp_path)["step"] == load_checkpoint(tmp_path / "best.pt")["step"] == 1
    save_checkpoint(tmp_path, state(3))
    assert load_checkpoint(tmp_path)["step"] == 3 and leftovers(tmp_path) == []


def test_the_bytes_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("fsync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("replace") or replace(*names))
    write_text_atomically(tmp_path / "file.txt", "text")
    assert calls[:2] == ["fsync", "replace"]


# ----------------------------------------------------------------------------------------------------------------------
# Several checkpoints


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_one_checkpoint_by_default(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, state(step))
    assert names(tmp_path) == [CKPT] and load_checkpoint(tmp_path)["step"] == 3


def test_keep_last(tmp_path):
    (tmp_path / "ckpt_mine.pt").write_text("not one of ours")
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, state(step), keep_last=2)
    assert names(tmp_path) == [CKPT, "ckpt_0000010.pt", "ckpt_0000011.pt", "ckpt_mine.pt"]
    for name, step in [("ckpt_0000010.pt", 10), ("ckpt_0000011.pt", 11), (CKPT, 11)]:
        assert load_checkpoint(tmp_path / name)["step"] == step


def test_best_stays_while_the_run_goes_on(tmp_path):
    """best.pt is a second name for the same bytes; the next ckpt.pt must not write into them."""
    save_checkpoint(tmp_path, state(1), best=True)
    assert os.path.samefile(tmp_path / CKPT, tmp_path / "best.pt")
    save_checkpoint(tmp_path, state(2))
    save_checkpoint(tmp_path, state(3))
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 1 and load_checkpoint(tmp_path)["step"] == 3
    assert (load_checkpoint(tmp_path / "best.pt")["model"]["w"] == 1).all()
    save_checkpoint(tmp_path, state(4), best=True)
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 4 and names(tmp_path) == ["best.pt", CKPT]


def test_without_links_a_copy(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("not on this file system")

    monkeypatch.setattr(os, "link", no_links)
    save_checkpoint(tmp_path, state(1), keep_last=2, best=True)
    save_checkpoint(tmp_path, state(2), keep_last=2)
    assert load_checkpoint(tmp_path / "best.pt")["step"] == load_checkpoint(tmp_path / "ckpt_0000001.pt")["step"] == 1
    assert not os.path.samefile(tmp_path / CKPT, tmp_path / "ckpt_0000002.pt")


# ----------------------------------------------------------------------------------------------------------------------
# Files that are refused


def test_a_missing_file(tmp_path):
    assert "there is no checkpoint" in refusal(tmp_path / "nothing.pt")
    with pytest.raises(UserError, match="there is no checkpoint .*ckpt.pt"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(tmp_path, keep):
    path = save_checkpoint(tmp_path, state())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    assert "damaged" in refusal(path)


def test_flipped_bytes(tmp_path):
    """The archive's own table is intact, the record of the dictionary is not."""
    path = save_checkpoint(tmp_path, state())
    with zipfile.ZipFile(path) as archive:
        start = next(i.header_offset for i in archive.infolist() if i.filename.endswith("data.pkl"))
    data = bytearray(path.read_bytes())
    for i in range(start + 120, start + 320):
        data[i] ^= 0xFF
    path.write_bytes(data)
    refusal(path)


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 1000, bytes(range(256)) * 50, b"#!/bin/sh\necho hello\n", b"PK\x03\x04"]
)
def test_random_bytes(tmp_path, content):
    path = tmp_path / CKPT
    path.write_bytes(content)
    assert "damaged or not a checkpoint" in refusal(path)


@pytest.mark.parametrize("error", [RuntimeError("a frame\nof many\nlines"), EOFError()])
def test_whatever_torch_says_is_one_line(tmp_path, monkeypatch, error):
    path = save_checkpoint(tmp_path, state())

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fails)
    assert f"damaged: {type(error).__name__}" in refusal(path)


def test_a_dictionary_that_was_cut_off_inside_the_archive(tmp_path):
    path = save_checkpoint(tmp_path, state())
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    for keep in (0, 50, 300):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in records.items():
                archive.writestr(name, data[:keep] if name.endswith("data.pkl") else data)
        refusal(path)


def test_a_zip_of_something_else(tmp_path):
    path = tmp_path / CKPT
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "damaged" in refusal(path)


@pytest.mark.parametrize(
    "foreign", [{"w": torch.zeros(2)}, [1, 2], torch.zeros(3), {"magic": "alignbook checkpoint 0"}]
)
def test_a_foreign_file(tmp_path, foreign):
    torch.save(foreign, tmp_path / CKPT)
    assert "is not an alignbook checkpoint" in refusal(tmp_path / CKPT)


@pytest.mark.parametrize("field", FIELDS)
def test_a_lacking_field(tmp_path, field):
    short = {k: v for k, v in state().items() if k != field}
    torch.save({"magic": MAGIC, **short}, tmp_path / CKPT)
    assert refusal(tmp_path / CKPT).endswith(f"lacks {field}")


class Runs:
    """Unpickling it calls ``function(argument)``."""

    def __init__(self, function, argument):
        self.call = (function, (argument,))

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function, word", [(os.system, "touch {}"), (exec, "open({!r}, 'w')"), (os.mkdir, "{}")])
def test_code_is_refused_and_not_run(tmp_path, function, word):
    marker = str(tmp_path / "marker")
    code = Runs(function, word.format(marker))
    torch.save({"magic": MAGIC, **state(), "extra": code}, tmp_path / CKPT)
    text = refusal(tmp_path / CKPT)
    assert function.__name__ in text and "could run code" in text
    assert not os.path.exists(marker)
    torch.load(tmp_path / CKPT, weights_only=False)  # the file is a real attack: read without care it runs
    assert os.path.exists(marker)


def test_a_bare_pickle_with_code_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / CKPT).write_bytes(pickle.dumps(Runs(os.mkdir, str(marker))))
    refusal(tmp_path / CKPT)
    assert not marker.exists()


def test_a_whole_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / CKPT)
    assert "more than tensors and plain values" in refusal(tmp_path / CKPT)
