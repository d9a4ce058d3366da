import contextlib
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from conftest import load_json, load_npz
from test_grpo import shown_questions
from tiny import assert_exact_resume, tiny_pretrain, tiny_sft

import optim
import ppo
import pretrain
import reward
import sft
from ppo import (
    ActorCritic,
    Batch,
    Config,
    accumulate_gradients,
    adapt_beta,
    explained_variance,
    gae,
    policy_and_values,
    ppo_policy_loss,
    ppo_value_loss,
    token_rewards,
    whiten,
)
from rollout import minibatches, sample_answers
from runtime.errors import UserError
from runtime.run import start
from stages import load_stage
from texts import Prompt
from tokenizer import ByteTokenizer
from transformer import ModelConfig, Transformer, token_logps
from watch import assert_same_policy, sampler_gap

N = load_npz("ppo")
META = load_json("ppo.meta.json")
MASK = N["mask"].double()
T = ByteTokenizer()


def close(a, b, tolerance=1e-7):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------------------------------------------------
# Against TRL, verl and lm-human-preferences


def test_rewards_are_those_of_trl():
    rewards = token_rewards(N["scores"], N["logprobs"], N["ref_logprobs"], N["mask"], beta=0.2)
    close(rewards, N["trl0_rewards_kl"] * MASK)
    close(rewards, N["verl_token_level_rewards"])


@pytest.mark.parametrize("case", ["g1.0_l0.95", "g0.99_l0.95", "g1.0_l1.0", "g0.9_l0.0"])
def test_gae_is_that_of_trl(case):
    gamma, lam = (float(x[1:]) for x in case.split("_"))
    advantages, returns = gae(N["verl_token_level_rewards"], N["values"], N["mask"], gamma, lam)
    close(advantages, N[f"trl0_gae_{case}_wr0_adv_raw"] * MASK)
    close(returns, N[f"trl0_gae_{case}_wr0_returns"] * MASK)
    close(whiten(advantages, N["mask"]), N[f"trl0_gae_{case}_wr0_adv_whitened"] * MASK)


def test_advantages_are_those_of_verl():
    advantages, returns = gae(N["verl_token_level_rewards"], N["values"], N["mask"], 1.0, 0.95)
    close(whiten(advantages, MASK), N["verl_gae_adv"] * MASK)
    close(returns, N["verl_gae_returns"] * MASK)


def test_whitened_rewards_are_those_of_trl_where_it_has_no_padding():
    """In padded rows, TRL's whitened rewards leak from the padding into the advantages; ours must not."""
    rewards = whiten(N["verl_token_level_rewards"], MASK, shift_mean=False)
    advantages, returns = gae(rewards, N["values"], MASK, 1.0, 0.95)
    close(advantages[:1], N["trl0_gae_g1.0_l0.95_wr1_adv_raw"][:1])
    close(returns[:1], N["trl0_gae_g1.0_l0.95_wr1_returns"][:1])
    assert not torch.allclose(advantages[1:] * MASK[1:], N["trl0_gae_g1.0_l0.95_wr1_adv_raw"][1:] * MASK[1:])
    alone, _ = gae(rewards[2:, :2], N["values"][2:, :2], torch.ones(1, 2), 1.0, 0.95)
    close(advantages[2:, :2], alone)


def test_losses_and_gradients_are_those_of_trl_and_verl():
    logps, values = N["new_logprobs"].clone().requires_grad_(), N["vpreds"].clone().requires_grad_()
    advantages = N["trl0_gae_g1.0_l0.95_wr0_adv_whitened"]
    policy = ppo_policy_loss(logps, N["logprobs"], advantages, MASK)
    value = ppo_value_loss(values, N["values"], N["trl0_gae_g1.0_l0.95_wr0_returns"], MASK)
    assert policy.shape == value.shape == ()
    close(policy, N["trl0_pg_loss"])
    close(0.1 * value, N["trl0_vf_loss_times_coef"])
    close(policy, N["verl_vanilla_loss"])
    close(value, N["verl_value_loss"])
    (policy + 0.1 * value).backward()
    close(logps.grad, N["trl0_grad_logp"])
    close(values.grad, N["trl0_grad_vpred"])


def test_whitening_by_a_sample_of_lm_human_preferences():
    """OpenAI divides by n, TRL, verl and we by n - 1: on nine numbers a factor √(8/9)."""
    ones = torch.ones(3, 3)
    x = N["openai_whiten_in"]
    ours = whiten(x, ones)
    close(ours * (9 / 8) ** 0.5, N["openai_whiten_shift_INDEPENDENT"], 1e-6)
    kept = whiten(x, ones, shift_mean=False)
    close(kept, ours + x.mean())


def test_the_controller_of_beta_is_that_of_lm_human_preferences():
    case = META["adaptive_kl"]
    beta = case["init"]
    for kl, after in zip(case["observed_kl"], case["coef_after"]):
        beta = adapt_beta(beta, kl, case["target"], case["n_steps"], case["horizon"])
        assert beta == pytest.approx(after, rel=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# By hand


def test_rewards_by_hand():
    """The cost of straying at every token, the score at the last that counts, wherever that stands."""
    logps = torch.tensor([[-1.0, -2.0, -9.0], [-9.0, -1.0, -1.5]])
    ref = torch.tensor([[-1.5, -1.0, -1.0], [-1.0, -2.0, -1.0]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    rewards = token_rewards(torch.tensor([1.0, -2.0]), logps, ref, mask, beta=0.1)
    close(rewards, torch.tensor([[-0.05, 0.1 + 1.0, 0.0], [0.0, -0.1, 0.05 - 2.0]]))
    assert token_rewards(torch.ones(2), logps, None, mask, 0.1).tolist() == [[0, 1, 0], [0, 0, 1]]


def test_gae_by_hand_and_the_end_of_the_answer():
    """δ = (0 + 0.9·0.4 - 0.2, 1 - 0.4) = (0.16, 0.6); A = (0.16 + 0.9·0.5·0.6, 0.6). What stands behind the end,
    however large, changes nothing."""
    rewards, values = torch.tensor([[0.0, 1.0, 50.0]]), torch.tensor([[0.2, 0.4, 99.0]])
    mask = torch.tensor([[1, 1, 0]])
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.5)
    close(advantages, torch.tensor([[0.16 + 0.27, 0.6, 0.0]]), 1e-6)
    close(returns, torch.tensor([[0.43 + 0.2, 1.0, 0.0]]), 1e-6)


def test_lambda_1_is_the_reward_to_come_minus_the_value_and_lambda_0_the_one_step_error():
    rewards, values = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    ones = torch.ones(2, 5)
    to_come = rewards.flip(1).cumsum(1).flip(1)
    close(gae(rewards, values, ones, 1.0, 1.0)[0], to_come - values)
    following = torch.cat([values[:, 1:], torch.zeros(2, 1)], 1)
    close(gae(rewards, values, ones, 1.0, 0.0)[0], rewards + following - values)


def test_a_prompt_in_front_changes_nothing():
    rewards, values = torch.randn(1, 3, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
    alone, returns = gae(rewards, values, torch.ones(1, 3))
    noise = torch.randn(1, 2, dtype=torch.float64)
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    shifted, _ = gae(torch.cat([noise, rewards], 1), torch.cat([noise, values], 1), mask)
    close(shifted[:, 2:], alone)
    assert shifted[:, :2].abs().sum() == 0


def test_gae_and_rewards_leave_their_inputs_alone_and_pass_no_gradient():
    rewards, values = torch.randn(2, 4), torch.randn(2, 4, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    before = rewards.clone()
    advantages, returns = gae(rewards, values, mask)
    assert torch.equal(rewards, before) and not advantages.requires_grad and not returns.requires_grad


def test_whitening_sees_no_padding():
    x = torch.tensor([[1.0, 2.0, 100.0], [3.0, -50.0, 7.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    white = whiten(x, mask)
    close(white, torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64), 1e-6)
    kept = whiten(x, mask, shift_mean=False)
    close(kept, torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]], dtype=torch.float64), 1e-6)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "moves"),
    [
        (1.0, 1.5, -1.2, False),  # already too likely: clipped
        (1.0, 0.5, -0.5, True),  # went the wrong way: may come back
        (-1.0, 0.5, 0.8, False),  # already too rare: clipped
        (-1.0, 1.5, 1.5, True),
    ],
)
def test_the_clip_is_one_sided(advantage, ratio, loss, moves):
    logps = torch.tensor([[math.log(ratio)]], requires_grad=True)
    found = ppo_policy_loss(logps, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1))
    found.backward()
    assert float(found.detach()) == pytest.approx(loss, rel=1e-6)
    assert (float(logps.grad) != 0) == moves


def test_no_gradient_flows_into_what_was_there_before():
    """Even if the old log-probabilities and values are the very tensors that learn."""
    logps, values = (torch.full((1, 2), -1.0, requires_grad=True) for _ in range(2))
    advantages, returns, mask = torch.tensor([[2.0, -3.0]]), torch.tensor([[1.0, 0.0]]), torch.ones(1, 2)
    ppo_policy_loss(logps, logps, advantages, mask).backward()
    ppo_value_loss(values, values, returns, mask).backward()
    close(logps.grad, -advantages / 2)
    close(values.grad, (values.detach() - returns) / 2)
    old = torch.zeros(1, 2, requires_grad=True)  # both values are clipped to 0.2 below it, and that is the worse
    ppo_value_loss(values, old, torch.full((1, 2), -3.0), mask).backward()
    assert old.grad is None


def test_value_loss_by_hand():
    """V = 1, V_old = 0, clipped to 0.2; R = 2: max(1, 1.8²); R = 0.5: max(0.25, 0.09)."""
    values, old = torch.tensor([[1.0, 1.0, 9.0]]), torch.zeros(1, 3)
    mask = torch.tensor([[1, 1, 0]])
    loss = ppo_value_loss(values, old, torch.tensor([[2.0, 0.5, 0.0]]), mask, clip=0.2)
    assert float(loss) == pytest.approx(0.5 * (1.8**2 + 0.5**2) / 2)


def test_gradients_by_finite_differences():
    torch.manual_seed(0)
    shape = (2, 4)
    logps = (0.1 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    values = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    old, advantages, returns = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0]])
    torch.autograd.gradcheck(lambda x: ppo_policy_loss(x, 0.1 * old, advantages, mask), logps)
    torch.autograd.gradcheck(lambda x: ppo_value_loss(x, old, returns, mask), values)


def test_explained_variance_by_hand():
    returns = torch.tensor([[1.0, 2.0, 3.0, 99.0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    assert explained_variance(returns, returns, mask) == pytest.approx(1)
    assert explained_variance(torch.full_like(returns, 7.0), returns, mask) == pytest.approx(0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3)
    assert explained_variance(returns, torch.ones_like(returns), mask) == 0


def test_minibatches_are_reshuffled_in_each_epoch_and_cover_it():
    epochs = [torch.cat(minibatches(10, 3, step=4, epoch=e, seed=1)) for e in (0, 1)]
    assert all(sorted(rows.tolist()) == list(range(10)) for rows in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(torch.cat(minibatches(10, 3, 4, 0, 1)), epochs[0])


# ----------------------------------------------------------------------------------------------------------------------
# Model, rollout, update


def actor() -> ActorCritic:
    torch.manual_seed(0)
    return ActorCritic(Transformer(ModelConfig(T.vocab_size, 32, 2, 2, max_seq_len=64)))


def test_the_critic_starts_at_zero_and_shares_the_body():
    model = actor()
    tokens, mask = torch.randint(0, 200, (2, 8)), torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = False
    logps, values = model(tokens, mask, temperature=0.7)
    assert values.abs().sum() == 0 and values.shape == logps.shape == (2, 7)
    close(logps, token_logps(model.backbone, tokens, 0.7, where=mask), 1e-6)
    torch.nn.init.normal_(model.value.weight)
    values = model(tokens, mask, 1.0)[1]
    assert values[0, 4:].abs().sum() == 0
    values.sum().backward()
    assert model.backbone.blocks[0].attn.q_proj.weight.grad is not None


def test_a_value_does_not_see_the_token_that_follows():
    """V_t is what is expected before token t+1 is chosen: it may depend on tokens up to t alone."""
    model = actor().double()
    torch.nn.init.normal_(model.value.weight)
    tokens, mask = torch.randint(0, 200, (1, 8)), torch.ones(1, 7, dtype=torch.bool)
    other = tokens.clone()
    other[0, 5] = (tokens[0, 5] + 1) % 200
    a, b = model(tokens, mask, 1.0)[1], model(other, mask, 1.0)[1]
    close(a[:, :5], b[:, :5], 1e-12)
    assert not torch.allclose(a[:, 5:], b[:, 5:])


@pytest.fixture
def run(tmp_path):
    return start(Config(out_dir=str(tmp_path / "handle"), device="cpu"), "ppo")


def rolled(model, config, n=8):
    prompts = [[ord("a") + i] * (1 + i % 3) for i in range(n)]
    return sample_answers(model.backbone, T, prompts, 1, config.max_new_tokens, config.temperature, seed=0)


def prepare(run, model, reference, rollout, scores, beta, config) -> Batch:
    """What the stage does between the scores and the updates, see ``test_the_stage_puts_the_formulas_together``."""
    logps, values = policy_and_values(run, model, rollout, config)
    assert_same_policy(run, sampler_gap(rollout, logps))
    ref_logps = None if reference is None else ppo.policy_logps(run, reference, rollout, config)
    rewards = token_rewards(scores, logps, ref_logps, rollout.mask, beta)
    if config.whiten_rewards:
        rewards = whiten(rewards, rollout.mask, shift_mean=False)
    advantages, returns = gae(rewards, values, rollout.mask, config.gamma, config.lam)
    return Batch(rollout.tokens, rollout.mask, logps, values, whiten(advantages, rollout.mask), returns)


@pytest.mark.parametrize("whitened", [False, True])
def test_the_stage_puts_the_formulas_together(tmp_path, folders, monkeypatch, whitened):
    """Scores and KL become rewards, rewards and values advantages, and what an update sees of them is whitened, but for
    the returns."""
    names = ("token_rewards", "gae", "ppo_policy_loss", "ppo_value_loss")
    seen = {name: recorded(monkeypatch, name) for name in names}
    more = {"steps": 1, "epochs": 1, "minibatches": 1, "micro_batch_size": 64, "max_new_tokens": 3, "lam": 0.8}
    judge = str(folders / "reward")
    ppo.main(tiny(tmp_path, folders, reward=judge, beta=0.3, gamma=0.9, whiten_rewards=whitened, **more))
    (rewarded,), (estimated,), (policy,), (value,) = (seen[name] for name in names)
    scores, logps, ref_logps, mask, beta = rewarded
    assert beta == 0.3 and scores.std() > 0
    rewards = token_rewards(scores, logps, ref_logps, mask, 0.3)
    rewards = whiten(rewards, mask, shift_mean=False) if whitened else rewards
    close(estimated[0], rewards, 1e-6)
    values = estimated[1]
    assert torch.equal(estimated[2], mask) and estimated[3:] == [0.9, 0.8]
    advantages, returns = gae(rewards, values, mask, 0.9, 0.8)
    ends = mask.sum(dim=1)  # answers of one length are side by side in a part of the batch
    order = ((mask * torch.arange(1, mask.shape[1] + 1)).amax(dim=1)).argsort(stable=True)
    assert len(ends) == len(order)
    close(policy[2], whiten(advantages, mask)[order], 1e-5)
    close(policy[1], logps[order], 0)
    close(value[1], values[order], 0)
    close(value[2], returns[order], 1e-5)


def test_a_rollout_prepared_equals_the_formulas(run):
    config = Config(max_new_tokens=6, temperature=0.8, micro_batch_size=3, lam=0.9)
    model = actor()
    torch.nn.init.normal_(model.value.weight)
    reference = actor().backbone
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.02 * torch.randn_like(p))
    rollout = rolled(model, config)
    scores = torch.randn(8)
    batch = prepare(run, model, reference, rollout, scores, 0.3, config)
    with torch.no_grad():
        logps, values = model(rollout.tokens, rollout.mask, 0.8)
        ref = token_logps(reference, rollout.tokens, 0.8, where=rollout.mask)
    rewards = token_rewards(scores, logps, ref, rollout.mask, 0.3)
    advantages, returns = gae(rewards, values, rollout.mask, 1.0, 0.9)
    close(batch.advantages, whiten(advantages, rollout.mask), 1e-4)
    close(batch.returns, returns, 1e-5)  # of the raw advantages, not of the whitened ones
    assert batch.advantages[~rollout.mask].abs().sum() == 0


def test_the_policy_that_trains_must_be_the_one_that_sampled(run):
    """A temperature forgotten in training, or a stale sampler, is caught before the first update."""
    config = Config(max_new_tokens=6, temperature=0.5)
    model = actor()
    with torch.no_grad():
        model.backbone.head.weight.mul_(30)
    rollout = rolled(model, config)
    prepare(run, model, None, rollout, torch.zeros(8), 0.0, config)
    with pytest.raises(AssertionError, match="not the policy that sampled"):
        prepare(run, model, None, rollout, torch.zeros(8), 0.0, replace(config, temperature=1.0))


def test_the_first_minibatch_has_ratio_1_and_that_is_asserted(run):
    config = Config(max_new_tokens=6)
    model = actor()
    rollout = rolled(model, config)
    batch = prepare(run, model, None, rollout, torch.randn(8), 0.0, config)
    figures = accumulate_gradients(run, model, batch, torch.arange(8), config, first=True)
    assert figures["ratio_gap"] < 1e-5 and figures["clip_fraction"] == 0 and abs(figures["loss"]) < 1
    with torch.no_grad():
        for p in model.backbone.parameters():
            p.add_(0.05 * torch.randn_like(p))
    with pytest.raises(AssertionError, match="every ratio is 1"):
        accumulate_gradients(run, model, batch, torch.arange(8), config, first=True)


def test_micro_batches_give_the_gradient_of_the_minibatch(run):
    config = Config(max_new_tokens=6)
    model = actor()
    rollout = rolled(model, config)
    batch = prepare(run, model, None, rollout, torch.randn(8), 0.0, config)
    grads = []
    for size in (8, 3):
        model.zero_grad()
        accumulate_gradients(run, model, batch, torch.arange(8), replace(config, micro_batch_size=size), first=True)
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads):
        close(a, b, 1e-5)


def update_after_moving(run, model, reference, rollout, scores, beta, config, rows, first=False, moved=0.05, shift=0.0):
    """The gradient that the stage takes on the answers ``rows`` of a rollout, when policy and critic have moved by a
    little noise since they sampled it. ``shift`` is added to the old log-probabilities.
    """
    batch = prepare(run, model, reference, rollout, scores, beta, config)
    batch.logps = batch.logps + shift * batch.mask
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(moved * torch.randn(p.shape, generator=generator))
    model.zero_grad()
    accumulate_gradients(run, model, batch, rows, config, first=first)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def logps_and_values(model, tokens, temperature):
    """(B, T-1) each, from the model alone."""
    hidden = model.backbone.forward_hidden(tokens)[:, :-1]
    logps = (hidden @ model.backbone.head.weight.T / temperature).log_softmax(-1)
    return logps.gather(2, tokens[:, 1:, None])[..., 0], hidden @ model.value.weight[0] + model.value.bias


@pytest.mark.parametrize("whitened", [False, True])
def test_the_gradient_of_an_update_is_that_of_the_formulas_written_out(run, whitened):
    """Token by token, with no setting at its default: rewards, advantages and returns of the policy and critic that
    sampled; ratios, values and both clips of those that have moved since."""
    config = Config(
        max_new_tokens=6, temperature=0.8, micro_batch_size=2, gamma=0.9, lam=0.7, clip_ratio=0.1, clip_value=0.15,
        value_weight=0.6, whiten_rewards=whitened,
    )  # fmt: skip
    model, reference = actor(), actor().backbone
    torch.nn.init.normal_(model.value.weight, std=0.2)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.02 * torch.randn_like(p))
    rollout, scores, beta, minibatch = rolled(model, config), torch.randn(8), 0.3, [6, 1, 2, 4, 7]
    answers = [mask.nonzero()[:, 0] for mask in rollout.mask]
    with torch.no_grad():
        old_logps, old_values = logps_and_values(model, rollout.tokens, 0.8)
        ref_logps = token_logps(reference, rollout.tokens, 0.8)
    found = update_after_moving(run, model, reference, rollout, scores, beta, config, torch.tensor(minibatch))

    rewards = [-beta * (old_logps - ref_logps)[i, columns] for i, columns in enumerate(answers)]
    for reward_of_tokens, score in zip(rewards, scores):
        reward_of_tokens[-1] += score
    if whitened:
        mean, std = torch.cat(rewards).mean(), torch.cat(rewards).std()
        rewards = [(r - mean) / std + mean for r in rewards]
    advantages, returns = [], []
    for i, columns in enumerate(answers):
        values = [*old_values[i, columns].tolist(), 0.0]
        ahead, estimates = 0.0, []
        for t in reversed(range(len(columns))):
            ahead = float(rewards[i][t]) + 0.9 * values[t + 1] - values[t] + 0.9 * 0.7 * ahead
            estimates.insert(0, ahead)
        advantages.append(torch.tensor(estimates))
        returns.append(torch.tensor(estimates) + torch.tensor(values[:-1]))
    everyone = torch.cat(advantages)
    advantages = [(a - everyone.mean()) / everyone.std() for a in advantages]
    logps, values = logps_and_values(model, rollout.tokens, 0.8)
    policy, critic, clips = [], [], []
    for i in minibatch:
        ratio, v = (logps - old_logps)[i, answers[i]].exp(), values[i, answers[i]]
        near = old_values[i, answers[i]] + (v - old_values[i, answers[i]]).clamp(-0.15, 0.15)
        policy.append(torch.maximum(-ratio * advantages[i], -ratio.clamp(0.9, 1.1) * advantages[i]))
        critic.append(torch.maximum((v - returns[i]) ** 2, (near - returns[i]) ** 2))
        clips += [ratio.clamp(0.9, 1.1) != ratio, near != v]
    assert all(0.1 < torch.cat(clip).float().mean() < 0.9 for clip in (clips[::2], clips[1::2]))  # both clips act
    model.zero_grad()
    (torch.cat(policy).mean() + 0.6 * torch.cat(critic).mean() / 2).backward()
    close(found, torch.cat([p.grad.flatten() for p in model.parameters()]), 1e-5)


def test_a_minibatch_of_one_token_is_not_divided_by_more(run):
    """The critic's bias then has the gradient V - R, times the weight of its loss."""
    config, model = Config(max_new_tokens=1, value_weight=0.5, unfinished_penalty=0.0), actor()
    scores = torch.arange(8.0)
    update_after_moving(run, model, None, rolled(model, config), scores, 0.0, config, torch.tensor([3]), moved=0.0)
    assert float(model.value.bias.grad) == pytest.approx(0.5 * (0 - 3))


@pytest.mark.parametrize(
    ("precision", "gap", "noticed"),
    [("fp32", 5e-4, False), ("fp32", 2e-3, True), ("bf16", 0.02, False), ("bf16", 0.05, True)],
)
def test_how_far_the_first_ratios_may_be_from_1(tmp_path, precision, gap, noticed):
    """As far as rounding reaches, and no farther: both for what the sampler said and for the first minibatch."""
    config = Config(out_dir=str(tmp_path / "handle"), device="cpu", precision=precision, max_new_tokens=6)
    run, model = start(config, "ppo"), actor()
    rollout = rolled(model, config)
    told = replace(rollout, sampled_logps=rollout.sampled_logps + gap * rollout.mask)
    arguments = (torch.zeros(8), 0.0, config, torch.arange(8))
    for words, other, shift in (("not the policy that sampled", told, 0.0), ("every ratio is 1", rollout, -gap)):
        with pytest.raises(AssertionError, match=words) if noticed else contextlib.nullcontext():
            update_after_moving(run, model, None, other, *arguments, first=True, moved=0.0, shift=shift)


def practise(run, sign: float) -> tuple[float, float]:
    """Answer with as many letters "a" as possible: their share before and after."""
    model = actor()
    with torch.no_grad():
        model.backbone.head.weight[ord("a")] = 0.3
        model.backbone.head.weight[ord("b")] = 0.3
    config = Config(max_new_tokens=6, epochs=2, minibatches=2)
    optimizers = optim.make_optimizers(model, 5e-3)
    shares = []
    for step in range(25):
        prompts = [[ord(c)] for c in "wxyz" * 16]
        rollout = sample_answers(model.backbone, T, prompts, 1, 6, 1.0, seed=step)
        share = torch.tensor([text.count("a") / 6 for text in rollout.texts])
        shares.append(float(share.mean()))
        batch = prepare(run, model, None, rollout, sign * share, 0.0, config)
        first = True
        for epoch in range(2):
            for rows in minibatches(64, 2, step, epoch, 0):
                accumulate_gradients(run, model, batch, rows, config, first)
                optim.update(run, model, optimizers, 5e-3, 1.0)
                first = False
    return shares[0], shares[-1]


def test_the_rewarded_letter_becomes_frequent_and_with_the_reward_negated_rare(run):
    before, after = practise(run, +1.0)
    assert after > before + 0.3
    before, after = practise(run, -1.0)
    assert after < 0.5 * before


# ----------------------------------------------------------------------------------------------------------------------
# The stage


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("before_ppo")
    pretrain.main(tiny_pretrain(root / "pretrain"))
    sft.main(tiny_sft(root / "sft", root / "pretrain"))
    reward.main(
        reward.Config(
            out_dir=str(root / "reward"), init_from=str(root / "sft"), data="arith", n_pairs=8, n_sums=8,
            batch_size=4, eval_pairs=8,
            normalize_on=8, max_new_tokens=6, device="cpu", max_length=96,
        )
    )  # fmt: skip
    return root


def tiny(folder, folders, **changes) -> Config:
    settings = {
        "out_dir": str(folder), "init_from": str(folders / "sft"), "steps": 5, "prompts_per_step": 8,
        "max_new_tokens": 8, "eval_every": 3, "save_every": 2, "eval_prompts": 4, "n_prompts": 32, "device": "cpu",
        "format_weight": 0.1,
    }  # fmt: skip
    return replace(Config(), **(settings | changes))


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("judge", ["verifier", "model"])
def test_a_run_logs_what_one_must_watch_and_leaves_a_policy(tmp_path, folders, judge, monkeypatch):
    shown = shown_questions(monkeypatch, ppo, folders / "sft")
    where = "verifier" if judge == "verifier" else str(folders / "reward")
    ppo.main(tiny(tmp_path / "ppo", folders, reward=where, kl_target=0.5, kl_horizon=10))
    rows = [row for row in metrics(tmp_path / "ppo") if "score" in row]
    wanted = {
        "score", "correct", "formatted", "finished", "length", "entropy", "kl_ref", "kl_old", "clip_fraction",
        "explained_variance", "value_loss", "policy_loss", "beta", "grad_norm", "first_ratio_gap",
    }  # fmt: skip
    assert len(rows) == 5 and wanted <= set(rows[0]) and shown == [True, True, True]
    assert [row["step"] for row in metrics(tmp_path / "ppo") if "accuracy" in row] == [0, 3, 5]
    text = (tmp_path / "ppo" / "samples.txt").read_text()  # one answer to each question: the next one is to another
    assert len(re.findall(r"^(?:right|wrong)(?:, cut off)?: ", text, re.M)) == text.count("question: ") == 2
    assert rows[0]["kl_ref"] == pytest.approx(0, abs=1e-3) and rows[0]["first_ratio_gap"] < 1e-4
    assert len({row["beta"] for row in rows}) > 1 and all(0.05 < row["rollout_share"] < 1 for row in rows)
    model, tokenizer, state = load_stage(str(tmp_path / "ppo"))  # the value head stays behind
    assert state["stage"] == "ppo" and isinstance(model, Transformer)
    before, _, _ = load_stage(str(folders / "sft"))
    assert not torch.equal(model.head.weight, before.head.weight)


def test_a_resumed_run_ends_with_the_same_weights(tmp_path, folders, monkeypatch):
    settings = {"kl_target": 0.5, "kl_horizon": 10}  # beta too must come back
    whole, stopped = (tiny(tmp_path / name, folders, **settings) for name in ("whole", "stopped"))
    one, two = assert_exact_resume(monkeypatch, ppo, whole, stopped, saves=1)
    assert one["extra"] == two["extra"]


def test_the_reference_stays_what_the_policy_was(tmp_path, folders):
    """The KL is that to the start, not to the policy as it is now, which would be 0 for ever; and the leash is felt."""
    ppo.main(tiny(tmp_path / "ppo", folders, lr=5e-3, warmup=1, beta=0.5, temperature=0.7))
    rows = [row for row in metrics(tmp_path / "ppo") if "score" in row]
    assert rows[0]["kl_ref"] == pytest.approx(0, abs=1e-3)
    assert max(abs(row["kl_ref"]) for row in rows[1:]) > 0.02  # sampled, so it may be below 0


def test_an_answer_is_judged_as_if_it_stood_alone(run, folders):
    """Whatever padding its neighbours need."""
    judge, tokenizer, _ = reward.load_reward_model(str(folders / "reward"))
    policy, _, _ = load_stage(str(folders / "sft"))
    prompts = [tokenizer.encode("What is 2+3?" * (1 + i % 3)) for i in range(9)]
    rollout = sample_answers(policy, tokenizer, prompts, 1, 12, 1.0, seed=3)
    asked, config = [Prompt((), None)] * 9, Config(reward=str(folders / "reward"), micro_batch_size=4)
    found, rewards = ppo.score_answers(run, judge, rollout, asked, config, answers_known=False)
    assert rewards == {}  # nobody knows the right answers
    lengths = set()
    for tokens, mask, score in zip(rollout.tokens, rollout.mask, found):
        n = int(mask.nonzero().max()) + 2  # the last answer token is one column behind its log-probability
        lengths.add(n)
        close(judge(tokens[None, :n], torch.ones(1, n))[0], score, 1e-5)
    assert len(lengths) > 2


def test_an_unfinished_answer_costs(tmp_path, folders):
    """At two tokens nothing can end in time: every score is the penalty."""
    ppo.main(tiny(tmp_path / "ppo", folders, steps=1, max_new_tokens=2, unfinished_penalty=0.75))
    row = next(row for row in metrics(tmp_path / "ppo") if "score" in row)
    assert row["finished"] == 0 and row["score"] == pytest.approx(-0.75)


def recorded(monkeypatch, name: str) -> list[list]:
    """The arguments with which the stage will call one of the functions of numbers."""
    calls, real = [], getattr(ppo, name)

    def spy(*args):
        calls.append([x.detach().clone() if torch.is_tensor(x) else x for x in args])
        return real(*args)

    monkeypatch.setattr(ppo, name, spy)
    return calls


def test_what_is_logged_of_the_updates_is_what_the_losses_saw(tmp_path, folders, monkeypatch):
    seen = {name: recorded(monkeypatch, name) for name in ("ppo_policy_loss", "ppo_value_loss", "token_rewards")}
    judge = str(folders / "reward")  # it gives every answer another score
    settings = {"steps": 3, "lr": 1e-2, "warmup": 0, "epochs": 2, "minibatches": 2, "micro_batch_size": 3}
    ppo.main(tiny(tmp_path / "ppo", folders, clip_ratio=0.05, clip_value=0.03, beta=0.1, reward=judge, **settings))
    rows = [row for row in metrics(tmp_path / "ppo") if "score" in row]
    assert len(rows) == len(seen["token_rewards"]) == 3 and len(seen["ppo_policy_loss"]) == 3 * 4 * 2
    for row in rows:
        _, logps, ref_logps, mask, *_ = seen["token_rewards"].pop(0)
        assert row["kl_ref"] == pytest.approx(float(((logps - ref_logps) * mask).sum()) / 8, rel=1e-4, abs=1e-5)
        means = dict.fromkeys(("clip_fraction", "value_clip_fraction", "kl_old", "policy_loss", "value_loss"), 0.0)
        foreseen, returned = [], []
        for n in range(4):  # updates, each of four answers in parts of three and one
            policy, value = ([seen[name].pop(0) for _ in range(2)] for name in ("ppo_policy_loss", "ppo_value_loss"))
            new, old, advantages = (torch.cat([x[i][x[3].bool()] for x in policy]) for i in range(3))
            values, old_values, returns = (torch.cat([x[i][x[3].bool()] for x in value]) for i in range(3))
            ratio = (new - old).exp()
            pushed_out = ((advantages > 0) & (ratio > 1.05)) | ((advantages < 0) & (ratio < 0.95))
            means["clip_fraction"] += float(pushed_out.float().mean()) / 4
            means["value_clip_fraction"] += float(((values - old_values).abs() > 0.03).float().mean()) / 4
            means["kl_old"] += float((ratio - 1 - (new - old)).mean()) / 4
            worse = torch.minimum(ratio * advantages, ratio.clamp(0.95, 1.05) * advantages)
            means["policy_loss"] -= float(worse.mean()) / 4
            near = old_values + (values - old_values).clamp(-0.03, 0.03)
            means["value_loss"] += float(torch.maximum((values - returns) ** 2, (near - returns) ** 2).mean()) / 8
            foreseen, returned = foreseen + [old_values] * (n < 2), returned + [returns] * (n < 2)
        foreseen, returned = torch.cat(foreseen), torch.cat(returned)
        means["explained_variance"] = float(1 - (returned - foreseen).var() / returned.var())
        assert {name: row[name] for name in means} == pytest.approx(means, rel=1e-3, abs=1e-5)
    assert min(abs(rows[-1][name]) for name in ("clip_fraction", "value_clip_fraction", "kl_old", "kl_ref")) > 1e-4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": 0.0}, "temperature is 0.0: above 0"),
        ({"minibatches": 9}, "do not make 9 minibatches"),
        ({"beta": 0.0, "kl_target": 1.0}, "cannot adapt"),
        ({"beta": 0.1, "kl_target": 1.0, "kl_horizon": 7}, "kl_horizon 7 is less than one step of 8 answers"),
        ({"lam": 1.5}, "lam is 1.5: at most 1"),
        ({"reward": "nowhere"}, "there is no checkpoint in nowhere"),
        ({"max_new_tokens": 4096}, "leaves no room"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tmp_path, folders, changes, words):
    with pytest.raises(UserError, match=words):
        ppo.main(tiny(tmp_path / "x", folders, **changes))


def test_settings_at_the_bound_are_not_refused(tmp_path):
    for changes in ({"minibatches": 8}, {"kl_target": 1.0, "kl_horizon": 8, "beta": 0.1}):
        ppo.check(tiny(tmp_path, tmp_path, **changes))


def test_the_worked_example_is_worked_by_hand(capsys):
    """λ = ½, a score of 1 at the end, a tenth of log 2 for straying at the second token."""
    ppo.example()
    lines = capsys.readouterr().out.splitlines()
    found = [[float(x) for x in re.findall(r"-?\d+\.\d{4}", line)] for line in lines]
    cost = 0.1 * math.log(2)
    assert found[1] == pytest.approx([0, -cost, 1], abs=1e-4)
    deltas = [0.3, 0.4 - cost, 0.1]
    assert found[3] == pytest.approx(deltas, abs=1e-4)
    a = [deltas[0] + deltas[1] / 2 + deltas[2] / 4, deltas[1] + deltas[2] / 2, deltas[2]]
    assert found[4] == pytest.approx(a, abs=1e-4)
    returns = [a[0] + 0.2, a[1] + 0.5, a[2] + 0.9]
    assert found[5] == pytest.approx(returns, abs=1e-4)
    mean = sum(a) / 3
    std = math.sqrt(sum((x - mean) ** 2 for x in a) / 2)
    w = [(x - mean) / std for x in a]
    assert found[6] == pytest.approx(w, abs=1e-4)
    assert found[7] == pytest.approx([1.3, 0.875, 1.0], abs=1e-4)
    loss = -(1.2 * w[0] + 0.875 * w[1] + w[2]) / 3
    assert found[8] == pytest.approx([loss, 0, -0.875 * w[1] / 3, -w[2] / 3], abs=1e-4)
    # the critic: 0.1 is nearer to 0.2 than the clip; 0.8 counts as 0.7, which is worse and cannot move; 0.9 stays
    errors = [0.1 - returns[0], 0.7 - returns[1], 0.9 - returns[2]]
    value = sum(e * e for e in errors) / 6
    assert found[9] == pytest.approx([value, 0.1 * errors[0] / 3, 0, 0.1 * errors[2] / 3], abs=1e-4)
