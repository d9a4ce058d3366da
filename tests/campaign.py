"""A campaign of faults: kills, signals, full disks, flipped bits, forged states, runs in one folder, hostile settings,
damaged files. test_campaign.py has a small round of each; this is the long one, of some hours on two cores::

    python tests/campaign.py --out DIR                       # everything
    python tests/campaign.py --out DIR --only kills flips    # some of its parts
    python tests/campaign.py --out DIR --table               # the table of docs/guarantees.md, of what was tried so far

Every trial is drawn from its part, its case and its number alone, and is written to DIR/results.jsonl as it ends: the
same command goes on where it stopped. A trial is well when ``wrong`` is empty; otherwise it says what was seen.

Each trial's run is a process of its own, forked from this one, which has the imports done and trains nothing itself.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import matplotlib.pyplot as plt
import torch
import torch._dynamo  # noqa: F401 - the first optimizer imports it: once here, not in each process
from faults import Child, End, Writes, in_child
from tiny import MEASURED_BY_A_CLOCK, content, rows_of, same, tiny_pretrain, tiny_sft

import dpo
import encoder
import gdpo
import grpo
import kto
import ppo
import preferences
import pretrain
import reward
import sft
from data import encode_prompts, pack
from runtime import checkpoint, plots
from runtime.checkpoint import load_checkpoint, read_archive
from runtime.config import parse
from runtime.errors import UserError
from texts import load_chats, load_prompts, text_documents
from tokenizer import ByteTokenizer

STEPS, SAVE, EVAL = 7, 3, 2  # saves and examinations at different steps: every mixture of them is resumed from
KILLS = 10  # in one trial

REWARDS = '''
def letters(prompt, answer, row):
    """A reward that an untrained policy earns now and then."""
    return answer.count("e") + 0.1 * answer.count("a")


def brief(prompt, answer, row):
    return -len(answer) / 10
'''


# ----------------------------------------------------------------------------------------------------------------------
# What is run


@dataclass(frozen=True)
class Stage:
    module: typing.Any
    config: Callable[[Path], typing.Any]


def stages(root: Path) -> dict[str, Stage]:
    """Fourteen configurations of a second or two; ``root`` holds what they start from (``prepare``)."""
    every = {"save_every": SAVE, "eval_every": EVAL}
    common = {"device": "cpu", "compile": "off", "log_every": 1, "init_from": str(root / "sft")} | every
    pairs = {"data": "arith", "n_pairs": 14, "batch_size": 4, "epochs": 2.0, "max_length": 96, "eval_pairs": 4}
    answers = {"steps": STEPS, "n_prompts": 16, "eval_prompts": 2, "max_new_tokens": 6, "lr": 2e-3}
    own = {"reward": str(root / "rewards.py")}
    groups = answers | own | {"prompts_per_step": 2, "group_size": 4, "beta": 0.05, "epochs": 2, "minibatches": 2}
    read = {"device": "cpu", "d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 48, "n_texts": 28}
    read |= {"batch_size": 4, "epochs": 1.0, "log_every": 1} | every
    base = every | {"steps": STEPS, "max_documents": 40, "vocab_size": 270, "eval_windows": 4}
    adapters = {"lora_rank": 2, "lr": 1e-2}

    def of(module, **settings):
        return Stage(module, lambda folder: module.Config(out_dir=str(folder), **settings))

    def chats(**settings):
        small = every | {"n_examples": 14, "epochs": 2.0, "packing": False}
        return Stage(sft, lambda folder: tiny_sft(folder, root / "base", **(small | settings)))

    return {
        "pretrain": Stage(pretrain, lambda folder: tiny_pretrain(folder, **base)),
        "pretrain, experts": Stage(pretrain, lambda folder: tiny_pretrain(folder, **base, n_experts=4, d_expert=16)),
        "encoder": of(encoder, **read),
        "masked words": of(encoder, **read, objective="mlm"),
        "sft": chats(),
        "sft, adapters": chats(**adapters),
        "reward": of(reward, **common, **pairs, n_sums=0, normalize_on=4, max_new_tokens=4),
        "dpo": of(dpo, **common, **pairs, eval_prompts=2),
        "orpo": of(dpo, **common, **pairs, method="orpo", eval_prompts=2),
        "kto": of(kto, **common, **(pairs | {"n_pairs": 16, "batch_size": 8}), eval_prompts=2),
        "ppo": of(ppo, **common, **answers, **own, prompts_per_step=8, minibatches=2),
        "ppo, reward model": of(ppo, **common, **answers, reward=str(root / "judge"), prompts_per_step=8),
        "grpo": of(grpo, **common, **groups, draws=2),
        "gdpo": of(gdpo, **common, **groups),
    }


def prepare(root: Path, cases: Sequence[str] | None = None) -> None:
    """What the configurations start from, and a run of each (of those in ``cases``) that nothing disturbed."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "rewards.py").write_text(REWARDS)
    every = stages(root)
    judging = every["reward"].config(root / "judge")
    made = {
        "base": Stage(pretrain, lambda folder: tiny_pretrain(folder, steps=2, max_documents=40, vocab_size=270)),
        "sft": Stage(sft, lambda folder: tiny_sft(folder, root / "base", n_examples=8, epochs=1.0)),
        "judge": Stage(reward, lambda folder: replace(judging, epochs=0.5)),
    }
    for name, stage in made.items():
        if not (root / name / "ckpt.pt").exists():
            end = in_child(lambda stage=stage, name=name: stage.module.main(stage.config(root / name)), 300)
            assert end.code == 0, end.said
    for name in cases or every:
        if not (root / "whole" / f"{name}.json").exists():
            undisturbed(every[name], root / "whole" / name)


def undisturbed(stage: Stage, folder: Path) -> None:
    """A run, and beside its folder what was counted: its writings and its seconds."""

    def run():
        writes, start = Writes(), time.perf_counter()
        running(stage, folder, writes)
        facts = {"writes": writes.done, "seconds": time.perf_counter() - start}
        folder.with_name(f"{folder.name}.json").write_text(json.dumps(facts))

    shutil.rmtree(folder, ignore_errors=True)
    end = in_child(run, 300)
    assert end.code == 0, end.said


def some_write(facts: dict, draw: random.Random) -> int:
    """The number of one of a run's writings, each kind as likely as the others."""
    kind = draw.choice(sorted(set(facts["writes"])))
    return draw.choice([i for i, name in enumerate(facts["writes"], start=1) if name == kind])


def facts_of(root: Path, case: str) -> dict:
    return json.loads((root / "whole" / f"{case}.json").read_text())


def differences(folder: Path, whole: Path, same_saves: bool = True) -> str:
    """In what a finished run differs from the one that nothing disturbed: "" if in nothing. A run that a signal made
    save has other checkpoints to choose the best from: ``same_saves=False``."""
    try:
        for name in ("ckpt.pt", "best.pt", "adapters.pt"):
            if (folder / name).exists() != (whole / name).exists():
                return f"{name} exists in one only"
            if (folder / name).exists() and (same_saves or name != "best.pt"):
                ours, theirs = (read_archive(f / name) for f in (folder, whole))
                for state in (ours, theirs):
                    state.pop("config")  # the folder
                    for key in () if same_saves else ("best", "best_step"):
                        state.pop(key, None)
                same(ours, theirs, name)
        rows = [
            [{k: v for k, v in r.items() if k not in MEASURED_BY_A_CLOCK} for r in rows_of(f)] for f in (folder, whole)
        ]
        same(*rows, "metrics.jsonl")
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == len(rows[0]), "a broken line of metrics"
        assert (folder / "samples.txt").read_text() == (whole / "samples.txt").read_text(), "samples.txt"
        if (whole / "rollouts.jsonl").exists():
            assert (folder / "rollouts.jsonl").read_text() == (whole / "rollouts.jsonl").read_text(), "rollouts.jsonl"
        left = [path.name for path in folder.iterdir() if path.name.endswith(".tmp") or path.name == ".lock"]
        assert not left, f"left behind: {left}"
    except (AssertionError, UserError, OSError) as error:
        return f"differs: {error}"
    return ""


# ----------------------------------------------------------------------------------------------------------------------
# A run


def small_pictures() -> None:
    """Every run ends with a picture, which takes longer than the run."""

    def save(figure, path):
        figure.set_layout_engine("none")
        checkpoint.write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=10, format="png"))
        plt.close(figure)

    plots._save = save


def running(stage: Stage, folder: Path, writes: Writes, **changes) -> None:
    small_pictures()
    writes.install()
    stage.module.main(replace(stage.config(folder), **changes))


# ----------------------------------------------------------------------------------------------------------------------
# The parts. Each takes (root, case, number of the trial, its draws, an empty folder) and returns what is written down


def kills(root: Path, case: str, n: int, draw: random.Random, folder: Path) -> dict:
    """KILLS times, at a moment drawn from the whole run, or before, in or after one writing; then on to the end."""
    stage, facts = stages(root)[case], facts_of(root, case)
    done, inside, chain, wrong = 0, 0, 0, ""
    while not wrong:
        place = folder / str(chain)
        fault = Writes()
        if done < KILLS and draw.random() < 0.5:
            fault = Writes(some_write(facts, draw), late=draw.random() < 0.5)
        child = Child(lambda place=place, fault=fault: running(stage, place, fault))
        code = child.wait(draw.uniform(0, facts["seconds"])) if done < KILLS and not fault.at else None
        if code is None and done < KILLS and not fault.at:
            child.kill()
        end = child.end(120) if code is None else End(code, "")
        if end.code == -signal.SIGKILL:
            done, inside = done + 1, inside + bool(fault.at)
            continue
        if end.code != 0:
            wrong = f"after {done} kills: {end.fault() or end.said[-300:] or end.code}"
            break
        wrong = differences(place, root / "whole" / case)
        chain += 1
        if done >= KILLS:
            break
    return {"count": done, "inside a write": inside, "wrong": wrong}


def signals(root: Path, case: str, n: int, draw: random.Random, folder: Path) -> dict:
    """SIGTERM or Ctrl-C at moments drawn from the whole run: the step is finished and saved; then to the end."""
    stage, facts = stages(root)[case], facts_of(root, case)
    sent = 0
    while sent < 4:
        child = Child(lambda: running(stage, folder / "run", Writes()))
        time.sleep(draw.uniform(0, facts["seconds"]))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, draw.choice([signal.SIGTERM, signal.SIGINT]))
        end = child.end(120)
        if end.code not in (0, 130, -signal.SIGTERM, 128 + signal.SIGTERM) or "Traceback" in end.said:
            return {"count": sent, "wrong": end.fault() or end.said[-300:]}
        sent += 1
    end = in_child(lambda: running(stage, folder / "run", Writes()), 120)
    wrong = differences(folder / "run", root / "whole" / case, same_saves=False) if end.code == 0 else end.said[-300:]
    return {"count": sent, "wrong": wrong}


def disks(root: Path, case: str, n: int, draw: random.Random, folder: Path) -> dict:
    """From one of its writings on the disk is full, or no file may grow beyond a limit, or there is no memory for the
    checkpoint: one line, nothing half-written, and the same command goes on when there is room."""
    stage, facts = stages(root)[case], facts_of(root, case)
    kind = draw.choice(["full", "full", "limit", "memory"])
    largest = max(path.stat().st_size for path in (root / "whole" / case).iterdir())
    limit, at = draw.randint(1, largest), some_write(facts, draw)

    def run():
        if kind == "limit":  # the kernel refuses to write more
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            small_pictures()
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        running(stage, folder / "run", Writes(at if kind != "limit" else 0, kind))

    first = in_child(run, 120)
    wrong = first.fault()
    left = [path.name for path in (folder / "run").glob(".*.tmp")] if (folder / "run").exists() else []
    if not wrong and left:
        wrong = f"{kind}: left behind {left}"
    if not wrong:
        end = in_child(lambda: running(stage, folder / "run", Writes()), 120)
        wrong = differences(folder / "run", root / "whole" / case) if end.code == 0 else end.said[-300:]
    return {"count": 1, "kind": kind, "refused": int(first.code == 1), "wrong": wrong and f"{kind}: {wrong}"}


def flips(root: Path, case: str, n: int, draw: random.Random, folder: Path) -> dict:
    """One bit of a checkpoint: it is refused in one line, or (a bit of the padding, or of a date) nothing changes."""
    path = root / "whole" / case / ("adapters.pt" if "adapters" in case and n % 2 else "ckpt.pt")
    want, damaged = content(read_archive(path)), bytearray(path.read_bytes())
    damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    (folder / path.name).write_bytes(damaged)
    try:
        wrong = "" if content(read_archive(folder / path.name)) == want else "accepted with other numbers"
    except UserError as error:
        return {"count": 1, "refused": 1, "wrong": "" if len(str(error).splitlines()) == 1 else str(error)}
    except Exception as error:
        wrong = f"traceback: {type(error).__name__}: {error}"
    return {"count": 1, "refused": 0, "wrong": wrong}


def forge(state: dict, draw: random.Random) -> str:
    """Change one thing of a checkpoint's state in place; what it was, in words."""
    strange = [None, -1, 0, 10**7, 2**63 - 1, 10**30, 1e308, math.nan, True, "", "x" * 10_000, b"x", [], [[]], {}]
    strange += [{"a": {}}, [None] * 5, torch.zeros(0), torch.zeros(3, dtype=torch.int8), torch.full((2, 2), math.nan)]
    kinds = ["field", "shape", "optimizer", "moment", "weight", "tokenizer", "rng", "extra"]
    kind = draw.choice(kinds)
    value = copy.deepcopy(draw.choice(strange))
    if kind == "field":
        name = draw.choice(sorted(state))
        state[name] = value
    elif kind == "shape":
        name = draw.choice(sorted(state["model_config"]))
        state["model_config"][name] = draw.choice([10**7, 2**31, 10**12, 2**62, 3, value])
        kind, value = f"model_config.{name}", state["model_config"][name]
        name = ""
    elif kind in ("optimizer", "moment") and state.get("optimizers"):
        optimizer = draw.choice(state["optimizers"])
        number = draw.choice(sorted(optimizer["state"]) or [0])
        if kind == "optimizer" or not optimizer["state"]:
            name = draw.choice(["state", "param_groups"])
            optimizer[name] = draw.choice(
                [value, optimizer[name] * 2 if isinstance(optimizer[name], list) else {7: {}}]
            )
        else:
            name = draw.choice(sorted(optimizer["state"][number]))
            old = optimizer["state"][number][name]
            new = [
                old.flatten(),
                old[:1] if old.dim() else old.expand(4),
                old.double(),
                old.long(),
                torch.zeros(10**5),
                value,
            ]
            optimizer["state"][number][name] = draw.choice(new)
    elif kind == "weight":
        name = draw.choice(sorted(state["model"]))
        old = state["model"][name]
        state["model"][name] = draw.choice([old[:1], old.flatten(), old.double(), old.long(), old * math.nan, value])
    elif kind == "tokenizer":
        name = draw.choice(sorted(state["tokenizer"]))
        more = [[[0, 0]] * 10**5, [[10**9, 1]], [[1, "a"]], list(range(50))]
        state["tokenizer"][name] = draw.choice([*more, value])
    elif kind == "rng":
        name, state["rng"] = "", draw.choice([state["rng"][:10], state["rng"].long(), value])
    else:
        name = draw.choice(sorted(state["extra"]) or [""])
        state["extra"][name] = value
    return f"{kind} {name}: {str(value)[:40]!r}".replace("\n", " ")


def forged(root: Path, case: str, n: int, draw: random.Random, folder: Path) -> dict:
    """A forged state is resumed from, and where that can be, started from: one line or a run that goes on; no crash, no
    hang, no memory without end."""
    stage, run = stages(root)[case], folder / "run"
    shutil.copytree(root / "whole" / case, run)
    state = torch.load(run / "ckpt.pt", weights_only=True) | {"finished": False, "step": SAVE}
    state["config"]["out_dir"] = str(run)
    what = forge(state, draw)
    torch.save(state, run / "ckpt.pt")
    limit = 6 * 2**30

    def resume():
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        running(stage, run, Writes())

    def begin():
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        small_pictures()
        sft.main(tiny_sft(folder / "next", run, n_examples=8, epochs=0.5))

    first, wrong = in_child(resume, 120), ""
    for how, end in (("resumed", first), ("started from", in_child(begin, 120))):
        wrong = wrong or (end.fault() and f"{how}, {what}: {end.fault()}")
    return {"count": 1, "refused": int(first.code == 1), "what": what, "wrong": wrong}


def pairs(root: Path, case: str, n: int, draw: random.Random, folder: Path) -> dict:
    """Two runs in one folder at once, with equal settings or others: one works there, the other is told."""
    stage, facts = stages(root)[case], facts_of(root, case)
    run, other = folder / "run", draw.random() < 0.5
    changes = {"seed": 1} if other else {}
    delay = draw.choice([0, draw.uniform(0, 0.1), draw.uniform(0, facts["seconds"])])
    one = Child(lambda: running(stage, run, Writes()))
    time.sleep(delay)
    two = Child(lambda: running(stage, run, Writes(), **changes))
    ends = [one.end(120), two.end(120)]
    refused = [end for end in ends if end.code == 1]
    wrong = next((end.fault() for end in ends if end.fault()), "")
    if not wrong and (
        len(refused) == 2 or not all("in use" in e.said or "holds a run with seed" in e.said for e in refused)
    ):
        wrong = f"both refused, or for another reason: {[end.said[-200:] for end in ends]}"
    if not wrong:
        with_seed = load_checkpoint(run)["config"]["seed"]
        written = json.loads((run / "config.json").read_text())["seed"]
        wrong = "" if with_seed == written else f"mixed: the checkpoint has seed {with_seed}, config.json {written}"
        if not wrong and with_seed == 0:
            wrong = differences(run, root / "whole" / case)
        elif not wrong:
            steps = [row["step"] for row in rows_of(run)]
            wrong = "" if steps == sorted(steps) else "mixed: metrics of two runs"
    return {"count": 1, "refused": len(refused), "wrong": wrong}


NUMBERS = ["nan", "inf", "-inf", "1e39", "1e308", "-1e39", "-1", "0", "1e-320", "3e38", "1e19"]
COUNTS = ["-1", "0", "1", "2147483648", "9999999999999999999", "1000000007"]
WORDS = ["", "x", "-x", "a=b", "/", "\n", "\udcff", "x" * 5000, "none", "../..", "1"]


def hostile(root: Path, case: str, n: int, draw: random.Random, folder: Path) -> dict:
    """A field with a value that no run can work with: it is refused, or the run ends with numbers in its weights and
    its figures."""
    stage = stages(root)[case]
    config = stage.config(folder / "run")
    free = {"task", "out_dir", "seed", "device", "track", "data_dir", "profile_steps"}
    kinds = {f.name: str(typing.get_type_hints(type(config))[f.name]) for f in fields(config) if f.name not in free}
    name = draw.choice([name for name, kind in kinds.items() if "bool" not in kind])
    values = NUMBERS if "float" in kinds[name] else COUNTS if "int" in kinds[name] else WORDS
    words = [word for f in fields(config) if f.name != name for word in as_words(config, f)]
    words.append(f"--{name}={draw.choice(values)}")

    def run():
        small_pictures()
        resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))
        stage.module.main(parse(type(config), words))

    end = in_child(run, 60)
    wrong = end.fault() if end.code != 2 else ""
    if end.code == 0:
        state = load_checkpoint(folder / "run") if (folder / "run/ckpt.pt").exists() else {"model": {}}
        finite = all(torch.isfinite(p).all() for p in state["model"].values() if p.is_floating_point())
        unknown = sorted({k for row in rows_of(folder / "run") for k, v in row.items() if v is None})
        wrong = "" if finite and not unknown else f"nonsense: weights {finite}, figures without a value {unknown}"
    return {"count": 1, "refused": int(end.code not in (0, None)), "wrong": wrong and f"{words[-1]}: {wrong}"}


def as_words(config, field) -> list[str]:
    """How a field is said on the command line; nothing if it has its default."""
    value = getattr(config, field.name)
    if value == field.default or value is None or value == ():
        return []
    if isinstance(value, bool):
        return [f"--{field.name}" if value else f"--no-{field.name}"]
    return [f"--{field.name}={' '.join(map(str, value)) if isinstance(value, tuple) else value}"]


BIG = 10**4299
VALUES = [None, True, 0, -1, 1.5, math.nan, math.inf, BIG, "", " ", "\ud800", "xxx", [], {}, [[]], [None], ["a", 1]]
VALUES += [{"a": 1}, [{}], [{"role": "user"}], [{"role": "user", "content": None}], [{"role": 1, "content": "x"}]]
VALUES += [[{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "hi"}], "#### 3", "1" * 5000, "1e999"]
VALUES += [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": ["a"]}], "½", "١٢", "A", "\x00\x1b[31m"]
VALUES += [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}], [[[[1]]]]]
COLUMNS = ["text", "label", "messages", "conversations", "prompt", "completion", "instruction", "input", "output"]
COLUMNS += ["answer", "chosen", "rejected", "question", "choices"]
BYTES = [b"", b"\x00" * 4000, b"\xff\xfe" + "text".encode("utf-16-le"), b"\xe9t\xe9 " * 50, b"[" * 100_000, b"null\n"]
BYTES += [b'{"text": "a"', b"\n\n\n", b'{"text": ' + b"9" * 5000 + b"}\n", b"\x1f\x8b\x08\x00", b"PK\x03\x04", b"PAR1"]


def damaged(root: Path, case: str, n: int, draw: random.Random, folder: Path) -> dict:
    """Files with what does not belong in them: rows for each reader of rows, and each file of a run's folder."""
    return damaged_rows(draw, folder) if case == "rows" else damaged_folder(root, case, draw, folder)


def damaged_rows(draw: random.Random, folder: Path) -> dict:
    token = ByteTokenizer()
    readers = [
        lambda f: pack(load_chats(f, "whole"), token, 64),
        lambda f: encode_prompts(load_prompts(f, "whole"), token, 64),
        lambda f: [token.encode(text) for text in text_documents(f, "whole") if isinstance(text, str)],
        lambda f: preferences.encode_pairs(preferences.load_pairs(f, "whole"), token, 64),
    ]
    path = folder / draw.choice(["rows.jsonl", "rows.jsonl", "rows.jsonl", "text.txt"])
    rows = []
    for _ in range(draw.randint(1, 3)):
        row = {column: draw.choice(VALUES) for column in draw.sample(COLUMNS, draw.randint(1, 6))}
        rows.append(draw.choice([None, 1, "x", [], [1]]) if draw.random() < 0.1 else row)
    sys.set_int_max_str_digits(0)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    sys.set_int_max_str_digits(4300)
    if draw.random() < 0.3:
        at = draw.randrange(len(data))
        data = data[:at] + draw.choice(BYTES) + data[at + draw.randint(0, 3) :]
    path.write_bytes(data)

    def read():
        for reader in readers:
            with contextlib.suppress(UserError):
                reader(str(path))

    end = in_child(read, 30)
    return {"count": 1, "refused": int(end.code == 1), "wrong": end.fault()}


def damaged_folder(root: Path, case: str, draw: random.Random, folder: Path) -> dict:
    """A file of a run's folder is cut off, emptied, overwritten in a place, or something else; then the run goes on."""
    stage, run = stages(root)[case], folder / "run"
    shutil.copytree(root / "whole" / case, run)
    state = torch.load(run / "ckpt.pt", weights_only=True) | {"finished": False, "step": SAVE}
    state["config"]["out_dir"] = str(run)
    torch.save(state, run / "ckpt.pt")
    path = draw.choice(sorted(path for path in run.iterdir() if path.is_file()))
    data = path.read_bytes()
    at = draw.randrange(len(data)) if data else 0
    junk = draw.choice(
        [*BYTES, bytes(draw.randrange(256) for _ in range(100)), data[:at], data[:at] + b"\x00" * 50 + data[at:]]
    )
    path.write_bytes(draw.choice([junk, data[:at] + junk + data[at + len(junk) :], data + junk]))
    end = in_child(lambda: running(stage, run, Writes()), 60)
    wrong = end.fault()
    return {"count": 1, "refused": int(end.code == 1), "what": path.name, "wrong": wrong and f"{path.name}: {wrong}"}


# Each part: its deed, for which cases, and how many trials of each case make the long campaign.
ALL = list(stages(Path()))
PARTS: dict[str, tuple[Callable, list[str], int]] = {
    "kills": (kills, ALL, 20),
    "signals": (signals, ALL, 4),
    "full disks": (disks, ALL, 8),
    "flipped bits": (flips, ALL, 72),
    "forged states": (forged, ALL, 15),
    "runs in one folder": (pairs, ALL, 8),
    "hostile settings": (hostile, ALL, 72),
    "damaged files": (damaged, [*ALL, "rows"], 67),
}


def trial(root: Path, part: str, case: str, n: int) -> dict:
    """One trial, in a folder of its own that is removed at the end if it is well."""
    folder = Path(tempfile.mkdtemp(prefix="trial", dir=root))
    result = PARTS[part][0](root, case, n, random.Random(f"{part} {case} {n}"), folder)
    if not result["wrong"]:
        shutil.rmtree(folder)
    return {"part": part, "case": case, "n": n} | result


def results(root: Path) -> list[dict]:
    path = root / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(root: Path) -> str:
    """What was tried so far, by part."""
    lines = ["| | configurations | trials | refused in one line | wrong |", "| --- | --- | --- | --- | --- |"]
    for part in PARTS:
        mine = [result for result in results(root) if result["part"] == part]
        cases, count = len({r["case"] for r in mine}), sum(r["count"] for r in mine)
        refused = f"{sum(r['refused'] for r in mine):,}" if mine and "refused" in mine[0] else ""
        lines.append(f"| {part} | {cases} | {count:,} | {refused} | {sum(bool(r['wrong']) for r in mine)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where the runs and results.jsonl go")
    parser.add_argument("--only", nargs="+", choices=[part.split()[0] for part in PARTS], help="these parts")
    parser.add_argument("--workers", type=int, default=2, help="trials side by side")
    parser.add_argument("--table", action="store_true", help="print what was tried so far, and end")
    options = parser.parse_args()
    if not options.table:
        root = options.out.resolve()
        torch.set_num_threads(1)
        prepare(root)
        wanted = [part for part in PARTS if not options.only or part.split()[0] in options.only]
        done = {(r["part"], r["case"], r["n"]) for r in results(root)}
        todo = [(p, c, n) for p in wanted for n in range(PARTS[p][2]) for c in PARTS[p][1] if (p, c, n) not in done]
        work(root, todo, options.workers)
    print(table(options.out))


def work(root: Path, todo: list[tuple], workers: int) -> None:
    """The trials, shared among forked processes that each write down what they found."""

    def mine(worker: int) -> None:
        for part, case, n in todo[worker::workers]:
            result = trial(root, part, case, n)
            with open(root / "results.jsonl", "a") as file:
                file.write(json.dumps(result) + "\n")
            state = result["wrong"][:300] or "well"
            print(ascii(f"{part}, {case}, {n}: {state}"), flush=True)

    children = []
    for worker in range(workers):
        pid = os.fork()
        if not pid:
            try:
                mine(worker)
            finally:
                os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
