"""An error that the user can mend is one line, not a traceback."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path


class UserError(Exception):
    """Something the user can change: a wrong name, a missing file, an impossible combination. Its text is one line."""


class RewardError(UserError):
    """A reward of the user's own failed. What the run has learned until then is saved before it ends."""


RESCUES: list[Callable[[], None]] = []  # what is done after a RewardError, before the program ends: the run saves


LEAVE: list[Callable[[], None]] = []  # what is done when any UserError ends the program: a run without results goes


TOLD: list[Callable[[], str]] = []  # what is said when Ctrl-C ends the program: of a run, what was saved


END: list[Callable[[], None]] = []  # what is done last, however the program ends: folders are let go of


def close_processes() -> None:
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def plain_warnings() -> None:
    """Warnings of the chapters are for a reader: one line, without the line of code that gave them."""
    theirs, ours = warnings.formatwarning, Path(__file__).parents[1]

    def one_line(message, category, filename, lineno, line=None):
        if Path(filename).parent in (ours, ours / "runtime"):
            return f"WARNING: {message}\n"
        return theirs(message, category, filename, lineno, line)

    warnings.formatwarning = one_line


def run_main(main) -> None:
    """Call ``main()``; a ``UserError`` becomes one line on standard error and exit status 1."""
    plain_warnings()
    try:
        main()
    except UserError as error:
        if isinstance(error, RewardError):
            for rescue in RESCUES:
                try:
                    rescue()
                except UserError as another:
                    print(f"error: {another}", file=sys.stderr)
        for leave in LEAVE:
            leave()
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted" + "".join(f"; {told()}" for told in TOLD), file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `python tokenizer.py | head` is no error
        sys.stderr.close()
    except OSError as error:  # a folder that cannot be written, a full disk
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        words = ("can't allocate memory", "not enough memory", "Invalid buffer size")  # of a CPU, of Windows, of MPS
        named = type(error).__name__ in ("OutOfMemoryError", "MemoryError")  # PyTorch's, which not every chapter loads
        if not named and not any(word in str(error) for word in words):
            raise
        print(
            "error: out of memory: lower --micro_batch_size (the result stays the same) or --batch_size",
            file=sys.stderr,
        )
        sys.exit(1)
    finally:
        for end in END:
            end()
        close_processes()
