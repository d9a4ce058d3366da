"""The museum: patches that fit, tests that turn red, and how visible a mistake is, by hand."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

import museum
from exhibits import EXHIBITS, Exhibit

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "museum.md"
BY_NAME = {exhibit.name: exhibit for exhibit in EXHIBITS}


def test_there_are_thirty_and_each_has_a_name_of_its_own():
    assert len(EXHIBITS) >= 30 and len(BY_NAME) == len(EXHIBITS)
    assert len({exhibit.title for exhibit in EXHIBITS}) == len(EXHIBITS)


@pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda exhibit: exhibit.name)
def test_the_patch_fits_and_is_python(exhibit, tmp_path):
    (tmp_path / exhibit.file).write_text((ROOT / exhibit.file).read_text(encoding="utf-8"), encoding="utf-8")
    museum.put_in(exhibit, tmp_path)
    patched = (tmp_path / exhibit.file).read_text(encoding="utf-8")
    compile(patched, exhibit.file, "exec")
    assert patched != (ROOT / exhibit.file).read_text(encoding="utf-8")
    assert all((ROOT / name).exists() for name in exhibit.tests.split())
    with pytest.raises(ValueError, match="stand 0 times"):
        museum.put_in(exhibit, tmp_path)


@pytest.mark.parametrize("name", ["k3_flipped"])
def test_a_mistake_is_caught_and_the_right_book_is_not(name):
    red = museum.red_test(BY_NAME[name])
    assert red.startswith("tests/test_grpo.py::test_")
    harmless = Exhibit(
        "harmless", "nothing", "grpo.py", "    d = logps - ref_logps\n", "    d = (logps - ref_logps)\n", "", ""
    )
    with museum.copy_of_the_book(harmless) as copy:
        assert "d = (logps - ref_logps)" in (copy / "grpo.py").read_text(encoding="utf-8")
    assert "d = (logps - ref_logps)" not in (ROOT / "grpo.py").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(not PAGE.with_suffix(".jsonl").exists(), reason="the page is made by studies/museum.py")
@pytest.mark.parametrize("name", BY_NAME)
def test_every_mistake_still_turns_its_test_red(name):
    """The one that the page names, run by itself in a copy of the book with the mistake."""
    rows = [json.loads(line) for line in PAGE.with_suffix(".jsonl").read_text().splitlines()]
    (red,) = {row["red"] for row in rows if row["exhibit"] == name and "red" in row}
    assert museum.red_test(replace(BY_NAME[name], tests=red)) == red


def row(name: str, start: str, end: float | None, first: float = 0.5, what: str = "grpo") -> dict:
    return {"exhibit": name, "run": what, "start": start, "end": end, "curve": [[0, 9], [first, end]]}


def test_how_visible_a_mistake_is_by_hand():
    exhibit = Exhibit("one", "One", "grpo.py", "a", "b", "tests/test_grpo.py", "why", "grpo")
    right = [row("", "1", 0.9), row("", "2", 0.8)]
    kind = lambda *ends: museum.visibility(exhibit, right + [row("one", s, e) for s, e in zip("12", ends)])  # noqa: E731
    assert kind() == museum.UNSEEN
    assert kind(0.9, None) == museum.LOUD  # one ended in an error, or in NaN
    assert kind(0.5, 0.5) == museum.LOUD  # no better than the start
    assert kind(0.8, 0.71) == museum.SLOW  # 0.10 and 0.09 worse: mean 0.095, standard error 0.005
    assert kind(0.88, 0.78) == museum.INVISIBLE  # 0.02 worse in both: less than questions move it
    assert kind(0.9, 0.6) == museum.INVISIBLE  # 0 and 0.2: mean 0.1, standard error 0.1
    assert kind(0.95, 0.85) == museum.INVISIBLE
    loss = Exhibit("two", "Two", "transformer.py", "a", "b", "tests/test_grpo.py", "why", "pretrain")
    rows = [row("", s, 1.0, 3.0, "pretrain") for s in "12"]
    assert (
        museum.visibility(loss, rows + [row("two", s, 1.1 + d, 3.0, "pretrain") for s, d in (("1", 0), ("2", 0.01))])
        == "slow"
    )
    assert museum.visibility(loss, rows + [row("two", s, 0.9, 3.0, "pretrain") for s in "12"]) == "invisible"


def test_the_page_of_an_exhibit_has_its_patch_its_test_and_its_ends():
    exhibit = BY_NAME["clip_max"]
    rows = [{"exhibit": "clip_max", "red": "tests/test_grpo.py::test_x"}]
    rows += [row("", "1", 0.9, what=exhibit.run), row("clip_max", "1", 0.7, what=exhibit.run)]
    text = museum.described(exhibit, rows)
    assert "-torch.minimum(ratio" in text and "+-torch.maximum(ratio" in text
    assert "* Red: `tests/test_grpo.py::test_x`" in text and "ends at 0.700" in text and "right one at 0.900" in text
    assert "--only clip_max`" in text


def test_settings_become_a_preset(tmp_path):
    fields = {"steps": "45", "beta": "0.1", "kl": "k1", "tie_embeddings": "True", "lr": "1e-5", "out_dir": "'run'"}
    assert [museum.is_literal(value) for value in fields.values()] == [True, True, False, True, True, True]


@pytest.mark.skipif(not PAGE.with_suffix(".jsonl").exists(), reason="the page is made by studies/museum.py")
def test_the_page_is_that_of_its_rows_and_every_exhibit_is_caught():
    rows = [json.loads(line) for line in PAGE.with_suffix(".jsonl").read_text().splitlines()]
    text = PAGE.read_text(encoding="utf-8")
    assert museum.halls(rows) in text
    red = {row["exhibit"]: row["red"] for row in rows if "red" in row}
    assert set(red) == set(BY_NAME) and all(red.values())
    for name in red.values():
        file, function = name.split("[")[0].split("::")[:2]
        assert f"def {function}" in (ROOT / file).read_text(encoding="utf-8")
    assert sum(map(int, re.findall(r"^## .*: (\d+)$", text, flags=re.M))) == len(EXHIBITS)
