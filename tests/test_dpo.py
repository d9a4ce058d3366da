import json
import math
import re
from dataclasses import replace

import pytest
import torch
from conftest import load_json, load_npz
from tiny import assert_exact_resume, but_slow, llama_tiny, tiny_pretrain, tiny_sft

import dpo
import kto
import optim
import pretrain
import sft
from dpo import (
    Config,
    dpo_loss,
    ipo_loss,
    log1mexp,
    orpo_loss,
    pair_figures,
    pair_loss,
    reference_logps,
    simpo_loss,
    where_needed,
)
from kto import answer_figures, batch_kl, class_means, kto_loss
from preferences import Judged, Pair, encode_judged, encode_pairs, load_judged, load_pairs
from runtime.checkpoint import load_checkpoint
from runtime.errors import UserError
from runtime.run import start
from stages import load_stage
from tokenizer import ByteTokenizer
from transformer import ModelConfig, Transformer, answer_logps, token_logps

DPO, KTO, ODDS, E2E = (load_npz(name) for name in ("trl_dpo", "trl_kto", "trl_orpo_simpo", "dpo_e2e_llama"))
DPO_CASES = {case["name"]: case for case in load_json("trl_dpo.meta.json")["cases"]}
KTO_CASES = [case for case in load_json("trl_kto.meta.json")["cases"] if case["loss_type"] == "kto"]
ODDS_CASES = {case["name"]: case for case in load_json("trl_orpo_simpo.meta.json")["cases"]}


def sums(logps, average=False):
    """TRL's rows 0-2 are chosen, 3-5 rejected: summed (or mean) log-probabilities of the completions."""
    mask = DPO["completion_mask"][:, 1:]
    total = (logps * mask).sum(1)
    return (total / mask.sum(1) if average else total).chunk(2)


@pytest.mark.parametrize("name", ["sigmoid_b0.1", "sigmoid_b0.5", "ipo_b0.1", "ipo_b0.5", "sigmoid_norm_b0.5"])
def test_dpo_and_ipo_are_those_of_trl(name):
    case = DPO_CASES[name]
    logps = DPO["logps"].clone().requires_grad_()
    average = case["loss_types"][0] in ("ipo", "sigmoid_norm")
    loss_of = ipo_loss if case["loss_types"] == ["ipo"] else dpo_loss
    loss = loss_of(*sums(logps, average), *sums(DPO["ref_logps"], average), case["beta"])
    assert loss.shape == ()
    loss.backward()
    torch.testing.assert_close(loss, DPO[f"{name}::loss"], rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(logps.grad, DPO[f"{name}::grad"], rtol=1e-7, atol=1e-10)


def test_label_smoothing_against_trls_robust_form():
    """TRL ignores label smoothing in "sigmoid". Its "robust" is [-(1-ε) logσ(x) + ε logσ(-x)] / (1 - 2ε), from which
    the conservative form follows with the sign of its second term turned: checked against both cases."""
    policy, ref = sums(DPO["logps"]), sums(DPO["ref_logps"])
    plain = dpo_loss(*policy, *ref, 0.1)
    flipped = dpo_loss(policy[1], policy[0], ref[1], ref[0], 0.1)
    robust = (0.9 * plain - 0.1 * flipped) / 0.8
    torch.testing.assert_close(robust, DPO["robust_ls0.1::loss"], rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(dpo_loss(*policy, *ref, 0.1, label_smoothing=0.1), 0.9 * plain + 0.1 * flipped)


def test_dpo_by_hand():
    one = torch.tensor([-10.0, -5.0], dtype=torch.float64)
    two = torch.tensor([-12.0, -4.0], dtype=torch.float64)
    ref = torch.tensor([-11.0, -4.5], dtype=torch.float64), torch.tensor([-11.0, -4.5], dtype=torch.float64)
    # δ = (1 - (-1)) = 2 and (-0.5 - 0.5) = -1
    expected = (math.log(1 + math.exp(-0.5 * 2)) + math.log(1 + math.exp(0.5))) / 2
    assert float(dpo_loss(one, two, *ref, beta=0.5)) == pytest.approx(expected)
    assert float(ipo_loss(one, two, *ref, beta=0.5)) == pytest.approx(((2 - 1) ** 2 + (-1 - 1) ** 2) / 2)
    assert float(dpo_loss(one, one, one, one)) == pytest.approx(math.log(2))


def test_gradient_of_dpo_is_that_of_its_paper():
    """-β σ(-β δ) / B on the chosen, the same with the other sign on the rejected answer."""
    values = [torch.randn(4, dtype=torch.float64, requires_grad=i < 2) for i in range(4)]
    dpo_loss(*values, beta=0.3).backward()
    delta = (values[0] - values[2] - values[1] + values[3]).detach()
    torch.testing.assert_close(values[0].grad, -0.3 * torch.sigmoid(-0.3 * delta) / 4)
    torch.testing.assert_close(values[1].grad, -values[0].grad)


@pytest.mark.parametrize("case", KTO_CASES, ids=lambda case: case["name"])
def test_kto_is_that_of_trl(case):
    name, mask = case["name"], KTO["completion_mask"][:, 1:]
    logps = KTO["logps"].clone().requires_grad_()
    other = (KTO[f"{name}::KL_logps"] - KTO[f"{name}::KL_ref_logps"]) * KTO["KL_completion_mask"][:, 1:]
    loss = kto_loss(
        (logps * mask).sum(1), (KTO["ref_logps"] * mask).sum(1), KTO[f"{name}::labels"], other.sum(1).mean(),
        case["beta"], case["desirable_weight"], case["undesirable_weight"],
    )  # fmt: skip
    assert loss.shape == ()
    loss.backward()
    torch.testing.assert_close(loss, KTO[f"{name}::loss"], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(logps.grad, KTO[f"{name}::grad"], rtol=1e-6, atol=1e-8)


def test_kto_by_hand_and_without_gradient_through_the_kl():
    policy = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    ref, desirable = torch.zeros(3, dtype=torch.float64), torch.tensor([True, False, True])
    kl = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    expected = ((1 - sigmoid(0.7)) + 2 * (1 - sigmoid(-1.7)) + (1 - sigmoid(0.2))) / 3
    loss = kto_loss(policy, ref, desirable, kl, beta=1.0, undesirable_weight=2.0)
    assert float(loss.detach()) == pytest.approx(expected)
    loss.backward()
    assert kl.grad is None
    policy = policy.detach()
    negative = kto_loss(policy, ref, desirable, torch.tensor(-5.0), beta=1.0)
    assert float(negative) == pytest.approx(float(kto_loss(policy, ref, desirable, torch.tensor(0.0), beta=1.0)))


def numbers_of(line: str) -> list[float]:
    return [float(x) for x in re.findall(r"-?\d+\.\d+", line)]


def test_the_example_of_dpo_by_hand(capsys):
    dpo.example()
    lines = capsys.readouterr().out.splitlines()
    assert numbers_of(lines[2]) == [-8, -10, 2, 1] and numbers_of(lines[3]) == [-7, -6, -1, -0.5]
    assert numbers_of(lines[4]) == [1.5]  # 0.5 · (2 + 1)
    assert numbers_of(lines[5])[0] == pytest.approx(math.log(1 + math.exp(-1.5)), abs=5e-5)
    push = 0.5 / (1 + math.exp(1.5))
    assert numbers_of(lines[6]) == pytest.approx([-push, push], abs=5e-5)


def test_the_example_of_kto_by_hand(capsys):
    kto.example()
    lines = capsys.readouterr().out.splitlines()
    rows = [("desirable", -8, -10), ("desirable", -5, -5), ("undesirable", -7, -8), ("undesirable", -9, -6)]
    total = 0.0
    for line, (label, logp, ref) in zip(lines[2:6], rows):
        inside, sign = 0.5 * (logp - ref - 0.4), 1 if label == "desirable" else -1
        likely = 1 / (1 + math.exp(-sign * inside))
        total += 1 - likely
        wanted = [logp, ref, logp - ref, inside, 1 - likely, -sign * 0.5 * likely * (1 - likely) / 4]
        assert line.startswith(label) and numbers_of(line) == pytest.approx(wanted, abs=5e-5)
    assert numbers_of(lines[6]) == [pytest.approx(total / 4, abs=5e-5)]


def averages(prefix: str, logits):
    """Mean log-probability of the completion's tokens, and TRL's NLL of the whole row, from its logits."""
    labels = ODDS[f"{prefix}_labels"][:, 1:]
    logps = logits[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    mask = labels != -100
    ids, real = ODDS[f"{prefix}_input_ids"][:, 1:], ODDS[f"{prefix}_attention_mask"][:, 1:].bool()
    whole = logits[:, :-1].log_softmax(-1).gather(2, ids[..., None])[..., 0]
    return (logps * mask).sum(1) / mask.sum(1), -(whole * real).sum() / real.sum()


@pytest.mark.parametrize("name", ["orpo_b0.1", "orpo_b1.0", "simpo_pure", "simpo_trl_default_b0.1_g0.5"])
def test_orpo_and_simpo_are_those_of_trl(name):
    case, logits = ODDS_CASES[name], ODDS["logits"].clone().requires_grad_()
    chosen, nll = averages("chosen", logits[:3])
    rejected, _ = averages("rejected", logits[3:])
    torch.testing.assert_close(chosen, ODDS[f"{name}::chosen_logps"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rejected, ODDS[f"{name}::rejected_logps"], rtol=1e-5, atol=1e-6)
    if name.startswith("orpo"):
        loss = orpo_loss(chosen, rejected, nll, case["beta"])
    else:
        loss = simpo_loss(chosen, rejected, case["beta"], case["simpo_gamma"])
    assert loss.shape == ()
    loss.backward()
    torch.testing.assert_close(loss, ODDS[f"{name}::loss"], rtol=1e-5, atol=1e-6)  # TRL's odds are float32
    torch.testing.assert_close(logits.grad, ODDS[f"{name}::grad_logits"], rtol=1e-4, atol=1e-6)


def test_simpo_and_orpo_by_hand():
    chosen, rejected = torch.tensor([-0.5], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)
    assert float(simpo_loss(chosen, rejected, 2.0, 0.5)) == pytest.approx(math.log(1 + math.exp(-(2 * 0.5 - 0.5))))
    p, q = math.exp(-0.5), math.exp(-1.0)
    ratio = (p / (1 - p)) / (q / (1 - q))
    expected = 3.0 + 0.25 * math.log(1 + 1 / ratio)
    assert float(orpo_loss(chosen, rejected, torch.tensor(3.0), 0.25)) == pytest.approx(expected)


def test_log1mexp_keeps_its_digits_and_its_gradient():
    torch.testing.assert_close(log1mexp(ODDS["log1mexp_x"]), ODDS["log1mexp_y"], rtol=1e-12, atol=0)
    x = torch.tensor([-1e-20, -1e-7, -0.5, -1.0, -50.0, 0.0], requires_grad=True)
    y = log1mexp(x)
    assert bool(y.isfinite().all())
    y[1:5].sum().backward()
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "orpo", "kto"])
def test_gradients_by_finite_differences(name):
    torch.manual_seed(0)
    values = [-(torch.rand(3, dtype=torch.float64) * 3 + 0.1) for _ in range(4)]
    for value in values[:2]:
        value.requires_grad_()
    functions = {
        "dpo": lambda c, r: dpo_loss(c, r, *values[2:], 0.3, 0.1),
        "ipo": lambda c, r: ipo_loss(c, r, *values[2:], 0.3),
        "simpo": lambda c, r: simpo_loss(c, r, 2.0, 0.5),
        "orpo": lambda c, r: orpo_loss(c, r, -c.mean(), 0.3),
        "kto": lambda c, r: kto_loss(torch.cat([c, r]), torch.cat(values[2:]), torch.arange(6) < 3, torch.tensor(0.2)),
    }
    torch.autograd.gradcheck(functions[name], tuple(values[:2]))


# ----------------------------------------------------------------------------------------------------------------------
# From rows to losses


@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_end_to_end_with_two_llamas_as_trl(name):
    """Real models, TRL's collated batch, loss and length of the gradient."""
    policy, reference = llama_tiny(E2E, "policy::"), llama_tiny(load_npz("llama_tiny"))
    tokens, mask = E2E["batch::input_ids"], E2E["batch::completion_mask"][:, 1:].bool()
    ours, lengths = answer_logps(policy, tokens, mask)
    with torch.no_grad():
        theirs, _ = answer_logps(reference, tokens, mask)
    if name == "ipo":
        loss = ipo_loss(*(ours / lengths).chunk(2), *(theirs / lengths).chunk(2), 0.1)
    else:
        loss = dpo_loss(*ours.chunk(2), *theirs.chunk(2), 0.1)
        assert float(ours[:2].detach().mean()) == pytest.approx(float(E2E["sigmoid::metric::logps/chosen"]), abs=1e-4)
        margins = 0.1 * ((ours - theirs)[:2] - (ours - theirs)[2:])
        assert float(margins.mean()) == pytest.approx(float(E2E["sigmoid::metric::rewards/margins"]), abs=1e-5)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1e9)
    assert float(loss) == pytest.approx(float(E2E[f"{name}::loss"]), rel=1e-4)
    assert float(norm) == pytest.approx(float(E2E[f"{name}::grad_norm"]), rel=1e-3)


T = ByteTokenizer()


def model_and_rows(n=6):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(T.vocab_size, 32, 2, 2, max_seq_len=256)).double()
    return model, encode_pairs(load_pairs("arith", "train", n=n), T, 256)


def test_the_layout_gives_each_answer_its_own_log_probability():
    """Rows computed together, padded, equal each answer alone, token by token."""
    model, rows = model_and_rows(3)
    tokens, mask, _ = rows.batch([0, 1, 2])
    together, lengths = answer_logps(model, tokens, mask)
    for row, (i, answers) in enumerate([(0, rows.chosen), (1, rows.chosen), (2, rows.chosen), (0, rows.rejected)]):
        ids = torch.tensor([rows.prompts[i] + answers[i]])
        logps = model(ids).log_softmax(-1)[0]
        start = len(rows.prompts[i])
        alone = sum(logps[t - 1, ids[0, t]] for t in range(start, ids.shape[1]))
        torch.testing.assert_close(together[row], alone)
        assert int(lengths[row]) == len(answers[i])


def loss_of_pairs(config, model, rows, ref, some, n_words):
    """The loss and the figures of the pairs ``some``, as a step of the loop has them."""
    tokens, mask, real = rows.batch(some)
    logps = token_logps(model, tokens, where=where_needed(config, mask, real))
    ref = ref[:, some]
    return pair_loss(config, logps, mask, ref, n_words), pair_figures(config, logps, mask, ref)


def loss_of_answers(config, model, rows, ref, some, kl):
    tokens, mask, _ = rows.batch(some)
    logps, lengths = answer_logps(model, tokens, mask)
    desirable, weights = rows.desirable[some], (config.desirable_weight, config.undesirable_weight)
    loss = kto_loss(logps, ref[some], desirable, kl, config.beta, *weights)
    return loss, answer_figures(config, (logps - ref[some]).detach(), (logps / lengths).detach(), desirable)


@pytest.fixture
def run(tmp_path):
    return start(Config(out_dir=str(tmp_path / "handle"), device="cpu"), "dpo")


@pytest.mark.parametrize("method", ["dpo", "ipo", "ipo_sum", "simpo", "orpo"])
def test_the_stage_computes_the_loss_of_the_formulas(run, method):
    model, rows = model_and_rows()
    method, average = method.removesuffix("_sum"), not method.endswith("_sum")
    with torch.no_grad():
        ref = reference_logps(model, rows.batch, len(rows), batch_size=4)
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    config = Config(method=method, beta=2.0 if method == "simpo" else 0.1, ipo_average=average)
    some = [4, 0, 2]
    words = torch.tensor(sum(len(rows.prompts[i]) + len(rows.chosen[i]) - 1 for i in some) / len(some))
    loss, figures = loss_of_pairs(config, model, rows, ref, some, words)
    chosen, rejected = [], []
    nll = count = 0.0
    for i in some:
        for answers, out in ((rows.chosen, chosen), (rows.rejected, rejected)):
            ids = torch.tensor([rows.prompts[i] + answers[i]])
            logps = model(ids).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            out.append(logps[len(rows.prompts[i]) - 1 :].sum())
            if answers is rows.chosen:
                nll, count = nll - logps.sum(), count + len(logps)
    chosen, rejected = torch.stack(chosen), torch.stack(rejected)
    n_c, n_r = (torch.tensor([len(a[i]) for i in some]) for a in (rows.chosen, rows.rejected))
    expected = {
        "dpo": lambda: dpo_loss(chosen, rejected, *ref[:, some], 0.1),
        "ipo": lambda: (
            ipo_loss(chosen / n_c, rejected / n_r, ref[0, some] / n_c, ref[1, some] / n_r, 0.1)
            if average
            else ipo_loss(chosen, rejected, *ref[:, some], 0.1)
        ),
        "simpo": lambda: simpo_loss(chosen / n_c, rejected / n_r, 2.0, 1.0),
        "orpo": lambda: orpo_loss(chosen / n_c, rejected / n_r, nll / count, 0.1),
    }[method]()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-8, check_dtype=False)
    assert figures["logp_chosen"] == pytest.approx(float((chosen / n_c).sum()))
    assert figures["logp_rejected"] == pytest.approx(float((rejected / n_r).sum()))
    if method in ("dpo", "ipo"):  # of what the loss compares: averages, where it averages
        n_c, n_r = (n_c, n_r) if method == "ipo" and average else (1, 1)
        gaps = (chosen - ref[0, some]) / n_c - (rejected - ref[1, some]) / n_r
        assert figures["margin"] == pytest.approx(0.1 * float(gaps.sum()), rel=1e-4)


def test_kl_of_kto_is_that_of_mismatched_answers(run):
    model, _ = model_and_rows()
    rows = encode_judged(load_judged("arith", "train", n=4), T, 256)
    with torch.no_grad():
        ref = reference_logps(model, rows.mismatched, len(rows), batch_size=3)
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    some = [5, 1, 2]
    kl = batch_kl(run, model, rows, ref, some, size=2)
    total = 0.0
    for i in some:
        ids = torch.tensor([rows.prompts[i] + rows.answers[i - 1]])
        logps = model(ids).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        total += float(logps[len(rows.prompts[i]) - 1 :].sum()) - float(ref[i])
    assert float(kl) == pytest.approx(total / 3, rel=1e-5) and not kl.requires_grad


def test_the_stage_computes_the_loss_of_single_answers(run):
    """Sums, not means of an answer's tokens; the weights of either thumb; the given KL."""
    model, _ = model_and_rows()
    rows = encode_judged(load_judged("arith", "train", n=5), T, 256)
    with torch.no_grad():
        ref = reference_logps(model, rows.batch, len(rows), batch_size=4)
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    config = kto.Config(beta=0.1, desirable_weight=1.3, undesirable_weight=0.6)
    some, kl = [7, 0, 3, 4], torch.tensor(0.8, dtype=torch.float64)
    loss, figures = loss_of_answers(config, model, rows, ref, some, kl)
    expected, rewards, averages = [], {True: [], False: []}, {True: 0.0, False: 0.0}
    for i in some:
        ids = torch.tensor([rows.prompts[i] + rows.answers[i]])
        logps = model(ids).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        gain = float(logps[len(rows.prompts[i]) - 1 :].sum()) - float(ref[i])
        liked = bool(rows.desirable[i])
        rewards[liked].append(0.1 * gain)
        averages[liked] += float(logps[len(rows.prompts[i]) - 1 :].mean())
        sign, weight = (1, 1.3) if liked else (-1, 0.6)
        expected.append(weight * (1 - 1 / (1 + math.exp(-sign * 0.1 * (gain - 0.8)))))
    assert {bool(x) for x in rows.desirable[some]} == {True, False}
    assert float(loss.detach()) == pytest.approx(sum(expected) / 4, rel=1e-5)
    assert figures["desirable"] == len(rewards[True])
    assert figures["reward_chosen"] == pytest.approx(sum(rewards[True]), rel=1e-4)
    assert figures["reward_rejected"] == pytest.approx(sum(rewards[False]), rel=1e-4)
    assert figures["logp_chosen"] == pytest.approx(averages[True], rel=1e-4)
    assert figures["logp_rejected"] == pytest.approx(averages[False], rel=1e-4)


def test_the_figures_of_kto_are_means_over_each_class_by_itself():
    sums = {"desirable": 3, "reward_chosen": 6.0, "logp_chosen": -1.5, "reward_rejected": -5.0, "logp_rejected": -10.0}
    means = {"reward_chosen": 2.0, "logp_chosen": -0.5, "reward_rejected": -1.0, "logp_rejected": -2.0, "margin": 3.0}
    assert class_means(sums, 8) == means
    nothing = {"reward_chosen": 0.0, "logp_chosen": 0.0, "reward_rejected": 0.0, "logp_rejected": 0.0}
    assert class_means(nothing | {"desirable": 2, "reward_chosen": 1.0}, 2) == {"reward_chosen": 0.5, "logp_chosen": 0}
    assert class_means(nothing | {"desirable": 0, "logp_rejected": -3.0}, 2) == {
        "reward_rejected": 0,
        "logp_rejected": -1.5,
    }


def test_the_reference_of_pairs_has_two_rows_and_no_gradient(run):
    model, rows = model_and_rows(5)
    ref = reference_logps(model, rows.batch, len(rows), batch_size=2)
    assert ref.shape == (2, 5) and not ref.requires_grad
    tokens, mask, _ = rows.batch([3])
    torch.testing.assert_close(ref[:, 3], answer_logps(model, tokens, mask)[0].detach())


# ----------------------------------------------------------------------------------------------------------------------
# The stage


@pytest.fixture(scope="module")
def sft_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("before_dpo")
    pretrain.main(tiny_pretrain(root / "pretrain"))
    sft.main(tiny_sft(root / "sft", root / "pretrain"))
    return root / "sft"


def tiny(folder, sft_folder, **changes) -> Config:
    settings = {
        "out_dir": str(folder), "init_from": str(sft_folder), "data": "arith", "n_pairs": 16,
        "epochs": 2.0, "batch_size": 4,
        "eval_every": 3, "save_every": 2, "log_every": 1, "eval_pairs": 8, "eval_prompts": 4, "device": "cpu",
        "max_length": 96,
    }  # fmt: skip
    if changes.get("method") == "kto":  # a pair is two answers
        changes = {name: value for name, value in changes.items() if name != "method"}
        micro = 2 * changes.pop("micro_batch_size", 0)
        return replace(kto.Config(), **(settings | {"batch_size": 8, "micro_batch_size": micro} | changes))
    return replace(Config(), **(settings | changes))


def train(config) -> dict:
    return (kto if isinstance(config, kto.Config) else dpo).main(config)


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["dpo", "ipo", "kto", "simpo", "orpo"])
def test_a_run_of_each_method(tmp_path, sft_folder, method):
    figures = train(tiny(tmp_path / method, sft_folder, method=method))
    assert math.isfinite(figures["val_loss"])
    rows = metrics(tmp_path / method)
    state = load_checkpoint(tmp_path / method)
    assert state["stage"] == method and state["finished"] and state["lineage"][-1]["stage"] == "sft"
    step = next(row for row in rows if "loss" in row)
    wanted = {"loss", "margin", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected", "grad_norm"}
    assert wanted | ({"kl"} if method == "kto" else {"accuracy"}) <= set(step)
    if method == "dpo":
        assert step["loss"] == pytest.approx(math.log(2), abs=1e-4) and step["margin"] == pytest.approx(0, abs=1e-4)
    if method == "kto":
        assert step["loss"] == pytest.approx(0.5, abs=1e-4) and step["kl"] == pytest.approx(0, abs=1e-3)
    last = [row for row in rows if "loss" in row][-1]
    assert last["margin"] != 0
    assert last["margin"] == pytest.approx(last["reward_chosen"] - last["reward_rejected"], rel=1e-3, abs=1e-6)
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 3, 6, 8]
    assert any("val_questions" in row for row in rows) and (tmp_path / method / "best.pt").exists()


def answer_alone(policy, prompt: list[int], answer: list[int]) -> tuple[float, float]:
    """The log-probability of an answer after its prompt, in a row of their own; and that of the whole row."""
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        logps = policy(ids).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    return float(logps[len(prompt) - 1 :].sum()), float(logps.sum())


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_the_figures_of_held_out_pairs_are_those_of_each_pair_alone(tmp_path, sft_folder, method):
    """More pairs than one batch of a validation holds; every one of them counts once."""
    settings = {"eval_pairs": 41, "eval_prompts": 1, "lr": 5e-3, "warmup": 0, "beta": 0.3, "epochs": 1.0}
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.6} if method == "kto" else {}
    figures = train(tiny(tmp_path / method, sft_folder, method=method, **settings, **weights))
    policy, tokenizer, _ = load_stage(str(tmp_path / method))
    reference, _, _ = load_stage(str(sft_folder))
    rows = encode_pairs(load_pairs("arith", "validation")[:41], tokenizer, 96)
    losses, margins, nll, words = [], [], 0.0, 0
    averages, rewards = [0.0, 0.0], [0.0, 0.0]
    for prompt, *both in zip(rows.prompts, rows.chosen, rows.rejected):
        chosen, rejected = (answer_alone(policy, prompt, answer)[0] for answer in both)
        averages = [averages[0] + chosen / len(both[0]), averages[1] + rejected / len(both[1])]
        if method == "orpo":
            chosen, rejected = chosen / len(both[0]), rejected / len(both[1])
            odds = [a - math.log(1 - math.exp(a)) for a in (chosen, rejected)]
            losses.append(-0.3 * math.log(sigmoid(odds[0] - odds[1])))
            nll, words = nll - answer_alone(policy, prompt, both[0])[1], words + len(prompt) + len(both[0]) - 1
        else:
            chosen, rejected = (
                a - answer_alone(reference, prompt, answer)[0] for a, answer in zip((chosen, rejected), both)
            )
            if method == "dpo":
                losses.append(-math.log(sigmoid(0.3 * (chosen - rejected))))
            else:
                losses.append((1.3 * sigmoid(-0.3 * chosen) + 0.6 * sigmoid(0.3 * rejected)) / 2)
        margins.append(0.3 * (chosen - rejected))
        rewards = [rewards[0] + 0.3 * chosen, rewards[1] + 0.3 * rejected]
    n = len(losses)
    assert n == 41 and figures["val_loss"] == pytest.approx(sum(losses) / n + nll / max(words, 1), rel=1e-4)
    assert figures["val_accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / n)
    assert figures["val_margin"] == pytest.approx(sum(margins) / n, rel=1e-3, abs=1e-5)
    for name, average, reward in zip(("chosen", "rejected"), averages, rewards):
        assert figures[f"val_logp_{name}"] == pytest.approx(average / n, rel=1e-3)
        assert figures[f"val_reward_{name}"] == pytest.approx(reward / n, rel=1e-3, abs=1e-5)


def test_the_figures_of_held_out_answers_are_those_of_each_answer_alone(tmp_path, sft_folder):
    """Of single answers, more than one batch of a validation holds: the loss without a KL, and how often a desirable
    answer has a higher reward than an undesirable one."""
    path = tmp_path / "thumbs.jsonl"
    lines = [{"prompt": f"{i}+1?", "completion": f"{i + i % 7}", "label": i % 3 == 0} for i in range(3500)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))  # every 50th is held out: 70
    settings = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.6, "lr": 5e-3, "warmup": 0}
    config = tiny(tmp_path / "kto", sft_folder, method="kto", data=str(path), n_pairs=32, epochs=1.0, **settings)
    figures = kto.main(replace(config, eval_pairs=66))
    policy, tokenizer, _ = load_stage(str(tmp_path / "kto"))
    reference, _, _ = load_stage(str(sft_folder))
    rows = encode_judged(load_judged(str(path), "validation")[:66], tokenizer, 96)
    rewards, losses = {True: [], False: []}, []
    for prompt, answer, liked in zip(rows.prompts, rows.answers, rows.desirable.tolist()):
        gain = answer_alone(policy, prompt, answer)[0] - answer_alone(reference, prompt, answer)[0]
        rewards[liked].append(0.3 * gain)
        losses.append(1.3 * sigmoid(-0.3 * gain) if liked else 0.6 * sigmoid(0.3 * gain))
    assert len(losses) == 66 and figures["val_loss"] == pytest.approx(sum(losses) / 66, rel=1e-4)
    won = [a > b for a in rewards[True] for b in rewards[False]]
    assert (
        figures["val_accuracy"] == pytest.approx(sum(won) / len(won), abs=1e-6) and 0.1 < figures["val_accuracy"] < 0.9
    )
    means = [sum(rewards[liked]) / len(rewards[liked]) for liked in (True, False)]
    assert figures["val_margin"] == pytest.approx(means[0] - means[1], rel=1e-3, abs=1e-5)
    assert abs(means[0] - means[1]) > 1e-3


@pytest.mark.parametrize("method", ["orpo", "kto"])
def test_parts_of_a_batch_add_up_to_the_batch(tmp_path, sft_folder, method):
    """The two losses that hold a count of the whole batch: ORPO's words and KTO's KL."""
    for name, size in (("a", 0), ("b", 3)):  # parts of unequal size
        train(tiny(tmp_path / name, sft_folder, method=method, micro_batch_size=size, beta=0.5, lr=1e-2))
    for a, b in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b")):
        for name in ("loss", "grad_norm", "kl", "logp_chosen"):
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=2e-2, abs=1e-3), (name, a["step"])


@pytest.mark.parametrize("method", but_slow(["dpo", "kto"], "dpo"))
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, sft_folder, method, monkeypatch):
    whole, stopped = (tiny(tmp_path / name, sft_folder, method=method) for name in ("whole", "stopped"))
    assert_exact_resume(monkeypatch, kto if method == "kto" else dpo, whole, stopped, saves=2)


def test_kto_on_a_file_of_thumbs(tmp_path, sft_folder):
    path = tmp_path / "thumbs.jsonl"
    rows = [{"prompt": f"{i}+1?", "completion": f"{i + i % 2}", "label": bool(i % 2)} for i in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = kto.main(tiny(tmp_path / "kto", sft_folder, method="kto", data=str(path), n_pairs=None))
    assert math.isfinite(figures["val_loss"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_length": 4096}, "more than the context"),
        ({"beta": 0.0}, "beta is"),
        ({"label_smoothing": 0.5}, "below 0.5"),
        ({"label_smoothing": 0.1, "method": "ipo"}, "belongs to --method dpo"),
        ({"data": "nothing"}, "no pairs called so"),
        ({"method": "kto"}, "python kto.py"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tmp_path, sft_folder, changes, words):
    config = replace(tiny(tmp_path / "x", sft_folder), **changes)
    with pytest.raises(UserError, match=words) as refusal:
        dpo.main(config)
    assert "\n" not in str(refusal.value)


LETTERS = [("a", "b"), ("aa", "bb"), ("aaa", "bbb"), ("ab", "bb"), ("aba", "bab")]


def practise(method: str, sign: int, tmp_path) -> tuple[float, float]:
    """Prefer "a" to "b" (or the reverse): log P("a") - log P("b") after a new prompt, before and after."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(T.vocab_size, 32, 1, 2, max_seq_len=32))
    pairs = [
        Pair(({"role": "user", "content": c},), *(two if sign > 0 else two[::-1])) for c in "vwxyz" for two in LETTERS
    ]
    config = replace(
        (kto.Config if method == "kto" else Config)(out_dir=str(tmp_path / f"{method}{sign}"), device="cpu"),
        **{"beta": {"simpo": 2.0}.get(method, 0.1)} | ({} if method == "kto" else {"method": method}),
    )
    run = start(config, method)
    judged = []
    for pair in pairs:
        judged += [Judged(pair.prompt, pair.chosen, True), Judged(pair.prompt, pair.rejected, False)]
    single = method == "kto"
    rows = encode_judged(judged, T, 32) if single else encode_pairs(pairs, T, 32)
    ref = reference_logps(model, rows.batch, len(rows))
    other = reference_logps(model, rows.mismatched, len(rows)) if single else None
    optimizers = optim.make_optimizers(model, 3e-3)
    test = encode_pairs([Pair(({"role": "user", "content": "u"},), "a", "b")], T, 32)
    gaps = []
    for step in range(20):
        with torch.no_grad():
            tokens, mask, _ = test.batch([0])
            chosen, rejected = answer_logps(model, tokens, mask)[0].tolist()
            gaps.append(chosen - rejected)
        some = [(step * 8 + i * 3) % len(rows) for i in range(8)]
        if single:
            kl = batch_kl(run, model, rows, other, some, 8)
            loss, _ = loss_of_answers(config, model, rows, ref, some, kl)
        else:
            words = torch.tensor(sum(len(rows.prompts[i]) + len(rows.chosen[i]) - 1 for i in some) / len(some))
            loss, _ = loss_of_pairs(config, model, rows, ref, some, words)
        loss.backward()
        optim.update(run, model, optimizers, 3e-3, 1.0)
    return gaps[0], gaps[-1]


@pytest.mark.parametrize("method", ["dpo", "ipo", "kto", "simpo", "orpo"])
def test_the_preferred_letter_becomes_likelier_and_with_the_preference_negated_rarer(tmp_path, method):
    before, after = practise(method, +1, tmp_path)
    assert after > before + 0.5
    before, after = practise(method, -1, tmp_path)
    assert after < before - 0.5


@pytest.mark.parametrize("method", ["dpo", "simpo"])
def test_the_report_ranks_pairs_by_the_methods_own_reward(tmp_path, sft_folder, method):
    """Against the reference for DPO, per token for SimPO, each recomputed here one answer at a time."""
    import evaluate

    dpo.main(tiny(tmp_path / method, sft_folder, method=method, lr=5e-3))
    path = tmp_path / "pairs.jsonl"
    pairs = load_pairs("arith", "validation", n=40)
    lines = [{"prompt": list(p.prompt), "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = evaluate.measure(str(tmp_path / method), evaluate.Config(data=str(path), device="cpu"))
    kept = load_pairs(str(path), "test")
    policy, tokenizer, _ = load_stage(str(tmp_path / method))
    reference, _, _ = load_stage(str(sft_folder))
    right = 0
    with torch.no_grad():
        for i in range(len(kept)):
            tokens, mask, _ = encode_pairs(kept[i : i + 1], tokenizer, 96).batch([0])
            sums, lengths = answer_logps(policy, tokens, mask)
            gains = sums / lengths if method == "simpo" else sums - answer_logps(reference, tokens, mask)[0]
            right += bool(gains[0] > gains[1])
    assert row["n"] == len(kept) == 40 and row["accuracy"] == pytest.approx(right / 40)
    assert row["low"] <= row["accuracy"] <= row["high"]
    if method == "dpo":  # a reference that is not what the run started from
        state = torch.load(tmp_path / method / "ckpt.pt", weights_only=True)
        state["lineage"][-1]["weights"] = "0"
        torch.save(state, tmp_path / method / "ckpt.pt")
        with pytest.raises(UserError, match="has other weights"):
            evaluate.measure(str(tmp_path / method), evaluate.Config(data=str(path), device="cpu"))
