"use strict";
// One page, no server: the data stands in the page, and every text goes in as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const records = data.records;
const state = { at: records.length - 1, colour: null, sort: "drawn" };
const tip = document.getElementById("tip");
let pinned = null;

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function draw(tag, values) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const name in values) node.setAttribute(name, values[name]);
  return node;
}

const known = (value) => value !== null && value !== undefined;
const sum = (values) => values.reduce((total, value) => total + value, 0);
const mean = (values) => (values.length ? sum(values) / values.length : null);
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const show = (value, digits = 2) => (known(value) ? value.toFixed(digits).replace(/^-(0\.?0*)$/, "$1").replace("-", "−") : "–");
const signed = (value, digits = 2) => (known(value) && value > 0 ? "+" : "") + show(value, digits);
function percent(logp) {
  const p = 100 * Math.exp(logp);
  return p >= 10 ? `${p.toFixed(1)} %` : p >= 0.01 ? `${p.toPrecision(2)} %` : "< 0.01 %";
}

// ---------------------------------------------------------------------------------------------------------------------
// What is known of a token, and what it looks like

const at = (answer, name, i) => (answer[name] ? answer[name][i] : null);
const difference = (a, b) => (known(a) && known(b) ? a - b : null);

function ratioOf(record, answer, i) {
  if (record.level === "sequence") return answer.ratio;
  const moved = difference(at(answer, "now", i), at(answer, "old", i));
  return known(moved) ? Math.exp(moved) : null;
}

function advantageOf(answer, i) {
  return answer.advantages ? answer.advantages[i] : answer.advantage;
}

function held(record, answer, i) { // would the clip take this token's gradient away in one more update?
  const ratio = ratioOf(record, answer, i), advantage = advantageOf(answer, i), [low, high] = record.clip;
  if (!known(ratio) || !known(advantage) || advantage === 0 || !answer.mask[i] || !answer.counts) return false;
  if (!known(low)) return known(high) && ratio > high; // CISPO bounds the weight of a token, of either sign
  return advantage > 0 ? ratio > high : ratio < low;
}

const towards = (share, colours) => ({ colour: share >= 0 ? colours[0] : colours[1], share: clamp(Math.abs(share), 0, 1) });

const KINDS = {
  probability: {
    name: "probability",
    about: "how likely the policy found each token when it wrote it: the stronger, the less likely",
    value: (record, answer, i) => at(answer, "old", i) ?? at(answer, "now", i),
    height: (value) => -value / 4,
    paint: (value) => towards(-value / 4, ["warm", "warm"]),
    legend: ["100 %", "2 %"], ends: [0, -4],
  },
  ratio: {
    name: "ratio",
    about: "π after the step's updates over π when it was sampled: blue likelier, orange less likely; underlined: by now outside the clip",
    value: (record, answer, i) => ratioOf(record, answer, i),
    height: (value, record) => Math.log(value) / ratioScale(record),
    paint: (value, record) => towards(Math.log(value) / ratioScale(record), ["up", "down"]),
    legend: null, ends: null,
  },
  reference: {
    name: "reference",
    about: "how much likelier than under the reference, log π − log π_ref: blue likelier, orange less likely; the sum over an answer estimates the KL",
    value: (record, answer, i) => difference(at(answer, "old", i) ?? at(answer, "now", i), at(answer, "ref", i)),
    height: (value) => value / 1.5,
    paint: (value) => towards(value / 1.5, ["up", "down"]),
    legend: ["−1.5", "+1.5"], ends: [-1.5, 1.5],
  },
  implicit: {
    name: "implicit reward",
    about: "",
    value: (record, answer, i) => {
      const gain = answer.ref ? difference(at(answer, "now", i), at(answer, "ref", i)) : at(answer, "now", i);
      return known(gain) ? record.beta * gain : null;
    },
    height: (value, record) => value / implicitScale(record),
    paint: (value, record) => towards(value / implicitScale(record), ["up", "down"]),
    legend: null, ends: null,
  },
  advantage: {
    name: "advantage",
    about: "how much better than expected: blue pushes a token up, orange pushes it down",
    value: (record, answer, i) => advantageOf(answer, i),
    height: (value) => value / 2,
    paint: (value) => towards(value / 2, ["up", "down"]),
    legend: ["−2", "+2"], ends: [-2, 2],
  },
  value: {
    name: "value",
    about: "what the critic foresaw before each token, from 0 (none) to 1",
    value: (record, answer, i) => at(answer, "values", i),
    height: (value) => value,
    paint: (value) => towards(value, ["cool", "warm"]),
    legend: ["0", "1"], ends: [0, 1],
  },
};

function ratioScale(record) { // twice the distance of the upper bound from 1 is the full colour
  const high = record.clip[1];
  return known(high) ? Math.log(1 + 2 * clamp(high - 1, 1e-4, 1)) : Math.log(1.4);
}

function implicitScale(record) { // one for all steps, so that the colours can be compared
  return data.implicit || 1;
}

function kindsOf(record) {
  const answers = record.groups.flatMap((group) => group.answers);
  const has = (name) => answers.some((answer) => answer[name]);
  if (record.kind === "preferences") return has("ref") ? ["implicit", "probability", "reference"] : ["implicit", "probability"];
  const kinds = ["probability", "ratio"];
  if (has("ref")) kinds.push("reference");
  kinds.push("advantage");
  if (has("values")) kinds.push("value");
  return kinds;
}

function prepare(record) {
  for (const group of record.groups) {
    group.answers.forEach((answer, number) => {
      answer.number = number;
      const n = answer.ids.length, own = (values) => values.filter((value, i) => known(value) && answer.mask[i]);
      const moved = own(answer.ids.map((_, i) => difference(at(answer, "now", i), at(answer, "old", i))));
      answer.ratio = answer.ratio ?? (moved.length ? Math.exp(mean(moved)) : null); // of the whole answer, if it is known
      const strayed = own(answer.ids.map((_, i) => KINDS.reference.value(record, answer, i)));
      const sampled = record.kind !== "preferences"; // of answers that others wrote the sum is no estimate of a KL
      answer.kl = sampled ? answer.kl ?? (strayed.length ? sum(strayed) : null) : null;
      answer.length = n + answer.more;
      answer.moved = moved.length ? mean(moved.map(Math.abs)) : null;
      answer.held = answer.ids.filter((_, i) => held(record, answer, i)).length;
    });
  }
}

const earnedBy = (record) => record.groups.flatMap((group) => group.answers.map((answer) => answer.reward)).filter(known);

function marginOf(group) { // of a pair, by how much the chosen answer is ahead
  const [chosen, rejected] = group.answers;
  return group.answers.length === 2 ? difference(chosen.reward, rejected.reward) : null;
}

function heightOf(record) {
  if (record.kind !== "preferences") return mean(earnedBy(record));
  const margins = record.groups.map(marginOf).filter(known);
  if (margins.length) return mean(margins);
  const of = (label) => mean(record.groups.flatMap((group) => group.answers).filter((a) => a.label === label).map((a) => a.reward).filter(known));
  return difference(of("desirable"), of("undesirable"));
}

// ---------------------------------------------------------------------------------------------------------------------
// The parts of the page

const flat = (group) => group.equal || (group.answers.length > 1 && group.answers.every((answer) => answer.advantage === 0));
const isFlat = (record) => record.kind !== "preferences" && record.groups.length > 0 && record.groups.every(flat);

function drawSteps() {
  const nav = document.getElementById("steps");
  const heights = records.map(heightOf), most = Math.max(1e-9, ...heights.filter(known)), least = Math.min(0, ...heights.filter(known));
  const named = Math.ceil(records.length / 26);
  nav.className = most - least > 1e-6 ? "steps" : "steps low"; // no room for bars that have no height
  nav.replaceChildren(...records.map((record, i) => {
    const button = make("button"), room = make("div", "room"), pole = make("div", "pole");
    pole.style.height = `${known(heights[i]) ? (100 * (heights[i] - least)) / (most - least || 1) : 0}%`;
    room.append(pole);
    button.append(room, make("span", i % named && i !== records.length - 1 ? "unnamed" : "", String(record.step)));
    button.title = `step ${record.step}: ${record.kind === "preferences" ? "mean margin" : "mean reward"} ${show(heights[i])}`;
    button.setAttribute("aria-pressed", String(i === state.at));
    button.addEventListener("click", () => go(i));
    return button;
  }));
  nav.children[state.at]?.scrollIntoView({ block: "nearest", inline: "nearest" });
  const record = records[state.at], what = record.kind === "preferences" ? "margin" : "reward";
  const kind = record.kind === "preferences" ? "the same answers at every step" : "a few of the answers of each step";
  document.getElementById("caption").textContent =
    `Step ${record.step}, mean ${what} ${show(heights[state.at])} of what is shown; ${kind}. Arrow keys go from step to step.`;
  document.getElementById("flat").textContent = !isFlat(record) ? "" :
    "All answers of the groups shown earned the same: nothing to learn in this step. In the quick look that is to be expected; the second button of the page Start makes a run that learns.";
}

function drawBar() {
  const record = records[state.at], kinds = kindsOf(record);
  if (!kinds.includes(state.colour)) state.colour = kinds[0];
  const choice = document.getElementById("colour");
  choice.replaceChildren(...kinds.map((name) => {
    const button = make("button", "", KINDS[name].name);
    button.setAttribute("aria-pressed", String(name === state.colour));
    button.addEventListener("click", () => { state.colour = name; render(); });
    return button;
  }));
  const kind = KINDS[state.colour], legend = document.getElementById("legend"), scale = make("span", "scale");
  let [left, right] = kind.legend || ["", ""], ends = kind.ends;
  if (state.colour === "ratio") {
    const wide = ratioScale(record);
    [left, right] = [show(Math.exp(-wide)), show(Math.exp(wide))];
    ends = [-wide, wide].map(Math.exp);
  } else if (state.colour === "implicit") {
    const wide = implicitScale(record);
    [left, right] = [show(-wide), signed(wide)];
    ends = [-wide, wide];
  }
  for (let k = 0; k < 9; k++) {
    const piece = make("i"), share = k / 8;
    const value = state.colour === "ratio" ? ends[0] * Math.pow(ends[1] / ends[0], share) : ends[0] + (ends[1] - ends[0]) * share;
    fill(piece, kind.paint(value, record));
    scale.append(piece);
  }
  legend.replaceChildren(make("span", "", left), scale, make("span", "", right));
  if (state.colour === "ratio") {
    const sample = make("span", "t held", "outside the clip");
    legend.append(sample);
  }
  const others = record.kind === "preferences" && state.colour === "reference" ? kind.about.replace(/;[^;]*$/, "") : kind.about;
  const about = state.colour === "implicit" ? implicitAbout(record) : others;
  document.getElementById("about").textContent = about.replace(/^[a-z]/, (letter) => letter.toUpperCase()) + ".";
}

function implicitAbout(record) {
  const reference = record.groups.some((group) => group.answers.some((answer) => answer.ref));
  const what = reference ? `β (log π − log π_ref) of each token, β = ${record.beta}` : `β log π of each token, β = ${record.beta}; this method has no reference`;
  return `${what}: blue became likelier, orange less likely` + (record.averaged ? "; an answer's reward is the mean over its tokens" : "; an answer's reward is the sum");
}

function fill(node, paint) {
  node.style.backgroundColor = `rgb(var(--${paint.colour}) / calc(var(--most) * ${paint.share.toFixed(3)} + 0.04 * ${(1 - paint.share).toFixed(3)}))`;
}

function drawToken(record, answer, i) {
  const text = answer.texts[i], node = make("span", "t");
  const special = /^<[|\/]?[\w\u2581｜ ]*[|]?>$/.test(text) && text.length > 4;
  node.textContent = text === "" ? "·" : text.replace(/\n/g, "⏎\n").replace(/\t/g, "⇥");
  if (special) node.classList.add("mark");
  else if (/<\|[^\s|]{1,24}\|>$/.test(text) && text.length < 32) node.classList.add("whole"); // after bytes that are no character of their own
  if (!answer.mask[i]) node.classList.add("given");
  const value = KINDS[state.colour].value(record, answer, i);
  if (known(value)) fill(node, KINDS[state.colour].paint(value, record));
  if (state.colour === "ratio" && held(record, answer, i)) node.classList.add("held");
  return node;
}

function drawTokens(record, answer) {
  const box = make("p", "tokens");
  box.tabIndex = 0;
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", "tokens; arrow keys go from one to the next");
  const nodes = answer.ids.map((_, i) => drawToken(record, answer, i));
  nodes.forEach((node, i) => { node.entry = { record, answer, i, node }; });
  box.append(...nodes);
  if (answer.more) box.append(make("span", "more", ` … and ${answer.more} more tokens`));
  let here = -1;
  box.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by || !nodes.length) return;
    event.preventDefault(); event.stopPropagation();
    here = clamp(here + by, 0, nodes.length - 1);
    pin(nodes[here].entry);
  });
  box.addEventListener("blur", () => { here = -1; pin(null); });
  return box;
}

function drawStrip(record, answer) { // the same numbers as heights: the shape of an answer at a glance
  const n = answer.ids.length, kind = KINDS[state.colour], svg = draw("svg", { class: "strip", viewBox: `0 0 ${Math.max(n, 24)} 24`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const both = ["ratio", "reference", "implicit", "advantage"].includes(state.colour);
  for (let i = 0; i < n; i++) {
    const value = kind.value(record, answer, i);
    if (!known(value)) continue;
    const share = clamp(kind.height(value, record), -1, 1), high = Math.max(0.6, Math.abs(share) * (both ? 12 : 24));
    const y = both ? (share >= 0 ? 12 - high : 12) : 24 - high, bar = draw("rect", { x: i + 0.1, y, width: 0.8, height: high });
    bar.style.fill = `rgb(var(--${kind.paint(value, record).colour}) / 0.75)`;
    svg.append(bar);
  }
  const base = draw("rect", { x: 0, y: both ? 11.8 : 23.6, width: Math.max(n, 24), height: 0.4 });
  base.style.fill = "rgb(var(--ink) / 0.2)";
  svg.append(base);
  return svg;
}

function drawSwing(value, most) {
  const swing = make("span", "swing"), beam = make("span", "beam"), arm = make("i");
  const half = clamp(Math.abs(value) / most, 0, 1) * 50;
  arm.style.width = `${half}%`;
  arm.style.left = value >= 0 ? "50%" : `${50 - half}%`;
  arm.style.backgroundColor = `rgb(var(--${value >= 0 ? "up" : "down"}))`;
  beam.append(arm);
  swing.append(beam, make("span", "", signed(value)), make("span", "label", "advantage"));
  return swing;
}

function drawAnswer(record, group, answer) {
  const card = make("article", "answer"), head = make("div", "head"), marks = make("div", "marks");
  head.append(make("span", "earned", record.kind === "preferences" ? signed(answer.reward) : show(answer.reward)), make("span", "label", "reward"));
  if (answer.label) head.append(make("span", "name", answer.label));
  if (known(answer.advantage)) {
    const most = Math.max(1e-9, ...group.answers.map((one) => Math.abs(one.advantage ?? 0)), 1);
    head.append(drawSwing(answer.advantage, most));
  }
  for (const [name, value] of Object.entries(answer.rewards)) {
    const weight = Object.hasOwn(record.weights, name) ? record.weights[name] : null;
    const times = known(weight) && weight !== 1 ? ` × ${Number(weight.toPrecision(3))}` : "";
    marks.append(make("span", "", `${name} ${known(value) ? Number(value.toFixed(3)) : "unknown"}${times}`));
  }
  marks.append(make("span", "", `${answer.length} tokens`));
  if (known(answer.kl) && record.kind !== "preferences") marks.append(make("span", "", `KL ${show(answer.kl)}`));
  if (record.level === "sequence" && known(answer.ratio)) marks.append(make("span", "", `ratio ${show(answer.ratio, 5)}`));
  if (answer.held) marks.append(make("span", "", record.level === "sequence" ? "outside the clip" : `${answer.held} outside the clip`));
  if (!answer.counts) marks.append(make("span", "loud", "left out of the loss"));
  if (!answer.finished) marks.append(make("span", "loud", "cut off"));
  card.append(head, marks, drawStrip(record, answer), drawTokens(record, answer));
  return card;
}

function drawSpark(record, number) { // of a pair, its margin from step to step; of a labelled answer, its reward
  const pairs = (group) => (group.answers.length === 2 ? marginOf(group) : group.answers[0]?.reward);
  const values = records.map((one) => (one.groups[number] ? pairs(one.groups[number]) : null));
  const points = values.map((value, i) => [i, value]).filter((point) => known(point[1]));
  if (points.length < 2) return null;
  const low = Math.min(0, ...points.map((p) => p[1])), high = Math.max(0, ...points.map((p) => p[1]));
  const x = (i) => (120 * i) / Math.max(1, records.length - 1), y = (v) => 24 - (22 * (v - low)) / (high - low || 1);
  const svg = draw("svg", { class: "spark", viewBox: "0 0 120 26", "aria-hidden": "true" });
  const zero = draw("line", { x1: 0, x2: 120, y1: y(0), y2: y(0) }), line = draw("polyline", { points: points.map(([i, v]) => `${x(i)},${y(v)}`).join(" "), fill: "none" });
  zero.style.stroke = "rgb(var(--ink) / 0.2)";
  line.style.stroke = "var(--accent)";
  line.style.strokeWidth = "1.5";
  svg.append(zero, line);
  if (known(values[state.at])) {
    const dot = draw("circle", { cx: x(state.at), cy: y(values[state.at]), r: 3 });
    dot.style.fill = "var(--accent)";
    svg.append(dot);
  }
  return svg;
}

function drawGroup(record, group, number) {
  const section = make("section", "group"), facts = make("div", "facts");
  section.append(make("h2", "question", group.question || "(no text)"));
  const add = (text, bold) => { const span = make("span", "", text); if (known(bold)) span.append(make("b", "", bold)); facts.append(span); };
  if (group.part) add(group.part);
  if (known(group.gold)) add("right answer ", group.gold);
  const earned = group.answers.map((answer) => answer.reward).filter(known);
  if (record.kind === "preferences") {
    const margin = marginOf(group);
    if (known(margin)) { add("margin ", signed(margin)); if (margin < 0) add("ranked the wrong way round"); }
    const spark = drawSpark(record, number);
    if (spark) facts.append(spark);
  } else if (group.answers.length > 1) {
    const middle = mean(earned), std = Math.sqrt(sum(earned.map((value) => (value - middle) ** 2)) / Math.max(1, earned.length - 1));
    if (group.size > group.answers.length) add(`${group.answers.length} of ${group.size} answers`);
    add("mean reward ", show(group.mean ?? middle));
    if (group.equal || (flat(group) && !known(group.mean))) add("flat: every answer earned the same, so they teach nothing about each other");
    else add("std ", show(group.std ?? std));
  }
  section.append(facts);
  const [ids, texts] = group.prompt;
  const details = make("details"), box = make("p", "tokens");
  if (ids.length) {
    details.append(make("summary", "", `the prompt, ${ids.length} tokens`));
    details.addEventListener("toggle", () => {
      if (details.open && !box.childElementCount) ids.forEach((id, i) => { const node = make("span", "t", texts[i].replace(/\n/g, "⏎\n") || "·"); node.title = `token ${id}`; box.append(node); });
    });
    details.append(box);
  }
  const answers = make("div", "answers");
  answers.append(...sorted(group.answers).map((answer) => drawAnswer(record, group, answer)));
  section.append(answers);
  if (ids.length) section.append(details);
  return section;
}

const SORTS = {
  drawn: (answer) => answer.number,
  reward: (answer) => -(answer.reward ?? -Infinity),
  length: (answer) => -answer.length,
  kl: (answer) => -(answer.kl ?? -Infinity),
  moved: (answer) => -(answer.moved ?? -Infinity),
};

function sorted(answers) {
  const key = SORTS[state.sort];
  return answers.map((answer) => [key(answer), answer]).sort((a, b) => (a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : 0)).map((pair) => pair[1]);
}

function drawGroups() {
  const record = records[state.at], singles = record.groups.every((group) => group.answers.length <= 1);
  let groups = record.groups.map((group, number) => [group, number]);
  if (singles && state.sort !== "drawn") {
    const key = ([group]) => (group.answers.length ? SORTS[state.sort](group.answers[0]) : Infinity);
    groups.sort((a, b) => key(a) - key(b));
  }
  const main = document.getElementById("groups");
  main.className = singles ? "singles" : "";
  main.replaceChildren(...groups.map(([group, number]) => drawGroup(record, group, number)));
}

// ---------------------------------------------------------------------------------------------------------------------
// The numbers of a token

function rowsOf({ record, answer, i }) {
  const rows = [], add = (name, value, chosen) => { if (known(value)) rows.push([name, value, chosen]); };
  const old = at(answer, "old", i), now = at(answer, "now", i), ref = at(answer, "ref", i), sampled = at(answer, "sampled", i);
  const colour = state.colour, ratio = ratioOf(record, answer, i);
  if (known(old)) add("probability when sampled", percent(old), colour === "probability");
  if (known(now)) add(known(old) ? "after the updates" : "probability", percent(now), colour === "probability" && !known(old));
  if (known(ref)) add("of the reference", percent(ref));
  if (known(old)) add("log π, sampled", show(old, 3));
  if (known(sampled) && known(old) && Math.abs(sampled - old) > 5e-4) add("of the sampler itself", show(sampled, 4));
  if (known(now)) add(known(old) ? "log π, now" : "log π", show(now, 3));
  if (known(ref)) add("log π_ref", show(ref, 3));
  if (known(ratio) && known(old)) add(record.level === "sequence" ? "ratio of the answer" : "ratio", show(ratio, record.level === "sequence" ? 5 : 3), colour === "ratio");
  const strayed = KINDS.reference.value(record, answer, i);
  if (known(strayed)) {
    add("log π − log π_ref", signed(strayed, 3), colour === "reference");
    if (record.kind !== "preferences") add("KL estimate k3", show(Math.exp(-strayed) - 1 + strayed, 3));
  }
  if (record.kind === "preferences") add("implicit reward", signed(KINDS.implicit.value(record, answer, i), 3), colour === "implicit");
  else if (known(advantageOf(answer, i))) add("advantage", signed(advantageOf(answer, i), 3), colour === "advantage");
  if (known(at(answer, "values", i))) add("value before it", show(at(answer, "values", i), 3), colour === "value");
  return rows;
}

function tell(entry) {
  if (!entry) { tip.style.display = "none"; return; }
  const { record, answer, i, node } = entry, list = make("dl");
  for (const [name, value, chosen] of rowsOf(entry)) list.append(make("dt", chosen ? "chosen" : "", name), make("dd", chosen ? "chosen" : "", value));
  const text = answer.texts[i] === "" ? "(a part of the next character)" : JSON.stringify(answer.texts[i]).slice(1, -1);
  tip.replaceChildren(make("p", "which", text), list);
  list.prepend(make("dt", "", `token ${i + 1} of ${answer.length}`), make("dd", "", `id ${answer.ids[i]}`));
  if (!answer.mask[i]) tip.append(make("p", "", "not written by the policy: it does not count"));
  if (held(record, answer, i)) {
    const bounded = known(record.clip[0]) ? "a further update on this answer would get no gradient from it" : "a further update would count it with a bounded weight";
    tip.append(make("p", "", `by now outside the clip: ${bounded}`));
  }
  tip.style.display = "block";
  const box = node.getClientRects()[0] || node.getBoundingClientRect(), size = tip.getBoundingClientRect();
  const below = box.bottom + 8 + size.height < innerHeight;
  tip.style.left = `${clamp(box.left, 8, Math.max(8, innerWidth - size.width - 8))}px`;
  tip.style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - 8 - size.height)}px`;
}

function pin(entry) {
  pinned?.node.classList.remove("here");
  pinned = entry;
  entry?.node.classList.add("here");
  tell(entry);
}

const under = (event) => (event.target.closest ? event.target.closest(".t") : null)?.entry;
document.addEventListener("mouseover", (event) => { if (!pinned) tell(under(event) || null); });
document.addEventListener("click", (event) => {
  const entry = under(event) || null;
  pin(entry && pinned && entry.node === pinned.node ? null : entry);
});
addEventListener("scroll", () => (pinned ? tell(pinned) : tell(null)), { passive: true });
addEventListener("keydown", (event) => {
  if (event.target.matches?.("select, input")) return;
  if (event.key === "Escape") pin(null);
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (by && !event.altKey && !event.ctrlKey && !event.metaKey) { event.preventDefault(); go(clamp(state.at + by, 0, records.length - 1)); }
});

// ---------------------------------------------------------------------------------------------------------------------

function remember() { // the address names what is shown, so that a link leads there
  try { history.replaceState(null, "", `#step=${records[state.at].step}&colour=${state.colour}&sort=${state.sort}`); } catch { /* inside another page there is no address */ }
}

function offer() { // only what the run can be ordered by: some keep no reference, some are written down without ratios
  const all = records.flatMap((record) => record.groups.flatMap((group) => group.answers));
  for (const name of ["kl", "moved"]) {
    if (!all.some((answer) => known(answer[name]))) document.querySelector(`#sort option[value="${name}"]`).remove();
  }
}

function recall() {
  const wanted = new URLSearchParams(location.hash.slice(1)), step = records.findIndex((one) => String(one.step) === wanted.get("step"));
  if (step >= 0) state.at = step;
  if (Object.hasOwn(KINDS, wanted.get("colour") || "")) state.colour = wanted.get("colour");
  if (Object.hasOwn(SORTS, wanted.get("sort") || "") && document.querySelector(`#sort option[value="${wanted.get("sort")}"]`)) state.sort = wanted.get("sort");
}

function go(i) {
  state.at = i;
  render();
}

function render() {
  pin(null);
  drawSteps();
  drawBar();
  drawGroups();
  remember();
}

if (records.length) {
  records.forEach(prepare);
  const gains = records.flatMap((record) => record.kind === "preferences" ? record.groups.flatMap((group) => group.answers.flatMap((answer) =>
    answer.ids.map((_, i) => KINDS.implicit.value(record, answer, i)).filter(known).map(Math.abs))) : []).sort((a, b) => a - b);
  data.implicit = gains.length ? Math.max(0.05, Number(gains[Math.floor(gains.length * 0.99)].toPrecision(1))) : 1;
  offer();
  recall();
  const sort = document.getElementById("sort");
  sort.value = state.sort;
  sort.addEventListener("change", () => { state.sort = sort.value; render(); });
  render();
}
