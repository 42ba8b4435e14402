// A completion's text: tokens coloured by what the update knew of them, turns, search hits, and one token's values on demand.

const SHADES = 6; // of a colour
const SHOWN_LINES = 12; // of a completion before "show all of it"
const BLOCK_TOKENS = 400, BLOCK_CHARACTERS = 8000; // drawn as one box, which the browser skips while it is out of view
const QUANTITIES = ["advantage", "ratio", "probability", "entropy", "clipped"];
const blocks = new WeakMap(); // box of tokens -> what is in it
const tokenColours = { quantity: "advantage", limit: 1 };

const clamped = (x) => Math.max(-1, Math.min(1, x));
// Colour strength of a token, from -1 (full --low colour) to 1 (full --high colour); 0: none.
const strengths = {
  none: () => 0,
  advantage: (completion, i) => clamped(completion.advantage[i] / tokenColours.limit),
  ratio: (completion, i) => clamped(Math.log(completion.ratio[i]) / Math.log(1.5)),
  probability: (completion, i) => 1 - completion.probability[i],
  entropy: (completion, i) => clamped(completion.entropy[i] / 2),
  clipped: (completion, i) => completion.clipped[i],
};

function shadeOf(completion, i) {
  const { quantity } = tokenColours;
  if (quantity === "none" || (completion[quantity][i] ?? null) === null) return 0;
  return Math.round(SHADES * strengths[quantity](completion, i)) || 0;
}
const shadeClass = (shade) => (shade ? (shade > 0 ? `high${shade}` : `low${-shade}`) : "");

// A number for a person to read: three digits, a true minus sign.
function brief(value) {
  const size = Math.abs(value);
  const shown = size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(1) : String(Number(value.toPrecision(3)));
  return shown.replaceAll("-", "−");
}
const grouped = (count) => count.toLocaleString(page.language === "zh" ? "zh-CN" : "en");

// The key of the colour scale in use.
function colourKey() {
  const { quantity, limit } = tokenColours;
  const ends = {
    advantage: [`≤ ${brief(-limit)}`, "0", `≥ ${brief(limit)}`], ratio: ["≤ 0.67", "1", "≥ 1.5"], probability: [null, "1", "0"],
    entropy: [null, "0", "≥ 2"], clipped: [text("reader.lower"), null, text("reader.upper")],
  }[quantity];
  if (!ends) return null;
  const from = ends[0] === null ? 0 : -SHADES, swatches = [];
  for (let shade = from; shade <= SHADES; shade += quantity === "clipped" ? 2 * SHADES : 1) {
    swatches.push(make("span", { class: shadeClass(shade) }));
  }
  const strip = make("span", { class: "strip", "aria-hidden": "true" }, ...swatches);
  const labels = make("span", { class: "ends" }, ...ends.filter((end) => end !== null).map((end) => make("span", {}, end)));
  const outlined = make("span", { class: "clipped" }, text("reader.underlined"));
  return make("div", { class: "colour-key" }, make("span", { class: "scale" }, strip, labels), quantity === "clipped" ? null : outlined);
}

// About how many letters a line of a completion has: `columns` stand beside each other where there is room.
function lineWidth(list, columns) {
  const beside = columns > 1 && list.clientWidth > 850 ? columns : 1;
  return Math.max(30, Math.floor((list.clientWidth / beside - 40) / 9));
}

// How many characters of a completion fill so many lines; Infinity: it has fewer.
function charactersOf(completion, lines, width) {
  let column = 0, count = 0;
  for (const part of completion.text) {
    for (const letter of part) {
      count += letter.length;
      column += letter > "\u2e80" ? 2 : 1;
      if (letter !== "\n" && column < width) continue;
      column = 0;
      lines -= 1;
      if (lines <= 0) return count;
    }
  }
  return Infinity;
}

// The text of a completion, its beginning or all of it, in boxes that get their tokens when they come into view; and whether it is cut.
function completionText(completion, whole, { query, width }) {
  const numbered = completion.advantage.length > 0, hits = query ? hitsOf(completion, query) : [];
  const body = make("div", { class: "tokens", ...(numbered ? { tabindex: 0, role: "group", "aria-label": text("reader.token_list") } : {}) });
  const [boxes, cut] = boxesOf(completion, whole || charactersOf(completion, 1.3 * SHOWN_LINES, width) === Infinity ? Infinity : charactersOf(completion, SHOWN_LINES, width));
  let turn = null, parent = body;
  for (const box of boxes) {
    if (box.turn !== turn) {
      turn = box.turn;
      parent = turn.role ? make("div", { class: turn.role === "assistant" ? "turn" : "turn answered" }, turnName(turn)) : body;
      if (parent !== body) body.append(parent);
    }
    if (completion.left_out && box.from === completion.start) parent.append(make("p", { class: "soft" }, text("reader.gap", { count: grouped(completion.left_out) })));
    if (numbered) parent.append(tokenBlock(completion, box, hits));
    else for (const [start, piece] of pieces(completion.text[box.from].slice(0, box.characters))) parent.append(textBlock(piece, box.offset + start, hits));
  }
  if (numbered) followTokens(body);
  body.classList.toggle("long", boxes.length > 3 || completion.text.some((part) => part.length > 3 * BLOCK_CHARACTERS));
  return [body, cut];
}

// Which tokens of the first so many characters come into one box, turn by turn: {turn, from, to, offset in the text, characters}; and
// whether some are left for "show all of it".
function boxesOf(completion, characters) {
  const numbered = completion.advantage.length > 0, boxes = [];
  let offset = 0;
  for (const turn of completion.turns.length ? completion.turns : [{ role: "", start: 0, end: completion.text.length }]) {
    for (let from = turn.start, to = from; from < turn.end; from = to) {
      if (characters <= 0) return [boxes, true];
      let size = 0;
      do size += completion.text[to++].length; while (to < turn.end && !endsBox(completion, from, to, size, characters, numbered));
      boxes.push({ turn, from, to, offset, characters: numbered ? size : Math.min(size, characters) });
      if (!numbered && size > characters) return [boxes, true];
      [characters, offset] = [characters - size, offset + size];
    }
  }
  return [boxes, false];
}

function endsBox(completion, from, to, size, characters, numbered) {
  const count = to - from, line = completion.text[to - 1].endsWith("\n");
  if (!numbered || size >= Math.min(characters, BLOCK_CHARACTERS) || (completion.left_out && to === completion.start)) return true;
  return (count >= BLOCK_TOKENS && line) || count >= 2 * BLOCK_TOKENS;
}

function turnName(turn) {
  const name = ["assistant", "tool", "user"].includes(turn.role) ? text(`reader.roles.${turn.role}`) : turn.role;
  const more = turn.label.startsWith(turn.role) ? turn.label.slice(turn.role.length) : "";
  const told = more // as rollout_text.py writes it
    .replace(/, reward ([^\s,]+)/, (_, reward) => text("core.comma") + text("reader.reward", { reward: reward.replaceAll("-", "−") }))
    .replace(/, (\d+) failed$/, (_, count) => text("core.comma") + text("reader.calls_failed", { count }));
  return make("span", { class: "who" }, name + told);
}

// A long text in pieces, if possible whole lines: [place, piece].
function* pieces(string) {
  for (let start = 0; start < string.length || start === 0;) {
    let end = string.length - start > 1.5 * BLOCK_CHARACTERS ? start + BLOCK_CHARACTERS : string.length;
    if (end < string.length) {
      const line = string.lastIndexOf("\n", end);
      if (line > start) end = line + 1;
    }
    yield [start, string.slice(start, end)];
    if (end === start) return;
    start = end;
  }
}

// Places [start, end) in a completion's text where a search found something.
function hitsOf(completion, query) {
  const found = [], searched = factsOf(completion).text;
  for (let at = searched.indexOf(query); at >= 0 && found.length < 500; at = searched.indexOf(query, at + query.length)) found.push([at, at + query.length]);
  return found;
}

function textBlock(string, offset, hits) {
  const box = make("div", { class: "block" });
  let done = 0;
  for (const [start, end] of hits) {
    const [from, to] = [Math.max(done, start - offset), Math.min(string.length, end - offset)];
    if (to <= from) continue;
    box.append(string.slice(done, from), make("mark", {}, string.slice(from, to)));
    done = to;
  }
  box.append(string.slice(done));
  return box;
}

const inView = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) drawTokens(entry.target);
}, { rootMargin: "600px" });

// Tokens [from, to) of a completion: as plain text, until it comes near the view.
function tokenBlock(completion, { from, to, offset }, hits) {
  const box = make("div", { class: "block" }, completion.text.slice(from, to).join(""));
  blocks.set(box, { completion, from, to, offset, hits, drawn: false });
  inView.observe(box);
  return box;
}

function drawTokens(box) {
  const block = blocks.get(box);
  if (block.drawn) return;
  block.drawn = true;
  inView.unobserve(box);
  const spans = document.createDocumentFragment();
  let place = block.offset, hit = 0;
  for (let i = block.from; i < block.to; i += 1) {
    const span = document.createElement("span"), end = place + block.completion.text[i].length;
    span.textContent = block.completion.text[i];
    while (hit < block.hits.length && block.hits[hit][1] <= place) hit += 1;
    span.className = tokenClass(block.completion, i, hit < block.hits.length && block.hits[hit][0] < end);
    spans.append(span);
    place = end;
  }
  box.replaceChildren(spans);
}

function tokenClass(completion, i, found) {
  const line = completion.text[i].includes("\n") ? "line" : "";
  return [shadeClass(shadeOf(completion, i)), line, completion.clipped[i] ? "clipped" : "", found ? "found" : ""].filter(Boolean).join(" ");
}

// Colour the tokens that are drawn by another quantity.
function recolour(container) {
  for (const box of container.querySelectorAll(".block")) {
    const block = blocks.get(box);
    if (!block?.drawn) continue;
    let i = block.from;
    for (const span of box.children) {
      span.className = tokenClass(block.completion, i, span.classList.contains("found"));
      i += 1;
    }
  }
}

// --- one token's values

const tip = make("div", { id: "token-tip", role: "tooltip", hidden: true });
const spoken = make("div", { class: "unseen", "aria-live": "polite" });
const current = { span: null };

function placed(span) {
  const box = span.parentElement, block = blocks.get(box);
  return block ? { block, i: block.from + Array.prototype.indexOf.call(box.children, span) } : null;
}

function showTip(span, aloud) {
  const found = placed(span);
  if (!found) return;
  const { completion } = found.block, { i } = found;
  current.span?.classList.remove("current");
  current.span = span;
  span.classList.add("current");
  const place = text("reader.place", { place: grouped(1 + i + (completion.left_out && i >= completion.start ? completion.left_out : 0)) });
  const rows = QUANTITIES.map((name) => [text(`reader.quantities.${name}`), tokenValue(completion, name, i)]);
  refill(tip, make("p", {}, make("code", {}, shownToken(completion.text[i])), " ", make("span", { class: "soft" }, place)),
    make("dl", {}, ...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])));
  placeTokenTip();
  if (aloud) spoken.textContent = [completion.text[i], place, ...rows.map((row) => row.join(" "))].join(text("core.semicolon"));
}

// Text of a token in one line: what would break it is named.
function shownToken(token) {
  const names = { "\n": "\\n", "\t": "\\t", "\r": "\\r" };
  return token.slice(0, 80).replace(/[\n\t\r]/g, (letter) => names[letter]);
}

function tokenValue(completion, name, i) {
  const value = completion[name][i] ?? null;
  if (value === null) return text("reader.not_computed");
  if (name === "clipped") return value ? text(value > 0 ? "reader.upper" : "reader.lower") : text("reader.not_clipped");
  return brief(value);
}

// Beside the current token, or hidden while that is out of view.
function placeTokenTip() {
  const at = current.span.getClientRects()[0] ?? current.span.getBoundingClientRect();
  tip.hidden = at.bottom < 0 || at.top > window.innerHeight;
  const size = tip.getBoundingClientRect(), above = at.top - size.height - 6, below = at.bottom + 6;
  tip.style.left = `${Math.max(4, Math.min(at.left, root.clientWidth - size.width - 4))}px`;
  tip.style.top = `${below + size.height > window.innerHeight && above > 0 ? above : below}px`;
}
document.addEventListener("scroll", () => { if (current.span) placeTokenTip(); }, { capture: true, passive: true });

function hideTip() {
  current.span?.classList.remove("current");
  current.span = null;
  tip.hidden = true;
}

// Show the values of the token that is pointed at, or that the arrow keys moved to.
function followTokens(body) {
  body.addEventListener("pointerover", (event) => { if (event.target.localName === "span" && blocks.has(event.target.parentElement)) showTip(event.target); });
  body.addEventListener("pointerleave", () => { if (document.activeElement !== body) hideTip(); });
  body.addEventListener("focus", () => { if (body.matches(":focus-visible") && !body.contains(current.span)) goToToken(body, 0); });
  body.addEventListener("blur", hideTip);
  body.addEventListener("keydown", (event) => {
    const far = event.ctrlKey ? 10 : 1;
    const move = { ArrowRight: far, ArrowLeft: -far, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") hideTip();
    if (move === undefined) return;
    event.preventDefault();
    goToToken(body, move);
  });
}

// Move by so many tokens of those that are shown.
function goToToken(body, move) {
  const boxes = [...body.querySelectorAll(".block")], sizes = boxes.map((box) => blocks.get(box).to - blocks.get(box).from);
  const total = sizes.reduce((sum, size) => sum + size, 0);
  let place = 0;
  if (current.span && body.contains(current.span)) {
    const box = current.span.parentElement, at = boxes.indexOf(box);
    place = sizes.slice(0, at).reduce((sum, size) => sum + size, 0) + Array.prototype.indexOf.call(box.children, current.span);
  }
  place = Math.max(0, Math.min(total - 1, place + move));
  let at = 0;
  while (place >= sizes[at]) place -= sizes[at++];
  drawTokens(boxes[at]);
  const span = boxes[at].children[place];
  span.scrollIntoView({ block: "nearest" });
  showTip(span, true);
}
