// The header, the tiles, the findings, and the tables.

const settingOf = (id) => page.data.settings.find((setting) => setting.id === id);
const runOf = (id) => page.data.runs.find((run) => run.id === id);
const severalSettings = () => page.data.settings.length > 1;
const severalRuns = () => page.data.runs.length > 1;

// A setting's name with the colour that its lines have in the figures.
function settingLabel(id) {
  const colour = make("span", { class: "colour", "aria-hidden": "true" });
  colour.style.background = settingColour(id);
  return make("span", { class: "setting" }, severalSettings() ? colour : null, make("bdi", {}, settingOf(id)?.name ?? ""));
}
const runLabel = (id) => make("bdi", {}, runOf(id)?.name ?? "");

// The header: drawn once, its texts set again in the other language.
const heading = make("h1"), subtitle = make("p", { class: "soft" });
const languageButton = make("button", { type: "button", id: "language", onclick: () => setLanguage(remembered("language", page.language === "zh" ? "en" : "zh")) });
const themeButton = make("button", { type: "button", id: "theme", onclick: () => setTheme(remembered("theme", page.theme === "dark" ? "light" : "dark")) });
document.getElementById("header").append(make("div", {}, heading, subtitle), make("span", { class: "controls" }, languageButton, themeButton));
whenChanged((changed) => {
  if (changed.has("title")) {
    heading.textContent = page.data.title;
    document.title = `groupwise: ${page.data.title}`;
  }
  if (changed.has("runs") || changed.has("language")) {
    const [settings, runs] = [page.data.settings.length, page.data.runs.length];
    subtitle.textContent = runs === 0 ? "" : runs === 1 ? page.data.runs[0].path : text(settings === 1 ? "summary.one_setting" : "summary.count", { settings, runs });
  }
  if (changed.has("language") || changed.has("title")) {
    languageButton.textContent = page.language === "zh" ? "English" : "中文";
    languageButton.lang = page.language === "zh" ? "en" : "zh-Hans";
  }
  themeButton.textContent = text(page.theme === "dark" ? "core.light" : "core.dark");
});

// The table of contents: a link for every section that has a heading or a label. Parts may draw theirs late, so it watches them.
const contents = document.getElementById("contents"), sections = [...document.querySelectorAll("main > section")];
function drawContents() {
  const named = sections.map((part) => [part, part.querySelector("h2")?.textContent ?? part.getAttribute("aria-label")]);
  const shown = named.filter(([part, name]) => name && !part.hidden && part.childElementCount);
  contents.hidden = shown.length === 0;
  contents.setAttribute("aria-label", text("summary.heading.contents"));
  const before = [...contents.children].map((link) => link.textContent).join("\n");
  if (before !== shown.map(([, name]) => name).join("\n")) refill(contents, ...shown.map(([part, name]) => make("a", { href: `#${part.id}`, "data-key": part.id }, name)));
}
const contentsWatch = new MutationObserver(drawContents);
for (const part of sections) contentsWatch.observe(part, { childList: true, attributes: true, attributeFilter: ["hidden", "aria-label"] });

whenChanged((changed) => {
  if (!changed.has("tiles") && !changed.has("language")) return;
  const place = document.getElementById("tiles");
  place.hidden = page.data.tiles.length === 0;
  place.setAttribute("aria-label", text("summary.heading.tiles"));
  const drawn = page.data.tiles.map((tile) => make("div", { class: `tile ${tile.kind}`, id: `tile-${tile.id}` },
    make("dt", {}, say(tile.label)), make("dd", { class: "value" }, say(tile.value)), make("dd", { class: "soft" }, say(tile.detail))));
  settle(place, [make("dl", { class: "tiles" }, ...drawn)]);
});

// The place of a page that shows what a finding is about.
function findingLink(finding) {
  const events = finding.figure === "events";
  if (!events && !page.data.figures.some((figure) => figure.id === finding.figure)) return null;
  const target = events ? "events" : `figure-${finding.figure}`;
  const attributes = { href: `#${target}`, "data-key": `${finding.setting} ${finding.title.en}` };
  return make("a", attributes, text(events ? "summary.finding.events" : "summary.finding.figure"));
}

// A finding; where there are several settings, what is healthy is one line that can be opened.
function findingBox(finding) {
  const kind = make("span", { class: "kind" }, text(`summary.kinds.${finding.kind}`));
  const told = make("p", {}, say(finding.text), text("core.sentence"), findingLink(finding));
  if (!severalSettings() || finding.kind !== "healthy") return make("div", { class: `finding ${finding.kind}` }, make("h4", {}, kind, " ", say(finding.title)), told);
  const key = `${finding.setting} ${finding.title.en}`;
  const toggled = ({ target }) => (target.open ? openFindings.add(key) : openFindings.delete(key));
  return make("details", { class: `finding ${finding.kind}`, open: openFindings.has(key), ontoggle: toggled }, make("summary", { "data-key": `summary ${key}` }, kind, " ", say(finding.title)), told);
}
const openFindings = new Set();

function leftOutBox() {
  const lines = page.data.left_out;
  if (!lines.length) return null;
  const [shown, more] = [lines.slice(0, 10), lines.slice(10)].map((part) => part.map((line) => make("li", {}, line)));
  const rest = more.length ? make("details", {}, make("summary", {}, text("summary.and_more", { count: more.length })), make("ul", {}, ...more)) : null;
  return make("div", { class: "finding watch", id: "left-out" }, make("h4", {}, text("summary.heading.left_out")), make("ul", {}, ...shown), rest);
}

// The findings by setting, those with the worst ones first.
section("findings", "summary.heading.findings", ["findings", "left_out", "settings"], () => {
  const foundOf = (setting) => page.data.findings.filter((finding) => finding.setting === setting.id);
  const worst = (setting) => Math.min(3, ...foundOf(setting).map((finding) => ["unhealthy", "watch", "healthy"].indexOf(finding.kind)));
  const drawn = [...page.data.settings].sort((a, b) => worst(a) - worst(b)).map((setting) => {
    const found = foundOf(setting);
    const boxes = found.length ? found.map(findingBox) : [make("p", { class: "soft" }, text("summary.finding.none"))];
    return make("div", {}, severalSettings() ? make("h3", {}, settingLabel(setting.id)) : null, ...boxes);
  });
  return [make("div", { class: severalSettings() ? "by-setting" : false }, ...drawn), leftOutBox()];
});

const summaryColumns = ["setting", "runs", "before", "after", "seeds", "steps", "completions", "seconds", "tokens_per_second"];
section("summary", "summary.heading.summary", ["summary", "differences", "settings", "measure"], () => {
  const columns = summaryColumns.filter((name) => name !== "runs" || severalRuns());
  const heads = columns.map((name) => text(`summary.column.${name}`, { measure: say(page.data.measure) }));
  const shown = { setting: (row) => settingLabel(row.setting), runs: (row) => make("bdi", {}, row.runs.join(text("core.list"))), steps: (row) => row.steps.toLocaleString("en"), seeds: (row) => row.seeds.toLocaleString("en") };
  const rows = page.data.summary.map((row) => columns.map((name) => shown[name]?.(row) ?? say(row[name])));
  const intervals = page.data.summary.some((row) => row.after.includes("±") || row.before.includes("±"));
  return [
    tableOf(heads, rows, columns.map((name) => ({ setting: "", runs: "runs" })[name] ?? "number")),
    intervals ? make("p", { class: "soft" }, text("summary.summary.interval")) : null,
    ...differenceTable(),
  ];
});

// The settings that differ: one column each where that is the narrower table, else one row each.
function differenceTable() {
  const { keys, rows } = page.data.differences;
  if (!keys.length) return [];
  const title = make("h3", {}, text(severalSettings() ? "summary.heading.differences" : "summary.heading.changed"));
  const names = rows.map((row) => settingLabel(row.setting)), code = (key) => make("code", {}, key);
  if (keys.length <= 4 || keys.length < rows.length) return [title, tableOf([text("summary.column.setting"), ...keys.map(code)], rows.map((row, i) => [names[i], ...row.values]), ["", ...keys.map(() => "wide")])];
  return [title, tableOf([text("summary.column.key"), ...names], keys.map((key, i) => [code(key), ...rows.map((row) => row.values[i])]), ["", ...rows.map(() => "wide")])];
}

// Events: what is chosen stays chosen when more come.
const EVENTS_SHOWN = 30;
const eventsChosen = { kind: "all", all: false };
section("events", "summary.heading.events", ["events", "runs"], () => {
  const events = page.data.events;
  if (!events.length) return null;
  const kinds = ["all", ...new Set(events.map((event) => event.kind))];
  const option = (kind) => make("option", { value: kind, selected: kind === eventsChosen.kind }, words.summary.events[kind] ? text(`summary.events.${kind}`) : kind);
  const redraw = () => tell("events");
  const choose = make("select", { "data-key": "events-kind", onchange: (event) => { eventsChosen.kind = event.target.value; redraw(); } }, ...kinds.map(option));
  const chosen = events.filter((event) => eventsChosen.kind === "all" || event.kind === eventsChosen.kind);
  const shown = eventsChosen.all ? chosen : chosen.slice(-EVENTS_SHOWN);
  const colours = { warning: "watch", fault: "unhealthy" };
  const rows = shown.map((event) => [
    ...(severalRuns() ? [runLabel(event.run)] : []), event.step.toLocaleString("en"),
    make("span", { class: `kind ${colours[event.kind] ?? ""}` }, words.summary.events[event.kind] ? text(`summary.events.${event.kind}`) : event.kind), event.text, event.advice,
  ]);
  const names = [...(severalRuns() ? ["run"] : []), "step", "kind", "seen", "advice"];
  const classes = { step: "number", seen: "wide", advice: "wide" };
  const rest = chosen.length - shown.length;
  return [
    kinds.length > 2 ? make("div", { class: "controls" }, make("label", {}, text("summary.events.shown"), " ", choose)) : null,
    tableOf(names.map((name) => text(`summary.column.${name}`)), rows, names.map((name) => classes[name] ?? "")),
    rest > 0 ? make("button", { type: "button", onclick: () => { eventsChosen.all = true; redraw(); } }, text("summary.more", { count: chosen.length })) : null,
  ];
});

section("segments", "summary.heading.segments", ["segments", "runs"], () => {
  if (!page.data.segments.length) return null;
  const names = [...(severalRuns() ? ["run"] : []), "first", "started", "version", "changed"];
  const rows = page.data.segments.map((row) => [
    ...(severalRuns() ? [runLabel(row.run)] : []), row.first.toLocaleString("en"), row.started, row.version,
    row.changed.length ? row.changed.map((line) => make("div", {}, line)) : "–",
  ]);
  return [
    make("p", { class: "soft" }, text("summary.segments.text")),
    tableOf(names.map((name) => text(`summary.column.${name}`)), rows, names.map((name) => ({ first: "number", changed: "wide" })[name] ?? "")),
  ];
});

// Recipes stay open when the rest of the page changes, so each is made once.
const recipeBoxes = new Map();
section("recipes", "summary.heading.recipes", ["runs"], () => page.data.runs.map((run) => {
  const name = make("span", {}, runLabel(run.id), make("bdi", { class: "soft" }, run.path));
  if (recipeBoxes.get(run.id)?.recipe !== run.recipe) {
    const box = make("details", { ontoggle: () => { if (box.open && !box.querySelector("pre")) box.append(make("pre", { tabindex: 0 }, run.recipe)); } }, make("summary", {}));
    recipeBoxes.set(run.id, { recipe: run.recipe, box });
  }
  const { box } = recipeBoxes.get(run.id);
  settle(box.querySelector("summary"), [name]);
  return box;
}));
