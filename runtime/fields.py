"""A configuration's fields as a user meets them: in the groups that its classes make, each with its text, its value
and where the value comes from. ``--help`` and ``--print_config`` (runtime/config.py) are printed here.
"""

import ast
import contextlib
import dataclasses
import inspect
import io
import sys
import textwrap
import typing
from collections.abc import Mapping
from pathlib import Path

import tyro

EXAMPLE = "Print a worked example with numbers, and stop."
PRINT = "Print every field, its value and where it comes from, and stop."
PRINT_RUN = (
    "Print what would run, and stop: every field, its value and where it comes from; the run's folder, its start, the "
    "model's size, the memory and the time. No data and no weights are loaded, and nothing is written."
)


def groups_of(config_class) -> dict[type, list[str]]:
    """The fields by the class that introduces them: the stage's own first, then those of the classes it builds on.

    A stage that only sets another default leaves the field where it was.
    """
    classes = [cls for cls in config_class.__mro__ if dataclasses.is_dataclass(cls)]
    home = {name: cls for cls in classes for name in inspect.get_annotations(cls)}  # the last in line had it first
    names = [field.name for field in dataclasses.fields(config_class)]
    groups = {cls: [name for name in names if home[name] is cls] for cls in classes}
    return {cls: found for cls, found in groups.items() if found}


def texts_of(config_class) -> dict[str, str]:
    """The strings that stand under the fields, in the class and those it builds on; the nearest one counts."""
    texts = {}
    for cls in reversed(config_class.__mro__[:-1]):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        except (OSError, TypeError, SyntaxError):  # a class without a file
            continue
        for field, text in zip(body, body[1:]):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts


def program_of(config_class) -> str:
    """How the user calls the program that has this configuration, without ``python``."""
    if config_class.__module__ != "__main__":
        return config_class.__module__.replace(".", "/") + ".py"
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"-m {spec.name}" if spec is not None else sys.argv[0]


def title(cls) -> str:
    """The name of a group: a chapter's own fields go by its file."""
    return Path(program_of(cls)).name if cls.__name__ == "Config" else cls.__name__


def first_line(text: str | None) -> str:
    return inspect.cleandoc(text or "").partition("\n")[0]


# ----------------------------------------------------------------------------------------------------------------------
# --help


def print_help(default, example: bool = False, stage: bool = False) -> None:
    """What the program is for, how to call it, and all fields in their groups, with the values of ``default``."""
    cls, bare = type(default), tyro.conf.arg(help_behavior_hint="")
    texts, hints = texts_of(cls), typing.get_type_hints(cls, include_extras=True)
    members = []  # of a dataclass of dataclasses, as which tyro makes groups
    for name, text in {"example": EXAMPLE if example else "", "print_config": PRINT_RUN if stage else PRINT}.items():
        if text:
            switch = typing.Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help=text), bare]
            members.append((name, switch, dataclasses.field(default=False)))
    for i, (group, names) in enumerate(groups_of(cls).items()):
        inside = []
        for name in names:
            told = typing.Annotated[hints[name], tyro.conf.arg(help=texts.get(name, ""))]
            inside.append((name, told, dataclasses.field(default=getattr(default, name))))
        part = dataclasses.make_dataclass(group.__name__, inside)
        about = first_line(group.__doc__)
        about = "" if about.startswith(f"{group.__name__}(") else about  # what dataclass writes where there is none
        named = typing.Annotated[part, tyro.conf.arg(name=title(group), help=about)]
        members.append((f"group_{i}", named, dataclasses.field(default_factory=part)))
    everything = dataclasses.make_dataclass("Everything", members)

    printed = _Printed()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        about = first_line(sys.modules[cls.__module__].__doc__)
        flat = (tyro.conf.OmitArgPrefixes,)
        tyro.cli(everything, args=["--help"], description=about, config=flat, use_underscores=True)
    positional = [name for name in hints if "Positional" in repr(hints[name])]
    print(usage(program_of(cls), positional, example))
    print(printed.getvalue().partition("\n")[2].rstrip("\n"))  # without tyro's usage, which knows of no preset


def usage(program: str, positional: list[str], example: bool) -> str:
    """
    >>> print(usage("sft.py", [], example=True))
    usage: python sft.py [PRESET.py] [--field VALUE ...]
           python sft.py --example
    """
    words = ["[PRESET.py]", *(f"[{name.upper()}]" for name in positional), "[--field VALUE ...]"]
    lines = [f"usage: python {program} {' '.join(words)}"]
    return "\n".join([*lines, f"       python {program} --example"] if example else lines)


class _Printed(io.StringIO):
    """What would have been printed, made for where it will be: with colours if that is a terminal."""

    def __init__(self):
        super().__init__()
        self.isatty, self.terminal_encoding = sys.stdout.isatty, sys.stdout.encoding

    @property
    def encoding(self):
        return self.terminal_encoding


# ----------------------------------------------------------------------------------------------------------------------
# --print_config


def table(config, origins: Mapping[str, str]) -> str:
    """Every field, its value, and where that comes from; "default" if ``origins`` does not say."""
    rows, shown = [], {name: show(value) for name, value in vars(config).items()}
    wide, long = max(map(len, shown), default=0), min(32, max(map(len, shown.values()), default=0))
    for cls, names in groups_of(type(config)).items():
        rows.append(title(cls))
        rows += [f"  {name:{wide}}  {shown[name]:{long}}  {origins.get(name, 'default')}" for name in names]
    return "\n".join(rows)


def show(value) -> str:
    """A value as it would be typed.

    >>> show((0.5, 2.0)), show(""), show("arith"), show(None)
    ('0.5 2.0', "''", 'arith', 'None')
    """
    if isinstance(value, (tuple, list)):
        return " ".join(map(show, value)) or "()"
    return str(value) if value != "" else "''"
