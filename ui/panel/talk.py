"""Chat: one model or two side by side, the same question, the same seed."""

import time
from dataclasses import replace

import streamlit as st

import chat
from runtime.errors import UserError
from ui import shared, talk
from ui.jobs import OPEN
from ui.shared import one_line, plain

NONE = ""
SHOWN_EVERY = 0.08  # seconds
EXAMPLES = (
    "Tom has 4 apples and finds 3 more. How many apples does Tom have?",
    "There are 6 cards in each of the 2 bags of Lily. Zoe takes 11 from Lily. How many cards does Lily have now?",
)


def speakers() -> list[str]:
    """The runs whose model can write."""
    silent = ("reward", "encoder", "mlm")
    return [run.name for run in shared.runs().all(1.0) if run.saved and run.stage not in silent]


def reply(column, name: str, messages: list[dict], settings: chat.Config) -> list[talk.Token]:
    """Let a model answer in a column, token by token. UserError: it cannot."""
    tokens: list[talk.Token] = []
    with column.chat_message("assistant"):
        place, drawn = st.empty(), 0.0
        loaded = talk.load(shared.runs().root / name)
        for token in talk.answer(loaded, messages, settings):
            tokens.append(token)
            if time.monotonic() - drawn > SHOWN_EVERY:
                place.html(talk.as_html(tokens))
                drawn = time.monotonic()
        place.html(talk.as_html(tokens))
    return tokens


def show_alternatives(tokens: list[talk.Token], key: str) -> None:
    """Each token of an answer with what else could have stood there."""
    with st.popover("Token by token"):
        rows = []
        for i, token in enumerate(tokens):
            others = "   ".join(f"{talk.visible(text)} {p:.1%}" for text, p in token.others[:5])
            rows.append(
                {"": i + 1, "token": talk.visible(token.text), "probability": token.probability, "likeliest": others}
            )
        widths = {
            "": st.column_config.NumberColumn("", width=40),
            "token": st.column_config.TextColumn("token", width=90),
            "probability": st.column_config.ProgressColumn(
                "probability", format="percent", min_value=0, max_value=1, width=110
            ),
            "likeliest": st.column_config.TextColumn("likeliest", width=420),
        }
        st.dataframe(
            rows, hide_index=True, key=key, column_config=widths, width=670, height=min(38 + 35 * len(rows), 420)
        )


def show_turn(number: int, turn: dict, columns: list) -> None:
    for column, (name, tokens) in zip(columns, turn["answers"].items()):
        with column.chat_message("user"):
            st.text(turn["question"])
        with column.chat_message("assistant"):
            st.html(talk.as_html(tokens))
            show_alternatives(tokens, f"alternatives {number} {name}")


def messages_for(name: str, turns: list[dict], question: str) -> list[dict]:
    """The conversation that this model has had, and the new question."""
    said = []
    for turn in turns:
        if name in turn["answers"]:
            said.append({"role": "user", "content": turn["question"]})
            said.append({"role": "assistant", "content": "".join(token.text for token in turn["answers"][name])})
    return [*said, {"role": "user", "content": question}]


def ask(question: str, chosen: list[str], columns: list, settings: chat.Config, remember: bool) -> None:
    turns, answers = st.session_state.turns, {}
    for column in columns:
        with column.chat_message("user"):
            st.text(question)
    for column, name in zip(columns, chosen):
        try:
            messages = messages_for(name, turns if remember and not settings.raw else [], question)
            answers[name] = reply(column, name, messages, settings)
        except UserError as error:
            column.error(plain(str(error)))
    if answers:
        turns.append({"question": question, "answers": answers})
        st.rerun()


def kept(name: str) -> dict:
    """A field whose value is still there after a visit to another page."""
    return {"key": f"chat {name}", "persist_state": "session"}


def show_settings() -> tuple[chat.Config, bool]:
    with st.sidebar:
        st.subheader("Sampling")
        temperature = st.slider(
            "temperature", 0.0, 2.0, 0.7, 0.05, help="0: always the likeliest token.", **kept("temperature")
        )
        top_p = st.slider(
            "top\\_p", 0.05, 1.0, 1.0, 0.05, help="Only the likeliest tokens that together have this probability.",
            **kept("top_p"),
        )  # fmt: skip
        top_k = st.number_input("top\\_k", 0, 1000, 0, help="Only the k likeliest tokens (0: all).", **kept("top_k"))
        min_p = st.slider(
            "min\\_p", 0.0, 1.0, 0.0, 0.01, help="Only tokens at least so likely, compared with the likeliest.",
            **kept("min_p"),
        )  # fmt: skip
        most = st.number_input("most new tokens", 1, 4096, 64, **kept("most"))
        seed = st.number_input("seed", 0, 2**31 - 1, 0, help="The same seed gives the same answer.", **kept("seed"))
        raw = st.toggle("continue as text", help="Without the chat template: what a base model can do.", **kept("raw"))
        remember = st.toggle("remember the conversation", value=False, disabled=raw, **kept("remember"))
    settings = chat.Config(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, max_new_tokens=most, seed=seed
    )
    return replace(settings, raw=raw), remember


st.title("Chat")
names = speakers()
if not names:
    if shared.runs().names() or any(job.state in OPEN for job in shared.queue().jobs()):
        st.info("No run can answer yet. The first one can when pretraining has saved its checkpoint.")
    else:
        shared.nothing_yet()
    st.stop()
st.session_state.setdefault("turns", [])
for chosen in ("one", "two"):  # what is kept from before may be gone
    if st.session_state.get(chosen, NONE) not in (NONE, *names):
        del st.session_state[chosen]
ready = next((name for name in names if name.endswith("grpo")), names[-1])
left, right = st.columns(2)
one = left.selectbox("Model", names, index=names.index(ready), key="one", format_func=one_line, persist_state="session")
two = right.selectbox(
    "beside it",
    [NONE, *(n for n in names if n != one)],
    key="two",
    format_func=lambda n: one_line(n) or "nothing",
    persist_state="session",
)
chosen = [one, *([two] if two else [])]
settings, remember = show_settings()
columns = st.columns(len(chosen))
for column, name in zip(columns, chosen):
    try:
        loaded = talk.load(shared.runs().root / name)
        column.caption(plain(loaded.about))
        if loaded.step < 10:
            column.caption("After so few steps it has learned next to nothing: its answers show that it runs.")
        if loaded.stage == "pretrain" and not settings.raw:
            column.caption("A pretrained model knows no chat template: it can only continue a text.")
    except UserError as error:
        column.error(plain(str(error)))
st.html(talk.LEGEND)
for number, turn in enumerate(st.session_state.turns[-20:]):
    show_turn(number, turn, st.columns(max(1, len(turn["answers"]))))
if not st.session_state.turns:
    for number, example in enumerate(EXAMPLES):
        if st.button(plain(example), key=f"example {number}"):
            ask(example, chosen, columns, settings, remember)
elif st.button("A new conversation", key="new"):
    st.session_state.turns = []
    st.rerun()
if question := st.chat_input("Ask something", max_chars=8000):
    ask(question, chosen, st.columns(len(chosen)), settings, remember)
