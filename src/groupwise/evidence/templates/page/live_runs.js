// The list of the runs that are followed: how far each is, and adding and removing them.

const liveRows = new Map();
let livePanel = null;
const LISTED = 8;

function drawLive() {
  livePanel ??= makeLivePanel();
  livePanel.title.textContent = text("live.runs");
  setText(livePanel.connection, connectionText());
  livePanel.connection.className = `connection ${connection.state}`;
  setText(livePanel.problem, connection.extra.problem ? text("live.connection.problem", { text: connection.extra.problem }) : "");
  livePanel.problem.hidden = !connection.extra.problem;
  livePanel.label.textContent = text("live.add.label");
  livePanel.button.textContent = text("live.add.button");
  drawLiveRows();
}

// Only where it differs: a screen reader reads out what is written anew.
function setText(element, value) {
  if (element.textContent !== value) element.textContent = value;
}

function makeLivePanel() {
  const panel = {
    title: make("h2"), connection: make("p", { class: "connection", role: "status" }), problem: make("p", { class: "connection lost", role: "alert" }),
    heads: ["run", "state", "steps", "left", "written"].map((key) => [key, make("th", { scope: "col" })]), body: make("tbody"),
    more: make("button", { type: "button", onclick: () => { panel.all = true; drawLive(); panel.body.querySelector("button").focus({ preventScroll: true }); } }),
    none: make("p", { class: "soft" }), label: make("label", { for: "add-path" }), said: make("p", { role: "status" }), button: make("button", { type: "submit" }),
    path: make("input", { id: "add-path", type: "text", spellcheck: "false", autocomplete: "off", maxlength: "4096" }),
  };
  const head = make("thead", {}, make("tr", {}, ...panel.heads.map(([, cell]) => cell), make("td")));
  panel.table = make("div", { class: "scroll" }, make("table", { class: "followed" }, head, panel.body));
  const form = make("form", { class: "add", onsubmit: addRun }, panel.label, make("div", {}, panel.path, panel.button));
  const section = document.getElementById("live");
  section.hidden = false;
  section.append(panel.title, panel.connection, panel.problem, panel.table, panel.more, panel.none, form, panel.said);
  return panel;
}

function connectionText() {
  const time = connection.at ? connection.at.toLocaleTimeString(page.language === "zh" ? "zh-CN" : "en-GB") : "–";
  if (connection.state === "live" && connection.extra.reading) return text("live.connection.taking", { count: connection.extra.reading });
  if (connection.state === "live") return text("live.connection.live", { time: lasting(connection.interval, 1) });
  return text(`live.connection.${connection.state}`, { time });
}

function drawLiveRows() {
  const runs = (page.data?.runs ?? []).map((run) => ({ key: run.id, name: run.name, path: run.path, ...run.status }));
  const waiting = (connection.extra.waiting ?? []).map(([key, path, about, state]) => ({ key, name: path, path, state, about, step: 0, steps: 0 }));
  const all = [...runs, ...waiting], shown = listed(all);
  livePanel.more.hidden = shown.length === all.length;
  setText(livePanel.more, text("live.all", { count: all.length }));
  for (const [key, cell] of livePanel.heads) setText(cell, text(`live.${key}`));
  livePanel.table.hidden = !shown.length;
  livePanel.none.hidden = Boolean(shown.length) || connection.at === null;
  setText(livePanel.none, text("live.none"));
  for (const [key, row] of liveRows) {
    if (shown.some((run) => run.key === key)) continue;
    row.row.remove();
    liveRows.delete(key);
  }
  shown.forEach((run, place) => {
    if (!liveRows.has(run.key)) liveRows.set(run.key, makeLiveRow(run.key));
    const row = liveRows.get(run.key);
    if (livePanel.body.children[place] !== row.row) livePanel.body.insertBefore(row.row, livePanel.body.children[place] ?? null);
    fillLiveRow(row, run);
  });
}

// Of many runs those that go on, before those that are over, until all are asked for.
function listed(runs) {
  if (livePanel.all || runs.length <= LISTED) return runs;
  const over = (run) => run.state === "finished" || run.state === "stopped";
  const chosen = new Set([...runs.filter((run) => !over(run)), ...runs.filter(over)].slice(0, LISTED));
  return runs.filter((run) => chosen.has(run));
}

function makeLiveRow(key) {
  const row = { name: make("td", { class: "wide" }), state: make("td", { class: "wide" }), step: make("span"), bar: make("progress"), left: make("td"), written: make("td") };
  row.button = make("button", { onclick: () => removeRun(key, row.name.textContent) });
  row.row = make("tr", {}, row.name, row.state, make("td", {}, row.step, row.bar), row.left, row.written, make("td", {}, row.button));
  return row;
}

function fillLiveRow(row, run) {
  setText(row.name, run.name);
  row.name.title = run.path;
  const unexported = run.state === "stopped" && run.steps && run.step >= run.steps;
  const about = run.about || text(`live.about.${unexported ? "unexported" : run.state}`);
  const state = text(`live.states.${run.state}`);
  setText(row.state, about ? text("live.state_about", { state, about }) : state);
  row.state.className = `wide state ${run.state}`;
  const number = (value) => value.toLocaleString(page.language === "zh" ? "zh-CN" : "en");
  setText(row.step, run.steps ? text("live.of_steps", { step: number(run.step), steps: number(run.steps) }) : number(run.step));
  row.bar.hidden = !run.steps;
  row.bar.max = run.steps || 1;
  row.bar.value = Math.min(run.step, run.steps);
  row.bar.setAttribute("aria-label", `${run.name}${text("core.colon")}${text("live.done")}`);
  const ago = run.since ? Math.max(0, (Date.now() - Date.parse(run.since)) / 1000) : null;
  if (row.toldLeft !== run.seconds_left) Object.assign(row, { toldLeft: run.seconds_left, toldAt: Date.now() });
  const counts = run.state === "training" && typeof run.seconds_left === "number"; // between two updates the page counts on
  setText(row.left, counts ? lasting(Math.max(0, run.seconds_left - (Date.now() - row.toldAt) / 1000)) : "–");
  setText(row.written, ago === null ? "" : ago < 3 ? text("live.now") : text("live.ago", { time: lasting(ago) }));
  setText(row.button, text("live.remove"));
  row.button.setAttribute("aria-label", text("live.remove_run", { run: run.name }));
}

// A duration for a person to read.
function lasting(seconds, digits = 0) {
  if (seconds < 99.5) return text("live.time.seconds", { seconds: seconds < 10 && digits ? seconds.toFixed(digits) : Math.round(seconds) });
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return text("live.time.minutes", { minutes });
  if (minutes < 2880) return text("live.time.hours", { hours: Math.floor(minutes / 60), minutes: minutes % 60 });
  return text("live.time.days", { days: Math.floor(minutes / 1440), hours: Math.floor((minutes % 1440) / 60) });
}

async function addRun(event) {
  event.preventDefault();
  const path = livePanel.path.value.trim();
  if (!path) return;
  tellAsked("", text("live.add.looking"));
  const { problem, found } = await asked("runs/add", path);
  if (!problem) livePanel.path.value = "";
  tellAsked(problem, text("live.add.added", { path, count: found }));
}

async function removeRun(key, name) {
  const { problem } = await asked("runs/remove", key);
  tellAsked(problem, text("live.removed", { run: name }));
  livePanel.path.focus({ preventScroll: true }); // the button that had the focus goes
}

function tellAsked(problem, done) {
  livePanel.said.className = problem ? "connection lost" : "soft";
  setText(livePanel.said, problem || done);
}

// Ask the server for something: what it found, or in `problem` what is wrong.
async function asked(path, body) {
  const response = await fetch(path, { method: "POST", body }).catch(() => null);
  if (!response) return { problem: text("live.add.unanswered") };
  const answer = await response.json().catch(() => null); // a failure that nobody foresaw is no JSON
  return response.ok ? answer ?? {} : { problem: answer?.error ?? text("live.add.failed", { status: response.status }) };
}
