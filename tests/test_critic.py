"""The critics of studies/critic.py, and its page's table anew from the rows."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import critic
import ppo
from runtime.checkpoint import save_checkpoint
from runtime.config import as_dict
from tokenizer import ByteTokenizer
from transformer import ModelConfig, Transformer

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "experiments" / "critic.md"
SHAPE = ModelConfig(ByteTokenizer().vocab_size, 16, n_layers=1, n_heads=2, n_kv_heads=1)


def policy() -> Transformer:
    torch.manual_seed(0)
    return Transformer(SHAPE)


@pytest.fixture
def rows():
    torch.manual_seed(1)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[:, 4:7] = True
    return torch.randint(0, 256, (3, 10)), mask


def judged(folder: Path) -> critic.OwnBody:
    """A critic that starts from a reward model, whose body is not the policy's."""
    from reward import RewardModel

    torch.manual_seed(5)
    judge = RewardModel(Transformer(SHAPE))
    state = {
        "model": judge.state_dict(), "model_config": as_dict(SHAPE), "tokenizer": ByteTokenizer().state(),
        "stage": "reward", "config": {"data": "arith", "seed": 0}, "step": 1, "lineage": [],
    }  # fmt: skip
    save_checkpoint(folder / "reward", state)
    return judge, critic.made_of("reward", folder)(policy())


def test_a_critic_from_a_reward_model_says_of_each_prefix_what_that_does(tmp_path, rows):
    tokens, mask = rows
    judge, model = judged(tmp_path)
    logps, values = model(tokens, mask, 1.0)
    told = judge.at_every_token(tokens, torch.ones_like(tokens))[:, :-1]
    torch.testing.assert_close(values, told.masked_fill(~mask, 0.0))
    torch.testing.assert_close(logps, ppo.ActorCritic(policy())(tokens, mask, 1.0)[0])
    assert all(p.requires_grad for name, p in model.body.named_parameters() if not name.startswith("head"))


@pytest.mark.parametrize("kind", ["shared", "own"])
def test_only_a_shared_body_learns_from_the_critic_s_loss(kind, tmp_path, rows):
    model = critic.made_of(kind, tmp_path)(policy())
    with torch.no_grad():
        model.value.weight.normal_()
    model(*rows, 1.0)[1].sum().backward()
    moved = sum(float(p.grad.abs().sum()) for p in model.backbone.parameters() if p.grad is not None)
    assert (moved > 0) == (kind == "shared")
    assert kind == "shared" or all(p.grad is not None for p in model.body.blocks.parameters())


def test_a_faster_head_moves_ten_times_as_far(rows):
    """One step of Adam moves each weight by the learning rate, so the value by that times the stream, and by ten times
    as much."""
    moved = {}
    for kind in ("shared", "fast"):
        model = critic.made_of(kind, Path())(policy())
        optimizer = torch.optim.Adam(model.value.parameters(), lr=1e-3, eps=1e-12)
        (model(*rows, 1.0)[1] - 1).square().sum().backward()
        optimizer.step()
        moved[kind] = model(*rows, 1.0)[1]
    torch.testing.assert_close(moved["fast"], 10 * moved["shared"])
    assert float(moved["shared"].abs().sum()) > 0


def test_a_run_puts_its_critic_in_and_takes_it_out_again(monkeypatch, tmp_path):
    kept, seen = ppo.ActorCritic, {}
    monkeypatch.setattr(critic, "load_checkpoint", lambda path: {"config": {"seed": 5}})

    def train(settings):
        seen.update(made=ppo.ActorCritic, settings=settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(ppo, "main", train)
    with pytest.raises(KeyboardInterrupt):
        critic.run(tmp_path / "seed5", "own body", critic.Config(steps=3))
    assert seen["made"] is critic.OwnBody and ppo.ActorCritic is kept
    assert (seen["settings"].seed, seen["settings"].steps, seen["settings"].value_weight) == (5, 3, 1.0)


@pytest.mark.skipif(not PAGE.with_suffix(".jsonl").exists(), reason="the page is made by studies/critic.py")
def test_the_table_of_the_page_is_that_of_its_rows():
    """Recomputed without the study's own code."""
    found = [json.loads(line) for line in PAGE.with_suffix(".jsonl").read_text().splitlines()]
    text, none = PAGE.read_text(), {r["start"]: r["accuracy"][1][-1] for r in found if r["critic"] == "none"}
    names = list(dict.fromkeys(r["critic"] for r in found))
    assert len(names) > 4
    for name in names:
        mine = [r for r in found if r["critic"] == name]
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} |")).split("|")
        foreseen = np.mean([np.mean(r["explained_variance"][1][len(r["explained_variance"][1]) // 2 :]) for r in mine])
        assert float(line[2]) == pytest.approx(foreseen, abs=6e-4)
        assert float(line[3]) == pytest.approx(np.mean([r["accuracy"][1][-1] for r in mine]), abs=6e-4)
        if name != "none":
            gain = np.mean([r["accuracy"][1][-1] - none[r["start"]] for r in mine])
            assert float(line[4].split("±")[0]) == pytest.approx(gain, abs=6e-4)
        assert int(line[5]) == len(mine)
