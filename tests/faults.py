"""What a campaign of faults is made of: a run as a forked process, how it ends, and writings that fail."""

import builtins
import contextlib
import errno
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.errors import run_main


@dataclass(frozen=True)
class End:
    """How a process ended: its exit status, or minus the signal that ended it; None if its time was over."""

    code: int | None
    said: str

    def fault(self, may_finish: bool = True) -> str:
        """What is wrong with this end, for a run that met a fault: it should refuse in one line."""
        errors = [line for line in self.said.splitlines() if line.startswith("error: ")]
        if self.code is None:
            return "hangs"
        if "Traceback" in self.said:
            return f"traceback: {' '.join(self.said.splitlines()[-6:])[-700:]}"
        if self.code == 0:
            return "" if may_finish else "ends as if all were well"
        if self.code != 1 or len(errors) != 1:
            return f"ends with {self.code}, {len(errors)} lines of error: {self.said[-300:]}"
        return ""


class Child:
    """``deed`` in a forked process, with the stages' way of ending."""

    def __init__(self, deed: Callable[[], None]):
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.pid = os.fork()
        if self.pid:
            return
        code = 70
        try:
            with open(os.devnull, "r+") as nowhere:
                os.dup2(nowhere.fileno(), 0), os.dup2(nowhere.fileno(), 1), os.dup2(self.log.fileno(), 2)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
            code = status_of(deed)
        finally:
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float) -> int | None:
        """Its exit status, or None if it is still there after so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        return None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def end(self, seconds: float) -> End:
        code = self.wait(seconds)
        if code is None:
            self.kill()
            os.waitpid(self.pid, 0)
        self.log.seek(0)
        said = self.log.read()
        self.log.close()
        return End(code, said)


def status_of(deed: Callable[[], None]) -> int:
    """Run ``deed`` as a stage's command runs; the exit status that Python would end with."""
    try:
        run_main(deed)
        return 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


def in_child(deed: Callable[[], None], seconds: float) -> End:
    return Child(deed).end(seconds)


class Writes:
    """The operations by which a process writes, counted: one of them can be where it is killed, or from where on
    the disk is full. at: which one, from 1 (0: none); fault: kill, full or memory; late: the kill comes after it.
    """

    def __init__(self, at: int = 0, fault: str = "kill", late: bool = False):
        self.at, self.fault, self.late = at, fault, late
        self.done: list[str] = []

    def install(self) -> None:
        for module, name in ((torch, "save"), (os, "fsync"), (os, "replace"), (os, "link"), (builtins, "open")):
            setattr(module, name, self.faulty(name, getattr(module, name)))

    def faulty(self, name: str, real: Callable) -> Callable:
        def operation(*args, **more):
            if name == "open" and not self.writes(args, more):
                return real(*args, **more)
            self.done.append(name)
            if self.fault != "kill" and 0 < self.at <= len(self.done):
                self.fail(name, args)
            if len(self.done) != self.at or self.fault != "kill":
                return real(*args, **more)
            if name == "save":  # half of it reaches the disk
                real(*args, **more)
                os.truncate(args[1], max(1, os.path.getsize(args[1]) // 2))
            elif self.late:
                real(*args, **more)
            os.kill(os.getpid(), signal.SIGKILL)

        return operation

    @staticmethod
    def writes(args: tuple, more: dict) -> bool:
        """Whether ``open`` is called for a file of the run that is to be written."""
        mode = more.get("mode", args[1] if len(args) > 1 else "r")
        return bool(set(mode) & set("wa+")) and isinstance(args[0], (str, Path)) and not str(args[0]).endswith(".lock")

    def fail(self, name: str, args: tuple) -> None:
        if self.fault == "memory" and name == "save":
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory")
        if self.fault == "full":
            if name == "save":
                Path(args[1]).write_bytes(b"half")
                raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
