"""``--print_config``: what a run would do, said without doing it, and said rightly."""

import dataclasses
import doctest
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_pretrain, tiny_sft

import grpo
import pretrain
import runtime.fields
import runtime.preview as preview
import sft
from runtime import rehearsal
from runtime.config import parse, run_stage
from stages import load_stage
from transformer import token_logps

STAGES = ["pretrain", "encoder", "sft", "reward", "dpo", "kto", "ppo", "grpo", "gdpo"]
STARTS = {"sft": "pretrain"} | dict.fromkeys(["reward", "dpo", "kto", "ppo", "grpo", "gdpo"], "sft")


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A folder with a tiny pretrained and a tiny fine-tuned model, where the stages look for them."""
    out = tmp_path_factory.mktemp("chain") / "out" / "arith"
    pretrain.main(tiny_pretrain(out / "pretrain"))
    sft.main(tiny_sft(out / "sft", out / "pretrain"))
    return out.parent.parent


@pytest.fixture
def say(monkeypatch, capsys):
    """What a stage prints with ``--print_config``, run in a folder, and the status it ends with."""

    def run(folder: Path, name: str, *argv: str, stage=None) -> tuple[str, int]:
        module = importlib.import_module(name)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv, "--print_config"])
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        with pytest.raises(SystemExit) as left:
            run_stage(getattr(module, "train_or_sweep", module.main), module.Config, getattr(module, "example", None))
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before and rehearsal.now is None
        printed = capsys.readouterr()
        return (printed.out if left.value.code == 0 else printed.err), left.value.code

    return run


def facts(text: str) -> dict[str, str]:
    """The lines below the fields, by name; what was broken into lines is one line again."""
    last = re.sub(r"\n {13}", " ", text[text.index("\nRunConfig") :])
    return dict(re.findall(r"^  (folder|starts|device|model|work|memory|time) +(.*)$", last, re.MULTILINE))


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_says_what_it_would_do_without_a_start(name, tmp_path, say):
    text, code = say(tmp_path, name)
    assert code == 0
    told = facts(text)
    assert told["folder"] == f"out/arith/{name}: no run yet"
    if name in STARTS:
        start = STARTS[name]
        assert told["starts"] == f"out/arith/{start}: not there; make it with: python {start}.py"
        assert "once the checkpoint is there" in told["model"] and "memory" not in told
    else:
        assert "parameters" in told["model"] and "GFLOP/s" in told["time"] and "estimate" in told["time"]


@pytest.mark.parametrize("name", sorted(STARTS))
def test_every_stage_knows_the_size_from_the_checkpoint_it_starts_from(name, chain, say, monkeypatch):
    model = load_stage(str(chain / "out" / "arith" / STARTS[name]))[0]
    n = sum(p.numel() for p in model.parameters())
    for function in ("load_chats", "load_prompts", "load_pairs", "load_judged", "load_stage", "load_weights"):
        for module in (sys.modules[name], sys.modules["rollout"], sys.modules["stages"]):
            if hasattr(module, function):
                monkeypatch.setattr(module, function, lambda *args, **kwargs: pytest.fail("something is loaded"))
    length = {"sft": ["--seq_len", "64"]}.get(name, [])
    text, code = say(chain, name, "--out_dir", "elsewhere", *length)
    told = facts(text)
    assert code == 0 and told["model"].startswith(f"{n:,} parameters (width 32, 2 blocks, vocabulary 300, context 256)")
    assert f"out/arith/{STARTS[name]}: there, {STARTS[name]} after" in told["starts"]
    assert told["folder"] == "elsewhere: no run yet" and "a training step" in told["memory"] and "ms" in told["time"]


def test_where_each_value_comes_from(chain, say):
    (chain / "sft_mine.py").write_text('"""Mine."""\n\nlr = 0.25\nepochs = 3.0\nbatch_size = 4\n')
    text, _ = say(chain, "sft", "sft_mine.py", "--epochs", "2", "--no-packing", "--seq_len=64", "--n_examples", "9")
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in text.splitlines() if line.startswith("  ")}
    assert rows["lr"] == ["0.25", "sft_mine.py"] and rows["batch_size"] == ["4", "sft_mine.py"]
    for name, value in {"epochs": "2.0", "packing": "False", "seq_len": "64", "n_examples": "9"}.items():
        assert rows[name] == [value, "command line"]
    assert rows["weight_decay"] == ["0.01", "default"] and rows["init_from"][0] == "out/arith/pretrain"
    assert rows["init_from"][1] == "default, filled in"
    groups = [line for line in text.splitlines() if line and not line.startswith(" ")]
    assert groups == ["sft.py", "LoRARunConfig", "TrainConfig", "RunConfig", "sft"]
    listed = [line.split()[0] for line in text[: text.index("\nsft\n")].splitlines() if line.startswith("  ")]
    assert sorted(listed) == sorted(field.name for field in dataclasses.fields(sft.Config))


def test_what_the_folder_holds(tmp_path, say):
    argv = ["--out_dir", "run", "--steps", "6", "--eval_every", "3", "--d_model", "32", "--n_layers", "2"]
    argv += ["--n_heads", "2", "--n_kv_heads", "1", "--seq_len", "64", "--batch_size", "4", "--vocab_size", "300"]
    argv += ["--max_documents", "300", "--eval_windows", "8", "--warmup", "2", "--compile", "off", "--device", "cpu"]
    config = parse(pretrain.Config, argv)
    assert facts(say(tmp_path, "pretrain", *argv)[0])["folder"] == "run: no run yet"
    pretrain.main(config)  # ``say`` has changed the folder
    assert facts(say(tmp_path, "pretrain", *argv)[0])["folder"] == "run: finished (6 steps); --fresh would start again"
    told = facts(say(tmp_path, "pretrain", *argv, "--lr", "0.5")[0])["folder"]
    assert told.startswith("refused: run holds a run with lr=0.004, now 0.5")
    told = facts(say(tmp_path, "pretrain", *argv, "--lr", "0.5", "--fresh")[0])["folder"]
    assert told == "run: what is there would be moved aside"
    state = torch.load("run/ckpt.pt", weights_only=True) | {"finished": False, "step": 4}
    torch.save(state, "run/ckpt.pt")
    assert facts(say(tmp_path, "pretrain", *argv)[0])["folder"] == "run: would be continued at step 4"
    Path("run/ckpt.pt").write_text("nothing")
    assert "refused: run/ckpt.pt is damaged" in facts(say(tmp_path, "pretrain", *argv)[0])["folder"]


@pytest.mark.parametrize(
    ("name", "argv", "says"),
    [
        ("grpo", ["--kl_times_ratio"], "kl_times_ratio is for k1 or k3"),
        ("pretrain", ["--seq_len", "999"], "seq_len 999 is longer than max_seq_len 256"),
        ("sft", ["--seq_len", "999"], "seq_len 999 is more than the context of 256"),
        ("dpo", ["--max_length", "999"], "max_length 999 is more than the context of 256"),
        ("sft", ["--lora_rank", "2", "--lora_targets", "no_such"], "--lora_targets"),
        ("sft", ["--stepz", "3"], "no field 'stepz'"),
        ("pretrain", ["--device", "tpu"], "--device tpu"),
        ("sft", ["--data", "gsm8k+nowhere.jsonl"], "--data: there is no file nowhere.jsonl"),
        ("grpo", ["--eval_data", "nowhere.csv"], "--eval_data: there is no file nowhere.csv"),
    ],
)
def test_what_the_stage_would_refuse_is_refused(name, argv, says, chain, say):
    text, code = say(chain, name, *argv)
    assert code == 1 and says in text and len(text.splitlines()) == 1


def test_a_sweep_shows_its_first_run(chain, say):
    text, _ = say(chain, "sft", "--sweep", "1e-3", "1e-4")
    assert "\nsft, the first run of --sweep\n" in text and "out/arith/sft_sweep/lr_0.001: no run yet" in text


def test_programs_that_are_no_stages_print_their_fields(capsys, monkeypatch):
    with pytest.raises(SystemExit) as left:
        parse(importlib.import_module("evaluate").Config, ["a", "b", "--n", "3", "--print-config"])
    text = capsys.readouterr().out
    assert left.value.code == 0 and text.startswith("evaluate.py\n")
    assert re.search(r"^  checkpoints +a b +command line$", text, re.MULTILINE)
    assert re.search(r"^  n +3 +command line$", text, re.MULTILINE) and re.search(r"^  seed +0 +default$", text, re.M)


# ----------------------------------------------------------------------------------------------------------------------
# The numbers, against runs


def state_of(folder: Path) -> dict:
    return torch.load(folder / "ckpt.pt", weights_only=True)


def bytes_of_moments(state: dict) -> int:
    slots = [slot for optimizer in state["optimizers"] for slot in optimizer["state"].values()]
    return sum(4 * value.numel() for slot in slots for value in slot.values() if torch.is_tensor(value) and value.dim())


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw"}, {"n_experts": 4}, {"tie_embeddings": True}])
def test_the_memory_of_a_pretraining_run(tmp_path, changes):
    config = tiny_pretrain(tmp_path / "run", steps=2, eval_every=2, **changes)
    pretrain.main(config)
    shape, state = preview.shape_of_model(config), state_of(tmp_path / "run")
    model, work = preview.make_model(shape, config), preview.work_of(config, "pretrain", shape)
    assert shape == load_stage(str(tmp_path / "run"))[0].config and (work.rows, work.tokens) == (4, 64)
    parts = preview.memory_of(model, config, "pretrain", work, "fp32")
    real = load_stage(str(tmp_path / "run"))[0]
    assert parts["weights"] == parts["gradients"] == 4 * sum(p.numel() for p in real.parameters())
    assert parts["optimizer"] == bytes_of_moments(state)
    assert parts["total"] == sum(value for name, value in parts.items() if name != "total")
    if not changes:
        kept = bytes_kept(real, torch.randint(300, (work.at_once, work.tokens + 1)))
        assert 0.5 * kept < parts["activations"] + parts["logits"] < 2 * kept


def bytes_kept(model, tokens) -> int:
    """What a forward pass keeps for its backward pass, weights not counted."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor, so that its place is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_logps(model, tokens).sum()
    return sum(n for n, _ in kept.values())


@pytest.mark.parametrize("changes", [{"lora_rank": 2}, {"lora_rank": 2, "dora": True}, {"lora_targets": ("q_proj",)}])
def test_the_memory_of_adapters(tmp_path, chain, changes):
    start = chain / "out" / "arith" / "pretrain"
    config = tiny_sft(tmp_path / "run", start, epochs=0.2, **changes)
    sft.main(config)
    shape, state = preview.shape_of_model(config), state_of(tmp_path / "run")
    model, work = preview.make_model(shape, config), preview.work_of(config, "sft", shape)
    parts = preview.memory_of(model, config, "sft", work, "fp32")
    assert parts["optimizer"] == bytes_of_moments(state) == 2 * parts["gradients"]
    adapters = 4 * sum(tensor.numel() for tensor in state.get("adapters", {}).values())
    assert parts["weights"] == 4 * sum(tensor.numel() for tensor in state["model"].values()) + adapters


def test_what_a_step_of_answers_holds(chain, monkeypatch):
    config = grpo.Config(init_from=str(chain / "out" / "arith" / "sft"), prompts_per_step=8, beta=0.1)
    shape = preview.shape_of_model(config)
    work = preview.work_of(config, "grpo", shape)
    assert (work.rows, work.at_once, work.tokens, work.passes) == (32, 16, 96, 2)  # two minibatches
    model = preview.make_model(shape, config)
    parts = preview.memory_of(model, config, "grpo", work, "fp32")
    assert parts["reference"] == parts["weights"]
    halved = preview.memory_of(model, config, "grpo", work, "bf16")
    assert halved["activations"] == parts["activations"] / 2
    no_copy = dataclasses.replace(config, lora_rank=2)
    assert "reference" not in preview.memory_of(preview.make_model(shape, no_copy), no_copy, "grpo", work, "fp32")
    recomputed = dataclasses.replace(config, activation_checkpointing=True)
    assert preview.memory_of(model, recomputed, "grpo", work, "fp32")["activations"] < parts["activations"]
    once, thrice = (preview.operations_of(model, one, "grpo", work) for one in (config, recomputed))
    assert thrice == pytest.approx(once * 4 / 3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert preview.work_of(config, "grpo", shape).rows == 16


def test_a_pair_is_two_rows():
    for name, each in (("dpo", 2), ("reward", 2), ("kto", 1)):
        config = importlib.import_module(name).Config(batch_size=6, micro_batch_size=2)
        work = preview.work_of(config, name, None)
        assert (work.rows, work.at_once, work.tokens, work.exact) == (6 * each, 2 * each, 256, False)


def test_the_rate_is_that_of_this_machine():
    assert preview.measured_rate(torch.device("cpu"), "fp32", 64, 32, 96, most=0.02) > 1e6


@pytest.mark.parametrize("module", [preview, runtime.fields], ids=lambda module: module.__name__)
def test_the_examples_in_docstrings_are_true(module):
    failed, tried = doctest.testmod(module)
    assert tried and not failed
