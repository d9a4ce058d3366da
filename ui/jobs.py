"""The queue: stages as processes of their own, as many at a time as there are cores for.

A job is a list of words, handed to the system as it is: no shell reads it. What is known about it stands in
``.panel/`` of the folder of runs, so the queue survives the panel, and so do its processes. One that is to stop gets
what Ctrl-C sends: the stage finishes its step, saves and ends, and the same words go on from there.

Such a folder may come from somebody else, and what stands in it is not what this user has asked for. So nothing that
was read from there starts by itself, and what is to go on may do nothing but train in the folder of runs.
"""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from runtime.checkpoint import load_checkpoint, write_text
from runtime.errors import UserError
from runtime.lock import NAME as LOCK
from runtime.lock import hold, is_held
from ui.folder import OWN, inside, plain_file, tail
from ui.forms import STAGES, check_words

ROOT = Path(__file__).resolve().parent.parent
WAITING, RUNNING, STOPPING, FINISHED, STOPPED, FAILED = (
    "waiting",
    "running",
    "stopping",
    "finished",
    "stopped",
    "failed",
)
OPEN = (WAITING, RUNNING, STOPPING)
WORDS = 500  # of a command, at most


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Job:
    number: int
    script: str  # the file of the stage, in the repository's root
    words: list[str]  # what follows it on the command line
    folder: str  # where it writes, below the folder of runs
    needs: list[str] = field(default_factory=list)  # the runs that it starts from, below the folder of runs
    state: str = WAITING
    pid: int = 0
    born: str = ""  # when the process began, so that another one with its number is not taken for it
    threads: int = 1
    told: str = ""  # why it waits, or how it ended
    added: float = 0.0

    def command(self) -> str:
        """As it would be typed in the repository's root."""
        return shlex.join(["python", self.script, *self.words])


def checked(values) -> Job | None:
    """A job as it was written; None if it is none."""
    if not isinstance(values, dict):
        return None
    try:
        job = Job(**values)
    except TypeError:
        return None
    if not isinstance(job.words, list) or not isinstance(job.needs, list):
        return None
    texts = [job.script, job.folder, job.state, job.born, job.told, *job.words, *job.needs]
    right = all(isinstance(text, str) and "\0" not in text for text in texts)
    right = right and all(isinstance(n, int) and not isinstance(n, bool) for n in (job.number, job.pid, job.threads))
    known = right and re.fullmatch(r"\w+\.py", job.script) and len(job.words) <= WORDS
    return job if known and job.state in (*OPEN, FINISHED, STOPPED, FAILED) else None


def born(pid: int) -> str:
    """When a process began, in the system's words; empty if there is none, or only what is left of it."""
    if pid <= 1:
        return ""
    try:
        after = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return "" if after[0] in "ZX" else after[19]
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return ""
    done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
    return done.stdout.strip()


HINTS = ("talk to it:", "--quick:")  # lines of the pipeline for the terminal: the panel has pages that say the same


def spoken(text: str) -> list[str]:
    """The lines of an output that say something: without progress bars and without hints for the terminal.

    >>> spoken("stage 2 of 3: SFT\\n  greedy:  40%|####      | 2/5\\n\\ntalk to it: python chat.py")
    ['stage 2 of 3: SFT']
    """
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not re.search(r"\d+%\|", line) and not line.startswith(HINTS)]


def stage_in(lines: list[str]) -> str:
    """Which stage of how many the pipeline is at, as it last said; empty if it has not.

    >>> stage_in(["stage 1 of 3: Base, finished: accuracy 0.1", "stage 2 of 3: SFT, about 2 min left", "more"])
    'stage 2 of 3'
    """
    found = [match[0] for line in lines if (match := re.search(r"\bstage \d+ of \d+(?=:)", line))]
    return found[-1] if found else ""


def had_nothing_to_do(script: str, lines: list[str]) -> bool:
    """Whether everything that a command would have made was there already.

    >>> had_nothing_to_do("pipeline.py", ["3 stages, 3 of them finished, nothing to do"])
    True
    """
    said = r", nothing to do$" if script == "pipeline.py" else r" is finished \(\d+ steps\); --fresh"
    return any(re.search(said, line) for line in lines)


def _not_through_a_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


class Queue:
    """The jobs of one folder of runs. A thread looks after them while the panel runs."""

    def __init__(self, root: Path, at_once: int = 0):
        self.root, self.home = root.resolve(), root.resolve() / OWN
        self.at_once = at_once or min(2, cores())
        self._children: dict[int, subprocess.Popen] = {}  # by the number of the job
        self._mine: set[int] = set()  # the jobs that were added here, and not read
        self._busy = threading.RLock()
        self._jobs: dict[int, Job] = {}
        self._read()

    def _read(self) -> None:
        for path in self.home.glob("*.json") if self.home.is_dir() and not self.home.is_symlink() else ():
            if plain_file(path) is not None:
                with contextlib.suppress(OSError, ValueError, RecursionError):
                    job = checked(json.loads(path.read_bytes()[: 1 << 20]))
                    if job is not None and path.stem == f"{job.number:05d}" and self._is_ours(job):
                        if job.state == WAITING:
                            job.state, job.told = STOPPED, "the panel ended before its turn"
                        self._jobs[job.number] = job

    def _is_ours(self, job: Job) -> bool:
        """Whether a job that was read is one of a stage, about folders below the folder of runs."""
        with contextlib.suppress(UserError):
            for folder in (job.folder, *job.needs):
                inside(self.root, folder)
            return job.script.removesuffix(".py") in STAGES
        return False

    def leads(self) -> bool:
        """Whether this panel looks after the queue: of two panels of a folder the first one does."""
        if self.home.is_symlink() or (self.home / LOCK).is_symlink():
            return False
        with contextlib.suppress(UserError):
            hold(self.home)
            return True
        return False

    def _write(self, job: Job) -> None:
        if self.home.is_symlink():
            raise UserError(f"{self.home} is a link: the panel writes nothing there")
        self.home.mkdir(parents=True, exist_ok=True)
        write_text(self.home / f"{job.number:05d}.json", json.dumps(dataclasses.asdict(job), indent=1) + "\n")

    def jobs(self) -> list[Job]:
        """All jobs, the newest first, as they are now."""
        with self._busy:
            self.tick()
            return [dataclasses.replace(self._jobs[number]) for number in sorted(self._jobs, reverse=True)]

    def add(self, script: str, words: list[str], folder: str, needs: list[str] = ()) -> Job:
        """Put a stage into the queue. UserError: its folder lies outside the folder of runs, or is in use."""
        with self._busy:
            if script.removesuffix(".py") not in STAGES or not (ROOT / script).is_file():
                raise UserError(f"{script!r} is no stage")
            if self.home.is_symlink():
                raise UserError(f"{self.home} is a link: the panel writes nothing there")
            if not self.leads():
                raise UserError(f"another panel looks after {self.root}: use that one, or end it")
            place = inside(self.root, folder)
            if place == self.root or OWN in place.relative_to(self.root).parts:
                raise UserError(f"{folder!r} is no folder for a run")
            folder = str(place.relative_to(self.root))
            for other in self._jobs.values():
                if other.state in OPEN and other.folder == folder:
                    raise UserError(f"{folder} is already in the queue, as job {other.number}")
            if is_held(place):
                raise UserError(f"{folder} is in use by a run that was started elsewhere")
            needs = [str(inside(self.root, need).relative_to(self.root)) for need in needs]
            job = Job(max(self._jobs, default=0) + 1, script, list(words), folder, needs, added=time.time())
            if checked(dataclasses.asdict(job)) is None:
                raise UserError(
                    "this is no command that could be started: a word of it holds a zero byte, or it is too long"
                )
            self._write(job)
            self._jobs[job.number] = job
            self._mine.add(job.number)
            self.tick()
            return dataclasses.replace(job)

    def stop(self, number: int) -> None:
        """As Ctrl-C: a stage that runs finishes its step and saves; one that waits leaves the queue."""
        with self._busy:
            job = self._known(number)
            if job.state == WAITING:
                job.state, job.told = STOPPED, "taken out of the queue"
            elif job.state in (RUNNING, STOPPING) and job.born and born(job.pid) == job.born:
                os.kill(job.pid, signal.SIGINT)
                job.state, job.told = STOPPING, "it finishes its step and saves"
            self._write(job)

    def go_on(self, number: int) -> Job:
        """The same words once more: a stage that was stopped goes on from its checkpoint."""
        with self._busy:
            old = self._known(number)
            words = [word for word in old.words if word != "--fresh"]
            if number not in self._mine:
                check_words(self.root, old.script, words)
            return self.add(old.script, words, old.folder, old.needs)

    def _known(self, number: int) -> Job:
        if number not in self._jobs:
            raise UserError(f"job {number} is not in the list any more")
        return self._jobs[number]

    def forget(self, number: int) -> None:
        """Take an ended job out of the list. What its run has written stays."""
        with self._busy:
            if number in self._jobs and self._jobs[number].state not in OPEN:
                del self._jobs[number]
                for ending in ("json", "log"):
                    (self.home / f"{number:05d}.{ending}").unlink(missing_ok=True)

    def log(self, number: int, most: int = 8000) -> str:
        """The end of what a job has printed, as a terminal would show it."""
        text = tail(self.home / f"{number:05d}.log", most)
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
        return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")).strip("\n")

    # ------------------------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Look after the queue from now on, in a thread."""

        def forever() -> None:
            while True:
                with contextlib.suppress(OSError, UserError):
                    self.tick()
                time.sleep(0.5)

        threading.Thread(target=forever, daemon=True, name="queue").start()

    def tick(self) -> None:
        """See which jobs have ended, and start those whose turn it is. On a full disk what is known stays known, and is
        written down with the next change.
        """
        with self._busy:
            for job in self._jobs.values():
                if job.state in (RUNNING, STOPPING):
                    with contextlib.suppress(OSError, UserError):
                        self._look(job)
            for number in sorted(self._jobs):
                job = self._jobs[number]
                if job.state == WAITING:
                    self._start_if_it_can(job)

    def _look(self, job: Job) -> None:
        child = self._children.get(job.number)
        status = child.poll() if child is not None else None
        if child is not None and status is None:
            return
        if child is None and job.born and born(job.pid) == job.born:
            return  # a process of an earlier panel
        self._children.pop(job.number, None)
        lines = spoken(self.log(job.number, 20_000))
        last = lines[-1][:300] if lines else ""
        if had_nothing_to_do(job.script, lines):
            last = "it had nothing to do: all of it was finished before"
        if status == 0 or (child is None and self._is_finished(job)):
            job.state, job.told = FINISHED, last
        elif job.state == STOPPING or status == 130:
            job.state, job.told = (
                STOPPED,
                "saved; it can go on" if self._has_saved(job) else "stopped before it had saved",
            )
        else:
            error = next((line for line in reversed(lines) if line.startswith("error:")), "")
            killed = f"killed by signal {-status}" if status is not None and status < 0 else "it has ended"
            saved = "; it can go on from its last checkpoint" if self._has_saved(job) else ""
            job.state, job.told = FAILED, error.removeprefix("error: ")[:300] or f"{killed}{saved}"
        self._write(job)

    def _is_finished(self, job: Job) -> bool:
        if job.script == "pipeline.py":  # its last line
            return "\ntalk to it:" in self.log(job.number)
        try:
            return bool(load_checkpoint(self.root / job.folder, mmap=True).get("finished"))
        except UserError:
            return False

    def _has_saved(self, job: Job) -> bool:
        place = self.root / job.folder
        return (place / "ckpt.pt").exists() or any(place.glob("*/ckpt.pt"))

    def _start_if_it_can(self, job: Job) -> None:
        running = [one for one in self._jobs.values() if one.state in (RUNNING, STOPPING)]
        makers = {one.folder: one for one in self._jobs.values() if one.state in OPEN and one is not job}
        waits = next((need for need in job.needs if self._maker(makers, need) is not None), None)
        told = f"waits for {waits}" if waits else "waits for its turn" if len(running) >= self.at_once else ""
        if told:
            job.told = told
            return
        job.threads = max(1, cores() // self.at_once)
        environment = os.environ | {"OMP_NUM_THREADS": str(job.threads), "PYTHONUNBUFFERED": "1", "COLUMNS": "110"}
        try:
            self._write(dataclasses.replace(job, state=RUNNING))  # before it runs: it must not be started a second time
            with open(self.home / f"{job.number:05d}.log", "wb", opener=_not_through_a_link) as log:
                child = subprocess.Popen(
                    [sys.executable, str(ROOT / job.script), *job.words], cwd=ROOT, env=environment,
                    stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
        except (OSError, UserError) as error:
            job.state, job.told = FAILED, f"it could not be started: {getattr(error, 'strerror', None) or error}"
        else:
            self._children[job.number] = child
            job.state, job.pid, job.born, job.told = RUNNING, child.pid, born(child.pid), ""
        with contextlib.suppress(OSError, UserError):
            self._write(job)

    @staticmethod
    def _maker(makers: dict[str, Job], need: str) -> Job | None:
        """The open job that makes a run, or the folder that it will lie in."""
        return next((job for folder, job in makers.items() if folder == need or need.startswith(folder + os.sep)), None)
