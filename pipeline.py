"""The whole book in one command: pretrain, fine-tune, reinforce, and evaluate every stage.

    python pipeline.py                       # the embedded task, on a laptop
    python pipeline.py --quick               # the same path with little training, to see it run
    python pipeline.py --seed 1 --out out/seed1

Each stage writes into its own folder of ``out``; SFT starts from pretraining, all others from SFT. The report card,
``report.md`` and ``report.json``, is written anew after each stage; ``curves.png`` shows them all. If it is
interrupted, the same command continues where it stopped.
"""

import dataclasses
import json
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
from runtime import processes
from runtime.config import parse, read_preset
from runtime.errors import run_main
from runtime.plots import plot_stages


@dataclass(frozen=True)
class Config:
    out: str = ""
    """Where all stages write. Default: out/arith; with --quick, out/arith_quick."""
    seed: int = 0
    """Of everything: data, weights, sampling."""
    quick: bool = False
    """Little training everywhere: shows that it runs, not that it learns."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of matrix products."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile, where a stage is long enough to pay for it."""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """Send the metrics there too."""
    fresh: bool = False
    """Start again although the folders hold runs: those are moved aside, not deleted."""
    samples: int = 8
    """Answers sampled to each held-out question, for pass@k and the majority vote."""


@dataclass(frozen=True)
class Stage:
    """A row of the pipeline: its name, what runs it, its configuration, and the curves that the picture shows."""

    name: str
    label: str
    main: Callable[[Any], dict]
    config: Any
    curves: tuple[str, ...]


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
        return Stage(method, label, dpo.main, chosen, ("val_accuracy", "val_questions"))

    def relative(name: str, label: str, preset: str) -> Stage:
        fields = read_preset(grpo.Config, str(Path(__file__).parent / "configs" / preset))
        chosen = grpo.Config(**fields | settings(name, "sft", "grpo"))
        return Stage(name, label, grpo.main, chosen, (*policy, "flat_groups"))

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
        Stage("ppo_reward", "PPO, reward model", ppo.main, ppo.Config(**judged), ("score", *policy)),
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
    started, out = time.perf_counter(), Path(config.out)
    exam = evaluate.Config(
        data="arith", n=128 if config.quick else 512, samples=config.samples, ks=(1, 8), seed=config.seed,
        device=config.device, precision=config.precision,
    )  # fmt: skip
    rows: list[dict] = []
    folders: dict[str, Path] = {}
    wanted: dict[str, list[str]] = {}
    for stage in stages(config):
        stage.main(stage.config)
        if processes.rank() == 0:
            rows.append(examined(out / stage.name, stage.label, exam))
            evaluate.write_report(out, rows, "Report card", note(config, exam))
            folders[stage.label], wanted[stage.label] = out / stage.name, list(stage.curves)
            plot_stages(folders, out / "curves.png", wanted)
        processes.barrier()
    if processes.rank() == 0:
        print("\n" + evaluate.table(rows))
        minutes = (time.perf_counter() - started) / 60
        print(f"\n{out / 'report.md'}, {out / 'report.json'}, {out / 'curves.png'}; {minutes:.1f} minutes")
        print(f'talk to it: python chat.py {out / "grpo"} --prompt "{QUESTION}"')
    return rows


QUESTION = "Tom has 4 boxes with 6 apples in each and 7 more apples. How many apples does Tom have?"


def examined(folder: Path, label: str, exam: evaluate.Config) -> dict:
    """A stage's row of the report card; measured once for each checkpoint, and remembered beside it."""
    memory = folder / "exam.json"
    stamp = {"exam": dataclasses.asdict(exam), "written": (folder / "ckpt.pt").stat().st_mtime_ns}
    stamp = json.loads(json.dumps(stamp))
    if memory.exists():
        known = json.loads(memory.read_text())
        if known.get("stamp") == stamp:
            return known["row"]
    row = evaluate.measure(str(folder), exam) | {"stage": label}
    evaluate.write_text(memory, json.dumps({"stamp": stamp, "row": row}, indent=2) + "\n")
    return row


def note(config: Config, exam: evaluate.Config) -> str:
    return (
        f"Greedy accuracy on {exam.n} held-out questions of the embedded task, with 95 % Wilson intervals (of the "
        "reward model: how often it prefers the better of two answers to one); "
        f"pass@k and majority vote from {exam.samples} answers at temperature {exam.temperature:g}; "
        f"bits per byte of held-out pretraining text. Seed {config.seed}."
    )


if __name__ == "__main__":
    run_main(lambda: main(parse(Config)))
