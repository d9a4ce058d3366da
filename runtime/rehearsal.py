"""Whether this program only shows what it would do: ``--print_config``.

A rehearsal goes the stage's own way up to the point where a run opens its folder: what the stage refuses is refused,
and what it fills in is filled in. There ``start`` (runtime/run.py) prints what would follow, and ends the program.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Rehearsal:
    config: Any  # as the command line has it
    origins: dict[str, str]  # where the values come from that are no defaults, by field
    starts: dict[str, str] = field(default_factory=dict)  # the checkpoints that are needed, and what makes each


now: Rehearsal | None = None


@contextlib.contextmanager
def of(config, origins: dict[str, str]) -> Iterator[None]:
    """Inside, the program only rehearses."""
    global now
    now = Rehearsal(config, origins)
    try:
        yield
    finally:
        now = None
