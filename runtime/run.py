"""One run of a stage: the handle that its loop holds.

It knows the run's place among the processes, its device and precision, its folder, and how to continue and to save::

    run = start(config, "sft")  # opens the folder, joins the processes, picks the device
    first = run.resume(model, optimizers)  # 0, or the step of the last checkpoint
    run.banner(model_size(model, seq_len), steps, tokens_per_step)
    for step in run.steps(first, steps):  # under a progress bar
        ...
        run.log(step, tokens=tokens_per_step, loss=loss)
        if run.should_save(step, steps):
            run.save(step, steps, model, optimizers, tokenizer)
    run.close("loss 1.234", next_command="python grpo.py")

What it does not do itself is in ``folder.py``, ``progress.py``, ``metrics.py``, ``pictures.py``, ``trackers.py`` and
``checkpoint.py``.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from runtime import errors, lock, preview, processes, rehearsal
from runtime.checkpoint import (
    ADAPTERS,
    check_optimizer,
    load_weights,
    plain,
    save_checkpoint,
    weights_id,
    write_atomically,
)
from runtime.config import as_dict
from runtime.device import (
    autocast,
    can_compile,
    compile_blocks,
    keep_freed_memory,
    pick_device,
    pick_precision,
    seed_everything,
)
from runtime.errors import UserError
from runtime.folder import append_sample, has_sample, open_folder, run_folder
from runtime.metrics import Metrics, numbers
from runtime.pictures import Pictures
from runtime.plots import read_metrics
from runtime.progress import Progress
from runtime.rollouts import NAME as ROLLOUTS
from runtime.rows import stamps
from runtime.trackers import open_tracker


def has_text(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


class Run:
    """The handle that a stage's loop holds. Make it with ``start``."""

    updates = 0  # of the weights, in this process
    skipped = 0  # of these the last ones, in a row, whose gradient was not finite
    val_loss = 0.0  # of the last validation, if it has one

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
        self.best_step: int | None = None  # when it was
        self.data: dict[str, str] = {}  # what the user's files were at the start
        self.is_new = False  # whether this process made the folder's files
        self.extra: dict = {}  # what else the stage needs to go on; saved with every checkpoint
        self.model = self.tokenizer = None  # with these a run that has to stop can save what it has learned
        self.optimizers, self.saved_step = (), -1
        self.unsaved: tuple[int, int] | None = None  # the last whole step, of how many, if no checkpoint has it
        self.progress = Progress(stage, self.folder, self.world, self.is_main)
        self.metrics = Metrics(self.folder, config.log_every, self.device, self.precision, self.world)
        self.pictures = Pictures(self.folder, self.progress.print)

    # ------------------------------------------------------------------------------------------------------------------
    # Before the loop

    def open(self) -> None:
        self.data = stamps(self.config)
        self.is_new = self.config.fresh or not (self.folder / "metrics.jsonl").exists()
        self.state = open_folder(self.folder, self.config, self.stage)
        if self.state is not None:
            self.lineage, self.best = self.state["lineage"], self.state.get("best")
            self.best_step = self.state.get("best_step")
        if self.is_main:
            self.metrics.tracker = open_tracker(self.config, self.stage, self.folder)
        seed_everything(self.config.seed)

    @property
    def finished(self) -> bool:
        return bool(self.state and self.state.get("finished"))

    def resume(self, model, optimizers=()) -> int:
        """Put the weights, the optimizers and the random state back where the checkpoint has them; return its step."""
        self.model, self.optimizers = model, optimizers
        if self.state is None:
            return 0
        if ("adapters" in self.state) != (getattr(model, "lora", None) is not None):
            kind = "adapters" if "adapters" in self.state else "whole weights"
            raise UserError(f"{self.folder} holds a run that trains {kind}: choose another --out_dir, or --fresh")
        if "adapters" in self.state:  # the model is the base, as at the run's start
            model.lora.load_adapters(model, self.state["adapters"])
        else:
            load_weights(model, self.state["model"], self.folder)
        saved = self.state["optimizers"]
        if not isinstance(saved, list) or len(saved) != len(optimizers):
            raise UserError(f"the optimizers in {self.folder} do not fit this run: the checkpoint is damaged")
        for optimizer, state in zip(optimizers, saved):
            check_optimizer(optimizer, state, self.folder)
            optimizer.load_state_dict(state)
        try:
            if self.scaler.is_enabled() and self.state["scaler"]:
                self.scaler.load_state_dict(self.state["scaler"])
            torch.set_rng_state(self.state["rng"].cpu())
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"the random state in {self.folder} is damaged: {error}") from None
        if self.finished:
            self.print(f"{self.folder} is finished ({self.state['step']} steps); --fresh would start again")
        else:
            self.print(f"continuing {self.folder} at step {self.state['step']}")
            if (before := self.state.get("world", self.world)) != self.world:
                self.print(
                    f"note: {before} process{'es' if before > 1 else ''} until here, {self.world} from here on: sums "
                    "round differently, and ppo, grpo and gdpo sample other answers"
                )
        return self.state["step"]

    def record_parent(self, state: dict, path) -> None:
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

    @contextlib.contextmanager
    def in_float32(self):
        """Compute without 16 bits for a while, whatever the run's precision is."""
        kept, self.precision = self.precision, "fp32"
        try:
            yield
        finally:
            self.precision = kept

    def maybe_compile(self, model, steps: int, tokens_per_step: int) -> str:
        """Compile the blocks if ``compile`` says so; with auto, if the work is long enough to pay back the warm-up.

        The choice depends on the configuration alone, never on where a run resumes: compiled and eager sums round
        differently.
        """
        work = 6 * sum(p.numel() for p in model.parameters()) * tokens_per_step  # floating-point operations of a step
        seconds = steps * (work / (1e11 if self.device.type == "cpu" else 1e14))
        wanted = self.config.compile == "on" or (
            self.config.compile == "auto" and self.device.type in ("cpu", "cuda") and seconds > 60
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
        """Say what the run will do, unless it is done already. size: the model's ``ModelSize`` (transformer.py); more:
        further lines, by name."""
        self.metrics.flops_per_token = size.flops_per_token
        if self.finished:
            return
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
        self.print(f"\n{self.progress.names.title}")
        for name, value in facts.items():
            if value:
                self.print(f"  {name:10} {value}")

    def print(self, text: str) -> None:
        self.progress.print(text)

    # ------------------------------------------------------------------------------------------------------------------
    # The loop

    def steps(self, first: int, last: int) -> Iterator[int]:
        """first, first + 1, ..., last - 1 under a progress bar. Ctrl-C finishes the step, saves it, and stops."""
        if last >= 2**31:
            raise UserError(f"{last:.3g} steps have no end: fewer --steps or --epochs")
        self.metrics.last = last
        for step in self.progress.steps(first, last, self.config.profile_steps, self.device):
            self.metrics.restart_clock()
            yield step
            self.unsaved = None if self.saved_step == step else (step, last)

    def save_unsaved(self) -> None:
        """Save what was learned since the last checkpoint: for a step that has to stop before it changes anything."""
        if self.unsaved is not None and self.tokenizer is not None:
            self.save(*self.unsaved, self.model, self.optimizers, self.tokenizer)
            self.print(f"saved after {self.unsaved[0] + 1} steps; the same command continues")

    def leave_nothing(self) -> None:
        """Remove the files of a run that ended before it had anything to write, for a mistake in its data, say."""
        names = [self.folder / name for name in ("config.json", "metrics.jsonl", "samples.txt", "tokens.bin", ROLLOUTS)]
        if not (self.is_main and self.is_new) or (self.folder / "ckpt.pt").exists() or has_text(names[1]):
            return
        for path in names:
            path.unlink(missing_ok=True)
        lock.release(self.folder)
        with contextlib.suppress(OSError):  # it holds something else
            self.folder.rmdir()

    def saved_so_far(self) -> str:
        """For who interrupts the run."""
        before = self.state["step"] if self.state else 0
        step = max(before, self.saved_step + 1)
        if step:
            return f"{self.folder} is saved at step {step}, and the same command goes on from there"
        return f"{self.folder} had nothing to save yet: the same command starts again"

    def at_start(self, name: str) -> float | None:
        """A figure of the examination before the first step; None if there was none."""
        steps, values = read_metrics(self.folder / "metrics.jsonl").get(name, ([], []))
        return values[0] if steps and steps[0] == 0 else None

    def logs(self, step: int) -> bool:
        """Will ``log`` write a row of this step, counted from 0?"""
        return self.metrics.due(step)

    def log(self, step: int, tokens: int = 0, always: bool = False, show: tuple = (), **metrics) -> None:
        """Report one step, counted from 0. ``tokens``: how many all processes trained on; speed and MFU come from
        them. A row is written every ``log_every`` steps (or ``always``); values may be tensors and are read only
        then. ``show``: names for the bar.
        """
        self.unsaved = step, self.metrics.last  # the weights are those after this step
        row = self.metrics.step_row(step, tokens, always, metrics)
        if row is not None and self.is_main:
            self.metrics.write(row)
            self.progress.show(row, show)

    def evaluation(self, step: int, **metrics) -> None:
        """Report figures measured between steps, after ``step`` steps."""
        row = {"step": step} | numbers(metrics)
        self.val_loss = row.get("val_loss", 0.0)
        if self.is_main:
            self.metrics.write(row)
            self.pictures.draw_if_due()
        self.metrics.restart_clock()

    def sample(self, step: int, text: str) -> None:
        """Append generated text to samples.txt."""
        if self.is_main:
            append_sample(self.folder, step, text)

    def has_sample(self, step: int) -> bool:
        """Whether samples.txt holds a text of that step."""
        return has_sample(self.folder, step)

    def due(self, step: int, every: int, steps: int) -> bool:
        """Whether ``step``, counted from 0, is one of every ``every``, or the last."""
        return (step + 1) % every == 0 or step + 1 == steps

    def should_save(self, step: int, steps: int) -> bool:
        return (step + 1) % self.config.save_every == 0 or step + 1 == steps or self.progress.interrupted

    def save(
        self,
        step: int,
        steps: int,
        model,
        optimizers,
        tokenizer,
        metric: float | None = None,
        lower_is_better=True,
    ) -> None:
        """Write the checkpoint after ``step`` (counted from 0); ``metric`` decides whether it is also ``best.pt``."""
        stop = self.progress.interrupted
        better = metric is not None and (
            self.best is None or (metric < self.best if lower_is_better else metric > self.best)
        )
        better = better and metric == metric  # NaN is better than nothing only to a comparison with nothing
        if better:
            self.best, self.best_step = float(metric), step + 1
        self._refuse_ruins(model, step, steps)
        if self.is_main:
            weights, adapters = self._weights(model, step)
            state = {
                "model": weights,
                "model_config": as_dict(model.config),
                "tokenizer": tokenizer.state(),
                "stage": self.stage,
                "config": plain(as_dict(self.config)),
                "step": step + 1,
                "steps": steps,
                "finished": step + 1 == steps,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "scaler": self.scaler.state_dict(),
                "rng": torch.get_rng_state(),
                "best": self.best,
                "best_step": self.best_step,
                "world": self.world,
                "data": self.data,
                "lineage": self.lineage,
                "extra": self.extra,
                **adapters,
            }
            save_checkpoint(self.folder, state, self.config.keep_last, better)
            if not stop:
                self.pictures.draw_if_due()
        processes.barrier()
        self.saved_step, self.progress.saved_for_stop = step, stop
        self.metrics.restart_clock()

    def _refuse_ruins(self, model, step: int, steps: int) -> None:
        """End the run rather than overwrite its last good checkpoint with weights that are no numbers or whose held-out
        loss is none, or call a run finished none of whose last steps could change anything."""
        saved = max(self.saved_step + 1, self.state["step"] if self.state else 0)
        kept = f"; the checkpoint of step {saved} is whole" if saved else ""
        finite = [torch.isfinite(p).all() for p in model.parameters()]  # a GPU is asked once
        if finite and not torch.stack(finite).all():
            raise UserError(f"after step {step + 1} the weights are no numbers any more: lower --lr{kept}")
        if not math.isfinite(self.val_loss):
            raise UserError(f"after step {step + 1} the held-out loss is no number any more: lower --lr{kept}")
        if step + 1 == steps and (self.skipped >= 10 or self.skipped == self.updates > 0):
            raise UserError(f"the gradients of the last {self.skipped} updates were no numbers: lower --lr{kept}")

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
            self.pictures.draw()
            seconds = self.metrics.seconds()
            took = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
            self.print(
                f"{self.progress.names.name} done: {result} in {took}; {self.folder / 'ckpt.pt'}"
                + (f"; next: {next_command}" if next_command and not self.progress.part else "")
            )
            if self.metrics.tracker is not None:
                self.metrics.tracker(None)
            lock.release(self.folder)


def start(config, stage: str) -> Run:
    """Open the folder of a stage's run, fresh or to be continued. A rehearsal (``--print_config``) ends here."""
    if rehearsal.now is not None:
        preview.show(rehearsal.now, config, stage)
        raise SystemExit(0)
    run = Run(config, stage)
    run.open()
    errors.RESCUES[:], errors.LEAVE[:], errors.TOLD[:] = [run.save_unsaved], [run.leave_nothing], [run.saved_so_far]
    return run
