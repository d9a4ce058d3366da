"""Sampling against transformers, and generation against the model that it samples from."""

import math

import pytest
import torch
from conftest import load_npz

import generate as generate_module
from engine import fast_generate
from generate import filter_logits, generate, left_pad, sample, stream
from transformer import ModelConfig, Transformer, token_logps

SAMPLING = load_npz("sampling")
V, EOT, PAD = 11, 9, 10
PROMPTS = [[1, 2, 3, 4, 5], [6], [7, 8, 1], [2, 2], [3, 1, 4, 1], [5, 8]]


def close(a, b, atol=1e-4, rtol=1e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


def small(**fields) -> Transformer:
    torch.manual_seed(3)
    model = Transformer(ModelConfig(V, 16, 2, 4, n_kv_heads=2, max_seq_len=32, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


MODEL = small()


@torch.no_grad()
def greedy_by_full_forward(model, prompt, max_new_tokens, eot=EOT):
    text = list(prompt)
    while len(text) < len(prompt) + max_new_tokens:
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
        if text[-1] == eot:
            break
    return text[len(prompt) :]


def rows_of(tokens, mask):
    return [row[keep].tolist() for row, keep in zip(tokens, mask)]


# ----------------------------------------------------------------------------------------------------------------------
# The four knobs


@pytest.mark.parametrize("suffix", ["", "_probs"])
@pytest.mark.parametrize(
    "name, knobs",
    [
        ("T0.7", {}),
        ("T0.7_k5", {"top_k": 5}),
        ("T0.7_p0.8", {"top_p": 0.8}),
        ("T0.7_k5_p0.8", {"top_k": 5, "top_p": 0.8}),
        ("T0.7_k5_p0.8_minp0.2", {"top_k": 5, "top_p": 0.8, "min_p": 0.2}),
    ],
)
def test_knobs_in_a_row_equal_transformers(name, knobs, suffix):
    left = filter_logits(SAMPLING["logits"], 0.7, **knobs)
    close(left.softmax(-1) if suffix else left, SAMPLING[f"chain_{name}{suffix}"], atol=1e-5)


@pytest.mark.parametrize("name", sorted(key for key in SAMPLING if key.startswith(("topp_", "topk_", "minp_"))))
def test_one_knob_keeps_what_transformers_keeps(name):
    """Of the two tied tokens (1/16 each) either may stay when one does, so the probabilities are compared."""
    probabilities = SAMPLING["dyadic_probs"]
    kind, value = name.split("_")
    knob = {"topp": {"top_p": float(value)}, "topk": {"top_k": int(float(value))}, "minp": {"min_p": float(value)}}[
        kind
    ]
    kept = filter_logits(probabilities.log(), **knob).isfinite()
    assert sorted(probabilities[kept].tolist()) == sorted(probabilities[SAMPLING[name]].tolist())


@pytest.mark.parametrize("name", sorted(key for key in SAMPLING if key.startswith("toppcount_uniform8")))
def test_top_p_on_the_boundary(name):
    """Eight equal tokens: p = 0.5 is reached exactly by four; p = 0 keeps one."""
    kept = filter_logits(SAMPLING["uniform8_logits"], top_p=float(name.split("_")[-1])).isfinite().sum()
    assert kept == SAMPLING[name]


def test_top_p_keeps_the_token_that_crosses():
    logits = torch.tensor([0.1, 0.5, 0.4]).log()
    assert filter_logits(logits, top_p=0.6).isfinite().tolist() == [False, True, True]


def test_top_p_follows_temperature():
    """At temperature 2 the three tokens are 0.54, 0.33, 0.13 and not 0.70, 0.26, 0.04: p = 0.6 takes two."""
    logits = torch.tensor([0.7, 0.26, 0.04]).log()
    assert filter_logits(logits, 2.0, top_p=0.6).isfinite().sum() == 2
    assert filter_logits(logits, 1.0, top_p=0.6).isfinite().sum() == 1


def test_top_p_looks_at_what_top_k_left():
    """Of 0.4, 0.3, 0.2, 0.1 top-k leaves 4/7 and 3/7: p = 0.5 takes one; before top-k it would have taken two."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert filter_logits(logits, top_k=2, top_p=0.5).isfinite().sum() == 1
    assert filter_logits(logits, top_p=0.5).isfinite().sum() == 2


def test_ties_with_the_kth_stay():
    assert filter_logits(torch.tensor([1.0, 3.0, 1.0, 0.0]), top_k=2).isfinite().tolist() == [True, True, True, False]


@pytest.mark.parametrize("knobs", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"top_k": 1, "top_p": 0.0}])
def test_one_token_always_survives(knobs):
    logits = torch.randn(6, V)
    kept = filter_logits(logits, **knobs).isfinite()
    assert kept.sum(-1).tolist() == [1] * 6 and kept.int().argmax(-1).equal(logits.argmax(-1))


def test_logits_are_not_written():
    logits = torch.randn(2, V)
    before = logits.clone()
    filter_logits(logits, 0.7, top_k=3, top_p=0.5, min_p=0.1)
    filter_logits(logits, top_k=3)
    assert logits.equal(before)


def test_temperature_must_be_positive():
    for temperature in (0.0, -1.0):
        with pytest.raises(ValueError, match="temperature must be positive"):
            filter_logits(torch.zeros(3), temperature)


# ----------------------------------------------------------------------------------------------------------------------
# One draw


def fits(counts, probabilities) -> bool:
    """A chi-square statistic within five standard deviations of what chance gives, and nothing where p is 0."""
    possible = probabilities > 0
    expected = counts.sum() * probabilities[possible]
    freedom = int(possible.sum()) - 1
    chi2 = ((counts[possible] - expected) ** 2 / expected).sum()
    return bool(counts[~possible].sum() == 0 and chi2 < freedom + 5 * math.sqrt(2 * freedom))


@pytest.mark.parametrize(
    "knobs", [{}, {"temperature": 0.6}, {"temperature": 1.7}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.3}]
)
def test_frequencies_are_the_distribution(knobs):
    logits = torch.randn(V)
    tokens, logps = sample(logits.expand(20000, V), torch.Generator().manual_seed(0), **knobs)
    expected = filter_logits(logits, **knobs).log_softmax(-1)
    assert fits(tokens.bincount(minlength=V).float(), expected.exp())
    close(logps, expected[tokens])
    if knobs:  # the test can tell: without the knob the same counts do not fit
        assert not fits(tokens.bincount(minlength=V).float(), logits.softmax(-1))


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.full((5000, 4), float("-inf"))
    logits[:, 2], logits[:, 1] = 0.0, -1.0
    tokens, logps = sample(logits, torch.Generator().manual_seed(0))
    assert set(tokens.tolist()) == {1, 2} and logps.isfinite().all()


@pytest.mark.parametrize("u, token", [(0.0, 1), (0.2499, 1), (0.2501, 3), (1 - 2**-53, 3)])
def test_the_ends_of_the_unit_interval(monkeypatch, u, token):
    """Probabilities 0, 1/4, 0, 3/4, 0: also u = 0 and the largest u below 1 draw a token that is possible."""
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype=None, **_: torch.full(shape, u, dtype=dtype))
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), math.log(3), float("-inf")]])
    drawn, logps = sample(logits)
    assert drawn.tolist() == [token] and logps.isfinite().all()


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_bfloat16_logits_are_scored_in_float32(temperature):
    logits = torch.randn(4, V).bfloat16()
    tokens, logps = sample(logits, temperature=temperature)
    exact = (logits.double() / (temperature or 1.0)).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    assert logps.dtype == torch.float32
    close(logps.double(), exact, atol=1e-5, rtol=1e-5)


def test_temperature_zero_takes_the_most_likely():
    logits = torch.randn(6, V)
    tokens, logps = sample(logits, temperature=0)
    assert tokens.equal(logits.argmax(-1))
    close(logps, logits.log_softmax(-1).amax(-1))


# ----------------------------------------------------------------------------------------------------------------------
# Whole continuations


def test_left_pad():
    tokens, real = left_pad([[1, 2, 3], [4]], PAD)
    assert tokens.tolist() == [[1, 2, 3], [PAD, PAD, 4]]
    assert real.tolist() == [[True, True, True], [False, False, True]]
    assert left_pad([[1, 2], [3, 4]], PAD)[1] is None
    assert left_pad([[1, PAD], [4]], PAD)[1].tolist() == [[True, True], [False, True]]  # by length, not by id


@pytest.mark.parametrize(
    "form",
    [{}, {"positions": "learned"}, {"positions": "sinusoidal"}, {"window": 3, "sinks": 1}],
    ids=["rope", "learned", "sinusoidal", "window"],
)
def test_greedy_equals_argmax_by_full_forward(form):
    """Six prompts of unequal length in one batch, each as if alone; rows end, and leave the batch, at different
    times."""
    model = small(**form)
    free = [greedy_by_full_forward(model, p, 12, eot=-1) for p in PROMPTS]
    eot = max(range(V), key=lambda i: len({row.index(i) if i in row else 12 for row in free}))  # ends them unequally
    expected = [greedy_by_full_forward(model, p, 12, eot) for p in PROMPTS]
    assert len({len(row) for row in expected}) >= 3
    tokens, mask, _ = generate(model, PROMPTS, 12, temperature=0, eot_id=eot, pad_id=PAD)
    assert rows_of(tokens, mask) == expected
    assert tokens.shape[1] == max(map(len, expected))
    for prompt, row in zip(PROMPTS, expected):
        alone, alone_mask, _ = generate(model, [prompt], 12, temperature=0, eot_id=eot, pad_id=PAD)
        assert rows_of(alone, alone_mask) == [row]


def test_finished_rows_leave_the_batch(monkeypatch):
    """The model is asked for fewer rows as answers end."""
    batches = []
    model = small()
    forward = model.forward_hidden
    monkeypatch.setattr(model, "forward_hidden", lambda *a, **k: batches.append(len(a[0])) or forward(*a, **k))
    _, mask, _ = generate(model, PROMPTS, 20, n_samples=4, eot_id=EOT, seed=0)
    assert batches[0] == 6 and batches[1] <= 24 and batches[-1] < 12  # each prompt is read once
    alive = mask.sum(0).tolist()
    assert all(alive[t + 1] <= rows for t, rows in enumerate(batches[1:]))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
@torch.no_grad()
def test_logps_are_those_of_the_model(temperature):
    """The policy that samples is the policy that trains: row i continues prompt i // n_samples, and scored by
    ``token_logps`` at the same temperature its tokens have the log-probabilities with which they were drawn."""
    tokens, mask, logps = generate(MODEL, PROMPTS, 10, 3, temperature, eot_id=EOT, pad_id=PAD, seed=1)
    assert tokens.shape == mask.shape == logps.shape and len(tokens) == 18 and logps.dtype == torch.float32
    for i in range(18):
        prompt = PROMPTS[i // 3]
        whole = torch.tensor([prompt + tokens[i][mask[i]].tolist()])
        close(logps[i][mask[i]], token_logps(MODEL, whole, temperature)[0, len(prompt) - 1 :])
    assert (mask.sum(1) > 1).any() and (logps[~mask] == 0).all()


@pytest.mark.parametrize("knobs", [{"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}, {"temperature": 0.7, "top_k": 4}])
@torch.no_grad()
def test_logps_with_a_cut_are_of_the_cut_distribution(knobs):
    tokens, mask, logps = generate(MODEL, PROMPTS[:2], 8, 2, **knobs, eot_id=EOT, seed=2)
    for i in range(4):
        prompt = PROMPTS[i // 2]
        answer = tokens[i][mask[i]]
        logits = MODEL(torch.tensor([prompt + answer.tolist()]))[0, len(prompt) - 1 : -1]
        expected = filter_logits(logits, **knobs).log_softmax(-1).gather(1, answer[:, None])[:, 0]
        assert expected.isfinite().all()
        close(logps[i][mask[i]], expected)


@torch.no_grad()
def test_greedy_logps_are_of_temperature_one():
    tokens, mask, logps = generate(MODEL, [PROMPTS[0]], 6, temperature=0, eot_id=EOT)
    whole = torch.tensor([PROMPTS[0] + tokens[0][mask[0]].tolist()])
    close(logps[0][mask[0]], token_logps(MODEL, whole)[0, 4:])


def test_end_of_text_counts_and_padding_does_not():
    tokens, mask, logps = generate(MODEL, PROMPTS, 16, 4, eot_id=EOT, pad_id=PAD, seed=0)
    ended = 0
    for row, counts, logp in zip(tokens, mask, logps):
        n = int(counts.sum())
        assert n >= 1 and counts.tolist() == [True] * n + [False] * (len(row) - n)
        assert (row[n:] == PAD).all() and (logp[n:] == 0).all() and (logp[:n] < 0).all()
        assert EOT not in row[: n - 1].tolist()
        ended += int(row[n - 1]) == EOT
        assert int(row[n - 1]) == EOT or n == tokens.shape[1]
    assert ended > 0 and mask.sum(1).min() < mask.sum(1).max()


def test_padding_is_end_of_text_unless_told():
    tokens, mask, _ = generate(MODEL, PROMPTS, 16, 4, eot_id=EOT, seed=0)
    assert not mask.all() and (tokens[~mask] == EOT).all()


def test_a_sampled_pad_is_a_token():
    """The mask follows what was sampled; it is never read off the ids."""
    tokens, mask, logps = generate(MODEL, PROMPTS, 16, 8, eot_id=EOT, pad_id=PAD, seed=0)
    sampled_pads = mask & (tokens == PAD)
    assert sampled_pads.any() and (logps[sampled_pads] < 0).all()


def test_the_same_seed_gives_the_same_text():
    one, two, other = (generate(MODEL, PROMPTS, 8, 2, eot_id=EOT, seed=seed) for seed in (5, 5, 6))
    for a, b in zip(one, two):
        assert a.equal(b)
    assert rows_of(*one[:2]) != rows_of(*other[:2])


def test_samples_of_one_prompt_differ():
    tokens, mask, _ = generate(MODEL, PROMPTS[:1], 8, 16, eot_id=EOT, seed=0)
    assert len(set(map(tuple, rows_of(tokens, mask)))) > 8


def test_global_random_state_is_left_alone_by_a_seed():
    before = torch.random.get_rng_state()
    generate(MODEL, PROMPTS, 4, eot_id=EOT, seed=5)
    assert torch.random.get_rng_state().equal(before)


@torch.no_grad()
def test_pairs_of_tokens_come_as_often_as_the_model_says():
    """Two steps, 6000 samples: the second step must continue its own first token."""
    tokens, mask, _ = generate(MODEL, [[1, 2, 3]], 2, 6000, 1.3, eot_id=-1, seed=0)
    assert mask.all()
    first = (MODEL(torch.tensor([[1, 2, 3]]))[0, -1] / 1.3).softmax(-1)
    rows = torch.tensor([[1, 2, 3, i] for i in range(V)])
    second = (MODEL(rows)[:, -1] / 1.3).softmax(-1)
    joint = (first[:, None] * second).flatten()
    common = joint > 5 / 6000
    counts = (tokens[:, 0] * V + tokens[:, 1]).bincount(minlength=V * V).float()
    grouped = torch.cat([counts[common], counts[~common].sum()[None]])
    assert fits(grouped, torch.cat([joint[common], joint[~common].sum()[None]]))


@pytest.mark.parametrize("n_samples", [1, 3])
def test_one_new_token(n_samples):
    tokens, mask, logps = generate(MODEL, PROMPTS, 1, n_samples, eot_id=EOT, seed=0)
    assert tokens.shape == (6 * n_samples, 1) and mask.all() and (logps < 0).all()


def test_generation_leaves_the_model_without_gradients():
    _, _, logps = generate(MODEL, PROMPTS, 3, eot_id=EOT, seed=0)
    assert not logps.requires_grad and all(p.grad is None for p in MODEL.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# One by one


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("knobs", [{"temperature": 0}, {"temperature": 0.8}, {"top_k": 3}])
def test_stream_equals_generate(prompt, knobs):
    tokens, mask, _ = generate(MODEL, [prompt], 12, **knobs, eot_id=EOT, seed=4)
    expected = [token for token in rows_of(tokens, mask)[0] if token != EOT]
    assert list(stream(MODEL, prompt, 12, eot_id=EOT, seed=4, **knobs)) == expected


def test_stream_gives_tokens_as_they_are_drawn(monkeypatch):
    calls = []
    real = generate_module.sample
    monkeypatch.setattr(generate_module, "sample", lambda *a, **k: calls.append(1) or real(*a, **k))
    text = stream(MODEL, [1, 2], 6, eot_id=-1, seed=0)
    next(text)
    next(text)
    assert len(calls) == 2


# ----------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_an_empty_prompt_is_an_error(prompts):
    with pytest.raises(ValueError, match="every prompt needs at least one token"):
        generate(MODEL, prompts, 4, eot_id=EOT)


def test_a_negative_temperature_is_an_error():
    with pytest.raises(ValueError, match="temperature must be positive"):
        generate(MODEL, [[1]], 4, temperature=-1.0, eot_id=EOT)


def test_no_new_tokens_is_an_error():
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(MODEL, [[1]], 0, eot_id=EOT)


def test_past_the_position_table_is_an_error():
    with pytest.raises(ValueError, match="max_seq_len is 32"):
        generate(small(positions="learned"), [[1] * 30], 4, eot_id=-1)


@pytest.mark.parametrize("sampler", [generate, fast_generate])
def test_several_tokens_end_a_text(sampler):
    """Each of them does, is kept as the last token, and nothing follows it."""
    model = Transformer(ModelConfig(16, 16, 1, 2, max_seq_len=64))
    prompts = [[1, 2, 3]] * 64
    tokens, mask, _ = sampler(model, prompts, 20, eot_id=(5, 9), pad_id=0, seed=4)
    ended = [row[keep].tolist() for row, keep in zip(tokens, mask)]
    last = {row[-1] for row in ended if len(row) < 20}
    assert last == {5, 9} and not any({5, 9} & set(row[:-1]) for row in ended)
    only = sampler(model, prompts, 20, eot_id=5, pad_id=0, seed=4)
    assert any(9 in row[keep][:-1].tolist() for row, keep in zip(*only[:2]))
    first = next(row for row in ended if len(row) < 20 and row[-1] == 9)
    seed = next(s for s in range(200) if 9 in list(stream(model, [1, 2, 3], 20, eot_id=5, seed=s)))
    assert first and 9 not in list(stream(model, [1, 2, 3], 20, eot_id=(5, 9), seed=seed))
