// The live page's data: a stream of lines of JSON from the server the page came from, first all of it, then what changed.

const SILENCE = 25_000; // milliseconds without a line, which comes every 10 s, after which the connection is taken for dead
const AWAY = 10_000; // milliseconds after which a page that nobody sees lets go of the server: a browser opens six connections to one
const connection = { state: "connecting", instance: "", version: -1, interval: 0, heard: 0, at: null, control: null, wake: null, extra: {} };

// Fields of runs and settings that change with every step. Parts are told of them by name, and not that runs or settings changed.
const growing = new Set(["status", "readable", "clock"]);

// Follow the server for as long as the page is open: over its restarts, a sleep of the machine, and being hidden.
async function follow() {
  let pause = 500;
  document.addEventListener("visibilitychange", () => { if (!document.hidden) connection.wake?.(); });
  window.addEventListener("online", () => connection.wake?.());
  setInterval(watchConnection, 2000);
  setInterval(() => { if (!document.hidden) drawLive(); }, 1000);
  whenChanged(drawLive);
  drawLive();
  for (;;) {
    const heard = await stream().catch((error) => {
      console.error(error);
      return false;
    });
    pause = heard ? 500 : Math.min(2 * pause, 5000);
    connection.control = null;
    if (["live", "reading", "connecting"].includes(connection.state)) connection.state = "lost";
    drawLive();
    do await woken(pause); while (document.hidden);
  }
}

// Wait, or until somebody looks at the page again.
function woken(milliseconds) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    connection.wake = () => { clearTimeout(timer); resolve(); };
  });
}

// A connection that sends nothing any more, after a sleep, ends itself late or never; and a page that is not seen needs none.
let hiddenSince = null;
function watchConnection() {
  hiddenSince = document.hidden ? hiddenSince ?? Date.now() : null;
  const dead = Date.now() - connection.heard > SILENCE, away = hiddenSince && Date.now() - hiddenSince > AWAY;
  if (connection.control && (dead || away)) connection.control.abort();
}

// One connection, to its end. Returns whether anything came.
async function stream() {
  const control = new AbortController();
  Object.assign(connection, { control, heard: Date.now() });
  const since = connection.instance ? `?since=${connection.instance}-${connection.version}` : "";
  const response = await fetch(`follow${since}`, { signal: control.signal, cache: "no-store" }).catch(() => null);
  if (!response?.ok) {
    if (!response && connection.state === "ended") return false;
    connection.state = response?.status === 404 ? "refused" : "lost";
    return false;
  }
  if (!page.data) {
    connection.state = "reading";
    drawLive();
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let parts = [], heard = false;
  for (;;) {
    const { done, value } = await reader.read().catch(() => ({ done: true }));
    if (done) return heard;
    connection.heard = Date.now();
    const lines = value.split("\n");
    parts.push(lines[0]);
    const changed = new Set();
    page.changedFigures = new Set();
    for (const next of lines.slice(1)) {
      if (!taken(parts.join(""), changed)) {
        control.abort();
        return false;
      }
      parts = [next];
      heard = true;
    }
    if (changed.size) tell(...changed);
    if (changed.size || lines.length > 1) drawLive();
  }
}

// Take in a line; returns whether that went well. Otherwise all data is asked for, as what is here may be half of it.
function taken(line, changed) {
  try {
    take(JSON.parse(line), changed);
    return true;
  } catch (error) {
    console.error(error);
    Object.assign(connection, { instance: "", version: -1 });
    return false;
  }
}

// Take in one message, and note in `changed` which keys of the data it changed.
function take(message, changed) {
  if (message.ended) {
    connection.state = "ended";
    return;
  }
  Object.assign(connection, { state: "live", at: new Date() });
  if ("alive" in message) connection.interval = message.alive;
  if ("instance" in message) connection.instance = message.instance;
  if (message.document) {
    page.data = message.document;
    page.changedFigures = null;
    for (const key of Object.keys(page.data)) changed.add(key);
    root.dataset.drawn = "1";
  }
  if (message.patch) applyPatch(page.data, message.patch, changed);
  const extra = message.extra ?? message.patch?.extra;
  if (extra) connection.extra = extra;
  if ("version" in message) connection.version = message.version;
}

// `patch` is what `patches` in live/patches.py makes.
function applyPatch(data, patch, changed) {
  for (const [key, value] of Object.entries(patch.parts ?? {})) {
    data[key] = value;
    changed.add(key);
  }
  if (patch.events) {
    const { keep, drop, add } = patch.events;
    data.events = [...data.events.slice(0, keep), ...data.events.slice(keep + drop), ...add];
    changed.add("events");
  }
  for (const part of ["settings", "runs"]) {
    for (const [id, fields] of Object.entries(patch[part] ?? {})) {
      Object.assign(data[part].find((member) => member.id === id), fields);
      for (const field of Object.keys(fields)) changed.add(growing.has(field) ? field : part);
    }
  }
  const figures = patch.figures;
  if (!figures) return;
  changed.add("figures");
  const known = new Map(data.figures.map((figure) => [figure.id, figure]));
  for (const [id, figure] of Object.entries(figures.whole ?? {})) known.set(id, figure);
  for (const [id, lines] of Object.entries(figures.lines ?? {})) {
    const byId = new Map(known.get(id).lines.map((line) => [line.id, line]));
    for (const [lineId, points] of Object.entries(lines)) extendLine(byId.get(lineId), points);
  }
  data.figures = (figures.order ?? data.figures.map((figure) => figure.id)).map((id) => known.get(id));
  for (const id of [...Object.keys(figures.whole ?? {}), ...Object.keys(figures.lines ?? {})]) page.changedFigures?.add(id);
}

function extendLine(line, points) {
  const { keep, seeds, stretch, ...lists } = points;
  for (const [name, tail] of Object.entries(lists)) line[name] = line[name].slice(0, keep).concat(tail);
  Object.assign(line, { seeds, stretch });
}

// Completions of a step; see StepToRead. Throws an Error that says why there are none.
async function fetchStep(run, step, source, first) {
  const response = await fetch(`step?${new URLSearchParams({ run, step, source, first })}`, { cache: "no-store" });
  const found = await response.json().catch(() => null);
  if (!response.ok) throw new Error(found?.error ?? text("live.add.failed", { status: response.status }));
  return found;
}
