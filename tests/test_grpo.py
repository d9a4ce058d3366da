import contextlib
import dataclasses
import json
import math
import re
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import load_json, load_npz
from tiny import llama_tiny, tiny_pretrain, tiny_sft

import grpo
import pretrain
import rollout as rollout_module
import sft
from data import encode_prompts
from grpo import (
    Config,
    accumulate_gradients,
    group_advantages,
    grpo_loss,
    kl_estimate,
    loss_normalizer,
    sample_answers,
)
from optim import learning_rate
from rollout import join, micro_batches, minibatches
from runtime.config import read_preset
from runtime.errors import UserError
from stages import load_stage
from texts import Prompt, load_prompts
from tokenizer import ByteTokenizer, encode_chat
from transformer import ModelConfig, Transformer, token_logps
from watch import Alarm, UpdateSums, flat_groups, report_start, sampler_gap

NUMBERS = load_npz("trl_grpo_loss")
OURS = ("grpo", "dapo", "dr_grpo", "cispo")
CASES = [
    case
    for case in load_json("trl_grpo_loss.meta.json")["cases"]
    if case["loss_type"] in OURS and not {"delta", "quantile", "off_policy"} & case.keys()
]


def options(case: dict) -> dict:
    """A case of TRL's options in our names. TRL's CISPO bound is the ratio itself, ours its distance from 1; its KL
    is k3 · ratio by default."""
    high = case.get("eps_high")
    low = case.get("eps", 0.2)
    return {
        "loss_type": case["loss_type"],
        "ratio_level": case.get("level", "token"),
        "clip_low": low,
        "clip_high": (high - 1 if case["loss_type"] == "cispo" else high) if high is not None else low,
        "beta": case.get("beta", 0.0),
        "kl_times_ratio": case.get("bias_corr", True),
        "max_length": case.get("max_len", 16),
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_loss_and_gradient_are_those_of_trl(case):
    logps = NUMBERS["logps"].clone().requires_grad_()
    old = logps.detach() if case["on_policy"] else NUMBERS["old_logps"]
    loss = grpo_loss(logps, old, NUMBERS["advantages"], NUMBERS[case["mask"]], NUMBERS["ref_logps"], **options(case))
    assert loss.shape == ()
    loss.backward()
    torch.testing.assert_close(loss, NUMBERS[f"{case['name']}::loss"], rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(logps.grad, NUMBERS[f"{case['name']}::grad"], rtol=1e-7, atol=1e-10)


def test_the_cases_cover_every_loss_type_and_level():
    assert {(case["loss_type"], case.get("level", "token")) for case in CASES} == {
        (loss_type, level) for loss_type in OURS for level in ("token", "sequence")
    }


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradient_by_finite_differences(loss_type, level):
    f = lambda x: grpo_loss(  # noqa: E731
        x, NUMBERS["old_logps"], NUMBERS["advantages"], NUMBERS["mask"], NUMBERS["ref_logps"], 0.1,
        loss_type=loss_type, ratio_level=level, max_length=16,
    )  # fmt: skip
    assert torch.autograd.gradcheck(f, (NUMBERS["logps"].clone().requires_grad_(),), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("high", [9.0, 0.05])
def test_gradient_of_cispo_is_that_of_log_pi_times_a_fixed_weight(level, high):
    """A detached ratio has no finite difference; with the weight held fixed, the loss is linear."""
    logps, old, mask = NUMBERS["logps"].clone().requires_grad_(), NUMBERS["old_logps"], NUMBERS["mask"]
    grpo_loss(logps, old, NUMBERS["advantages"], mask, loss_type="cispo", ratio_level=level, clip_high=high).backward()
    change = (logps.detach() - old) * mask
    if level == "sequence":
        change = change.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    weight = change.exp().clamp(max=1 + high)
    assert bool((change.exp() > 1.05).any()) and bool((change.exp() < 0.8).any() or level == "sequence")
    torch.testing.assert_close(logps.grad, -weight * NUMBERS["advantages"][:, None] * mask / mask.sum())


def test_loss_by_hand():
    # Two answers, three tokens, the second token of the second answer is padding. Ratios 1.5 and 0.5, clip 0.2.
    old = torch.zeros(2, 2, dtype=torch.float64)
    logps = torch.tensor([[1.5, 0.5], [1.5, 1.0]], dtype=torch.float64).log()
    mask = torch.tensor([[1, 1], [1, 0]])
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    # A > 0: 1.5 is clipped to 1.2, 0.5 stays 0.5 (the minimum). A < 0: -1.5 stays -1.5 (the minimum again, not -1.2).
    terms = [-1.2, -0.5, 1.5]
    assert float(grpo_loss(logps, old, advantages, mask)) == pytest.approx(sum(terms) / 3)
    assert float(grpo_loss(logps, old, advantages, mask, loss_type="grpo")) == pytest.approx(
        ((-1.2 - 0.5) / 2 + 1.5) / 2
    )
    dr = grpo_loss(logps, old, advantages, mask, loss_type="dr_grpo", max_length=10)
    assert float(dr) == pytest.approx(sum(terms) / 20)
    cispo = grpo_loss(logps, old, advantages, mask, loss_type="cispo")
    assert float(cispo) == pytest.approx((-1.2 * math.log(1.5) - 0.5 * math.log(0.5) + 1.2 * math.log(1.5)) / 3)


@pytest.mark.parametrize("loss_type", OURS)
def test_the_ratio_of_an_answer_of_one_token_is_that_of_the_token(loss_type):
    """Wherever it stands; and an answer without a token neither counts nor spoils the others."""
    logps = torch.log(torch.tensor([[1.3, 9.0], [9.0, 0.6], [0.9, 9.0], [9.0, 9.0]], dtype=torch.float64))
    mask, advantages = torch.tensor([[1, 0], [0, 1], [1, 0], [0, 0]]), torch.tensor([1.0, -2.0, -0.5, 7.0])
    found, gradient = {}, {}
    for level in ("sequence", "token"):
        x = logps.clone().requires_grad_()
        found[level] = grpo_loss(
            x, torch.zeros_like(x), advantages, mask, clip_low=0.2, clip_high=0.2, loss_type=loss_type, max_length=5,
            ratio_level=level,
        )  # fmt: skip
        (gradient[level],) = torch.autograd.grad(found[level], x)
    torch.testing.assert_close(found["sequence"], found["token"])
    torch.testing.assert_close(gradient["sequence"], gradient["token"])
    worst = -1.2 + 2 * 0.8 + 0.5 * 0.9  # the first two are clipped
    by_hand = {"grpo": worst / 4, "dapo": worst / 3, "dr_grpo": worst / 20}
    if loss_type in by_hand:
        assert found["token"].item() == pytest.approx(by_hand[loss_type])


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", OURS)
def test_no_gradient_flows_into_what_was_there_before(loss_type, level):
    """Even if old and reference log-probabilities are the very tensor that learns: then all ratios are 1, the KL is 0,
    and the gradient is that of the advantage alone."""
    logps, mask = torch.full((2, 3), -1.0, requires_grad=True), torch.tensor([[1, 1, 0], [1, 1, 1]])
    advantages = torch.tensor([2.0, -3.0])
    loss = grpo_loss(
        logps, logps, advantages, mask, logps, beta=0.5, loss_type=loss_type, ratio_level=level, max_length=4, kl="k1"
    )
    loss.backward()
    pulled = advantages[:, None] * mask - 0.5 * mask  # k1 of a constant reference has the gradient 1
    counts = {"grpo": 2 * mask.sum(1, keepdim=True), "dr_grpo": 2 * 4}.get(loss_type, 5)
    torch.testing.assert_close(logps.grad, -pulled / counts)


def test_loss_changes_none_of_its_inputs():
    inputs = [NUMBERS[n].clone() for n in ("logps", "old_logps", "advantages", "mask", "ref_logps")]
    before = [x.clone() for x in inputs]
    grpo_loss(*inputs, beta=0.1)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))


@pytest.mark.parametrize("loss_type", OURS)
def test_parts_with_the_normalizer_of_the_whole_add_up(loss_type):
    n = NUMBERS
    whole = grpo_loss(n["logps"], n["old_logps"], n["advantages"], n["mask"], loss_type=loss_type, max_length=16)
    normalizer = loss_normalizer(n["mask"], loss_type)
    parts = [
        grpo_loss(
            n["logps"][i : i + 1], n["old_logps"][i : i + 1], n["advantages"][i : i + 1], n["mask"][i : i + 1],
            loss_type=loss_type, max_length=16, normalizer=normalizer,
        )
        for i in range(4)
    ]  # fmt: skip
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("meta", load_json("advantages_grpo_gdpo.meta.json")["sets"], ids=lambda meta: meta["name"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_those_of_trl(meta, scale):
    numbers = load_npz("advantages_grpo_gdpo")
    rewards = numbers[f"{meta['name']}::rewards"]
    checked = 0
    for w in ("w1", "w2"):
        key = f"{meta['name']}::{w}::trl_sum_then_normalize_{scale}"
        if key in numbers:
            total = (rewards * numbers[f"{meta['name']}::{w}::weights"]).nansum(dim=1)
            total[rewards.isnan().all(dim=1)] = float("nan")  # no reward at all: unknown
            torch.testing.assert_close(group_advantages(total, meta["G"], scale), numbers[key], rtol=1e-4, atol=1e-4)
            checked += 1
    assert checked


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 5.0, 5.0, 5.0, 5.0])
    ours = group_advantages(rewards, 4)
    std = math.sqrt((0.75**2 + 3 * 0.25**2) / 3)  # the sample's
    assert ours.tolist() == pytest.approx([0.75 / (std + 1e-4)] + [-0.25 / (std + 1e-4)] * 3 + [0.0] * 4)
    assert not ours.isnan().any()
    with pytest.raises(ValueError):
        group_advantages(rewards, 1)


@pytest.mark.parametrize("size", [3, 7, 8, 10, 12, 16])
@pytest.mark.parametrize("reward", [0.1, 1.1, 1 / 3])
def test_flat_groups_are_exactly_zero_however_their_mean_rounds(size, reward):
    for scale in ("group", "batch", "none"):
        assert not group_advantages(torch.full((4 * size,), reward), size, scale).any()


def test_advantages_have_no_gradient_and_groups_are_contiguous():
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0], requires_grad=True)
    assert not group_advantages(rewards, 2).requires_grad
    assert group_advantages(rewards, 2).tolist() == [0.0] * 4  # (1,1) and (0,0), not (1,0) and (1,0)


def test_kl_estimates_are_right_on_average():
    logits, ref = torch.randn(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    p, logp, logq = logits.softmax(0), logits.log_softmax(0), ref.log_softmax(0)
    true = (p * (logp - logq)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p * kl_estimate(logp, logq, kind)).sum(), true)
    assert (kl_estimate(logp, logq, "k3") >= 0).all() and (kl_estimate(logp, logq, "k2") >= 0).all()


def test_expected_gradients_of_the_kl_estimates():
    """As a loss, k1's is zero and k2's is that of the KL; k3's becomes so when weighed by the ratio."""
    logits, ref = torch.randn(7, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64)
    p, logq = logits.softmax(0), ref.log_softmax(0)

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    logp = logits.log_softmax(0)
    true = gradient((p * (logp - logq)).sum())
    expected = {kind: gradient((p.detach() * kl_estimate(logp, logq, kind)).sum()) for kind in ("k1", "k2", "k3")}
    torch.testing.assert_close(expected["k1"], torch.zeros(7, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(expected["k2"], true)
    assert (expected["k3"] - true).abs().max() > 1e-2
    ratio = (logp - logp.detach()).exp()
    torch.testing.assert_close(gradient((p.detach() * ratio * kl_estimate(logp, logq, "k3")).sum()), true)


def e2e() -> tuple[dict, torch.Tensor, torch.Tensor, Transformer]:
    """The rows of grpo_e2e_llama as ours: [prompt | answer | padding], without padding on the left."""
    f = load_npz("grpo_e2e_llama")
    model = llama_tiny(f, "policy::")
    rows, masks = [], []
    for prompt, real, answer, counts in zip(
        f["prompt_ids"], f["prompt_mask"], f["completion_ids"], f["completion_mask"]
    ):
        ids = torch.cat([prompt[real.bool()], answer[counts.bool()]])
        mask = torch.cat([torch.zeros(int(real.sum())), torch.ones(int(counts.sum()))])
        rows.append(torch.nn.functional.pad(ids, (0, 9 - len(ids))))
        masks.append(torch.nn.functional.pad(mask, (0, 9 - len(mask))).bool())
    return f, torch.stack(rows), torch.stack(masks)[:, 1:], model


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dapo", {}),
        ("grpo", {"loss_type": "grpo"}),
        ("dr_grpo", {"loss_type": "dr_grpo"}),
        ("gspo", {"loss_type": "grpo", "ratio_level": "sequence"}),
        ("dapo_kl_bias", {"kl_times_ratio": True, "beta": 0.04}),
    ],
)
def test_from_tokens_to_gradient_as_trl_does_it(name, settings):
    f, tokens, mask, model = e2e()
    temperature = float(f["temperature"])
    logps = token_logps(model, tokens, temperature, where=mask)
    counted = f["completion_mask"].bool()
    torch.testing.assert_close(logps[mask].detach(), f["logps"][counted], rtol=0, atol=1e-4)
    old = torch.zeros_like(logps).masked_scatter(mask, f["old_logps"][counted])
    loss = grpo_loss(logps, old, f["advantages"], mask, old, max_length=5, **settings)
    torch.testing.assert_close(loss.detach(), f[f"{name}::loss"], rtol=1e-4, atol=1e-5)
    loss.backward()
    torch.testing.assert_close(model.head.weight.grad, f[f"{name}::grad_lm_head"], rtol=1e-3, atol=1e-5)
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert float(norm) == pytest.approx(float(f[f"{name}::grad_norm"]), rel=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Rollouts and updates


class StubRun:
    """As much of a run as the update needs."""

    precision, device = "fp32", torch.device("cpu")
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    autocast = staticmethod(contextlib.nullcontext)


TOKENIZER = ByteTokenizer()


@pytest.fixture
def policy():
    torch.manual_seed(3)
    model = Transformer(ModelConfig(TOKENIZER.vocab_size, 32, 2, 2, max_seq_len=64))
    with torch.no_grad():
        model.head.weight.mul_(6)  # an untrained head is nearly uniform: sharpen it, so that temperature shows
    return model


def rollout_of(policy, temperature=0.7, n=4, new=12):
    return sample_answers(policy, TOKENIZER, [[65, 66, 67], [68], [69, 70]], n, new, temperature, seed=1)


def test_rollout_rows_are_prompt_answer_padding(policy):
    rollout = rollout_of(policy)
    assert len(rollout) == 12 and rollout.mask.shape == (12, rollout.tokens.shape[1] - 1)
    for i, prompt in enumerate([[65, 66, 67]] * 4 + [[68]] * 4 + [[69, 70]] * 4):
        row, mask = rollout.tokens[i].tolist(), rollout.mask[i].tolist()
        assert row[: len(prompt)] == prompt
        answer = [t for t, m in zip(row[1:], mask) if m]
        assert mask[: len(prompt) - 1] == [False] * (len(prompt) - 1) and mask[len(prompt) - 1]
        assert (answer[-1] == TOKENIZER.eot_id) == bool(rollout.finished[i])
        assert row[len(prompt) + len(answer) :] == [TOKENIZER.pad_id] * (len(row) - len(prompt) - len(answer))
        text = answer[:-1] if rollout.finished[i] else answer
        assert rollout.texts[i] == TOKENIZER.decode(text)


def test_the_stop_token_counts(policy):
    with torch.no_grad():
        policy.head.weight[TOKENIZER.eot_id] = policy.head.weight.mean(0) + 0.5  # make ends frequent
    rollout = rollout_of(policy, temperature=1.0)
    ended = rollout.finished.nonzero().squeeze(1)
    assert len(ended)
    for i in ended:
        column = int(rollout.mask[i].nonzero().max())
        assert rollout.tokens[i, column + 1] == TOKENIZER.eot_id and rollout.sampled_logps[i, column] != 0


def test_rollouts_of_unequal_width_are_joined_with_padding_on_the_right(policy):
    narrow, wide = (
        sample_answers(policy, TOKENIZER, [[65] * n, [66]], 2, new, 1.0, seed=1) for n, new in ((1, 3), (4, 6))
    )
    both = join([narrow, wide], TOKENIZER.pad_id)
    width = narrow.tokens.shape[1]
    assert both.tokens.shape[1] == wide.tokens.shape[1] > width and both.texts == narrow.texts + wide.texts
    for name, n, filler in (
        ("tokens", width, TOKENIZER.pad_id),
        ("mask", width - 1, 0),
        ("sampled_logps", width - 1, 0),
    ):
        one, two, joined = (getattr(rollout, name) for rollout in (narrow, wide, both))
        assert torch.equal(joined[:4, :n], one) and torch.equal(joined[4:], two) and (joined[:4, n:] == filler).all()
    assert torch.equal(both.finished, torch.cat([narrow.finished, wide.finished]))


def test_an_examination_of_many_questions_judges_each_by_its_own_gold(policy, monkeypatch):
    """More than are answered at a time."""
    asked = []

    def judged(texts, golds, finished, *_):
        asked.extend(golds)
        assert len(texts) == len(golds)
        return torch.tensor([[float(gold % 3 == i) for gold in golds] for i in range(2)]).unbind()

    monkeypatch.setattr(rollout_module, "score", judged)
    run = StubRun()
    run.eager = contextlib.nullcontext
    prompts = [SimpleNamespace(gold=i) for i in range(131)]
    accuracy = rollout_module.greedy_accuracy(run, policy, TOKENIZER, [[65]] * 131, prompts, 1)
    assert asked == list(range(131)) and accuracy == pytest.approx(44 / 131)
    more = rollout_module.answer_greedily(policy, TOKENIZER, [[65]] * 131, range(131), 2)
    assert more == {"accuracy": accuracy, "unreadable": pytest.approx(87 / 131), "cut_off": 1.0, "tokens": 2.0}


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_the_policy_that_samples_is_the_policy_that_trains(policy, temperature):
    rollout = rollout_of(policy, temperature)
    logps = token_logps(policy, rollout.tokens, temperature, where=rollout.mask)
    torch.testing.assert_close(logps, rollout.sampled_logps, rtol=0, atol=1e-5)


def gradients(policy, rollout, advantages, config, **more):
    policy.zero_grad()
    old = more.pop("old_logps", None)
    old = grpo.policy_logps(StubRun(), policy, rollout, config) if old is None else old  # nothing has moved yet
    statistics = accumulate_gradients(StubRun(), policy, rollout, advantages, config, old, **more)
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]), old, statistics


def test_the_answers_to_a_question_stay_together():
    """In every minibatch whole, and side by side in the micro-batches, whose rows are otherwise by length."""
    parts = minibatches(24, 3, step=4, epoch=1, seed=2, group=4)
    assert sorted(torch.cat(parts).tolist()) == list(range(24)) and [len(part) for part in parts] == [8, 8, 8]
    assert all((part.view(-1, 4) // 4 == part.view(-1, 4)[:, :1] // 4).all() for part in parts)
    assert torch.cat(parts).tolist() != list(range(24))
    mask = torch.arange(40) < torch.randint(1, 40, (24, 1))
    for size in (4, 8, 24):
        found = micro_batches(mask, torch.arange(24), size, group=4)
        assert all((rows.view(-1, 4) // 4 == rows.view(-1, 4)[:, :1] // 4).all() for rows, _ in found)
        assert all(width == int(mask[rows].sum(dim=1).max()) for rows, width in found)
        assert [width for _, width in found] == sorted(width for _, width in found)


@pytest.mark.parametrize("loss_type", OURS)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_gradient_does_not_depend_on_micro_batches(policy, loss_type, beta):
    rollout = rollout_of(policy)
    advantages = group_advantages(torch.tensor([1.0, 0, 0, 0] + [1.0] * 4 + [0, 1.0, 1.0, 0]), 4)  # one flat group
    ref = rollout.sampled_logps - 0.1 * torch.rand_like(rollout.sampled_logps)
    settings = {"temperature": 0.7, "loss_type": loss_type, "beta": beta, "max_new_tokens": 12}
    whole = gradients(policy, rollout, advantages, Config(**settings, micro_batch_size=64), ref_logps=ref)[0]
    parts = gradients(policy, rollout, advantages, Config(**settings, micro_batch_size=5), ref_logps=ref)[0]
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-7)
    logps = token_logps(policy, rollout.tokens, 0.7, where=rollout.mask)  # and it is that of the plain loss
    loss = grpo_loss(logps, logps.detach(), advantages, rollout.mask, ref, beta, loss_type=loss_type, max_length=12)
    policy.zero_grad()
    loss.backward()
    plain = torch.cat([p.grad.flatten() for p in policy.parameters()])
    torch.testing.assert_close(whole, plain, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "grpo", "clip_low": 0.1, "clip_high": 0.35},
        {"loss_type": "dapo", "clip_low": 0.35, "clip_high": 0.1},
        {"loss_type": "cispo", "clip_high": 0.1},
        {"loss_type": "grpo", "ratio_level": "sequence", "clip_low": 0.02, "clip_high": 0.05},
        {"loss_type": "dapo", "beta": 0.5, "kl": "k2"},
        {"loss_type": "dapo", "beta": 0.5, "kl": "k3"},
        {"loss_type": "dr_grpo", "beta": 0.5, "kl": "k3", "kl_times_ratio": True},
        {"loss_type": "dapo", "beta": 0.5, "kl": "k1", "kl_times_ratio": True},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_every_setting_of_the_loss_reaches_it(policy, settings):
    """The gradient of one update away from the sampler, against ``grpo_loss`` on the whole batch."""
    rollout = rollout_of(policy)
    advantages = group_advantages(torch.arange(12.0).square(), 4)
    generator = torch.Generator().manual_seed(5)
    noise = [(torch.rand(rollout.mask.shape, generator=generator) - 0.5) * rollout.mask for _ in range(2)]
    old, ref = rollout.sampled_logps + 1.6 * noise[0], rollout.sampled_logps + 1.6 * noise[1]
    config = Config(temperature=0.7, max_new_tokens=12, micro_batch_size=5, **settings)
    found = gradients(policy, rollout, advantages, config, old_logps=old, ref_logps=ref)[0]
    logps = token_logps(policy, rollout.tokens, 0.7, where=rollout.mask)
    names = ("beta", "clip_low", "clip_high", "loss_type", "ratio_level", "kl", "kl_times_ratio")
    loss = grpo_loss(
        logps, old, advantages, rollout.mask, ref, max_length=12, **{name: getattr(config, name) for name in names}
    )
    policy.zero_grad()
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    for name in ("clip_low", "clip_high", "ratio_level", "kl", "kl_times_ratio"):  # and each of them matters here
        if name in settings:
            other = {
                "ratio_level": "token",
                "kl": "k2" if settings.get("kl") == "k3" else "k3",
                "kl_times_ratio": False,
            }
            if (settings["loss_type"], name) == ("cispo", "clip_low") or settings.get("kl") == "k1":
                continue
            changed = config.__class__(**{**vars(config), name: other.get(name, 5.0)})
            different = gradients(policy, rollout, advantages, changed, old_logps=old, ref_logps=ref)[0]
            assert (different - expected).norm() > 1e-3 * expected.norm()


def test_parts_hold_every_wanted_row_once_and_no_needless_column(policy):
    with torch.no_grad():
        policy.head.weight[TOKENIZER.eot_id] = policy.head.weight.mean(0) + 0.5
    rollout = rollout_of(policy)
    wanted = torch.arange(12) % 3 != 1
    parts = micro_batches(rollout.mask, wanted.nonzero().squeeze(1), 3)
    rows = torch.cat([rows for rows, _ in parts])
    assert sorted(rows.tolist()) == wanted.nonzero().squeeze(1).tolist() and rows.tolist() != sorted(rows.tolist())
    widths = [width for _, width in parts]
    assert widths == sorted(widths) and widths[0] < widths[-1]
    for some, width in parts:
        assert rollout.mask[some, width - 1].any() and not rollout.mask[some, width:].any()
    assert micro_batches(rollout.mask, torch.zeros(0, dtype=torch.long), 3) == []
    logps = grpo.policy_logps(StubRun(), policy, rollout, Config(temperature=0.7, micro_batch_size=5), wanted)
    torch.testing.assert_close(logps[wanted], rollout.sampled_logps[wanted], rtol=0, atol=1e-5)
    assert not logps[~wanted].any()


def test_the_first_update_has_ratio_one_and_the_second_has_not(policy):
    rollout, config = rollout_of(policy), Config(temperature=0.7)
    advantages = group_advantages(torch.arange(12.0), 4)
    _, old, first = gradients(policy, rollout, advantages, config)
    assert first["clip_fraction"] == 0 and first["kl_old"] < 1e-12
    assert sampler_gap(rollout, old) < 1e-5
    with torch.no_grad():
        for p in policy.parameters():
            p -= 2.0 * p.grad
    _, _, second = gradients(policy, rollout, advantages, config, old_logps=old)
    assert second["kl_old"] > 1e-4


def test_a_step_along_the_gradient_favours_the_better_answer(policy):
    """The sign of everything at once: after one small step, answers with positive advantage are likelier, others less
    likely."""
    rollout, config = rollout_of(policy), Config(temperature=0.7)
    advantages = group_advantages(torch.tensor([1.0, 0, 0, 0] * 3), 4)
    _, old, _ = gradients(policy, rollout, advantages, config)
    with torch.no_grad():
        for p in policy.parameters():
            p -= 0.5 * p.grad
        new = token_logps(policy, rollout.tokens, 0.7, where=rollout.mask)
    change = (new - old).sum(1)
    assert float((change * advantages).sum()) > 0 and float(change[advantages > 0].mean()) > 0


def test_flat_groups_give_no_gradient(policy):
    rollout = rollout_of(policy)
    flat = group_advantages(torch.ones(12), 4)
    old = rollout.sampled_logps
    statistics = accumulate_gradients(StubRun(), policy, rollout, flat, Config(temperature=0.7), old)
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters()) and statistics["loss"] == 0
    assert float(flat_groups(torch.tensor([1.0, 1, 0, 1, 0, 0]), 2)) == pytest.approx(2 / 3)


def test_an_unfinished_answer_earns_nothing():
    good = "<think>a</think><answer>7</answer>"
    correct, formed = grpo.score([good, good, "7"], [Decimal(7)] * 3, torch.tensor([True, False, True]))
    assert correct.tolist() == [1.0, 0.0, 0.0] and formed.tolist() == [1.0, 0.0, 0.0]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    pretrain.main(tiny_pretrain(folder / "pretrain", steps=60, lr=5e-3, eval_every=60, save_every=60))
    sft.main(tiny_sft(folder / "sft", folder / "pretrain", n_examples=96, epochs=8.0, lr=5e-3, eval_every=100))
    return folder / "sft"


def tiny_grpo(folder, start, **changes) -> Config:
    settings = {
        "out_dir": str(folder), "init_from": str(start), "steps": 3, "prompts_per_step": 4, "group_size": 4,
        "n_prompts": 64, "eval_prompts": 8, "eval_every": 2, "save_every": 1, "device": "cpu", "micro_batch_size": 8,
        "minibatches": 1, "epochs": 1,
    }  # fmt: skip
    return Config(**(settings | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta": 0.05, "kl": "k3", "epochs": 2},
        {"beta": 0.05, "kl": "k1", "kl_in": "reward"},
        {"beta": 0.05, "kl": "k2", "loss_type": "grpo", "ratio_level": "sequence"},
        {"loss_type": "dr_grpo", "scale": "none"},
        {"loss_type": "cispo", "scale": "batch", "activation_checkpointing": True},
        {"draws": 3, "mask_truncated": True, "overlong_buffer": 10, "clip_high": 0.28},
        {"beta": 0.05, "kl": "k1", "kl_times_ratio": True, "minibatches": 3, "mask_truncated": True},
        {"verifier": "last"},
        {"verifier": "any", "format_weight": 0.0},
        {"precision": "bf16"},
        {"precision": "bf16", "group_size": 3},  # which divides none of what the start's check samples
    ],
    ids=str,
)
def test_every_form_of_the_stage_runs(tmp_path, start, changes, capsys):
    figures = grpo.main(tiny_grpo(tmp_path, start, **changes))
    assert 0 <= figures["accuracy"] <= 1
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward" in row]
    named = {"correct", "formatted", "flat_groups", "truncated", "finished", "entropy", "grad_norm", "clip_fraction"}
    assert [row["step"] for row in steps] == [1, 2, 3] and named <= steps[0].keys()
    assert ("kl_ref" in steps[0]) == (changes.get("beta", 0) > 0)
    assert all(0.05 < row["rollout_share"] < 1 for row in steps)
    if not {"epochs", "minibatches"} & changes.keys():  # one update of a rollout begins with the policy that sampled
        assert all(abs(row["kl_old"]) < 1e-4 and row["clip_fraction"] == 0 for row in steps)
    assert [row["step"] for row in rows if "accuracy" in row] == [0, 2, 3]
    assert "pass@1" in capsys.readouterr().out and "question:" in (tmp_path / "samples.txt").read_text()


def test_the_reference_is_the_start_and_stays_it(tmp_path, start):
    grpo.main(
        tiny_grpo(tmp_path, start, beta=0.05, lr=3e-3, warmup=1, scale="none", correct_weight=0.0, format_weight=1.0)
    )
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kl = [row["kl_ref"] for row in rows if "kl_ref" in row]
    assert (
        kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-4
    )  # against the old policy it would be 0 in every first update


def test_an_impossible_start_is_said_loudly(tmp_path, capsys):
    pretrain.main(tiny_pretrain(tmp_path / "base", steps=1))
    grpo.main(tiny_grpo(tmp_path / "grpo", tmp_path / "base", steps=10, max_new_tokens=4, eval_every=10))
    out = capsys.readouterr().out
    assert "earn the same" in out and "10 steps in a row taught nothing" in out and "cut off" in out
    before, after = (torch.load(tmp_path / n / "ckpt.pt", weights_only=True)["model"] for n in ("base", "grpo"))
    assert all(torch.equal(before[name], after[name]) for name in before)  # flat groups move nothing


def alarms(figures: list[dict], scaled: bool = False) -> list[str]:
    """What is said of steps with these figures, all others being those of a healthy step."""
    said = []
    alarm = Alarm(SimpleNamespace(print=said.append, scaler=SimpleNamespace(is_enabled=lambda: scaled)))
    for one in figures:
        alarm.check({"flat_groups": 0.5, "finished": 0.9, "grad_norm": 1.0} | one)
    return said


def test_the_alarm_is_about_ten_steps_in_a_row():
    dead, alive = [{"flat_groups": 1.0}, {"grad_norm": 0.0}] * 5, [{"flat_groups": 0.99, "grad_norm": 1e-9}]
    assert alarms(alive * 30) == alarms(dead[:9] + alive + dead[:9]) == []
    assert ["10 steps in a row" in text for text in alarms(dead)] == [True]
    assert [re.findall(r"\d+ steps", text) for text in alarms(dead * 2 + alive + dead)] == [
        ["10 steps"],
        ["20 steps"],
        ["10 steps"],
    ]


def test_the_alarm_is_about_each_step_that_was_cut_off_or_has_no_finite_gradient():
    assert len(alarms([{"finished": 0.0}] * 2)) == 2 and "cut off" in alarms([{"finished": 0.0}])[0]
    for norm in (math.inf, math.nan):
        assert len(alarms([{"grad_norm": norm}] * 2)) == 2 and "not finite" in alarms([{"grad_norm": norm}])[0]
        assert alarms([{"grad_norm": norm}], scaled=True) == []


@pytest.mark.parametrize(("flat", "ended", "n"), [(0.99, 0.1, 0), (1.0, 0.1, 1), (0.99, 0.0, 1), (1.0, 0.0, 2)])
def test_the_start_is_warned_of_only_if_nothing_can_come_of_it(policy, flat, ended, n):
    said, rollout = [], rollout_of(policy)
    figures = {"correct": 0.25, "formatted": 0.5, "reward": 0.3, "finished": ended, "answers": 12.0}
    run = SimpleNamespace(print=said.append, config=SimpleNamespace(temperature=0.7))
    asked = SimpleNamespace(messages=[{"content": "1+1?"}], gold=2)
    rewards = {"correct": torch.ones(12), "formatted": torch.ones(12)}
    report_start(run, rollout, rewards, figures, flat, asked)
    assert sum("WARNING" in text for text in said) == n
    assert "sampled at temperature 0.7" in said[0]
    assert f"pass@1 0.250, well-formed 0.500, finished {ended:.3f}, cut off {1 - ended:.3f}" in said[0]
    assert f"equal rewards {flat:.3f}" in said[0] and "question: 1+1?" in said[1]


def test_the_clip_takes_only_what_the_advantage_would_push_further():
    """Five ratios for an advantage of each sign and for none; all of them are beyond the bounds, but for the middle."""
    ratios = torch.tensor([0.5, 0.85, 1.0, 1.15, 1.5])
    mask = torch.ones(3, 5).bool()
    for lower_bound, clipped in ((True, 2 + 1), (False, 2 + 2)):
        sums = UpdateSums(clip_low=0.2, clip_high=0.1, lower_bound=lower_bound)
        sums.add(ratios.log().expand(3, 5), torch.zeros(3, 5), torch.tensor([1.0, -1.0, 0.0]), mask)
        assert sums.means()["clip_fraction"] == pytest.approx(clipped / 10)
    sums = UpdateSums(clip_low=0.2, clip_high=0.1)
    sums.add(torch.full((1, 1), 0.5), torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1).bool())
    means = sums.means()
    assert means["clip_fraction"] == means["tokens"] == 1 and means["kl_old"] == pytest.approx(math.exp(0.5) - 1.5)


def shown_questions(monkeypatch, stage, start) -> list[bool]:
    """Whether the question that is shown to the reader is the one that the first of the answers is an answer to."""
    shown, tokenizer = [], load_stage(str(start))[1]

    def asked_of(prompt, rollout) -> None:
        length = int(rollout.mask[0].int().argmax()) + 1
        shown.append(encode_chat(tokenizer, prompt.messages, True)[0] == rollout.tokens[0, :length].tolist())

    render, report = stage.render, stage.report_start
    monkeypatch.setattr(stage, "render", lambda *args, **more: asked_of(*args[:2]) or render(*args, **more))
    monkeypatch.setattr(stage, "report_start", lambda *args: asked_of(args[5], args[1]) or report(*args))
    return shown


def steps_of(folder) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "reward" in row]


def spied(monkeypatch, correct_of, formed_of=lambda draw, i, g: 0.0) -> dict:
    """Rewards made up by functions of (draw, prompt number in its draw, answer number in its group), and what was
    done."""
    seen = {"prompts": [], "updates": []}
    sample, accumulate = grpo.sample_answers, grpo.accumulate_gradients

    def sampled(model, tokenizer, prompts, n, max_new, temperature, seed):
        seen["prompts"].append((len(prompts), seed, [tuple(p) for p in prompts]))
        return sample(model, tokenizer, prompts, n, max_new, temperature, seed)

    def scored(texts, golds, finished, verifier):
        drawn = enumerate(seen["prompts"][seen["from"] :])
        answers = [(draw, i, g) for draw, (n, _, _) in drawn for i in range(n) for g in range(4)]
        assert len(answers) == len(texts)
        return torch.tensor([[float(f(*answer)) for answer in answers] for f in (correct_of, formed_of)]).unbind()

    def accumulated(run, model, rollout, advantages, config, *more):
        seen["updates"].append((rollout, advantages))
        return accumulate(run, model, rollout, advantages, config, *more)

    seen["from"] = 0
    monkeypatch.setattr(grpo, "sample_answers", sampled)
    monkeypatch.setattr(grpo, "score", scored)
    monkeypatch.setattr(grpo, "accumulate_gradients", accumulated)
    evaluated = lambda *args: seen.update({"from": len(seen["prompts"])}) or 0.0  # noqa: E731
    monkeypatch.setattr(rollout_module, "greedy_accuracy", evaluated)
    return seen


def test_dynamic_sampling_replaces_groups_that_are_all_right_or_all_wrong(tmp_path, start, monkeypatch):
    # In the first draw prompt 1 is all right and prompt 3 all wrong; in the second, prompt 0 is all wrong.
    flat = {(0, 1): 1.0, (0, 3): 0.0, (1, 0): 0.0}
    seen = spied(monkeypatch, lambda draw, i, g: flat.get((draw, i), float(g == i)))
    grpo.main(tiny_grpo(tmp_path, start, draws=3, steps=1, eval_every=1, n_prompts=512))
    first = seen["prompts"]
    assert [n for n, _, _ in first] == [4, 4]  # two are missing: twice as many drawn; one too many comes, and no more
    assert first[0][1] != first[1][1]  # other random numbers
    assert not set(first[0][2]) & set(first[1][2])  # other questions
    (rollout, advantages), *others = seen["updates"]
    assert others == [] and len(rollout) == 16
    assert (
        (advantages.view(4, 4) != 0).any(dim=1).all()
    )  # every group teaches: 0 and 2 of the first draw, 1 and 2 of the second
    best = advantages.view(4, 4).argmax(dim=1).tolist()
    assert best == [0, 2, 1, 2]
    row = steps_of(tmp_path)[0]
    n = first[1][0]
    assert row["answers"] == 16 + 4 * n and row["flat_groups"] == 0
    # the figures are those of all answers: 1, 4, 1, 0 right ones, then none and one for each of the others
    assert row["correct"] == pytest.approx((6 + n - 1) / (16 + 4 * n))


@pytest.mark.parametrize("draws", [1, 3])
def test_an_answer_is_judged_by_the_gold_of_its_own_question(tmp_path, start, monkeypatch, draws):
    known = load_prompts("arith", "train", n=64)
    _, tokenizer, _ = load_stage(str(start))
    ids, known = encode_prompts(known, tokenizer, 400)
    gold_of = {tuple(tokens): prompt.gold for tokens, prompt in zip(ids, known)}
    assert len(set(gold_of.values())) > 10
    real, judged = grpo.judge, []

    def judge(rollout, asked, config):
        judged.append(
            [tuple(row[: mask.int().argmax() + 1].tolist()) for row, mask in zip(rollout.tokens, rollout.mask)]
        )
        assert [one.gold for one in asked] == [gold_of[question] for question in judged[-1]]
        return real(rollout, asked, config)

    monkeypatch.setattr(grpo, "judge", judge)
    grpo.main(tiny_grpo(tmp_path, start, steps=2, draws=draws))
    assert len(judged) >= 2 and all(len(set(questions)) >= 4 for questions in judged)


@pytest.mark.parametrize(("format_weight", "draws"), [(0.0, 3), (0.1, 1)])
def test_a_reward_without_weight_keeps_no_group(tmp_path, start, monkeypatch, format_weight, draws):
    """All answers are right and half of them are in form, which teaches something only if the form is paid for."""
    seen = spied(monkeypatch, lambda draw, i, g: 1.0, lambda draw, i, g: g % 2)
    grpo.main(tiny_grpo(tmp_path, start, draws=3, steps=1, eval_every=1, format_weight=format_weight))
    assert len(seen["prompts"]) == draws


def test_rates_seeds_figures_and_the_best_checkpoint(tmp_path, start, monkeypatch):
    rates, drawn, accuracies = [], [], iter([0.2, 0.9, 0.4, 0.4])
    update, sample = grpo.update, grpo.sample_answers
    monkeypatch.setattr(grpo, "update", lambda *args: rates.append(args[3]) or update(*args))
    monkeypatch.setattr(grpo, "sample_answers", lambda *args: drawn.append((args[-1], sample(*args))) or drawn[-1][1])
    monkeypatch.setattr(grpo, "score", lambda texts, *_: (torch.arange(16.0), torch.zeros(16)))
    monkeypatch.setattr(rollout_module, "greedy_accuracy", lambda *args: next(accuracies))
    shown = shown_questions(monkeypatch, grpo, start)
    grpo.main(tiny_grpo(tmp_path / "0", start, eval_every=1, warmup=2, lr=1e-3, final_lr=0.5, steps=2))
    assert shown == [True, True, True]  # at the start, and at each evaluation
    assert rates == [pytest.approx(learning_rate(step, 2, 1e-3, 2, 0.5)) for step in range(2)] and rates[0] < rates[1]
    for row, (_, rollout) in zip(steps_of(tmp_path / "0"), drawn, strict=True):
        entropy = -float(rollout.sampled_logps.sum() / rollout.mask.sum())
        assert row["entropy"] == pytest.approx(entropy, rel=1e-4) and entropy > 0
    best = torch.load(tmp_path / "0" / "best.pt", weights_only=True)
    assert best["step"] == 1  # 0.9, not 0.4
    monkeypatch.setattr(rollout_module, "greedy_accuracy", lambda *args: 0.0)
    grpo.main(tiny_grpo(tmp_path / "1", start, eval_every=1, steps=2, seed=1))
    assert len(drawn) == len({seed for seed, _ in drawn}) == 4  # steps and seeds of the run draw other numbers


def test_weights_that_are_no_numbers_stop_the_run(tmp_path, start, monkeypatch):
    """All answers of such a policy are the same, so no group teaches and no gradient shows it."""
    real = grpo.begin

    def broken(*args):
        run, model, tokenizer = real(*args)
        with torch.no_grad():
            model.final_norm.weight.fill_(float("nan"))
        return run, model, tokenizer

    monkeypatch.setattr(grpo, "begin", broken)
    with pytest.raises(UserError, match="not numbers any more"):
        grpo.main(tiny_grpo(tmp_path, start))


def test_what_belongs_to_an_answer_goes_with_it_into_its_minibatch(tmp_path, start, monkeypatch):
    """Advantages, and the log-probabilities of the sampler and of the reference, both of the start here."""
    whole, parts = [], []
    sample, accumulate = grpo.sample_answers, grpo.accumulate_gradients
    monkeypatch.setattr(grpo, "sample_answers", lambda *args: whole.append(sample(*args)) or whole[-1])
    monkeypatch.setattr(grpo, "score", lambda texts, *_: (torch.arange(16.0).square(), torch.zeros(16)))
    monkeypatch.setattr(rollout_module, "greedy_accuracy", lambda *args: 0.0)

    def accumulated(run, model, rollout, advantages, config, old_logps, ref_logps):
        parts.append((rollout, advantages, old_logps, ref_logps))
        return accumulate(run, model, rollout, advantages, config, old_logps, ref_logps)

    monkeypatch.setattr(grpo, "accumulate_gradients", accumulated)
    grpo.main(tiny_grpo(tmp_path, start, steps=1, minibatches=2, epochs=2, beta=0.1, scale="none"))
    expected = group_advantages(torch.arange(16.0).square(), 4, "none")  # 16 different ones
    assert len(expected.unique()) == 16 and len(parts) == 4
    for rollout, advantages, old_logps, ref_logps in parts:
        for tokens, logps, advantage in zip(rollout.tokens, rollout.sampled_logps, advantages):
            twins = (whole[-1].tokens == tokens).all(dim=1) & (whole[-1].sampled_logps == logps).all(dim=1)
            assert advantage in expected[twins]
        torch.testing.assert_close(old_logps, rollout.sampled_logps, rtol=0, atol=1e-4)
        torch.testing.assert_close(ref_logps, rollout.sampled_logps, rtol=0, atol=1e-4)
    for first, second in (parts[:2], parts[2:]):
        assert sorted(torch.cat([first[1], second[1]]).tolist()) == sorted(expected.tolist())  # disjoint, all of them


def test_when_the_draws_run_out_flat_groups_fill_the_batch(tmp_path, start, monkeypatch):
    seen = spied(monkeypatch, lambda draw, i, g: float(g == 0) if (draw, i) == (1, 2) else 1.0)
    grpo.main(tiny_grpo(tmp_path, start, draws=2, steps=1, eval_every=1))
    _, advantages = seen["updates"][0]
    assert (advantages.view(4, 4) != 0).any(dim=1).tolist() == [False, False, False, True]
    row = steps_of(tmp_path)[0]
    assert 24 <= row["answers"] <= 32 and row["flat_groups"] == 0.75


def test_one_draw_is_one_rollout(tmp_path, start, monkeypatch):
    seen = spied(monkeypatch, lambda draw, i, g: 1.0 if i else float(g == 0))
    grpo.main(tiny_grpo(tmp_path, start, steps=2, eval_every=1))
    assert [n for n, _, _ in seen["prompts"]] == [4, 4] and all(row["answers"] == 16 for row in steps_of(tmp_path))
    assert seen["prompts"][0][2] != seen["prompts"][1][2]  # other questions in the next step


@pytest.mark.parametrize("loss_type", OURS)
def test_answers_that_were_cut_off_can_leave_the_loss(policy, loss_type):
    with torch.no_grad():
        policy.head.weight[TOKENIZER.eot_id] = policy.head.weight.mean(0) + 0.5
    rollout = rollout_of(policy)
    assert rollout.finished.any() and not rollout.finished.all()
    torch.manual_seed(1)
    advantages = torch.randn(12)
    config = Config(temperature=0.7, mask_truncated=True, loss_type=loss_type, max_new_tokens=12)
    ours, _, statistics = gradients(policy, rollout, advantages, config)
    mask = rollout.mask & rollout.finished[:, None]
    logps = token_logps(policy, rollout.tokens, 0.7, where=rollout.mask)
    policy.zero_grad()
    grpo_loss(logps, logps.detach(), advantages, mask, loss_type=loss_type, max_length=12).backward()  # B counts all
    plain = torch.cat([p.grad.flatten() for p in policy.parameters()])
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-7)
    with_all, _, _ = gradients(policy, rollout, advantages, Config(temperature=0.7, loss_type=loss_type))
    assert (ours - with_all).abs().max() > 1e-4 and statistics["tokens"] == float(mask.sum())


def test_the_penalty_for_length_is_a_reward():
    lengths = [20, 38, 43, 48]
    mask = torch.arange(48)[None] < torch.tensor(lengths)[:, None]
    rollout = grpo.Rollout(torch.zeros(4, 49), mask, torch.zeros(4, 48), ["7"] * 4, torch.ones(4, dtype=torch.bool))
    rewards = grpo.judge(rollout, [Prompt((), Decimal(7))] * 4, Config(overlong_buffer=10))
    assert rewards["overlong"].tolist() == [0.0, 0.0, -0.5, -1.0]
    total = grpo.total_reward(rewards, grpo.weights_of(Config()))
    assert total.tolist() == [0.0, 0.0, -0.5, -1.0]
    assert "overlong" not in grpo.judge(rollout, [Prompt((), Decimal(7))] * 4, Config())


def test_a_kl_in_the_reward_is_a_cost():
    """Of two right answers the one that strayed farther from the reference earns less."""
    weights = grpo.weights_of(Config(beta=0.1, kl_in="reward", kl="k1"))
    rewards = {"correct": torch.ones(2), "formatted": torch.zeros(2), "kl": torch.tensor([3.0, 0.5])}
    total = grpo.total_reward(rewards, weights)
    torch.testing.assert_close(total, torch.tensor([0.7, 0.95]))
    assert grpo.group_advantages(total, 2).tolist() == pytest.approx([-0.7071, 0.7071], abs=1e-3)


@pytest.mark.parametrize(("minibatches", "passes"), [(2, 1), (3, 2)])
def test_every_answer_is_used_once_in_each_pass(tmp_path, start, monkeypatch, minibatches, passes):
    seen = spied(monkeypatch, lambda draw, i, g: float(g == i))
    grpo.main(tiny_grpo(tmp_path / "whole", start, steps=1, eval_every=1))
    (whole, _), *_ = seen["updates"]
    seen["updates"], seen["from"] = [], len(seen["prompts"])
    more = {"minibatches": minibatches, "epochs": passes}
    grpo.main(tiny_grpo(tmp_path / "parts", start, steps=1, eval_every=1, lr=1e-2, **more))
    assert len(seen["updates"]) == minibatches * passes
    for i in range(passes):
        parts = [rollout for rollout, _ in seen["updates"][i * minibatches : (i + 1) * minibatches]]
        assert max(map(len, parts)) - min(map(len, parts)) <= 4  # a group, which stays together
        rows = [row for part in parts for row in part.sampled_logps.tolist()]
        assert sorted(rows) == sorted(whole.sampled_logps.tolist())


def test_ratios_differ_from_one_only_behind_the_first_update(tmp_path, start, monkeypatch):
    """Each minibatch is compared with the policy that sampled, not with the one before it."""
    seen = []
    real = grpo.grpo_loss

    def loss(logps, old_logps, advantages, mask, *more):
        seen.append(float(((logps - old_logps).detach().abs() * mask).max()))
        return real(logps, old_logps, advantages, mask, *more)

    monkeypatch.setattr(grpo, "grpo_loss", loss)
    grpo.main(
        tiny_grpo(
            tmp_path,
            start,
            steps=1,
            minibatches=2,
            epochs=2,
            lr=1e-2,
            warmup=0,
            beta=0.1,
            micro_batch_size=64,
        )
    )
    assert len(seen) == 4 and seen[0] < 1e-4 and min(seen[1:]) > 1e-3


def test_the_clip_fraction_is_of_tokens_that_are_pushed(policy):
    """Answers without an advantage are not clipped, and beside a KL they do not dilute those that are."""
    rollout = rollout_of(policy)
    old = rollout.sampled_logps + rollout.mask * math.log(2)  # all ratios are 0.5
    ref = rollout.sampled_logps
    for beta in (0.0, 0.1):
        config = Config(temperature=0.7, beta=beta)
        advantages = torch.tensor([-1.0] + [0.0] * 10 + [1.0])
        _, _, statistics = gradients(policy, rollout, advantages, config, old_logps=old, ref_logps=ref)
        down, up = float(rollout.mask[0].sum()), float(rollout.mask[11].sum())
        assert statistics["clip_fraction"] == pytest.approx(down / (down + up))
    statistics = accumulate_gradients(
        StubRun(), policy, rollout, torch.zeros(12), Config(temperature=0.7, beta=0.1), old, ref
    )
    assert statistics["clip_fraction"] == 0


def test_the_clip_fraction_of_answers_of_one_token_is_that_of_their_tokens(policy):
    """Twelve answers of one token; half of the ratios are outside, on the side to which the advantage pushes."""
    rollout = rollout_of(policy, new=1)
    assert (rollout.mask.sum(1) == 1).all()
    ratios = torch.tensor([1.15, 1.15, 0.85, 0.85, 1.05, 0.95] * 2)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0, -1.0])
    old = rollout.sampled_logps - rollout.mask * ratios.log()[:, None]
    for level in ("token", "sequence"):
        config = Config(temperature=0.7, ratio_level=level, clip_low=0.1, clip_high=0.1)
        assert gradients(policy, rollout, advantages, config, old_logps=old)[2]["clip_fraction"] == pytest.approx(0.5)


def recorded(monkeypatch, name: str) -> list[list]:
    """The arguments with which the stage will call one of the functions of numbers."""
    calls, real = [], getattr(grpo, name)

    def spy(*args):
        calls.append([x.detach().clone() if torch.is_tensor(x) else x for x in args])
        return real(*args)

    monkeypatch.setattr(grpo, name, spy)
    return calls


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "dapo", "clip_low": 0.02, "clip_high": 0.05},
        {"loss_type": "grpo", "ratio_level": "sequence", "clip_low": 0.005, "clip_high": 0.01},
        {"loss_type": "cispo", "clip_high": 0.03},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_what_is_logged_of_the_updates_is_what_the_loss_saw(tmp_path, start, monkeypatch, settings):
    """Means over the updates of a step; the KLs are of a token, the clip fraction of the tokens with an advantage."""
    losses = recorded(monkeypatch, "grpo_loss")
    rewards = torch.tensor([0.0, 1.0, 3.0, 7.0] * 3 + [1.0] * 4)  # the last group is flat
    monkeypatch.setattr(grpo, "score", lambda texts, *_: (rewards, torch.zeros(16)))
    more = {"minibatches": 2, "epochs": 2, "micro_batch_size": 3, "beta": 0.1, "lr": 1e-2, "warmup": 0}
    grpo.main(tiny_grpo(tmp_path, start, eval_prompts=1, **more, **settings))
    low, high, rows = settings.get("clip_low", 0.2), settings["clip_high"], steps_of(tmp_path)
    low = math.inf if settings["loss_type"] == "cispo" else low
    assert len(rows) == 3
    for row in rows:
        means = dict.fromkeys(("kl_old", "kl_ref", "clip_fraction"), 0.0)
        for _ in range(4):  # updates, each of eight answers in parts of three, three and two
            moved, strayed, outside = [], [], []
            for logps, old, advantages, mask, ref, *_ in (losses.pop(0) for _ in range(3)):
                mask, ratio = mask.bool(), (logps - old).exp()
                moved += (ratio - 1 - (logps - old))[mask]
                strayed += ((ref - logps).exp() - 1 - (ref - logps))[mask]
                for i, a in enumerate(advantages.tolist()):
                    one = ratio[i, mask[i]]
                    if settings.get("ratio_level") == "sequence":
                        one = (logps - old)[i, mask[i]].mean().exp().expand(len(one))
                    too_far = one > 1 + high if a > 0 or low == math.inf else one < 1 - low
                    outside += too_far.tolist() if a else []
            means["kl_old"] += float(torch.stack(moved).mean()) / 4
            means["kl_ref"] += float(torch.stack(strayed).mean()) / 4
            means["clip_fraction"] += sum(outside) / max(len(outside), 1) / 4
        assert {name: row[name] for name in means} == pytest.approx(means, rel=1e-3, abs=1e-6)
    assert losses == [] and min(rows[-1][name] for name in means) > 1e-5 and rows[-1]["clip_fraction"] < 1


def test_the_kl_in_the_reward_is_logged_of_a_token(tmp_path, start, monkeypatch):
    """An answer pays for the sum over its tokens, and what is logged is the mean over all tokens."""
    estimates = recorded(monkeypatch, "kl_estimate")
    monkeypatch.setattr(grpo, "score", lambda texts, *_: (torch.arange(16.0), torch.zeros(16)))
    config = tiny_grpo(tmp_path, start, eval_prompts=1, beta=0.1, kl="k1", kl_in="reward", lr=1e-2, warmup=0)
    grpo.main(config)
    rows, sums = steps_of(tmp_path), [float((args[0] - args[1]).sum()) for args in estimates if args[2] == "k1"]
    assert len(sums) == 3 and abs(rows[-1]["kl_ref"]) > 1e-4
    for row, total in zip(rows, sums):
        assert row["kl_ref"] == pytest.approx(total / (16 * row["length"]), rel=1e-4, abs=1e-6)
        assert row["reward"] == pytest.approx(7.5)  # what is logged as the reward is without it


@pytest.mark.parametrize(
    ("precision", "gap", "noticed"), [("fp32", 5e-4, 0), ("fp32", 2e-3, 1), ("bf16", 0.02, 0), ("bf16", 0.05, 1)]
)
@pytest.mark.parametrize("minibatches", [1, 2])
def test_how_far_the_sampler_may_be_from_the_policy(tmp_path, start, monkeypatch, precision, gap, noticed, minibatches):
    """As far as rounding reaches, and no farther."""
    sample = grpo.sample_answers

    def told(*args):
        rollout = sample(*args)
        return dataclasses.replace(rollout, sampled_logps=rollout.sampled_logps + gap * rollout.mask)

    monkeypatch.setattr(grpo, "sample_answers", told)
    monkeypatch.setattr(grpo, "score", lambda texts, *_: (torch.arange(16.0), torch.zeros(16)))
    config = tiny_grpo(tmp_path, start, precision=precision, minibatches=minibatches, steps=1, eval_prompts=1)
    with pytest.raises(AssertionError, match="not the policy that sampled") if noticed else contextlib.nullcontext():
        grpo.main(config)


def test_an_update_in_which_no_token_counts_moves_nothing(tmp_path, start, monkeypatch):
    """All answers cut off and left out: not even the KL or momentum may act."""
    seen = []
    monkeypatch.setattr(grpo, "update", lambda *args: seen.append(args) or 1.0)
    settings = {"mask_truncated": True, "beta": 0.1, "max_new_tokens": 2, "minibatches": 2}
    grpo.main(tiny_grpo(tmp_path, start, **settings))
    assert seen == [] and all(row["grad_norm"] == 0 for row in steps_of(tmp_path))


@pytest.mark.parametrize("minibatches", [1, 2])
def test_another_temperature_in_training_is_noticed(tmp_path, start, monkeypatch, minibatches):
    sample = grpo.sample_answers
    monkeypatch.setattr(grpo, "sample_answers", lambda *args: sample(*args[:5], 0.5 * args[5], args[6]))
    with pytest.raises(AssertionError, match="not the policy that sampled"):
        grpo.main(tiny_grpo(tmp_path, start, minibatches=minibatches))


def test_weights_that_are_no_numbers_are_said(tmp_path, start, monkeypatch):
    real = grpo.policy_logps
    monkeypatch.setattr(grpo, "policy_logps", lambda *args: real(*args) * float("nan"))
    with pytest.raises(UserError, match="lower --lr"):
        grpo.main(tiny_grpo(tmp_path, start))


def test_the_curriculum_hands_over(tmp_path, start, monkeypatch):
    """Arithmetic alone, then less and less of it, then none."""
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}.\n#### {i}"} for i in range(200)]
    folder = tmp_path / "openai__gsm8k" / "main"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = []
    real = grpo.judge

    def judged(rollout, golds, config):
        asked.append(golds)
        return real(rollout, golds, config)

    monkeypatch.setattr(grpo, "judge", judged)
    small = {"data": "gsm8k", "data_dir": str(tmp_path), "steps": 7, "max_new_tokens": 4, "eval_every": 7}
    drawn = []
    batch = rollout_module.epoch_batch
    monkeypatch.setattr(rollout_module, "epoch_batch", lambda n, *more: drawn.append(n) or batch(n, *more))
    sampled = []
    sample = grpo.sample_answers
    monkeypatch.setattr(grpo, "sample_answers", lambda *args: sampled.append(args[2]) or sample(*args))
    grpo.main(tiny_grpo(tmp_path / "run", start, arith_warmup=2, arith_fade=3, **small))
    tokenizer = load_stage(str(start))[1]
    short = [sum("What is" in tokenizer.decode(ids) for ids in prompts) for prompts in sampled]
    assert short == [0, 0, 1, 2, 3, 4, 4]


def test_presets_of_the_family_are_what_the_papers_say():
    root = Path(grpo.__file__).parent / "configs"
    preset = {p.stem: Config(**read_preset(Config, str(p))) for p in root.glob("grpo_*.py")}
    dr, dapo, gspo, cispo = (preset[f"grpo_{name}"] for name in ("dr", "dapo", "gspo", "cispo"))
    assert (dr.loss_type, dr.scale) == ("dr_grpo", "none")
    assert (dapo.loss_type, dapo.clip_low, dapo.clip_high, dapo.beta) == ("dapo", 0.2, 0.28, 0.0)
    assert dapo.correct_weight == 2  # 1 and -1, but for a shift
    assert dapo.draws > 1 and dapo.mask_truncated and dapo.overlong_buffer
    assert (gspo.ratio_level, gspo.loss_type) == ("sequence", "grpo")
    assert (cispo.loss_type, cispo.clip_high) == ("cispo", 4.0)
    deepseek = preset["grpo_deepseekmath"]
    assert (deepseek.loss_type, deepseek.beta, deepseek.minibatches, deepseek.epochs) == (
        "grpo",
        0.04,
        1,
        1,
    )


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"group_size": 1}, "group_size"),
        ({"temperature": 0.0}, "temperature"),
        ({"beta": 0.1, "kl": "k1"}, "k1"),
        ({"max_new_tokens": 4096}, "max_new_tokens"),
        ({"overlong_buffer": 49}, "overlong_buffer"),
        ({"arith_fade": 2}, "arith_fade"),
        ({"minibatches": 17}, "questions do not make 17 minibatches"),
        ({"draws": 0}, "draws"),
        ({"temperature": float("nan")}, "temperature"),
        ({"clip_low": -0.1}, "clip_low"),
        ({"correct_weight": float("inf")}, "correct_weight"),
        ({"correct_weight": 0.0, "format_weight": 0.0}, "all weights are 0"),
        ({"kl_times_ratio": True}, "kl_times_ratio"),
        ({"beta": 0.1, "kl": "k2", "kl_times_ratio": True}, "kl_times_ratio"),
        ({"data": "gsm8k", "arith_warmup": 3}, "leaves no step"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, start, changes, word):
    with pytest.raises(UserError, match=word):
        grpo.main(tiny_grpo(tmp_path / "run", start, **changes))
    assert not (tmp_path / "run").exists()


def test_settings_at_the_bound_are_not_refused(tmp_path):
    for changes in ({"minibatches": 4}, {"overlong_buffer": 48}, {"data": "gsm8k", "arith_warmup": 2}):
        grpo.check(tiny_grpo(tmp_path, tmp_path, max_new_tokens=48, **changes))


def test_the_worked_example_is_worked_by_hand(capsys):
    """Rewards 1, 0, 0, 1: mean ½, std √(4 · ¼ / 3); nine tokens in all."""
    grpo.example()
    lines = capsys.readouterr().out.splitlines()
    numbers = {line.split("  ")[0]: [float(x) for x in re.findall(r"-?\d+\.\d{4}", line)] for line in lines}
    a = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert numbers["advantages"] == pytest.approx([a, -a, -a, a], abs=1e-4)
    ratios = [[float(x) for x in re.findall(r"-?\d+\.\d{4}", line)] for line in lines if "ratios" in line]
    assert ratios == [[1.4, 1.0, 1.0], [0.5, 1.0], [1.0, 1.5, 1.0], [1.1]]
    smaller = [[1.2 * a, a, a], [-0.8 * a, -a], [-a, -1.5 * a, -a], [1.1 * a]]
    found = [[float(x) for x in re.findall(r"-?\d+\.\d{4}", line)] for line in lines if "the smaller" in line]
    assert found == [pytest.approx(row, abs=1e-4) for row in smaller]
    total = sum(map(sum, smaller))
    assert f"9 tokens = {-total / 9:.4f}" in lines[-3]
    gradients = [[0, -a / 9, -a / 9], [0, a / 9], [a / 9, 1.5 * a / 9, a / 9], [-1.1 * a / 9]]  # -ρ A / 9, or nothing
    found = [[float(x) for x in re.findall(r"-?\d+\.\d{4}", line)] for line in lines if "d log" in line]
    assert found == [pytest.approx(row, abs=1e-4) for row in gradients]


def test_a_minibatch_without_any_token_has_the_figures_of_the_others(policy):
    """All of its answers were cut off and leave the loss: the KL to the reference is then one of nothing."""
    rollout = rollout_of(policy)
    rollout.finished = torch.zeros(12, dtype=torch.bool)
    config = Config(temperature=0.7, mask_truncated=True, beta=0.1)
    old = rollout.sampled_logps
    empty = accumulate_gradients(StubRun(), policy, rollout, torch.ones(12), config, old, old)
    rollout.finished = torch.ones(12, dtype=torch.bool)
    full = accumulate_gradients(StubRun(), policy, rollout, torch.ones(12), config, old, old)
    assert empty.keys() == full.keys() and empty["kl_ref"] == empty["tokens"] == 0 and "kl_ref" in full
