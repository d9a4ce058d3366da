"""A stage's configuration: defaults in a frozen dataclass, a preset file of plain Python, and command-line overrides,
in this order.

    python sft.py configs/sft_gsm8k.py --lr 1e-5

Everything that can be wrong is found before anything is loaded and is said in one line, with the nearest valid name.
"""

import dataclasses
import difflib
import os
import runpy
import sys
import typing
from pathlib import Path
from types import ModuleType, UnionType

import tyro

from runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every stage's configuration begins with: where it runs, what it writes, and how often."""

    task: str = "arith"
    """Names the folder out/<task>/, in which the stages of one chain find each other."""
    out_dir: str = ""
    """The run's own folder. Default: out/<task>/<stage>."""
    data_dir: str = os.environ.get("ALIGNBOOK_DATA", "")
    """A local mirror of datasets, looked in before the hub. Default: the environment variable ALIGNBOOK_DATA."""
    seed: int = 0
    """The same seed on the same machine gives the same run."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: typing.Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of matrix products. auto: bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU."""
    compile: typing.Literal["auto", "on", "off"] = "auto"
    """torch.compile for the blocks of the model, in pretraining and SFT (the shapes of the other stages change from
    step to step, so they stay eager). auto: where the run is long enough to pay for the warm-up."""
    log_every: int = 10
    """Steps between two rows of metrics.jsonl; PPO, GRPO and GDPO write one for every step."""
    save_every: int = 200
    """Steps between two checkpoints; the last step is always saved."""
    keep_last: int = 1
    """With more than 1, also keep ckpt_<step>.pt of the last so many checkpoints."""
    track: typing.Literal["none", "tensorboard", "wandb"] = "none"
    """Send the metrics there too (WANDB_MODE=offline works without a network)."""
    profile_steps: int = 0
    """Write a torch.profiler trace of so many steps to trace.json."""
    fresh: bool = False
    """Start again although the folder holds a run: that one is moved aside, not deleted."""


# Fields in which the same run may differ from one start to the next: they change what is written, not what is computed.
FREE_FIELDS = {"out_dir", "data_dir", "log_every", "save_every", "keep_last", "track", "profile_steps", "fresh"}


def parse(config_class, argv: list[str] | None = None):
    """The configuration for a command line: ``[preset.py] [--field value ...]``. Positional fields of the class
    follow the preset.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    values = read_preset(config_class, argv.pop(0)) if argv and argv[0].endswith(".py") else {}
    _check_arguments(config_class, argv)
    return tyro.cli(config_class, args=argv, default=config_class(**values))


def read_preset(config_class, path: str) -> dict:
    """The names a preset file assigns, checked against the fields of the class and their types."""
    if not Path(path).is_file():
        near = difflib.get_close_matches(path, [str(p) for p in Path(path).parent.glob("*.py")], 1, 0.5)
        raise UserError(f"there is no preset {path}" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        names = runpy.run_path(path)
    except Exception as error:
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
    return values


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


def _unknown(name: str, fields: list[str], config_class) -> str:
    near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "--help lists them"
    stage = config_class.__module__ if config_class.__module__ != "__main__" else Path(sys.argv[0]).stem
    return f"no field {name!r} in the {stage} configuration; {hint}"


def _check_arguments(config_class, argv: list[str]) -> None:
    """tyro explains an error in a box of many lines; we look first, argument by argument."""
    hints = {f.name: typing.get_type_hints(config_class)[f.name] for f in dataclasses.fields(config_class)}
    full = typing.get_type_hints(config_class, include_extras=True)
    positional = [name for name in hints if "Positional" in repr(full[name])]
    room = len(argv) if any(typing.get_origin(hints[name]) is tuple for name in positional) else len(positional)
    i = 0
    while i < len(argv):
        word = argv[i]
        i += 1
        if word in ("-h", "--help"):
            continue
        if not word.startswith("--"):
            room -= 1
            if room < 0 or word.startswith("-"):
                raise UserError(f"{word!r} belongs to no field: a preset comes first, a value after its --field")
            continue
        flag, _, given = word[2:].partition("=")
        name = flag.replace("-", "_")
        negated = name.startswith("no_") and hints.get(name[3:]) is bool
        if name not in hints and not negated:
            raise UserError(_unknown(name, list(hints), config_class))
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


def at_least(config, **least) -> None:
    """Refuse numbers below what makes sense: ``at_least(config, steps=1, beta=0.0)``."""
    for name, low in least.items():
        value = getattr(config, name)
        if value is not None and not value >= low:  # NaN too
            raise UserError(f"{name} is {value}: at least {low}")


def as_dict(config) -> dict:
    return dataclasses.asdict(config)
