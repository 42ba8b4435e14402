// One crosshair, one tooltip and one zoom for all figures of a group: pointer, wheel, fingers and keys.

const plotsPointed = { plot: null, x: null, y: null, at: null, keyed: false };
const plotTip = make("div", { class: "plot-tip", role: "tooltip", hidden: true });
// Up to so many lines, the tooltip tells of all figures of the group, and of intervals and values before smoothing.
const GROUP_ROWS = 12, BRIEF_ROWS = 8;

const groupPlots = (plot) => (plot.kind === "lines" ? [...plotsOf.values()].filter((one) => one.kind === "lines" && one.group === plot.group) : [plot]);

// From where to where a figure is to be shown: of several movements before the next frame, each goes on from the one before.
function shownRange(plot) {
  const group = groupsOf.get(plot.group);
  return plot.kind === "lines" ? (group.zoom ?? group.extent) : plot.range.x;
}

// Pixels of the page to values of a figure, and back; both from the left or the top of the plot.
function plotToX(plot, x) {
  const [from, to] = plot.range.x, at = Math.log10(from), share = (plot.xAxis.log ? (Math.log10(x) - at) / (Math.log10(to) - at) : (x - from) / (to - from));
  return share * plot.box.width;
}
function plotFromX(plot, pixel) {
  const [from, to] = shownRange(plot), share = pixel / plot.box.width;
  return plot.xAxis.log ? from * (to / from) ** share : from + share * (to - from);
}
function plotToY(plot, y) {
  const [from, to] = plot.range.y, share = plot.yAxis.log ? Math.log(y / from) / Math.log(to / from) : (y - from) / (to - from);
  return (1 - share) * plot.box.height;
}

function listenToPointer(plot) {
  plot.crosshair = make("div", { class: "crosshair", hidden: true });
  plot.selection = make("div", { class: "selection", hidden: true });
  plot.points = make("div", { class: "points" });
  const fingers = new Map();
  let start = null, panned = null;
  const inside = (event) => { const box = plot.area.getBoundingClientRect(); return [event.clientX - box.left - plot.box.left, event.clientY - box.top - plot.box.top, plot.box.width]; };
  const zooms = () => plot.kind === "lines" && plot.u;
  plot.area.addEventListener("pointerdown", (event) => {
    if (!plot.u || event.button > 0) return;
    const [x, y] = inside(event);
    fingers.set(event.pointerId, x);
    if (event.pointerType !== "mouse" && fingers.size === 1) point(plot, Math.min(plot.box.width, Math.max(0, x)), y);
    if (!zooms()) return;
    if (event.pointerType === "mouse") {
      plot.area.setPointerCapture(event.pointerId);
      if (event.shiftKey) panned = { pixel: x, range: [...shownRange(plot)] };
      else start = x;
      event.preventDefault();
      plot.area.focus({ preventScroll: true });
    }
  });
  plot.area.addEventListener("pointermove", (event) => {
    if (!plot.u) return;
    const [x, y, width] = inside(event);
    if (fingers.size === 2 && fingers.has(event.pointerId)) return pinch(plot, fingers, event.pointerId, x);
    if (panned) { const shift = ((panned.pixel - x) / width) * (panned.range[1] - panned.range[0]); return zoomTo(plot, panned.range[0] + shift, panned.range[1] + shift); }
    const held = Math.min(width, Math.max(0, x));
    if (start !== null) placeSelection(plot, start, held);
    point(plot, held, y);
  });
  const end = (event) => {
    fingers.delete(event.pointerId);
    panned = null;
    if (start === null) return;
    const from = start, to = Math.min(plot.box.width, Math.max(0, inside(event)[0]));
    start = null;
    plot.selection.hidden = true;
    if (event.type === "pointerup" && Math.abs(to - from) > 5) zoomTo(plot, plotFromX(plot, Math.min(from, to)), plotFromX(plot, Math.max(from, to)));
  };
  plot.area.addEventListener("pointerup", end);
  plot.area.addEventListener("pointercancel", end);
  plot.area.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse" && start === null && !plotsPointed.keyed) unpoint(); });
  plot.area.addEventListener("dblclick", () => resetZoom(plot));
  plot.area.addEventListener("wheel", (event) => {
    if (!zooms() || !(event.ctrlKey || event.metaKey || event.altKey)) return;
    event.preventDefault();
    const [x] = inside(event);
    zoomBy(plot, plotFromX(plot, x), Math.exp(Math.max(-1, Math.min(1, event.deltaY * (event.deltaMode ? 0.05 : 0.003)))));
  }, { passive: false });
  plot.area.addEventListener("keydown", (event) => pressed(plot, event));
  plot.area.addEventListener("blur", () => { if (plotsPointed.plot === plot) unpoint(); });  // a finger may point at another figure before it has the focus
}

for (const moved of ["scroll", "resize"]) addEventListener(moved, () => { if (plotsPointed.plot) planFrame(); }, { passive: true });

function placeSelection(plot, from, to) {
  const left = plot.box.left + Math.min(from, to);
  plot.selection.hidden = Math.abs(to - from) < 3;
  Object.assign(plot.selection.style, { left: `${left}px`, width: `${Math.abs(to - from)}px`, top: `${plot.box.top}px`, height: `${plot.box.height}px` });
}

function pinch(plot, fingers, moved, x) {
  if (plot.kind !== "lines") return;
  const [other] = [...fingers].filter(([id]) => id !== moved).map(([, at]) => at), before = fingers.get(moved);
  const a = plotFromX(plot, before), b = plotFromX(plot, other), width = plot.box.width;
  fingers.set(moved, x);
  if (Math.abs(x - other) < 10 || (x - other) * (before - other) <= 0) return;
  const scale = (a - b) / (x - other);
  zoomTo(plot, b - other * scale, b + (width - other) * scale);
  unpoint();
}

// Zoom of all figures of a group; never beyond the data, never closer than two steps.
function zoomTo(plot, from, to) {
  const group = groupsOf.get(plot.group), [first, last] = group.extent;
  const least = Math.min(last - first, plotsChosen.axis === "step" ? 2 : (last - first) / 1e5), size = Math.min(last - first, Math.max(least, to - from));
  const middle = (from + to) / 2, low = Math.min(last - size, Math.max(first, middle - size / 2));
  group.zoom = size >= (last - first) * 0.999 ? null : [low, low + size];
  redraw(groupPlots(plot));
  drawReset();
}
const zoomBy = (plot, at, factor) => { const [from, to] = shownRange(plot); zoomTo(plot, at - (at - from) * factor, at + (to - at) * factor); };
function resetZoom(plot) {
  if (plot.kind !== "lines") return;
  groupsOf.get(plot.group).zoom = null;
  redraw(groupPlots(plot));
  drawReset();
}

function point(plot, x, y) {
  Object.assign(plotsPointed, { plot, x, y, at: null, keyed: false });
  planFrame();
}
function unpoint() {
  Object.assign(plotsPointed, { plot: null, at: null, keyed: false });
  planFrame();
}

// Arrow keys move the crosshair from point to point, + and − zoom, 0 shows everything.
function pressed(plot, event) {
  if (!plot.u || event.altKey || event.ctrlKey || event.metaKey) return;
  const stops = stopsOf(plot), now = plotsPointed.plot === plot && plotsPointed.at !== null ? nearestPlace(stops, plotsPointed.at) : -1;
  const size = Math.max(1, event.shiftKey ? Math.round(stops.length / 20) : 1), lines = plot.kind === "lines", [from, to] = shownRange(plot);
  const at = now < 0 ? (from + to) / 2 : plotsPointed.at;
  if (event.key === "ArrowRight" || event.key === "ArrowUp") goTo(plot, stops, now < 0 ? placeOf(stops, from) : now + size);
  else if (event.key === "ArrowLeft" || event.key === "ArrowDown") goTo(plot, stops, now < 0 ? placeOf(stops, to) : now - size);
  else if (event.key === "Home") goTo(plot, stops, 0);
  else if (event.key === "End") goTo(plot, stops, stops.length - 1);
  else if (lines && event.key === "PageUp") zoomTo(plot, from - (to - from) / 2, to - (to - from) / 2);
  else if (lines && event.key === "PageDown") zoomTo(plot, from + (to - from) / 2, to + (to - from) / 2);
  else if (lines && (event.key === "+" || event.key === "=")) zoomBy(plot, at, 0.6);
  else if (lines && event.key === "-") zoomBy(plot, at, 1 / 0.6);
  else if (lines && event.key === "0") resetZoom(plot);
  else if (event.key === "Escape") unpoint();
  else return;
  event.preventDefault();
}
function goTo(plot, stops, place) {
  const at = stops[Math.min(stops.length - 1, Math.max(0, place))];
  if (at === undefined) return;
  const [from, to] = shownRange(plot);
  if (plot.kind === "lines" && (at < from || at > to)) zoomTo(plot, at < from ? at : at - (to - from), at < from ? at + (to - from) : at);
  Object.assign(plotsPointed, { plot, at, x: null, y: null, keyed: true });
  planFrame();
}

// Where the crosshair stops: the points of the shown line that has most of them, or the bars, or the dots from left to right.
function stopsOf(plot) {
  const shown = plot.columns.filter((_, k) => plot.shown[k]);
  if (plot.kind === "bars") return Float64Array.from(plot.figure.bins, (_, i) => i);
  if (plot.kind !== "lines") return Float64Array.from(new Set(shown.flatMap(({ x }) => [...x]))).sort();
  return shown.reduce((most, { x }) => (x.length > most.length ? x : most), new Float64Array(0));
}

// Crosshair, points and tooltip where the pointer or the keys are.
function drawPointer() {
  const { plot } = plotsPointed;
  for (const one of plotsOf.values()) if (one.u && (plot === null || !groupPlots(plot).includes(one))) hidePointer(one);
  if (plot === null || !plot.u || !plotsOf.has(plot.id)) { plotTip.hidden = true; return; }
  const found = plot.kind === "dots" ? nearestDot(plot) : nearestColumn(plot);
  if (found === null) { plotTip.hidden = true; hidePointer(plot); return; }
  plotsPointed.at = found;
  const all = groupPlots(plot).filter((one) => one.u && (one.visible || one === plot));
  const area = plot.area.getBoundingClientRect();  // before anything changes, or the page would be laid out for it
  const together = all.reduce((sum, one) => sum + one.shown.filter(Boolean).length, 0) <= GROUP_ROWS;
  const rows = new Map((together ? [plot, ...all.filter((one) => one !== plot)] : [plot]).map((one) => [one, rowsAt(one, plotsPointed.at)]));
  for (const one of all) placeCrosshair(one, plotsPointed.at, one === plot ? rows.get(plot) : []);
  fillTip(plot, rows, area);
}
function hidePointer(plot) {
  plot.crosshair.hidden = true;
  plot.points.replaceChildren();
}

function nearestColumn(plot) {
  const stops = stopsOf(plot);
  if (!stops.length) return null;
  return plotsPointed.keyed || plotsPointed.x === null ? stops[nearestPlace(stops, plotsPointed.at)] : stops[nearestPlace(stops, plotFromX(plot, plotsPointed.x))];
}

// The dot nearest to the pointer, at most 30 pixels away. With keys: the first at that x.
function nearestDot(plot) {
  let best = null, least = plotsPointed.x === null ? Infinity : 900;
  plot.columns.forEach((columns, k) => {
    for (let i = 0; plot.shown[k] && i < columns.x.length; i += 1) {
      const dx = plotsPointed.x === null ? 1e6 * (columns.x[i] - plotsPointed.at) : plotToX(plot, columns.x[i]) - plotsPointed.x;
      const dy = plotsPointed.x === null ? 0 : plotToY(plot, columns.y[i]) - plotsPointed.y;
      if (dx * dx + dy * dy < least) { least = dx * dx + dy * dy; best = { k, i, x: columns.x[i] }; }
    }
  });
  plot.dot = best;
  return best === null ? null : best.x;
}

// The value of every shown line at x: its nearest point. A line that has ended before has none.
function rowsAt(plot, x) {
  if (plot.kind === "dots") return [{ k: plot.dot.k, i: plot.dot.i }];
  const rows = [];
  plot.columns.forEach((columns, k) => {
    if (!plot.shown[k] || !columns.x.length) return;
    const i = nearestPlace(columns.x, x), value = columns.y[i], end = columns.x.length - 1;
    const reach = end > 0 ? Math.max(columns.x[1] - columns.x[0], columns.x[end] - columns.x[end - 1]) : Infinity;
    if (value === value && (plot.kind !== "lines" || Math.abs(columns.x[i] - x) <= reach || (i > 0 && i < end))) rows.push({ k, i });
  });
  const shownValue = ({ k, i }) => (plot.columns[k].mean ?? plot.columns[k].y)[i];
  return rows.sort((a, b) => shownValue(b) - shownValue(a));
}

// The crosshair in every figure of the group, and points on the lines of the one that is pointed at.
function placeCrosshair(plot, x, rows) {
  const { left, top, width, height } = plot.box, at = plotToX(plot, x);
  plot.crosshair.hidden = at < -1 || at > width + 1 || plot.kind === "dots";
  plot.crosshair.style.transform = `translate(${left + at}px, ${top}px)`;
  plot.crosshair.style.height = `${height}px`;
  const dots = plot.kind === "bars" ? [] : rows;
  while (plot.points.children.length > dots.length) plot.points.lastChild.remove();
  while (plot.points.children.length < dots.length) plot.points.append(make("i", {}));
  dots.forEach(({ k, i }, place) => {
    const { x: columnX, y, mean } = plot.columns[k], px = plotToX(plot, columnX[i]), py = plotToY(plot, (mean ?? y)[i]), dot = plot.points.children[place];
    dot.hidden = !(px >= -1 && px <= width + 1 && py >= -1 && py <= height + 1);
    if (!dot.hidden) dot.style.transform = `translate(${left + px}px, ${top + py}px)`;
    dot.style.background = plot.styles[k].colour;
  });
}

// What is said of one line at one of its points. `brief`: of many lines, only the number that is drawn.
function valueAt(plot, { k, i }, x, brief) {
  const { of, y, mean, steps, low, high, x: at } = plot.columns[k], isPercent = plot.figure.y.percent;
  const more = [];
  if (!brief && low && low[i] === low[i]) more.push(text("plots.interval", { low: valueText(low[i], isPercent), high: valueText(high[i], isPercent) }));
  if (!brief && mean) more.push(text("plots.smoothed", { value: valueText(mean[i], isPercent) }));
  if (steps && (plotsChosen.axis !== "step" || at[i] !== x)) more.push(text("plots.of_step", { step: format(steps[i]) }));
  if (plot.kind === "dots") more.push(text("plots.at_x", { x: format(at[i]), title: say(plot.figure.x.title) }), of.tips?.[i] ?? "", of.flags?.[i] ? text("plots.clipped") : "");
  if (plot.kind === "bars" && of.tips?.[i]) more.push(of.tips[i]);
  return { name: plot.styles[k].name(), value: valueText((brief && mean ? mean : y)[i], isPercent), more: more.filter(Boolean).join(text("core.comma")) };
}

function headOf(plot, x) {
  if (plot.kind === "bars") return `${say(plot.figure.x.title)}${text("core.colon")}${plot.figure.bins[x] ?? ""}`;
  if (plot.kind !== "lines") return plot.kind === "dots" ? say(plot.figure.y.title) : `${say(plot.figure.x.title)}${text("core.colon")}${format(x)}`;
  return text(`plots.head_${plotsChosen.axis}`, { value: format(plotsChosen.axis === "seconds" ? x / plot.xUnit.size : Math.round(x)), unit: text(`plots.unit_${plot.xUnit.key ?? "seconds"}`) });
}

function fillTip(plot, rows, area) {
  const x = plotsPointed.at, shown = [...rows.keys()];
  const most = Math.min(24, Math.floor((innerHeight - 90) / 19.5)), columns = Math.max(1, Math.min(2, Math.floor(innerWidth / 500), Math.ceil(rows.get(plot).length / 16)));
  const brief = rows.get(plot).length > BRIEF_ROWS, means = brief && plotsChosen.window > 1 && plot.kind === "lines";
  const tips = [{ kind: "tip-head", said: means ? text("plots.head_smoothed", { head: headOf(plot, x) }) : headOf(plot, x) }];
  for (const { text: noted, x: at } of plot.marks) if (Math.abs(plotToX(plot, at) - plotToX(plot, x)) < 6) tips.push({ kind: "tip-mark", said: noted });
  for (const one of shown) {
    const found = rows.get(one);
    if (found.length && shown.length > 1) tips.push({ kind: "tip-title", said: say(one.figure.title) });
    for (const row of found.slice(0, most * columns)) {
      const { name, value, more } = valueAt(one, row, x, brief), who = name === say(one.figure.title) && shown.length > 1 ? "" : name;
      tips.push({ kind: "tip-row", value, said: [who, one === plot ? more : ""].filter(Boolean).join(text("core.comma")), swatch: [one.kind, one.styles[row.k]], own: one === plot });
    }
    if (found.length > most * columns) tips.push({ kind: "tip-title", said: text("plots.more", { count: found.length - most * columns }) });
  }
  plotTip.style.columnCount = String(columns);
  plotTip.hidden = area.bottom < 0 || area.top > innerHeight;
  placeTip(plot, area, tips);
  if (plotsPointed.keyed) {
    plot.area.setAttribute("aria-valuetext", tips.filter(({ kind, own }) => kind !== "tip-title" && own !== false).slice(0, 12).map(({ said, value }) => [value, said].filter(Boolean).join(" ")).join(text("core.comma")));
    plot.area.setAttribute("aria-valuemin", String(plot.range.x[0]));
    plot.area.setAttribute("aria-valuemax", String(plot.range.x[1]));
    plot.area.setAttribute("aria-valuenow", String(x));
  }
}

// The lines of the tooltip, in elements that are used again: they change with every movement of the pointer.
function showTips(tips) {
  while (plotTip.children.length > tips.length) plotTip.lastChild.remove();
  tips.forEach(({ kind, said, value, swatch }, i) => {
    let element = plotTip.children[i];
    if (element?.className !== kind) {
      const made = kind === "tip-row" ? make("div", { class: kind }, make("i", {}), make("b", {}), " ", make("span", {})) : make("div", { class: kind });
      if (element) element.replaceWith(made);
      else plotTip.append(made);
      element = made;
    }
    if (kind !== "tip-row") { element.textContent = said; return; }
    const [mark, number, rest] = element.children, look = `${swatch[0]} ${swatch[1].colour} ${swatch[1].dash} ${swatch[1].shade}`;
    if (mark.dataset.look !== look) {
      mark.dataset.look = look;
      mark.replaceChildren(lineSwatch(swatch[0], swatch[1].colour, swatch[1].dash, swatch[1].shade));
    }
    number.textContent = value;
    rest.textContent = said;
  });
}

// Beside the crosshair on the side that has more space; in a narrow window above or below the plot, where there is more.
const NARROW = 800, TIP_EDGE = 8;
function placeTip(plot, area, tips) {
  const narrow = innerWidth < NARROW, top = area.top + plot.box.top, bottom = area.bottom + 4;
  const over = narrow && top - TIP_EDGE > innerHeight - bottom, space = !narrow ? innerHeight : over ? top - TIP_EDGE : innerHeight - bottom;
  const height = fitTips(plot, tips, Math.max(120, space - 2 * TIP_EDGE));
  const at = area.left + plot.box.left + plotToX(plot, plotsPointed.at), right = at < innerWidth / 2;
  const wanted = !narrow ? top + (plotsPointed.y ?? plot.box.height / 3) - height / 2 : over ? top - height - TIP_EDGE : bottom;
  const x = narrow ? `${TIP_EDGE}px` : right ? `min(${at + 16}px, 100vw - ${TIP_EDGE}px - 100%)` : `max(${TIP_EDGE}px, ${at - 16}px - 100%)`;
  plotTip.style.transform = `translate(${x}, ${Math.max(TIP_EDGE, Math.min(innerHeight - height - TIP_EDGE, wanted))}px)`;
}
// Show as many lines of the tooltip as there is space for; returns its height. It is measured only when it gets another number of lines
// or another space: the browser would lay out the page for it.
const tipFits = new Map();
function fitTips(plot, tips, space) {
  const key = `${plot.id} ${tips.length} ${innerWidth} ${Math.round(space / 20)} ${page.language}`;
  if (!tipFits.has(key)) {
    let count = tips.length;
    for (showTips(tips); plotTip.offsetHeight > space && count > 2; showTips(cutTips(tips, count))) count -= Math.max(1, Math.floor(count / 8));
    tipFits.set(key, { count, height: plotTip.offsetHeight });
  }
  const { count, height } = tipFits.get(key);
  showTips(cutTips(tips, count));
  return height;
}
function cutTips(tips, count) {
  if (count >= tips.length) return tips;
  const left = tips.slice(count).filter(({ kind }) => kind === "tip-row").length, kept = tips.slice(0, count);
  while (kept.length > 1 && kept.at(-1).kind === "tip-title") kept.pop();
  return [...kept, { kind: "tip-title", said: text("plots.more", { count: left }) }];
}
