"""The site: nothing of a source is lost or shown twice, formulas keep what they say, links lead somewhere, and no page
needs another machine."""

import ast
import doctest
import html
import itertools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from test_chapters import ORDER, SOURCES, blocks_of, docstrings

import build
import figures
import walk
from making import drawings, formulas, highlight
from making.book import read_book
from making.chapters import Section, cut
from making.prose import blocks, inline
from making.render import markdown_page, plain, source_page
from runtime.errors import UserError
from runtime.words import WORDS

ROOT = Path(__file__).parent.parent
EVERY = sorted(path for folder in (".", "runtime", "studies", "configs", "tests", "bench", "docs", "docs/making")
               for path in (ROOT / folder).glob("*.py"))  # fmt: skip


@pytest.fixture(scope="module")
def book():
    return read_book(ROOT)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site") / "site"
    build.build(out)
    return out


def nowhere(name):
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Sources


def lost_or_twice(source: str, sections: list[Section]) -> list[int]:
    """The lines that no section has, or that several places have."""
    places = [n for section in sections for n in section.lines()]
    return sorted(n for n in range(1, len(source.splitlines()) + 1) if places.count(n) != 1)


def test_every_line_of_every_file_has_one_place():
    for path in EVERY:
        text = path.read_text(encoding="utf-8")
        assert not lost_or_twice(text, cut(text)), path


def test_a_line_that_is_lost_or_doubled_is_noticed():
    text = (ROOT / "sft.py").read_text(encoding="utf-8")
    for tamper in (lambda code: code.pop(), lambda code: code.append(code[0])):
        sections = cut(text)
        tamper(max((section.code for section in sections), key=len))
        assert len(lost_or_twice(text, sections)) == 1


def letters(text: str) -> str:
    """The letters and digits of a text, in order: its markup has none, and formulas keep them in every form."""
    return re.sub(r"[\W_]", "", formulas.visible(text))


def shown_code(page: str) -> dict[int, str]:
    """The lines of code on a page by their numbers; a number that stands there twice is an error."""
    found = re.findall(r'<span class="l" id="L(\d+)" data-n="(\d+)"[^>]*>(.*?)\n</span>', page, re.S)
    assert all(a == b for a, b, _ in found) and len({a for a, _, _ in found}) == len(found)
    return {int(n): html.unescape(re.sub(r"<[^>]+>", "", line)) for n, _, line in found}


@pytest.mark.parametrize("name", [*ORDER, "runtime/config", "runtime/words", "studies/intervals", "studies/ablate"])
def test_a_page_shows_every_line_of_its_source_once(book, name):
    source = book.sources[f"{name}.py"]
    page, lines = source_page(book, source).body, source.text.splitlines()
    page = re.sub(r'<nav class="inside".*?</nav>', "", page, flags=re.S)  # the contents: headings and names again
    code = shown_code(page)
    fields = {n for section in source.sections for row in section.fields if row.node for n in row.code}
    prose = {n for section in source.sections for n in section.prose} | {
        n for section in source.sections for row in section.fields for n in row.text
    }
    for n, line in enumerate(lines, start=1):
        if n not in prose and n not in fields:
            assert code.get(n, "") == line.rstrip(), n
    assert not set(code) & (prose | fields)
    words, at = letters(html.unescape(re.sub(r"<[^>]+>", "", page))), 0
    for section in source.sections:  # what the docstrings, comments and tables say stands there in its order
        texts = section.text.split("\n\n")
        for row in section.fields:
            nodes = [row.node.annotation, row.node.value] if row.node else []
            texts += [row.name, *(ast.get_source_segment(source.text, node) for node in nodes if node), row.prose]
        for text in texts:
            piece = letters(re.sub(r"\]\([\w./#-]+\)", "]", text))
            at = words.find(piece, at)
            assert at >= 0, text
            assert len(piece) < 60 or words.count(piece) == letters(source.text).count(piece), text
            at += len(piece)


def test_a_chapter_is_cut_where_its_author_paused():
    names = [section.name for section in cut((ROOT / "grpo.py").read_text()) if section.kind == "code" and section.name]
    assert names[:5] == ["Config", "group_advantages", "_nanstd", "kl_estimate", "grpo_loss"]
    sections = cut(
        '"""Head."""\n\nimport a\n\n# Why.\nX = (\n    # inside\n    1\n)\n\n\ndef f():\n    """Doc."""\n    return X\n'
    )
    assert [(one.kind, one.name, one.text) for one in sections] == [
        ("module", "", "Head."), ("code", "", "Why."), ("code", "f", "Doc."),
    ]  # fmt: skip
    assert [one.code for one in sections] == [[2, 3, 4], [6, 7, 8, 9, 10, 11], [12, 14]]


def test_fields_are_a_table(book):
    page = source_page(book, book.sources["grpo.py"]).body
    row = re.search(r'<tr id="Config.clip_high">.*?</tr>', page, re.S)[0]
    assert plain(row).split()[:3] == ["clip_high", "NotNegative", "0.2"] and "Ratios above 1 + clip_high" in plain(row)
    row = re.search(r'<tr id="Config.lr">.*?</tr>', page, re.S)[0]  # without a text of its own: where it comes from
    assert "another default than" in plain(row) and 'href="runtime/config.html#' in row
    assert '<tr id="ModelConfig.window">' in source_page(book, book.sources["layers.py"]).body  # comments as meanings


def test_names_lead_to_where_they_are_defined(book):
    page = source_page(book, book.sources["grpo.py"]).body
    functions = ("rollout.html#policy_logps", "#group_advantages", "watch.html#UpdateSums", "runtime/config.html#L")
    for link in (*functions, "docs/metrics.html#flat_groups", "configs/grpo_dapo.html"):
        assert f'href="{link}' in page, link
    source = "from grpo import kl_estimate\n\n\ndef f(x):\n    return kl_estimate, x\n"
    source += "\n\ndef g(kl_estimate):\n    return kl_estimate\n"
    tree = ast.parse(source)
    modules = {"grpo": book.sources["grpo.py"].names, "x": highlight.definitions(tree)}
    found = highlight.find_links(source, "x", modules, lambda module, name: (f"{module}.{name}", ""))
    wanted = {(1, 5): "grpo.", (1, 17): "grpo.kl_estimate", (5, 11): "grpo.kl_estimate"}  # g's is an argument
    assert {place: link for place, (link, _) in found.items()} == wanted


def test_python_is_coloured_and_not_changed():
    for path in [*SOURCES, ROOT / "tests" / "test_grpo.py"]:
        text = path.read_text(encoding="utf-8")
        pieces = highlight.python_pieces(text)
        assert ["".join(piece for _, piece, _ in line) for line in pieces] == text.splitlines()
    broken = highlight.python_pieces("a = (1,\n    'x")
    assert "".join(piece for line in broken for _, piece, _ in line) == "a = (1,    'x"


def test_examples_show_what_is_typed_and_what_is_answered():
    page = blocks("Twice.\n\n>>> f(1)\n2\n>>> f('<')\n'<<'", nowhere)
    assert plain(page) == "Twice. >>> f(1) 2 >>> f('<') '<<'"
    assert page.count('class="p"') == 2 and page.count('class="o"') == 2


def test_a_block_after_a_list_is_not_of_its_last_item():
    page = blocks("* one\n  more\n* two::\n\n      a = b / c\n\n    python a.py\n", nowhere)
    assert re.search(r"<li>one more</li><li>two:.*<mfrac>.*</li></ul>\n<pre class=\"shell\">", page, re.S)


def test_commands_can_be_copied_without_their_comments():
    shown = highlight.shell_html(["python a.py --x 1   # why", "python b.py \\", "    --y 2", "metrics.jsonl"])
    assert re.findall(r'data-copy="([^"]*)"', shown) == ["python a.py --x 1", "python b.py --y 2"]
    assert 'data-copy="python grpo.py"' in inline("Type ``python grpo.py``.", nowhere)


# ----------------------------------------------------------------------------------------------------------------------
# Formulas


CASES = {
    "x_i": "<msub><mi>x</mi><mrow><mi>i</mi></mrow></msub>",
    "max_norm": "<mi>max_norm</mi>",
    "e^a": "<msup><mi>e</mi><mrow><mi>a</mi></mrow></msup>",
    "1/N": "<mfrac><mrow><mn>1</mn></mrow><mrow><mi>N</mi></mrow></mfrac>",
    "a / (b + c)": "<mfrac><mrow><mi>a</mi></mrow><mrow><mi>b</mi><mo>+</mo><mi>c</mi></mrow></mfrac>",
    "√(a + b)": "<msqrt><mi>a</mi><mo>+</mo><mi>b</mi></msqrt>",
    "√d_head": "<msqrt><msub><mi>d</mi><mrow><mi>head</mi></mrow></msub></msqrt>",
    "a ‖ b": "<mi>a</mi><mo>‖</mo><mi>b</mi>",
    "‖a‖": "<mrow><mo>‖</mo><mi>a</mi><mo>‖</mo></mrow>",
    "-a": '<mo form="prefix">−</mo><mi>a</mi>',
    "V_{t+1}": "<msub><mi>V</mi><mrow><mi>t</mi><mo>+</mo><mn>1</mn></mrow></msub>",
    "a b / c d + e": '<mfrac><mrow><mi>a</mi><mspace width="0.3em"/><mi>b</mi></mrow><mrow><mi>c</mi>'
    '<mspace width="0.3em"/><mi>d</mi></mrow></mfrac><mo>+</mo><mi>e</mi>',
}


@pytest.mark.parametrize("text", CASES)
def test_a_formula_becomes_mathematics(text):
    assert formulas.math(text).split(">", 1)[1].removesuffix("</math>") == CASES[text]


def formula_blocks() -> list[tuple[str, list[str]]]:
    """The blocks of all docstrings that are formulas, with the name of their file."""
    found = [(path.stem, b) for path in SOURCES for text in docstrings(path.read_text()) for b in blocks_of(text)]
    return [(name, block) for name, block in found if formulas.is_formula(block)]


def test_every_formula_keeps_every_character():
    assert len(formula_blocks()) >= 20
    for name, block in formula_blocks():
        shown = html.unescape(re.sub(r"<[^>]+>", "", formulas.block(block)))
        assert formulas.visible(shown) == formulas.visible("".join(block)), name


def test_formulas_are_told_from_code():
    names = {name for name, _ in formula_blocks()}
    assert names >= {"attention", "transformer", "moe", "lora", "pretrain", "sft", "reward", "dpo", "ppo", "grpo"}
    assert not names & {"tokenizer", "verify", "texts", "data", "stages", "folder", "run"}
    page = blocks("As in::\n\n    A_i = r_i / s\n\n    python a.py\n", nowhere)
    assert "<mfrac>" in page and 'data-copy="python a.py"' in page


def test_a_line_of_a_formula_has_a_left_side_and_a_note():
    assert formulas.cells("r_t = -β k      at every token") == ("r_t", "= -β k", "at every token")
    assert formulas.cells("      + score    at the end") == ("", "+ score", "at the end")
    assert formulas.cells("L = mean of   a b   of those") == ("L", "= mean of  a b", "of those")
    kinds = {"ρ_t = π(t) / π_old(t)": True, "L = - mean log softmax(logits)[label]": True, "Bradley-Terry": False,
             "M = 0 where attention is allowed": False, "k when all are equal": False}  # fmt: skip
    assert {note: formulas.is_mathematics(note) for note in kinds} == kinds
    page = formulas.block(["r = -β k      at every token", "      + score    at the end"])
    assert page.count('class="rhs"') == 2 and "score</mi>" in page


# ----------------------------------------------------------------------------------------------------------------------
# The whole


class Reader(HTMLParser):
    """The links, the places and the things that a page loads."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.ids, self.loads = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif "src" in values or tag == "link":
            self.loads.append(values.get("src") or values.get("href"))


def test_every_link_of_the_site_leads_to_a_page_and_a_place(site):
    pages = {path: Reader(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert len(pages) > 150
    for path, page in pages.items():
        assert len(set(page.ids)) == len(page.ids), path
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            target, _, mark = link.partition("#")
            there = (path.parent / unquote(target)).resolve() if target else path
            assert there.is_file(), (path, link)
            assert not mark or there not in pages or unquote(mark) in pages[there].ids, (path, link)


def test_no_page_loads_anything_from_elsewhere(site):
    for path in site.rglob("*.html"):
        for address in Reader(path.read_text(encoding="utf-8")).loads:
            assert not re.match(r"[a-z]*:?//", address) and (path.parent / address).is_file(), (path, address)
    for name in ("style.css", "site.js", "index.js"):
        text = (site / "_site" / name).read_text(encoding="utf-8")
        assert name == "index.js" or not re.search(r"https?://|@import|fetch\(|url\(", text)


def test_every_chapter_and_page_is_in_the_navigation(site, book):
    front = (site / "index.html").read_text(encoding="utf-8")
    nav = front[front.index('<nav id="site-nav"') : front.index("</nav>")]
    linked = set(Reader(nav).links)
    wanted = [f"{name}.html" for name in ORDER] + [book.address(path) for path in book.pages]
    assert not set(wanted) - linked
    assert [link for link in Reader(nav).links if link.removesuffix(".html") in ORDER] == [
        f"{name}.html" for name in ORDER
    ]


def test_chapters_and_pages_know_of_each_other(site):
    assert "docs/experiments/grpo.html" in Reader((site / "grpo.html").read_text(encoding="utf-8")).links
    assert "../../grpo.html" in Reader((site / "docs/experiments/grpo.html").read_text(encoding="utf-8")).links


def test_every_study_is_linked_with_a_chapter(book):
    pages = [path for path in book.pages if path.startswith("docs/experiments/")]
    assert len(pages) >= 10
    for page in pages:
        chapters = book.named[page] & set(book.order)
        assert chapters, page
        for chapter in chapters:
            link = book.relative(chapter, book.address(page))
            assert f'href="{link}"' in source_page(book, book.sources[chapter]).body


def test_the_index_knows_functions_fields_and_figures(site):
    text = (site / "_site" / "index.js").read_text(encoding="utf-8")
    entries = json.loads(text.removeprefix("window.BOOK=").rstrip(";\n"))
    known = {entry["u"]: entry for entry in entries}
    for address in ("ppo.html#gae", "grpo.html#Config.clip_high", "docs/metrics.html#clip_fraction", "docs/speed.html"):
        assert address in known
    assert "GAE" in known["ppo.html"]["t"] or "advantage" in known["ppo.html#gae"]["t"]
    assert all((site / entry["u"].partition("#")[0]).is_file() for entry in entries)


def test_a_build_replaces_a_site_and_nothing_else(tmp_path, monkeypatch):
    small = tmp_path / "clone"
    (small / "docs").mkdir(parents=True)
    (small / "README.md").write_text("# Small\n\n| [`a.py`](a.py) | it | `python a.py` |\n\n[b](docs/b.md)\n")
    (small / "docs" / "b.md").write_text("# B\n\n[back](../README.md), [a](../a.py)\n")
    (small / "a.py").write_text('"""A."""\n')
    out = tmp_path / "out"
    assert build.build(out, small) == 3 and build.build(out, small) == 3
    (out / build.MARK).unlink()
    with pytest.raises(UserError, match="something else than a site"):
        build.build(out, small)
    assert (out / "index.html").exists()
    (small / "docs" / "b.md").write_text("# B\n\n[c](c.md)\n")
    with pytest.raises(UserError, match="docs/b.md links to c.md, and there is no such file"):
        build.build(tmp_path / "other", small)
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob(".other*"))


def test_mistakes_on_the_command_line_are_one_line(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    for script, options in (("docs/build.py", ["--out", str(tmp_path)]), ("docs/walk.py", ["--site", str(tmp_path)])):
        done = subprocess.run([sys.executable, script, *options], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_markdown_is_read_as_github_reads_it(book):
    page = markdown_page(book, "docs/metrics.md")
    assert '<code id="flat_groups">flat_groups</code>' in page.body and 'id="every-stage"' in page.body
    assert 'href="../runtime/words.html"' in page.body


# ----------------------------------------------------------------------------------------------------------------------
# Pages that are made from the code, or speak of its lines


def test_every_link_to_a_line_leads_to_what_it_names(book):
    for page in book.pages:
        assert build.with_lines(ROOT, page) == book.pages[page], f"{page}: python docs/build.py --lines mends it"
    assert len(build.LINE_LINK.findall(book.pages["docs/cheatsheet.md"])) >= 25


def test_a_line_that_has_moved_is_mended_and_one_that_is_gone_is_refused(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n\n\ndef f():\n    return x / 2\n")
    (tmp_path / "b.md").write_text("[`f`](a.py#L1), [`x / 2`](a.py#L9)\n")
    assert build.with_lines(tmp_path, "b.md") == "[`f`](a.py#L4), [`x / 2`](a.py#L5)\n"
    (tmp_path / "b.md").write_text("[`g`](a.py#L4)\n")
    with pytest.raises(UserError, match="b.md links to 'g' in a.py, and no line has it"):
        build.with_lines(tmp_path, "b.md")


def test_every_loss_is_on_the_cheat_sheet(book):
    named = {words for words, _, _ in build.LINE_LINK.findall(book.pages["docs/cheatsheet.md"])}
    losses = {name for path in book.order for name in book.sources[path].names if name.endswith("_loss")}
    assert len(losses) >= 13 and losses - {"pair_loss"} <= named  # pair_loss chooses one of them


def test_the_drawings_show_what_the_code_says(book):
    for path, text in build.draw(book).items():
        assert (ROOT / path).read_text(encoding="utf-8") == text, f"{path}: python docs/build.py --draw"


def test_a_chapter_stands_below_those_that_it_builds_on(book):
    graph = drawings.uses(book)
    assert graph["gdpo.py"] >= {"grpo.py", "rollout.py"} and graph["tokenizer.py"] == set()
    depth = {name: i for i, row in enumerate(drawings.layers(graph)) for name in row}
    assert set(depth) == set(book.order)
    assert all(depth[other] < depth[name] for name, used in graph.items() for other in used)
    assert drawings.needed({"a": set(), "b": {"a"}, "c": {"a", "b"}}) == {"a": set(), "b": {"a"}, "c": {"b"}}


def test_the_glossary_is_in_order_and_names_every_method(book):
    terms = re.findall(r"^\* \*\*(.+?)\*\*: ", book.pages["docs/glossary.md"], re.M)
    assert len(terms) >= 75 and [term.lower() for term in terms] == sorted(term.lower() for term in terms)
    words = " ".join(terms)
    for name in (
        "DPO",
        "IPO",
        "SimPO",
        "ORPO",
        "KTO",
        "PPO",
        "GRPO",
        "Dr. GRPO",
        "DAPO",
        "GSPO",
        "CISPO",
        "GDPO",
        "GAE",
    ):
        assert name in words


def test_every_figure_of_a_run_is_explained_on_the_site(site):
    page = Reader((site / "docs" / "metrics.html").read_text(encoding="utf-8"))
    assert {name for name in WORDS if "@" not in name} <= set(page.ids)


# ----------------------------------------------------------------------------------------------------------------------
# Foundations

FOUNDATIONS = sorted((ROOT / "docs" / "foundations").glob("*.md"))


def examples(path: Path) -> doctest.DocTest:
    """What a page shows typed into Python, as one session."""
    text = re.sub(r"^```.*$", "", path.read_text(encoding="utf-8"), flags=re.M)  # a fence is no answer
    return doctest.DocTestParser().get_doctest(text, {}, path.stem, str(path), 0)


@pytest.mark.parametrize("path", FOUNDATIONS, ids=lambda path: path.stem)
def test_the_examples_of_the_foundations_are_true(path):
    torch.set_printoptions(profile="default")
    session = examples(path)
    assert path.stem == "README" or len(session.examples) >= 3
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(session).failed == 0


def test_an_example_that_is_wrong_is_noticed(tmp_path):
    page = (ROOT / "docs" / "foundations" / "policy.md").read_text(encoding="utf-8")
    (tmp_path / "wrong.md").write_text(page.replace("-1.1502", "-1.1503"), encoding="utf-8")
    assert doctest.DocTestRunner().run(examples(tmp_path / "wrong.md"), out=lambda text: None).failed == 1


def test_every_foundation_has_its_figure_and_the_command_that_draws_it(book):
    pages = [
        path for path in book.in_order("docs/foundations") if path.split("/")[-1] not in ("README.md", "exercises.md")
    ]
    assert [path.split("/")[-1][:-3] for path in pages] == list(figures.FIGURES)
    for path in pages:
        name = path.split("/")[-1][:-3]
        assert f"]({name}.png)" in book.pages[path] and f"python docs/figures.py {name}" in book.pages[path]
    for path, after in itertools.pairwise([*pages, "docs/foundations/exercises.md"]):
        assert book.pages[path].rstrip().splitlines()[-1].startswith(f"Next: [{book.title(after)}](")


def test_every_exercise_has_a_solution(book):
    page = book.pages["docs/foundations/exercises.md"]
    numbers = [int(n) for n in re.findall(r"^\*\*(\d+)\. ", page, re.M)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 12
    assert page.count("<summary>Solution</summary>") == page.count("```python") == len(numbers)


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_drawn(name, tmp_path):
    figures.FIGURES[name](tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


# ----------------------------------------------------------------------------------------------------------------------
# In a browser

browser = pytest.mark.skipif(walk.find_browser() is None, reason="no browser is installed (Debian: chromium)")


@browser
def test_a_browser_finds_nothing_wrong_with_some_pages(site):
    some = {"index.html", "grpo.html", "ppo.html", "docs/index.html", "docs/metrics.html"}
    assert walk.walk(site, walk.find_browser(), only=some) == []


@browser
@pytest.mark.slow
def test_a_browser_finds_nothing_wrong_with_any_page(site):
    assert walk.walk(site, walk.find_browser()) == []


@browser
def test_a_browser_sees_what_is_wrong(tmp_path, site):
    head = "<!DOCTYPE html><html><body><main>Some words that are long enough. "
    (tmp_path / "index.html").write_text(
        head + '<a href="no.html">x</a><a href="#no">x</a><img src="no.png"><script>throw Error("oh")</script>'
        '<script src="http://192.0.2.1/a.js"></script><div style="width: 5000px">x</div></main></body></html>'
    )
    wrong = "\n".join(walk.walk(tmp_path, walk.find_browser(), only={"index.html"}, features=False))
    for words in ("leads to no.html, which does not", "#no, and the page has no such place", "404", "Error: oh",
                  "asks another machine: http://192.0.2.1/a.js", "pixels wide", "no page has a formula"):  # fmt: skip
        assert words in wrong, wrong
