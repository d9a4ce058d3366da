"""One process at a time in a run's folder: two runs that write there would mix what they write.

The system lets go of the lock when the process that holds it ends, however it ends: nothing is ever left locked. Where
files cannot be locked (Windows, some network file systems) nothing is held and nothing is refused.
"""

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from runtime.errors import END, UserError

NAME = ".lock"
_held: dict[str, IO] = {}  # by folder: this process may run several stages, one after the other in the same folder too


def hold(folder: Path) -> None:
    """Hold the folder, which is made if it is not there, until ``release`` or the end of this process. UserError, with
    the name of who holds it, if another process does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = os.path.realpath(folder)
    if fcntl is None or (name in _held and _is_still_there(folder, _held[name])):
        return
    _held.pop(name, None)  # of a folder of that name that was removed
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / NAME, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            _lock(file)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            file.close()
            raise UserError(
                f"{folder} is in use by {holder}: wait for it, stop it, or choose another --out_dir"
            ) from None
        except OSError:  # the file system has no locks
            file.close()
            return
        if _is_still_there(folder, file):
            break
        file.close()  # its last holder has just removed it
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held[name] = file


def _is_still_there(folder: Path, file: IO) -> bool:
    try:
        return os.path.samestat(os.stat(folder / NAME), os.fstat(file.fileno()))
    except OSError:
        return False


def _lock(file: IO) -> None:
    """Somebody who only looks whether the folder is held holds it for a moment himself: try again."""
    for _ in range(5):
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def release(folder: Path) -> None:
    """Let others into the folder."""
    if (file := _held.pop(os.path.realpath(folder), None)) is not None:
        if _is_still_there(folder, file):
            (folder / NAME).unlink()
        file.close()


def release_all() -> None:
    for name in list(_held):
        with contextlib.suppress(OSError):  # the folder, or its disk, is gone
            release(Path(name))


END.append(release_all)


def is_held(folder: Path) -> bool:
    """Whether some process of this machine works in the folder now."""
    if os.path.realpath(folder) in _held:
        return True
    try:  # a link is not followed, and a pipe is not waited for
        file = os.open(folder / NAME, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
    except OSError:  # no such file
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, AttributeError):  # no locks
        return False
    finally:
        os.close(file)
    return False
