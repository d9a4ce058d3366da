"""Checkpoints that survive a crash, and that cannot run code.

A checkpoint is one dictionary of tensors and plain Python values. It is written to a temporary file, flushed to the
disk, then renamed: whatever happens, the last good one is there. It is read with ``weights_only=True``, so a file
from a stranger can hold numbers and nothing else.
"""

import contextlib
import difflib
import os
import pickle
import re
import zipfile
import zlib
from pathlib import Path

import torch

from runtime import rehearsal
from runtime.errors import UserError

MAGIC = "alignbook checkpoint 1"
ADAPTERS = "alignbook adapters 1"  # the magic word of an adapters.pt
FIELDS = {  # what every checkpoint holds
    "model": dict, "model_config": dict, "tokenizer": dict, "stage": str, "config": dict, "step": int, "lineage": list,
}  # fmt: skip
MORE_FIELDS = {  # what the checkpoint of a run holds besides
    "steps": int, "finished": bool, "optimizers": list, "scaler": dict, "rng": torch.Tensor, "best": float | None,
    "best_step": int | None, "world": int, "data": dict, "extra": dict, "lora": dict, "adapters": dict,
}  # fmt: skip


def write_atomically(path: Path, write) -> None:
    """``write(temporary path)``, flush to the disk, rename over ``path``: readers see the old file or the new one,
    never a part.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the rename itself must reach the disk too
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()  # a full disk gets its room back
        if not isinstance(error, (OSError, MemoryError, RuntimeError)) or "OutOfMemory" in type(error).__name__:
            raise
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:160] or type(error).__name__
        whole = path.suffix == ".pt" and path.exists()
        kept = "; the one before it is whole, and the same command goes on from there" if whole else ""
        raise UserError(f"{path} could not be written ({why}){kept}") from None


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(text.encode("utf-8", "replace")))


def save_checkpoint(folder: Path, state: dict, keep_last: int = 1, best: bool = False) -> Path:
    """Write ``ckpt.pt``; with keep_last > 1 also ``ckpt_<step>.pt`` for the last so many; with ``best``,
    ``best.pt``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {"magic": MAGIC, **state}
    path = folder / "ckpt.pt"
    write_atomically(path, lambda temporary: torch.save(state, temporary))
    if keep_last > 1:
        _link(path, folder / f"ckpt_{state['step']:07d}.pt")
        old = sorted(p for p in folder.iterdir() if re.fullmatch(r"ckpt_\d{7,}\.pt", p.name))
        for extra in old[:-keep_last]:
            extra.unlink()
    if best:
        _link(path, folder / "best.pt")
    return path


def mend_best(folder: Path, state: dict) -> None:
    """If a kill came between the checkpoint of the best step and its second name, give it that name now."""
    if state.get("best_step") == state["step"]:
        _link(folder / "ckpt.pt", folder / "best.pt")


def _link(source: Path, target: Path) -> None:
    """A second name for the same bytes (a copy where the file system has no links), put in place atomically."""
    if target.exists() and os.path.samefile(source, target):  # a rename of one to the other would leave both
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            temporary.write_bytes(source.read_bytes())
        os.replace(temporary, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{target} could not be written ({error.strerror}); {source} is whole") from None


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint file that a user means by a file or a run's folder."""
    path = Path(path)
    return path / "ckpt.pt" if path.is_dir() or path.suffix != ".pt" else path


def load_checkpoint(path: str | Path, map_location="cpu", mmap: bool = False) -> dict:
    """Read and check a checkpoint; one clear line for every way in which it can be wrong. With ``mmap`` a tensor is
    read when it is used, for who only asks what is in it."""
    path = find_checkpoint(path)
    return check_checkpoint(read_archive(path, map_location, mmap), path)


def check_checkpoint(state: dict, path: str | Path) -> dict:
    """``state`` itself, if it is a whole checkpoint; ``path`` is where it was read, for the error."""
    if state.get("magic") == ADAPTERS:
        raise UserError(f"{path} holds adapters without their base, not a whole checkpoint")
    if state.get("magic") != MAGIC:
        raise UserError(f"{path} is not an alignbook checkpoint")
    missing = [name for name in FIELDS if name not in state]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    wrong = [n for n, kind in (FIELDS | MORE_FIELDS).items() if n in state and not isinstance(state[n], kind)]
    wrong += [n for n in ("model", "adapters") if n not in wrong and not _are_weights(state.get(n, {}))]
    if wrong or state["step"] < 0 or not all(isinstance(one, dict) for one in state["lineage"]):
        raise UserError(f"{path} is damaged: its {' and '.join(wrong) or 'step or lineage'} cannot be what was written")
    return state


def _are_weights(values: dict) -> bool:
    return all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in values.items())


def read_archive(path: str | Path, map_location="cpu", mmap: bool = False) -> dict:
    """The dictionary in a file, which can be any; one line if it is damaged or could run code."""
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint {path}")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is damaged or not a checkpoint (it is not a PyTorch archive, or was cut off)")
    if not mmap:
        check_sums(path)
    try:
        state = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        what = re.search(r"(?:GLOBAL|global|Unsupported \w+)\s+([\w.]+)", str(error))
        inside = f" ({what.group(1)})" if what else ""
        raise UserError(
            f"{path} holds more than tensors and plain values{inside} and was refused: it could run code"
        ) from None
    except Exception as error:
        why = " ".join(str(error).split())[:120]  # some errors have several lines, some none
        raise UserError(f"{path} is damaged: {type(error).__name__}: {why}") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} is not an alignbook checkpoint")
    return state


def extra(state: dict, name: str, kind: type):
    """What a stage keeps in its checkpoint for itself, under that name."""
    value = state.get("extra", {}).get(name)
    if not isinstance(value, kind):
        raise UserError(f"the checkpoint is damaged: it does not know its {name}")
    return value


def check_sums(path: str | Path) -> None:
    """Refuse an archive one of whose parts is not what was written: PyTorch does not look at the sums it stores."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist())
            wrong = archive.testzip() if not packed else "a packed part, which no checkpoint has"
    except Exception as error:  # whatever a damaged directory of the archive leads to
        wrong = " ".join(str(error).split())[:120] or type(error).__name__
    if wrong is not None:
        raise UserError(f"{path} is damaged: its checksums do not fit ({wrong})")


def check_optimizer(optimizer: torch.optim.Optimizer, saved: dict, where) -> None:
    """Refuse a saved state whose tensors are not like the weights they belong to: fused kernels would read and write
    beyond them.
    """
    try:
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        numbers = [i for group in saved["param_groups"] for i in group["params"]]
        fits = len(numbers) == len(set(numbers)) == len(weights) and set(saved["state"]) <= set(numbers)
        for number, weight in zip(numbers, weights):
            for name, value in saved["state"].get(number, {}).items():
                if name == "step":
                    fits &= isinstance(value, (int, float)) or (value.dim() == 0 and value.is_floating_point())
                else:
                    fits &= value.shape == weight.shape and value.dtype == weight.dtype
        for group, stored in zip(optimizer.param_groups, saved["param_groups"], strict=True):
            fits &= len(group["params"]) == len(stored["params"]) and stored.keys() <= group.keys()
            fits &= all(_alike(group[name], value) for name, value in stored.items())
    except (LookupError, TypeError, AttributeError, ValueError):
        fits = False
    if not fits:
        raise UserError(f"the optimizer in {where} does not fit the model: the checkpoint is damaged")


def _alike(ours, theirs) -> bool:
    """Of the same kind; a whole number may stand for another."""
    numbers = (int, float)
    return type(ours) is type(theirs) or (type(ours) in numbers and type(theirs) in numbers)


def load_weights(model, weights: dict, where) -> None:
    """``load_state_dict``, with one line if the shapes are not the model's."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        detail = [line.strip() for line in str(error).splitlines()[1:2]]
        raise UserError(f"the weights in {where} do not fit this model: {' '.join(detail)[:160]}") from None


def need_checkpoint(path: str, command: str = "") -> bool:
    """Refuse a stage to start from that is not there; ``command`` is what makes it. Returns True; a rehearsal
    (``--print_config``) goes on without it, with False."""
    there = find_checkpoint(path).exists()
    if rehearsal.now is not None:
        rehearsal.now.starts[str(path)] = command
    elif not there:
        preset = "" if str(path).startswith("out/arith/") else " with its preset (configs/), or your --task and --data"
        for file in sorted(Path("configs").glob(f"{Path(command.split(' ')[-1]).stem}_*.py")):
            if re.search(rf'^out_dir = "{re.escape(str(path))}"$', file.read_text(encoding="utf-8"), re.M):
                preset = f" {file}"
        made = f"; make it with: {command}{preset}" if command else ""
        raise UserError(f"there is no checkpoint in {path}{_nearest(Path(path)) or made}")
    return there


def _nearest(path: Path) -> str:
    """The run that a wrong name may mean: one with nearly that name, or those in the folder that it names."""
    if path.is_dir() and (inside := sorted(one.parent for one in path.glob("*/ckpt.pt"))):
        return f"; it holds {', '.join(map(str, inside))}"
    runs = sorted({str(one.parent) for one in path.parent.parent.glob("*/*/ckpt.pt")}) if len(path.parts) > 2 else []
    near = difflib.get_close_matches(str(path), runs, n=1, cutoff=0.85)
    return f"; did you mean {near[0]}?" if near else ""


def weights_id(state: dict) -> str:
    """A short name for a checkpoint's very weights. Adapters and their base, put together, are named after both parts:
    the last digits of the sum depend on the processor that adds them up."""
    return state.get("weights_id") or fingerprint(state["model"])


def fingerprint(weights: dict, start: str = "0") -> str:
    """A short name for these very tensors; with ``start``, for them behind what has that name."""
    crc = int(start, 16)
    for tensor in weights.values():
        crc = zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def plain(value):
    """As it comes back from a checkpoint or JSON: tuples as lists."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value
