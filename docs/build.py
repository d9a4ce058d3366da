"""The book as a site: every chapter as prose beside its code, and all pages of docs/, without a request to any machine.

    pip install -e ".[docs]" && python docs/build.py            # into site/, in seconds
    python docs/build.py --serve                                # and look at it: http://127.0.0.1:8000
    python docs/build.py --out DIR
    python docs/build.py --draw                                 # the drawings of docs/ anew, from the code
    python docs/build.py --lines                                # mend the numbers of lines in links like grpo.py#L12

The site is plain files. It also opens from a folder, without a server: search, formulas and drawings need none.
``docs/making/`` has the parts: ``chapters.py`` cuts a source, ``prose.py`` reads its docstrings, ``formulas.py`` makes
mathematics of their blocks, ``render.py`` the pages.
"""

import argparse
import functools
import http.server
import json
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from making.book import Book, read_book
from making.render import Page, folder_page, framed, markdown_page, source_page
from runtime.errors import UserError, run_main

MARK = ".alignbook-site"  # stands in a folder that a build may replace
ASSETS = ("style.css", "site.js", "icon.svg")


def build(out: Path, root: Path = ROOT) -> int:
    """Make the site in ``out``, which is replaced as a whole; returns the number of pages. UserError if the folder
    holds anything but a site, or if a page links to a file that does not exist."""
    if out.exists() and (not out.is_dir() or any(out.iterdir()) and not (out / MARK).exists()):
        raise UserError(f"{out} holds something else than a site; --out names a new folder, an empty one, or a site")
    book = read_book(root)
    pages = make_pages(book)
    out.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        write_site(book, pages, new)
        if out.exists():
            shutil.rmtree(out)
        new.chmod(0o755)
        new.rename(out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return len(pages)


def make_pages(book: Book) -> list[Page]:
    pages = [markdown_page(book, path) for path in book.pages]
    pages += [source_page(book, source) for source in book.sources.values()]
    for folder in ("configs", "tests", "bench", "examples", "runtime", "studies"):
        book.listed.add(folder)
    return pages + [folder_page(book, folder) for folder in sorted(book.listed) if (book.root / folder).is_dir()]


def write_site(book: Book, pages: list[Page], out: Path) -> None:
    shelves = book.shelves()
    for page in pages:
        path = out / book.address(page.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(framed(book, page, shelves), encoding="utf-8")
    for name in book.files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(book.root / name, out / name)
    (out / "_site").mkdir()
    for name in ASSETS:
        shutil.copyfile(Path(__file__).parent / "making" / name, out / "_site" / name)
    index = json.dumps(search_index(book, pages), ensure_ascii=False, separators=(",", ":"))
    (out / "_site" / "index.js").write_text(f"window.BOOK={index};\n", encoding="utf-8")
    (out / MARK).write_text("made by docs/build.py, which replaces this folder\n", encoding="utf-8")


def search_index(book: Book, pages: list[Page]) -> list[dict]:
    """What the search knows: u, the address; p, the page; h, the heading; t, the text; w, how much it counts."""
    found = []
    for page in pages:
        weight = 1.0 if page.path in book.order or page.path in book.pages else 0.6
        if page.path.startswith(("tests/", "bench/", "configs/", "docs/making/")):
            weight = 0.3
        for entry in page.entries:
            address = book.address(page.path) + (f"#{entry['a']}" if entry["a"] else "")
            text = entry["t"] if weight > 0.3 else entry["t"][:300]
            found.append({"u": address, "p": page.title, "h": entry["h"], "t": text, "w": weight})
    return found


def serve(out: Path, port: int) -> None:
    """Show the site on this machine until Ctrl-C."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments) -> None:
            pass

    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Quiet, directory=str(out)))
    except OSError as error:
        raise UserError(f"port {port} cannot be used ({error.strerror}); --port names another one") from None
    print(f"http://127.0.0.1:{server.server_port}, until Ctrl-C", flush=True)
    with server:
        server.serve_forever()


def draw(book: Book) -> dict[str, str]:
    """The drawings by their paths."""
    from making import drawings

    return {
        "docs/files.svg": drawings.files(book),
        "docs/stages.svg": drawings.stages(),
        "docs/foundations/family.svg": drawings.family(),
    }


LINE_LINK = re.compile(r"\[`([^`]+)`\]\(([\w./]+\.py)#L(\d+)\)")


def with_lines(root: Path, page: str) -> str:
    """A page whose links to lines have the numbers of today: of the definition, or of the line with these words.
    UserError for words that no line has.
    """

    def mend(match) -> str:
        words, target = match[1], match[2]
        path = root / os.path.dirname(page) / target
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        wanted = re.compile(rf"^\s*(def|class) {words}\b") if words.isidentifier() else re.compile(re.escape(words))
        found = next((n for n, line in enumerate(lines, start=1) if wanted.search(line)), None)
        if found is None:
            raise UserError(f"{page} links to {words!r} in {target}, and no line has it")
        return f"[`{words}`]({target}#L{found})"

    return LINE_LINK.sub(mend, (root / page).read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the site of the book.")
    parser.add_argument("--out", default="site", help="the folder of the site (default: site)")
    parser.add_argument("--serve", action="store_true", help="show it on this machine when it is made")
    parser.add_argument("--port", type=int, default=8000, help="the port of --serve (default: 8000)")
    parser.add_argument("--draw", action="store_true", help="only draw the pictures of docs/ anew")
    parser.add_argument("--lines", action="store_true", help="only mend the numbers of lines in the links of docs/")
    options = parser.parse_args()
    if options.draw or options.lines:
        from runtime.checkpoint import write_text  # loads PyTorch, which a build does not need

        book = read_book(ROOT)
        texts = draw(book) if options.draw else {}
        texts |= {page: with_lines(ROOT, page) for page in book.pages} if options.lines else {}
        for path, text in texts.items():
            if not (ROOT / path).exists() or (ROOT / path).read_text(encoding="utf-8") != text:
                write_text(ROOT / path, text)
                print(path)
        return
    begun, out = time.perf_counter(), Path(options.out)
    pages = build(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6
    seconds = time.perf_counter() - begun
    print(f"{pages} pages, {size:.1f} MB, after {seconds:.1f} seconds: open {out / 'index.html'}")
    if options.serve:
        serve(out, options.port)


if __name__ == "__main__":
    run_main(main)
