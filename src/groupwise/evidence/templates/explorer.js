// The page: a section for each figure with its controls, two languages, two themes, and a run's settings and tokens where one is given.

const read = (id) => JSON.parse(document.getElementById(id).textContent);
const words = read("words"), run = read("run"), root = document.documentElement;
const state = { run, step: run ? Math.floor(run.steps.length / 2) : 0, settings: run?.settings ?? {}, rewardsOf: null };
let language = (navigator.language || "en").startsWith("zh") ? "zh" : "en";
let dark = window.matchMedia("(prefers-color-scheme: dark)").matches;

function say(figure, key, values = {}) {
  return words[figure][key][language].replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole).trim();
}
const runRewards = () => tokensOf(state).rewards[0];

class Panel {
  constructor(figure) {
    this.figure = figure;
    this.text = (key, values) => say(figure.id, key, values);
    this.title = make("h2");
    this.prose = make("p", { class: "prose" });
    this.plots = make("div", { class: `plots ${figure.layout ?? ""}` });
    this.legend = make("div", { class: "legend" });
    this.inputs = make("div", { class: "inputs" });
    this.readouts = make("dl", { class: "readouts" });
    this.notes = make("div", { class: "notes soft", "aria-live": "polite" });
    this.table = make("div");
    this.reset = make("button", { type: "button", class: "reset" });
    this.reset.addEventListener("click", () => { this.begin(); this.draw(); });
    const shown = make("div", { class: "shown" }, this.plots, this.legend);
    const side = make("div", { class: "side" }, this.inputs, this.notes, this.reset);
    const found = make("div", { class: "found" }, this.readouts, this.table);
    this.box = make("section", { class: "panel", id: figure.id, "aria-labelledby": `${figure.id}-title` }, this.title, this.prose, make("div", { class: "columns" }, shown, side, found));
    this.title.id = `${figure.id}-title`;
    this.views = [];
    this.begin();
  }

  // The controls at the run's settings, or the defaults.
  begin() {
    const settings = this.figure.id === "advantages" && runRewards() ? { ...state.settings, rewards: runRewards() } : state.settings;
    if (this.figure.id === "advantages") state.rewardsOf = runRewards();
    this.controls = this.figure.controls(settings);
    this.values = Object.fromEntries(this.controls.map((control) => [control.id, control.value]));
    this.made = this.controls.map((control) => makeControl(control, this));
    this.inputs.replaceChildren(...this.made.map((control) => control.box));
  }

  change(id, value) {
    this.values[id] = value;
    this.draw();
  }

  current() {
    const open = Object.fromEntries(this.controls.filter((control) => isOpen(control, this.values)).map((control) => [control.id, Infinity]));
    return { ...this.values, ...open };
  }

  draw() {
    const drawn = this.figure.draw(this.current(), state);
    this.title.textContent = this.text("title");
    this.prose.replaceChildren(...typeset(this.text("text")));
    for (const control of this.made) control.show();
    this.reset.textContent = say("page", "reset");
    this.reset.setAttribute("aria-label", say("page", "reset_of", { figure: this.text("title") }));
    if (!this.views.length) this.views = drawn.plots.map((plot) => this.addView(plot));
    drawn.plots.forEach((plot, i) => this.views[i].show(plot));
    this.showLegend(drawn.plots[0]);
    this.readouts.replaceChildren(...drawn.readouts.map(([key, value]) => {
      const text = value.key ? this.text(value.key) : value.page ? say("page", value.page) : value;
      return make("div", {}, make("dt", {}, ...typeset(this.text(key))), make("dd", {}, ...typeset(text)));
    }));
    this.showNotes(drawn.notes ?? []);
    if (drawn.table) this.showTable(drawn.table);
  }

  addView(plot) {
    const svg = make("svg", { role: "img", class: this.figure.dragX ? "draggable" : "", id: `${this.figure.id}-${plot.id ?? "plot"}` });
    const y = make("div", { class: "label" }), x = make("div", { class: "label across" });
    const box = make("div", { class: "plot" }, y, svg, x);
    this.plots.append(box);
    let xOf = () => 0;
    if (this.figure.dragX) {
      const move = (event) => {
        const input = document.getElementById(`${this.figure.id}-${this.figure.dragX}`);
        input.value = xOf(event.clientX - svg.getBoundingClientRect().left);
        input.dispatchEvent(new Event("input"));
      };
      svg.addEventListener("pointerdown", (event) => { svg.setPointerCapture(event.pointerId); move(event); });
      svg.addEventListener("pointermove", (event) => { if (svg.hasPointerCapture(event.pointerId)) move(event); });
    }
    return {
      show: (shown) => {
        const [across, up] = shown.labels.map((key) => this.text(key));
        x.replaceChildren(...typeset(across));
        y.replaceChildren(...typeset(up));
        svg.setAttribute("aria-label", `${this.text("title")}: ${plain(up)} / ${plain(across)}`);
        xOf = drawPlot(svg, shown, Math.max(240, Math.floor(box.clientWidth) || 640));
      },
    };
  }

  showLegend(plot) {
    const name = (key) => (Array.isArray(key) ? this.text(...key) : this.text(key));
    const items = plot.curves.filter((curve) => curve.name).map((curve) => [curve.style, name(curve.name)]);
    if (plot.verticals?.length) items.push(["c3 dotted", this.text(plot.verticalsName)]);
    if (plot.dots?.length) items.push(["dot", plot.dotsName ? this.text(plot.dotsName) : say("page", "tokens_of_run")]);
    this.legend.replaceChildren(...items.map(([style, text]) => make("span", { class: "key" }, swatch(style), make("span", {}, ...typeset(text)))));
  }

  showNotes(notes) {
    const own = this.controls.filter((control) => control.own).map((control) => say("page", "own", { part: control.own }));
    const named = (values) => Object.fromEntries(Object.entries(values).map(([key, value]) => [key, Array.isArray(value) ? this.text(...value) : value]));
    const texts = [...notes.filter(Boolean).map(([key, values = {}]) => this.text(key, named(values))), ...own];
    if (texts.join() !== [...this.notes.children].map((note) => note.textContent).join()) this.notes.replaceChildren(...texts.map((text) => make("p", {}, text)));
  }

  // A table that is wider than the page scrolls, by keys too. A row's name has its formula below it.
  showTable({ head, rows }) {
    const cell = (content) => typeset(Array.isArray(content) ? this.text(...content) : content);
    const named = (content) => [...cell(content), ...(words[this.figure.id][`formula_${content[0]}`] ? [make("div", { class: "soft" }, ...cell([`formula_${content[0]}`]))] : [])];
    const top = make("tr", {}, ...head.map((content) => make("th", { scope: "col" }, ...cell(content))));
    const body = rows.map(([first, ...cells]) => make("tr", {}, make("th", { scope: "row" }, ...named(first)), ...cells.map((content) => make("td", {}, ...cell(content)))));
    const table = make("table", {}, make("thead", {}, top), make("tbody", {}, ...body));
    this.table.replaceChildren(make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": this.text("table") }, table));
  }
}

const isOpen = (control, values) => Boolean(control.open) && values[control.id] >= control.max - 1e-9;

// An element for a control, and what brings it up to date: {box, show}.
function makeControl(control, panel) {
  const id = `${panel.figure.id}-${control.id}`, name = make("span");
  const makers = { slider: makeSlider, choice: makeChoice, numbers: makeNumbers, checks: makeChecks };
  const { box, show } = makers[control.kind](control, panel, id, name);
  return {
    box,
    show: () => {
      name.replaceChildren(...typeset(panel.text(control.id)));
      box.hidden = Boolean(control.when) && !control.when(panel.values);
      show();
    },
  };
}

function makeSlider(control, panel, id, name) {
  const value = make("output", { for: id });
  const { min, max, step } = control;
  const input = make("input", { type: "range", min, max, step, value: control.value, id });
  input.addEventListener("input", () => panel.change(control.id, Number(input.value)));
  const show = () => {
    value.textContent = isOpen(control, panel.values) ? say("surrogate", "none") : format(panel.values[control.id], 7);
    input.setAttribute("aria-valuetext", value.textContent);
  };
  return { box: make("label", {}, name, value, input), show };
}

function makeChoice(control, panel, id, name) {
  const options = control.options.map((option) => make("option", { value: option }));
  const select = make("select", { id }, ...options);
  select.value = control.value;
  select.addEventListener("change", () => panel.change(control.id, select.value));
  return { box: make("label", {}, name, select), show: () => { for (const option of options) option.textContent = plain(panel.text(option.value)); } };
}

function makeNumbers(control, panel, id, name) {
  const input = make("input", { type: "text", id, value: control.value.map((x) => format(x)).join(", "), autocomplete: "off", spellcheck: "false", "aria-describedby": `${id}-wrong` });
  const wrong = make("span", { class: "wrong", id: `${id}-wrong`, "aria-live": "polite" });
  let invalid = false;
  const show = () => {
    wrong.textContent = invalid ? say("page", "invalid", { most: control.most }) : "";
    input.setAttribute("aria-invalid", String(invalid));
  };
  input.addEventListener("input", () => {
    const parts = input.value.replaceAll("−", "-").split(/[\s,;，、；]+/u).filter(Boolean);
    const found = parts.map(Number);
    invalid = !found.length || found.length > control.most || !found.every((x) => Number.isFinite(x) && Math.abs(x) <= 1e6);
    if (invalid) show();
    else panel.change(control.id, found);
  });
  return { box: make("label", {}, name, input, wrong), show };
}

function makeChecks(control, panel, id, name) {
  const boxes = control.options.map((option) => {
    const input = make("input", { type: "checkbox", id: `${id}-${option}` }), label = make("span");
    input.checked = control.value.includes(option);
    input.addEventListener("change", () => panel.change(control.id, boxes.filter((box) => box.input.checked).map((box) => box.option)));
    return { option, input, label, box: make("label", { class: "check" }, input, label) };
  });
  const box = make("fieldset", {}, make("legend", {}, name), ...boxes.map((each) => each.box));
  return { box, show: () => { for (const each of boxes) each.label.textContent = panel.text(each.option); } };
}

const drawn = figures.map((figure) => new Panel(figure));
document.getElementById("panels").append(...drawn.map((panel) => panel.box));
const byId = (id) => document.getElementById(id);

function showRun() {
  byId("run-bar").hidden = !run;
  if (!run) return;
  byId("run-text").textContent = say("page", "run");
  byId("run-name").textContent = `${run.name} · ${run.algorithm}`;
  byId("step-box").hidden = !run.steps.length;
  byId("step-label").textContent = say("page", "step");
  if (!run.steps.length) return;
  const { step, p } = run.steps[state.step];
  const left = run.recorded > run.steps.length ? say("page", "left_out", { shown: run.steps.length, all: run.recorded }) : "";
  byId("dots").textContent = `${p.length ? say("page", "dots", { count: p.length, step }) : say("page", "no_dots")}${language === "zh" ? "" : " "}${left}`;
}

function drawAll() {
  root.dataset.theme = dark ? "dark" : "light";
  root.lang = language === "zh" ? "zh-Hans" : "en";
  document.title = `groupwise: ${say("page", "title")}`;
  for (const [id, key] of [["title", "title"], ["text", "text"]]) byId(id).textContent = say("page", key);
  byId("theme").textContent = say("page", dark ? "light" : "dark");
  byId("language").textContent = language === "en" ? "中文" : "English";
  byId("language").lang = language === "en" ? "zh-Hans" : "en";
  byId("contents").setAttribute("aria-label", say("page", "contents"));
  byId("contents").replaceChildren(...figures.map((figure) => make("a", { href: `#${figure.id}` }, say(figure.id, "title"))));
  showRun();
  for (const panel of drawn) panel.draw();
}

for (const [i, { step }] of (run?.steps ?? []).entries()) byId("step").append(new Option(step, i, false, i === state.step));
byId("step").addEventListener("change", (event) => {
  state.step = Number(event.target.value);
  drawn.find((panel) => panel.figure.id === "advantages").begin();
  drawAll();
});
byId("theme").addEventListener("click", () => { dark = !dark; drawAll(); });
byId("language").addEventListener("click", () => { language = language === "en" ? "zh" : "en"; drawAll(); });
window.addEventListener("resize", drawAll);
window.theory = theory; // The tests compare it with Python's.
drawAll();
