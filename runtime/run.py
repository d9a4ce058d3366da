"""One run of a stage: its folder, its place among the processes, its checkpoint, its metrics.

run = start(config, "sft")                  # checks the folder, joins the processes, picks the device
first = run.resume(model, optimizers)       # 0, or the step at which the last checkpoint was written
run.banner(model, steps, tokens_per_step)
for step in run.steps(first, steps):        # a progress bar
    ...
    run.log(step, tokens=..., loss=...)
    if run.should_save(step, steps):
        run.save(step, model, optimizers, tokenizer)
run.close("loss 1.234", next_command="python grpo.py")
"""

import json
import math
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

from runtime import processes
from runtime.checkpoint import (
    ADAPTERS,
    load_checkpoint,
    load_weights,
    plain,
    save_checkpoint,
    weights_id,
    write_atomically,
    write_text,
)
from runtime.config import FREE_FIELDS, as_dict, at_least
from runtime.device import (
    autocast,
    can_compile,
    compile_blocks,
    keep_freed_memory,
    peak_flops,
    pick_device,
    pick_precision,
    seed_everything,
)
from runtime.errors import UserError
from runtime.plots import plot_curves


def run_folder(config, stage: str) -> Path:
    return Path(config.out_dir or f"out/{config.task}/{stage}")


class Run:
    """The handle that a stage's loop holds. Make it with ``start``."""

    def __init__(self, config, stage: str):
        self.config, self.stage, self.folder = config, stage, run_folder(config, stage)
        self.rank, self.world, local = processes.setup_processes(config.device)
        self.is_main = self.rank == 0
        self.device = pick_device(config.device, local)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.precision = pick_precision(config.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.state: dict | None = None  # the checkpoint that this run continues
        self.lineage: list[dict] = []  # the stages that led here
        self.best: float | None = None
        self._model_flops = 0.0
        self._peak: float | None = None
        self._tokens = self._seconds = 0.0
        self._mark = time.perf_counter()
        self._started = time.perf_counter()
        self._interrupted = False  # Ctrl-C has been pressed ...
        self._saved_for_stop = False  # ... and what was done until then is saved
        self._bar = None
        self._tracker = None

    # ------------------------------------------------------------------------------------------------------------------
    # Before the loop

    def open(self) -> None:
        least = {"seed": 0, "lr": 0, "final_lr": 0, "weight_decay": 0, "beta2": 0, "profile_steps": 0, "keep_last": 1}
        at_least(self.config, **{name: low for name, low in least.items() if hasattr(self.config, name)})
        for name in ("lr", "epochs"):
            if getattr(self.config, name, 0) == math.inf:
                raise UserError(f"{name} is infinite")
        if self.config.seed >= 2**63:
            raise UserError(f"seed is {self.config.seed}: below 2**63")
        if getattr(self.config, "beta2", 0) >= 1:
            raise UserError(f"beta2 is {self.config.beta2}: below 1")
        folder, config = self.folder, as_dict(self.config)
        if self.is_main and self.config.fresh and folder.exists():
            n = 1
            while (aside := folder.with_name(f"{folder.name}.old{n}")).exists():
                n += 1
            folder.rename(aside)
            print(f"{folder} was moved to {aside}")
        processes.barrier()
        if (folder / "ckpt.pt").exists():
            self.state = load_checkpoint(folder)
            if self.state["stage"] != self.stage:
                raise UserError(f"{folder} holds a {self.state['stage']} run; choose another --out_dir")
            stored = self.state["config"]
            changed = [
                k for k in config if k not in FREE_FIELDS and k in stored and plain(config[k]) != plain(stored[k])
            ]
            if changed:
                what = ", ".join(f"{k}={stored[k]!r}, now {config[k]!r}" for k in changed)
                raise UserError(f"{folder} holds a run with {what}: choose another folder, or --fresh to start again")
            if "optimizers" not in self.state:
                raise UserError(f"{folder} holds merged adapters, not a run that could go on; choose another --out_dir")
            self.lineage, self.best = self.state["lineage"], self.state.get("best")
        if self.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
            self._cut_back(self.state["step"] if self.state else -1)
            self._tracker = _tracker(self.config, self.stage, folder)
        seed_everything(self.config.seed)

    def _cut_back(self, step: int) -> None:
        """Forget metrics and samples that were written after the checkpoint: those steps will be done again."""
        metrics, samples = self.folder / "metrics.jsonl", self.folder / "samples.txt"
        rows = []
        if metrics.exists():
            for line in metrics.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # the line that a crash cut off
                    continue
                if row["step"] <= step:
                    rows.append(line + "\n")
        write_text(metrics, "".join(rows))
        text = samples.read_bytes().decode("utf-8", "replace") if samples.exists() else ""
        parts = re.split(r"^(?==== step \d+ ===$)", text, flags=re.MULTILINE)[1:]
        write_text(samples, "".join(p for p in parts if int(p.split(" ", 3)[2]) <= step))

    @property
    def finished(self) -> bool:
        return bool(self.state and self.state.get("finished"))

    def resume(self, model, optimizers=()) -> int:
        """Put the weights, the optimizers and the random state back where the checkpoint has them; return its step."""
        if self.state is None:
            return 0
        if ("adapters" in self.state) != (getattr(model, "lora", None) is not None):
            kind = "adapters" if "adapters" in self.state else "whole weights"
            raise UserError(f"{self.folder} holds a run that trains {kind}: choose another --out_dir, or --fresh")
        if "adapters" in self.state:  # the model is the base, as at the run's start
            model.lora.load_adapters(model, self.state["adapters"])
        else:
            load_weights(model, self.state["model"], self.folder)
        for optimizer, saved in zip(optimizers, self.state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.scaler.is_enabled() and self.state["scaler"]:
            self.scaler.load_state_dict(self.state["scaler"])
        torch.set_rng_state(self.state["rng"].cpu())
        if self.finished:
            self.print(f"{self.folder} is finished ({self.state['step']} steps); --fresh would start again")
        else:
            self.print(f"continuing {self.folder} at step {self.state['step']}")
        return self.state["step"]

    def descend(self, state: dict, path) -> None:
        """Note that this run starts from that checkpoint; refuse to go on if it started from another."""
        mine = {
            "stage": state["stage"],
            "path": str(path),
            "step": state["step"],
            "weights": weights_id(state),
        }
        if self.lineage and self.lineage[-1].get("weights") != mine["weights"]:
            raise UserError(
                f"{self.folder} was started from other weights than {path} holds now: --fresh (or another --out_dir) "
                "starts again from these"
            )
        self.lineage = [*state["lineage"], mine]

    def autocast(self):
        return autocast(self.device, self.precision)

    def maybe_compile(self, model, steps: int, step_seconds: float) -> str:
        """Compile the blocks if ``compile`` says so; with auto, if about ``steps · step_seconds`` of work pay back
        the warm-up.

        The choice depends on the configuration alone, never on where a run resumes: compiled and eager sums round
        differently.
        """
        wanted = self.config.compile == "on" or (
            self.config.compile == "auto" and self.device.type in ("cpu", "cuda") and steps * step_seconds > 60
        )
        if not wanted:
            return "eager" if self.config.compile == "off" else "eager (too short a run for torch.compile to pay)"
        if not can_compile(self.device):
            if self.config.compile == "on":
                raise UserError(
                    "--compile on needs a C++ compiler (CPU) or Triton (GPU); install one or use --compile off"
                )
            return "eager (torch.compile finds no compiler)"
        compile_blocks(model)
        return "compiled (the first steps take some seconds longer)"

    def eager(self):
        """Run without compiled code: for evaluation and generation, whose changing shapes would each be compiled
        anew.
        """
        return torch.compiler.set_stance("force_eager")

    def banner(self, size, steps: int, tokens_per_step: int, how: str = "eager", **more) -> None:
        """Say what the run will do. size: the model's ``ModelSize`` (transformer.py); more: further lines, by name."""
        self._model_flops = size.flops_per_token
        n, active, trained = size.parameters, size.active, size.trained
        facts = {
            "device": f"{self.device}, {self.precision}, {how}"
            + (f", {self.world} processes" if self.world > 1 else ""),
            "model": f"{n:,} parameters" + (f", {active:,} of them for one token" if active < n else ""),
            "learns": f"trained {trained:,} of {n:,} parameters ({100 * trained / n:.3g} %)" if trained < n else "",
            "work": f"{steps:,} steps of {tokens_per_step:,} tokens",
            **more,
            "writes": str(self.folder),
        }
        self.print(f"\n{self.stage}")
        for name, value in facts.items():
            if value:
                self.print(f"  {name:10} {value}")

    def print(self, text: str) -> None:
        if self.is_main:
            tqdm.write(text)
            sys.stdout.flush()

    # ------------------------------------------------------------------------------------------------------------------
    # The loop

    def steps(self, first: int, last: int):
        """first, first + 1, ..., last - 1 under a progress bar. Ctrl-C finishes the step, saves it, and stops; a
        second one stops at once, as the first does under torchrun.
        """
        before = {}
        if self.world == 1 and _in_main_thread():

            def interrupt(number, frame):
                self._interrupted = True
                for n, handler in before.items():
                    signal.signal(n, handler)
                os.write(2, b"\nfinishing this step, then saving (again to stop at once)\n")  # print is not reentrant

            before = {n: signal.signal(n, interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
        profiler = self._profiler()
        self._bar = tqdm(
            total=last, initial=first, desc=self.stage, disable=not self.is_main, dynamic_ncols=True, mininterval=0.5
        )
        try:
            self._mark = time.perf_counter()
            for step in range(first, last):
                yield step
                self._bar.update()
                if profiler is not None:
                    profiler.step()
                if self._saved_for_stop:  # pressed too late for this step's save: the next step saves
                    raise KeyboardInterrupt
                self._mark = time.perf_counter()
        finally:
            self._bar.close()
            if profiler is not None:
                profiler.__exit__(None, None, None)
                profiler.export_chrome_trace(str(self.folder / "trace.json"))
                self.print(f"profile: {self.folder / 'trace.json'} (open it in ui.perfetto.dev)")
            for n, handler in before.items():
                signal.signal(n, handler)

    def _profiler(self):
        if not self.config.profile_steps or not self.is_main:
            return None
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        schedule = torch.profiler.schedule(wait=1, warmup=1, active=self.config.profile_steps, repeat=1)
        profiler = torch.profiler.profile(activities=activities, schedule=schedule)
        return profiler.__enter__()

    def logs(self, step: int) -> bool:
        """Will ``log`` write a row of this step, counted from 0?"""
        return (step + 1) % self.config.log_every == 0 or step == 0

    def log(self, step: int, tokens: int = 0, always: bool = False, show: tuple = (), **metrics) -> None:
        """Report one step, counted from 0. ``tokens``: how many all processes trained on; speed and MFU come from
        them. A row is written every ``log_every`` steps (or ``always``); values may be tensors and are read only
        then. ``show``: names for the bar.
        """
        self._tokens += tokens
        self._seconds += time.perf_counter() - self._mark
        self._mark = time.perf_counter()
        if not (always or self.logs(step)):
            return
        row = {"step": step + 1} | {k: float(v) for k, v in metrics.items() if v is not None}
        if self._tokens:
            self._seconds += time.perf_counter() - self._mark  # reading the values waited for the device
            row["tokens_per_second"] = self._tokens / self._seconds
            if self._peak is None:
                self._peak = peak_flops(self.device, self.precision)
            row["mfu"] = self._model_flops * row["tokens_per_second"] / (self._peak * self.world)
        self._tokens = self._seconds = 0.0
        self._mark = time.perf_counter()
        self._write(row, show)

    def evaluation(self, step: int, **metrics) -> None:
        """Report figures measured between steps, after ``step`` steps."""
        self._write({"step": step} | {k: float(v) for k, v in metrics.items() if v is not None}, ())
        self._mark = time.perf_counter()

    def _write(self, row: dict, show) -> None:
        if not self.is_main:
            return
        row["time"] = round(time.perf_counter() - self._started, 3)
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        if self._bar is not None and show:
            speed = {"tok/s": f"{row['tokens_per_second']:,.0f}"} if "tokens_per_second" in row else {}
            self._bar.set_postfix({k: f"{row[k]:.3f}" for k in show if k in row} | speed, refresh=False)
        if self._tracker is not None:
            self._tracker(row)

    def sample(self, step: int, text: str) -> None:
        """Append generated text to samples.txt."""
        if self.is_main:
            with open(self.folder / "samples.txt", "a", encoding="utf-8", newline="") as file:
                file.write(f"=== step {step} ===\n{text.rstrip()}\n\n")

    def has_sample(self, step: int) -> bool:
        """Whether samples.txt holds a text of that step."""
        path = self.folder / "samples.txt"
        return path.exists() and f"=== step {step} ===\n" in path.read_text(encoding="utf-8")

    def should_save(self, step: int, steps: int) -> bool:
        return (step + 1) % self.config.save_every == 0 or step + 1 == steps or self._interrupted

    def save(
        self,
        step: int,
        steps: int,
        model,
        optimizers,
        tokenizer,
        metric: float | None = None,
        lower_is_better=True,
        extra: dict | None = None,
    ) -> None:
        """Write the checkpoint after ``step`` (counted from 0); ``metric`` decides whether it is also ``best.pt``.
        ``extra``: what else a stage needs to go on.
        """
        stop = self._interrupted
        better = metric is not None and (
            self.best is None or (metric < self.best if lower_is_better else metric > self.best)
        )
        better = better and metric == metric  # NaN is better than nothing only to a comparison with nothing
        if better:
            self.best = float(metric)
        if self.is_main:
            weights, adapters = self._weights(model, step)
            state = {
                "model": weights,
                "model_config": as_dict(model.config),
                "tokenizer": tokenizer.state(),
                "stage": self.stage,
                "config": plain(as_dict(self.config)),
                "step": step + 1,
                "finished": step + 1 == steps,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "scaler": self.scaler.state_dict(),
                "rng": torch.get_rng_state(),
                "best": self.best,
                "lineage": self.lineage,
                "extra": extra or {},
                **adapters,
            }
            save_checkpoint(self.folder, state, self.config.keep_last, better)
        processes.barrier()
        self._saved_for_stop = stop
        self._mark = time.perf_counter()

    def _weights(self, model, step: int) -> tuple[dict, dict]:
        """The plain model's weights, and of a model with adapters those too, which also go to ``adapters.pt``: before
        the checkpoint, so that whatever happens they are not older.
        """
        if getattr(model, "lora", None) is None:
            return model.state_dict(), {}
        adapters = {"lora": plain(as_dict(model.lora)), "adapters": model.lora.adapter_weights(model)}
        facts = {"stage": self.stage, "config": plain(as_dict(self.config)), "step": step + 1, "lineage": self.lineage}
        alone = {"magic": ADAPTERS, **facts, **adapters}
        write_atomically(self.folder / "adapters.pt", lambda temporary: torch.save(alone, temporary))
        return model.lora.merged_weights(model), adapters

    # ------------------------------------------------------------------------------------------------------------------
    # After the loop

    def close(self, result: str, next_command: str = "") -> None:
        if self.is_main:
            plot_curves(self.folder / "metrics.jsonl", self.folder / "curves.png", title=str(self.folder))
            seconds = time.perf_counter() - self._started
            took = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
            self.print(
                f"{self.stage} done: {result} in {took}; {self.folder / 'ckpt.pt'}"
                + (f"; next: {next_command}" if next_command else "")
            )
            if self._tracker is not None:
                self._tracker(None)


def start(config, stage: str) -> Run:
    """Open the folder of a stage's run, fresh or to be continued."""
    run = Run(config, stage)
    run.open()
    return run


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _tracker(config, stage: str, folder: Path):
    """A function that sends a row of metrics on, or ends with ``None``."""
    if config.track == "none":
        return None
    try:
        if config.track == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder / "tensorboard"))

            def send(row):
                if row is None:
                    writer.close()
                    return
                for name, value in row.items():
                    if name != "step":
                        writer.add_scalar(name, value, row["step"])

            return send
        import wandb
    except ImportError:
        raise UserError(f"--track {config.track} needs the extra: pip install -e '.[track]'") from None
    handle = wandb.init(
        project="alignbook",
        name=f"{config.task}/{stage}",
        dir=str(folder),
        config=as_dict(config),
        reinit="finish_previous",
    )

    def send(row):
        if row is None:
            handle.finish()
        else:
            handle.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))

    return send
