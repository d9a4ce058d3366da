"""The pages of the site as HTML: sources, Markdown, folders; the frame around them; the index for the search."""

import os
import re
from dataclasses import dataclass, field
from html import escape, unescape
from pathlib import Path

from making import formulas
from making.book import Book, Source
from making.chapters import Section
from making.highlight import (
    Pieces,
    doctest_html,
    find_links,
    is_shell,
    joined,
    line_html,
    python_pieces,
    shell_html,
)
from making.prose import anchor, blocks, code, files, inline
from runtime.errors import UserError

HERE = Path(__file__).parent


@dataclass
class Page:
    path: str  # of its source in the project
    title: str
    body: str
    kind: str  # "source", "text" or "folder"
    contents: list[tuple[int, str, str]] = field(default_factory=list)  # level, anchor, words
    entries: list[dict] = field(default_factory=list)  # for the search


def slug(heading: str) -> str:
    """What GitHub calls a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def plain(html: str) -> str:
    """The words of a piece of HTML."""
    html = re.sub(r"<(svg|button)\b.*?</\1>", " ", html, flags=re.S)
    html = re.sub(r'<math[^>]* title="([^"]*)">.*?</math>', r" \1 ", html, flags=re.S)  # as it is written
    html = re.sub(r"</(p|li|td|th|h\d|pre|tr|div|code)>|<br>", lambda m: m[0] + " ", html)
    return " ".join(unescape(re.sub(r"<[^>]+>", "", html)).split())


# ----------------------------------------------------------------------------------------------------------------------
# What a name in the text means


class Resolver:
    """Names in the prose of one page: files, functions, fields of configurations, figures of a run."""

    def __init__(self, book: Book, page: str, source: Source | None = None):
        self.book, self.page = book, page
        self.known: dict[str, tuple[str, str]] = {}  # name -> (module, name there)
        self.modules = book.modules
        if source:
            self.known = {name: (source.module, name) for name in source.names}
            self.known = source.imports | self.known
            for name in reversed(source.names):  # fields and methods by their own names
                if "." in name and name.partition(".")[2] not in self.known:
                    self.known[name.partition(".")[2]] = (source.module, name)
        self.everywhere = book.unique
        self.figures = set(re.findall(r"`(\w+)`", _first_cells(book.pages.get("docs/metrics.md", ""))))

    def __call__(self, text: str) -> tuple[str, str] | None:
        for path in (text, text.partition("#")[0]):
            if path in self.book.sources or path in self.book.pages:
                return self.book.relative(self.page, self.book.address(path)) + text[len(path) :], path
        name = re.sub(r"\(.*\)$", "", text).removeprefix("--")
        if not re.fullmatch(r"[\w.]+", name):
            return None
        if name in self.known:
            return self.address(*self.known[name])
        if name in self.figures:
            there = self.book.relative(self.page, "docs/metrics.html")
            return (f"{there}#{name}", "the figures of a run") if self.page != "docs/metrics.md" else None
        if name in self.everywhere and (len(name) > 5 or "_" in name):
            return self.address(*self.everywhere[name])
        module, _, inner = name.partition(".")
        if module in self.modules and inner in self.modules[module].names:
            return self.address(module, inner)
        return None

    def address(self, module: str, name: str) -> tuple[str, str] | None:
        """The link to a name's definition and what the reader is told of it."""
        source = self.modules[module]
        there = self.book.relative(self.page, self.book.address(source.path))
        if not name:
            return there, source.path
        if name not in source.names:
            return None
        here = "" if source.path == self.page else there
        mark = name if name in source.anchors else f"L{source.names[name]}"
        return f"{here}#{mark}", f"{name}, {source.path} line {source.names[name]}"


def _first_cells(text: str) -> str:
    return "\n".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))


# ----------------------------------------------------------------------------------------------------------------------
# Sources


def source_page(book: Book, source: Source) -> Page:
    """A file of Python, prose beside code."""
    names = Resolver(book, source.path, source)
    modules = {one.module: one.names for one in book.sources.values()}
    links = find_links(source.text, source.module, modules, names.address)
    pieces = python_pieces(source.text, links)
    page = Page(source.path, source.path, "", "source")
    seen: set[str] = set()
    html = [_head(book, source, names)]
    for section in source.sections:
        html.append(_section(section, source, pieces, names, page, seen))
    page.body = "\n".join(part for part in html if part).replace(INSIDE, _inside(page), 1)
    return page


INSIDE = "<!-- what is in this file -->"


def _inside(page: Page) -> str:
    """The contents again, beside the head of the file, where there is room."""
    if len(page.contents) < 3:
        return ""
    links = [
        f'<li class="at{level}"><a href="#{mark}">{escape(words)}</a></li>' for level, mark, words in page.contents
    ]
    return f'<nav class="inside" aria-label="In this file"><ul>{"".join(links)}</ul></nav>'


def _section(section: Section, source: Source, pieces: Pieces, names: Resolver, page: Page, seen: set[str]) -> str:
    prose = blocks(section.text, names) if section.text else ""
    if section.kind == "heading":
        first, _, rest = section.text.partition("\n\n")
        words = inline(" ".join(first.split()), names)
        mark = f"L{section.prose[0]}"
        page.contents.append((1, mark, plain(words)))
        more = f'<div class="wide prose">{blocks(rest, names)}</div>' if rest else ""
        return f'<h2 id="{mark}" class="ruled">{words}</h2>{more}'
    new = bool(section.name) and section.name not in seen and section.kind != "fields"
    mark = f' id="{section.name}"' if new else ""
    if new:
        seen.add(section.name)
        if section.level < 2:
            page.contents.append((2 + section.level, section.name, section.name.rpartition(".")[2]))
    if prose or new:
        title = section.name if new else ""
        page.entries.append({"h": title, "a": section.name if new else "", "t": plain(prose)})
    if section.kind == "module":
        listing = _code(section.code, source, pieces)
        about = f'<details class="imports"><summary>The imports</summary>{listing}</details>' if listing else ""
        return f'<section class="module head"><div class="wide prose">{prose}{about}</div>{INSIDE}</section>'
    if section.kind == "fields":
        return _table(section, source, pieces, names, page)
    listing = _code(section.code, source, pieces)
    if not listing:
        return f'<section class="module"{mark}><div class="wide prose">{prose}</div></section>' if prose else ""
    head = ""
    if new:
        kind = "method" if section.level else "top"
        label = escape(section.name.rpartition(".")[2] if section.level else section.name)
        head = f'<a class="name {kind}" href="#{escape(section.name)}">{label}</a>'
    left = f'<div class="prose"><div class="stick">{head}{prose}</div></div>'
    return f'<section class="cut"{mark}>{left}{listing}</section>'


def _code(rows: list[int], source: Source, pieces: Pieces) -> str:
    """Lines of code with their numbers; blank lines at the ends are left out."""
    lines = source.text.splitlines()
    shown = list(rows)
    while shown and not lines[shown[0] - 1].strip():
        shown.pop(0)
    while shown and not lines[shown[-1] - 1].strip():
        shown.pop()
    if not shown:
        return ""
    margin = min(len(lines[n - 1]) - len(lines[n - 1].lstrip()) for n in shown if lines[n - 1].strip())
    html = []
    for n in shown:
        indent = len(lines[n - 1]) - len(lines[n - 1].lstrip())
        hang = f' style="--i:{indent + 2}"' if indent else ""
        html.append(f'<span class="l" id="L{n}" data-n="{n}"{hang}>{line_html(pieces, n)}\n</span>')
    deep = " deep" if margin >= 8 else ""
    return f'<div class="code{deep}"><div class="stick"><pre><code>{"".join(html)}</code></pre></div></div>'


def _table(section: Section, source: Source, pieces: Pieces, names: Resolver, page: Page) -> str:
    """The fields of a dataclass: name, type, default, meaning."""
    lines = source.text.splitlines()
    rows = []
    for one in section.fields:
        if one.node is None:
            rows.append(f'<tr id="L{one.text[0]}"><td colspan="3" class="aside">{inline(one.prose, names)}</td></tr>')
            continue
        kind = _segment(pieces, lines, one.node.annotation)
        value = f"<code>{_segment(pieces, lines, one.node.value)}</code>" if one.node.value else ""
        meaning = inline(one.prose, names) if one.prose else ""
        mark = f"{section.name}.{one.name}"
        if not meaning:
            meaning = _inherited(names, source, section.name, one.name)
        rows.append(
            f'<tr id="{mark}"><td id="L{one.code[0]}"><a class="field" href="#{mark}"><code>{one.name}</code></a>'
            f'<div class="type"><code>{kind}</code></div></td><td>{value}</td><td>{meaning}</td></tr>'
        )
        page.entries.append({"h": mark, "a": mark, "t": plain(meaning)})
    head = "<thead><tr><th>field</th><th>default</th><th>meaning</th></tr></thead>"
    return f'<div class="fields"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _segment(pieces: Pieces, lines: list[str], node) -> str:
    def column(row: int, offset: int) -> int:
        return len(lines[row - 1].encode()[:offset].decode())

    first = node.lineno, column(node.lineno, node.col_offset)
    last = node.end_lineno, column(node.end_lineno, node.end_col_offset)
    return joined(pieces, first, last)


def _inherited(names: Resolver, source: Source, cls: str, field: str) -> str:
    """What a field without a text means according to the class that it comes from, as a link there."""
    seen, waiting = set(), [(source.module, cls)]
    while waiting:
        module, name = waiting.pop(0)
        if (module, name) in seen or module not in names.modules:
            continue
        seen.add((module, name))
        there = names.modules[module]
        if (module, name) != (source.module, cls) and f"{name}.{field}" in there.names:
            found = names.address(module, f"{name}.{field}")
            return f"another default than {anchor(f'{name}.{field}', found)} has"
        known = there.imports | {one: (module, one) for one in there.names}
        for node in there.tree.body:
            if getattr(node, "name", None) == name and hasattr(node, "bases"):
                for base in node.bases:
                    inner = getattr(base, "id", None)
                    if inner in known:
                        waiting.append(known[inner])
                    elif getattr(base, "attr", None) and getattr(base.value, "id", None) in known:
                        waiting.append((known[base.value.id][0], base.attr))
    return ""


def _head(book: Book, source: Source, names: Resolver) -> str:
    """The top of a source page: where it stands in the book, and what belongs to it."""
    place = ""
    if source.path in book.order:
        part = next((title for title, paths in book.shelves() if source.path in paths), "")
        place = f'<p class="kicker">{part} · chapter {book.order.index(source.path) + 1} of {len(book.order)}</p>'
    rows = []
    for title, paths in _relations(book, source):
        labels = ((path, book.title(path) if path in book.pages else path.rpartition("/")[2]) for path in paths)
        links = ", ".join(anchor(label, names(path)) for path, label in labels)
        rows.append(f"<dt>{title}</dt><dd>{links}</dd>")
    box = f'<dl class="relations">{"".join(rows)}</dl>' if rows else ""
    return f'<header class="chapter">{place}<h1>{escape(source.path)}</h1>{box}</header>'


def _relations(book: Book, source: Source) -> list[tuple[str, list[str]]]:
    """The files that belong to a source: what it builds on and who builds on it, presets, tests, pages about it."""
    if source.path.startswith(("tests/", "configs/", "bench/", "docs/")):
        return []
    stem = source.path.rpartition("/")[2].removesuffix(".py")
    presets = [path for path in book.sources if re.match(rf"configs/{stem}(_|\.)", path)]
    found = {
        "builds on": [path for path in book.order if path != source.path and _imports(book, source, path)],
        "used by": [
            path for path in book.order if path != source.path and _imports(book, book.sources[path], source.path)
        ],
        "presets": presets,
        "tests": [path for path in (f"tests/test_{stem}.py",) if path in book.sources],
        "pages": [p for p in book.pages if source.path in book.named[p] and not p.endswith("README.md")],
    }
    return [(title, paths) for title, paths in found.items() if paths]


def _imports(book: Book, source: Source, path: str) -> bool:
    module = book.sources[path].module
    return any(one[0] == module for one in source.imports.values())


# ----------------------------------------------------------------------------------------------------------------------
# Markdown


def markdown_page(book: Book, path: str) -> Page:
    """A page of docs/, or the front page. UserError if a link leads nowhere."""
    names = Resolver(book, path)
    parser = _parser()
    page = Page(path, book.title(path), "", "text")
    tokens = parser.parse(book.pages[path])
    marked = path in ("docs/metrics.md", "docs/glossary.md")
    used: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            words = tokens[i + 1].content
            mark = slug(re.sub(r"[`*]|\]\([^)]*\)|\[", "", words))
            used[mark] = used.get(mark, -1) + 1
            token.attrSet("id", mark if not used[mark] else f"{mark}-{used[mark]}")
            if token.tag in ("h2", "h3"):
                page.contents.append((int(token.tag[1]) - 1, token.attrGet("id"), plain(inline(words, lambda _: None))))
        for child in token.children or []:
            if child.type == "link_open":
                child.attrSet("href", book.resolve(path, str(child.attrGet("href"))))
                if ":" in str(child.attrGet("href")):
                    child.attrSet("rel", "noreferrer")
            elif child.type == "image":
                target = str(child.attrGet("src"))
                if target.endswith(".svg"):
                    child.type, child.content = "html_inline", _drawing(book, path, target, child.content)
                else:
                    child.attrSet("src", book.resolve(path, target))
                    child.attrSet("loading", "lazy")
    inside = _Inside(names)
    parser.renderer.rules |= {
        "text": inside.text, "code_inline": inside.code, "code_block": inside.block, "fence": inside.block
    }  # fmt: skip
    html = parser.renderer.render(tokens, parser.options, {})
    if marked:
        seen: set[str] = set()
        html = re.sub(r"<tr>\s*<td>(.*?)</td>", lambda match: _mark_cell(match, seen), html, flags=re.S)
        html = re.sub(r"<li>\s*(?:<p>)?<strong>(.*?)</strong>", _mark_term, html, flags=re.S)
    html = html.replace("<table>\n", '<div class="table"><table>\n').replace("</table>\n", "</table></div>\n")
    page.body = html
    page.entries = _entries(html)
    return page


def _parser():
    try:
        from markdown_it import MarkdownIt
    except ImportError:
        raise UserError('the site needs markdown-it-py: pip install -e ".[docs]"') from None
    return MarkdownIt("commonmark").enable(["table", "strikethrough"])


class _Inside:
    """How code is shown in Markdown: the same way as in docstrings."""

    def __init__(self, names: Resolver):
        self.names = names

    def text(self, tokens, i, options, env) -> str:
        return formulas.subscripts(tokens[i].content)

    def code(self, tokens, i, options, env) -> str:
        depth = sum({"link_open": 1, "link_close": -1}.get(token.type, 0) for token in tokens[:i])
        return code(tokens[i].content, (lambda _: None) if depth else self.names)

    def block(self, tokens, i, options, env) -> str:
        lines, kind = tokens[i].content.rstrip("\n").split("\n"), tokens[i].info.strip()
        if kind == "formula":
            return formulas.block(lines)
        if kind == "python" and lines[0].startswith(">>>"):
            return f'<pre class="doctest"><code>{doctest_html(lines)}</code></pre>'
        if kind == "python":
            shown = python_pieces("\n".join(lines))
            body = "\n".join(line_html(shown, row) for row in range(1, len(lines) + 1))
            return f'<pre class="python"><code>{body}</code></pre>'
        if is_shell(lines):
            return f'<pre class="shell"><code>{files(shell_html(lines), self.names)}</code></pre>'
        return f"<pre><code>{escape(tokens[i].content.rstrip(), quote=False)}</code></pre>"


def _drawing(book: Book, page: str, target: str, words: str) -> str:
    """An SVG in the page itself, so that it takes the page's colours and its names can be clicked."""
    book.resolve(page, target)
    path = Path(os.path.normpath(book.root / os.path.dirname(page) / target))
    drawn = path.read_text(encoding="utf-8")
    folder = path.relative_to(book.root).parent.as_posix()

    def link(match) -> str:
        whole = os.path.normpath(os.path.join(folder, match[1])).replace(os.sep, "/")
        return f'href="{book.relative(page, book.address(whole))}"'

    width = re.search(r'viewBox="0 0 (\d+)', drawn)
    drawn = drawn.replace("<svg ", f'<svg style="min-width: {min(int(width[1]), 620)}px" ', 1)
    drawn = re.sub(r'href="([^"#:]+\.(?:py|md))"', link, drawn)
    return f'<div class="drawing" role="img" aria-label="{escape(words)}">{drawn}</div>'


def _mark_cell(match, seen: set[str]) -> str:
    def span(code) -> str:
        new = code[1] not in seen
        seen.add(code[1])
        return f'<code id="{code[1]}">{code[1]}</code>' if new else code[0]

    cell = re.sub(r"<code>(\w+)</code>", span, match[1])
    return f"<tr><td>{cell}</td>"


def _mark_term(match) -> str:
    return match[0].replace("<strong>", f'<strong class="term" id="{slug(plain(match[1]))}">', 1)


def _entries(html: str) -> list[dict]:
    """The sections of a page for the search; a term of the glossary, or a row of figures, is one of its own."""
    found = []
    for part in re.split(r"(?=<h[1-4] id=)", html):
        head = re.match(r'<h(\d) id="([^"]*)">(.*?)</h\d>', part, re.S)
        terms = re.findall(r'<strong class="term" id="([^"]+)">(.*?)</strong>(.*?)(?=</li>)', part, re.S)
        rows = re.findall(r'<tr><td>(.*?<code id="([^"]+)">.*?)</td>(.*?)</tr>', part, re.S)
        for mark, words, rest in terms:
            found.append({"h": plain(words), "a": mark, "t": plain(rest).lstrip(": ")})
        for words, mark, rest in rows:
            found.append({"h": plain(words), "a": mark, "t": plain(rest)})
        title = plain(head[3]) if head and head[1] != "1" else ""
        rest = part[head.end() :] if head else part
        found.append({"h": title, "a": head[2] if title else "", "t": "" if terms or rows else plain(rest)})
    return [one for one in found if one["h"] or one["t"]]


# ----------------------------------------------------------------------------------------------------------------------
# Folders, and the frame


def folder_page(book: Book, folder: str) -> Page:
    """What a folder holds."""
    rows = []
    for path in sorted((book.root / folder).iterdir()):
        name = path.relative_to(book.root).as_posix()
        if path.name.startswith((".", "__pycache__")) or path.is_dir():
            continue
        if name in book.sources or name in book.pages:
            about = book.sources[name].summary if name in book.sources else book.title(name)
            label = f'<a href="{book.relative(f"{folder}/x.md", book.address(name))}"><code>{path.name}</code></a>'
        else:
            about, label = f"{path.stat().st_size:,} bytes", f"<code>{escape(path.name)}</code>"
        about = inline(about, lambda _: None)
        rows.append(f"<tr><td>{label}</td><td>{about}</td></tr>")
    table = f'<div class="table"><table><tbody>{"".join(rows)}</tbody></table></div>'
    return Page(f"{folder}/README.md", f"{folder}/", f"<h1>{folder}/</h1>{table}", "folder")


def framed(book: Book, page: Page, shelves: list[tuple[str, list[str]]]) -> str:
    """The whole HTML of a page."""
    at = book.address(page.path)
    root = os.path.relpath(".", os.path.dirname(at) or ".").replace(os.sep, "/") + "/"
    reading = ["README.md", *(path for _, paths in shelves for path in paths)]
    before = after = ""
    if page.path in reading:
        i = reading.index(page.path)
        before = _step(book, page.path, reading[i - 1], "before", "← ") if i else ""
        after = _step(book, page.path, reading[i + 1], "after", "", " →") if i + 1 < len(reading) else ""
    fields = {
        "title": escape("alignbook" if page.path == "README.md" else f"{page.title} · alignbook"),
        "root": "./" if root == "./" else root,
        "kind": page.kind,
        "nav": _navigation(book, page, shelves),
        "body": page.body,
        "contents": _contents(page),
        "steps": f'<nav class="steps">{before}{after}</nav>',
        "source": escape(page.path),
    }
    text = (HERE / "frame.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], text)


def _step(book: Book, here: str, there: str, kind: str, left: str = "", right: str = "") -> str:
    title = "Front page" if there == "README.md" else book.title(there)
    return f'<a class="{kind}" href="{book.relative(here, book.address(there))}">{left}{escape(title)}{right}</a>'


def _navigation(book: Book, page: Page, shelves: list[tuple[str, list[str]]]) -> str:
    html = [f'<a class="front" href="{book.relative(page.path, "index.html")}">Front page</a>']
    for title, paths in shelves:
        links = []
        for path in paths:
            here = ' aria-current="page"' if path == page.path else ""
            label = book.title(path)
            label = "Overview" if label == title else label
            links.append(f'<li><a href="{book.relative(page.path, book.address(path))}"{here}>{escape(label)}</a></li>')
        is_open = " open" if page.path in paths or page.path == "README.md" and not title.startswith("Behind") else ""
        html.append(f"<details{is_open}><summary>{escape(title)}</summary><ul>{''.join(links)}</ul></details>")
    return "".join(html)


def _contents(page: Page) -> str:
    if len(page.contents) < 2:
        return ""
    links = [(level, f'<a href="#{mark}">{escape(words)}</a>') for level, mark, words in page.contents]
    items = "".join(f'<li class="at{level}">{link}</li>' for level, link in links)
    is_open = "" if page.kind == "source" else " open"
    return f'<details class="contents"{is_open}><summary>On this page</summary><ul>{items}</ul></details>'
