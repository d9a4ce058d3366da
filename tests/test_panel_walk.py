"""One walk through the control panel in a browser: start a stage, see its curve move, stop it, go on, open a rollout,
compare two runs, chat. Nothing may ask another machine."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import tiny_pretrain, tiny_sft

import grpo
import pretrain
import sft
from walk import Browser, find_browser, troubles

pytest.importorskip("streamlit", reason='streamlit is not installed: pip install -e ".[ui]"')
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="no browser is installed (Debian: chromium)"),
]

ROOT = Path(__file__).parent.parent
SHOTS = os.environ.get("ALIGNBOOK_SHOTS", "")  # a folder for pictures, for who wants to look


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("walk") / "out"
    pretrain.main(tiny_pretrain(root / "arith" / "pretrain", max_documents=60, vocab_size=270))
    sft.main(tiny_sft(root / "first" / "sft", root / "arith" / "pretrain"))
    settings = {
        "init_from": str(root / "first" / "sft"), "steps": 2, "prompts_per_step": 4, "n_prompts": 64,
        "eval_prompts": 8, "eval_every": 2, "device": "cpu", "beta": 0.05, "max_new_tokens": 16,
    }  # fmt: skip
    for seed in (0, 1):
        grpo.main(grpo.Config(out_dir=str(root / f"seed{seed}" / "grpo"), seed=seed, **settings))
    return root


@pytest.fixture(scope="module")
def address(root):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "ui/app.py", "--server.port", str(port)]
    command += ["--server.headless", "true", "--", "--runs", str(root)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}/"
    server.terminate()
    server.wait(30)


@pytest.fixture(scope="module")
def browser():
    browser = Browser(find_browser())
    browser.window(1440, 1000)
    yield browser
    browser.close()


def wait(browser: Browser, script: str, seconds: float = 90):
    """Until an expression is true; its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := browser.evaluate(script):
            return found
        time.sleep(0.15)
    shot(browser, "stuck")
    raise AssertionError(f"never true: {script}\n{browser.evaluate('document.body.innerText')[:2000]}")


def shot(browser: Browser, name: str) -> None:
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        browser.picture(Path(SHOTS) / f"{name}.png")


def says(text: str) -> str:
    return f"document.body.innerText.includes({json.dumps(text)})"


def click(browser: Browser, kind: str, text: str) -> None:
    """Click the first thing of that kind whose text is this one."""
    chosen = (
        f"[...document.querySelectorAll({json.dumps(kind)})].find((n) => n.innerText.trim() === {json.dumps(text)})"
    )
    wait(browser, f"!!({chosen}) && !({chosen}).disabled")
    browser.evaluate(f"({chosen}).scrollIntoView({{block: 'center'}})")
    browser.evaluate(f"({chosen}).click()")


def choose(browser: Browser, label: str, text: str) -> None:
    """Choose an entry of a list by typing its name."""
    field = f"document.querySelector('input[aria-label*={json.dumps(label)}]')"
    wait(browser, f"!!{field}")
    browser.evaluate(f"{field}.scrollIntoView({{block: 'center'}})")
    box = browser.evaluate(f"(() => {{ const b = {field}.getBoundingClientRect(); return [b.x + 5, b.y + 5]; }})()")
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)
    browser.call("Input.insertText", text=text)
    wait(
        browser,
        f"[...document.querySelectorAll('[role=option]')].some((n) => n.innerText.startsWith({json.dumps(text)}))",
    )
    for kind in ("keyDown", "keyUp"):
        browser.call(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
        )


def go(browser: Browser, address: str, page: str, heading: str) -> None:
    browser.open("about:blank")
    browser.open(address + page)
    wait(browser, f"[...document.querySelectorAll('h1')].some((n) => n.innerText === {json.dumps(heading)})")


def assert_only_this_machine(browser: Browser, address: str) -> None:
    """Streamlit looks for its own addresses below a page's first, which are not there; nothing else may go wrong."""
    wrong = troubles(browser.events, address)
    assert not [one for one in wrong if "another machine" in one or "an error" in one], wrong


def test_the_walk(browser, address, root):
    # Start a stage, with its defaults, from the tiny model.
    go(browser, address, "start", "Start")
    click(browser, "button", "sft")
    wait(browser, says("sft.py learns to answer from examples"))
    click(browser, "button", "Start")
    wait(browser, says("sft → arith/sft"))
    assert_only_this_machine(browser, address)
    wait(browser, r"/sft: step \d+ of \d+/.test(document.body.innerText)")
    shot(browser, "start")

    # Its curve moves.
    go(browser, address, "", "Runs")
    wait(browser, r"/arith\/sft: step (\d+) of/.test(document.body.innerText)")
    step = r"+(/arith\/sft: step ([\d,]+) of/.exec(document.body.innerText) ?? ['', '0'])[1].replace(',', '')"
    first = wait(browser, step)
    wait(browser, f"({step}) > {first} && document.querySelectorAll('canvas').length >= 2")
    shot(browser, "runs")
    assert_only_this_machine(browser, address)

    # Stop it as Ctrl-C does, and go on.
    go(browser, address, "start", "Start")
    click(browser, "button", "Stop")
    wait(browser, says("saved; it can go on"))
    assert (root / "arith" / "sft" / "ckpt.pt").exists()
    click(browser, "button", "Go on")
    wait(browser, r"(document.body.innerText.match(/sft → arith\/sft/g) ?? []).length === 2")
    wait(browser, says("✓ sft → arith/sft"), seconds=240)
    shot(browser, "gone_on")

    # Open a rollout: its tokens have colours, and their numbers on hover.
    go(browser, address, "rollouts", "Rollouts")
    wait(browser, "!!document.querySelector('iframe')?.contentDocument?.querySelector('.t')")
    told = browser.evaluate("""(() => {
      const page = document.querySelector('iframe').contentDocument;
      page.querySelector('.answer .t').dispatchEvent(new MouseEvent('mouseover', {bubbles: true}));
      return page.getElementById('tip').innerText;
    })()""")
    assert "probability when sampled" in told and "advantage" in told and "ratio" in told
    shot(browser, "rollouts")
    assert_only_this_machine(browser, address)

    # Compare two runs.
    go(browser, address, "", "Runs")
    choose(browser, "Shown", "seed0/grpo")
    wait(browser, says("seed0/grpo"))
    choose(browser, "Shown", "seed1/grpo")
    wait(browser, "document.querySelectorAll('canvas').length >= 4 && " + says("seed1/grpo"))
    time.sleep(1)
    shot(browser, "compared")

    # Chat.
    go(browser, address, "chat", "Chat")
    click(browser, "button", "Tom has 4 apples and finds 3 more. How many apples does Tom have?")
    wait(browser, "document.querySelectorAll('[data-testid=stChatMessage] span[title]').length >= 1")
    title = browser.evaluate("document.querySelector('[data-testid=stChatMessage] span[title]').title")
    assert "%" in title
    shot(browser, "chat")
    assert_only_this_machine(browser, address)

    go(browser, address, "report-card", "Report card")
    wait(browser, says("Question by question"))
    assert_only_this_machine(browser, address)


def moved(record: dict) -> dict:
    """A record as of a run that learned something: every token has moved by its own amount, advantages differ."""
    for group in record["groups"]:
        for k, answer in enumerate(group["answers"]):
            answer["old"] = [-0.3 * (i % 7) for i in range(len(answer["ids"]))]
            answer["now"] = [old + 0.4 * ((i + k) % 5 - 2) for i, old in enumerate(answer["old"])]
            answer["ref"] = [old - 0.5 * ((i + k) % 3 - 1) for i, old in enumerate(answer["old"])]
            answer["advantage"] = k - 1.5
    return record


def test_a_page_of_rollouts_works_without_a_server(browser, root, tmp_path):
    page, run = tmp_path / "page.html", tmp_path / "run"
    run.mkdir()
    lines = (root / "seed0" / "grpo" / "rollouts.jsonl").read_text().splitlines()
    (run / "rollouts.jsonl").write_text("".join(json.dumps(moved(json.loads(line))) + "\n" for line in lines))
    for theme in (False, True):
        subprocess.run([sys.executable, "ui/rollouts.py", str(run), "--write", str(page)], cwd=ROOT, check=True)
        browser.window(1280, 900, dark=theme)
        browser.open("about:blank")
        browser.open(page.as_uri())
        assert troubles(browser.events, "file://") == []
        assert browser.evaluate("document.querySelectorAll('.answer').length") == 16
        assert browser.evaluate("document.querySelectorAll('.steps button').length") == 2
        for kind in ("probability", "ratio", "reference", "advantage"):
            click(browser, "button", kind)
            colours = "new Set([...document.querySelectorAll('.answer .t')].map((n) => n.style.backgroundColor)).size"
            assert browser.evaluate(colours) > 1, kind
        sort = "document.querySelector('#sort')"
        browser.evaluate(f"{sort}.value = 'length'; {sort}.dispatchEvent(new Event('change'))")
        assert browser.evaluate("document.querySelectorAll('.t.held').length") == 0
        click(browser, "button", "ratio")
        assert browser.evaluate("document.querySelectorAll('.t.held').length") > 0
        text = browser.evaluate("document.querySelector('.group').innerText")
        lengths = [int(n) for n in re.findall(r"(\d+) tokens\b(?!.*prompt)", text)][:4]
        assert lengths == sorted(lengths, reverse=True)
        browser.evaluate("dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft'}))")
        assert browser.evaluate("document.querySelector('.steps [aria-pressed=true]').innerText.trim()") == "1"
        assert browser.evaluate("document.documentElement.scrollWidth") <= 1280
        browser.window(390, 844, dark=theme)
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_run_in_which_nothing_can_be_learned_says_so(browser, root, tmp_path):
    page, run = tmp_path / "page.html", tmp_path / "run"
    run.mkdir()
    record = json.loads((root / "seed0" / "grpo" / "rollouts.jsonl").read_text().splitlines()[-1])
    answers = [answer for group in record["groups"] for answer in group["answers"]]
    for advantage in (0.0, 1.0):
        for group in record["groups"]:
            group["equal"] = advantage == 0.0
        for answer in answers:
            answer.pop("ref", None)
            answer.pop("kl", None)
            answer["reward"], answer["advantage"] = 0.0, advantage
            answer["texts"][0] = "<|endoftext|>"
        (run / "rollouts.jsonl").write_text(json.dumps(record) + "\n")
        subprocess.run([sys.executable, "ui/rollouts.py", str(run), "--write", str(page)], cwd=ROOT, check=True)
        browser.window(1280, 900)
        browser.open("about:blank")
        browser.open(page.as_uri())
        told = browser.evaluate("document.getElementById('flat').innerText")
        assert ("nothing to learn in this step" in told) == (advantage == 0.0)
        assert browser.evaluate("document.getElementById('steps').offsetHeight") < 40
        orders = browser.evaluate("[...document.querySelectorAll('#sort option')].map((n) => n.value)")
        look = "getComputedStyle(document.querySelector('.answer .t.mark'))"
        assert browser.evaluate(f"{look}.whiteSpace") == "nowrap"
        assert browser.evaluate(f"{look}.color === getComputedStyle(document.body).color")
        assert "kl" not in orders and "moved" in orders
