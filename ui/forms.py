"""A stage's configuration as a form, and a filled-in form as the words of a command line.

The fields, their types, bounds, choices and texts are read off the configuration itself, so a new field is a new line
of the form. Words are checked by reading them back: they must mean exactly what the form says, or nothing is started.
"""

import ast
import dataclasses
import importlib
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from types import UnionType

from runtime.config import Bound, fits, read, read_preset, validate
from runtime.errors import UserError
from runtime.fields import first_line, groups_of, texts_of, title
from ui.folder import inside

ROOT = Path(__file__).resolve().parent.parent
STAGES = {  # the chapters that can be started, and what they do
    "pretrain": "learns text, token by token, from nothing",
    "sft": "learns to answer from examples",
    "reward": "learns which of two answers is better",
    "dpo": "learns from pairs of answers: DPO, IPO, SimPO, ORPO",
    "kto": "learns from single answers with a thumb up or down",
    "ppo": "learns from rewards, with a critic",
    "grpo": "learns from rewards, each answer against its siblings",
    "gdpo": "the same with several rewards, each compared by itself",
    "encoder": "reads in both directions: hidden words, or classes",
    "pipeline": "all of it in one command, with a report card",
}
STARTS = {"sft": "pretrain", "reward": "sft", "dpo": "sft", "kto": "sft", "ppo": "sft", "grpo": "sft", "gdpo": "sft"}
PLACES = ("out_dir", "init_from", "out")  # fields that name a folder of runs: the panel fills them in
FOLDERS = (*PLACES, "tokenizer_from", "encoder", "data_dir")  # whose values are always places
UNSHOWN = ("fresh", *PLACES)
TITLES = {"RolloutConfig": "Answers", "LoRARunConfig": "Adapters", "TrainConfig": "Training", "RunConfig": "The run"}


@dataclass(frozen=True)
class Field:
    """A line of the form."""

    name: str
    kind: str  # "switch", "choice", "whole", "number", "text" or "list"
    text: str  # what it is
    default: typing.Any
    choices: tuple = ()
    bounds: str = ""  # "at least 1"
    optional: bool = False  # may it be None?
    inner: str = "text"  # of a list, the kind of its parts


def config_of(stage: str):
    """The configuration class of a stage."""
    if stage not in STAGES:
        raise UserError(f"{stage!r} is no stage")
    return importlib.import_module(stage).Config


def groups(stage: str) -> dict[str, tuple[str, list[Field]]]:
    """The fields in their groups, the stage's own first: {title: (what the group is, fields)}."""
    cls = config_of(stage)
    hints, texts = typing.get_type_hints(cls, include_extras=True), texts_of(cls)
    defaults = cls()
    found = {}
    for group, names in groups_of(cls).items():
        about = first_line(group.__doc__)
        about = "" if about.startswith(f"{group.__name__}(") else about
        fields = [_field(name, hints[name], texts.get(name, ""), getattr(defaults, name)) for name in names]
        found[TITLES.get(group.__name__) or title(group)] = (about, [one for one in fields if one.name not in UNSHOWN])
    return {name: part for name, part in found.items() if part[1]}


def _field(name: str, hint, text: str, default) -> Field:
    bounds = ""
    if typing.get_origin(hint) is typing.Annotated:
        limits = [bound.limits for bound in hint.__metadata__ if isinstance(bound, Bound)]
        bounds = ", ".join(f"{word} {limit:g}" for one in limits for word, limit in one.items())
        hint = typing.get_args(hint)[0]
    optional, choices, inner = False, (), "text"
    if typing.get_origin(hint) in (typing.Union, UnionType):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        optional, hint = True, parts[0]
    if typing.get_origin(hint) is typing.Literal:
        kind, choices = "choice", typing.get_args(hint)
    elif typing.get_origin(hint) is tuple:
        kind, inner = "list", _kind(typing.get_args(hint)[0])
    else:
        kind = _kind(hint)
    return Field(name, kind, text, default, choices, bounds, optional, inner)


def _kind(hint) -> str:
    return {bool: "switch", int: "whole", float: "number"}.get(hint, "text")


def presets(stage: str) -> dict[str, str]:
    """The presets of a stage, by their path: what each is for."""
    found = {}
    for path in sorted((ROOT / "configs").glob(f"{stage}_*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[f"configs/{path.name}"] = " ".join(text.split())
    return found


def start_values(stage: str, preset: str = "") -> dict:
    """The values that the form begins with: the defaults, with those of the preset."""
    cls = config_of(stage)
    values = dataclasses.asdict(cls())
    if preset:
        if preset not in presets(stage):
            raise UserError(f"there is no preset {preset!r} of {stage}")
        values |= read_preset(cls, str(ROOT / preset))
    return values


# ----------------------------------------------------------------------------------------------------------------------
# From what was typed to values, and from values to words


def shown(value) -> str:
    """A value as it stands in a field of text."""
    if value is None:
        return ""
    if isinstance(value, (tuple, list)):
        return " ".join(map(shown, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def value_of(field: Field, text: str):
    """What was typed into a field of text. UserError: it is no such value."""
    if field.optional and text.strip() in ("", "None"):
        return None
    if field.kind == "list":
        return tuple(_one(field, field.inner, part) for part in text.split())
    return _one(field, field.kind, text)


def _one(field: Field, kind: str, text: str):
    if kind == "text":
        return text
    try:
        value = int(text) if kind == "whole" else float(text)
    except ValueError:
        what = "a whole number" if kind == "whole" else "a number"
        raise UserError(f"{field.name}: {text!r} is not {what}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{field.name}: {text!r} is not finite")
    return value


def words_of(stage: str, preset: str, values: dict) -> list[str]:
    """The words after the stage's file that mean these values: the preset, and every field that differs from it.

    UserError: a value is out of its bounds, values do not fit together, or no words would mean them.
    """
    cls, start = config_of(stage), start_values(stage, preset)
    words = [preset] if preset else []
    for name, value in values.items():
        if not _same(value, start[name]):
            words += _said(name, value)
    path = [str(ROOT / preset)] if preset else []
    config, _ = read(cls, path + words[len(path) :])
    for name, value in values.items():
        if not _same(getattr(config, name), value):
            raise UserError(f"{name}: {shown(value)!r} cannot be given on a command line")
    validate(config)
    module = importlib.import_module(stage)
    if hasattr(module, "check") and not getattr(config, "reward", "").endswith(".py"):  # no code of others runs here
        module.check(config)
    return words


def _same(one, other) -> bool:
    one, other = (tuple(value) if isinstance(value, list) else value for value in (one, other))
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _said(name: str, value) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, (tuple, list)):
        parts = [shown(part) for part in value]
        if not parts or any(part.startswith("--") or part == "-h" for part in parts):
            raise UserError(f"{name}: {shown(value)!r} cannot be given on a command line")
        return [f"--{name}", *parts]
    text = "None" if value is None else repr(value) if isinstance(value, float) else str(value)
    return [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]


def allowed(value, stage: str, name: str) -> bool:
    """Is the value of the field's type?"""
    return fits(value, typing.get_type_hints(config_of(stage))[name])


def words_of_run(stage: str, config: dict) -> list[str]:
    """The words that go on with a run, from the configuration that it wrote."""
    cls = config_of(stage)
    start, known = dataclasses.asdict(cls()), {field.name for field in dataclasses.fields(cls)}
    words = []
    for name, value in config.items():
        if name not in known or name == "fresh":
            continue
        value = tuple(value) if isinstance(value, list) else value
        if not allowed(value, stage, name):
            raise UserError(f"its config.json has {name} = {str(value)[:60]!r}, which this stage does not know")
        if not _same(value, start[name]):
            words += _said(name, value)
    read(cls, words)
    return words


def check_places(root: Path, config) -> None:
    """UserError: a value of a configuration that somebody else wrote names a place outside the folder of runs, or code.
    Of a value without a slash only the fields for folders, and files, are places."""
    defaults = type(config)()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        parts = [str(part) for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, str)]
        for part in (piece for text in parts for piece in text.split("+") if piece):
            if part.endswith(".py"):
                raise UserError(f"its {field.name} is a Python file: go on with it from the command line")
            named = "/" in part or "\\" in part or part[0] in ".~" or Path(part).suffix in (".jsonl", ".json", ".pt")
            if field.name in FOLDERS or (named and value != getattr(defaults, field.name)):
                inside(root, ROOT / part)


def check_words(root: Path, script: str, words: list[str]) -> None:
    """``check_places`` of a command that was read from a file: of a stage, with a preset of the book at most."""
    stage = script.removesuffix(".py")
    cls = config_of(stage)
    preset = words[:1] if words[:1] and words[0] in presets(stage) else []
    if any(word.endswith(".py") for word in words[len(preset) :]) or {"-h", "--help", "--print_config"} & {*words}:
        raise UserError("its command runs more than the stage: go on with it from the command line")
    check_places(root, read(cls, [str(ROOT / one) for one in preset] + words[len(preset) :])[0])


def script_of(stage: str) -> str:
    """The file that makes runs of a stage, without its ending.

    >>> script_of("simpo"), script_of("grpo")
    ('dpo', 'grpo')
    """
    return {"ipo": "dpo", "simpo": "dpo", "orpo": "dpo", "mlm": "encoder", "classify": "encoder"}.get(stage, stage)


def differences(stage: str, config: dict, other: dict | None = None) -> list[tuple[str, str, str]]:
    """(field, the run's value, the other's) wherever they differ; the other is the default of the stage if None."""
    other = _defaults(stage) if other is None else other
    names = list(dict.fromkeys([*config, *other]))
    plain = lambda value: tuple(value) if isinstance(value, list) else value  # noqa: E731
    return [
        (name, _cell(config, name), _cell(other, name))
        for name in names
        if plain(config.get(name)) != plain(other.get(name)) or (name in config) != (name in other)
    ]


def _defaults(stage: str) -> dict:
    script = script_of(stage)
    return dataclasses.asdict(config_of(script)()) if script in STAGES else {}


def _cell(values: dict, name: str) -> str:
    if name not in values:
        return "–"
    return "None" if values[name] is None else shown(values[name]) or "''"
