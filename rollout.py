"""Rollouts: the policy answers, a rule judges, and the rows for training are laid out.

Reinforcement learning on a language model begins each step like this, whatever the algorithm: take some prompts,
sample answers from the policy as it is now, and find out how good they are. Three things must be exactly right here,
or everything after is quietly wrong:

* the tokens that count: those the policy chose, its end-of-text among them (stopping is a decision, and is learned
  like any other); never the prompt, never padding;
* the log-probabilities: those of the distribution that was sampled from, ``softmax(logits / temperature)``;
* the judgement: an answer that was cut off has not answered, whatever it says so far.

An answer becomes a row [prompt | answer | padding], so the model needs no mask for padding on the left, and the
columns of ``mask`` and of the log-probabilities agree with those of ``token_logps``: column t is about token t+1.

Run ``python rollout.py`` to see the rows of two answers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data import Prompt
from engine import can_decode_fast, fast_generate
from generate import generate
from runtime import processes
from runtime.run import Run
from tokenizer import ByteTokenizer, Tokenizer
from transformer import ModelConfig, Transformer, token_logps
from verify import correctness_reward, format_reward, lax_correctness_reward


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
    ends = {"eot_id": tokenizer.eot_id, "pad_id": tokenizer.pad_id, "seed": seed}
    if fast:
        new, new_mask, new_logps = fast_generate(model, prompts, max_new, n, temperature, **ends)  # (N, C) each
    else:
        new, new_mask, new_logps = generate(model, prompts, max_new, n, temperature, **ends, **knobs)
    N, C = new.shape
    device = new.device
    starts = torch.tensor([len(prompt) for prompt in prompts for _ in range(n)], device=device)  # (N,)
    T = int(starts.max()) + C
    tokens = torch.full((N, T), tokenizer.pad_id, device=device)
    mask = torch.zeros(N, T, dtype=torch.bool, device=device)
    logps = torch.zeros(N, T, device=device)
    for i, prompt in enumerate(prompts):
        tokens[i * n : (i + 1) * n, : len(prompt)] = torch.tensor(prompt, device=device)
    columns = starts[:, None] + torch.arange(C, device=device)  # (N, C): where each new token goes in its row
    tokens.scatter_(1, columns, new)  # padding lands on padding
    mask.scatter_(1, columns, new_mask)
    logps.scatter_(1, columns, new_logps)
    finished = ((new == tokenizer.eot_id) & new_mask).any(dim=1)
    lengths = (new_mask.sum(dim=1) - finished.long()).tolist()
    texts = [tokenizer.decode(ids[:length]) for ids, length in zip(new.tolist(), lengths)]
    return Rollout(tokens, mask[:, 1:], logps[:, 1:], texts, finished)


def in_parts(mask: Tensor, rows: Tensor, size: int) -> list[tuple[Tensor, int]]:
    """Micro-batches of ``size`` of the given rows, those of similar length together, each with its width: the columns
    after its longest answer are padding and need not be computed. In the embedded task this saves a fifth of the work.

    mask: (N, T-1), with at least one token in each row; rows: (n,), indices.
    """
    ends = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(dim=1)  # (N,): one past the last token
    rows = rows[ends[rows].argsort(stable=True)]
    return [(part, int(ends[part].max())) for part in rows.split(size) if len(part)]


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
    formed = [format_reward(text) * ok for text, ok in zip(texts, done)]
    return torch.tensor(correct, device=finished.device), torch.tensor(formed, device=finished.device)


def examine(
    run: Run, model: Transformer, tokenizer: Tokenizer, ids: list, prompts: list[Prompt], max_new: int
) -> float:
    """Greedy accuracy on held-out questions (``evaluate.py`` adds intervals and more)."""
    right = 0.0
    for first in range(0, len(ids), 128):
        with run.autocast(), run.eager():
            rollout = sample_answers(model, tokenizer, ids[first : first + 128], 1, max_new, 0.0, seed=0)
        golds = [prompt.gold for prompt in prompts[first : first + 128]]
        right += float(score(rollout.texts, golds, rollout.finished)[0].sum())
    return right / len(ids)


# ----------------------------------------------------------------------------------------------------------------------
# Reinforcement learning fails in silence: what to look at before and while it runs


def flat_groups(rewards: Tensor, group_size: int) -> Tensor:
    """The share of groups whose rewards are all equal: between equals nothing can be learned."""
    groups = rewards.view(-1, group_size)
    return (groups == groups[:, :1]).all(dim=1).float().mean()


def kept_apart(rewards: Tensor, advantages: Tensor, group_size: int) -> float:
    """How many different advantages there are for each different row of rewards, in groups that are not flat. Below 1,
    answers that earned different things were treated as equals: their sum forgot the difference (gdpo.py).

    rewards: (N, K), advantages: (N,).

    >>> rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    >>> round(kept_apart(rewards, torch.tensor([0.5, 0.5, -1.5, 0.5]), group_size=4), 3)
    0.667
    """
    combinations = distinct = 0
    for rows, values in zip(rewards.split(group_size), advantages.split(group_size)):
        n = len({tuple(row) for row in rows.tolist()})
        if n > 1:
            combinations += n
            distinct += len({round(value, 4) for value in values.tolist()})
    return distinct / combinations if combinations else 1.0


def render(prompt: Prompt, rollout: Rollout, correct: Tensor, n: int = 4) -> str:
    """A question and the first ``n`` answers to it, for a human eye."""
    lines = [f"question: {prompt.messages[-1]['content']}", f"gold:     {prompt.gold}"]
    for text, ok, done in list(zip(rollout.texts, correct.tolist(), rollout.finished.tolist()))[:n]:
        lines.append(f"{'right' if ok else 'wrong'}{'' if done else ', cut off'}: {text}")
    return "\n".join(lines)


def report_start(run: Run, rollout: Rollout, correct: Tensor, figures: dict, flat: float, asked: Prompt) -> None:
    """What the policy can do before the first step: if it never succeeds, it has nothing to learn from.

    figures: the means of "correct", "formatted" and "finished" over this process's answers; correct: (N,), of the
    answers that are shown; flat: the share of flat groups, of all processes.
    """
    mine = torch.tensor([figures[name] for name in ("correct", "formatted", "finished")], dtype=torch.float64)
    solved, shaped, finished = (processes.sum_over_processes(mine) / processes.world_size()).tolist()
    run.print(
        f"  start      pass@1 {solved:.3f}, well-formed {shaped:.3f}, "
        f"finished {finished:.3f}, cut off {1 - finished:.3f}, groups with equal rewards {flat:.3f}"
    )
    run.print("             " + render(asked, rollout, correct, n=1).replace("\n", "\n             "))
    if flat == 1:
        run.print(
            "WARNING: all rewards are equal, so nothing can be learned: start from a better model, or raise "
            "--temperature (grpo.py also has --group_size and --arith_warmup)"
        )
    if finished == 0:
        run.print("WARNING: every answer was cut off: raise --max_new_tokens, or start from a model that can end")


def warn(run: Run, silent: int, figures: dict, norm: float) -> None:
    """Say loudly when a run learns nothing. ``silent``: how many steps in a row have taught nothing."""
    if silent and silent % 10 == 0:
        run.print(
            f"WARNING: {silent} steps in a row taught nothing (flat groups: {figures['flat_groups']:.2f}, "
            f"gradient {norm:.1e}): raise --temperature (grpo.py also has --group_size), or change the prompts"
        )
    if figures["finished"] == 0:
        run.print("WARNING: every answer of this step was cut off: raise --max_new_tokens")
    if not math.isfinite(norm) and not run.scaler.is_enabled():  # the scaler of fp16 looks for its factor like this
        run.print("WARNING: the gradient is not finite: lower --lr")


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
