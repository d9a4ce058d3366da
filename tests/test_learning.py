"""Does it learn? And does it unlearn when the reward is negated? Only then are all the signs right."""

import json

import pytest
import torch
from tiny import tiny_pretrain, tiny_sft

import evaluate
import grpo
import pretrain
import sft
from grpo import Config, accumulate_gradients, group_advantages, sample_answers
from runtime.run import start
from tokenizer import ByteTokenizer
from transformer import ModelConfig, Transformer


def practise(tmp_path, sign: float, **settings) -> tuple[float, float]:
    """GRPO on a made-up task, from nothing: answer with as many letters "a" as possible. The share of "a" before and
    after."""
    tokenizer = ByteTokenizer()
    torch.manual_seed(0)
    model = Transformer(ModelConfig(tokenizer.vocab_size, 32, 1, 2, max_seq_len=32))
    with torch.no_grad():
        model.head.weight[ord("a")] = 0.3  # "a" is not too rare to begin with
        model.head.weight[ord("b")] = 0.3
    config = Config(out_dir=str(tmp_path / f"{sign}"), device="cpu", max_new_tokens=6, micro_batch_size=64, **settings)
    run = start(config, "grpo")
    optimizers = pretrain.make_optimizers(model, 5e-3)
    prompts = [[ord(c)] for c in "wxyz"]
    shares = []
    for step in range(25):
        rollout = sample_answers(model, tokenizer, prompts, 16, 6, config.temperature, seed=step)
        share = torch.tensor([text.count("a") / 6 for text in rollout.texts])
        shares.append(float(share.mean()))
        advantages = group_advantages(sign * share, 16, config.scale)
        old = None
        for _ in range(config.updates_per_rollout):
            old, _ = accumulate_gradients(run, model, rollout, advantages, config, old)
            pretrain.update(run, model, optimizers, 5e-3, 1.0)
    return shares[0], shares[-1]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": "grpo", "updates_per_rollout": 3},
        {"loss_type": "dr_grpo", "scale": "none"},
        {"loss_type": "cispo", "scale": "batch"},
        {"loss_type": "grpo", "ratio_level": "sequence", "updates_per_rollout": 2},
        {"temperature": 0.7},
    ],
    ids=str,
)
def test_the_rewarded_letter_becomes_frequent_and_with_the_reward_negated_rare(tmp_path, settings):
    before, after = practise(tmp_path, +1.0, **settings)
    assert after > before + 0.3
    before, after = practise(tmp_path, -1.0, **settings)
    assert after < 0.5 * before


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_grpo_on_the_embedded_task_rises_and_with_the_reward_negated_falls(tmp_path_factory, sign):
    """From a short pretraining and SFT, a few minutes: accuracy goes up; negated, it goes to nothing."""
    root = tmp_path_factory.mktemp(f"learning{sign}")
    pretrain.run(pretrain.Config(out_dir=str(root / "pretrain"), device="cpu", eval_every=1000))
    sft.run(sft.Config(out_dir=str(root / "sft"), init_from=str(root / "pretrain"), device="cpu"))
    grpo.run(
        grpo.Config(
            out_dir=str(root / "grpo"),
            init_from=str(root / "sft"),
            device="cpu",
            steps=40,
            eval_every=40,
            correct_weight=sign,
            eval_prompts=256,
        )  # fmt: skip
    )
    rows = [json.loads(line) for line in (root / "grpo" / "metrics.jsonl").read_text().splitlines()]
    accuracy = [row["accuracy"] for row in rows if "accuracy" in row]
    correct = [row["correct"] for row in rows if "correct" in row]
    if sign > 0:
        assert accuracy[-1] > accuracy[0] + 0.05 and sum(correct[-5:]) / 5 > sum(correct[:5]) / 5 + 0.1
    else:
        assert accuracy[-1] < 0.5 * accuracy[0] and sum(correct[-5:]) / 5 < 0.2 * sum(correct[:5]) / 5


def test_sft_teaches_the_form(tmp_path):
    """After fine-tuning, greedy answers are well-formed; the base model's are not."""
    pretrain.run(tiny_pretrain(tmp_path / "pretrain", steps=80, lr=5e-3, d_model=64, eval_every=80, save_every=80))
    sft.run(tiny_sft(tmp_path / "sft", tmp_path / "pretrain", n_examples=256, epochs=10.0, lr=5e-3, eval_every=500))
    exam = evaluate.Config(n=40, device="cpu")
    base, tuned = (evaluate.measure(str(tmp_path / name), exam) for name in ("pretrain", "sft"))
    assert base["unreadable"] > 0.9 and tuned["unreadable"] < 0.4
