"""The front page and the pages: their links lead somewhere, their commands name what exists, their table is true."""

import importlib
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from test_chapters import ORDER

import card

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(path: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if line := re.fullmatch(r"L(\d+)", heading):
            assert int(line[1]) <= target.read_text(encoding="utf-8").count("\n"), link
        else:
            assert not heading or heading in anchors(target), link


def test_every_page_and_picture_is_found_from_the_index():
    linked = set()
    for page in PAGES:
        linked |= {(page.parent / link).resolve() for link in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8"))}
    files = [path for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".png")]
    assert {name_of(path) for path in files if path not in linked} == set()


def commands(page: Path) -> list[str]:
    """What stands after ``python`` or ``torchrun``, in blocks and in the text, up to a comment or the next command."""
    text = re.sub(r"\s*\\\n\s*", " ", page.read_text(encoding="utf-8"))
    found = re.findall(r"^    .*?((?:python|torchrun) [^#&\n]*)", text, re.M)
    return found + re.findall(r"`((?:python|torchrun) [^`]*)`", text)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_names_a_script_a_preset_and_fields_that_exist(page):
    for command in commands(page):
        script = re.search(r"(?:^|\s)([\w/]+)\.py\b", command)
        module = re.search(r"-m (runtime\.\w+)", command)
        if not script and not module:
            continue
        if script and not module:
            assert (ROOT / f"{script[1]}.py").exists(), command
        for preset in re.findall(r"configs/\w+\.py", command):
            assert "NAME" in preset or (ROOT / preset).exists(), command
        stem = module[1] if module else script[1].removeprefix("studies/").replace("ui/", "ui.")
        if stem.startswith("examples/") or stem == "ui.app":
            known = {"runs"} if stem == "ui.app" else set()
        elif stem.startswith(("bench/", "tests/", "docs/")):
            given = (ROOT / f"{script[1]}.py").read_text(encoding="utf-8")
            known = set(re.findall(r'"--(\w+)"', given))
        else:
            config = getattr(importlib.import_module(stem), "Config", None)
            known = {field.name for field in fields(config)} if config else set()
            known |= {f"no_{name}" for name in known} | {"fresh", "sweep", "example", "help", "print_config"}
        torchrun = {"standalone", "nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port"}
        flags = set(re.findall(r"(?<=\s)--(\w+)", command)) - torchrun
        if stem == "lora":
            known |= {"base", "out"}
        assert flags <= known, (command, flags - known)


def test_the_front_page_has_every_chapter_in_its_order():
    rows = re.findall(
        r"^\| \[`(\w+)\.py`\]\((\w+)\.py\) \|.*\| `python (\w+)\.py", (ROOT / "README.md").read_text(), re.M
    )
    assert [row[0] for row in rows] == ORDER and all(len(set(row)) == 1 for row in rows)


def test_the_table_of_results_is_that_of_the_reports_beside_it():
    reports = [json.loads(path.read_text()) for path in sorted((ROOT / "docs" / "reports").glob("seed*.json"))]
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert card.card(reports) in text
    assert f"## {('', 'One', 'Two', 'Three', 'Four', 'Five')[len(reports)]} start" in text


def test_the_table_of_results_by_other_code():
    """Mean, least and greatest of each accuracy, straight from the reports."""
    reports = [json.loads(path.read_text()) for path in sorted((ROOT / "docs" / "reports").glob("seed*.json"))]
    lines = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    for row in reports[0]:
        values = sorted(next(one["accuracy"] for one in rows if one["stage"] == row["stage"]) for rows in reports)
        (line,) = [line for line in lines if line.startswith(f"| {row['stage']} |")]
        mean = sum(values) / len(values)
        assert line.split(" | ")[1] == f"{mean:.3f} ({values[0]:.3f} to {values[-1]:.3f})"


def test_the_tests_that_hold_the_guarantees_exist():
    page = (ROOT / "docs/guarantees.md").read_text(encoding="utf-8")
    names = re.findall(r"`(?:(test_\w+\.py)(?:::)?)?(test_\w+)?…?`", page)
    file, held = None, 0
    for new, name in names:
        file = new or file
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"def {name}" in text, (file, name)
        held += bool(name)
    assert held >= 14
