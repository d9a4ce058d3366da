"""Rollouts: the policy answers, a rule judges, and the rows for training are laid out.

Reinforcement learning on a language model begins each step like this, whatever the algorithm: take some prompts,
sample answers from the policy as it is now, and find out how good they are. Three things must be exactly right here,
or everything after is quietly wrong:

* the tokens that count: those the policy chose, its end-of-text among them (stopping is a decision, and is learned
  like any other); never the prompt, never padding;
* the log-probabilities: those of the distribution that was sampled from, ``softmax(logits / temperature)``;
* the judgement: to the verifier an answer that was cut off has not answered, whatever it says so far.

An answer becomes a row [prompt | answer | padding], so the model needs no mask for padding on the left, and the
columns of ``mask`` and of the log-probabilities agree with those of ``token_logps``: column t is about token t+1.

Run ``python rollout.py`` to see the rows of two answers.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from tqdm import tqdm

from data import encode_prompts, epoch_batch
from engine import can_decode_fast, fast_generate
from generate import generate, goes_on
from runtime import processes
from runtime.config import AtLeast, Count, CountOrNone, CountOrZero, Finite, Positive, TrainConfig
from runtime.errors import RewardError, UserError
from runtime.rows import describe_held_out, held_out, report_skipped
from runtime.run import Run
from texts import Prompt, load_prompts
from tokenizer import ByteTokenizer, Tokenizer
from transformer import ModelConfig, Transformer, model_size, shared_logps, token_logps
from verify import call_reward, correctness_reward, format_reward, lax_correctness_reward, load_rewards


@dataclass(frozen=True)
class RolloutConfig(TrainConfig):
    """What every stage that learns from its own answers has in common."""

    data: str = "arith"
    """Where the questions come from: arith, gsm8k, svamp, a file of rows with the columns prompt and answer (.jsonl),
    or a dataset of the hub (org/name)."""
    reward: str = "verifier"
    """What judges the answers: "verifier" (verify.py), or a Python file, each function of which is one reward."""
    reward_weights: tuple[str, ...] = ()
    """How much each of those functions counts, as name=weight (1 if it is not named)."""
    n_prompts: CountOrNone = None
    """Use at most this many prompts (None: 4096 of arith, all of the others)."""
    init_from: str = ""
    """The policy to start from, and the reference: a run's folder or a checkpoint. Default: out/<task>/sft."""
    steps: Count = 140
    """Training steps; each samples one batch of answers."""
    max_new_tokens: Count = 48
    """An answer that has not ended after this many tokens is cut off."""
    temperature: Positive = 1.0
    """Sampling temperature; every log-probability uses it too. (At 0 all answers would be the same.)"""
    format_weight: Annotated[float, Finite()] = 0.1
    """Reward for the strict form, whatever the number."""
    minibatches: Count = 2
    """Updates in one pass over the answers, each on its own part of them."""
    micro_batch_size: Count = 32
    """Answers that each process takes at a time, those of similar length together; gradients accumulate."""
    warmup: CountOrZero = 5
    beta2: Annotated[float, AtLeast(0, below=1)] = 0.99
    """AdamW's memory of squared gradients: longer than pretraining's 0.95, because gradients of few answers are
    noisy."""
    eval_every: Count = 20
    eval_prompts: Count = 128
    """Held-out questions of an evaluation, answered greedily."""


@dataclass
class Rollout:
    """Answers and what is known about them; N rows, those of one prompt side by side."""

    tokens: Tensor  # (N, T): prompt, answer, padding
    mask: Tensor  # (N, T-1) boolean: is token t+1 one that the policy chose?
    sampled_logps: Tensor  # (N, T-1): log-probability of token t+1 as it was sampled; 0 where the mask is False
    texts: list[str]  # the answers, without end-of-text
    finished: Tensor  # (N,) boolean: ended by itself

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, chosen: Tensor) -> "Rollout":
        """Those rows alone, in that order. chosen: (n,), indices."""
        texts = [self.texts[i] for i in chosen.tolist()]
        return Rollout(self.tokens[chosen], self.mask[chosen], self.sampled_logps[chosen], texts, self.finished[chosen])


class Questions:
    """The questions of a stage as token ids: those it learns on, and the held-out ones of its evaluations.

    Which questions a step asks is a function of the seed and the step, so a resumed run asks what it would have asked.
    longest: the tokens that a prompt may have; longer ones are counted and left out. With ``warmup`` or ``fade`` the
    first steps ask the embedded task alone, and the share of its questions then falls to 0 (see the fields
    ``arith_warmup`` and ``arith_fade`` of grpo.py).
    """

    def __init__(self, config, tokenizer: Tokenizer, longest: int, warmup: int = 0, fade: int = 0):
        self.config, self.tokenizer, self.warmup, self.fade = config, tokenizer, warmup, fade
        own = config.data_dir, config.seed, config.n_prompts, config.columns
        sources = {config.data: load_prompts(config.data, "train", *own)}
        if warmup or fade:
            sources["arith"] = load_prompts("arith", "train", seed=config.seed)
        where, part = held_out(config)
        held = load_prompts(where, part, config.data_dir, n=config.eval_prompts, rename=config.columns)
        if config.reward == "verifier":
            lax = getattr(config, "verifier", "strict") != "strict"
            sources = {name: to_verify(prompts, name, lax) for name, prompts in sources.items()}
            held = to_verify(held, where, lax)
        self.train = {name: encode_prompts(prompts, tokenizer, longest) for name, prompts in sources.items()}
        self.held_ids, self.held = encode_prompts(held, tokenizer, longest)
        self.answers_known = all(one.gold is not None for one in (*self.train[config.data][1], *self.held))

    def batch(
        self, step: int, draw: int = 0, without: Sequence[Prompt] = (), most: int | None = None
    ) -> list[tuple[list[int], Prompt]]:
        """This process's share of the questions of a step, each as ids and as what it asks. A further ``draw`` of the
        same step gives other questions: none of those it is to go ``without``, and at most ``most``."""
        size, order = self.config.prompts_per_step, self.config.seed + 1_000_003 * draw
        fading = (step + 1 - self.warmup) / (self.fade + 1)  # 0 while only arith, 1 when only data
        from_data = round(size * min(1.0, max(0.0, fading))) if self.warmup or self.fade else size
        batch = []
        for name, n in {"arith": size - from_data, self.config.data: from_data}.items():
            ids, prompts = self.train.get(name, ((), ()))
            batch += [(ids[i], prompts[i]) for i in epoch_batch(len(ids), size, step, order)[:n]] if n else []
        if 0 < from_data < size:  # mixed, so that no process and no further draw gets only one kind
            batch = [batch[i] for i in epoch_batch(size, size, step, order)]
        known = set(map(id, without))
        return [one for one in processes.my_share(batch) if id(one[1]) not in known][:most]

    def examine(self, run: Run, model: Transformer) -> dict[str, float]:
        """What the model's greedy answers to the held-out questions are worth: "accuracy", or, with rewards of the
        user's own, "val_reward", their weighted sum, and "val_<name>", the mean of each."""
        config, questions = self.config, (self.tokenizer, self.held_ids, self.held)
        if not has_own_rewards(config):
            return {"accuracy": greedy_accuracy(run, model, *questions, config.max_new_tokens)}
        with run.autocast(), run.eager():
            rewards, _ = greedy_rewards(model, *questions, config.max_new_tokens, config)
        rewards = {"reward": total_reward(rewards, own_weights(config))} | rewards
        return {f"val_{name}": float(values.nanmean()) for name, values in rewards.items()}

    @property
    def goal(self) -> str:
        """The figure of ``examine`` that says which checkpoint is the best."""
        return "val_reward" if has_own_rewards(self.config) else "accuracy"

    def describe(self) -> str:
        told = f"{len(self.train[self.config.data][0]):,} prompts, {len(self.held):,} held-out questions"
        return f"{self.config.data}: {told}" + describe_held_out(self.config, len(self.held))

    def summary(self, figures: dict[str, float], run: Run) -> str:
        """The last evaluation in words, with a warning if the model is worse than before the first step."""
        before = run.at_start(self.goal)
        worse = before is not None and figures[self.goal] < before
        at_first = f" (WARNING: worse than before the first step, {before:.3f})" if worse else ""
        shown = {name: "unknown" if math.isnan(value) else f"{value:.3f}" for name, value in figures.items()}
        return ", ".join(f"held-out {name.removeprefix('val_')} {value}" for name, value in shown.items()) + at_first


def to_verify(prompts: Sequence[Prompt], name: str, lax: bool = False) -> list[Prompt]:
    """The questions with an answer that a verifier can compare with; others are counted and left out. lax: one that
    looks for numbers."""
    known = [prompt for prompt in prompts if prompt.gold is not None]
    report_skipped(+Counter({"without an answer to compare with": len(prompts) - len(known)}), f"questions of {name}")
    if not known:
        raise UserError(
            f"{name} has no answer to compare with: name its column with --columns answer=..., or give a reward of "
            "your own with --reward FILE.py"
        )
    if lax and any(isinstance(prompt.gold, tuple) for prompt in known):
        raise UserError(f"{name} has texts as answers: --verifier strict compares them, the others look for numbers")
    return known


def announce(run: Run, model: Transformer, questions: Questions, answers: int, **more: str) -> None:
    """Say what the run will do, with that many answers in a step; more: further lines, by name."""
    config, size = questions.config, model_size(model, model.config.max_seq_len)
    how = "eager (answers change shape every step)"
    run.banner(size, config.steps, answers * config.max_new_tokens, how, data=questions.describe(), **more)


def longest_prompt(config, context: int) -> int:
    """The tokens that a prompt may have beside an answer in ``context`` tokens; UserError if there is no room."""
    longest = context - config.max_new_tokens
    if longest < 1:
        raise UserError(f"max_new_tokens {config.max_new_tokens} leaves no room in a context of {context}")
    return longest


def sampling_seed(seed: int, step: int, draw: int = 0, draws: int = 1) -> int:
    """The seed of a step's answers, another one in each process."""
    return (((seed * 1_000_000 + step) * draws + draw) * 1_000 + processes.rank()) % 2**63


def join(rollouts: Sequence[Rollout], pad_id: int) -> Rollout:
    """The rows of several rollouts below each other; the narrower ones get more padding on the right."""
    T = max(rollout.tokens.shape[1] for rollout in rollouts)
    pad = torch.nn.functional.pad
    return Rollout(
        torch.cat([pad(r.tokens, (0, T - r.tokens.shape[1]), value=pad_id) for r in rollouts]),
        torch.cat([pad(r.mask, (0, T - 1 - r.mask.shape[1])) for r in rollouts]),
        torch.cat([pad(r.sampled_logps, (0, T - 1 - r.sampled_logps.shape[1])) for r in rollouts]),
        [text for r in rollouts for text in r.texts],
        torch.cat([r.finished for r in rollouts]),
    )


def sample_answers(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    n: int,
    max_new: int,
    temperature: float,
    seed: int,
    **knobs,
) -> Rollout:
    """``n`` answers to each of the encoded prompts. Further knobs (top_p, ...) go to ``generate``; training gives
    none."""
    cut = any(knobs.get(name, neutral) != neutral for name, neutral in {"top_k": 0, "top_p": 1.0, "min_p": 0.0}.items())
    fast = not cut and model.head.weight.device.type == "cuda" and can_decode_fast(model)
    ends = {"eot_id": tokenizer.end_ids, "pad_id": tokenizer.pad_id, "seed": seed}
    if fast:
        new, new_mask, new_logps = fast_generate(model, prompts, max_new, n, temperature, **ends)  # (N, C) each
    else:
        new, new_mask, new_logps = generate(model, prompts, max_new, n, temperature, **ends, **knobs)
    N, C = new.shape
    device = new.device
    starts = torch.tensor([len(prompt) for prompt in prompts for _ in range(n)], device=device)  # (N,)
    T = max(map(len, prompts)) + C
    rows = [[*prompt, *[tokenizer.pad_id] * (T - len(prompt))] for prompt in prompts for _ in range(n)]
    tokens = torch.tensor(rows, device=device)
    mask = torch.zeros(N, T, dtype=torch.bool, device=device)
    logps = torch.zeros(N, T, device=device)
    columns = starts[:, None] + torch.arange(C, device=device)  # (N, C): where each new token goes in its row
    tokens.scatter_(1, columns, new)  # padding lands on padding
    mask.scatter_(1, columns, new_mask)
    logps.scatter_(1, columns, new_logps)
    finished = (~goes_on(new, tokenizer.end_ids) & new_mask).any(dim=1)
    lengths = (new_mask.sum(dim=1) - finished.long()).tolist()
    texts = [tokenizer.decode(ids[:length]) for ids, length in zip(new.tolist(), lengths)]
    return Rollout(tokens, mask[:, 1:], logps[:, 1:], texts, finished)


# ----------------------------------------------------------------------------------------------------------------------
# What the answers are worth


def score(texts: Sequence[str], golds: Sequence, finished: Tensor, verifier: str = "strict") -> tuple[Tensor, Tensor]:
    """(N,) correctness and (N,) format, 0 or 1 each; an answer that was cut off has neither.

    verifier: "strict"; or one of the lax ones, "last" and "any" (verify.py), which look neither at the form nor at
    the end.
    """
    done = finished.tolist()
    if verifier == "strict":
        correct = [correctness_reward(text, gold) * ok for text, gold, ok in zip(texts, golds, done)]
    else:
        correct = [lax_correctness_reward(text, gold, verifier) for text, gold in zip(texts, golds)]
    formed = [format_reward(text, gold) * ok for text, gold, ok in zip(texts, golds, done)]
    return torch.tensor(correct, device=finished.device), torch.tensor(formed, device=finished.device)


def has_own_rewards(config) -> bool:
    """Do functions of the user's own judge the answers?"""
    return config.reward.endswith(".py")


def own_rewards(rollout: Rollout, asked: Sequence[Prompt], path: str) -> dict[str, Tensor]:
    """What each answer earns by the functions of the file ``path``, (N,) each, by name; NaN where one does not know, or
    fails, which ``stop_if_a_reward_failed`` then says. asked: the N questions.
    """
    functions, done = load_rewards(path), rollout.finished.tolist()
    rewards = {name: [] for name in functions}
    for prompt, text, finished in zip(asked, rollout.texts, done, strict=True):
        for name, function in functions.items():
            row, value = prompt.row | {"finished": finished}, math.nan
            if not _failed:
                try:
                    value = call_reward(name, function, prompt.messages[-1]["content"], text, row)
                except RewardError as error:
                    _failed.append(error)
            rewards[name].append(value)
    return {name: torch.tensor(values, device=rollout.tokens.device) for name, values in rewards.items()}


_failed: list[RewardError] = []  # the first failure of a reward in this process


def stop_if_a_reward_failed(config) -> None:
    """End all processes with a ``RewardError`` if a function of the user's failed in one of them. Processes may judge
    differently often (``draws``), so they meet here, once in a step."""
    if has_own_rewards(config):
        problem = _failed.pop() if _failed else None
        if processes.sum_numbers([float(problem is not None)])[0]:
            raise problem or RewardError("a reward failed in another process, see its message")


def own_weights(config) -> dict[str, float]:
    """How much each function of ``config.reward`` counts, by its name."""
    weights = dict.fromkeys(load_rewards(config.reward), 1.0)
    for given in config.reward_weights:
        name, _, weight = given.partition("=")
        if name not in weights:
            raise UserError(f"reward_weights {given}: {config.reward} has {', '.join(weights)}")
        try:
            weights[name] = float(weight)
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise UserError(f"reward_weights {given}: write name=weight, for example {name}=0.5")
    return weights


def check_reward(config) -> None:
    """Refuse a file of rewards that cannot be used, before anything is loaded."""
    if has_own_rewards(config):
        if not any(own_weights(config).values()):
            raise UserError("all weights are 0: there is nothing to learn")
    elif config.reward != "verifier":
        raise UserError(f"reward {config.reward}: the verifier, or a Python file; a reward model is for ppo.py")
    elif config.reward_weights:
        raise UserError("reward_weights are for the functions of a file: --reward FILE.py")


def total_reward(rewards: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The weighted sum of the rewards that are known, (N,); NaN for an answer of which every judgement is unknown."""
    total = sum(weights[name] * values.nan_to_num(0.0) for name, values in rewards.items())
    judgements = [values for name, values in rewards.items() if weights[name] and name not in ("overlong", "kl")]
    return total.masked_fill(torch.stack(judgements).isnan().all(dim=0), math.nan) if judgements else total


@torch.no_grad()
def answer_greedily(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[list[int]], golds: Sequence, max_new: int,
    batch_size: int = 128, show: bool = False,
) -> dict[str, float]:  # fmt: skip
    """What the model's greedy answers to encoded questions are like: "accuracy", "cut_off" and "unreadable" as shares
    of the questions, "tokens" as the mean of an answer; judged by the strict verifier. show: with a progress bar.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # prompts of similar length together: no padding
    right = cut = unread = tokens = 0
    for first in tqdm(range(0, len(order), batch_size), desc="greedy", leave=False, disable=not show):
        rows = order[first : first + batch_size]
        rollout = sample_answers(model, tokenizer, [prompts[i] for i in rows], 1, max_new, 0.0, seed=0)
        correct, formed = score(rollout.texts, [golds[i] for i in rows], rollout.finished)
        right += int(correct.sum())
        cut += int((~rollout.finished).sum())
        unread += int((formed == 0).sum())
        tokens += int(rollout.mask.sum())
    n = len(order)
    return {"accuracy": right / n, "cut_off": cut / n, "unreadable": unread / n, "tokens": tokens / n}


@torch.no_grad()
def greedy_rewards(
    model: Transformer, tokenizer: Tokenizer, ids: list, prompts: Sequence[Prompt], max_new: int, config,
    batch_size: int = 128, show: bool = False,
) -> tuple[dict[str, Tensor], dict[str, float]]:  # fmt: skip
    """The rewards of ``config.reward``, (N,) each by name, of the model's greedy answers to N encoded questions; and
    "cut_off", the share that did not end, and "tokens", the mean length."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found, cut, tokens = {name: torch.empty(len(ids)) for name in load_rewards(config.reward)}, 0, 0
    for first in tqdm(range(0, len(order), batch_size), desc="greedy", leave=False, disable=not show):
        rows = order[first : first + batch_size]
        rollout = sample_answers(model, tokenizer, [ids[i] for i in rows], 1, max_new, 0.0, seed=0)
        for name, values in own_rewards(rollout, [prompts[i] for i in rows], config.reward).items():
            found[name][rows] = values.cpu()
        cut += int((~rollout.finished).sum())
        tokens += int(rollout.mask.sum())
    stop_if_a_reward_failed(config)
    return found, {"cut_off": cut / len(ids), "tokens": tokens / len(ids)}


def greedy_accuracy(
    run: Run, model: Transformer, tokenizer: Tokenizer, ids: list, prompts: list[Prompt], max_new: int
) -> float:
    """The share of held-out questions that a run's model answers right (``evaluate.py`` adds intervals and more)."""
    with run.autocast(), run.eager():
        return answer_greedily(model, tokenizer, ids, [prompt.gold for prompt in prompts], max_new)["accuracy"]


# ----------------------------------------------------------------------------------------------------------------------
# The rows of an update


def minibatches(n: int, count: int, step: int, epoch: int, seed: int, group: int = 1) -> list[Tensor]:
    """The rows of each of ``count`` minibatches of n answers, reshuffled in every epoch (one minibatch holds all of
    them, in order); a function of its arguments alone. Each ``group`` of answers, to one prompt, stays together.
    """
    if count == 1:
        return [torch.arange(n)]
    generator = torch.Generator().manual_seed(((seed * 1_000_003 + step) * 1009 + epoch) % 2**63)
    groups = torch.randperm(n // group, generator=generator).tensor_split(count)
    return [(some[:, None] * group + torch.arange(group)).flatten() for some in groups]


def micro_batches(mask: Tensor, rows: Tensor, size: int, group: int = 1) -> list[tuple[Tensor, int]]:
    """Micro-batches of ``size`` of the given rows, those of similar length together, each with its width: the columns
    after its longest answer are padding and need not be computed. In the embedded task this saves a fifth of the work.
    The rows of a ``group`` stay side by side, for ``shared_logps``.

    mask: (N, T-1), with at least one token in each row; rows: (n,), indices.
    """
    ends = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(dim=1)  # (N,): one past the last token
    longest = ends.view(-1, group).amax(dim=1).repeat_interleave(group)  # (N,)
    rows = rows[longest[rows].argsort(stable=True)]
    widths = ends[rows].tolist()
    return [(rows[i : i + size], max(widths[i : i + size])) for i in range(0, len(rows), size)]


@torch.no_grad()
def policy_logps(
    run: Run, model: Transformer, rollout: Rollout, config, wanted: Tensor | None = None, group: int = 1
) -> Tensor:
    """(N, T-1) log-probabilities of the answers' tokens under ``model``, at the temperature that sampled them, without
    gradient; 0 where the mask is False, and in rows that are not ``wanted``, (N,) boolean.

    config: the stage's, for its ``temperature`` and ``micro_batch_size``; group: answers to a prompt, side by side.
    """
    rows = torch.arange(len(rollout), device=run.device) if wanted is None else wanted.nonzero().squeeze(1)
    logps = torch.zeros_like(rollout.sampled_logps)
    for part, width in micro_batches(rollout.mask, rows, config.micro_batch_size, group):
        tokens, mask = rollout.tokens[part, : width + 1], rollout.mask[part, :width]
        with run.autocast():
            logps[part, :width] = shared_logps(model, tokens, mask, config.temperature)
    return logps


if __name__ == "__main__":
    torch.manual_seed(0)
    demo = ByteTokenizer()
    policy = Transformer(ModelConfig(demo.vocab_size, 32, 2, 2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    lessons = torch.tensor([[*b"Hi", *b"hello", demo.eot_id], [*b"By", *b"ebye.", demo.eot_id]])
    for _ in range(30):  # a policy that has something to say
        loss = -token_logps(policy, lessons).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rows = sample_answers(policy, demo, [[*b"Hi"], [*b"Bye"]], 1, max_new=5, temperature=1.0, seed=0)
    for i, text in enumerate(rows.texts):
        print(f"answer {text!r}, {'finished' if rows.finished[i] else 'cut off'}")
        for t, token in enumerate(rows.tokens[i, 1:].tolist()):
            counts, logp = bool(rows.mask[i, t]), float(rows.sampled_logps[i, t])
            print(f"  column {t}: token {demo.decode([token])!r:18} {f'counts, log p {logp:.2f}' if counts else ''}")
