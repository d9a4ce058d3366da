"""Python as HTML: one string for each line, names linked to where they are defined, nothing added to the text."""

import ast
import io
import keyword
import re
import tokenize
from collections.abc import Callable
from html import escape

Links = dict[tuple[int, int], tuple[str, str]]  # (line, column) of a name -> (address, title)
Pieces = list[list[tuple[int, str, str]]]  # of each line: (column, text, html), in order; together they are the line

STRINGS = {"STRING", "FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END"}


def python_pieces(source: str, links: Links | None = None) -> Pieces:
    """The source's tokens and what stands between them, line by line. What is no Python comes out as plain text."""
    lines = source.splitlines()
    pieces: Pieces = [[] for _ in lines]
    ends = [0] * len(lines)  # the column up to which a line is done

    def add(row: int, start: int, end: int, kind: str, link: tuple[str, str] | None = None) -> None:
        text = lines[row][start:end]
        if text:
            html = f'<span class="{kind}">{escape(text, quote=False)}</span>' if kind else escape(text, quote=False)
            if link:
                title = f' title="{escape(link[1])}"' if link[1] else ""
                html = f'<a href="{escape(link[0])}"{title}>{escape(text, quote=False)}</a>'
            pieces[row].append((start, text, html))
            ends[row] = end

    before = ""
    try:
        for token in tokenize.generate_tokens(io.StringIO(source + "\n").readline):
            name, text, (row, column), (last_row, last_column), _ = token
            kind_name = tokenize.tok_name[name]
            if not text.strip() or kind_name in ("NEWLINE", "NL", "INDENT", "DEDENT", "ENDMARKER"):
                continue
            kind = _kind(kind_name, text, before)
            for line in range(row - 1, last_row):
                start = column if line == row - 1 else 0
                end = last_column if line == last_row - 1 else len(lines[line])
                if start < ends[line]:  # 3.12 counts doubled braces of an f-string twice
                    start = ends[line]
                add(line, ends[line], start, "")
                add(line, start, end, kind, (links or {}).get((row, column)) if kind_name == "NAME" else None)
            before = text
    except (tokenize.TokenError, SyntaxError, IndentationError):
        pass
    for row, line in enumerate(lines):
        add(row, ends[row], len(line), "")
    return pieces


def _kind(token: str, text: str, before: str) -> str:
    if token == "COMMENT":
        return "c"
    if token in STRINGS:
        return "s"
    if token == "NUMBER":
        return "n"
    if token == "NAME":
        if keyword.iskeyword(text):
            return "k"
        return "d" if before in ("def", "class") else ""
    return ""


def joined(pieces: Pieces, first: tuple[int, int], last: tuple[int, int]) -> str:
    """The html of what stands between two (line, column), lines counted from 1; the end is exclusive."""
    html = []
    for row in range(first[0], last[0] + 1):
        low, high = (first[1] if row == first[0] else 0), (last[1] if row == last[0] else 10**9)
        html.append("".join(code for column, _, code in pieces[row - 1] if low <= column < high).rstrip())
    return " ".join(part.strip() for part in html if part.strip())


def line_html(pieces: Pieces, row: int) -> str:
    return "".join(code for _, _, code in pieces[row - 1])


def doctest_html(lines: list[str]) -> str:
    """Examples as they stand in a docstring: what is typed, and below it what Python answers."""
    html, code, starts = [], [], ("...", ">>>")
    for line in [*lines, ""]:
        if code and not line.startswith("..."):
            shown = python_pieces("\n".join(text[4:] for text in code))
            for typed, row in zip(code, range(1, len(code) + 1)):
                html.append(f'<span class="p">{escape(typed[:3])}</span> {line_html(shown, row)}'.rstrip())
            code = []
        if line.startswith(starts):
            code.append(line)
        elif line:
            html.append(f'<span class="o">{escape(line, quote=False)}</span>')
    return "\n".join(html)


SHELL = re.compile(r"^\s*(?:\S+=\S+ )*(python3?|torchrun|pytest|pip|ruff|source|git|tensorboard|ALIGNBOOK_DATA=\S+)\s")


def is_shell(lines: list[str]) -> bool:
    return any(SHELL.match(line + " ") for line in lines)


def shell_html(lines: list[str]) -> str:
    """Commands, each with a button that copies it without its comment. A backslash goes on in the next line."""
    html, waiting = [], ""
    for line in lines:
        command, space, comment = _without_comment(line)
        shown = escape(command, quote=False) + space + (f'<span class="c">{escape(comment)}</span>' if comment else "")
        whole = (waiting + command.strip()).strip()
        if whole.endswith("\\"):
            waiting = whole[:-1].rstrip() + " "
            html.append(shown)
            continue
        waiting = ""
        if SHELL.match(whole + " "):
            shown = f'<span class="cmd" data-copy="{escape(whole)}">{shown}</span>'
        html.append(shown)
    return "\n".join(html)


def _without_comment(line: str) -> tuple[str, str, str]:
    match = re.match(r"(.*?)(\s*)((?:(?<=\s)|^)#\s.*)$", line)
    return match.groups() if match else (line.rstrip(), "", "")


# ----------------------------------------------------------------------------------------------------------------------
# What a name means


def definitions(tree: ast.Module) -> dict[str, int]:
    """The line of every name that a module defines: functions, classes, "Class.method", "Class.field", constants."""
    found: dict[str, int] = {}
    for node in _flat(tree.body):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[node.name] = node.lineno
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    found[f"{node.name}.{inner.name}"] = inner.lineno
                elif isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
                    found[f"{node.name}.{inner.target.id}"] = inner.lineno
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if _annotated(node) else []
        for target in targets:
            for name in ast.walk(target):
                if isinstance(name, ast.Name):
                    found.setdefault(name.id, name.lineno)
    return found


def _annotated(node: ast.AST) -> bool:
    return isinstance(node, ast.AnnAssign)


def _flat(body: list) -> list:
    """Statements of a module, those under ``if`` and ``try`` among them."""
    found = []
    for node in body:
        found.append(node)
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            found += _flat([*node.body, *getattr(node, "orelse", [])])
    return found


def imports(tree: ast.Module, modules: set[str]) -> dict[str, tuple[str, str]]:
    """What each imported name of the project means: (module, name in it), with "" for a module itself."""
    known: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in modules:
                    known[alias.asname or alias.name] = (alias.name, "")
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in modules:
                    known[alias.asname or alias.name] = (inner, "")
                elif node.module in modules:
                    known[alias.asname or alias.name] = (node.module, alias.name)
    return known


def find_links(
    source: str, module: str, modules: dict[str, dict[str, int]], address: Callable[[str, str], tuple[str, str] | None]
) -> Links:
    """Where the names of a file are defined, by their place in it. A name that a function binds itself is its own.

    modules: the definitions of every file; address: (module, name) -> (link, title), or None.
    """
    tree, lines = ast.parse(source), source.splitlines()
    known, own = imports(tree, set(modules)), modules.get(module, {})
    links: Links = {}

    def place(node, text: str) -> tuple[int, int]:
        line = lines[node.lineno - 1].encode()
        column = len(line[: node.col_offset].decode())
        return node.lineno, lines[node.lineno - 1].index(text, column)

    def link(where: tuple[int, int], target: tuple[str, str] | None) -> None:
        found = address(*target) if target else None
        if found:
            links[where] = found

    def visit(node, local: set[str], cls: str) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inner = local | bound(node)
            arguments = node.args
            outside = [*getattr(node, "decorator_list", []), *arguments.defaults, *arguments.kw_defaults]
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            outside += [one.annotation for one in every if one]
            outside += [getattr(node, "returns", None)]
            for one in filter(None, outside):
                visit(one, local, cls)
            for one in node.body if isinstance(node.body, list) else [node.body]:
                visit(one, inner, cls)
            return
        if isinstance(node, ast.ClassDef):
            for one in [*node.decorator_list, *node.bases, *[key.value for key in node.keywords], *node.body]:
                visit(one, local, node.name)
            return
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module in modules:
                link(place(node, node.module.split(".")[0]), (node.module, ""))
            for alias in node.names:
                link(place(alias, alias.name), known.get(alias.asname or alias.name))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                link(place(alias, alias.name.split(".")[0]), known.get(alias.asname or alias.name))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in local:
            link(place(node, node.id), known.get(node.id) or ((module, node.id) if node.id in own else None))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            base, name = node.value.id, node.attr
            end = (node.end_lineno, len(lines[node.end_lineno - 1].encode()[: node.end_col_offset].decode()))
            where = (end[0], end[1] - len(name))
            if base == "self" and f"{cls}.{name}" in own:
                link(where, (module, f"{cls}.{name}"))
            elif base not in local and known.get(base, ("", "x"))[1] == "" and name in modules[known[base][0]]:
                link(where, (known[base][0], name))
        for child in ast.iter_child_nodes(node):
            visit(child, local, cls)

    visit(tree, set(), "")
    return links


def bound(function) -> set[str]:
    """The names that a function binds: its arguments, and whatever it assigns."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    names = {one.arg for one in every if one}
    body = function.body if isinstance(function.body, list) else [function.body]
    for node in (inner for one in body for inner in ast.walk(one)):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
    return names
