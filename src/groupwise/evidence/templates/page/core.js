// What all parts of the page share: its data, its languages, and whom to tell when one of them changes.

const root = document.documentElement;
const words = JSON.parse(document.getElementById("words").textContent);

// What is shown. Parts read it and never keep copies; `data` is a Document of shapes.py.
const page = { data: null, language: "en", theme: "light" };
const listeners = [];

// Call `listener(changed)` after every change. `changed` is a set of keys of the document, or of "language", "theme"; of figures the
// set has "figures", and `page.changedFigures` their ids (null: all). Of a live page also "status", "readable" and "clock": only these
// fields of runs and settings changed.
const whenChanged = (listener) => listeners.push(listener);
function tell(...changed) {
  for (const listener of listeners) {
    try {
      listener(new Set(changed));
    } catch (error) {
      console.error(error); // one part that cannot be drawn leaves the others
    }
  }
}

// A phrase in the page's language: {en, zh}, or a string that is not translated.
const say = (phrase) => (typeof phrase === "string" ? phrase : (phrase?.[page.language] ?? ""));
// A text of <part>_text.toml by its dotted key, as "core.light", with its {fields} filled in.
function text(key, values = {}) {
  const phrase = key.split(".").reduce((table, part) => table?.[part], words);
  return say(phrase).replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}

// An element: attributes; `onclick` and other functions become listeners; children are nodes or text, never markup.
function make(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "circle", "rect"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key.replace(/^on/, ""), value);
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// Replace what an element has in it. What had the focus in it gets it again, by its `data-key`.
function refill(element, ...children) {
  const focused = element.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  element.replaceChildren(...children.filter((child) => child !== null && child !== undefined));
  if (focused !== undefined) element.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
}

// The same, but children that look as before stay, with where they are scrolled to and what is open in them.
function settle(element, children) {
  const focused = element.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  children.forEach((child, i) => {
    const old = element.childNodes[i];
    if (!old) element.append(child);
    else if (old !== child && !child.isEqualNode(old)) {
      const across = old.scrollLeft;
      old.replaceWith(child);
      child.scrollLeft = across;
    }
  });
  while (element.childNodes.length > children.length) element.lastChild.remove();
  if (focused !== undefined && !element.contains(document.activeElement)) element.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
}

// Draw a section of the page whenever one of these keys of the document changes. `build()` gives what stands under its heading;
// null or nothing hides the section. `heading` is a key of a text.
function section(id, heading, keys, build) {
  whenChanged((changed) => {
    if (!changed.has("language") && !keys.some((key) => changed.has(key))) return;
    const element = document.getElementById(id), contents = (build() ?? []).filter((child) => child !== null);
    element.hidden = contents.length === 0;
    settle(element, contents.length ? [make("h2", {}, text(heading)), ...contents] : []);
  });
}

// A table: heads are texts, rows are lists of cells, each a node, a text or a list of them; `classes` of the columns. The roles are
// said, so that a style sheet may lay a table out as blocks.
function tableOf(heads, rows, classes = []) {
  const names = heads.map((head) => head.textContent ?? head);
  const cells = (name, role) => (cell, i) => make(name, { role, class: classes[i] || false, ...(name === "th" ? { scope: "col" } : { "data-head": names[i] }) }, ...[cell].flat());
  const body = rows.map((row) => make("tr", { role: "row" }, ...row.map(cells("td", "cell"))));
  const head = make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...heads.map(cells("th", "columnheader"))));
  const table = make("table", { role: "table" }, head, make("tbody", { role: "rowgroup" }, ...body));
  return make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": names.join(text("core.list")) }, table);
}

// JSON that is embedded as base64 of gzip.
async function unpacked(id) {
  const letters = atob(document.getElementById(id).textContent), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i += 1) bytes[i] = letters.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

// What the reader of the page chose, kept where the browser allows it.
function remembered(key, value) {
  try {
    if (value === undefined) return localStorage.getItem(`groupwise.${key}`);
    localStorage.setItem(`groupwise.${key}`, value);
  } catch { /* a page from disk may have no storage */ }
  return value ?? null;
}
