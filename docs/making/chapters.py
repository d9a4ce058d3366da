"""A source file as sections of a page: prose on the left, the code that it speaks of on the right.

A file is cut where its author paused: at a ruled heading, a function, a class, a comment that has lines of its own. A
docstring and such comments are prose; everything else is code. Fields of a dataclass, with the texts under them, are a
table. Every line of the file belongs to exactly one place (``Section.lines``); a test holds that.
"""

import ast
import inspect
import io
import re
import tokenize
from dataclasses import dataclass, field

RULE = re.compile(r"^# ?-{20,}$")
ASIDE = re.compile(r"^\s*# ?(fmt|noqa|type|ruff|pragma)\b")


@dataclass
class Field:
    """A row of the table of fields: the lines of its assignment, and those of the text under it."""

    name: str
    node: ast.AnnAssign
    code: list[int]
    text: list[int]
    prose: str  # the docstring, or the comment, above or below


@dataclass
class Section:
    """A piece of the page. All numbers are lines, counted from 1."""

    kind: str  # "module", "heading", "code" or "fields"
    name: str = ""  # the function or class that begins here, "Class.method"
    prose: list[int] = field(default_factory=list)
    code: list[int] = field(default_factory=list)
    fields: list[Field] = field(default_factory=list)
    text: str = ""  # what the prose says, without quotes and comment signs
    level: int = 0  # 0: a function or class of the module, 1: a method, 2: inside a function

    def lines(self) -> list[int]:
        return [*self.prose, *self.code, *(n for one in self.fields for n in [*one.code, *one.text])]


def cut(source: str) -> list[Section]:
    """The sections of a file, in its order."""
    lines, tree = source.splitlines(), ast.parse(source)
    docstrings, starts, tables, fields = _landmarks(tree, _comments_at_ends(source))
    top = {min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))]) for node in tree.body}
    comments = _comments_of_their_own(source)
    sections: list[Section] = [Section("code")]
    row = 1

    def new(kind: str, **more) -> Section:
        sections.append(Section(kind, **more))
        return sections[-1]

    in_table: int | None = None
    while row <= len(lines):
        here = sections[-1]
        if row in docstrings:
            node, last = docstrings[row]
            if isinstance(node, ast.Module):
                here = new("module")
            _say(here, inspect.cleandoc(ast.get_docstring(node, clean=False) or ""), range(row, last + 1))
            row = last + 1
        elif row in fields:
            one, last, cls = fields[row]
            if in_table is not cls:
                new("fields", level=1, name=tables[cls])
                in_table = cls
            sections[-1].fields.append(one)
            row = last + 1
        elif row in comments:
            last = row
            while last + 1 in comments:
                last += 1
            texts = [lines[n - 1].strip() for n in range(row, last + 1)]
            if RULE.match(texts[0]):
                heading = new("heading")
                _say(heading, _uncommented(texts[1:]), range(row, last + 1))
                new("code")
            elif in_table is not None and _next_code(lines, last) in fields:
                sections[-1].fields.append(Field("", None, [], list(range(row, last + 1)), _uncommented(texts)))
            else:
                in_table = None
                begins = starts.get(_next_code(lines, last))
                inside = 2 if lines[row - 1].startswith(" ") else 0
                where = new("code", name=begins[0] if begins else "", level=begins[1] if begins else inside)
                _say(where, _uncommented(texts), range(row, last + 1))
            row = last + 1
        else:
            if row in starts:
                name, level = starts[row]
                if here.name != name or here.code:
                    here = new("code", name=name, level=level)
                in_table = None
            elif in_table is not None and lines[row - 1].strip():
                here, in_table = new("code", level=1), None
            elif row in top and _leaves_function(here, lines, row):
                here = new("code", level=0)
            here.code.append(row)
            row += 1
    return [one for one in sections if one.lines()]


def _say(section: Section, text: str, rows: range) -> None:
    section.text = f"{section.text}\n\n{text}" if section.text else text
    section.prose += rows


def _uncommented(texts: list[str]) -> str:
    return inspect.cleandoc("\n".join(re.sub(r"^#\s?", "", text) for text in texts if not RULE.match(text)))


def _next_code(lines: list[str], row: int) -> int:
    """The first line after ``row`` that is not blank; 0 if there is none, or if blank lines stand between."""
    return row + 1 if row < len(lines) and lines[row].strip() else 0


def _leaves_function(section: Section, lines: list[str], row: int) -> bool:
    """Whether the section so far ends inside a function or class, which this line does not belong to."""
    before = next((lines[n - 1] for n in reversed(section.code) if n < row and lines[n - 1].strip()), "")
    return bool(before) and (bool(section.name or section.level) or before.startswith(" "))


def _landmarks(tree: ast.Module, notes: dict[int, str]):
    """Docstrings by their first line; the lines at which functions and classes start, decorators among them; the
    tables of fields by class; fields by their first line."""
    docstrings, starts, tables, fields = {}, {}, {}, {}

    def note(node, prefix: str, level: int) -> None:
        body = getattr(node, "body", [])
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if ast.get_docstring(node) is not None:
                docstrings[body[0].lineno] = (node, body[0].end_lineno)
            if not isinstance(node, ast.Module):
                first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
                starts[first] = (prefix + node.name, level)
        if isinstance(node, ast.ClassDef) and _is_dataclass(node):
            rows = _fields(node, notes)
            if sum(bool(one.prose) for one, _ in rows) > 1:
                tables[node.lineno] = prefix + node.name
                for one, last in rows:
                    fields[one.code[0]] = (one, last, node.lineno)
        for child in body:
            if isinstance(child, ast.ClassDef):
                note(child, prefix if isinstance(node, ast.Module) else f"{prefix}{node.name}.", level)
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inside = isinstance(node, ast.ClassDef)
                nested = not isinstance(node, (ast.Module, ast.ClassDef, ast.If))
                if not nested or ast.get_docstring(child):
                    path = f"{prefix}{node.name}." if inside or nested else prefix
                    note(child, path, 2 if nested else 1 if inside else level)
            elif isinstance(child, (ast.If, ast.Try, ast.With)) and isinstance(node, ast.Module):
                note(child, prefix, level)

    note(tree, "", 0)
    return docstrings, starts, tables, fields


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(one) for one in node.decorator_list)


def _fields(node: ast.ClassDef, notes: dict[int, str]) -> list[tuple[Field, int]]:
    found = []
    for one, after in zip(node.body, [*node.body[1:], None]):
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            code, text = list(range(one.lineno, one.end_lineno + 1)), []
            prose = " ".join(notes[n] for n in code if n in notes)
            value = getattr(getattr(after, "value", None), "value", None)
            if isinstance(after, ast.Expr) and isinstance(value, str):
                text = list(range(after.lineno, after.end_lineno + 1))
                prose = f"{prose} {inspect.cleandoc(value)}".strip()
            found.append((Field(one.target.id, one, code, text, prose), (text or code)[-1]))
    return found


def _comments_at_ends(source: str) -> dict[int, str]:
    """What the comments after code say, by their lines."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = (one for one in tokens if one.type == tokenize.COMMENT and one.line[: one.start[1]].strip())
    return {one.start[0]: one.string.lstrip("# ") for one in comments}


def _comments_of_their_own(source: str) -> set[int]:
    """Lines that hold a comment alone, between statements: one inside brackets belongs to its expression."""
    found, depth = set(), 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
        alone = token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip()
        if alone and not depth and not ASIDE.match(token.line):
            found.add(token.start[0])
    return found
