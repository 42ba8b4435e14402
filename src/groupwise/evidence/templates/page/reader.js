// The completions to read: which run, step and kind of record, on one side or two, searched, filtered and coloured.

const GROUPS_SHOWN = 3, GROUPS_MORE = 10; // prompts at first, and with every "show more"
const HIDDEN_WHEN_EMPTY = ["sides", "choices", "search", "key", "list", "more"];
const reader = {
  sides: [], quantity: "advantage", query: "", order: "recorded", filters: { wrong: false, truncated: false, changed: false },
  shown: GROUPS_SHOWN, common: false, near: false, open: false, offered: "", follow: isLive, elements: null,
};

// --- the two sides

function newSide(run, source, step) {
  return { run, source, step, groups: [], leftOut: 0, error: "", request: null, controls: null, history: historyOf(run) };
}

function rangesOf(side) {
  return stepRanges(side.run, side.source);
}

// Read a side's step anew, or further groups of it.
async function load(side, further = false) {
  const request = (side.request = Symbol("request")), first = further ? side.groups.length : 0;
  if (!further) Object.assign(side, { groups: [], leftOut: 0, error: "", history: historyOf(side.run) });
  drawStatus();
  try {
    const found = await readStep(side.run, side.step, side.source, first);
    if (side.request !== request) return;
    side.groups = [...side.groups, ...found.groups.map((group) => ({ ...group, all: side.source !== "texts" }))];
    side.leftOut = found.left_out - first;
  } catch (error) {
    if (side.request !== request) return;
    side.error = error.message;
  }
  side.request = null;
  if (!further) reader.shown = GROUPS_SHOWN;
  drawList();
}

function setSide(side, changes) {
  Object.assign(side, changes);
  if (!sourcesOf(side.run).includes(side.source)) side.source = sourcesOf(side.run)[0] ?? "tokens";
  const ranges = rangesOf(side);
  side.step = stepAt(ranges, placeInRanges(ranges, side.step));
  drawReaderControls(true);
  return load(side);
}

const newestStep = (side) => rangesOf(side).at(-1)?.[1] ?? 0;

// What is shown first: live the newest rollouts, in a report the last step with tokens.
function firstSide() {
  const run = page.data.runs.find((item) => sourcesOf(item.id).length);
  if (!run) return null;
  const sources = sourcesOf(run.id), training = isLive && ["training", "silent", "beginning"].includes(run.status.state);
  const side = newSide(run.id, training && sources.includes("texts") ? "texts" : sources[0], 0);
  side.step = newestStep(side);
  return side;
}

// What is compared with at first: another run at the same step, or the same run at its first step.
function secondSide() {
  const [side] = reader.sides;
  const other = page.data.runs.find((run) => run.id !== side.run && sourcesOf(run.id).includes(side.source));
  const second = newSide(other?.id ?? side.run, side.source, side.step);
  const ranges = rangesOf(second);
  second.step = other ? stepAt(ranges, placeInRanges(ranges, side.step)) : ranges[0]?.[0] ?? 0;
  return second;
}

async function compare() {
  if (reader.sides.length === 2) reader.sides.pop();
  else reader.sides.push(secondSide());
  reader.filters.changed = false;
  drawReaderControls();
  const [side, second] = reader.sides;
  if (!second) return drawList();
  await load(second);
  // Two runs rarely train on the same prompts at a step; the held-out problems are the same.
  const heldOut = [side, second].every((one) => reader.sides.includes(one) && !one.request && sourcesOf(one.run).includes("held_out"));
  if (!reader.common && heldOut) for (const one of [side, second]) setSide(one, { source: "held_out" });
}

// --- controls

function picker(label, key, value, options, onchange) {
  const choices = options.map(([option, name]) => make("option", { value: option, selected: option === value }, name));
  return make("label", {}, `${label} `, make("select", { "data-key": key, onchange: (event) => onchange(event.target.value) }, ...choices));
}

function sideControls(side, i) {
  const name = reader.sides.length > 1 ? "AB"[i] : "";
  const runs = page.data.runs.filter((run) => sourcesOf(run.id).length || run.id === side.run);
  const box = make("div", { class: "controls", role: "group", "aria-label": name ? text("reader.side", { side: name }) : text("reader.run") });
  if (name) box.append(make("b", { class: "side-letter" }, name));
  if (page.data.runs.length > 1) box.append(picker(text("reader.run"), `run${i}`, side.run, runs.map((run) => [run.id, run.name]), (run) => setSide(side, { run })));
  const sources = sourcesOf(side.run).map((source) => [source, text(`reader.sources.${source}`)]);
  box.append(picker(text("reader.source"), `source${i}`, side.source, sources, (source) => setSide(side, { source })), stepControls(side, i));
  return box;
}

// The controls of a side's step look up which steps there are when they are used: more come while a run goes on.
function stepControls(side, i) {
  const go = (step) => { if (i === 0) setFollow(false); setSide(side, { step }); };
  const by = (places) => () => go(stepAt(rangesOf(side), Math.max(0, placeInRanges(rangesOf(side), side.step) + places)));
  const at = (event) => stepAt(rangesOf(side), Number(event.target.value));
  const button = (sign, label, places) => make("button", {
    type: "button", "data-key": `${label}${i}`, "aria-label": text(`reader.${label}`), title: text(`reader.${label}`), onclick: by(places),
  }, sign);
  const typed = make("input", { type: "number", "data-key": `step${i}`, onchange: (event) => go(Number(event.target.value)) });
  const slider = make("input", {
    type: "range", "data-key": `slider${i}`, min: 0, "aria-label": text("reader.steps"), oninput: (event) => { typed.value = at(event); }, onchange: (event) => go(at(event)),
  });
  side.controls = { typed, slider, earlier: button("‹", "earlier", -1), later: button("›", "later", 1) };
  const { earlier, later } = side.controls;
  showStep(side);
  return make("span", { class: "steps" }, make("label", {}, `${text("reader.step")} `, typed), earlier, later, slider);
}

// `chosen`: it was chosen just now; otherwise what somebody is typing stays.
function showStep(side, chosen = false) {
  const { typed, slider, earlier, later } = side.controls, ranges = rangesOf(side), count = countSteps(ranges), place = placeInRanges(ranges, side.step);
  Object.assign(typed, { min: ranges[0]?.[0] ?? 0, max: newestStep(side) });
  slider.max = Math.max(0, count - 1);
  if (chosen || document.activeElement !== typed) typed.value = side.step;
  slider.value = place;
  slider.setAttribute("aria-valuetext", String(side.step));
  earlier.setAttribute("aria-disabled", String(place <= 0));
  later.setAttribute("aria-disabled", String(place >= count - 1));
}

function setFollow(on) {
  reader.follow = on;
  const box = reader.elements.choices.querySelector("[data-key=follow]");
  if (box) box.checked = on;
}

function tick(label, key, checked, onchange) {
  return make("label", { class: "tick" }, make("input", { type: "checkbox", "data-key": key, checked, onchange: (event) => onchange(event.target.checked) }), ` ${label}`);
}

// What the controls offer; they are made again only when this changes, so that a list that is open stays open.
function offered() {
  const runs = page.data.runs.map((run) => [run.id, run.name, sourcesOf(run.id)]);
  return JSON.stringify([page.language, runs, reader.common, reader.sides.map((side) => [side.run, side.source])]);
}

function drawReaderControls(chosen = false) {
  const { elements } = reader, comparing = reader.sides.length > 1;
  reader.sides.forEach((side) => side.controls && showStep(side, chosen));
  if (reader.offered === offered() && reader.sides.every((side) => side.controls)) return;
  reader.offered = offered();
  const numbered = reader.sides.some((side) => side.source === "tokens");
  refill(elements.sides, ...reader.sides.map(sideControls));
  const filters = ["wrong", "truncated", ...(comparing && reader.common ? ["changed"] : [])].map((name) =>
    tick(text(`reader.filters.${name}`), name, reader.filters[name], (on) => { reader.filters[name] = on; reader.shown = GROUPS_SHOWN; drawList(); }));
  const orders = ["recorded", ...(numbered ? ["ratio"] : []), "high", "low", "long"].map((order) => [order, text(`reader.orders.${order}`)]);
  const quantities = ["none", ...QUANTITIES].map((name) => [name, text(`reader.quantities.${name}`)]);
  const newest = isLive ? tick(text("reader.follow"), "follow", reader.follow, (on) => { setFollow(on); if (on) followNewest(); }) : null;
  refill(elements.choices,
    make("button", { type: "button", "data-key": "compare", onclick: compare }, text(comparing ? "reader.single" : "reader.compare")), newest,
    picker(text("reader.order"), "order", reader.order, orders, (order) => { reader.order = order; drawList(); }),
    make("fieldset", {}, make("legend", {}, text("reader.only")), ...filters),
    numbered ? picker(text("reader.colour"), "quantity", reader.quantity, quantities, (name) => { reader.quantity = name; drawColours(); recolour(elements.list); }) : null);
  elements.search.setAttribute("aria-label", text("reader.search"));
  elements.search.placeholder = text("reader.search");
  const about = [numbered ? text("reader.about") : "", ...reader.sides.slice(0, 1).map(embeddedNote)].filter(Boolean).join(text("core.sentence"));
  elements.about.textContent = about;
  elements.about.hidden = !about;
  drawColours();
}

function drawColours() {
  const { elements } = reader, sizes = reader.sides.flatMap((side) => side.groups).flatMap((group) => group.completions).flatMap((completion) => completion.advantage);
  let limit = 0;
  for (const size of sizes) limit = Math.max(limit, Math.abs(size ?? 0));
  tokenColours.quantity = reader.quantity;
  tokenColours.limit = Number(limit.toPrecision(1)) || 1;
  refill(elements.key, ...[reader.sides.some((side) => side.source === "tokens") ? colourKey() : null]);
}

// --- the list

function viewOf() {
  const names = Object.fromEntries(reader.sides.map((side, i) => ["AB"[i], sideName(side, "AB"[i])]));
  return { comparing: reader.sides.length > 1, width: lineWidth(reader.elements.list, reader.sides.length), names, query: lowered(reader.query.trim()), order: reader.order, redraw: drawList };
}

function sideName(side, letter) {
  const run = page.data.runs.find((item) => item.id === side.run)?.name ?? "";
  return `${letter}${text("core.colon")}${run} · ${text("reader.at_step", { step: grouped(side.step) })}`;
}

function drawList() {
  inView.disconnect();  // from what is replaced
  drawColours();
  hideTip();
  const view = viewOf(), [side, other] = reader.sides;
  const pairs = paired(side.groups, other?.groups ?? []);
  if (!reader.sides.some((one) => one.request)) {
    reader.common = pairs.some(([group, same]) => group && same);
    if (!reader.common) reader.filters.changed = false;
    drawReaderControls();
  }
  const found = selected(pairs, reader.filters, view.query, reader.order, view.comparing);
  const cards = found.slice(0, reader.shown).map((entry) => groupCard(entry, view));
  reader.elements.list.replaceChildren(...cards);
  drawStatus(pairs, found);
  drawMore(found);
}

function drawStatus(pairs = null, found = []) {
  const { status } = reader.elements, [, other] = reader.sides;
  const wrong = reader.sides.filter((one) => one.error).map((one) => text("reader.failed", { reason: one.error }));
  if (wrong.length) status.textContent = wrong.join(text("core.sentence"));
  else if (!pairs || reader.sides.some((one) => one.request)) status.textContent = text("reader.loading");
  else {
    const of = (entry) => entry[1].length + entry[3].length;
    const completions = reader.sides.flatMap((one) => one.groups).reduce((sum, group) => sum + group.completions.length, 0);
    const common = !other || reader.common ? "" : text("core.sentence") + text("reader.no_common");
    const values = { shown: grouped(found.reduce((sum, entry) => sum + of(entry), 0)), completions: grouped(completions), groups: grouped(found.length), all: grouped(pairs.length) };
    status.textContent = (found.length ? text("reader.count", values) : text("reader.none_found")) + common + notHere();
  }
}

function notHere() {
  const count = isLive ? 0 : Math.max(...reader.sides.map((side) => side.leftOut));
  return count > 0 ? text("core.sentence") + text("reader.not_here", { count: grouped(count) }) : "";
}

function embeddedNote(side) {
  if (isLive) return "";
  const { readable } = page.data.runs.find((run) => run.id === side.run), all = side.source === "texts" ? countSteps(readable.texts) : readable[side.source].length;
  const here = countSteps(rangesOf(side));
  return here < all ? text("reader.embedded", { count: grouped(here), all: grouped(all) }) : "";
}

function drawMore(found) {
  const unread = reader.sides.filter((side) => isLive && side.leftOut > 0);
  const further = found.length > reader.shown ? make("button", { type: "button", "data-key": "more", onclick: () => { reader.shown += GROUPS_MORE; drawList(); } }, text("reader.more_groups")) : null;
  const read = !further && unread.length ? make("button", { type: "button", "data-key": "more", onclick: () => { reader.shown += GROUPS_MORE; for (const side of unread) load(side, true); } }, text("reader.more_read")) : null;
  refill(reader.elements.more, further, read);
}

// --- the section

function buildReader() {
  const container = document.getElementById("completions");
  let typing = 0;
  const search = make("input", { type: "search", oninput: (event) => {
    clearTimeout(typing);
    typing = setTimeout(() => { reader.query = event.target.value; reader.shown = GROUPS_SHOWN; drawList(); }, 150);
  } });
  const elements = {
    heading: make("h2"), about: make("p", { class: "soft" }), sides: make("div"), choices: make("div", { class: "controls" }), search,
    key: make("div"), status: make("p", { class: "soft", role: "status" }), list: make("div", { onpointerleave: () => { if (reader.follow) followNewest(); } }), more: make("div", { class: "controls" }),
  };
  reader.elements = elements;
  for (const name of HIDDEN_WHEN_EMPTY) elements[name].hidden = true;
  container.replaceChildren(...Object.values(elements));
  document.body.append(tip, spoken);
}

async function openReader() {
  reader.open = true;
  if (!isLive) await stored();
  const side = reader.sides[0] ?? firstSide(), { elements } = reader;
  for (const name of HIDDEN_WHEN_EMPTY) elements[name].hidden = !side;
  if (!side) {
    elements.about.textContent = text("reader.nothing");
    return;
  }
  const begins = reader.sides.length === 0;
  if (begins) reader.sides = [side];
  drawReaderControls();
  if (begins) await load(side);
  else drawList();
}

// The run that is read goes on: newer steps can be chosen, and the newest is shown if that is wanted. What a resume undid is read anew.
function followNewest() {
  const [side] = reader.sides;
  if (!side) return openReader();
  reader.sides = reader.sides.filter((one) => page.data.runs.some((run) => run.id === one.run)); // others were removed
  if (!reader.sides.includes(side)) return openReader();
  for (const one of reader.sides) {
    const undone = one.history !== historyOf(one.run) || newestStep(one) < one.step;
    if (undone && sourcesOf(one.run).length) setSide(one, {}); // else its directory has gone, and what was read stays
  }
  if (!sourcesOf(side.run).length) return undefined;
  const reading = reader.elements.list.matches(":hover, :focus-within"); // what somebody reads stays
  if (reader.follow && !reading && newestStep(side) !== side.step) return setSide(side, { step: newestStep(side) });
  return drawReaderControls();
}

// Tells that a run was resumed, which can undo steps.
function historyOf(run) {
  return JSON.stringify(page.data.segments.filter((segment) => segment.run === run));
}

buildReader();
new IntersectionObserver((entries) => {
  reader.near ||= entries.some((entry) => entry.isIntersecting);
  if (reader.near && page.data && !reader.open) openReader();
}, { rootMargin: "1200px" }).observe(document.getElementById("completions"));
whenChanged((changed) => {
  document.getElementById("completions").hidden = !page.data.runs.length;
  if (changed.has("language") || changed.has("runs")) reader.elements.heading.textContent = text("summary.heading.completions");
  if (changed.has("language") ? reader.near : reader.near && !reader.open) openReader();
  else if (reader.open && ["runs", "readable", "segments"].some((key) => changed.has(key))) followNewest();
});
