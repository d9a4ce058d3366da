"""Every page of the built site, opened in a browser: what a reader would meet that no build can see.

    python docs/build.py && python docs/walk.py                 # needs chromium; prints what is wrong, or nothing is
    python docs/walk.py --shots DIR                             # and pictures: two widths, light and dark

It looks for requests that fail or leave the machine, errors on the console, links to pages and headings that are not
there, pages wider than the window, formulas that are not drawn as formulas, and searches that find nothing. The browser
is driven over its DevTools protocol, through a pipe, so the standard library is enough.
"""

import argparse
import base64
import fcntl
import functools
import http.server
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urldefrag

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from runtime.errors import UserError, run_main

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = {"wide": (1280, 900), "phone": (390, 844)}
PATIENCE = 300  # seconds for one answer of the browser, on a machine that does much else
SHOWN = (
    "index", "grpo", "dpo", "tokenizer", "docs/results", "docs/metrics", "docs/experiments/grpo", "docs/cheatsheet",
    "docs/glossary", "docs/map", "docs/foundations/index", "docs/foundations/kl", "docs/foundations/family",
)  # fmt: skip
SEARCHES = {"gae": "ppo.html#gae", "clip": "grpo.html"}  # words, and a page that must be among what is found

LOOK = """(() => {
  const box = (node) => node.getBoundingClientRect();
  const maths = [...document.querySelectorAll("math")].filter((m) => m.checkVisibility());
  const flat = maths.filter((m) => box(m).height < 4 || box(m).width < 2).length;
  const fractions = [...document.querySelectorAll("mfrac")].filter((f) => f.checkVisibility());
  const strokes = fractions.filter((f) => box(f.children[0]).bottom > box(f.children[1]).top + 1).length;
  const wide = Math.max(document.documentElement.scrollWidth, document.body.scrollWidth);
  const text = document.querySelector("main").innerText;
  return JSON.stringify({
    ids: [...document.querySelectorAll("[id]")].map((n) => n.id),
    links: [...document.querySelectorAll("a[href]")].map((a) => new URL(a.href.baseVal ?? a.href, location).href),
    twice: [...document.querySelectorAll("[id]")].map((n) => n.id).filter((id, i, all) => all.indexOf(id) !== i),
    maths: maths.length, flat, strokes, fractions: fractions.length, wide, room: innerWidth, words: text.length,
    broken: [...document.images].filter((i) => i.complete && !i.naturalWidth && i.loading !== "lazy").map((i) => i.src),
  });
})()"""


def find_browser() -> str | None:
    """The command of a browser that this machine has."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


class Browser:
    """A headless browser, one tab. Names of other machines do not resolve in it."""

    def __init__(self, command: str):
        self.profile = tempfile.mkdtemp(prefix="alignbook-walk-")
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (theirs_in, theirs_out)]

        def as_three_and_four() -> None:  # the numbers that --remote-debugging-pipe reads and writes
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        options = [
            "--headless", "--remote-debugging-pipe", f"--user-data-dir={self.profile}", "--no-first-run",
            "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-dev-shm-usage", "--hide-scrollbars", "--mute-audio",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            *(["--no-sandbox"] if os.geteuid() == 0 else []), "about:blank",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            [command, *options], preexec_fn=as_three_and_four, pass_fds=(3, 4), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for fd in (theirs_in, theirs_out, *high):
            os.close(fd)
        self.read_fd, self.write_fd, self.rest, self.number = ours_in, ours_out, b"", 0
        self.events: list[dict] = []
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        os.close(self.write_fd)
        os.close(self.read_fd)
        self.process.terminate()
        self.process.wait(20)
        shutil.rmtree(self.profile, ignore_errors=True)

    def _message(self, deadline: float) -> dict:
        while b"\0" not in self.rest:
            if not select.select([self.read_fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            piece = os.read(self.read_fd, 1 << 20)
            if not piece:
                raise UserError("the browser ended by itself")
            self.rest += piece
        text, _, self.rest = self.rest.partition(b"\0")
        return json.loads(text)

    def call(self, method: str, **arguments) -> dict:
        """One command of the protocol; what happens meanwhile is added to ``events``."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": arguments}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_fd, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self._message(deadline)
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error'].get('message')}")
                return answer["result"]
            self.events.append(answer)

    def open(self, address: str) -> None:
        """Go there and wait until everything is loaded."""
        self.events.clear()
        self.call("Page.navigate", url=address)
        deadline = time.monotonic() + PATIENCE
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message(deadline))

    def evaluate(self, script: str):
        """The value of an expression; a promise is waited for."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"]["text"] + ": " + str(done["result"].get("description")))
        return done["result"].get("value")

    def window(self, width: int, height: int, dark: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[theme])

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


def served(site: Path):
    """A server for the site on this machine, in a thread: (server, address)."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/"


def troubles(events: list[dict], base: str) -> list[str]:
    """What went wrong while a page was loaded."""
    found = []
    for event in events:
        method, values = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent" and not values["request"]["url"].startswith((base, "data:", "about:")):
            found.append(f"asks another machine: {values['request']['url']}")
        elif method == "Network.loadingFailed" and not values.get("canceled"):
            found.append(f"a request failed: {values.get('errorText')}")
        elif method == "Network.responseReceived" and values["response"]["status"] >= 400:
            found.append(f"{values['response']['status']}: {values['response']['url']}")
        elif method == "Runtime.exceptionThrown":
            found.append(f"an error: {values['exceptionDetails'].get('exception', {}).get('description', '?')}")
        elif method == "Runtime.consoleAPICalled" and values["type"] == "error":
            found.append(f"on the console: {values['args']}")
        elif method == "Log.entryAdded" and values["entry"]["level"] == "error":
            found.append(f"on the console: {values['entry']['text']}")
    return found


def walk(
    site: Path,
    command: str,
    shots: Path | None = None,
    only: set[str] | None = None,
    features: bool = True,
    show: bool = False,
) -> list[str]:
    """Open every page; return what is wrong, one line each. shots: a folder for pictures. only: these pages alone.
    features: try the search and the theme, too. show: say how far it is."""
    server, base = served(site)
    browser = Browser(command)
    wrong, ids, links, formulas = [], {}, {}, 0
    try:
        browser.window(*WIDTHS["wide"])
        pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
        chosen = [page for page in pages if only is None or page in only]
        for number, page in enumerate(chosen):
            if show and number % 25 == 0:
                print(f"{number} of {len(chosen)} pages", flush=True)
            browser.open(base + page)
            seen = json.loads(browser.evaluate(LOOK))
            wrong += [f"{page}: {trouble}" for trouble in troubles(browser.events, base)]
            wrong += [f"{page}: two places are called #{one}" for one in seen["twice"]]
            wrong += [f"{page}: a picture is missing: {one}" for one in seen["broken"]]
            formulas += seen["maths"]
            if seen["flat"] or seen["strokes"]:
                wrong.append(f"{page}: {seen['flat']} formulas are empty, {seen['strokes']} fractions are no fractions")
            if seen["words"] < 20:
                wrong.append(f"{page}: there is no text")
            ids[page], links[page] = set(seen["ids"]), seen["links"]
            for width, size in WIDTHS.items():
                browser.window(*size)
                room = json.loads(browser.evaluate(LOOK))
                if room["wide"] > size[0]:
                    wrong.append(f"{page}: {room['wide']} pixels wide in a window of {size[0]} ({width})")
            browser.window(*WIDTHS["wide"])
        wrong += dead_links(site, base, ids, links)
        if not formulas:
            wrong.append("no page has a formula")
        if features:
            wrong += searches(browser, base)
        if shots:
            take_pictures(browser, base, site, shots)
    finally:
        browser.close()
        server.shutdown()
    return wrong


def dead_links(site: Path, base: str, ids: dict[str, set[str]], links: dict[str, list[str]]) -> list[str]:
    """Links into the site whose page, or whose place in it, does not exist."""
    wrong = []
    for page, targets in links.items():
        for target in sorted(set(targets)):
            if not target.startswith(base):
                continue  # another site: not asked
            path, mark = urldefrag(target[len(base) :])
            path = unquote(path) or "index.html"
            path += "index.html" if path.endswith("/") else ""
            if not (site / path).is_file():
                wrong.append(f"{page}: a link leads to {path}, which does not exist")
            elif mark and path in ids and unquote(mark) not in ids[path]:
                wrong.append(f"{page}: a link leads to {path}#{unquote(mark)}, and the page has no such place")
    return wrong


def searches(browser: Browser, base: str) -> list[str]:
    """Whether the search finds what it must, and the theme can be changed."""
    wrong = []
    browser.open(base + "index.html")
    for words, there in SEARCHES.items():
        typed = f"""(async () => {{
          const field = document.getElementById("site-query");
          field.focus(); field.value = {json.dumps(words)};
          field.dispatchEvent(new Event("input"));
          const found = () => [...document.querySelectorAll("#site-results a")];
          for (let i = 0; i < 100 && !found().length; i++) await new Promise((r) => setTimeout(r, 50));
          return found().map((a) => a.getAttribute("href")).join(" ");
        }})()"""
        found = browser.evaluate(typed) or ""
        if there not in found:
            wrong.append(f"the search for {words!r} does not find {there}, but {found or 'nothing'}")
    wrong += [f"the search: {trouble}" for trouble in troubles(browser.events, base)]
    colour = "getComputedStyle(document.body).backgroundColor"
    before = browser.evaluate(colour)
    browser.evaluate('document.getElementById("site-theme").click()')
    if browser.evaluate(colour) == before:
        wrong.append("the theme does not change")
    browser.evaluate('localStorage.removeItem("theme")')
    return wrong


def take_pictures(browser: Browser, base: str, site: Path, shots: Path) -> None:
    shots.mkdir(parents=True, exist_ok=True)
    for page in (page for page in SHOWN if (site / f"{page}.html").exists()):
        for width, size in WIDTHS.items():
            for dark in (False, True):
                browser.window(*size, dark=dark)
                browser.open(base + page + ".html")
                browser.picture(shots / f"{page.replace('/', '_')}_{width}_{'dark' if dark else 'light'}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Open every page of the site in a browser.")
    parser.add_argument("--site", default="site", help="the folder of the site (default: site)")
    parser.add_argument("--shots", help="a folder for pictures of some pages")
    options = parser.parse_args()
    site, command = Path(options.site), find_browser()
    if not command:
        raise UserError(f"no browser is installed; looked for {', '.join(BROWSERS)}")
    if not (site / "index.html").exists():
        raise UserError(f"{site} holds no site: python docs/build.py makes it")
    begun = time.perf_counter()
    wrong = walk(site, command, Path(options.shots) if options.shots else None, show=True)
    print("\n".join(wrong) or "nothing is wrong")
    pages, seconds = len(list(site.rglob("*.html"))), time.perf_counter() - begun
    print(f"{pages} pages in {seconds:.0f} seconds; {len(wrong)} things wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    run_main(main)
