"""Rows of a dataset: from a file, from a local mirror of the hub, or from the hub itself.

A user names data of his own by a file (``chats.jsonl``; compressed, ``.csv`` or ``.parquet`` too), or by its id on the
hub, ``org/name``, ``org/name:configuration`` or ``org/name:configuration:split``. ``--columns question=q answer=final``
says which of its columns mean what.
"""

import bz2
import csv
import difflib
import gzip
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from runtime import processes
from runtime.errors import UserError

LINES = {".jsonl": open, ".jsonl.gz": gzip.open, ".jsonl.xz": lzma.open, ".jsonl.bz2": bz2.open}  # read as they stream
TABLES = {".parquet": "parquet", ".json": "json"}  # read by the library "datasets"
FOLDERS = ("Anthropic/hh-rlhf",)  # datasets whose configurations are folders on the hub


def read_dataset(
    hub_id: str, config: str | None, split: str, data_dir: str = "", streaming: bool = False
) -> Iterator[dict]:
    """The rows of ``DIR/<hub id, / as __>/[config/]<split>.jsonl[.xz|.gz]`` if ``data_dir`` has it, else of the hub's
    dataset.
    """
    stem = Path(data_dir, hub_id.replace("/", "__"), config or "", split)
    for ending in (".jsonl.xz", ".jsonl.gz", ".jsonl"):
        path = Path(f"{stem}{ending}")
        if data_dir and path.is_file():
            return read_file(path)
    looked = f"{stem}.jsonl[.xz|.gz]" if data_dir else ""
    if hub_id.startswith("local/"):
        raise UserError(
            f"{hub_id} is on no hub: "
            + (f"it should be at {looked}" if looked else "name the folder that holds it with --data_dir DIR")
        )
    return _read_hub(hub_id, config, split, streaming, looked)


def _read_hub(hub_id: str, config: str | None, split: str, streaming: bool, looked: str) -> Iterator[dict]:
    import datasets  # seconds to import, so only here

    try:
        if hub_id in FOLDERS:
            return iter(datasets.load_dataset(hub_id, data_dir=config, split=split, streaming=streaming))
        return iter(datasets.load_dataset(hub_id, config, split=split, streaming=streaming))
    except Exception as error:  # whatever the network stack, the hub or the file formats raise
        raise UserError(
            f"the dataset {hub_id} ({split}) could not be loaded ({_why(error)}): go online, "
            + (f"or put it at {looked}" if looked else "or name a local mirror with --data_dir DIR or ALIGNBOOK_DATA")
        ) from None


def _why(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:160] if text else ''}"


def read_file(path: str | Path) -> Iterator[dict]:
    """The rows of a file: a JSON object on each line, or a table."""
    path = Path(path)
    if not path.is_file():
        raise UserError(no_file(path))
    if path.suffix == ".csv":
        return _read_csv(path)
    opener = next((LINES[ending] for ending in LINES if path.name.endswith(ending)), None)
    return _read_table(path) if opener is None else _read_lines(path, opener)


def no_file(path: str | Path) -> str:
    """That a file of rows is not there, with the nearest name that is."""
    path = Path(path)
    if path.is_dir():
        return f"{path} is a folder: name a file of rows in it, {', '.join((*LINES, *TABLES, '.csv'))}"
    if path.exists():
        return f"{path} is no file of rows: its name should end in {', '.join((*LINES, *TABLES, '.csv'))}"
    beside = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.6)
    return f"there is no file {path}" + (f"; did you mean {path.with_name(near[0])}?" if near else "")


def _read_lines(path: Path, opener) -> Iterator[dict]:
    n = 0
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    why = getattr(error, "msg", str(error))
                    raise UserError(f"{path}, line {number}: not JSON, or cut off ({why})") from None
                if not isinstance(row, dict):
                    raise UserError(f"{path}, line {number}: not an object with named columns")
                yield row
                n += 1
    except (EOFError, OSError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged or cut off after {n} rows ({error})") from None


def _read_csv(path: Path) -> Iterator[dict]:
    """Every cell as a text, as it stands there; an empty one is None."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                yield {str(name): value or None for name, value in row.items()}
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} could not be read ({error})") from None


def _read_table(path: Path) -> Iterator[dict]:
    import datasets

    try:
        return iter(datasets.load_dataset(TABLES[path.suffix], data_files=str(path), split="train"))
    except Exception as error:
        raise UserError(f"{path} could not be read ({_why(error)})") from None


class MissingColumn(UserError):
    """A row lacks a column. Of a user's rows some may, which are counted; if all do, this is what he is told."""


def columns(row: dict, names: Sequence[str], source: str) -> list:
    """The values of these columns, or an error that says which the dataset has."""
    missing = [name for name in names if name not in row]
    if missing:
        hint = f" (--columns {missing[0]}=... says which column is meant)" if is_own(source) else ""
        raise MissingColumn(f"{source} has no column {', '.join(missing)}; it has {', '.join(map(str, row))}{hint}")
    return [row[name] for name in names]


def converted(rows: Iterable[dict], convert: Callable, source: str, split: str, skipped: Counter) -> Iterator:
    """``convert(row, source, skipped)`` of each row, without those that give None. Rows of a user's that lack a column
    are counted too; if none has what it takes, the error says what the first one lacks, or that there are no rows.
    """
    n, used, lacking, before, first = 0, 0, 0, skipped.total(), None
    for row in rows:
        n += 1
        try:
            value = convert(row, source, skipped)
        except MissingColumn as error:
            if not is_own(source):
                raise
            lacking, first = lacking + 1, first or error
            skipped["without the columns"] += 1
            continue
        if value is not None:
            used += 1
            yield value
    if not used and lacking and skipped.total() - before == lacking:
        raise first
    if not n:
        raise UserError(f"{source} has no rows ({split})")


def report_skipped(skipped: Counter, what: str) -> None:
    if skipped and processes.rank() == 0:
        print(f"skipped {sum(skipped.values())} {what}: " + ", ".join(f"{n} {why}" for why, n in skipped.most_common()))


# ----------------------------------------------------------------------------------------------------------------------
# Data of the user's own

FEW = 20  # with fewer held-out rows than this a share moves in steps of more than 5 %
EVERY = 50  # of a dataset without a validation split, the rows that are kept for it


def sources(data: str | list[str]) -> list[str]:
    """The parts of "a+b"; a file may have a plus in its name."""
    if isinstance(data, list):
        return data
    return [data] if Path(data).exists() else data.split("+")


def is_file(name: str) -> bool:
    """Is this the name of a file of rows?"""
    return name.endswith((*LINES, *TABLES, ".csv"))


def is_own(name: str) -> bool:
    """Is this a file of rows, or a dataset of the hub? (Otherwise it is one that the book knows by name.)"""
    return is_file(name) or "/" in name


def own_rows(
    name: str, split: str, data_dir: str = "", rename: Sequence[str] = (), streaming: bool = False
) -> Iterator[dict]:
    """The rows of a user's dataset. split: "train" or "validation" (every 50th row), or "whole", all of it.

    rename: "meaning=column" for each column that the dataset calls otherwise.
    """
    if is_file(name):
        rows: Iterable[dict] = read_file(name)
    elif Path(name).exists() or name.startswith((".", "/")) or "." in Path(name).name and Path(name).parent.is_dir():
        raise UserError(no_file(name))  # and no dataset of the hub
    else:
        hub_id, *parts = name.split(":")
        if len(parts) > 2:
            raise UserError(
                f"--data {name}: a dataset of the hub is org/name, org/name:config or org/name:config:split"
            )
        config, its_split = (parts[0] or None if parts else None), parts[1] if len(parts) == 2 else "train"
        rows = read_dataset(hub_id, config, its_split, data_dir, streaming)
    names = column_names(rename)
    for i, row in enumerate(rows):
        if i == 0:
            check_names(names, row, name)
        if split == "whole" or (i % EVERY == 0) == (split == "validation"):
            # Of several sources, only some may have other names: then a column that is there already stays.
            yield row | {meaning: row[column] for meaning, column in names.items() if column in row}


def check_names(names: dict[str, str], row: dict, source: str) -> None:
    """Refuse a column that neither the first row has nor stands for one that it has."""
    for meaning, column in names.items():
        if column not in row and meaning not in row:
            near = difflib.get_close_matches(column, map(str, row), n=1, cutoff=0.6)
            hint = f"; did you mean {meaning}={near[0]}?" if near else ""
            hint = f"; it is meaning=column: did you mean {column}={meaning}?" if column in MEANINGS else hint
            raise UserError(f"{source} has no column {column} for {meaning}; it has {', '.join(map(str, row))}{hint}")


MEANINGS = (
    "text", "label", "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "answer",
    "chosen", "rejected",
)  # fmt: skip


def column_names(rename: Sequence[str]) -> dict[str, str]:
    """``("answer=final",)`` as ``{"answer": "final"}``."""
    names = {}
    for pair in rename:
        meaning, equals, column = pair.partition("=")
        if not (meaning and equals and column):
            raise UserError(f"--columns {pair}: write meaning=column, for example answer=final")
        near = difflib.get_close_matches(meaning, MEANINGS, n=1, cutoff=0.75)
        if near and meaning not in MEANINGS:  # a meaning of the user's own, for his reward, looks like none of them
            raise UserError(f"--columns {pair}: no stage looks for {meaning}; did you mean {near[0]}?")
        names[meaning] = column
    return names


def held_out(config) -> tuple[str, str]:
    """Where a stage's held-out rows come from, and which they are: all of ``eval_data``, if it is named, or the
    validation split of ``data``.
    """
    return (config.eval_data, "whole") if config.eval_data else (config.data, "validation")


def describe_held_out(config, n: int) -> str:
    """For a run's banner: where the ``n`` held-out rows come from, if that is not a split of the data's own."""
    if config.eval_data:
        return f"; held out: {config.eval_data}{few(n)}"
    return f"; held out: every {EVERY}th row{few(n)}" if any(map(is_own, sources(config.data))) else ""


def stamps(config) -> dict[str, str]:
    """Size and checksum of each file of the user's that a run reads: a run that is continued should read the same."""
    found = {}
    for field in ("data", "eval_data"):
        for name in filter(None, sources(getattr(config, field, "") or "")):
            path = Path(name)  # a folder is one of texts; without a slash it may be a corpus of the book
            texts = path.is_dir() and "/" in name
            files = sorted(path.rglob("*.txt")) if texts else [path] if path.is_file() else []
            if files:
                sums = [_sum_of(file) for file in files]
                found[name] = f"{sum(size for size, _ in sums)} bytes, {zlib.crc32(str(sums).encode()):08x}"
    return found


def _sum_of(path: Path, most: int = 2**28) -> tuple[int, int]:
    """(size, checksum); of a file of many gigabytes, the checksum of its beginning."""
    crc, left = 0, most
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 2**20))):
            crc, left = zlib.crc32(block, crc), left - len(block)
    return path.stat().st_size, crc


def few(n: int) -> str:
    """A warning for a banner, if so few rows are held out that a share of them says little."""
    return f" (few: a single one of the {n} is {100 / n:.0f} %; --eval_data names more)" if 0 < n < FEW else ""


def evaluate_command(config, folder: Path, data: str) -> str:
    """What compares a run with the model that it started from, on held-out rows of ``data``."""
    asked = f"python evaluate.py {config.init_from} {folder} --data {data}"
    if is_own(data) and not config.eval_data:
        asked += " --split validation"
    if config.columns:
        asked += f" --columns {' '.join(config.columns)}"
    if getattr(config, "reward", "").endswith(".py"):
        asked += " ".join(["", "--reward", config.reward, *(["--reward_weights"] if config.reward_weights else [])])
        asked += "".join(f" {weight}" for weight in config.reward_weights)
    return asked
