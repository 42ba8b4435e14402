// One figure: its element, its columns, and drawing it when it is in view.

// What the reader of the page chose for all figures.
const plotsChosen = { axis: "step", window: 1, height: "own", hidden: new Set(), hasty: false, ownWindow: false };
const plotsOf = new Map();
const groupsOf = new Map();
let framePlanned = false;

// Draw every figure in view that is not up to date, once before the next frame.
function planFrame() {
  if (framePlanned) return;
  framePlanned = true;
  requestAnimationFrame(() => {
    framePlanned = false;
    const drawn = [...plotsOf.values()].filter((plot) => plot.visible && plot.stale);
    for (const plot of drawn) drawFigure(plot);
    drawPointer();
    if (drawn.length) keepUp(drawn);
  });
}
// Whether drawing takes longer than a frame should: then lines are drawn in haste until nothing has moved for a while.
const plotsPace = { slow: 0, timer: 0 };
function keepUp(drawn) {
  const start = performance.now();
  requestAnimationFrame(() => {
    plotsPace.slow = performance.now() - start > 30 ? plotsPace.slow + 1 : 0;
    if (plotsPace.slow > 1) plotsChosen.hasty = true;
  });
  if (!plotsChosen.hasty) return;
  for (const plot of drawn) plot.drawnInHaste = true;
  clearTimeout(plotsPace.timer);
  plotsPace.timer = setTimeout(() => {
    plotsChosen.hasty = false;
    plotsPace.slow = 0;
    redraw([...plotsOf.values()].filter((plot) => plot.drawnInHaste));
    for (const plot of plotsOf.values()) plot.drawnInHaste = false;
  }, 250);
}
function redraw(plots = plotsOf.values()) {
  for (const plot of plots) plot.stale = true;
  planFrame();
}

const plotWatcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) plotsOf.get(target.dataset.figure).visible = isIntersecting;
  planFrame();
}, { rootMargin: "40px" });
const plotSizes = new ResizeObserver((entries) => {
  for (const { target } of entries) { const plot = plotsOf.get(target.dataset.figure); if (plot.width !== target.clientWidth) redraw([plot]); }
});

function newPlot(figure) {
  const plot = {
    id: figure.id, group: figure.group, figure, kind: figure.kind, columns: [], styles: [], shown: [], marks: [], ticks: { x: [], y: [] }, u: null,
    stale: true, visible: false, fresh: false, log: null, wide: false, width: 0, xUnit: { size: 1 }, xAxis: {}, yAxis: {}, faded: null, range: null, covered: [], coincide: false, leftOut: 0, bandless: false,
  };
  Object.defineProperty(plot, "box", { get: () => inPixels(plot.u.bbox) });
  plot.area = make("div", { class: "plot-area", tabindex: 0, role: "slider", "data-figure": figure.id, "aria-orientation": "horizontal", "aria-valuemin": 0, "aria-valuenow": 0 });
  plot.title = make("h4", { id: `title-${figure.id}` });
  plot.yTitle = make("span", { class: "axis-title" });
  plot.xTitle = make("div", { class: "axis-title across" });
  plot.legend = make("div", { class: "keys" });
  plot.notes = make("div", { class: "plot-notes" });
  plot.caption = make("figcaption", {});
  plot.table = make("div", { class: "scroll", tabindex: 0, role: "region" });
  plot.details = make("details", { ontoggle: () => fillTable(plot) }, make("summary", {}), plot.table);
  plot.logButton = make("button", { type: "button", class: "small", onclick: () => chooseLog(plot) });
  plot.wideButton = make("button", { type: "button", class: "small wide-button", onclick: () => { plot.wide = !plot.wide; describeFigure(plot); redraw([plot]); } });
  plot.element = make(
    "figure", { id: `figure-${figure.id}`, "aria-labelledby": `title-${figure.id}` },
    make("div", { class: "plot-head" }, plot.title, make("div", { class: "plot-buttons" }, plot.logButton, plot.wideButton)),
    plot.yTitle, plot.area, plot.xTitle, plot.legend, plot.notes, plot.caption, plot.details,
  );
  plotsOf.set(figure.id, plot);
  listenToPointer(plot);
  plotWatcher.observe(plot.area);
  plotSizes.observe(plot.area);
  return plot;
}
// Where in its area a figure is plotted, in pixels of the page.
function inPixels({ left, top, width, height }) {
  const ratio = uPlot.pxRatio;
  return { left: left / ratio, top: top / ratio, width: width / ratio, height: height / ratio };
}
function dropPlot(plot) {
  plotWatcher.unobserve(plot.area);
  plotSizes.unobserve(plot.area);
  plot.u?.destroy();
  plot.element.remove();
  plotsOf.delete(plot.id);
}

// Bars stand on 0, which a logarithmic axis does not have.
const isLog = (plot) => plot.kind !== "bars" && (plotsChosen.height === "own" ? (plot.log ?? plot.figure.y.log) : plotsChosen.height === "log");
function chooseLog(plot) {
  const log = !isLog(plot);
  if (plotsChosen.height !== "own") for (const other of plotsOf.values()) other.log = isLog(other);
  plotsChosen.height = "own";
  plot.log = log;
  plot.u?.destroy();
  plot.u = null;
  drawControls();
  describeFigure(plot);
  redraw([plot]);
}

// Say everything of a figure that is text.
function describeFigure(plot) {
  const { figure } = plot, bars = plot.kind === "bars";
  plot.title.textContent = say(figure.title);
  plot.caption.textContent = say(figure.caption);
  plot.yTitle.textContent = say(figure.y.title);
  plot.xTitle.textContent = plot.kind === "lines" ? axisTitle(groupsOf.get(plot.group)) : say(figure.x.title);
  plot.area.setAttribute("aria-label", text("plots.area", { title: say(figure.title) }));
  plot.logButton.textContent = text("plots.log");
  plot.logButton.setAttribute("aria-label", text("plots.log_of", { title: say(figure.title) }));
  plot.logButton.setAttribute("aria-pressed", String(isLog(plot)));
  plot.logButton.hidden = bars;
  plot.wideButton.textContent = text(plot.wide ? "plots.narrow" : "plots.wide");
  plot.wideButton.setAttribute("aria-label", text(plot.wide ? "plots.narrow_of" : "plots.wide_of", { title: say(figure.title) }));
  plot.table.setAttribute("aria-label", text("plots.table_of", { title: say(figure.title) }));
  plot.details.firstChild.textContent = text("plots.table");
  plot.element.classList.toggle("wide", plot.wide);
  plot.legend.replaceChildren(...legendOf(plot));
  noteFigure(plot);
  fillTable(plot);
}

// What must be known to read a figure, below it.
function noteFigure(plot) {
  const { figure } = plot, lines = plot.kind === "lines" ? drawnIn(figure) : [], notes = [];
  const seeds = [...new Set(lines.filter((line) => line.low && (figure.band || line.seeds > 1)).map((line) => line.seeds))].sort((a, b) => a - b);
  if (figure.note) notes.push(say(figure.note));
  if (seeds.length) notes.push(make("span", { class: "key" }, lineSwatch("band", colouredBy(figure) === "setting" ? "var(--soft)" : plot.styles[0]?.colour ?? "var(--line-0)", []), figure.band ? say(figure.band) : text(figure.y.log ? "plots.band_log" : "plots.band", { seeds: seeds.length > 1 ? `${seeds[0]}–${seeds.at(-1)}` : seeds[0] })));
  if (plot.kind === "dots" && drawnIn(figure).some((series) => series.flags?.some(Boolean))) notes.push(make("span", { class: "key" }, lineSwatch("ring", "var(--soft)", []), text("plots.clipped")));
  if (plot.leftOut) notes.push(text("plots.left_out", { count: format(plot.leftOut) }));
  if (plot.bandless) notes.push(text("plots.bandless"));
  for (const constant of figure.constants ?? []) notes.push(text("plots.constant", { label: say(constant.label), value: withUnit(figure, constant.value) }));
  plot.notes.replaceChildren(...notes.map((note) => make("p", { class: "soft" }, note)));
}

// What must be known to read several figures of a group, once above them.
function noteGroup(id) {
  const plots = [...plotsOf.values()].filter((plot) => plot.group === id), lines = plots.flatMap((plot) => (plot.kind === "lines" ? drawnIn(plot.figure) : []));
  const about = plots.flatMap((plot) => plot.figure.about ?? []).filter(({ settings }) => settings.some((setting) => !plotsChosen.hidden.has(`setting ${setting}`)));
  const notes = [...new Set(about.map((one) => say(one.text)))];
  if (plots.some((plot) => plot.marks.length)) notes.push(make("span", { class: "key" }, lineSwatch("lines", "var(--watch)", [3, 3]), text("plots.marks")));
  if (plots.some((plot) => plot.coincide)) notes.push(make("span", { class: "key" }, lineSwatch("over", "var(--soft)", []), text("plots.coincide")));
  const stretches = lines.map((line) => line.stretch).filter((stretch) => stretch > 1), [least, most] = [Math.min(...stretches), Math.max(...stretches)];
  const count = least === most ? format(most) : `${format(least)}–${format(most)}`;
  if (stretches.length) notes.push(plotsChosen.window > 1 ? text("plots.thinned_smoothed", { count, window: format(Math.max(plotsChosen.window, most)) }) : text("plots.thinned", { count }));
  groupsOf.get(id).notes.replaceChildren(...notes.map((note) => make("p", { class: "soft" }, note)));
}

// What each line does, as a table, filled when it is opened.
function fillTable(plot) {
  if (!plot.details.open) return;
  prepareColumns(plot);
  const isPercent = plot.figure.y.percent, head = ["line", "first", "last", "lowest", "highest"].map((key) => make("th", { scope: "col" }, text(`plots.${key}`)));
  const rows = plot.columns.map((columns, k) => {
    const found = summaryOf(columns);
    const at = (place) => (plot.kind === "lines" ? text("plots.at_step", { value: valueText(columns.y[place], isPercent), step: format(columns.steps[place]) }) : valueText(columns.y[place], isPercent));
    const cells = found ? [found.first, found.last, found.lowest, found.highest].map(at) : ["–", "–", "–", "–"];
    return make("tr", {}, make("th", { scope: "row" }, plot.styles[k].name()), ...cells.map((cell) => make("td", {}, cell)));
  });
  plot.table.replaceChildren(make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)));
}

// Columns, colours and marks from the figure's data, when they changed.
function prepareColumns(plot) {
  if (plot.fresh) return;
  plot.fresh = true;
  const { figure } = plot, lines = plot.kind === "lines";
  plot.columns = drawnIn(figure).map((one) => (lines ? columnsOfLine(one, plotsChosen.axis, plotsChosen.window) : columnsOfSeries(one))).filter((columns) => columns !== null);
  plot.styles = plot.columns.map(({ of }) => styled(figure, of));
  const first = drawnIn(figure)[0], marks = lines ? page.data.marks : [];
  const x = marks.length ? onAxis(first, Float64Array.from(marks, (mark) => mark.step), plotsChosen.axis) : null;
  plot.marks = x ? marks.map((mark, i) => ({ ...mark, x: x[i] })) : [];
  plot.compared = null;
}

// Draw a figure for what is chosen: which lines, the part of the x axis, the scale of the y axis.
function drawFigure(plot) {
  plot.stale = false;
  const width = plot.area.clientWidth;
  if (!width || !plot.figure.kind) return;
  prepareColumns(plot);
  if (!plot.columns.length) return;
  const group = groupsOf.get(plot.group), log = isLog(plot), height = Math.round(plot.wide ? Math.min(480, Math.max(300, width * 0.4)) : Math.min(280, Math.max(200, width * 0.5)));
  plot.shown = plot.styles.map((style) => !style.keys.some((key) => plotsChosen.hidden.has(key)));
  const drawn = plot.columns.filter((_, k) => plot.shown[k]), columns = drawn.length ? drawn : plot.columns;
  const xLog = plot.kind !== "lines" && plot.figure.x.log;
  const [x0, x1] = xExtent(plot, group, xLog);
  const found = yRange(columns, ...(plot.kind === "lines" ? [x0, x1] : [-Infinity, Infinity]), log) ?? { low: 0, high: 1, leftOut: 0, bandless: 0 };
  const y = padded(found, log, plot);
  plot.xAxis = { log: xLog, percent: plot.kind !== "lines" && plot.figure.x.percent, whole: plot.kind === "lines" && plotsChosen.axis !== "seconds" };
  plot.yAxis = { log, percent: plot.figure.y.percent };
  plot.xUnit = plot.kind === "lines" && plotsChosen.axis === "seconds" ? group.unit : { size: 1 };
  plot.turned = plot.kind === "bars" && Math.max(...plot.figure.bins.map(widthOf)) + 10 > (width - 80) / plot.figure.bins.length;
  plot.range = { x: [x0, x1], y: [y.from, y.to] };
  if (plot.u && (plot.u.scales.y.distr !== (log ? 3 : 1) || plot.builtTurned !== plot.turned)) {
    plot.u.destroy();
    plot.u = null;
  }
  findCovered(plot, columns, y, log, height);
  showRange(plot, width, height);
  const said = `${plot.coincide} ${Math.max(1, ...columns.map(({ of }) => of.stretch ?? 1))} ${found.leftOut} ${found.bandless > 0} ${plot.marks.length}`;
  plot.leftOut = log ? found.leftOut : 0;
  plot.bandless = found.bandless > 0;
  if (said !== plot.said) {
    plot.said = said;
    noteFigure(plot);
    noteGroup(plot.group);
  }
}

// Where lines are covered by others they are drawn wider below them. Found anew where the figure is shown much larger.
function findCovered(plot, columns, y, log, height) {
  const key = `${plot.shown} ${log} ${Math.round(2 * Math.log2(log ? Math.log(y.to / y.from) : y.to - y.from))}`;
  if (plot.compared !== key && (plot.kind === "lines" || plot.kind === "curve")) {
    plot.compared = key;
    const covered = coincidences(columns, { low: y.from, high: y.to }, log, 1.2 / height);
    plot.covered = plot.columns.map((one) => (columns.includes(one) ? covered[columns.indexOf(one)] : null));
    plot.coincide = plot.covered.some((one) => one !== null);
  }
}

function showRange(plot, width, height) {
  const { x, y } = plot.range;
  if (!plot.u) {
    plot.builtTurned = plot.turned;
    plot.u = new uPlot(uplotOptions(plot, width, height), [x], (u, start) => {
      plot.area.replaceChildren(u.root, plot.crosshair, plot.selection, plot.points);
      start();
    });
  } else if (plot.width !== width || plot.height !== height) plot.u.setSize({ width, height });
  plot.width = width;
  plot.height = height;
  plot.u.batch(() => {
    plot.u.setScale("x", { min: x[0], max: x[1] });
    plot.u.setScale("y", { min: y[0], max: y[1] });
  });
}

// The part of the x axis that is shown.
function xExtent(plot, group, log) {
  if (plot.kind === "bars") return [-0.5, plot.figure.bins.length - 0.5];
  if (plot.kind === "lines") return group.zoom ?? group.extent;
  const x = plot.columns.flatMap((columns) => [...columns.x].filter((value) => !log || value > 0));
  const low = Math.min(...x), high = Math.max(...x);
  if (!x.length) return [0, 1];
  if (log) return [low / 1.1, high * 1.1];
  const margin = (high - low || 1) * 0.03;
  return [low - margin, high + margin];
}

// A range of y with a margin, so that no line runs along the edge.
function padded({ low, high }, log, plot) {
  low = Math.max(low, -1e300);
  high = Math.min(high, 1e300);
  if (log) {
    const margin = Math.max((high / low) ** 0.06, 1.05);
    return { from: low / margin, to: high * margin };
  }
  if (plot.kind === "bars") low = Math.min(0, low);
  const margin = high > low ? 0.06 * (high - low) : Math.abs(high) * 0.1 || (plot.figure.y.percent ? 0.02 : 1);
  return { from: plot.kind === "bars" && low === 0 ? 0 : low - margin, to: high + margin };
}
