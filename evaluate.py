"""Evaluation: how good is a model, and how sure can we be?

* Greedy accuracy, with the Wilson interval of a proportion: 40 of 50 is 0.80, but anything from 0.67 to 0.89 would
  not surprise.
* pass@k: would at least one of k sampled answers be right? Estimated without bias from n ≥ k samples (Chen et al.
  2021).
* Majority vote: sample, let the answers vote, take the winner (Wang et al. 2023).
* Bits per byte: how well the model still predicts text. Alignment is paid for here.
* For instructions without a right answer: the perplexity of the reference answers, and ROUGE-L of the model's own
  (Lin 2004).
* For preferences: how often a reward model, or the implicit reward of a policy, ranks a pair as the judge did. Of the
  embedded task's, also how well it chooses among a policy's own answers to one question, which is what it is for.
* For the embedded task: the accuracy outside of what training asks, on larger numbers and on longer questions.

Beside every accuracy stand the share of answers that were cut off and of those from which no answer could be read: a
model that does not end, or does not keep the form, is not a model that cannot count.

    python evaluate.py out/arith/pretrain out/arith/sft out/arith/grpo          # one table over all stages
    python evaluate.py out/gsm8k/sft --data gsm8k --samples 16 --data_dir DIR
    python evaluate.py out/gsm8k/sft --data dolly --data_dir DIR
    python evaluate.py out/mine/reward out/mine/dpo --data hh-harmless --n 2312 --data_dir DIR
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tqdm import tqdm

from arithmetic import OUTSIDE
from data import bits_per_byte, encode_prompts, pack
from lora import load_state
from preferences import SOURCES, encode_pairs, load_pairs
from reward import load_reward_model, real_tokens, scores
from rollout import (
    answer_greedily,
    check_reward,
    greedy_rewards,
    has_own_rewards,
    own_weights,
    sample_answers,
    score,
    to_verify,
    total_reward,
)
from runtime.checkpoint import find_checkpoint, need_checkpoint, weights_id, write_text
from runtime.config import Above, AtLeast, Count, CountOrZero, Positive, parse
from runtime.device import PRECISIONS, autocast, pick_device, pick_precision
from runtime.errors import UserError, run_main
from runtime.rows import is_file, is_own, own_rows, sources
from stages import EMBEDDED, load_stage
from texts import CHATS, CORPORA, PROMPTS, Prompt, load_chats, load_prompts, messages_of, text_documents
from tokenizer import Tokenizer, encode_chat
from transformer import Transformer, answer_logps, for_inference, token_logps
from verify import is_right, read_answer


@dataclass(frozen=True)
class Config:
    checkpoints: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run folders or checkpoint files, in the order of the table. Default: the stages found in out/arith."""
    data: str = "arith"
    """arith, gsm8k or svamp (accuracy); alpaca or dolly (perplexity, ROUGE-L); tinystories, books, pile or a text
    file (bits per byte); hh-harmless, hh-helpful or ultrafeedback (accuracy on pairs). Of your own rows, a file
    (.jsonl) or a dataset of the hub (org/name), the columns say which it is: chosen and rejected (pairs); answer
    (questions); completion, output or an assistant's message (references); text.
    """
    split: Literal["test", "validation", "larger", "longer"] = "test"
    """Which of your own rows: test, all of them; validation, every 50th, on which no stage trains. Of arith also larger
    and longer, the parts outside of what training asks (arithmetic.py), which test measures too."""
    columns: tuple[str, ...] = ()
    """The columns of your own rows that have other names, as meaning=column, for example answer=final."""
    reward: str = "verifier"
    """What judges the answers: "verifier" (verify.py), or a Python file, each function of which is one reward."""
    reward_weights: tuple[str, ...] = ()
    """How much each of those functions counts, as name=weight (1 if it is not named)."""
    data_dir: str = os.environ.get("ALIGNBOOK_DATA", "")
    """A local mirror of datasets, looked in before the hub."""
    n: Count = 512
    """Questions, references or documents."""
    max_new_tokens: CountOrZero = 0
    """An answer that does not end by then is cut off (0: 64 for arith, else 256, and never more than the context
    allows).
    """
    samples: CountOrZero = 0
    """The number of answers to sample for a question, for pass@k and the majority vote (0: none)."""
    sampled: Count = 512
    """How many of the questions, the first ones, are answered by sampling, too."""
    ks: Annotated[tuple[int, ...], AtLeast(1)] = (1, 4, 16)
    """The k of pass@k; those above ``samples`` are left out."""
    temperature: Positive = 1.0
    """The temperature of the sampled answers."""
    top_p: Annotated[float, Above(0, most=1)] = 1.0
    """The top-p of the sampled answers."""
    batch_size: Count = 128
    """Rows at a time."""
    seed: int = 0
    """The seed of the sampled answers."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of matrix products."""
    out: str = ""
    """Write report.md and report.json into this folder."""


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def wilson_interval(successes: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927), which behaves at 0 and 1, where the usual p ± 1.96·√(p(1-p)/n)
    has no width.

    >>> tuple(round(x, 3) for x in wilson_interval(0, 50))
    (0.0, 0.071)
    """
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)  # not 1e-17


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that k answers drawn from n, of which c are right, hold at least one right one: 1 - C(n-c, k) /
    C(n, k).

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} answers with {c} right is not defined")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority_vote(answers: Sequence[Decimal | None]) -> Decimal | None:
    """The most frequent answer; of several, the one that was given first. Answers that could not be read do not vote.

    >>> majority_vote([Decimal(7), None, Decimal(5), Decimal("5.0"), None])
    Decimal('5')
    """
    votes = Counter(answer for answer in answers if answer is not None)  # equal Decimals are one key
    return votes.most_common(1)[0][0] if votes else None  # ties keep the order of appearance


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, in lower case and without punctuation.

    >>> round(rouge_l("The cat sat.", "the cat was on the mat"), 3)
    0.444
    """
    a, b = (re.findall(r"[a-z0-9]+", text.lower()) for text in (answer, reference))
    if not a or not b:
        return 0.0
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b))  # precision row/len(a) and recall row/len(b), harmonic mean


# ----------------------------------------------------------------------------------------------------------------------
# Measurements


@torch.no_grad()
def measure_answers(model: Transformer, tokenizer: Tokenizer, config: Config) -> dict:
    """Greedy accuracy with its interval, cut-off and unreadable answers; with ``samples``, pass@k and majority vote."""
    max_new = longest_answer(model, config)
    prompts = load_prompts(config.data, config.split, config.data_dir, n=config.n, rename=config.columns)
    if not has_own_rewards(config):
        prompts = to_verify(prompts, config.data)
    ids, prompts = encode_prompts(prompts, tokenizer, model.config.max_seq_len - max_new)
    if has_own_rewards(config):
        if config.samples:
            raise UserError("--samples is for the verifier: rewards of your own are measured on greedy answers")
        return measure_rewards(model, tokenizer, ids, prompts, max_new, config)
    n, golds = len(ids), [prompt.gold for prompt in prompts]
    figures = answer_greedily(model, tokenizer, ids, golds, max_new, config.batch_size, show=True)
    low, high = wilson_interval(round(figures["accuracy"] * n), n)
    result = {"accuracy": figures.pop("accuracy"), "low": low, "high": high, "n": n} | figures
    if config.samples:
        few = slice(0, config.sampled)
        result |= measure_samples(model, tokenizer, ids[few], golds[few], max_new, config)
    return result


def longest_answer(model: Transformer, config: Config) -> int:
    """An answer's most tokens."""
    most = config.max_new_tokens or (64 if config.data == "arith" else 256)
    return min(most, model.config.max_seq_len // 2)


def measure_samples(
    model: Transformer, tokenizer: Tokenizer, ids: list, golds: Sequence, max_new: int, config: Config
) -> dict:
    """pass@k and the majority vote of sampled answers to n encoded questions."""
    n, passes, majority = len(ids), {k: 0.0 for k in config.ks if k <= config.samples}, 0
    order = sorted(range(n), key=lambda i: len(ids[i]))  # prompts of like length together: less padding
    per_batch = max(1, config.batch_size // max(1, config.samples))
    for first in tqdm(range(0, n, per_batch), desc="sampling", leave=False):
        batch = order[first : first + per_batch]
        rollout = sample_answers(
            model, tokenizer, [ids[i] for i in batch], config.samples, max_new, config.temperature, config.seed + first,
            top_p=config.top_p,
        )  # fmt: skip
        asked = [golds[i] for i in batch for _ in range(config.samples)]
        done = rollout.finished.tolist()
        counts = score(rollout.texts, asked, rollout.finished)[0].view(-1, config.samples).sum(dim=1)
        for j, (i, c) in enumerate(zip(batch, counts.tolist())):
            for k in passes:
                passes[k] += pass_at_k(config.samples, int(c), k) / n
            its = slice(j * config.samples, (j + 1) * config.samples)  # the answers to this question
            read = [read_answer(t, golds[i]) if ok else None for t, ok in zip(rollout.texts[its], done[its])]
            majority += is_right(majority_vote(read), golds[i])
    return {f"pass@{k}": value for k, value in passes.items()} | {f"maj@{config.samples}": majority / n}


def measure_outside(model: Transformer, tokenizer: Tokenizer, config: Config) -> dict:
    """Greedy accuracy on ``n`` questions of each part of the embedded task that lies outside of what training asks."""
    found, max_new = {}, longest_answer(model, config)
    for part in OUTSIDE:
        prompts = load_prompts("arith", part, n=config.n)
        ids, prompts = encode_prompts(prompts, tokenizer, model.config.max_seq_len - max_new)
        golds = [prompt.gold for prompt in prompts]
        found[part] = answer_greedily(model, tokenizer, ids, golds, max_new, config.batch_size, show=True)["accuracy"]
    return found


def measure_rewards(
    model: Transformer, tokenizer: Tokenizer, ids: list, prompts: list[Prompt], max_new: int, config: Config
) -> dict:
    """Rewards of the user's own, of greedy answers: their weighted sum with a 95 % interval, and the mean of each."""
    size = config.batch_size
    found, figures = greedy_rewards(model, tokenizer, ids, prompts, max_new, config, size, show=True)
    total = total_reward(found, own_weights(config))
    known = total[~total.isnan()]
    if not len(known):
        raise UserError(f"{config.reward} knows the reward of no answer (NaN)")
    half = 1.96 * float(known.std()) / math.sqrt(len(known)) if len(known) > 1 else math.inf
    mean, means = float(known.mean()), {name: float(values.nanmean()) for name, values in found.items()}
    return {"reward": mean, "low": mean - half, "high": mean + half, "n": len(known)} | means | figures


@torch.no_grad()
def measure_text(model: Transformer, tokenizer: Tokenizer, config: Config) -> dict:
    """Bits per byte of the first ``n`` validation documents, each on its own; long ones in pieces of the context's
    length, at most 2,048 tokens.
    """
    device, length = model.head.weight.device, min(model.config.max_seq_len, 2048)
    pieces, n_bytes = [], 0
    part = "whole" if config.split == "test" else "validation"  # of the named ones, their validation split
    for text in islice(text_documents(config.data, part, config.data_dir, rename=config.columns), config.n):
        if isinstance(text, str) and text.strip():
            end = tokenizer.document_id  # where a document begins, the last one ended
            ids = [end if tokenizer.bos_id is None else tokenizer.bos_id, *tokenizer.encode(text), end]
            pieces += [ids[i : i + length] for i in range(0, len(ids) - 1, length - 1)]
            n_bytes += len(text.encode("utf-8", errors="replace"))
    if not pieces:
        raise UserError(f"--data {config.data}: no text to measure")
    nats = 0.0
    pieces.sort(key=len)
    for first in tqdm(range(0, len(pieces), config.batch_size), desc="text", leave=False):
        batch = pieces[first : first + config.batch_size]
        longest = max(map(len, batch))
        tokens = torch.tensor([ids + [tokenizer.pad_id] * (longest - len(ids)) for ids in batch], device=device)
        real = torch.arange(1, longest) < torch.tensor([len(ids) for ids in batch])[:, None]
        nats -= float(token_logps(model, tokens, where=real.to(device)).cpu().sum(dtype=torch.float64))
    return {"bits_per_byte": bits_per_byte(nats, n_bytes), "documents_bytes": n_bytes}


@torch.no_grad()
def measure_references(model: Transformer, tokenizer: Tokenizer, config: Config) -> dict:
    """Perplexity of the reference answers, and ROUGE-L of greedy answers against them, on conversations kept from
    training.
    """
    device = model.head.weight.device
    part = "whole" if config.split == "test" else "validation"  # of the named ones, the rows kept from training
    chats = load_chats(config.data, part, config.data_dir, n=config.n, rename=config.columns)
    rows = pack(chats, tokenizer, min(model.config.max_seq_len, 2048))  # published models read far more than these
    nats = count = 0.0
    for first in tqdm(range(0, len(rows), 16), desc="references", leave=False):
        tokens, mask, segments = (x.to(device) for x in rows.batch(range(first, min(first + 16, len(rows)))))
        logps = token_logps(model, tokens, where=mask[:, 1:], segments=segments)
        nats -= float(logps.cpu().sum(dtype=torch.float64))
        count += int(mask[:, 1:].sum())
    max_new = min(config.max_new_tokens or 256, model.config.max_seq_len // 2)
    asked = [(encode_chat(tokenizer, chat[:-1], add_generation_prompt=True)[0], chat[-1]["content"]) for chat in chats]
    asked = sorted(
        (pair for pair in asked if len(pair[0]) + max_new <= model.config.max_seq_len), key=lambda p: len(p[0])
    )
    rouge, cut = 0.0, 0
    for first in tqdm(range(0, len(asked), config.batch_size), desc="answers", leave=False):
        batch = asked[first : first + config.batch_size]
        rollout = sample_answers(model, tokenizer, [ids for ids, _ in batch], 1, max_new, 0.0, seed=0)
        rouge += sum(rouge_l(text, reference) for text, (_, reference) in zip(rollout.texts, batch))
        cut += int((~rollout.finished).sum())
    n = max(1, len(asked))
    return {"perplexity": math.exp(nats / count), "rouge_l": rouge / n, "n": len(asked), "cut_off": cut / n}


@torch.no_grad()
def measure_pairs(path: str, config: Config) -> dict:
    """How often the preferred answer of a test pair gets the higher score; a tie counts as wrong. Scores are those of a
    reward model; or β (log π - log π_ref) of a policy that was trained from a reference (dpo, ipo, kto, and PPO, GRPO
    and GDPO too; of ipo per token, if its loss averages), found through its lineage; or log π per token (simpo, orpo,
    and models without a reference).
    """
    device, state = pick_device(config.device), load_state(path)
    precision = PRECISIONS[pick_precision(config.precision, device)]
    length = state["config"].get("max_length") or state["model_config"]["max_seq_len"]
    pairs = load_pairs(config.data, config.split, config.data_dir, n=config.n, rename=config.columns)
    if state["stage"] == "reward":
        model, tokenizer, _ = load_reward_model(path, device)
        rows = encode_pairs(pairs, tokenizer, length)
        chosen, rejected = scores(model, rows)
    else:
        model, tokenizer, _ = load_stage(path, device=device)
        for_inference(model, precision)
        rows = encode_pairs(pairs, tokenizer, length)
        reference = None
        if state["stage"] in ("dpo", "ipo", "kto", "ppo", "grpo", "gdpo"):
            start = state["lineage"][-1]
            reference, _, theirs = load_stage(start["path"], device=device)
            for_inference(reference, precision)
            if weights_id(theirs) != start["weights"]:
                raise UserError(f"{start['path']} has other weights than when {path} started from it")
        found = torch.empty(2, len(rows))
        for first in tqdm(range(0, len(rows), 32), desc="pairs", leave=False):
            some = range(first, min(first + 32, len(rows)))
            tokens, mask, _ = rows.batch(some, device)
            sums, lengths = answer_logps(model, tokens, mask)
            gains = sums if reference is None else sums - answer_logps(reference, tokens, mask)[0]
            averaged = state["stage"] == "ipo" and state["config"].get("ipo_average")
            gains = gains / lengths if reference is None or averaged else gains
            found[:, first : first + len(some)] = gains.view(2, -1).cpu()
        chosen, rejected = found
    right, n = int((chosen > rejected).sum()), len(rows)
    low, high = wilson_interval(right, n)
    return {"accuracy": right / n, "low": low, "high": high, "n": n}


@torch.no_grad()
def measure_choice(path: str, config: Config) -> dict:
    """How well a reward model chooses among sampled answers of the policy that it was trained for, to ``sampled``
    questions of the embedded task. "AUC": how often a right answer scores higher than a wrong one to the same question
    (a tie counts half), the mean over questions with both. "best@k": how often the answer that scores highest is right.
    """
    device, state = pick_device(config.device), load_state(path)
    judge, tokenizer, _ = load_reward_model(path, device)
    policy, _, _ = load_stage(state["config"]["init_from"], device=device)
    max_new, k = longest_answer(policy, config), config.samples
    prompts = load_prompts("arith", config.split, n=min(config.n, config.sampled))
    ids, prompts = encode_prompts(prompts, tokenizer, policy.config.max_seq_len - max_new)
    areas, best = [], 0
    per_batch = max(1, config.batch_size // k)
    for first in tqdm(range(0, len(ids), per_batch), desc="choosing", leave=False):
        some = slice(first, first + per_batch)
        rollout = sample_answers(policy, tokenizer, ids[some], k, max_new, config.temperature, config.seed + first)
        golds = [prompt.gold for prompt in prompts[some] for _ in range(k)]
        right = score(rollout.texts, golds, rollout.finished)[0].view(-1, k).bool()
        scored = judge(rollout.tokens, real_tokens(rollout.tokens, rollout.mask)).view(-1, k)
        for values, good in zip(scored, right):
            best += int(good[values.argmax()])
            if good.any() and not good.all():
                difference = values[good][:, None] - values[~good]
                areas.append(float((difference.sign() + 1).mean() / 2))
    found = {f"best@{k}": best / len(ids)}
    return {"AUC": sum(areas) / len(areas)} | found if areas else found


def kind_of(config: Config) -> str:
    """What the data asks of a model: "answers", "references", "pairs" or "text"."""
    name = config.data
    texts = lambda part: part in CORPORA or (Path(part).exists() and not is_file(part))  # noqa: E731
    if name in ("arith", *PROMPTS):
        return "answers"
    if name in SOURCES:
        return "pairs"
    if name.split("+")[0] in CHATS:
        return "references"
    if any(map(texts, sources(name))):
        return "text"
    name = sources(name)[0]
    if not is_own(name):
        known = dict.fromkeys(["arith", *PROMPTS, *CHATS, *CORPORA, *SOURCES])
        raise UserError(f"--data {name}: there are {', '.join(known)}, a text file, and rows of your own (.jsonl)")
    row = next(own_rows(name, "whole", config.data_dir, config.columns), {})
    if has_own_rewards(config):
        return "answers"
    if "chosen" in row and "rejected" in row:
        return "pairs"
    if "answer" in row:
        return "answers"
    if "text" in row:
        return "text"
    said = messages_of(row.get("messages", row.get("conversations")))
    replied = bool(said) and said[-1]["role"] == "assistant"
    return "references" if replied or "completion" in row or "output" in row else "answers"


def measure(path: str, config: Config) -> dict:
    """Everything that ``config.data`` allows to measure of one checkpoint, as a row of the table."""
    device, kind = pick_device(config.device), kind_of(config)
    state = load_state(path)
    theirs = state["config"].get("data", "arith")
    if config.data == "arith" and theirs not in EMBEDDED:
        print(f"note: {path} learned from {theirs}; these are the embedded task's questions (--data names yours)")
    row = {"stage": state["stage"], "path": str(path), "step": state["step"], "data": config.data}
    if state["stage"] == "reward" or kind == "pairs":
        with autocast(device, pick_precision(config.precision, device)):
            row |= measure_pairs(path, config)
            if state["stage"] == "reward" and config.data == "arith" and config.samples:
                row |= measure_choice(path, config)
            return row
    model, tokenizer, _ = load_stage(path, device=device)
    for_inference(model, PRECISIONS[pick_precision(config.precision, device)])
    measures = {"answers": measure_answers, "references": measure_references, "text": measure_text}
    with autocast(device, pick_precision(config.precision, device)):
        if config.data == "arith" and config.split == "test":
            row |= measure_outside(model, tokenizer, config)
        row |= measures[kind](model, tokenizer, config)
        if config.data == "arith":
            row |= measure_text(model, tokenizer, config)
    return row


def need_all(paths: Sequence[str], config: Config) -> None:
    """Refuse, before anything is measured, data that nobody knows and checkpoints that are not there."""
    check_reward(config)
    if config.split in OUTSIDE and config.data != "arith":
        raise UserError(f"--split {config.split} is a part of the embedded task: --data arith")
    for path in paths:
        need_checkpoint(path)
    kind_of(config)


# ----------------------------------------------------------------------------------------------------------------------
# The report card

COLUMNS = {"cut_off": "cut off", "unreadable": "no answer read", "bits_per_byte": "bits per byte", "rouge_l": "ROUGE-L"}
DIGITS = {"tokens": 1}


def table(rows: Sequence[dict]) -> str:
    """The rows as a markdown table: accuracy with its interval, and every other figure that some row has."""
    hidden = {"stage", "path", "step", "data", "low", "high", "n", "documents_bytes"}
    first = next((name for name in ("reward", "accuracy") for row in rows if name in row), "")  # with an interval
    names = list(dict.fromkeys(name for row in rows for name in row if name not in hidden and name != first))
    head = ["stage", *([first, "95 % interval"] if first else []), *(COLUMNS.get(n, n) for n in names), "n"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for row in rows:
        cells = [row["stage"]]
        if first:
            known = first in row
            interval = f"{row['low']:.3f} to {row['high']:.3f}" if known and row["low"] < row["high"] else "all equal"
            cells += [f"{row[first]:.3f}", interval] if known else ["", ""]
        cells += [f"{row[name]:.{DIGITS.get(name, 3)}f}" if name in row else "" for name in names] + [
            str(row.get("n", ""))
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_report(folder: str | Path, rows: Sequence[dict], title: str, note: str = "") -> None:
    """``report.md`` and ``report.json`` (the list of rows) in ``folder``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.md", f"# {title}\n\n{table(rows)}\n" + (f"\n{note}\n" if note else ""))
    write_text(folder / "report.json", json.dumps(list(rows), indent=2) + "\n")


STAGES = (
    "pretrain", "sft", "reward", "dpo", "ipo", "kto", "simpo", "orpo", "ppo_reward", "ppo", "grpo", "dr_grpo", "dapo",
    "gspo", "cispo", "gdpo",
)  # fmt: skip


def main() -> None:
    config = parse(Config)
    paths = config.checkpoints or tuple(
        path for stage in STAGES if find_checkpoint(path := f"out/arith/{stage}").exists()
    )
    if not paths:
        raise UserError("nothing to evaluate: name run folders or checkpoints, or make some with: python pipeline.py")
    need_all(paths, config)
    rows = [measure(path, config) for path in paths]
    repeated = Counter(row["stage"] for row in rows)
    for row in rows:  # two runs of one stage go by their folders
        if repeated[row["stage"]] > 1:
            row["stage"] = row["path"]
    print(table(rows))
    if config.out:
        write_report(config.out, rows, f"{config.data}")
        print(f"{config.out}/report.md, {config.out}/report.json")


if __name__ == "__main__":
    run_main(main)
