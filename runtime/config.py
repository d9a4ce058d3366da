"""A stage's configuration: defaults in a frozen dataclass, a preset file of plain Python, and command-line overrides,
in this order.

    python sft.py configs/sft_gsm8k.py --lr 1e-5

Everything that can be wrong is found before anything is loaded and is said in one line, with the nearest valid name.
"""

import contextlib
import dataclasses
import difflib
import inspect
import io
import math
import operator
import os
import runpy
import sys
import typing
from pathlib import Path
from types import FunctionType, ModuleType, UnionType
from typing import Annotated

import tyro

from runtime import rehearsal
from runtime.errors import UserError, run_main
from runtime.fields import print_help, table

# ----------------------------------------------------------------------------------------------------------------------
# Bounds, which stand at the fields: ``steps: Annotated[int, AtLeast(1)] = 45``


LARGEST = 3.4e38  # about the largest number that float32 has


class Bound(type(tyro.conf.arg())):  # of the class that tyro looks for in an annotation, so that --help shows it
    """A finite number between limits, any of which may be missing. None is not looked at; of a tuple, every element is.

    >>> Bound(least=0, below=1).problem(1.5)
    'is 1.5: below 1'
    """

    HOLDS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}

    def __init__(self, least=None, above=None, most=None, below=None):
        given = {"at least": least, "above": above, "at most": most, "below": below}
        limits = {word: limit for word, limit in given.items() if limit is not None}
        text = "".join(f"{word} {_number(limit)}, " for word, limit in limits.items()).removesuffix(", ")
        shown = tyro.conf.arg(help_behavior_hint=lambda default: f"({text + '; ' if text else ''}default: {default})")
        for name, value in vars(shown).items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "limits", limits)

    def problem(self, value: float) -> str:
        """What is wrong with a value; empty if nothing is."""
        for word, limit in self.limits.items():
            if not self.HOLDS[word](value, limit):  # NaN too
                return f"is {value}: {word} {_number(limit)}"
        if math.isnan(value):
            return "is nan: not a number"
        if isinstance(value, int) and value >= 2**31 and not {"at most", "below"} & set(self.limits):
            return f"is {value}: below 2**31"
        if abs(value) > LARGEST:
            return "is infinite" if value in (math.inf, -math.inf) else f"is {value:g}: more than the arithmetic holds"
        return ""


class AtLeast(Bound):
    def __init__(self, least, most=None, below=None):
        super().__init__(least=least, most=most, below=below)


class Above(Bound):
    def __init__(self, above, most=None, below=None):
        super().__init__(above=above, most=most, below=below)


class Finite(Bound):
    def __init__(self):
        super().__init__()


def _number(limit) -> str:
    power = isinstance(limit, int) and limit > 2**32 and limit & (limit - 1) == 0
    return f"2**{limit.bit_length() - 1}" if power else f"{limit:g}"


# The kinds of numbers that many fields are.
Count = Annotated[int, AtLeast(1)]
CountOrZero = Annotated[int, AtLeast(0)]
CountOrNone = Annotated[int | None, AtLeast(1)]
Positive = Annotated[float, Above(0)]
NotNegative = Annotated[float, AtLeast(0)]


def validate(config) -> None:
    """Refuse numbers outside the bounds of their fields. ``parse`` has done it; a configuration that was made in Python
    has not been looked at before.
    """
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        for bound in getattr(hint, "__metadata__", ()):
            for number in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(bound, Bound) and number is not None and (problem := bound.problem(number)):
                    raise UserError(f"{name} {problem}")


def check_shared(name: str, count: int) -> None:
    """Refuse a batch that the processes which torchrun launched cannot share evenly."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if count % world:
        raise UserError(f"{name} {count} cannot be shared evenly by {world} processes")


# ----------------------------------------------------------------------------------------------------------------------
# What stages share


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every stage's configuration begins with: where it runs, what it writes, and how often."""

    task: str = "arith"
    """Names the folder out/<task>/, in which the stages of one chain find each other."""
    out_dir: str = ""
    """The run's own folder. Default: out/<task>/<stage>."""
    data_dir: str = os.environ.get("ALIGNBOOK_DATA", "")
    """A local mirror of datasets, looked in before the hub. Default: the environment variable ALIGNBOOK_DATA."""
    eval_data: str = ""
    """Held-out data, of the same kinds as ``data``; a file is used whole. Default: the validation split of ``data``, or
    every 50th row."""
    columns: tuple[str, ...] = ()
    """The columns of your own data that have other names, as meaning=column, for example answer=final."""
    seed: Annotated[int, AtLeast(0, below=2**63)] = 0
    """The same seed on the same machine gives the same run."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: typing.Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of matrix products. auto: bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU."""
    compile: typing.Literal["auto", "on", "off"] = "auto"
    """torch.compile for the blocks of the model, in pretraining and SFT (the shapes of the other stages change from
    step to step, so they stay eager). auto: where the run is long enough to pay for the warm-up."""
    log_every: Count = 10
    """Steps between two rows of metrics.jsonl; PPO, GRPO and GDPO write one for every step."""
    save_every: Count = 200
    """Steps between two checkpoints; the last step is always saved."""
    keep_last: Count = 1
    """With more than 1, also keep this many of the last checkpoints, as ckpt_<step>.pt."""
    track: typing.Literal["none", "tensorboard", "wandb"] = "none"
    """Send the metrics there too (WANDB_MODE=offline works without a network)."""
    profile_steps: CountOrZero = 0
    """Write a torch.profiler trace of this many steps to trace.json (0: none)."""
    fresh: bool = False
    """Start again even if the folder holds a run: that one is moved aside, not deleted."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(RunConfig):
    """What every stage that trains has besides. A stage sets its own defaults where these do not suit it."""

    lr: NotNegative = 1e-3
    """Peak learning rate."""
    final_lr: Annotated[float, AtLeast(0, below=100)] = 0.1
    """Final learning rate, as a fraction of the peak."""
    warmup: CountOrZero = 10
    """Linear warm-up of the learning rate, in steps."""
    weight_decay: NotNegative = 0.0
    """Weight decay of the matrices; vectors are not decayed."""
    max_grad_norm: Positive = 1.0
    """Maximum gradient norm."""
    micro_batch_size: CountOrZero = 0
    """Rows of the batch that each process takes at a time; gradients accumulate (0: all at once)."""
    activation_checkpointing: bool = False
    """Recompute blocks in the backward pass: less memory, a third more work."""
    eval_every: Count = 50
    """Steps between two evaluations on held-out data."""


# Fields in which the same run may differ from one start to the next: they change what is written, not what is computed.
FREE_FIELDS = {"out_dir", "data_dir", "log_every", "save_every", "keep_last", "track", "profile_steps", "fresh"}


# ----------------------------------------------------------------------------------------------------------------------
# From a preset and a command line to a configuration


def parse(config_class, argv: list[str] | None = None):
    """The configuration for a command line: ``[preset.py] [--field value ...]``. Positional fields of the class
    follow the preset. With ``--help`` or ``--print_config`` the program ends here.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    wanted = {word.replace("-", "_") for word in argv}
    config, origins = read(config_class, [word for word in argv if word.replace("-", "_") != PRINT_CONFIG])
    if PRINT_CONFIG in wanted:
        print(table(config, origins))
        raise SystemExit(0)
    return config


PRINT_CONFIG = "__print_config"  # as it is compared: a flag may be written with hyphens


def read(config_class, argv: list[str], example: bool = False, stage: bool = False) -> tuple:
    """(the configuration for a command line, where the values come from that are no defaults, by field). ``example``
    and ``stage`` say what ``--help``, which ends the program, has to mention."""
    preset = argv[0] if argv and argv[0].endswith(".py") else ""
    argv = argv[bool(preset) :]
    values = read_preset(config_class, preset) if preset else {}
    given = _check_arguments(config_class, argv)
    default = config_class(**values)
    if {"-h", "--help"} & set(argv):
        print_help(default, example, stage)
        raise SystemExit(0)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            config = tyro.cli(config_class, args=argv, default=default)
    except SystemExit:  # of a value that is missing, say, tyro speaks in a box
        lines = [line.strip("│╭╮─- ") for line in said.getvalue().splitlines()]
        raise UserError("; ".join([line for line in lines if line][:2]) or "see --help") from None
    validate(config)
    return config, dict.fromkeys(values, preset) | dict.fromkeys(given, "command line")


def read_preset(config_class, path: str) -> dict:
    """The names a preset file assigns, checked against the fields of the class and their types. If it defines public
    functions and the class has a field ``reward`` that it does not assign, they are the rewards: its path is the value.
    """
    if not Path(path).is_file():
        near = difflib.get_close_matches(path, [str(p) for p in Path(path).parent.glob("*.py")], 1, 0.5)
        raise UserError(f"there is no preset {path}" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{path} does not run: {type(error).__name__}: {why}") from None
    hints = typing.get_type_hints(config_class)
    values = {}
    for name, value in names.items():
        if name.startswith("_") or isinstance(value, ModuleType) or callable(value):
            continue
        if name not in hints:
            raise UserError(f"{path}: {_unknown(name, list(hints), config_class)}")
        if not fits(value, hints[name]):
            raise UserError(f"{path}: {name} = {value!r} is not {_describe(hints[name])}")
        values[name] = tuple(value) if isinstance(value, list) else value
    if "reward" in hints and "reward" not in values and any(is_reward(*one, path) for one in names.items()):
        values["reward"] = path
    return values


def is_reward(name: str, value, path: str) -> bool:
    """Is ``name = value`` a public function that the file ``path`` itself defines? Such are rewards (verify.py)."""
    return (
        isinstance(value, FunctionType)
        and inspect.unwrap(value).__code__.co_filename == path
        and not name.startswith("_")
    )


def fits(value, hint) -> bool:
    """Is ``value`` of the annotated type? An int is a float too; a bool is not an int."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return fits(value, inside[0])
    if origin in (typing.Union, UnionType):
        return any(fits(value, choice) for choice in inside)
    if origin is typing.Literal:
        return value in inside
    if origin is tuple:
        return isinstance(value, (tuple, list)) and all(fits(v, inside[0]) for v in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint) -> str:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, inside))
    if origin in (typing.Union, UnionType):
        return " or ".join(_describe(choice) for choice in inside)
    if origin is tuple:
        return f"a list of {_describe(inside[0])}"
    return {float: "a number", int: "a whole number", str: "a text", bool: "True or False", type(None): "None"}.get(
        hint, str(hint)
    )


COUNTS_EPOCHS = "this stage counts epochs, passes over its data: use --epochs"
COUNTS_STEPS = "this stage counts steps: use --steps"
# Names that a user may try, and which fields have their place in a stage without them, with a word on why where these
# are not the same under another name.
ELSEWHERE = {
    "steps": {"epochs": COUNTS_EPOCHS},
    "max_steps": {"steps": "", "epochs": COUNTS_EPOCHS},
    "epochs": {"steps": COUNTS_STEPS},
    "num_train_epochs": {"epochs": "", "steps": COUNTS_STEPS},
    "learning_rate": {"lr": ""},
    "model": {"init_from": ""},
    "output_dir": {"out_dir": ""},
    "num_generations": {"group_size": ""},
    "max_completion_length": {"max_new_tokens": ""},
    "per_device_train_batch_size": {"micro_batch_size": ""},
}


def _unknown(name: str, fields: list[str], config_class) -> str:
    near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "--help lists them"
    for other, why in ELSEWHERE.get(name, {}).items():
        if other in fields:
            hint = why or f"here it is called {other}"
            break
    stage = config_class.__module__ if config_class.__module__ != "__main__" else Path(sys.argv[0]).stem
    return f"no field {name!r} in the {stage} configuration; {hint}"


def _check_arguments(config_class, argv: list[str]) -> set[str]:
    """tyro explains an error in a box of many lines; we look first, argument by argument. Returns the fields given."""
    hints = {f.name: typing.get_type_hints(config_class)[f.name] for f in dataclasses.fields(config_class)}
    full = typing.get_type_hints(config_class, include_extras=True)
    positional = [name for name in hints if "Positional" in repr(full[name])]
    room = len(argv) if any(typing.get_origin(hints[name]) is tuple for name in positional) else len(positional)
    i, named = 0, set()
    while i < len(argv):
        word = argv[i]
        i += 1
        if word in ("-h", "--help"):
            continue
        if not word.startswith("--"):
            room -= 1
            if room < 0 or word.startswith("-"):
                raise UserError(f"{word!r} belongs to no field: a preset comes first, a value after its --field")
            named.update(positional)
            continue
        flag, _, given = word[2:].partition("=")
        name = flag.replace("-", "_")
        negated = name.startswith("no_") and hints.get(name[3:]) is bool
        if name not in hints and not negated:
            raise UserError(_unknown(name, list(hints), config_class))
        named.add(name[3:] if negated else name)
        if negated or hints[name] is bool:
            if given or (i < len(argv) and argv[i].lower() in ("true", "false")):
                raise UserError(f"--{name} is a switch: write --{name} or --no-{name}")
            continue
        values = [given] if given else []
        while not given and i < len(argv) and not _is_flag(argv[i], hints):
            values.append(argv[i])
            i += 1
            if not any(typing.get_origin(h) is tuple for h in (hints[name], *typing.get_args(hints[name]))):
                break
        if not values:
            raise UserError(f"--{name} needs a value: {_describe(hints[name])}")
        for value in values:
            if not _reads(value, hints[name]):
                raise UserError(f"--{name} {value}: not {_describe(hints[name])}")
    return named


def _is_flag(word: str, hints: dict) -> bool:
    if not word.startswith("-"):
        return False
    try:
        float(word)  # -0.5 is a value
        return False
    except ValueError:
        return word.startswith("--") or word == "-h"


def _reads(text: str, hint) -> bool:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, UnionType):
        return any(_reads(text, choice) for choice in inside)
    if origin is typing.Literal:
        return text in map(str, inside)
    if origin is tuple:
        return _reads(text, inside[0])
    if hint is type(None):
        return text == "None"
    if hint in (int, float):
        try:
            hint(text)
            return True
        except ValueError:
            return False
    return True


def as_dict(config) -> dict:
    return dataclasses.asdict(config)


def run_stage(main, config_class, example=None) -> None:
    """A stage as a command: ``main`` on the configuration that the command line asks for. With ``--example`` and
    nothing else, the worked example that ``example()`` prints; with ``--print_config``, ``main`` only until the run
    would open its folder, which prints what it would do instead (runtime/preview.py). Errors end as in ``run_main``.
    """
    argv = sys.argv[1:]
    words = [word for word in argv if word.replace("-", "_") != PRINT_CONFIG]

    def run():
        config, origins = read(config_class, words, example is not None, stage=True)
        with rehearsal.of(config, origins) if len(words) < len(argv) else contextlib.nullcontext():
            main(config)

    run_main(example if example is not None and argv == ["--example"] else run)
