import itertools
import json
import math
import re
import types
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from conftest import load_json, load_npz
from test_grpo import StubRun, policy, rollout_of, shown_questions, start  # noqa: F401  (fixtures)
from tiny import assert_exact_resume

import gdpo
import grpo
import rollout as rollout_module
from data import encode_prompts
from gdpo import Config, condition, gdpo_advantages, group_sums
from grpo import accumulate_gradients, group_advantages
from optim import learning_rate
from runtime.errors import UserError
from runtime.run import Run
from stages import load_stage
from texts import Prompt, load_prompts
from watch import distinct_advantages

NUMBERS = load_npz("advantages_grpo_gdpo")
SETS = {meta["name"]: meta["G"] for meta in load_json("advantages_grpo_gdpo.meta.json")["sets"]}
WEIGHTED = [(name, w) for name in SETS for w in ("w1", "w2") if f"{name}::{w}::trl_normalize_then_sum" in NUMBERS]


@pytest.mark.parametrize(("name", "w"), WEIGHTED)
def test_advantages_are_those_of_trl(name, w):
    rewards, weights = NUMBERS[f"{name}::rewards"], NUMBERS[f"{name}::{w}::weights"]
    before = NUMBERS[f"{name}::{w}::trl_normalize_then_sum_prebatch"].nan_to_num(0.0)
    torch.testing.assert_close(group_sums(rewards, SETS[name], weights), before, rtol=1e-5, atol=1e-6)
    ours = gdpo_advantages(rewards, SETS[name], weights)
    torch.testing.assert_close(ours, NUMBERS[f"{name}::{w}::trl_normalize_then_sum"], rtol=1e-5, atol=1e-6)


def test_the_sets_hold_weights_and_unknown_rewards():
    assert len(WEIGHTED) >= 12 and any(w == "w2" for _, w in WEIGHTED)
    assert NUMBERS["with_nan::rewards"].isnan().any() and NUMBERS["with_nan::rewards"].isnan().all(dim=1).any()


KNOWN = [name for name in SETS if not NUMBERS[f"{name}::rewards"].isnan().any()]  # the authors count unknown as 0


@pytest.mark.parametrize("name", [name for name in KNOWN if f"{name}::w1::nvlabs_trl_gdpo" in NUMBERS])
def test_advantages_are_those_of_the_authors(name):
    rewards = NUMBERS[f"{name}::rewards"]
    ours = gdpo_advantages(rewards, SETS[name], NUMBERS[f"{name}::w1::weights"])
    torch.testing.assert_close(ours, NUMBERS[f"{name}::w1::nvlabs_trl_gdpo"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in SETS if f"{name}::verl_gdpo" in NUMBERS])
def test_over_tokens_they_are_those_of_verl(name):
    mask = NUMBERS[f"{name}::response_mask"]  # answers of unequal length
    ours = gdpo_advantages(NUMBERS[f"{name}::rewards"], SETS[name], eps=1e-6, lengths=mask.sum(dim=1))
    torch.testing.assert_close(ours[:, None] * mask, NUMBERS[f"{name}::verl_gdpo"], rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Worked numbers


def test_three_pairs_of_totals():
    """Totals (0, 1), (0, 2), (1, 2): one lesson for GRPO, three different ones for GDPO."""
    rewards = torch.tensor([[0.0, 0], [0, 1], [0, 0], [1, 1], [0, 1], [1, 1]], dtype=torch.float64)
    half = math.sqrt(0.5)
    summed = group_advantages(rewards.sum(1), 2, eps=0.0)
    torch.testing.assert_close(summed, torch.tensor([-half, half] * 3, dtype=torch.float64))
    before = group_sums(rewards, 2, eps=0.0)
    torch.testing.assert_close(before, torch.tensor([-1.0, 1, -2, 2, -1, 1], dtype=torch.float64) * half)
    # squares of the batch: (4 · 0.5 + 2 · 2) / 5 = 1.2
    after = gdpo_advantages(rewards, 2, eps=0.0)
    torch.testing.assert_close(after, before / math.sqrt(1.2))
    assert gdpo_advantages(rewards.float(), 2).tolist() == pytest.approx(
        [-0.6454, 0.6454, -1.2909, 1.2909, -0.6454, 0.6454], abs=1e-4
    )


def test_the_rarer_reward_counts_more():
    """Rows (1, 0), (0, 1), (0, 0), (0, 1): the first reward is earned once, the second twice."""
    rewards = torch.tensor([[1.0, 0], [0, 1], [0, 0], [0, 1]], dtype=torch.float64)
    assert group_advantages(rewards.sum(1), 4, eps=0.0).tolist() == pytest.approx([0.5, 0.5, -1.5, 0.5])
    # r1: mean 1/4, std 1/2: (1.5, -.5, -.5, -.5);  r2: mean 1/2, std 1/sqrt(3): (-.866, .866, -.866, .866)
    assert group_sums(rewards, 4, eps=0.0).tolist() == pytest.approx([0.634, 0.366, -1.366, 0.366], abs=1e-3)
    assert gdpo_advantages(rewards, 4).tolist() == pytest.approx([0.689, 0.398, -1.486, 0.398], abs=1e-3)


def test_opposed_rewards_of_equal_weight_are_exactly_nothing():
    """The paper shows this group, with totals (1, 1, 1), as one that GDPO tells apart; with equal weights it does
    not."""
    rewards = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    for weights in (None, torch.tensor([1.0, 1.0]), torch.tensor([0.3, 0.3])):
        assert gdpo_advantages(rewards, 3, weights).abs().max() < 1e-3
        assert group_sums(rewards.double(), 3, weights, eps=0.0).abs().max() < 1e-12
    assert group_sums(rewards, 3, torch.tensor([2.0, 1.0])).tolist() == pytest.approx([0.577, 0.577, -1.155], abs=1e-3)
    third = torch.cat([rewards, torch.tensor([[1.0], [0.0], [0.0]])], dim=1)
    assert gdpo_advantages(third, 3).abs().min() > 0.1


@pytest.mark.parametrize(("dead", "largest"), [(0, 1.33), (1, 2.03), (7, 4.28), (31, 8.66)])
def test_a_live_group_grows_beside_dead_ones(dead, largest):
    live = torch.tensor([[0.0, 0], [0, 0], [0, 1], [1, 1]], dtype=torch.float64)
    rewards = torch.cat([live, torch.ones(4 * dead, 2, dtype=torch.float64)])
    advantages = gdpo_advantages(rewards, 4)
    assert float(advantages.max()) == pytest.approx(largest, abs=0.005)
    assert not advantages[4:].any()  # exactly nothing for the dead


def test_over_tokens_a_dead_group_gets_an_advantage():
    name = "paper_111_opposed"
    mask = NUMBERS[f"{name}::response_mask"]
    rewards = NUMBERS[f"{name}::rewards"]
    dead = (rewards.view(-1, 3, 2) == rewards.view(-1, 3, 2)[:, :1]).all(dim=1).all(dim=1).repeat_interleave(3)
    opposed = group_sums(rewards.double(), 3, eps=0.0).abs() < 1e-9
    nothing = dead | opposed
    over_tokens = gdpo_advantages(rewards, 3, eps=1e-6, lengths=mask.sum(1))
    assert nothing.any() and over_tokens[nothing].tolist() == pytest.approx([0.174] * int(nothing.sum()), abs=1e-3)
    assert gdpo_advantages(rewards, 3)[nothing].abs().max() < 1e-3


def test_weights_count_after_normalisation_only():
    """A reward in other units changes nothing; a weight does."""
    torch.manual_seed(1)
    rewards = torch.rand(12, 3, dtype=torch.float64)
    units = torch.tensor([1.0, 100.0, 0.01], dtype=torch.float64)
    torch.testing.assert_close(gdpo_advantages(rewards * units, 4, eps=0.0), gdpo_advantages(rewards, 4, eps=0.0))
    weights = torch.tensor([1.0, 5.0, 1.0])
    assert (gdpo_advantages(rewards, 4, weights) - gdpo_advantages(rewards, 4)).abs().max() > 0.1
    each = [group_advantages(rewards[:, k], 4) for k in range(3)]
    torch.testing.assert_close(group_sums(rewards, 4, weights), each[0] + 5 * each[1] + each[2])


def test_with_one_reward_only_the_last_step_differs_from_grpo():
    rewards = NUMBERS["single_reward_g4::rewards"]
    plain = group_advantages(rewards[:, 0], 4)
    ours = gdpo_advantages(rewards, 4)
    assert float(plain.max()) == pytest.approx(1.5, abs=1e-3) and float(ours.max()) == pytest.approx(1.62, abs=5e-3)
    torch.testing.assert_close(ours, plain / (plain.std() + 1e-4), rtol=1e-5, atol=1e-6)


def test_unknown_rewards_enter_no_statistic():
    nan = float("nan")
    rewards = torch.tensor([[1.0, nan], [0, nan], [0, 1], [nan, nan]])
    ours = gdpo_advantages(rewards, 4)
    assert not ours.isnan().any() and ours[3] == 0
    first = group_advantages(torch.tensor([1.0, 0, 0]), 3)  # the second reward is known once: no spread, no lesson
    expected = (first - first.mean()) / (first.std() + 1e-4)
    torch.testing.assert_close(ours[:3], expected, rtol=1e-5, atol=1e-6)


def test_the_order_of_prompts_changes_nothing():
    torch.manual_seed(2)
    rewards = torch.randint(0, 2, (24, 3)).double()
    rewards[:4] = 1.0
    order = torch.randperm(6)
    rows = (order[:, None] * 4 + torch.arange(4)).flatten()
    for lengths in (None, torch.randint(1, 9, (24,))):
        whole = gdpo_advantages(rewards, 4, lengths=lengths)
        again = gdpo_advantages(rewards[rows], 4, lengths=None if lengths is None else lengths[rows])
        torch.testing.assert_close(whole[rows], again, rtol=0, atol=1e-12)


def test_inputs_are_left_alone_and_carry_no_gradient():
    rewards = torch.rand(8, 2, requires_grad=True)
    before = rewards.detach().clone()
    assert not gdpo_advantages(rewards, 4).requires_grad
    assert torch.equal(before, rewards.detach())


def test_condition():
    correct = torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert condition(torch.tensor([1.0, 1.0, 0.0, 0.0]), correct).tolist() == [1, 0, 0, 0]
    assert condition(torch.tensor([5.0, 5.0]), torch.tensor([0.4, 0.6]), threshold=0.5).tolist() == [0, 5]


# ----------------------------------------------------------------------------------------------------------------------
# The collapse, by enumeration


def distinct(advantages_of, G: int, K: int, digits: int) -> int:
    """How many different lessons, order left aside, all binary tables of rewards give."""
    rows = list(itertools.product((0.0, 1.0), repeat=K))
    lessons = set()
    for table in itertools.combinations_with_replacement(rows, G):
        values = advantages_of(torch.tensor(table, dtype=torch.float64))
        lessons.add(tuple(sorted(round(v, digits) + 0.0 for v in values.tolist())))
    return len(lessons)


@pytest.mark.parametrize("row", load_json("gdpo_distinct_groups.json")["rows"], ids=str)
def test_how_many_lessons_there_are(row):
    G, K = row["G"], row["K"]
    assert distinct(lambda r: group_advantages(r.sum(1), G), G, K, 3) == row["grpo"]
    assert distinct(lambda r: group_advantages(r.sum(1), G, "none"), G, K, 3) == row["grpo_wo_std"]
    assert distinct(lambda r: group_sums(r, G), G, K, 3) == row["gdpo"]


def test_of_five_answers_grpo_tells_eleven_groups_apart():
    """By hand: totals 0, 1, 2, up to shift and scale. All equal: 1. Two levels, however far apart: 1 to 4 of 5 answers
    on the upper one, 4. All three levels, at least one answer each: 6. (The recorded 13 rounds an eps of 1e-4.)"""
    assert distinct(lambda r: group_advantages(r.sum(1), 5, eps=1e-9), 5, 2, 6) == 11
    assert distinct(lambda r: group_sums(r, 5, eps=1e-9), 5, 2, 6) == 26
    assert gdpo.count_lessons(5, 2) == (11, 15, 26)
    for row in load_json("gdpo_distinct_groups.json")["rows"]:
        if row["G"] != 5:
            assert gdpo.count_lessons(row["G"], row["K"]) == (row["grpo"], row["grpo_wo_std"], row["gdpo"])


def test_an_answer_that_was_cut_off_is_neither_short_nor_whole():
    text = "<think>1+2=3</think><answer>3</answer>"
    mask = torch.ones(2, 5, dtype=torch.bool)
    rollout = grpo.Rollout(
        torch.zeros(2, 6, dtype=torch.long), mask, mask.float(), [text] * 2, torch.tensor([True, False])
    )
    config = Config(conditioned=False, length_limit=5, integer_weight=1.0)
    rewards = gdpo.judge(rollout, [Prompt((), Decimal(3))] * 2, config)
    assert {name: values.tolist() for name, values in rewards.items()} == dict.fromkeys(
        ("correct", "formatted", "short", "integer"), [1.0, 0.0]
    )


def test_rewards_that_cancel_teach_exactly_nothing():
    """Also beside a group that teaches, and in float32, where 1/3 is rounded."""
    opposed = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    assert not gdpo_advantages(opposed, 3).any()
    assert (
        gdpo_advantages(torch.tensor([[1.0], [0]]), 2, torch.tensor([1e-7])).abs().min() > 1e-4
    )  # a small weight alone
    both = gdpo_advantages(torch.cat([opposed, torch.tensor([[1.0, 1], [0, 0], [0, 0]])]), 3)
    assert not both[:3].any() and (both[3:] != 0).all()


def test_the_page_counts_the_lessons_as_the_code_does():
    page = (Path(gdpo.__file__).parent / "docs" / "experiments" / "gdpo.md").read_text(encoding="utf-8")
    lines = page.split("<!-- lessons -->")[1].split("<!-- /lessons -->")[0].strip().splitlines()[2:]
    assert len(lines) == 7
    for line in lines:
        G, K, *counts = map(int, line.strip("| ").split("|"))
        assert gdpo.count_lessons(G, K) == tuple(counts)


def test_distinct_advantages_counts_rewards_and_advantages():
    rewards = torch.tensor([[1.0, 0], [0, 1], [0, 0], [0, 1], [1, 1], [1, 1], [1, 1], [1, 1]])  # the second is dead
    assert distinct_advantages(rewards, group_advantages(rewards.sum(1), 4), 4) == pytest.approx(2 / 3)
    assert distinct_advantages(rewards, gdpo_advantages(rewards, 4), 4) == 1.0
    assert distinct_advantages(rewards[4:], torch.zeros(4), 4) == 1.0


# ----------------------------------------------------------------------------------------------------------------------
# The stage


def test_the_gradient_does_not_depend_on_micro_batches(policy):  # noqa: F811
    policy.double()
    rollout = rollout_of(policy)
    rollout.sampled_logps = rollout.sampled_logps.double()
    torch.manual_seed(0)
    advantages = gdpo_advantages(torch.randint(0, 2, (12, 3)).double(), 4)
    found = []
    for size in (64, 5, 1):
        policy.zero_grad()
        config = Config(temperature=0.7, micro_batch_size=size)
        accumulate_gradients(StubRun(), policy, rollout, advantages, config, rollout.sampled_logps)
        found.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-5, atol=1e-7)  # positions turn by float32 cosines


def test_rewards_of_answers():
    good, wrong = "<think>a</think><answer>7</answer>", "<think>a</think><answer>7.5</answer>"
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1, 4:] = False  # the second answer has four tokens
    rollout = grpo.Rollout(
        torch.zeros(4, 7), mask, torch.zeros(4, 6), [good, wrong, good, "7"], torch.tensor([1, 1, 0, 1]).bool()
    )
    rewards = gdpo.judge(
        rollout, [Prompt((), Decimal(7))] * 4, Config(length_limit=5, integer_weight=1.0, conditioned=False)
    )
    assert {name: values.tolist() for name, values in rewards.items()} == {
        "correct": [1, 0, 0, 0], "formatted": [1, 1, 0, 0], "short": [0, 1, 0, 0], "integer": [1, 0, 0, 0],
    }  # fmt: skip
    rewards = gdpo.judge(rollout, [Prompt((), Decimal(7))] * 4, Config(length_limit=5))
    assert rewards["short"].tolist() == [0, 0, 0, 0] and "integer" not in rewards
    rewards = gdpo.judge(rollout, [Prompt((), Decimal(7))] * 4, Config(length_limit=6))
    assert rewards["short"].tolist() == [1, 0, 0, 0]


def test_the_order_of_adding_and_normalising_is_the_one_asked_for():
    rewards = {"correct": torch.tensor([0.0, 0, 0, 1, 0, 1]), "formatted": torch.tensor([0.0, 1, 0, 1, 1, 1])}
    lengths = torch.tensor([3, 5, 2, 2, 4, 9])
    table = torch.stack(list(rewards.values()), dim=1)
    weights = torch.tensor([2.0, 1.0])

    def ours(**settings):
        return gdpo.advantages_of(rewards, lengths, Config(correct_weight=2.0, group_size=2, **settings))

    torch.testing.assert_close(ours(), gdpo_advantages(table, 2, weights))
    torch.testing.assert_close(ours(batch_over="tokens"), gdpo_advantages(table, 2, weights, lengths=lengths))
    torch.testing.assert_close(ours(combine="sum"), group_advantages(table @ weights, 2))
    torch.testing.assert_close(ours(combine="sum", scale="none"), group_advantages(table @ weights, 2, "none"))
    torch.testing.assert_close(ours(format_weight=0.0), gdpo_advantages(table[:, :1], 2, weights[:1]))


def tiny_gdpo(folder, start, **changes) -> Config:  # noqa: F811
    settings = {
        "out_dir": str(folder), "init_from": str(start), "steps": 2, "prompts_per_step": 4, "group_size": 4,
        "n_prompts": 64, "eval_prompts": 8, "eval_every": 2, "device": "cpu", "max_new_tokens": 40, "length_limit": 20,
        "minibatches": 1,
    }  # fmt: skip
    return Config(**(settings | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"combine": "sum"},
        {"conditioned": False, "integer_weight": 0.5, "batch_over": "tokens"},
        {"beta": 0.05, "draws": 2, "overlong_buffer": 10},
        {"format_weight": 0.0, "length_weight": 0.0},
    ],
    ids=str,
)
def test_every_form_of_the_stage_runs(tmp_path, start, changes, capsys):  # noqa: F811
    figures = gdpo.main(tiny_gdpo(tmp_path, start, epochs=1, **changes))
    assert 0 <= figures["accuracy"] <= 1
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward" in row]
    assert {"correct", "formatted", "short", "distinct_advantages", "flat_groups"} <= steps[0].keys()
    assert ("integer" in steps[0]) == ("integer_weight" in changes)
    for row in steps:  # the one update of a rollout begins with the policy that sampled
        assert abs(row["kl_old"]) < 1e-4 and row["clip_fraction"] == 0 and 0.05 < row["rollout_share"] < 1
    assert [row["step"] for row in rows if "accuracy" in row] == [0, 2]
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["stage"] == "gdpo"
    assert ("but for its last step" in capsys.readouterr().out) == ("length_weight" in changes)


@pytest.mark.parametrize("flat", [{}, {1: 1.0, 3: 0.0}])
def test_questions_are_drawn_again_only_for_groups_that_teach_nothing(tmp_path, start, monkeypatch, flat):  # noqa: F811
    """And each answer is judged by the gold of its own question, and keeps its own advantage."""
    _, tokenizer, _ = load_stage(str(start))
    ids, known = encode_prompts(load_prompts("arith", "train", n=512), tokenizer, 400)
    gold_of = {tuple(tokens): prompt.gold for tokens, prompt in zip(ids, known)}
    drawn, updates = [], []
    sample, judge, accumulate = gdpo.sample_answers, gdpo.judge, gdpo.accumulate_gradients

    def judged(rollout, asked, config):
        firsts = rollout.mask.int().argmax(dim=1) + 1
        assert [one.gold for one in asked] == [
            gold_of[tuple(row[:n].tolist())] for row, n in zip(rollout.tokens, firsts)
        ]
        right = [flat.get(group, float(g == group % 4)) for group in range(len(asked) // 4) for g in range(4)]
        return judge(rollout, asked, config) | {"correct": torch.tensor(right)}

    def accumulated(run, model, rollout, advantages, *more):
        updates.append(advantages)
        return accumulate(run, model, rollout, advantages, *more)

    monkeypatch.setattr(gdpo, "sample_answers", lambda *args: drawn.append(len(args[2])) or sample(*args))
    monkeypatch.setattr(gdpo, "judge", judged)
    monkeypatch.setattr(gdpo, "accumulate_gradients", accumulated)
    more = {"format_weight": 0.0, "length_weight": 0.0, "draws": 3, "steps": 1, "epochs": 1, "eval_prompts": 1}
    gdpo.main(tiny_gdpo(tmp_path, start, n_prompts=512, **more))
    assert drawn == ([4, 4] if flat else [4])  # two are missing: twice as many are drawn
    best = [0, 2, 0, 1] if flat else [0, 1, 2, 3]  # of the groups that are kept: 0, 2, 4 and 5, or all four
    expected = gdpo_advantages(torch.eye(4)[best].flatten()[:, None], 4)
    assert len(updates) == 1 and torch.equal(updates[0], expected)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in rows if "reward" in row)
    assert row["flat_groups"] == 0 and row["answers"] == 16 * len(drawn)
    assert row["correct"] == pytest.approx(((4 + 6) / 32) if flat else 0.25)


def test_rates_seeds_and_the_best_checkpoint(tmp_path, start, monkeypatch):  # noqa: F811
    rates, seeds, accuracies = [], [], iter([0.2, 0.9, 0.4, 0.4])
    update, sample = gdpo.update, gdpo.sample_answers
    monkeypatch.setattr(gdpo, "update", lambda *args: rates.append(args[3]) or update(*args))
    monkeypatch.setattr(gdpo, "sample_answers", lambda *args: seeds.append(args[-1]) or sample(*args))
    monkeypatch.setattr(grpo, "score", lambda texts, *_: (torch.arange(16.0), torch.zeros(16)))
    shown = shown_questions(monkeypatch, gdpo, start)
    monkeypatch.setattr(rollout_module, "greedy_accuracy", lambda *args: next(accuracies))
    settings = {"eval_every": 1, "warmup": 2, "lr": 1e-3, "final_lr": 0.5, "epochs": 1}
    gdpo.main(tiny_gdpo(tmp_path, start, **settings))
    assert rates == [pytest.approx(learning_rate(step, 2, 1e-3, 2, 0.5)) for step in range(2)] and rates[0] < rates[1]
    assert shown == [True, True, True]  # at the start, and at each evaluation
    assert len(set(seeds)) == 2 and torch.load(tmp_path / "best.pt", weights_only=True)["step"] == 1  # 0.9, not 0.4


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"correct_weight": 0.0, "format_weight": 0.0, "length_weight": 0.0}, "all weights are 0"),
        ({"scale": "none"}, "--combine sum"),
        ({"beta": 0.1, "kl_in": "reward"}, "kl_in loss"),
        ({"combine": "sum", "batch_over": "tokens"}, "batch_over"),
        ({"length_limit": 0}, "length_limit"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, start, changes, word):  # noqa: F811
    with pytest.raises(UserError, match=word):
        gdpo.main(tiny_gdpo(tmp_path / "run", start, **changes))
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_ends_with_the_same_weights(tmp_path, start, monkeypatch):  # noqa: F811
    stage = types.SimpleNamespace(main=gdpo.main, Run=Run)
    settings = {"steps": 4, "minibatches": 2, "epochs": 2, "draws": 2, "save_every": 1, "beta": 0.05}
    whole, stopped = (tiny_gdpo(tmp_path / name, start, **settings) for name in ("whole", "stopped"))
    one, _ = assert_exact_resume(monkeypatch, stage, whole, stopped, saves=2)
    assert one["step"] == 4


def test_the_worked_example_is_worked_by_hand(capsys):
    """Two answers: the better one is 1/√2 above the mean in stds; both rewards at once make it twice as good."""
    gdpo.example()
    lines = capsys.readouterr().out.splitlines()
    found = [[float(x) for x in re.findall(r"-?\d+\.\d{4}", line)] for line in lines]
    h = math.sqrt(0.5)
    assert found[2] == pytest.approx([-h, h, -h, h], abs=2e-4)  # sums 0, 1 and 0, 2: the same lesson
    assert found[3] == pytest.approx([0, 0, -h, h], abs=2e-4) and found[4] == pytest.approx([-h, h, -h, h], abs=2e-4)
    assert found[5] == pytest.approx([-h, h, -2 * h, 2 * h], abs=4e-4)
    std = math.sqrt((h**2 + h**2 + 4 * h**2 + 4 * h**2) / 3)
    assert found[6] == pytest.approx([-h / std, h / std, -2 * h / std, 2 * h / std], abs=4e-4)
