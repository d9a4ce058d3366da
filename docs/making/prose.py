"""Docstrings and comments as HTML: paragraphs, lists, examples, commands, and blocks of formulas.

Their markup is plain: ``code``, **bold**, *emphasis*, lists that begin with ``*``, and blocks that are indented. Files
and names become links where ``Names`` knows them. Nothing else is read into the text, so nothing of it can be lost.
"""

import re
from collections.abc import Callable
from html import escape

from making import formulas
from making.highlight import doctest_html, is_shell, line_html, python_pieces, shell_html

Names = Callable[[str], tuple[str, str] | None]  # what stands in code -> (address, title)

INLINE = re.compile(
    r"``(?P<code>.+?)``|`(?P<tick>[^`]+)`|\*\*(?P<bold>[^*]+)\*\*|(?<![\w*])\*(?P<soft>[^\s*](?:[^*]*[^\s*])?)\*(?![\w*])"
    r"|\[(?P<text>[^\]]+)\]\((?P<target>[\w./#-]+)\)|(?<![\w/.])(?P<file>(?:\w+/)*\w+\.(?:py|md))\b",
    re.S,
)


def inline(text: str, names: Names) -> str:
    """The text of a paragraph."""
    html, at = [], 0
    for match in INLINE.finditer(text):
        html.append(formulas.subscripts(text[at : match.start()]))
        at = match.end()
        kind = match.lastgroup
        if kind in ("code", "tick"):
            html.append(code(match[kind], names))
        elif kind in ("bold", "soft"):
            tag = "strong" if kind == "bold" else "em"
            html.append(f"<{tag}>{inline(match[kind], names)}</{tag}>")
        elif kind == "target":
            html.append(anchor(match["text"], names(match["target"])))
        else:
            html.append(anchor(match["file"], names(match["file"])))
    html.append(formulas.subscripts(text[at:]))
    return "".join(html)


def anchor(text: str, found: tuple[str, str] | None) -> str:
    shown = escape(text, quote=False)
    return f'<a href="{escape(found[0])}" title="{escape(found[1])}">{shown}</a>' if found else shown


def code(text: str, names: Names) -> str:
    """What stands in quotes: a formula, a command that can be copied, or a name."""
    text = " ".join(text.split())
    if formulas.SIGNS & set(text) and '"' not in text:
        return f'<span class="m">{formulas.math(text)}</span>'
    if is_shell([text]):
        return f'<code class="cmd" data-copy="{escape(text)}">{escape(text, quote=False)}</code>'
    found = names(text)
    shown = f"<code>{escape(text, quote=False)}</code>"
    return f'<a href="{escape(found[0])}" title="{escape(found[1])}">{shown}</a>' if found else shown


def blocks(text: str, names: Names) -> str:
    """A docstring, or a comment of several lines, as HTML."""
    return "\n".join(_blocks(text.splitlines(), names))


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _blocks(lines: list[str], names: Names) -> list[str]:
    html: list[str] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        if not line.strip():
            at += 1
            continue
        end = at + 1
        if line.startswith(">>>"):
            while end < len(lines) and lines[end].strip():
                end += 1
            html.append(f'<pre class="doctest"><code>{doctest_html(lines[at:end])}</code></pre>')
        elif line.startswith("* "):
            items = []
            while at < len(lines) and lines[at].startswith("* "):
                end = at + 1
                while end < len(lines) and _belongs(lines, end):
                    end += 1
                inner = [lines[at][2:], *(one[2:] for one in lines[at + 1 : end])]
                items.append(f"<li>{_tight(_blocks(inner, names))}</li>")
                at = end
            html.append(f"<ul>{''.join(items)}</ul>")
        elif _indent(line):
            while end < len(lines) and (not lines[end].strip() or _indent(lines[end])):
                end += 1
            html += [literal(part, names) for part in _alike(_trimmed(lines[at:end]))]
        else:
            while end < len(lines) and lines[end].strip() and not lines[end].startswith(("* ", ">>>")):
                if lines[end - 1].endswith("::") and _indent(lines[end]):
                    break
                end += 1
            words = " ".join(one.strip() for one in lines[at:end])
            html.append(f"<p>{inline(re.sub('::$', ':', words), names)}</p>")
        at = end
    return html


def _belongs(lines: list[str], at: int) -> bool:
    """Whether a line goes on with the item of a list above it: by two spaces; a block of the item has six, and one of
    four after a blank line belongs to the text around the list."""
    if not lines[at].strip():
        return at + 1 < len(lines) and bool(lines[at + 1].strip()) and _belongs(lines, at + 1)
    space = _indent(lines[at])
    return space >= 2 and (space not in (4, 5) or bool(lines[at - 1].strip()))


def _tight(parts: list[str]) -> str:
    """A list's item of one paragraph is shown without the paragraph."""
    if parts and parts[0].startswith("<p>"):
        parts = [parts[0][3:-4], *parts[1:]]
    return "".join(parts)


def _trimmed(lines: list[str]) -> list[str]:
    while lines and not lines[-1].strip():
        lines = lines[:-1]
    margin = min(_indent(line) for line in lines if line.strip())
    return [line[margin:] for line in lines]


def _alike(lines: list[str]) -> list[list[str]]:
    """A block in parts, where blank lines stand between formulas and something else."""
    parts: list[list[str]] = [[]]
    for line, after in zip(lines, [*lines[1:], ""]):
        if not line.strip() and formulas.is_formula(parts[-1]) != formulas.is_formula([after]):
            parts.append([])
        elif line.strip() or parts[-1]:
            parts[-1].append(line)
    return parts


def literal(lines: list[str], names: Names) -> str:
    """An indented block: formulas as mathematics, commands to copy, code in colours, anything else as it stands."""
    if formulas.is_formula(lines):
        return formulas.block(lines)
    if is_shell(lines):
        return f'<pre class="shell"><code>{files(shell_html(lines), names)}</code></pre>'
    text = "\n".join(lines)
    if re.search(r"^\s*(def|for|print|import|from)\b|^\w[\w, ]* = .*\(", text, re.M):
        shown = python_pieces(text)
        body = "\n".join(line_html(shown, row) for row in range(1, len(lines) + 1))
        return f'<pre class="python"><code>{body}</code></pre>'
    return f"<pre><code>{escape(text, quote=False)}</code></pre>"


def files(html: str, names: Names) -> str:
    """Links on the files that commands name."""

    def link(match) -> str:
        found = names(match.group())
        return anchor(match.group(), found)

    parts = re.split(r"(<[^>]+>)", html)
    pattern = re.compile(r"(?<![\w/.])(?:\w+/)*\w+\.py\b")
    return "".join(part if part.startswith("<") else pattern.sub(link, part) for part in parts)
