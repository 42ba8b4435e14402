// The section of figures: controls, groups, legends, and keeping them up to date with the data.

const plotGroups = ["learning", "health", "policy", "cost"];
const plotsHolder = document.getElementById("figures");
const plotControls = make("div", { class: "controls plot-controls", role: "group" });
const windowSizes = [1, 3, 5, 11, 21, 51, 101, 201, 501, 1001, 2001, 5001];

// One of several, as buttons.
function choice(key, values, now, choose, disabled = () => false) {
  const buttons = values.map((value) => make("button", { type: "button", class: "small", "aria-pressed": String(value === now), disabled: disabled(value), onclick: () => { choose(value); plotControls.querySelector(`[data-choice="${key} ${value}"]`)?.focus(); }, "data-choice": `${key} ${value}` }, text(`plots.${key}_${value}`)));
  return make("span", { class: "choice", role: "group", "aria-label": text(`plots.${key}`) }, make("span", { class: "soft" }, text(`plots.${key}`)), ...buttons);
}

// What can be chosen: windows of at most half the steps, and axes for which there is a clock.
function controlsNow() {
  const clocked = page.data.settings.some(({ clock }) => clock.steps.length > 1);
  const most = Math.max(1, ...page.data.figures.flatMap((figure) => (figure.kind === "lines" ? drawnIn(figure) : []).map((line) => line.steps.at(-1) ?? 0)));
  return { clocked, sizes: windowSizes.filter((size) => size === 1 || size <= most / 2) };
}

function drawControls() {
  const { clocked, sizes } = controlsNow(), place = Math.max(0, sizes.indexOf(plotsChosen.window));
  const slider = make("input", { type: "range", id: "smoothing", min: 0, max: sizes.length - 1, value: place, disabled: sizes.length < 2, oninput: (event) => chooseWindow(sizes[event.target.value]) });
  const said = make("output", { for: "smoothing", id: "smoothing-said" });
  plotControls.setAttribute("aria-label", text("plots.controls"));
  plotControls.replaceChildren(
    choice("x", xAxes, plotsChosen.axis, chooseAxis, (axis) => axis !== "step" && !clocked),
    choice("y", ["own", "linear", "log"], plotsChosen.height, chooseHeight),
    make("button", { type: "button", class: "small", id: "reset-zoom", onclick: resetAll }, text("plots.reset")),
    make("span", { class: "choice" }, make("label", { for: "smoothing", class: "soft" }, text("plots.smoothing")), slider, said),
  );
  saySmoothing();
  drawReset();
}
function saySmoothing() {
  const said = plotsChosen.window > 1 ? text("plots.smoothing_on", { count: plotsChosen.window }) : text("plots.smoothing_off");
  document.getElementById("smoothing-said").textContent = said;
  document.getElementById("smoothing").setAttribute("aria-valuetext", said);
}
function drawReset() {
  const button = document.getElementById("reset-zoom");
  if (button) button.disabled = [...groupsOf.values()].every((group) => group.zoom === null);
}

function chooseAxis(axis) {
  plotsChosen.axis = axis;
  for (const group of groupsOf.values()) group.zoom = null;
  for (const plot of plotsOf.values()) plot.fresh = plot.kind !== "lines";
  unpoint();
  measureGroups();
  drawControls();
  for (const plot of plotsOf.values()) describeFigure(plot);
  redraw();
}
function chooseHeight(height) {
  plotsChosen.height = height;
  for (const plot of plotsOf.values()) plot.log = null;
  drawControls();
  for (const plot of plotsOf.values()) describeFigure(plot);
  redraw();
}
function chooseWindow(window) {
  plotsChosen.window = window;
  plotsChosen.ownWindow = true;
  for (const plot of plotsOf.values()) plot.fresh = plot.kind !== "lines";
  saySmoothing();
  noteGroups();
  redraw();
}
// Of so many steps that each point stands for several, lines would be solid blocks: they are smoothed, until something else is chosen.
function suitedWindow() {
  const stretch = Math.max(1, ...page.data.figures.flatMap((figure) => (figure.kind === "lines" ? drawnIn(figure) : []).map((line) => line.stretch)));
  return stretch === 1 ? 1 : controlsNow().sizes.find((size) => size >= 16 * stretch) ?? controlsNow().sizes.at(-1);
}
const noteGroups = () => { for (const id of groupsOf.keys()) noteGroup(id); };
function resetAll() {
  for (const group of groupsOf.values()) group.zoom = null;
  redraw();
  drawReset();
}

const axisTitle = (group) => text(`plots.axis_${plotsChosen.axis}`, { unit: text(`plots.unit_${group.unit.key}`) });

// From where to where the lines of each group go on the x axis that is shown.
function measureGroups() {
  for (const [id, group] of groupsOf) {
    let low = Infinity, high = -Infinity;
    for (const figure of page.data.figures) {
      for (const line of figure.group === id && figure.kind === "lines" ? drawnIn(figure) : []) {
        if (!line.steps.length) continue;
        const ends = onAxis(line, Float64Array.of(line.steps[0], line.steps.at(-1)), plotsChosen.axis);
        if (ends === null) continue;
        low = Math.min(low, ends[0]);
        high = Math.max(high, ends[1]);
      }
    }
    group.extent = low < high ? [low, high] : low === high ? [low - 0.5, high + 0.5] : [0, 1];
    group.unit = timeUnit(group.extent[1]);
  }
}

// An entry of a legend: hides what it stands for, and shows it alone in colour while it is pointed at.
function legendKey(key, swatches, name) {
  const fade = (value) => () => { for (const plot of plotsOf.values()) plot.faded = value; redraw([...plotsOf.values()].filter((plot) => plot.styles.some((style) => style.keys.includes(key)))); };
  const toggle = (event) => {
    const hidden = !plotsChosen.hidden.delete(key);
    if (hidden) plotsChosen.hidden.add(key);
    for (const button of document.querySelectorAll("button.key")) if (button.dataset.key === key) button.setAttribute("aria-pressed", String(!hidden));
    if (event.type === "click") fade(null)();
    noteGroups();
    redraw();
  };
  return make("button", { type: "button", class: "key", "data-key": key, "aria-pressed": String(!plotsChosen.hidden.has(key)), onclick: toggle, onpointerenter: fade(key), onpointerleave: fade(null) }, ...swatches, make("span", {}, name));
}

// A figure's own legend: what it measures, if that is more than one thing. One that fills the window has its group's, too.
function legendOf(plot) {
  const metrics = metricsOf(plot.figure), by = colouredBy(plot.figure);
  const above = plot.wide ? groupLegend(page.data.figures.filter((figure) => figure.group === plot.group)) : [];
  if (metrics.length < 2) return above;
  return above.concat(metrics.map(({ dash, label }) => {
    const colour = by === "label" ? lineColour(dash) : "var(--ink)";
    return legendKey(`label ${plot.id} ${dash}`, [lineSwatch(plot.kind, colour, by === "label" ? [] : strokeDashes[dash % strokeDashes.length], by === "label" ? 0 : dash)], say(label));
  }));
}

// What the colours of a whole group stand for.
function groupLegend(figures) {
  if (page.data.settings.length > 1) return page.data.settings.map(({ id, name }) => legendKey(`setting ${id}`, [lineSwatch("lines", settingColour(id), [])], name));
  const runs = new Set(figures.filter((figure) => colouredBy(figure) === "run").flatMap((figure) => drawnIn(figure).map((line) => line.run)));
  const places = page.data.runs.map((run) => run.id);
  return [...runs].map((id) => legendKey(`run ${id}`, [lineSwatch("lines", lineColour(Math.max(0, places.indexOf(id))), [])], runName(id)));
}

// A figure with nothing but constants is a line of text.
const isConstant = (figure) => drawnIn(figure).length === 0;
function constantLine(figure) {
  const said = (figure.constants ?? []).map(({ label, value }) => text("plots.constant_value", { label: say(label), value: withUnit(figure, value) }));
  return make("p", { id: `figure-${figure.id}`, class: "constant" }, make("b", {}, say(figure.title)), text("core.colon"), said.join(text("core.semicolon")));
}

function drawGroup(id, figures) {
  const group = groupsOf.get(id) ?? { zoom: null, extent: [0, 1], unit: timeUnit(0) };
  if (!group.section) {
    group.heading = make("h3", { id: `group-${id}` });
    group.keys = make("div", { class: "keys" });
    group.notes = make("div", { class: "plot-notes" });
    group.grid = make("div", { class: "figures" });
    group.constants = make("div", { class: "constants" });
    group.section = make("section", { "aria-labelledby": `group-${id}`, class: "plot-group" }, group.heading, group.keys, group.notes, group.grid, group.constants);
    groupsOf.set(id, group);
  }
  group.section.hidden = figures.length === 0;
  group.heading.textContent = text(`plots.${id}`);
  group.keys.replaceChildren(...groupLegend(figures));
  const drawn = figures.filter((figure) => !isConstant(figure)).map((figure) => plotOf(figure).element);
  if (drawn.length !== group.grid.children.length || drawn.some((element, i) => group.grid.children[i] !== element)) group.grid.replaceChildren(...drawn);
  const constants = figures.filter(isConstant);
  group.constants.replaceChildren(...(constants.length ? [make("h4", {}, text("plots.constants")), ...constants.map(constantLine)] : []));
  return group.section;
}
function plotOf(figure) {
  const known = plotsOf.get(figure.id);
  if (known && known.kind === figure.kind && known.group === figure.group) return Object.assign(known, { figure });
  if (known) dropPlot(known);
  return newPlot(figure);
}

// All figures from the data; those that stay keep their zoom, hidden lines and what is pointed at.
function drawFigures() {
  const { figures } = page.data, kept = new Set(figures.filter((figure) => !isConstant(figure)).map(({ id }) => id));
  for (const plot of [...plotsOf.values()]) if (!kept.has(plot.id)) dropPlot(plot);
  const sections = plotGroups.map((id) => drawGroup(id, figures.filter((figure) => figure.group === id)));
  if (!plotsHolder.contains(plotControls)) {
    plotsHolder.append(make("h2", { id: "plots-heading" }), plotControls, make("details", { class: "plots-help" }, make("summary", {}), make("p", { class: "soft" })), make("div", { id: "plots-groups" }));
    document.body.append(plotTip);
  }
  plotsHolder.hidden = figures.length === 0;
  document.getElementById("plots-heading").textContent = text("plots.figures");
  plotsHolder.querySelector(".plots-help summary").textContent = text("plots.help_title");
  plotsHolder.querySelector(".plots-help p").textContent = text("plots.help");
  const holder = document.getElementById("plots-groups");
  if (!holder.children.length) holder.append(...sections);
  measureGroups();
  drawControls();
  for (const plot of plotsOf.values()) describeFigure(plot);
  noteGroups();
}

// Draw figures anew from their data; null: all.
function refreshFigures(ids) {
  for (const plot of plotsOf.values()) {
    if (ids && !ids.has(plot.id)) continue;
    plot.fresh = false;
    plot.stale = true;
    fillTable(plot);
  }
  planFrame();
}

// What is said around the lines, which is built anew only where it changed, so that the focus stays where it is.
const structureOf = (figure) => [isConstant(figure), figure.title, figure.group, figure.kind, figure.note, figure.about, figure.constants, figure.bins, metricsOf(figure), colouredBy(figure)];
function structureOfFigures() {
  const { settings, runs, figures } = page.data, named = ({ id, name }) => [id, name];
  return JSON.stringify([page.language, settings.map(named), runs.map(named), controlsNow(), figures.map((figure) => [figure.id, structureOf(figure)])]);
}
let drawnStructure = "";

whenChanged((changed) => {
  if (changed.has("theme")) canvasColours.clear();
  if (page.data === null) return;
  if (["settings", "runs", "figures", "marks", "language"].some((key) => changed.has(key))) {
    plotsFont.value = axisFont();
    const window = plotsChosen.ownWindow ? plotsChosen.window : suitedWindow(), smoothed = window !== plotsChosen.window;
    plotsChosen.window = window;
    const structure = structureOfFigures(), same = structure === drawnStructure;
    drawnStructure = structure;
    for (const figure of page.data.figures) if (plotsOf.has(figure.id)) plotsOf.get(figure.id).figure = figure;
    if (!same) drawFigures();
    measureGroups();
    if (same && smoothed) { drawControls(); noteGroups(); }
    const all = !same || smoothed || changed.has("marks") || (changed.has("settings") && plotsChosen.axis !== "step") || (changed.has("figures") && !page.changedFigures);
    refreshFigures(all ? null : new Set(changed.has("figures") ? page.changedFigures : []));
    drawReset();
  } else if (changed.has("theme")) redraw();
});
