"""The whole book in one command: pretrain, fine-tune, reinforce, and evaluate every stage.

    python pipeline.py                       # the embedded task, on a laptop
    python pipeline.py --only grpo           # a first look: what GRPO needs, and how three models answer
    python pipeline.py --all                 # with the relatives: IPO, SimPO, ORPO, Dr. GRPO, DAPO, GSPO, CISPO, ...
    python pipeline.py --quick               # the same path with next to no training: it runs, it does not learn
    python pipeline.py --seed 1 --out out/seed1

Each stage writes into its own folder of ``out``; SFT starts from pretraining, all others from SFT. The report card,
``report.md`` and ``report.json``, is written anew after each stage; ``curves.png`` shows them all. If it is
interrupted, the same command continues where it stopped.
"""

import dataclasses
import difflib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import dpo
import evaluate
import gdpo
import grpo
import kto
import ppo
import pretrain
import reward
import sft
from chat import answer
from runtime import processes
from runtime.checkpoint import load_checkpoint, plain, weights_id, write_text
from runtime.config import FREE_FIELDS, as_dict, parse, read_preset
from runtime.errors import UserError, run_main
from runtime.plots import plot_stages
from runtime.progress import called, printable
from verify import extract_answer


@dataclass(frozen=True)
class Config:
    out: str = ""
    """Where all stages write. Default: out/arith; with --quick, out/arith_quick."""
    seed: int = 0
    """The seed of everything: data, weights, sampling."""
    only: tuple[str, ...] = ()
    """Stages to run, by name (dr_grpo) or label ("Dr. GRPO"), with those that they start from. Default: Base, SFT, the
    reward model, DPO, KTO, PPO, GRPO and GDPO."""
    all: bool = False
    """Their relatives too: IPO, SimPO, ORPO, PPO on the reward model, Dr. GRPO, DAPO, GSPO and CISPO."""
    quick: bool = False
    """Next to no training: shows that everything runs, and no learning."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of matrix products."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile, where a stage is long enough to pay for it."""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """Send the metrics there too."""
    fresh: bool = False
    """Start again although the folders hold runs: those are moved aside, not deleted."""
    samples: int = 8
    """Answers sampled to each of 512 held-out questions, for pass@k, the majority vote and the reward model's choice.
    """


@dataclass(frozen=True)
class Stage:
    """A row of the pipeline: its name, what runs it, its configuration, and the curves that the picture shows."""

    name: str
    label: str
    main: Callable[[Any], dict]
    config: Any
    curves: tuple[str, ...]
    relative: bool = False  # only with --all, or if it is named


def stages(config: Config) -> list[Stage]:
    """The chain, in order. A new stage is one more entry."""
    out, policy = Path(config.out), ("correct", "accuracy")
    common = {name: getattr(config, name) for name in ("seed", "device", "precision", "compile", "track", "fresh")}
    quick = {  # so little training gives no right answer to make pairs of: they learn from ready-made ones
        "pretrain": {"steps": 60, "warmup": 10, "eval_every": 30},
        "sft": {"n_examples": 128, "epochs": 2.0},
        "reward": {"data": "arith", "n_pairs": 128, "n_sums": 128, "eval_pairs": 64},
        "pairs": {"data": "arith", "n_pairs": 64, "epochs": 1.0, "eval_pairs": 64, "eval_prompts": 32},
        "ppo": {"steps": 3, "prompts_per_step": 32, "eval_every": 3},
        "grpo": {"steps": 2, "prompts_per_step": 8, "group_size": 4, "eval_every": 2, "eval_prompts": 32},
    }

    def settings(folder: str, init_from: str = "", kind: str = "", **more) -> dict:
        start = {"init_from": str(out / init_from)} if init_from else {}
        return common | start | {"out_dir": str(out / folder)} | more | (quick[kind or folder] if config.quick else {})

    def pairs(method: str, label: str) -> Stage:
        chosen = dpo.Config(**settings(method, "sft", "pairs", method=method))
        return Stage(method, label, dpo.main, chosen, ("val_accuracy", "val_questions"), method != "dpo")

    def relative(name: str, label: str, preset: str) -> Stage:
        fields = read_preset(grpo.Config, str(Path(__file__).parent / "configs" / preset))
        chosen = grpo.Config(**fields | settings(name, "sft", "grpo"))
        return Stage(name, label, grpo.main, chosen, (*policy, "flat_groups"), True)

    base, tuned, judge = (settings(*one) for one in (("pretrain",), ("sft", "pretrain"), ("reward", "sft")))
    judged = settings("ppo_reward", "sft", "ppo", reward=str(out / "reward"), beta=0.05)
    verified, grouped, several = settings("ppo", "sft"), settings("grpo", "sft"), settings("gdpo", "sft", "grpo")
    return [
        Stage("pretrain", "Base", pretrain.main, pretrain.Config(**base), ("loss", "val_loss")),
        Stage("sft", "SFT", sft.main, sft.Config(**tuned), ("loss", "val_loss")),
        Stage("reward", "Reward model", reward.main, reward.Config(**judge), ("accuracy", "val_accuracy")),
        pairs("dpo", "DPO"),
        pairs("ipo", "IPO"),
        Stage("kto", "KTO", kto.main, kto.Config(**settings("kto", "sft", "pairs")), ("val_accuracy", "val_questions")),
        pairs("simpo", "SimPO"),
        pairs("orpo", "ORPO"),
        Stage("ppo_reward", "PPO, reward model", ppo.main, ppo.Config(**judged), ("score", *policy), True),
        Stage("ppo", "PPO, verifier", ppo.main, ppo.Config(**verified), policy),
        Stage("grpo", "GRPO", grpo.main, grpo.Config(**grouped), (*policy, "flat_groups")),
        relative("dr_grpo", "Dr. GRPO", "grpo_dr.py"),
        relative("dapo", "DAPO", "grpo_dapo.py"),
        relative("gspo", "GSPO", "grpo_gspo.py"),
        relative("cispo", "CISPO", "grpo_cispo.py"),
        Stage("gdpo", "GDPO", gdpo.main, gdpo.Config(**several), (*policy, "formatted", "short")),
    ]


def main(config: Config) -> list[dict]:
    """Run what is not finished yet; return the rows of the report card."""
    config = dataclasses.replace(config, out=config.out or ("out/arith_quick" if config.quick else "out/arith"))
    started, out, chain = time.perf_counter(), Path(config.out), stages(config)
    wanted = chosen(config.only, chain, config.all)
    exam = evaluate.Config(
        data="arith", n=128 if config.quick else 2048, samples=config.samples, ks=(1, 8), seed=config.seed,
        device=config.device, precision=config.precision, batch_size=512,
    )  # fmt: skip
    rows: dict[str, dict] = {}  # of the stages that are finished and examined, in the order of the chain
    for stage in chain:
        row = remembered(out / stage.name, exam) if is_finished(stage) and not config.fresh else None
        if row is not None:
            rows[stage.name] = row
    todo = [stage for stage in wanted if stage.name not in rows]
    times, drawn = Times(out, config.quick), -math.inf
    processes.print_once(
        f"{len(wanted)} stages, {len(wanted) - len(todo)} of them finished, {times.left(todo)}", *quick_note(config)
    )
    for number, stage in enumerate(wanted, start=1):
        where = f"stage {number} of {len(wanted)}: {stage.label}"
        if stage not in todo:
            processes.print_once(f"{where}, finished: {in_words(rows[stage.name])}")
            continue
        begun, whole = time.perf_counter(), not (out / stage.name / "ckpt.pt").exists()
        if config.fresh or not is_finished(stage):
            with called(f"{where}, {times.left(todo)}", f"{number}/{len(wanted)} {stage.label}", stage.label):
                stage.main(stage.config)
        if processes.rank() == 0:
            rows[stage.name] = examined(out / stage.name, stage.label, exam)
            ordered = [one for one in chain if one.name in rows]
            evaluate.write_report(out, [rows[one.name] for one in ordered], "Report card", note(config, exam))
            if stage is todo[-1] or time.perf_counter() - drawn > 60:  # seconds: drawing takes some
                draw(ordered, out)
                drawn = time.perf_counter()
        todo.remove(stage)
        times.note(stage, time.perf_counter() - begun, whole or config.fresh)
        if processes.rank() == 0:
            print(f"examined: {in_words(rows[stage.name])}{'; ' + times.left(todo) if todo else ''}", flush=True)
        processes.barrier(alone=True)
    report = [rows[stage.name] for stage in chain if stage.name in rows]
    if processes.rank() == 0:
        if not (out / "curves.png").exists():
            draw([stage for stage in chain if stage.name in rows], out)
        finish(config, wanted, rows, (time.perf_counter() - started) / 60)
    return report


def quick_note(config: Config) -> list[str]:
    """What --quick is not."""
    return [QUICK] if config.quick else []


QUICK = (
    "--quick: next to no training. It shows that every stage runs; it shows no learning, and its figures mean nothing. "
    "A first look that learns: python pipeline.py --only grpo"
)


def chosen(only: tuple[str, ...], chain: list[Stage], relatives: bool = False) -> list[Stage]:
    """The stages to run, in the order of the chain: the named ones and those that they start from; if none is named,
    all, of the relatives only if they are wanted. UserError for a name that no stage has.
    """
    names = {key.lower(): stage.name for stage in chain for key in (stage.name, stage.label)}
    only = tuple(name for part in only for name in ([part] if part.lower() in names else part.split(",")) if name)
    by_folder = {os.path.normpath(stage.config.out_dir): stage.name for stage in chain}
    by_name = {stage.name: stage for stage in chain}
    missing = [name for name in only if name.lower() not in names]
    if missing:
        near = difflib.get_close_matches(missing[0].lower(), names, n=1, cutoff=0.5)
        hint = f"did you mean {names[near[0]]}? There are " if near else "there are "
        raise UserError(f"--only {missing[0]}: no such stage; {hint}{', '.join(by_name)}")
    unnamed = [stage.name for stage in chain if relatives or not stage.relative]
    waiting, needed = [names[name.lower()] for name in only] or unnamed, set()
    while waiting:
        name = waiting.pop()
        needed.add(name)
        for field in ("init_from", "reward"):
            path = getattr(by_name[name].config, field, "")
            start = by_folder.get(os.path.normpath(path)) if isinstance(path, str) else None
            waiting += [start] if start not in (None, *needed) else []
    return [stage for stage in chain if stage.name in needed]


# ----------------------------------------------------------------------------------------------------------------------
# What is done, and how long the rest takes


def is_finished(stage: Stage) -> bool:
    """Whether the stage's folder holds a finished run of this configuration that started from what its start holds now.
    It asks the checkpoints alone: no model is made, no data are loaded. If not, the stage itself says why it goes on or
    refuses to.
    """
    folder = Path(stage.config.out_dir)
    if not (folder / "ckpt.pt").exists():
        return False
    try:
        state = load_checkpoint(folder, mmap=True)
        wanted = as_dict(stage.config)
        for name, value in wanted.items():
            value = os.path.normpath(value) if name == "init_from" and value else value
            unset = name in FREE_FIELDS or value in (None, "")  # the stage fills it in
            if not unset and plain(value) != state["config"].get(name):
                return False
        start = state["lineage"][-1] if state["lineage"] else None
        same_start = start is None or start["weights"] == weights_id(load_checkpoint(start["path"], mmap=True))
        return bool(state.get("finished")) and same_start
    except (UserError, KeyError, TypeError, AttributeError):
        return False


COSTS = {  # seconds with the examination, on one core of a server CPU (AMD EPYC): what one is to another
    "pretrain": 120, "sft": 41, "reward": 260, "dpo": 50, "ipo": 55, "kto": 70, "simpo": 45, "orpo": 45,
    "ppo_reward": 380, "ppo": 380, "grpo": 185, "dr_grpo": 185, "dapo": 190, "gspo": 190, "cispo": 185, "gdpo": 180,
}  # fmt: skip


class Times:
    """An estimate of the time that is left: what each stage took when this command ran it last (``times.json``), else
    the table above; all of it times the factor by which the stages of today were slower or faster than that.
    """

    def __init__(self, out: Path, quick: bool):
        self.path = out / "times.json"
        self.expected: dict[str, float] = dict.fromkeys(COSTS, 5) | {"pretrain": 12} if quick else dict(COSTS)
        self.measured: dict[str, float] = {}
        try:
            known = json.loads(self.path.read_text())
            self.expected |= {name: float(known[name]) for name in COSTS if name in known}
        except (OSError, ValueError, TypeError):
            pass

    def note(self, stage: Stage, seconds: float, whole: bool) -> None:
        """A stage is done; ``whole``: from its first step on, so that its time is worth remembering."""
        if whole and processes.rank() == 0:
            self.measured[stage.name] = seconds
            write_text(self.path, json.dumps(self.expected | self.measured, indent=2) + "\n")

    def left(self, todo: list[Stage]) -> str:
        """In words.

        >>> Times(Path("nowhere"), quick=False).left([])
        'nothing to do'
        """
        if not todo:
            return "nothing to do"
        usual = sum(self.expected.get(name, 0.0) for name in self.measured)
        factor = sum(self.measured.values()) / usual if usual else 1.0
        seconds = factor * sum(self.expected.get(stage.name, 60.0) for stage in todo)
        return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {max(1, round(seconds))} s left"


# ----------------------------------------------------------------------------------------------------------------------
# The report


def draw(ordered: list[Stage], out: Path) -> None:
    """The curves of all stages that are done, in one picture."""
    folders = {stage.label: out / stage.name for stage in ordered}
    plot_stages(folders, out / "curves.png", {stage.label: list(stage.curves) for stage in ordered})


def in_words(row: dict) -> str:
    """The figure of a row with its interval."""
    what = "ranks pairs rightly" if row["stage"] == "Reward model" else "accuracy"
    return f"{what} {row['accuracy']:.3f} (95 %: {row['low']:.3f} to {row['high']:.3f}, n = {row['n']})"


def finish(config: Config, wanted: list[Stage], rows: dict[str, dict], minutes: float) -> None:
    """The last lines: the report card, one question answered by several models, and what to do next."""
    out, names = Path(config.out), [stage.name for stage in wanted]
    print("\n" + evaluate.table([rows[name] for name in names]))
    writers = [stage for stage in wanted if stage.name in {"pretrain", "sft", "grpo", names[-1]} - {"reward"}]
    print(f"\nOne question, answered greedily (right: {ANSWER}):\n  {QUESTION}")
    for stage in writers:
        text = answered(out / stage.name, stage, config.device)
        # The base model knows no questions: it continues the text.
        unread = "no answer to read" if stage.name == "pretrain" else "wrong"
        verdict = "right" if extract_answer(text) == ANSWER else unread
        shown = " ".join(printable(text).split())
        print(f"  {stage.label:12} accuracy {rows[stage.name]['accuracy']:.3f}   {shown}   ({verdict})")
    print(f"\n{out / 'report.md'}, {out / 'report.json'}, {out / 'curves.png'}; {minutes:.1f} minutes")
    for line in quick_note(config):
        print(line)
    raw = "--raw " if writers[-1].name == "pretrain" else ""
    print(f'talk to it: python chat.py {out / writers[-1].name} {raw}--prompt "{QUESTION}"')


# A held-out one that the fine-tuned models of seeds 1 and 2 get wrong; with other seeds it may be right.
QUESTION = "Ben had 29 bells. Eva takes 8 from Ben. Then Ben gives 11 of them to Eva. How many bells does Ben have now?"
ANSWER = 10


def answered(folder: Path, stage: Stage, device: str) -> str:
    """The stage's greedy answer to the question; given once for each checkpoint, and remembered beside it."""
    memory = folder / "exam.json"
    known = json.loads(memory.read_text())
    if known.get("question") != QUESTION:
        text = answer(str(folder), QUESTION, raw=stage.name == "pretrain", device=device)
        known |= {"question": QUESTION, "answer": text}
        write_text(memory, json.dumps(known, indent=2) + "\n")
    return known["answer"]


def remembered(folder: Path, exam: evaluate.Config) -> dict | None:
    """A stage's row of the report card, if this checkpoint was measured in this exam before."""
    try:
        known = json.loads((folder / "exam.json").read_text())
        return known["row"] if known["stamp"] == stamp_of(folder, exam) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def stamp_of(folder: Path, exam: evaluate.Config) -> dict:
    written = (folder / "ckpt.pt").stat().st_mtime_ns
    return json.loads(json.dumps({"exam": dataclasses.asdict(exam), "written": written}))


def examined(folder: Path, label: str, exam: evaluate.Config) -> dict:
    """A stage's row of the report card; measured once for each checkpoint, and remembered beside it."""
    row = remembered(folder, exam)
    if row is None:
        row = evaluate.measure(str(folder), exam) | {"stage": label}
        memory = {"stamp": stamp_of(folder, exam), "row": row}
        write_text(folder / "exam.json", json.dumps(memory, indent=2) + "\n")
    return row


def note(config: Config, exam: evaluate.Config) -> str:
    return (
        f"Greedy accuracy on {exam.n} held-out questions of the embedded task, with 95 % Wilson intervals (of the "
        "reward model: how often it prefers the better of two answers to one); larger and longer: on as many questions "
        "outside of what training asks, of larger numbers and of a step more; "
        f"pass@k and majority vote from {exam.samples} answers to {exam.sampled} questions at temperature "
        f"{exam.temperature:g}, and of the reward model, how well it chooses among such answers of SFT; "
        f"bits per byte of held-out pretraining text. Seed {config.seed}." + (f" {QUICK}" if config.quick else "")
    )


if __name__ == "__main__":
    run_main(lambda: main(parse(Config)))
