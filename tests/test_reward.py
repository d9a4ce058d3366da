import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import load_json, load_npz
from tiny import NAMES, assert_exact_resume, tiny_pretrain, tiny_sft

import arithmetic
import optim
import pretrain
import reward
import sft
from preferences import Pair, encode_pairs
from reward import (
    Config,
    RewardModel,
    bradley_terry_loss,
    calibration,
    from_first_difference,
    last_real,
    load_reward_model,
    real_tokens,
    report,
    token_loss,
)
from rollout import sample_answers
from runtime.errors import UserError
from runtime.run import start
from stages import load_stage
from tokenizer import ByteTokenizer
from transformer import ModelConfig, Transformer

NUMBERS = load_npz("trl_reward")
META = load_json("trl_reward.meta.json")


@pytest.mark.parametrize("case", META["cases"], ids=lambda case: case["name"])
def test_loss_and_gradient_are_those_of_trl(case):
    rewards = NUMBERS["rewards"].clone().requires_grad_()
    chosen, rejected = rewards.squeeze(1).chunk(2)
    margin = NUMBERS["margin"] if case["margin"] else 0.0
    loss = bradley_terry_loss(chosen, rejected, margin, case["center_rewards_coefficient"] or 0.0)
    assert loss.shape == ()
    loss.backward()
    torch.testing.assert_close(loss, NUMBERS[f"{case['name']}::loss"], rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(rewards.grad, NUMBERS[f"{case['name']}::grad"], rtol=1e-7, atol=1e-10)


def test_loss_by_hand():
    chosen, rejected = torch.tensor([2.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))) / 2
    assert float(bradley_terry_loss(chosen, rejected)) == pytest.approx(expected)
    assert float(bradley_terry_loss(chosen, rejected, center=0.1)) == pytest.approx(expected + 0.1 * (4 + 1) / 2)
    with_margin = (math.log(1 + math.exp(-1.5)) + math.log(1 + math.exp(1.5))) / 2
    assert float(bradley_terry_loss(chosen, rejected, margin=0.5)) == pytest.approx(with_margin)


def test_gradient_by_finite_differences():
    chosen, rejected = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(lambda c, r: bradley_terry_loss(c, r, 0.3, 0.1), (chosen, rejected))


def test_no_overflow_for_certain_pairs():
    loss = bradley_terry_loss(torch.tensor([0.0]), torch.tensor([1e4]))
    assert float(loss) == pytest.approx(1e4)


# ----------------------------------------------------------------------------------------------------------------------
# Pooling


def llama_scores() -> RewardModel:
    config = ModelConfig(31, 16, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=20, max_seq_len=64, norm_eps=1e-6)
    model = Transformer(config)
    weights = {"head.weight": model.head.weight}
    for key, value in NUMBERS.items():
        if key.startswith("w::model."):
            name = key.removeprefix("w::")
            for theirs, ours in NAMES.items():
                name = name.replace(theirs, ours)
            weights[name] = value
    model.load_state_dict(weights)
    judge = RewardModel(model)
    with torch.no_grad():
        judge.score.weight.copy_(NUMBERS["w::score.weight"])
    return judge


def test_scores_are_those_of_transformers_where_it_pools_at_the_last_real_token():
    """Row 0 is padded on the right, row 1 on the left. Row 2 ends in a real token that has the padding's id:
    transformers looks for ids and reads the token before it, the mask says otherwise."""
    judge = llama_scores()
    mask = NUMBERS["seqcls_attention_mask"]
    scores = judge(NUMBERS["seqcls_input_ids"], mask)
    assert scores.shape == (3,)
    torch.testing.assert_close(scores[:2], NUMBERS["seqcls_logits"][:2, 0], atol=1e-5, rtol=1e-4)
    per_token = NUMBERS["seqcls_per_token_scores"][..., 0]
    scores = scores.detach()
    assert float(scores[2]) == pytest.approx(float(per_token[2, 6]), abs=1e-5)
    assert float(scores[2]) != pytest.approx(float(NUMBERS["seqcls_logits"][2, 0]), abs=1e-2)
    for row in range(3):  # each row alone gives the same
        torch.testing.assert_close(
            judge(NUMBERS["seqcls_input_ids"][row : row + 1], mask[row : row + 1]), scores[row : row + 1],
            atol=1e-5, rtol=1e-4,
        )  # fmt: skip


def test_padding_on_either_side_and_the_order_of_rows_change_nothing():
    torch.manual_seed(1)
    judge = RewardModel(Transformer(ModelConfig(40, 16, 2, 2))).double()
    tokens = torch.randint(1, 40, (3, 6))
    full = torch.ones(3, 6, dtype=torch.bool)
    plain = judge(tokens, full)
    pad, no = torch.zeros(3, 4, dtype=torch.long), torch.zeros(3, 4, dtype=torch.bool)
    torch.testing.assert_close(judge(torch.cat([tokens, pad], 1), torch.cat([full, no], 1)), plain)
    torch.testing.assert_close(judge(torch.cat([pad, tokens], 1), torch.cat([no, full], 1)), plain)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(judge(tokens[order], full[order]), plain[order])


def test_the_score_at_every_token_is_that_of_transformers_and_at_the_last_one_the_score():
    judge = llama_scores()
    mask, ids = NUMBERS["seqcls_attention_mask"], NUMBERS["seqcls_input_ids"]
    every, per_token = judge.at_every_token(ids, mask), NUMBERS["seqcls_per_token_scores"][..., 0]
    torch.testing.assert_close(every[mask.bool()], per_token[mask.bool()], atol=1e-5, rtol=1e-4)
    assert torch.equal(judge(ids, mask), every[torch.arange(3), last_real(mask)])


def test_the_loss_at_every_token_by_hand():
    """Two pairs: columns 1 and 2 count of the first, column 2 of the second. Each pair weighs the same."""
    chosen = torch.tensor([[9.0, 1.0, 0.0], [9.0, 9.0, 2.0]], requires_grad=True)
    rejected = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    where = torch.tensor([[0, 1, 1], [0, 0, 1]])
    loss = token_loss(chosen, rejected, where)
    nll = lambda x: math.log1p(math.exp(-x))  # noqa: E731
    assert float(loss.detach()) == pytest.approx(((nll(1) + nll(0)) / 2 + nll(2)) / 2)
    loss.backward()
    assert (chosen.grad * (1 - where)).abs().sum() == 0 and chosen.grad[0, 1] == pytest.approx(
        -(1 - torch.sigmoid(torch.tensor(1.0)).item()) / 4
    )
    assert float(token_loss(chosen.detach(), rejected, torch.zeros(2, 3))) == 0


def test_columns_from_first_difference():
    T = ByteTokenizer()
    pairs = [
        Pair(({"role": "user", "content": "2+3?"},), "2+3=5.", "2+3=6."),
        Pair(({"role": "user", "content": "longer: 4+5?"},), "9", "4+5=9"),
    ]
    rows = encode_pairs(pairs, T, 64)
    tokens, _, real = rows.batch([0, 1])
    where = from_first_difference(tokens, real)
    first = len(rows.prompts[0]) + len("2+3=")
    assert where[0].nonzero()[:, 0].tolist() == [first, first + 1, first + 2]  # the digit, the dot, the end
    start = len(rows.prompts[1])
    assert where[1].nonzero()[:, 0].tolist() == [start, start + 1]  # "9" and its end; the other one goes on
    turned = torch.cat([tokens[2:], tokens[:2]]), torch.cat([real[2:], real[:2]])
    assert torch.equal(from_first_difference(*turned), where)  # whichever of the two is the longer


def test_last_real_refuses_an_empty_row():
    assert last_real(torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]])).tolist() == [2, 0]
    with pytest.raises(ValueError, match="without a real token"):
        last_real(torch.tensor([[0, 0], [1, 1]]))


def test_real_tokens_end_with_the_answer():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0]], dtype=torch.bool)  # about tokens 1..4
    assert real_tokens(torch.zeros(2, 5), mask).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]


def test_normalize_gives_mean_0_and_variance_1():
    torch.manual_seed(0)
    judge = RewardModel(Transformer(ModelConfig(40, 16, 2, 2)))
    tokens, mask = torch.randint(0, 40, (32, 5)), torch.ones(32, 5)
    before = judge(tokens, mask).detach()
    judge.normalize(float(before.mean()), float(before.std()))
    after = judge(tokens, mask).detach()
    assert float(after.mean()) == pytest.approx(0, abs=1e-5) and float(after.std()) == pytest.approx(1, abs=1e-4)
    assert torch.equal(after.argsort(), before.argsort())


def test_the_words_get_no_gradient_and_do_not_decay():
    judge = RewardModel(Transformer(ModelConfig(40, 16, 1, 2)))
    assert not judge.backbone.head.weight.requires_grad and judge.score.weight.requires_grad
    tied = RewardModel(Transformer(ModelConfig(40, 16, 1, 2, tie_embeddings=True)))
    assert tied.backbone.embed.weight.requires_grad


def test_head_starts_with_scores_of_about_unit_size():
    torch.manual_seed(0)
    judge = RewardModel(Transformer(ModelConfig(40, 256, 1, 2)))
    assert float(judge.score.weight.detach().std()) == pytest.approx(1 / math.sqrt(257), rel=0.2)
    assert float(judge.score.bias.detach()) == 0


# ----------------------------------------------------------------------------------------------------------------------
# Figures


def test_calibration_by_hand():
    """Of ten pairs called with σ = 0.6, six are right; of ten with σ = 0.95, five: error (0 + 0.45) / 2."""
    small, large = math.log(0.6 / 0.4), math.log(0.95 / 0.05)
    margins = torch.tensor([small] * 6 + [-small] * 4 + [large] * 5 + [-large] * 5)
    error, table = calibration(margins)
    assert error == pytest.approx(0.225, abs=1e-6)
    assert [(round(p, 3), round(o, 3), n) for p, o, n in table] == [(0.6, 0.6, 10), (0.95, 0.5, 10)]


def test_the_example_by_hand(capsys):
    reward.example()
    lines = capsys.readouterr().out.splitlines()
    likely = 1 / (1 + math.exp(-1))
    assert "1.5000" in lines[0] and "0.5000" in lines[0] and lines[1].endswith(" 1.0000")
    assert lines[2].endswith(f" {likely:.4f}") and lines[3].endswith(f" {-math.log(likely):.4f}")
    assert f"{likely - 1:.4f}," in lines[4] and lines[4].endswith(f" {1 - likely:.4f}")
    assert f"{math.log(2):.4f}" in lines[6] and f"{-math.log(likely) + 0.05 * 2**2:.4f}" in lines[7]


def test_a_tie_counts_as_wrong():
    assert reward.judge(torch.zeros(4), torch.zeros(4))["val_accuracy"] == 0


def test_the_report_tells_flaws_and_length():
    tokenizer = ByteTokenizer()
    prompt = ({"role": "user", "content": "2+3?"},)
    pairs = [Pair(prompt, "5", "six", "sum"), Pair(prompt, "five", "6", "form"), Pair(prompt, "5", "7", "sum")]
    rows = encode_pairs(pairs, tokenizer, 64)
    text = report(rows, torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 2.0, 0.0]))
    assert "flaw 'form': accuracy 0.000" in text and "flaw 'sum': accuracy 1.000" in text
    assert "shorter: 1.000 (1)" in text and "longer: 0.000 (1)" in text and "as long: 1.000 (1)" in text
    lengths, scores = torch.tensor([2.0, 5.0, 2.0, 4.0, 2.0, 2.0]), torch.tensor([1.0, 1.0, 1.0, 0.0, 2.0, 0.0])
    assert f"{float(torch.corrcoef(torch.stack([lengths, scores]))[0, 1]):+.3f}" in text


# ----------------------------------------------------------------------------------------------------------------------
# The stage


@pytest.fixture(scope="module")
def sft_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("before_reward")
    pretrain.main(tiny_pretrain(root / "pretrain"))
    sft.main(tiny_sft(root / "sft", root / "pretrain"))
    return root / "sft"


def tiny(folder, sft_folder, **changes) -> Config:
    settings = {
        "out_dir": str(folder), "init_from": str(sft_folder),
        "data": "arith", "n_pairs": 16, "n_sums": 8, "epochs": 1.0, "batch_size": 4,
        "eval_every": 3, "save_every": 2, "log_every": 1, "eval_pairs": 16, "normalize_on": 8, "max_new_tokens": 6,
        "device": "cpu", "max_length": 64,
    }  # fmt: skip
    return replace(Config(), **(settings | changes))


def test_a_run_leaves_a_reward_model_that_others_can_load(tmp_path, sft_folder):
    figures = reward.main(tiny(tmp_path / "reward", sft_folder))
    assert set(figures) == {"val_accuracy"} and not (tmp_path / "reward" / "best.pt").exists()
    logged = [json.loads(line) for line in (tmp_path / "reward" / "metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["val_accuracy"] == figures["val_accuracy"]
    assert set(logged[-1]) >= {"val_loss", "val_margin", "val_calibration_error"}
    assert [row["step"] for row in logged if "val_loss" in row] == [3, 6]
    judge, tokenizer, state = load_reward_model(str(tmp_path / "reward"))
    assert state["stage"] == "reward" and state["lineage"][-1]["stage"] == "sft"
    assert "flaw" in (tmp_path / "reward" / "samples.txt").read_text()
    rows = encode_pairs([Pair(({"role": "user", "content": "2+3?"},), "5", "6")], tokenizer, 64)
    tokens, _, real = rows.batch([0])
    assert judge(tokens, real).shape == (2,)
    with pytest.raises(UserError, match="scores answers and writes none"):
        load_stage(str(tmp_path / "reward"))
    with pytest.raises(UserError, match="not a reward model"):
        load_reward_model(str(sft_folder))


def test_after_training_answers_of_the_starting_policy_score_0_with_variance_1(tmp_path, sft_folder):
    """Each answer alone, without padding: if padding were scored in training's place, this would not hold."""
    config = tiny(tmp_path / "reward", sft_folder, normalize_on=16, max_new_tokens=10)
    reward.main(config)
    judge, tokenizer, _ = load_reward_model(str(tmp_path / "reward"))
    policy, _, _ = load_stage(str(sft_folder))
    rows = encode_pairs(reward.training_pairs(config), tokenizer, config.max_length)
    rollout = sample_answers(policy, tokenizer, rows.prompts[:16], 1, 10, 1.0, seed=config.seed)
    found = []
    with torch.no_grad():
        for tokens, mask in zip(rollout.tokens, rollout.mask):
            n = int(mask.nonzero().max()) + 2
            found.append(float(judge(tokens[None, :n], torch.ones(1, n))))
    assert sum(found) / 16 == pytest.approx(0, abs=1e-3) and float(torch.tensor(found).std()) == pytest.approx(
        1, abs=1e-3
    )
    assert len({int(mask.sum()) + len(prompt) for mask, prompt in zip(rollout.mask, rows.prompts)}) > 2


def test_two_prompts_with_room_are_enough_to_scale_the_scores(sft_folder):
    policy, tokenizer, _ = load_stage(str(sft_folder))
    room = policy.config.max_seq_len - 6
    pairs = [Pair(({"role": "user", "content": "q" * n},), "5", "6") for n in (room - 2, room - 1, 1, 2)]
    rows = encode_pairs(pairs, ByteTokenizer(), 2 * room)
    config = replace(Config(), normalize_on=2, max_new_tokens=6)
    assert reward.prompts_with_room(policy, policy, rows, config) == [rows.prompts[0], rows.prompts[2]]
    with pytest.raises(UserError, match="at least two prompts"):
        reward.prompts_with_room(policy, policy, rows, replace(config, normalize_on=1))


def test_a_resumed_run_ends_with_the_same_weights(tmp_path, sft_folder, monkeypatch):
    whole, stopped = (tiny(tmp_path / name, sft_folder) for name in ("whole", "stopped"))
    assert_exact_resume(monkeypatch, reward, whole, stopped, saves=2)


def test_parts_of_a_batch_add_up_to_the_batch(tmp_path, sft_folder):
    one = {"epochs": 1.0, "n_pairs": 4, "batch_size": 4, "n_sums": 0, "normalize_on": 0, "center": 0.1}
    reward.main(tiny(tmp_path / "a", sft_folder, **one))
    reward.main(tiny(tmp_path / "b", sft_folder, micro_batch_size=3, **one))  # parts of unequal size
    a, b = (json.loads((tmp_path / x / "metrics.jsonl").read_text().splitlines()[0]) for x in "ab")
    for name in ("loss", "grad_norm", "margin"):
        assert a[name] == pytest.approx(b[name], rel=1e-4), name


def test_the_loss_of_a_step_has_margin_centre_and_the_tokens_share(tmp_path, sft_folder, monkeypatch):
    """The first step's, from the scores of the weights at the start."""
    seen, every = [], RewardModel.at_every_token

    def noted(self, tokens, real, answers=None):  # what is logged is of prompts that are read once, what is seen not
        seen.append((tokens, real, every(self, tokens, real)))
        return every(self, tokens, real, answers)

    monkeypatch.setattr(RewardModel, "at_every_token", noted)
    more = {"margin": 0.5, "center": 0.1, "token_weight": 0.3, "n_sums": 0, "normalize_on": 0}
    reward.main(tiny(tmp_path, sft_folder, **more))
    tokens, real, scored = (x.detach() for x in seen[0])
    chosen, rejected = scored[torch.arange(8), real.sum(dim=1) - 1].chunk(2)
    whole = bradley_terry_loss(chosen, rejected, 0.5, 0.1)
    of_tokens = token_loss(*scored.chunk(2), from_first_difference(tokens, real))
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert row["margin"] == pytest.approx(float((chosen - rejected).mean()), rel=1e-4)
    assert row["accuracy"] == pytest.approx(float((chosen > rejected).float().mean()))
    logged = row["loss"]
    assert logged == pytest.approx(float(0.7 * whole + 0.3 * of_tokens), rel=1e-5)
    assert logged != pytest.approx(float(0.7 * bradley_terry_loss(chosen, rejected) + 0.3 * of_tokens), rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_length": 4096}, "more than the context"),
        ({"batch_size": 0}, "batch_size"),
        ({"data": "nothing"}, "no pairs called so"),
        ({"max_new_tokens": 250}, "normalize_on needs"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tmp_path, sft_folder, changes, words):
    with pytest.raises(UserError, match=words):
        reward.main(tiny(tmp_path / "x", sft_folder, **changes))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("of", ["the whole", "its tokens"])
def test_it_learns_the_preference_and_with_the_pairs_turned_round_the_opposite(tmp_path, sign, of):
    """Answers with more letters "a" are preferred; the judge hears the pairs in the right or in the wrong order."""
    tokenizer = ByteTokenizer()
    torch.manual_seed(0)
    model = RewardModel(Transformer(ModelConfig(tokenizer.vocab_size, 32, 1, 2)))
    generator = torch.Generator().manual_seed(0)
    prompt = ({"role": "user", "content": "w"},)
    pairs = []
    for _ in range(200):
        n = torch.randperm(7, generator=generator)[:2].sort(descending=True).values.tolist()
        better, worse = ("a" * k + "b" * (6 - k) for k in n)
        pairs.append(Pair(prompt, better, worse))
    rows = encode_pairs(pairs, tokenizer, 32)
    optimizers = optim.make_optimizers(model, 5e-3)
    run = start(Config(out_dir=str(tmp_path / "r"), device="cpu"), "reward")
    for step in range(30):
        tokens, _, real = rows.batch(list(range(step * 5, step * 5 + 5)))
        if of == "the whole":
            loss = bradley_terry_loss(*model(tokens, real).chunk(2)[::sign])
        else:
            every = model.at_every_token(tokens, real).chunk(2)[::sign]
            loss = token_loss(*every, from_first_difference(tokens, real))
        loss.backward()
        optim.update(run, model, optimizers, 5e-3, 1.0)
    with torch.no_grad():
        tokens, _, real = rows.batch(list(range(150, 200)))
        chosen, rejected = model(tokens, real).chunk(2)
    accuracy = float((chosen > rejected).float().mean())
    assert accuracy > 0.9 if sign > 0 else accuracy < 0.1


def test_held_out_pairs_are_about_held_out_questions():
    from preferences import load_pairs

    asked = {pair.prompt[0]["content"] for pair in load_pairs("arith", "train", seed=3)}
    held = {pair.prompt[0]["content"] for pair in load_pairs("arith", "validation")}
    exam = {p.question for p in arithmetic.problems(512, "test", split="test")}
    assert not asked & held and not asked & exam


def test_the_report_gives_accuracy_on_test_pairs(tmp_path, sft_folder):
    import evaluate

    reward.main(tiny(tmp_path / "reward", sft_folder))
    row = evaluate.measure(str(tmp_path / "reward"), evaluate.Config(n=24, device="cpu"))
    assert row["stage"] == "reward" and row["n"] == 24 and 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1


def test_the_next_command_writes_where_no_other_reward_model_s_policy_is(sft_folder, tmp_path, capsys):
    """What configs/reward_weak.py names next must not go into the folder of the pipeline's PPO."""
    reward.main(tiny(tmp_path / "reward_weak", sft_folder, eval_pairs=4, epochs=1.0))
    assert f"--out_dir {tmp_path / 'ppo_reward_weak'}" in capsys.readouterr().out
