// Search, theme, navigation and copying. Nothing here asks another machine for anything.
"use strict";
const root = document.documentElement.dataset.root;
const $ = (id) => document.getElementById("site-" + id);

// Theme: the system's, unless the reader chose one.
$("theme").addEventListener("click", () => {
  const html = document.documentElement;
  const dark = html.dataset.theme ? html.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  html.dataset.theme = dark ? "light" : "dark";
  try { localStorage.setItem("theme", html.dataset.theme); } catch (e) { /* a browser that keeps nothing */ }
});

// Navigation: a drawer where there is no room for a column.
const setMenu = (open) => {
  document.body.classList.toggle("menu", open);
  $("menu").setAttribute("aria-expanded", String(open));
};
$("menu").addEventListener("click", () => setMenu(!document.body.classList.contains("menu")));
$("main").addEventListener("click", () => setMenu(false));
const current = document.querySelector("#site-nav [aria-current]");
if (current) $("nav").scrollTop = current.offsetTop - 120;

// Copying: a button on every block, and every command by itself.
async function copy(text, node) {
  try {
    await navigator.clipboard.writeText(text);
  } catch (e) {
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  node.classList.add("copied");
  setTimeout(() => node.classList.remove("copied"), 1200);
}
for (const command of document.querySelectorAll(".cmd")) {
  command.title = "Click to copy: " + command.dataset.copy;
  command.addEventListener("click", (event) => {
    if (!event.target.closest("a") && !String(getSelection())) copy(command.dataset.copy, command);
  });
}
for (const block of document.querySelectorAll("article pre")) {
  const button = document.createElement("button");
  button.className = "copy";
  button.textContent = "copy";
  button.setAttribute("aria-label", "Copy this block");
  button.addEventListener("click", () => {
    const commands = [...block.querySelectorAll(".cmd")].map((one) => one.dataset.copy);
    const typed = [...block.querySelectorAll(".p")].length;
    let text = commands.length ? commands.join("\n") : block.querySelector("code").innerText;
    if (typed) text = text.split("\n").filter((line) => /^(>>>|\.\.\.)/.test(line)).map((line) => line.slice(4)).join("\n");
    copy(text, button);
  });
  const holder = document.createElement("div");
  holder.className = "holder";
  block.replaceWith(holder);
  holder.append(block, button);
}

// Drawings: what a file uses, and who uses it, while the pointer is on it.
for (const drawing of document.querySelectorAll(".drawing")) {
  const edges = [...drawing.querySelectorAll("[data-from]")];
  const nodes = [...drawing.querySelectorAll("[data-node]")];
  for (const node of nodes) {
    const name = node.dataset.node;
    const mark = (on) => {
      drawing.classList.toggle("chosen", on);
      node.classList.toggle("on", on);
      const near = new Set((node.dataset.uses || "").split(" "));
      for (const other of nodes)
        if (near.has(other.dataset.node) || (other.dataset.uses || "").split(" ").includes(name)) other.classList.toggle("on", on);
      for (const edge of edges) if (edge.dataset.from === name || edge.dataset.to === name) edge.classList.toggle("on", on);
    };
    node.addEventListener("mouseenter", () => mark(true));
    node.addEventListener("mouseleave", () => mark(false));
    node.addEventListener("focusin", () => mark(true));
    node.addEventListener("focusout", () => mark(false));
  }
}

// Search: the index is one file, read when the field is first used.
let index = null;
let chosen = -1;
function loadIndex() {
  if (index !== null) return;
  index = [];
  const script = document.createElement("script");
  script.src = root + "_site/index.js";
  script.onload = () => {
    index = window.BOOK.map((one) => ({ ...one, lh: one.h.toLowerCase(), lt: one.t.toLowerCase(), lp: one.p.toLowerCase() }));
    show();
  };
  document.head.append(script);
}
const escapeHTML = (text) => text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
const isWord = (c) => c !== undefined && /[\p{L}\p{N}_]/u.test(c);

function where(text, term) { // 3: a whole word, 2: the beginning of one, 1: inside one, 0: not there
  let best = 0;
  for (let at = text.indexOf(term); at >= 0; at = text.indexOf(term, at + 1)) {
    const begins = !isWord(text[at - 1]);
    best = Math.max(best, begins ? (isWord(text[at + term.length]) ? 2 : 3) : 1);
    if (best === 3) break;
  }
  return best;
}
function score(entry, terms) {
  let total = 0;
  for (const term of terms) {
    const title = where(entry.lh, term), page = where(entry.lp, term), body = where(entry.lt, term);
    if (!title && !page && !body) return 0;
    total += 8 * title + (entry.lh === term ? 30 : 0) + 3 * page + 2 * body;
  }
  return total * entry.w;
}
function excerpt(entry, terms) {
  const places = terms.map((term) => entry.lt.indexOf(term)).filter((at) => at >= 0);
  const first = places.length ? Math.min(...places) : 0;
  const from = first > 50 ? entry.t.lastIndexOf(" ", first - 50) + 1 : 0;
  let text = escapeHTML((from ? "… " : "") + entry.t.slice(from, from + 190));
  for (const term of terms) {
    const safe = escapeHTML(term).replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
    text = text.replace(new RegExp(safe + "(?![^<]*>)", "gi"), "<mark>$&</mark>");
  }
  return text;
}
function show() {
  const query = $("query").value.trim().toLowerCase(), box = $("results");
  chosen = -1;
  box.hidden = !query;
  if (!query || !index) return;
  const terms = [...new Set(query.split(/\s+/))];
  const found = index.map((entry) => [score(entry, terms), entry]).filter((one) => one[0] > 0);
  found.sort((a, b) => b[0] - a[0]);
  box.innerHTML = found.length
    ? found.slice(0, 14).map(([, e]) =>
        `<a href="${root}${e.u}"><b>${escapeHTML(e.h || e.p)}</b> <i>${e.h ? escapeHTML(e.p) : ""}</i><span>${excerpt(e, terms)}</span></a>`).join("")
    : `<p>Nothing has all of these words.</p>`;
}
$("query").addEventListener("focus", loadIndex);
$("query").addEventListener("input", () => { loadIndex(); show(); });
document.addEventListener("keydown", (event) => {
  const typing = /^(INPUT|TEXTAREA)$/.test(event.target.tagName);
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    $("query").focus();
  } else if (event.key === "Escape") {
    $("query").value = "";
    show();
    $("query").blur();
    setMenu(false);
  } else if (event.target.id === "site-query" && ["ArrowDown", "ArrowUp", "Enter"].includes(event.key)) {
    const links = [...$("results").querySelectorAll("a")];
    if (!links.length) return;
    event.preventDefault();
    if (event.key === "Enter") return links[Math.max(0, chosen)].click();
    chosen = (chosen + (event.key === "ArrowDown" ? 1 : -1) + links.length) % links.length;
    links.forEach((link, i) => link.classList.toggle("on", i === chosen));
    links[chosen].scrollIntoView({ block: "nearest" });
  }
});
document.addEventListener("click", (event) => {
  if (!event.target.closest(".search")) $("results").hidden = true;
  else show();
});
