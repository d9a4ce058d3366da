"""What the site is made of: which files there are, in which order, and where each of them and each name is found."""

import ast
import functools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from making.chapters import Section, cut
from making.highlight import definitions, imports
from runtime.errors import UserError

GROUPS = {  # the first chapter of each part of the book; the order is the front page's
    "tokenizer": "The model",
    "arithmetic": "Texts and updates",
    "pretrain": "First stages",
    "rollout": "Alignment",
    "evaluate": "Afterwards",
}
SHELVES = {  # pages of docs/ by their place in the navigation; what is not named here comes under "More"
    "Using it": ["README", "using", "panel", "yours", "real_data", "guarantees"],
    "Look it up": ["cheatsheet", "glossary", "map", "metrics", "choices"],
    "What was measured": ["results", "preferences", "studies", "experiments/", "reviews", "speed", "gpu", "streams"],
}
FOLDERS = ("runtime", "studies", "configs", "examples", "bench", "tests", "docs", "docs/making")
LARGEST = 2_000_000  # bytes of a file that is copied


@dataclass
class Source:
    """A Python file: its text, and what it defines."""

    path: str  # from the root, as in "runtime/run.py"
    text: str
    tree: ast.Module
    names: dict[str, int]
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)  # what it takes from other files, by name

    @property
    def module(self) -> str:
        folder, _, name = self.path.removesuffix(".py").rpartition("/")
        return f"runtime.{name}" if folder == "runtime" else name if folder in ("", "studies") else self.path

    @functools.cached_property
    def sections(self) -> list[Section]:
        return cut(self.text)

    @functools.cached_property
    def anchors(self) -> set[str]:
        """The names that have a place of their own on the page; others are found by their line."""
        fields = {f"{one.name}.{row.name}" for one in self.sections for row in one.fields if row.node}
        return fields | {one.name for one in self.sections if one.name}

    @property
    def summary(self) -> str:
        """The first sentence of its docstring."""
        text = " ".join((ast.get_docstring(self.tree) or "").split("\n\n")[0].split())
        return re.split(r"(?<=[a-z)`])\. ", text)[0].rstrip(".")


@dataclass
class Book:
    root: Path
    sources: dict[str, Source] = field(default_factory=dict)  # by path
    pages: dict[str, str] = field(default_factory=dict)  # Markdown by path
    order: list[str] = field(default_factory=list)  # the chapters' paths
    files: set[str] = field(default_factory=set)  # other files that a page links to
    listed: set[str] = field(default_factory=set)  # folders that a page links to

    @functools.cached_property
    def modules(self) -> dict[str, Source]:
        return {one.module: one for one in self.sources.values()}

    @functools.cached_property
    def unique(self) -> dict[str, tuple[str, str]]:
        """Functions and classes of the chapters and the plumbing whose names occur once: (module, name)."""
        found: dict[str, list[tuple[str, str]]] = {}
        for source in self.sources.values():
            if source.path in self.order or source.path.startswith(("runtime/", "studies/")):
                for name in source.names:
                    if not name.startswith("_") and "." not in name:
                        found.setdefault(name, []).append((source.module, name))
        return {name: places[0] for name, places in found.items() if len(places) == 1}

    @functools.cached_property
    def named(self) -> dict[str, set[str]]:
        """Of each page the sources that it links to, or names in its text and its commands."""
        found = {}
        for page, text in self.pages.items():
            links = re.findall(r"\]\(([\w./]+\.py)", text)
            found[page] = {os.path.normpath(os.path.join(os.path.dirname(page), path)) for path in links}
            found[page] |= set(re.findall(r"(?<![\w/.(])(?:\w+/)*\w+\.py(?!\w)", text))
        return found

    def title(self, path: str) -> str:
        """What a page is called in the navigation."""
        if path in self.pages:
            match = re.search(r"^# +(.+)$", self.pages[path], re.M)
            return re.sub(r"[`*]", "", match[1]).strip() if match else path
        return path

    def address(self, path: str) -> str:
        """Where a file of the project stands in the site, from its root."""
        if path in ("", ".", "README.md"):
            return "index.html"
        if path.endswith("/README.md"):
            return path.removesuffix("README.md") + "index.html"
        return re.sub(r"\.(py|md)$", ".html", path)

    def shelves(self) -> list[tuple[str, list[str]]]:
        """The navigation: titles, and the paths of their pages."""
        taken = {"README.md"}
        found: list[tuple[str, list[str]]] = []

        def shelf(title: str, paths: list[str]) -> None:
            paths = [path for path in paths if path not in taken]
            taken.update(paths)
            if paths:
                found.append((title, paths))

        folders = sorted({path.split("/")[1] for path in self.pages if path.count("/") == 2} - {"experiments"})
        for folder in sorted(folders, key=lambda name: (name != "foundations", name)):
            shelf(self.title(f"docs/{folder}/README.md"), self.in_order(f"docs/{folder}"))
            if folder == "foundations":
                self._parts(shelf)
        if "foundations" not in folders:
            self._parts(shelf)
        for title, names in SHELVES.items():
            paths: list[str] = []
            for name in names:
                paths += self.in_order(f"docs/{name[:-1]}") if name.endswith("/") else [f"docs/{name}.md"]
            shelf(title, [path for path in paths if path in self.pages])
        shelf("More", sorted(path for path in self.pages))
        shelf("Behind the chapters", sorted(path for path in self.sources if path.startswith(("runtime/", "studies/"))))
        return found

    def _parts(self, shelf) -> None:
        starts = [i for i, path in enumerate(self.order) if path.removesuffix(".py") in GROUPS]
        for first, last in zip(starts, [*starts[1:], len(self.order)]):
            shelf(GROUPS[self.order[first].removesuffix(".py")], self.order[first:last])

    def in_order(self, folder: str) -> list[str]:
        """The pages of a folder: its README first, then as the README links to them, then the others."""
        pages = sorted(path for path in self.pages if path.rpartition("/")[0] == folder)
        front = f"{folder}/README.md"
        linked = re.findall(r"\]\((\w+\.md)", self.pages.get(front, ""))
        rank = {f"{folder}/{name}": i for i, name in reversed(list(enumerate(linked)))}
        return sorted(pages, key=lambda path: (path != front, rank.get(path, 999), path))

    def resolve(self, page: str, target: str) -> str:
        """The address of what a page links to, relative to the page; notes files and folders that must be there.
        UserError for what does not exist.
        """
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            return target
        path, mark, heading = target.partition("#")
        whole = os.path.normpath(os.path.join(os.path.dirname(page), path)).replace(os.sep, "/")
        if whole in self.sources or whole in self.pages:
            there = self.address(whole)
        elif whole == "." or (self.root / whole).is_dir():
            folder = "" if whole == "." else whole
            if folder and f"{folder}/README.md" not in self.pages:
                self.listed.add(folder)
            there = f"{folder}/index.html".lstrip("/")
        elif (self.root / whole).is_file() and (self.root / whole).stat().st_size <= LARGEST:
            self.files.add(whole)
            there = whole
        else:
            raise UserError(f"{page} links to {target}, and there is no such file")
        return self.relative(page, there) + mark + heading

    def relative(self, page: str, address: str) -> str:
        """An address of the site as seen from a page."""
        return os.path.relpath(address, os.path.dirname(self.address(page)) or ".").replace(os.sep, "/")


def read_book(root: Path) -> Book:
    """All that the site shows. The chapters are in the order of the front page's table."""
    book = Book(root)
    for folder in (".", *FOLDERS):
        for path in sorted((root / folder).glob("*.py")):
            text = path.read_text(encoding="utf-8")
            if text.strip():
                tree = ast.parse(text)
                name = path.relative_to(root).as_posix()
                book.sources[name] = Source(name, text, tree, definitions(tree))
    names = set(book.modules)
    for source in book.sources.values():
        source.imports = imports(source.tree, names)
    for path in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        if path.is_file():
            book.pages[path.relative_to(root).as_posix()] = path.read_text(encoding="utf-8")
    if "README.md" not in book.pages:
        raise UserError(f"{root} has no README.md: it is no clone of the book")
    book.order = re.findall(r"^\| \[`(\w+\.py)`\]", book.pages["README.md"], re.M)
    return book
