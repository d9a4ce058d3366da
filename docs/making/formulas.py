"""Formulas as the book writes them, in plain text, become MathML, which browsers draw without a script or a font.

The sources and pages have one notation: ``A_i = (r_i - mean(r_group)) / (std(r_group) + eps)``. A block of such lines
is a table of three columns: what is defined, what it is, and a note. What the converter does to a cell:

* ``x_i``, ``V_{t+1}``, ``W₂``, ``e^a``, ``x²`` get their subscript or superscript; a name of several letters with an
  underscore, like ``max_norm``, stays a name, unless its subscript is a single letter (``load_e``);
* ``a b / c d`` becomes a fraction of the products on both sides, ``1/N`` of what touches the stroke; ``√`` covers the
  factor after it;
* everything else keeps its order and its characters, so that nothing of a formula can be lost.
"""

import re
from html import escape

GREEK = "α-ωΑ-ΡΤ-Ωϵ"  # without Σ, which is the sign of a sum
TOKEN = re.compile(
    rf"""(?P<space>\s+)
    | (?P<number>\d+(?:,\d{{3}})*(?:\.\d+)?(?:e-?\d+)?)
    | (?P<size>\|\w+\|)
    | (?P<name>(?:∂?(?:[{GREEK}]|[A-Za-z][A-Za-z0-9]*)|Σ|∞)(?:\u0304)?[₀-₉]*)
    | (?P<word>"[^"]*")
    | (?P<sup>[²³ᵀ])
    | (?P<open>[(\[{{])
    | (?P<close>[)\]}}])
    | (?P<between>(?<=\s)‖(?=\s))
    | (?P<other>\.\.\.|//|.)""",
    re.X,
)
SUBSCRIPT = re.compile(rf"_(?:\{{(?P<long>[^}}]*)\}}|(?P<short>[A-Za-z0-9{GREEK}]+(?:,[A-Za-z0-9{GREEK}]+)*))(?!_)")
RELATIONS = set("=←≤≥<>∝≻≈→∈")
OPERATORS = RELATIONS | set("+-·⊙±,;:|×")
TALL = {"²": "2", "³": "3", "ᵀ": "T"}
UPRIGHT = {"log", "exp", "mean", "std", "max", "min", "softmax", "sign", "sin", "cos", "tanh", "clip", "silu", "act"}
SIGNS = set("Σ√σπρδβλγΔ·²‖⊙←≻∂α½")


def is_formula(lines: list[str]) -> bool:
    """Whether a block is mathematics, rather than code, a command, a row of data or a drawing."""
    text = "\n".join(lines)
    if re.search(r"^\s*(python|pip|def|from|import|for \w+ in|print)\b|[(\[{]\"|^\s*<\w|\w/<", text, re.M):
        return False
    return bool(SIGNS & set(text)) or bool(re.search(r"^\s*\w+(\([\w, ]*\))? += [\w(-]", text, re.M))


def cells(line: str) -> tuple[str, str, str]:
    """A line of a block as what is defined, what it is, and a note; each may be empty.

    >>> cells("A_t = δ_t + γ λ A_{t+1}        GAE")
    ('A_t', '= δ_t + γ λ A_{t+1}', 'GAE')
    >>> cells("DPO     - log σ( β δ )      with a note")
    ('DPO', '- log σ( β δ )', 'with a note')
    """
    parts = [part for part in re.split(r"\s{3,}(?![=←])", line.strip()) if part]
    relation = re.search(r"\s+[=←≻] ", parts[0])
    if relation and len(parts) == 3 and not re.search(r"[=←]", parts[1]):  # L = mean of   this   of those answers
        parts = ["  ".join(parts[:2]), parts[2]]
    if relation:
        return parts[0][: relation.start()], parts[0][relation.start() :].strip(), "   ".join(parts[1:])
    if line.startswith("   ") or len(parts) == 1:  # it goes on with the line above, or is a line of words
        return "", parts[0], "   ".join(parts[1:])
    return parts[0], parts[1], "   ".join(parts[2:])


def block(lines: list[str]) -> str:
    """A block of formulas as a table."""
    margin = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    rows = []
    for line in lines:
        if not line.strip():
            rows.append('<tr class="gap"></tr>')
            continue
        left, right, note = cells(line[margin:])
        name = words(left) if re.fullmatch(r"[A-Za-z@]{2}[\w@ -]*", left) else math(left, display=True)
        both = f'<td class="lhs">{name}</td><td class="rhs">{math(right, display=True)}</td>'
        if not left and not is_mathematics(right) and right[0] not in OPERATORS:
            both = f'<td class="words" colspan="2">{words(right)}</td>'
        rows.append(
            f'<tr>{both}<td class="note">{math(note, display=True) if is_mathematics(note) else words(note)}</td></tr>'
        )
    return f'<div class="formulas"><table>{"".join(rows)}</table></div>'


def is_mathematics(cell: str) -> bool:
    """Whether a cell is a formula and not a sentence about one."""
    outside = re.sub(r"(?<=[\w)])[(\[][^()\[\]]*[)\]]", "(", cell)  # without the arguments of functions
    plain = [word for word in re.findall(r"(?<!\w)[A-Za-z]{2,}(?![\w(_])", outside) if word not in UPRIGHT]
    return bool(cell) and len(plain) <= (2 if re.match(r"[=←]", cell) else 0) and bool(OPERATORS & set(cell))


def words(text: str) -> str:
    """A note in words: its variables get their subscripts, ``code`` stands in quotes."""
    return re.sub(r"``([^`]+)``", r"<code>\1</code>", subscripts(text))


def subscripts(text: str) -> str:
    """Words as HTML, with the subscripts of the variables among them: π_ref, A_i."""
    text = escape(text, quote=False)
    pattern = rf"(?<![\w`/])([A-Za-z{GREEK}Σ])_(?:\{{([^}}]*)\}}|([A-Za-z0-9]+(?:,[a-z0-9])*))(?!\w)"
    return re.sub(pattern, lambda m: f"<i>{m[1]}</i><sub>{m[2] or m[3]}</sub>", text)


def math(text: str, display: bool = False) -> str:
    """One formula as a ``<math>`` element; the text it was made from is its title."""
    if not text.strip():
        return ""
    style = ' displaystyle="true"' if display else ""
    return f'<math{style} title="{escape(text)}">{_row(_parse(_tokens(text)))}</math>'


def visible(text: str) -> str:
    """The characters that a formula shows in every form: without what becomes position (strokes, roots, brackets)."""
    for sign, plain in (TALL | {"−": "-", "∑": "Σ", "½": "12"}).items():
        text = text.replace(sign, plain)
    text = text.translate({0x2080 + i: str(i) for i in range(10)})
    return re.sub(r"[\s/_^(){}√`\"]", "", text)


# ----------------------------------------------------------------------------------------------------------------------
# From text to a tree: a factor is (html, space before it, space after it), an operator is a string


def _tokens(text: str) -> list[tuple[str, str, bool]]:
    """(kind, text, whether space stands before it); a name comes with its subscript."""
    found, at, spaced = [], 0, False
    while at < len(text):
        match = TOKEN.match(text, at)
        kind, piece = match.lastgroup, match.group()
        at = match.end()
        if kind == "space":
            spaced = True
            continue
        if kind in ("name", "close") and (sub := SUBSCRIPT.match(text, at)):
            inner = sub["long"] if sub["long"] is not None else sub["short"]
            if kind == "close" or len(piece) == 1 or len(inner) <= 2 or piece in ("Σ", "mean") or sub["long"]:
                found.append((kind, piece, spaced))
                kind, piece, spaced, at = "sub", inner, False, sub.end()
        if kind == "name" and at < len(text) and text[at] == "_":  # a name of several words
            whole = re.compile(r"(?:_[A-Za-z0-9]+)+").match(text, at)
            if whole:
                piece, at = piece + whole.group(), whole.end()
        found.append((kind, piece, spaced))
        spaced = False
    return found


def _parse(tokens: list, closing: bool = False) -> list:
    """Factors and operators up to a closing bracket, which is taken; fractions are made."""
    items: list = []
    while tokens:
        if closing and tokens[0][0] == "close":
            break
        items.append(_factor(tokens))
    return _fractions(items)


def _factor(tokens: list):
    """The next operator, as (sign, space before), or factor, as [html, space before, is a bracket's inside]."""
    kind, text, spaced = tokens.pop(0)
    if kind == "between" or kind == "other" and (text in OPERATORS or text in "/^"):
        return (text, spaced)
    inside = None
    if kind == "open":
        inside = _parse(tokens, closing=True)
        end = tokens.pop(0)[1] if tokens else ""
        html = f"<mrow><mo>{text}</mo>{_row(inside)}<mo>{end}</mo></mrow>"
        inside = inside if text == "(" else None
    elif kind == "other" and text == "‖":
        body = []
        while tokens and tokens[0][1] != "‖":
            body.append(_factor(tokens))
        if tokens:
            tokens.pop(0)
        html = f"<mrow><mo>‖</mo>{_row(_fractions(body))}<mo>‖</mo></mrow>"
    elif kind == "other" and text == "√" and tokens:
        under = _factor(tokens)
        html = f"<msqrt>{_row(under[2]) if under[2] else under[0]}</msqrt>" if len(under) == 3 else "<mo>√</mo>"
    elif kind == "other" and text == "½":
        html = "<mfrac><mn>1</mn><mn>2</mn></mfrac>"
    else:
        html = _leaf(kind, text)
    while tokens and (tokens[0][0] in ("sub", "sup") or tokens[0][1] == "^") and not tokens[0][2]:
        kind, script, _ = tokens.pop(0)
        if kind == "sub":
            under = "munder" if text == "Σ" else "msub"
            html = f"<{under}>{html}<mrow>{_row(_parse(_tokens(script)))}</mrow></{under}>"
        elif kind == "sup":
            html = f"<msup>{html}<mi>{TALL[script]}</mi></msup>"
        elif tokens:
            up = _factor(tokens)
            html = f"<msup>{html}<mrow>{_row(up[2]) if up[2] else up[0]}</mrow></msup>"
        inside = None
    call = kind in ("name", "sub") or html.startswith("<msub>")
    if call and tokens and tokens[0][0] == "open" and not tokens[0][2]:
        html = f"<mrow>{html}{_factor(tokens)[0]}</mrow>"
        inside = None
    elif tokens and tokens[0][1] == "[" and not tokens[0][2]:
        html = f"<mrow>{html}{_factor(tokens)[0]}</mrow>"
    return [html, spaced, inside]


def _leaf(kind: str, text: str) -> str:
    low = "".join(ch for ch in text if "₀" <= ch <= "₉")
    base = text.rstrip("₀₁₂₃₄₅₆₇₈₉")
    if kind == "number":
        return f"<mn>{escape(text)}</mn>"
    if base == "Σ":
        return "<mo>∑</mo>"
    if kind == "name":
        name = f"<mi>{escape(base)}</mi>"
        return f"<msub>{name}<mn>{low.translate({0x2080 + i: str(i) for i in range(10)})}</mn></msub>" if low else name
    return f"<mtext>{escape(text, quote=False)}</mtext>"


def _fractions(items: list) -> list:
    """``a/b`` of what touches the stroke first, then ``a b / c d`` of the products on both sides."""
    for tight in (True, False):
        at = 0
        while at < len(items):
            spaced = len(items[at]) == 2 and items[at][0] == "/" and items[at][1]
            if len(items[at]) == 2 and items[at][0] == "/" and bool(spaced) is not tight:
                first, last = at, at + 1
                while first > 0 and len(items[first - 1]) == 3 and not (tight and first < at and items[first][1]):
                    first -= 1
                while last < len(items) and len(items[last]) == 3 and not (tight and last > at + 1 and items[last][1]):
                    last += 1
                if first < at and last > at + 1:
                    top, bottom = items[first:at], items[at + 1 : last]
                    html = f"<mfrac>{_part(top)}{_part(bottom)}</mfrac>"
                    items[first:last] = [[html, top[0][1], None]]
                    at = first
            at += 1
    return items


def _part(factors: list) -> str:
    """One side of a fraction; brackets around the whole of it are not needed there."""
    if len(factors) == 1 and factors[0][2]:
        return f"<mrow>{_row(factors[0][2])}</mrow>"
    return f"<mrow>{_row(factors)}</mrow>"


def _row(items: list) -> str:
    html, before = [], None
    for item in items:
        if len(item) == 2:
            sign = {"-": "−"}.get(item[0], item[0])
            unary = before is None or len(before) == 2
            form = ' form="prefix"' if unary and sign in "−+" else ""
            html.append(f"<mo{form}>{escape(sign)}</mo>")
        else:
            if before is not None and len(before) == 3 and item[1]:
                html.append('<mspace width="0.3em"/>')
            html.append(item[0])
        before = item
    return "".join(html)
