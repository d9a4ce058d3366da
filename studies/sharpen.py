"""Does reinforcement learning only sharpen? pass@k of every stage, exactly, for k from 1 to 10,000.

RL makes a right answer likelier where it was possible before. Whether it also makes possible what was not, is asked by
pass@k (Yue et al. 2025): with enough tries, does the model before RL solve as much, or more? To count that, k = 10,000
would take millions of samples. In the embedded task a question has one canonical solution s, and its probability

    p = π(s | question) = Π_t π(s_t | question, s_<t)             at temperature 1, the end of the text included

takes one forward pass. A question is then solved in k tries with probability 1 - (1 - p)^k, and pass@k is the mean over
the questions. It is a lower bound: an answer that is right in other words (3+4 for 4+3, or by luck) does not count; the
column "sampled" says what that misses, by the verifier and eight samples of each question.

The base model has not learned the form of an answer; it is asked in its own, "We know 4+3=7, 7-2=5. So it is 5.", as
its pretraining text has it. The starts are folders of ``pipeline.py``, of several seeds::

    python studies/sharpen.py out/seed1 out/seed2 out/seed3 out/seed4 out/seed5     # adds what is missing to the page

Every start is one draw of everything, so differences are taken within a start, and the interval is over the starts.
"""

import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # the chapters, which stand at the root

import intervals
from arithmetic import Problem, problems, solution
from evaluate import pass_at_k
from pages import keep_rows, read_rows, write_table
from rollout import sample_answers, score
from runtime.checkpoint import need_checkpoint, weights_id
from runtime.config import Count, parse
from runtime.errors import UserError, run_main
from runtime.plots import plot_lines
from stages import load_stage
from tokenizer import Tokenizer, encode_chat
from transformer import Transformer, answer_logps

KS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 10_000)
SHOWN = (1, 8, 64, 512, 4096, 10_000)  # in the table
LABELS = {"pretrain": "Base", "sft": "SFT", "dpo": "DPO", "kto": "KTO", "ppo": "PPO", "grpo": "GRPO", "gdpo": "GDPO"}
PARTS = {"test": "within what training asks", "larger": "larger numbers", "longer": "a step more"}


@dataclass(frozen=True)
class Config:
    starts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders of pipeline.py; none: the page is written anew from the rows that are there."""
    n: Count = 2048
    """Questions of each part."""
    samples: Count = 8
    """Answers sampled to each of the first 512 of them, to see what the canonical form misses."""
    page: str = "docs/experiments/sharpen.md"
    """The page whose table is written anew; the rows are kept beside it (.jsonl), and the picture (.png)."""


def canonical(problem: Problem, tokenizer: Tokenizer, base: bool) -> tuple[list[int], list[int]]:
    """The question and its canonical solution, as ids; ``base``: in the form of the pretraining text."""
    if base:
        steps = ", ".join(problem.steps)
        ids = [tokenizer.eot_id, *tokenizer.encode(problem.question)]
        return ids, [*tokenizer.encode(f" We know {steps}. So it is {problem.answer}."), tokenizer.eot_id]
    prompt, _ = encode_chat(tokenizer, [{"role": "user", "content": problem.question}], add_generation_prompt=True)
    return prompt, [*tokenizer.encode(solution(problem)), tokenizer.eot_id]


@torch.no_grad()
def log_probabilities(
    model: Transformer, rows: list[tuple[list[int], list[int]]], pad: int, batch: int = 128
) -> Tensor:
    """(prompt, answer) ids -> (N,): log π(answer | prompt)."""
    found, order = torch.empty(len(rows)), sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    for first in range(0, len(rows), batch):
        some = order[first : first + batch]
        longest = max(len(rows[i][0]) + len(rows[i][1]) for i in some)
        tokens, mask = torch.full((len(some), longest), pad), torch.zeros(len(some), longest - 1, dtype=torch.bool)
        for row, i in enumerate(some):
            prompt, answer = rows[i]
            tokens[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
            mask[row, len(prompt) - 1 : len(prompt) + len(answer) - 1] = True
        device = model.head.weight.device
        found[some] = answer_logps(model, tokens.to(device), mask.to(device))[0].cpu()
    return found


def expected_pass(logps: Tensor, k: int) -> float:
    """The mean of 1 - (1 - p)^k: the share of questions that k tries solve.

    >>> round(expected_pass(torch.tensor([0.5, 0.25]).log(), 2), 3)  # (0.75 + 0.4375) / 2
    0.594
    """
    p = logps.double().exp().clamp(max=1.0)
    return float(-torch.expm1(k * torch.log1p(-p)).mean())  # exact where p is 1e-12


def measure(folder: Path, stage: str, part: str, config: Config) -> dict:
    """One row: a stage of a start on a part of the questions."""
    model, tokenizer, state = load_stage(str(folder / stage))
    asked, base = problems(config.n, part, part), stage == "pretrain"
    logps = log_probabilities(model, [canonical(p, tokenizer, base) for p in asked], tokenizer.pad_id)
    row = {"start": folder.name, "stage": stage, "part": part, "n": len(asked), "weights": weights_id(state)}
    row |= {"pass": {str(k): round(expected_pass(logps, k), 5) for k in KS}}
    if not base:
        few, k = asked[:512], config.samples
        prompts, right = [canonical(p, tokenizer, False)[0] for p in few], []
        for first in range(0, len(few), 64):
            some = slice(first, first + 64)
            rollout = sample_answers(model, tokenizer, prompts[some], k, 64, 1.0, seed=first)
            golds = [p.answer for p in few[some] for _ in range(k)]
            right += score(rollout.texts, golds, rollout.finished)[0].view(-1, k).sum(dim=1).int().tolist()
        row["sampled"] = {str(j): round(statistics.fmean(pass_at_k(k, c, j) for c in right), 5) for j in (1, k)}
        row["same"] = {str(j): round(expected_pass(logps[: len(few)], j), 5) for j in (1, k)}  # of the same questions
    return row


# ----------------------------------------------------------------------------------------------------------------------
# The page


def difference(rows: list[dict], part: str, stage: str, k: int, to: str = "sft") -> tuple[float, float]:
    """Mean over the starts of pass@k minus that of ``to``, and the half width of its 95 % interval."""
    passes = {(row["start"], row["stage"]): row["pass"][str(k)] for row in rows if row["part"] == part}
    found = [value - passes[start, to] for (start, name), value in passes.items() if name == stage]
    if len(found) < 2:
        return statistics.fmean(found), math.inf
    return statistics.fmean(found), intervals.quantile(0.975, len(found) - 1) * statistics.stdev(found) / len(
        found
    ) ** 0.5


def table(rows: list[dict], part: str) -> str:
    """Markdown: pass@k of each stage, and below k = 1 its difference to SFT with a 95 % interval."""
    mine = [row for row in rows if row["part"] == part]
    lines = ["| stage | " + " | ".join(f"pass@{k:,}" for k in SHOWN) + " | sampled, missed at 1 |"]
    lines.append("| --- |" + " --- |" * (len(SHOWN) + 1))
    for stage in LABELS:
        here = [row for row in mine if row["stage"] == stage]
        if not here:
            continue
        cells = []
        for k in SHOWN:
            text = f"{statistics.fmean(row['pass'][str(k)] for row in here):.3f}"
            if stage not in ("pretrain", "sft"):
                mean, half = difference(rows, part, stage, k)
                text += f" ({mean:+.3f} ± {half:.3f})" if math.isfinite(half) else f" ({mean:+.3f})"
            cells.append(text)
        missed = [row["sampled"]["1"] - row["same"]["1"] for row in here if "sampled" in row]
        cells.append(f"{statistics.fmean(missed):+.3f}" if missed else "")
        lines.append("| " + " | ".join([LABELS[stage], *cells]) + " |")
    return "\n".join(lines)


def tables(rows: list[dict]) -> str:
    """Between the marks of the page: a table for each part."""
    parts = [part for part in PARTS if any(row["part"] == part for row in rows)]
    return "\n\n".join(f"**{PARTS[part].capitalize()}**\n\n{table(rows, part)}" for part in parts)


def draw(rows: list[dict], path: Path) -> None:
    """pass@k against k, the mean over the starts; a panel for each part."""
    panels: dict[str, dict[str, tuple[list, list]]] = {}
    for part, words in PARTS.items():
        for stage, label in LABELS.items():
            here = [row["pass"] for row in rows if row["part"] == part and row["stage"] == stage]
            if here:
                means = [statistics.fmean(one[str(k)] for one in here) for k in KS]
                panels.setdefault(words, {})[label] = (list(KS), means)
    plot_lines(panels, path, "k, tries", logarithmic="x")


def main() -> None:
    config = parse(Config)
    page = Path(config.page)
    rows = read_rows(page)
    there = {(row["start"], row["stage"], row["part"]) for row in rows}
    todo = [
        (Path(start), stage, part)
        for start in config.starts
        for stage in LABELS
        for part in PARTS
        if (Path(start).name, stage, part) not in there
    ]
    for start, stage, _ in todo:
        need_checkpoint(str(start / stage), "python pipeline.py --out FOLDER")
    for start, stage, part in tqdm(todo, desc="stages"):
        rows.append(measure(start, stage, part, config))
        keep_rows(page, rows)
    if not rows:
        raise UserError("no start: python studies/sharpen.py out/seed1 out/seed2, folders of pipeline.py")
    draw(rows, page.with_suffix(".png"))
    write_table(page, tables(rows))
    print(tables(rows))


if __name__ == "__main__":
    run_main(main)
