"""A model of any form goes through every stage, and into a conversation: dense, with experts, with adapters, with a
window, with other positions and norms."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny import but_slow, tiny_pretrain, tiny_sft

import chat
import dpo
import evaluate
import gdpo
import grpo
import ppo
import pretrain
import reward
import sft
from runtime.checkpoint import load_checkpoint
from stages import load_stage

FORMS = {
    "experts": {"n_experts": 4, "d_expert": 16},
    "hybrid": {"n_experts": 4, "expert_layers": (1,), "n_shared_experts": 1, "router": "sigmoid", "balance": "bias"},
    "window": {"window": 12, "sinks": 2},
    "experts with a window": {"n_experts": 4, "window": 12},
    "adapters": {},
    "experts with adapters": {"n_experts": 4, "d_expert": 16},
    "as GPT-2 with adapters": {"positions": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True},
    "as GPT-2": {"positions": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True, "tie_embeddings": True},
}
SHORT = {"eval_every": 1, "log_every": 1, "device": "cpu"}


@pytest.fixture(scope="module", params=but_slow(FORMS, "experts", "window"))
def chain(request, tmp_path_factory):
    """Every stage, a step or two each, from the one before."""
    root = tmp_path_factory.mktemp("form")
    lora = {"lora_rank": 2, "lr": 1e-2} if "adapters" in request.param else {}
    pretrain.main(tiny_pretrain(root / "pretrain", steps=2, max_seq_len=192, **FORMS[request.param]))
    sft.main(tiny_sft(root / "sft", root / "pretrain", seq_len=128, epochs=0.4, **lora))
    start = {"init_from": str(root / "sft")} | SHORT
    pairs = {"data": "arith", "n_pairs": 8, "batch_size": 4, "epochs": 0.5, "max_length": 128}
    answers = {"max_new_tokens": 8, "eval_prompts": 4, "n_prompts": 16, "steps": 1}
    dpo.main(dpo.Config(out_dir=str(root / "dpo"), **start, **pairs, **lora))
    judging = {"eval_pairs": 8, "n_sums": 0, "normalize_on": 4, "max_new_tokens": 8}
    reward.main(reward.Config(out_dir=str(root / "reward"), **start, **pairs, **judging))
    ppo.main(ppo.Config(out_dir=str(root / "ppo"), reward=str(root / "reward"), prompts_per_step=4, **start, **answers))
    groups = {"prompts_per_step": 2, "group_size": 4, "beta": 0.05} | answers
    grpo.main(grpo.Config(out_dir=str(root / "grpo"), **start, **groups, **lora))
    gdpo.main(gdpo.Config(out_dir=str(root / "gdpo"), **start, **groups))  # on adapters that are merged by now
    return root, FORMS[request.param]


def test_every_stage_keeps_the_form(chain):
    root, form = chain
    shapes = {name: load_checkpoint(root / name)["model_config"] for name in ("pretrain", "sft", "dpo", "ppo", "grpo")}
    for shape in shapes.values():
        assert shape == shapes["pretrain"]
        for name, value in form.items():
            if name in shape:
                assert shape[name] == value
    fresh = load_stage(str(root / "pretrain"))[0].state_dict()
    for name in ("sft", "dpo", "ppo", "grpo", "gdpo"):
        trained = load_stage(str(root / name))[0].state_dict()
        assert trained.keys() == fresh.keys()
        assert any(not torch.equal(trained[key], fresh[key]) for key in fresh)


def test_every_stage_can_be_examined(chain):
    root, _ = chain
    for name in ("sft", "dpo", "ppo", "grpo", "gdpo"):
        figures = evaluate.measure(str(root / name), evaluate.Config(n=4, max_new_tokens=8, device="cpu"))
        assert 0 <= figures["accuracy"] <= 1


def test_every_stage_talks(chain, monkeypatch, capsys):
    root, form = chain
    for name in ("pretrain", "sft", "dpo", "ppo", "grpo", "gdpo"):
        arguments = ["--prompt", "Tom has 4", "--max_new_tokens", "20", "--seed", "0", "--device", "cpu"]
        raw = ["--raw"] if name == "pretrain" else []
        monkeypatch.setattr(sys, "argv", ["chat.py", str(root / name), *arguments, *raw])
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        chat.main()
        text = capsys.readouterr().out
        assert text.removeprefix("Tom has 4" if raw else "").strip(), name


def test_every_figure_is_explained(chain):
    """Each name in the stages' metrics.jsonl stands once in the first column of a table of docs/metrics.md."""
    root, _ = chain
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    explained = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert len(set(explained)) >= 45
    for path in root.glob("*/metrics.jsonl"):
        for line in path.read_text().splitlines():
            for name in json.loads(line):
                name = re.sub(r"^load_\d+_\d+$", "load_L_E", name)
                known = name in explained or name.startswith("val_") and name.removeprefix("val_") in explained
                assert known, f"{path.parent.name}: {name}"
