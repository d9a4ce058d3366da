"""Ablations: change one thing, several times over, and see whether anything changed.

What is each piece of an algorithm worth? One run with it and one without it do not tell: reinforcement learning from
the same start with another seed ends elsewhere, often by more than the piece is worth. So a study is a list of cells,
each a setting that differs from the others in one thing, and every cell is run with several seeds.

The table gives the mean over seeds and, in brackets, their standard deviation. What a study finds are *differences*: a
column NAME-reference has that of each cell to the reference cell of its part, with a 95 % interval from the standard
deviation of all cells together and with Holm's p over the part (``intervals.py``). Below the table stands the smallest
difference that such a study finds in 80 % of cases: a smaller one may be there and not be seen. It is given for Holm's
first step in the largest part, since that is what a single true difference has to pass.

Seeds decide which questions are asked, in which order, and the sampling; all cells share one start (another one would
be a cell of its own). In pretraining there is no start, and the seed also makes the text, which moves all cells alike:
there, and where a preset says so (``paired``), differences are taken seed by seed.

    python studies/ablate.py configs/ablate_grpo.py            # a study of the book; stops and continues anywhere
    python studies/ablate.py --cells "a | lr=1e-4" "a | lr=3e-4"    # one of your own: part | settings
    python studies/ablate.py --stage pretrain --cells "a | norm=rmsnorm" "a | norm=layernorm"
    python studies/ablate.py configs/ablate_grpo.py --seeds 10      # more seeds; those that are there are kept
    python studies/ablate.py configs/ablate_grpo.py --page docs/experiments/grpo.md
    python studies/ablate.py configs/ablate_grpo.py --page docs/experiments/grpo.md --report_only      # runs nothing

``out/ablate/<name>/`` holds ``results.jsonl`` (a row for each cell and seed, with its curves), ``table.md`` and
``plot.png``; ``--page`` writes the table into a page, between two marks, and results and plot beside it.
"""

import concurrent.futures
import contextlib
import json
import math
import multiprocessing
import os
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # the chapters, which stand at the root

import gdpo
import grpo
import intervals
import pretrain
import probe
import sft
from data import encode_prompts
from lora import load_state
from pages import frame, write_table
from rollout import Rollout, answer_greedily, sample_answers, score
from runtime.checkpoint import need_checkpoint, weights_id, write_text
from runtime.config import Count, CountOrZero, NotNegative, as_dict, parse, validate
from runtime.errors import UserError, run_main
from runtime.plots import plot_study, read_metrics
from runtime.words import words_of
from stages import load_stage
from texts import load_prompts
from transformer import Transformer

STAGES = {"grpo": grpo, "gdpo": gdpo, "pretrain": pretrain}
OURS = ("init_from", "out_dir", "seed", "device", "fresh", "data", "data_dir")  # what the study itself decides


@dataclass(frozen=True)
class Config:
    name: str = "mine"
    """Names the folder out/ablate/<name>."""
    stage: Literal["grpo", "gdpo", "pretrain"] = "grpo"
    """The chapter whose settings are varied."""
    base: str = ""
    """What all cells share: "steps=60 lr=1e-4"; a cell may overrule it."""
    cells: tuple[str, ...] = ()
    """part | label | settings: cells of one part are compared with each other. The label may be left out."""
    starts: tuple[str, ...] = ()
    """label | settings of sft.py: starts of other strength, for cells with start=label."""
    init_from: str = "out/arith/sft"
    """The start of all other cells; pretraining has none."""
    pretrained: str = "out/arith/pretrain"
    """What the starts are made from."""
    seeds: Count = 3
    """Runs of each cell. More may be added later."""
    reference: str = ""
    """Settings of the cell that the others are compared with, in the parts that have it. Default, and in all other
    parts: the part's first cell."""
    tuned_seeds: tuple[int, ...] = ()
    """Seeds that the settings of the reference cell were chosen with: it is judged by others."""
    paired: bool = False
    """Take differences seed by seed, because a seed moves all cells alike. In pretraining always."""
    goal: NotNegative = 0.8
    """The greedy accuracy of the column "rollouts"."""
    jobs: CountOrZero = 0
    """Runs at a time, one thread each (0: one for each core)."""
    questions: Count = 512
    """Held-out questions that each run is measured on at its end."""
    length_limit: Count = 26
    """Up to so many tokens an answer is short; counted for every run, whether it is rewarded or not."""
    columns: tuple[str, ...] = ()
    """Of the table: a figure of the end; NAME-mean of a curve over the run; rollouts, until the curve of accuracy is
    at the goal; or NAME-reference, the difference to the reference cell. Default: some for the stage."""
    curves: tuple[str, ...] = ()
    """Of the plot: a panel for each part and curve, against steps, or, in pretraining, NAME@tokens or NAME@seconds;
    and NAME-reference as above. Default: accuracy, or val_loss.
    """
    scatter: tuple[str, ...] = ()
    """Two columns: the plot shows the end of each cell in their plane instead, a line through the cells of a label."""
    out: str = ""
    """Where runs and results are written. Default: out/ablate/<name>."""
    page: str = ""
    """Also write the table into this page, between <!-- table --> and <!-- /table -->, and results and plot beside
    it.
    """
    report_only: bool = False
    """Run nothing: table and plot from the results that are there, those beside the page if there is one."""


# ----------------------------------------------------------------------------------------------------------------------
# Cells


@dataclass(frozen=True)
class Cell:
    """A setting of the study. Cells of several parts may share their settings, and then their runs."""

    part: str
    label: str
    settings: tuple[tuple[str, str], ...]  # (field, value) as text, sorted

    @property
    def key(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.settings)


def read_settings(text: str) -> dict[str, str]:
    """
    >>> read_settings("lr=1e-4 mask_truncated=True")
    {'lr': '1e-4', 'mask_truncated': 'True'}
    """
    settings = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        if not equals or not name or not value:
            raise UserError(f"{word!r} is not a setting: field=value, without spaces")
        settings[name] = value
    return settings


def read_cells(config: Config) -> list[Cell]:
    """The cells, and for each its configuration checked, before anything runs."""
    if not config.cells:
        raise UserError('no cells: name some, --cells "size | group_size=4" "size | group_size=8", or take a preset')
    cells = []
    for line in config.cells:
        parts = [part.strip() for part in line.split("|")]
        if len(parts) not in (2, 3):
            raise UserError(f"{line!r} is not a cell: part | settings, or part | label | settings")
        settings = read_settings(config.base) | read_settings(parts[-1])
        decided = [name for name in settings if name in OURS]
        if decided:
            raise UserError(f"{line!r}: {decided[0]} is the same for all cells (other starts: --starts, start=label)")
        cells.append(Cell(parts[0], parts[-2] if len(parts) == 3 else parts[-1], tuple(sorted(settings.items()))))
    if config.starts and config.stage == "pretrain":
        raise UserError("pretraining starts from nothing: --starts belongs to grpo and gdpo")
    for line in config.starts:
        if line.count("|") != 1:
            raise UserError(f"{line!r} is not a start: label | settings of sft.py")
        start_config(config, line)
    known = {line.split("|")[0].strip() for line in config.starts}
    for cell in cells:
        start = dict(cell.settings).get("start")
        if start is not None and start not in known:
            raise UserError(f"start={start}: --starts has {', '.join(sorted(known)) or 'none'}")
        try:
            made = stage_config(config, cell, 0)
            STAGES[config.stage].check(made)
        except UserError as error:
            raise UserError(f"{cell.key}: {error}") from None
    return cells


def to_arguments(settings: dict[str, str]) -> list[str]:
    """Settings as a command line: a switch is --x or --no-x, and a value with commas is several.

    >>> to_arguments({"lr": "1e-4", "mask_truncated": "True", "reward_weights": "right=1,short=0", "out_dir": "a,b"})
    ['--lr', '1e-4', '--mask_truncated', '--reward_weights', 'right=1', 'short=0', '--out_dir', 'a,b']
    """
    arguments = []
    for name, value in settings.items():
        if value in ("True", "False"):
            arguments.append(f"--{'no-' if value == 'False' else ''}{name}")
        else:
            arguments += [f"--{name}", *([value] if name in OURS else value.split(","))]
    return arguments


def stage_config(config: Config, cell: Cell, seed: int):
    """The configuration of one run, as its command line would make it."""
    settings, root = dict(cell.settings), root_of(config)
    start = settings.pop("start", None)
    if config.stage != "pretrain":
        settings["init_from"] = str(root / "starts" / start) if start else config.init_from
    settings |= {"seed": str(seed), "out_dir": str(folder_of(config, cell, seed)), "device": "cpu"}
    return parse(STAGES[config.stage].Config, to_arguments(settings))


def root_of(config: Config) -> Path:
    return Path(config.out or f"out/ablate/{config.name}")


def folder_of(config: Config, cell: Cell, seed: int) -> Path:
    return root_of(config) / "runs" / (cell.key.replace("/", "_").replace(" ", ",") or "base") / f"seed{seed}"


# ----------------------------------------------------------------------------------------------------------------------
# What is measured of a policy (of a language model: probe.py)


@torch.no_grad()
def measure(folder: str, start: str, config: Config) -> dict:
    """The figures of a finished run, all on held-out questions and by the strict verifier; only ``answers`` comes from
    its curves.

    accuracy: of greedy answers, and start: of those before. Of one answer sampled at temperature 1 to each question:
    correct, formatted, short, all three; believed: right in the eyes of the verifier that the run was trained with;
    length in tokens; finished; entropy: of the next token's distribution, in nats, mean over answer tokens; kl: KL(π ‖
    start) in nats, summed over an answer's tokens. Both use whole distributions, not only the sampled tokens.
    """
    model, tokenizer, state = load_stage(folder)
    reference = load_stage(start)[0]
    max_new = state["config"]["max_new_tokens"]
    prompts = load_prompts("arith", "validation", n=config.questions)
    ids, prompts = encode_prompts(prompts, tokenizer, model.config.max_seq_len - max_new)
    golds = [prompt.gold for prompt in prompts]
    names = ("correct", "formatted", "short", "all", "believed", "length", "finished", "entropy", "kl")
    sums, tokens = dict.fromkeys(names, 0.0), 0
    for first in range(0, len(ids), 128):
        some = slice(first, first + 128)
        rollout = sample_answers(model, tokenizer, ids[some], 1, max_new, 1.0, seed=first)
        correct, formatted = score(rollout.texts, golds[some], rollout.finished)
        lengths = rollout.mask.sum(dim=1)
        short = (lengths <= config.length_limit) * rollout.finished
        believed, _ = score(rollout.texts, golds[some], rollout.finished, state["config"]["verifier"])
        entropy, kl = distributions(model, reference, rollout)
        found = (correct, formatted, short, correct * short, believed, lengths, rollout.finished, entropy, kl)
        sums = {name: value + float(values.sum()) for (name, value), values in zip(sums.items(), found)}
        tokens += int(lengths.sum())
    row = {name: value / len(ids) for name, value in sums.items()} | {"entropy": sums["entropy"] / tokens}
    for name, which in {"accuracy": model, "start": reference}.items():
        row[name] = answer_greedily(which, tokenizer, ids, golds, max_new)["accuracy"]
    curves = read_metrics(Path(folder) / "metrics.jsonl")
    return row | {"answers": sum(curves["answers"][1])}


def distributions(model: Transformer, reference: Transformer, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """(N,) entropy and (N,) KL to the reference, each summed over the answer's tokens."""
    logps = model(rollout.tokens[:, :-1])[rollout.mask].float().log_softmax(-1)  # (tokens, V)
    ref = reference(rollout.tokens[:, :-1])[rollout.mask].float().log_softmax(-1)
    each = torch.stack([-(logps.exp() * logps).sum(-1), (logps.exp() * (logps - ref)).sum(-1)])  # (2, tokens)
    rows = rollout.mask.nonzero()[:, 0]
    return tuple(torch.zeros(2, len(rollout)).index_add_(1, rows, each))


def steps_to(steps: list, values: list, goal: float) -> float | None:
    """Where a curve first reaches ``goal``, on the straight lines between its points; None if it does not.

    >>> steps_to([0, 10, 20, 30], [0.5, 0.75, 1.0, 0.8], goal=0.875)
    15.0
    """
    if values[0] >= goal:
        return steps[0]
    for (s0, v0), (s1, v1) in zip(zip(steps, values), zip(steps[1:], values[1:])):
        if v1 >= goal:
            return s0 + (s1 - s0) * (goal - v0) / (v1 - v0)


def curve_mean(steps: list, values: list) -> float:
    """The mean of a curve over the run: the area below the straight lines between its points, by its length.

    >>> curve_mean([0, 10, 30], [0.5, 0.7, 0.9])
    0.7333333333333333
    """
    points = list(zip(steps, values))
    area = sum((s1 - s0) * (v0 + v1) / 2 for (s0, v0), (s1, v1) in zip(points, points[1:]))
    return area / (steps[-1] - steps[0])


# ----------------------------------------------------------------------------------------------------------------------
# Running


def run_cell(config: Config, cell: Cell, seed: int) -> dict:
    """Train and measure one run; its row, which is also left in its folder. In a process of its own, with one thread;
    what it prints goes to log.txt."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    settings, folder = stage_config(config, cell, seed), folder_of(config, cell, seed)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if parent is not None and not parent.is_alive():
            raise KeyboardInterrupt  # the study was killed: take nothing more from its queue
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                STAGES[config.stage].main(settings)
                if config.stage == "pretrain":
                    row, curves = probe.measure(str(folder))
                else:
                    row = measure(str(folder), settings.init_from, config)
                    curves = read_metrics(folder / "metrics.jsonl")
    except KeyboardInterrupt:  # the run has saved itself
        if parent is None:
            raise
        os._exit(130)
    rounded = lambda value: round(value, 5) if isinstance(value, float) else value  # noqa: E731
    wanted = [name for name in kept_curves(config) if name in curves]
    kept = {name: [curves[name][0], [rounded(v) for v in curves[name][1]]] for name in wanted}
    row = {"cell": cell.key, "seed": seed} | {name: rounded(value) for name, value in row.items()} | {"curves": kept}
    write_text(folder / "row.json", json.dumps(row) + "\n")
    for large in (*folder.glob("*.pt"), *folder.glob("*.bin")):
        large.unlink()  # the row is what is left of a run; its settings make the weights again
    return row


def make_start(config: Config, line: str) -> None:
    """One of the starts; one that is finished returns at once, one that was interrupted goes on."""
    sft.main(start_config(config, line))


def start_config(config: Config, line: str) -> sft.Config:
    label, settings = (part.strip() for part in line.split("|"))
    folder = root_of(config) / "starts" / label
    fields = {"init_from": config.pretrained, "out_dir": str(folder), "device": "cpu"}
    return parse(sft.Config, to_arguments(read_settings(settings) | fields))


def main(config: Config) -> list[dict]:
    """Run what is missing, seed by seed, so that an unfinished study is a study with fewer seeds; return all rows."""
    cells = checked_cells(config)
    root = root_of(config)
    if config.report_only:
        path = Path(config.page).with_suffix(".jsonl") if config.page else root / "results.jsonl"
        if not (rows := read_rows(path)):
            raise UserError(f"there are no results in {path}")
        report(config, cells, rows)
        return rows
    check_same_study(config)
    unique = list({cell.key: cell for cell in cells}.values())
    rows = read_rows(root / "results.jsonl")
    done = {(row["cell"], row["seed"]) for row in rows}
    plan = [zip(unique, seeds) for seeds in zip(*(seeds_of(config, cell) for cell in unique))]  # seed by seed
    missing = [(cell, seed) for some in plan for cell, seed in some if (cell.key, seed) not in done]
    for cell, seed in list(missing):  # measured, but the study was interrupted before it took note
        left = folder_of(config, cell, seed) / "row.json"
        if left.exists():
            rows.append(add_row(root / "results.jsonl", json.loads(left.read_text())))
            missing.remove((cell, seed))
    for line in config.starts if missing else ():
        make_start(config, line)
    jobs = config.jobs or os.cpu_count() or 1
    print(f"{config.name}: {len(unique)} cells, {config.seeds} seeds, {len(missing)} runs to do, {jobs} at a time")
    failed: list[str] = []
    spawn = multiprocessing.get_context("spawn")  # a forked process would inherit PyTorch's threads half dead
    pool = concurrent.futures.ProcessPoolExecutor(jobs, mp_context=spawn)
    try:
        waiting = {pool.submit(run_cell, config, cell, seed): (cell, seed) for cell, seed in missing}
        finished = concurrent.futures.as_completed(waiting)
        for future in tqdm(finished, total=len(waiting), desc=config.name, disable=not waiting):
            cell, seed = waiting[future]
            if isinstance(future.exception(), concurrent.futures.process.BrokenProcessPool):
                raise KeyboardInterrupt
            if future.exception() is not None:
                failed.append(f"{cell.key} (seed {seed}): {future.exception()}")
                continue
            rows.append(add_row(root / "results.jsonl", future.result()))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    report(config, cells, rows)
    if failed:
        raise UserError(f"{len(failed)} runs failed, the first: {failed[0]}; the others are in the table")
    return rows


def seeds_of(config: Config, cell: Cell) -> list[int]:
    """The first seeds; of the reference cell, the first that it was not tuned with."""
    tuned = config.tuned_seeds if cell.key == reference_key(config) else ()
    return [seed for seed in range(config.seeds + len(tuned)) if seed not in tuned][: config.seeds]


def reference_key(config: Config) -> str:
    settings = read_settings(config.base) | read_settings(config.reference)
    return Cell("", "", tuple(sorted(settings.items()))).key


def checked_cells(config: Config) -> list[Cell]:
    """Refuse what cannot work, before anything runs; the cells."""
    validate(config)
    cells = read_cells(config)
    if config.reference and reference_key(config) not in {cell.key for cell in cells}:
        raise UserError(f"reference: no cell has just the settings {config.reference}")
    if config.tuned_seeds and not config.reference:
        raise UserError("tuned_seeds are those of the reference: name its settings (--reference)")
    if config.stage != "pretrain" and not config.report_only:
        need_checkpoint(config.init_from, "python sft.py")
    known_columns, known_curves = names_of(config)
    if config.scatter and len(config.scatter) != 2:
        raise UserError("scatter takes two columns")
    for name in (*columns_of(config), *config.scatter):
        plain = name.removesuffix("-reference")
        if plain.removesuffix("-mean") not in (known_curves if plain.endswith("-mean") else known_columns):
            raise UserError(f"there is no column {name}: {', '.join(known_columns)}; -mean of a curve; -reference")
        if name in config.scatter and (name not in known_columns or name == "rollouts"):
            raise UserError(f"there is no column {name} to scatter: {', '.join(known_columns)}")
        curve = "accuracy" if plain == "rollouts" else plain.removesuffix("-mean")
        if curve != plain and curve not in kept_curves(config):
            raise UserError(f"the column {name} is read off the curve {curve}: name it in curves too")
    for name in kept_curves(config):
        if name not in known_curves and not (config.stage == "pretrain" and without_axis(name) in known_curves):
            raise UserError(f"there is no curve {name}: {', '.join(known_curves)}")
    for name in config.curves:
        if name.endswith("-reference") and ("@seconds" in name or "@tokens" in name):
            raise UserError(f"{name}: differences are taken step by step, which is neither at equal time nor tokens")
    if config.page:
        frame(Path(config.page))
    return cells


def add_row(path: Path, row: dict) -> dict:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return row


def check_same_study(config: Config) -> None:
    """Refuse to mix results of another start, other questions or other defaults of the stage into a study."""
    path = root_of(config) / "study.json"
    defaults = {name: value for name, value in as_dict(STAGES[config.stage].Config()).items() if name not in OURS}
    facts = {name: getattr(config, name) for name in ("stage", "questions", "length_limit")}
    facts["curves"] = kept_curves(config)
    facts |= {f"start {line.split('|')[0].strip()}": line.split("|")[1].strip() for line in config.starts}
    facts |= {f"default {name}": value for name, value in defaults.items()}  # some have the name of a fact
    if config.stage != "pretrain":
        facts["start"] = weights_id(load_state(config.init_from))
    facts = json.loads(json.dumps(facts))
    stored = json.loads(path.read_text()) if path.exists() else {}
    changed = [
        f"{name} {stored[name]}, now {value}" for name, value in facts.items() if stored.get(name, value) != value
    ]
    if changed:
        raise UserError(f"{path.parent} holds results with {', '.join(changed)}: choose another --name or --out")
    facts = stored | facts  # a study may get more starts
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(facts, indent=2) + "\n")


def read_rows(path: Path) -> list[dict]:
    """The rows of a results file; a line that a crash cut off is forgotten, and its run is done again."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    if path.exists():
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Table, plot and page

COLUMNS = {  # of the table: what ``measure`` finds out at the end of a run, and ``rollouts``
    "start": "greedy accuracy before", "accuracy": "greedy accuracy", "correct": "sampled, right",
    "believed": "right, says its verifier", "formatted": "in form", "short": "short", "all": "right and short",
    "rollouts": "rollouts", "kl": "KL (nats an answer)", "entropy": "entropy (nats a token)", "length": "tokens",
    "finished": "finished", "answers": "answers sampled",
}  # fmt: skip
CURVES = (  # what a run logs about itself: rewards are those that it was trained with
    "accuracy", "correct", "formatted", "short", "reward", "length", "entropy", "finished", "flat_groups",
    "distinct_advantages", "clip_fraction", "kl_ref", "kl_old", "grad_norm", "answers",
)  # fmt: skip
AS_REWARDED = {  # what runtime/words.py does not know about them
    "accuracy": "greedy accuracy", "correct": "right, as rewarded", "formatted": "in form, as rewarded",
    "short": "short, as rewarded",
}  # fmt: skip
DIGITS = {"kl": 2, "busiest": 2, "idlest": 2, "length": 1}  # decimals in the table; of whole numbers none, else 3
DIGITS |= dict.fromkeys(("rollouts", "answers", "parameters", "active", "seconds"), 0)


def names_of(config: Config) -> tuple[dict, tuple]:
    """The columns that there are, with their names in words, and the curves."""
    return (probe.COLUMNS, probe.CURVES) if config.stage == "pretrain" else (COLUMNS, CURVES)


def columns_of(config: Config) -> tuple[str, ...]:
    text = ("val_loss", "bits_per_byte", "bits_per_byte-reference", "parameters", "seconds")
    curve = ("accuracy-mean", "accuracy-mean-reference", "rollouts") if "accuracy" in kept_curves(config) else ()
    policy = ("accuracy", "accuracy-reference", *curve, "correct", "kl", "entropy", "length")
    return config.columns or (text if config.stage == "pretrain" else policy)


def curves_of(config: Config) -> tuple[str, ...]:
    return config.curves or (("val_loss",) if config.stage == "pretrain" else ("accuracy",))


def kept_curves(config: Config) -> list[str]:
    """The curves that a row holds: of a difference, the curve itself."""
    return list(dict.fromkeys(name.removesuffix("-reference") for name in curves_of(config)))


def without_axis(curve: str) -> str:
    """
    >>> without_axis("val_loss@seconds"), without_axis("loss@position")
    ('val_loss', 'loss@position')
    """
    return curve.removesuffix("@tokens").removesuffix("@seconds")


def title(config: Config, name: str) -> str:
    """The head of a column."""
    plain = name.removesuffix("-reference")
    curve = plain.removesuffix("-mean")
    words = names_of(config)[0].get(plain) or f"{AS_REWARDED.get(curve) or words_of(curve)[0]}, mean of the curve"
    words = f"rollouts to {config.goal:g}" if plain == "rollouts" else words
    return words if plain == name else f"{words}, minus the reference's"


def table(config: Config, cells: list[Cell], rows: list[dict]) -> str:
    """Markdown: a line for each cell, and below it what the differences rest on. A seed that has no such figure is left
    out, and if some are, their number is said."""
    several, columns = any(cell.part for cell in cells), columns_of(config)
    head = [*(["part"] if several else []), "setting", *(title(config, name) for name in columns), "seeds"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    compared = {name: compare(config, cells, rows, name) for name in columns if name.endswith("-reference")}
    for cell in cells:
        mine = rows_of(config, cell, rows)
        if not mine:
            continue
        entries = []
        for name in columns:
            if name in compared:
                entries.append(compared[name][0].get(cell, "-"))
            else:
                values = [value for row in mine if (value := figure(config, row, name)) is not None]
                entries.append(describe(values, len(mine), digits_of(name)))
        lines.append(
            "| " + " | ".join([*([cell.part] if several else []), cell.label, *entries, str(len(mine))]) + " |"
        )
    notes = [note for _, note in compared.values() if note]
    return "\n".join([*lines, *(["", KEY, *notes] if notes else [])])


KEY = (
    "In brackets: the standard deviation over seeds. ±: the 95 % interval of one difference. p: Holm's, over the "
    "differences of a part; at most 0.05 in bold.\n"
)


def rows_of(config: Config, cell: Cell, rows: list[dict]) -> list[dict]:
    """Of a cell: all but those of seeds that it was tuned with."""
    tuned = config.tuned_seeds if cell.key == reference_key(config) else ()
    return [row for row in rows if row["cell"] == cell.key and row["seed"] not in tuned]


def digits_of(name: str) -> int:
    return DIGITS.get(name.removesuffix("-reference").removesuffix("-mean"), 3)


def figure(config: Config, row: dict, name: str) -> float | None:
    """A figure of the end of a run, or one read off its curve."""
    curve = "accuracy" if name == "rollouts" else name.removesuffix("-mean")
    if curve == name:
        return row.get(name)
    points = row.get("curves", {}).get(curve)
    if not points or len(points[0]) < 2:
        return None
    return steps_to(*points, config.goal) if name == "rollouts" else curve_mean(*points)


def compare(config: Config, cells: list[Cell], rows: list[dict], column: str) -> tuple[dict[Cell, str], str]:
    """The entries of a column NAME-reference by cell, and what they rest on, in a sentence. Paired: of the seeds that
    all cells have in common."""
    name, paired = column.removesuffix("-reference"), config.paired or config.stage == "pretrain"
    found = {}
    for cell in cells:
        seeds = {row["seed"]: figure(config, row, name) for row in rows_of(config, cell, rows)}
        if any(value is not None for value in seeds.values()):
            found[cell.key] = {seed: seeds[seed] for seed in sorted(seeds) if seeds[seed] is not None}
    if paired and found:
        common = set.intersection(*map(set, found.values()))
        found = {key: {seed: seeds[seed] for seed in sorted(common)} for key, seeds in found.items()}
    values = {key: list(seeds.values()) for key, seeds in found.items() if seeds}
    s, df, own = intervals.pooled(list(values.values()), paired)
    entries, errors, most = {}, [], 0
    for part in dict.fromkeys(cell.part for cell in cells):
        reference, ps = reference_of(config, part, cells).key, {}
        others = [cell for cell in cells if cell.part == part and cell.key != reference and cell.key in values]
        for cell in others if reference in values else ():
            error = s * math.sqrt(1 / len(values[cell.key]) + 1 / len(values[reference]))
            difference = statistics.fmean(values[cell.key]) - statistics.fmean(values[reference])
            entries[cell] = f"{difference:.{digits_of(name)}f}"
            if s > 0:
                ps[cell] = intervals.tail(difference / error, df)
                entries[cell] += f" ± {intervals.quantile(0.975, df) * error:.{digits_of(name)}f}"
                errors.append(error)
        for cell, p in zip(ps, intervals.holm(list(ps.values()))):
            entries[cell] = f"**{entries[cell]}**" if p <= 0.05 else entries[cell]
            entries[cell] += f" (p {f'= {p:.3f}' if p >= 0.0005 else '< 0.001'})"
        most = max(most, len(ps))
    if not errors:
        return entries, ""
    digits, least = digits_of(name), intervals.smallest(max(errors), df, 0.05 / most)
    shown = [f"{value:.{digits + 1}f}" for value in (s, min(own), max(own))]
    level = f"5 % / {most}, Holm's first step in the largest part" if most > 1 else "5 %"
    return entries, (
        f"* {title(config, name)}: {'paired by seed' if paired else 'independent seeds'}; pooled standard deviation "
        f"{shown[0]}, {df} degrees of freedom (of single cells: {shown[1]} to {shown[2]}). 80 % of studies like this "
        f"one find a difference of {least:.{digits}f} (at {level})."
    )


def with_differences(rows: list[dict], reference: list[dict]) -> list[dict]:
    """The rows with NAME-reference for each of their curves: its distance, point by point, to the reference's."""
    others = {row["seed"]: row["curves"] for row in reference if row not in rows}
    made = [row | {"curves": dict(row["curves"])} for row in rows]
    for row in made:
        for name, (xs, ys) in list(row["curves"].items()):
            _, other = others.get(row["seed"], {}).get(name, ((), ()))
            if len(other) == len(ys):
                row["curves"][f"{name}-reference"] = [xs, [mine - theirs for mine, theirs in zip(ys, other)]]
    return made


def reference_of(config: Config, part: str, cells: list[Cell]) -> Cell:
    """The cell of a part that the others are compared with."""
    mine = [cell for cell in cells if cell.part == part]
    return next((cell for cell in mine if config.reference and cell.key == reference_key(config)), mine[0])


def describe(values: list[float], n: int, digits: int) -> str:
    """
    >>> describe([0.8, 0.9, 1.0], 3, 3), describe([12.0], 2, 0), describe([], 2, 0)
    ('0.900 (0.100)', '12, 1 of 2', '-')
    """
    if not values:
        return "-"
    spread = f"{statistics.stdev(values) if len(values) > 1 else 0:.{digits}f}"
    text = f"{statistics.fmean(values):.{digits}f}" + (f" ({spread})" if float(spread) else "")
    return text + (f", {len(values)} of {n}" if len(values) < n else "")


def report(config: Config, cells: list[Cell], rows: list[dict]) -> None:
    """table.md and plot.png in the study's folder; with ``page``, in the page and beside it too."""
    root, text = root_of(config), table(config, cells, rows)
    root.mkdir(parents=True, exist_ok=True)
    write_text(root / "table.md", text + "\n")
    runs = {}
    for cell in cells:
        mine = rows_of(config, cell, rows)
        if mine:
            key = (cell.label, cell.part) if config.scatter else (cell.part, cell.label)  # a line through each label
            runs[key] = with_differences(mine, rows_of(config, reference_of(config, cell.part, cells), rows))
    if runs:
        columns, _ = names_of(config)
        names = columns if config.scatter else AS_REWARDED
        plot_study(runs, root / "plot.png", list(curves_of(config)), list(config.scatter), names)
    print(f"{text}\n\n{root / 'results.jsonl'}, {root / 'table.md'}, {root / 'plot.png'}")
    if config.page and runs:
        page = Path(config.page)
        write_table(page, text)
        if not config.report_only:
            shutil.copyfile(root / "results.jsonl", page.with_suffix(".jsonl"))
        shutil.copyfile(root / "plot.png", page.with_suffix(".png"))


if __name__ == "__main__":
    run_main(lambda: main(parse(Config)))
