// How lines, bars and dots are drawn on the canvas of uPlot, which keeps its size and scales and draws the axes. They are not series of
// uPlot: those share one column of x, and many lines would be clipped one by one, which takes most of the time.

// A function from values to pixels of the canvas along one axis, kept within what a canvas can hold.
function toPixels(u, key) {
  const { min, max, distr } = u.scales[key], { left, top, width, height } = u.bbox, log = distr === 3;
  const from = log ? Math.log10(min) : min, factor = 1 / ((log ? Math.log10(max) : max) - from || 1);
  const start = key === "x" ? left : top + height, length = key === "x" ? width : -height;
  return (value) => {
    const at = start + ((log ? Math.log10(value) : value) - from) * factor * length;
    return at < -30000 ? -30000 : at > 30000 ? 30000 : at;
  };
}

// A line as a path: of all points in one column of pixels the first, lowest, highest and last. `lone` gets the points that have no
// neighbour, or every point where there are few.
function tracePath(u, x, y, lone) {
  const path = new Path2D(), toX = toPixels(u, "x"), toY = toPixels(u, "y"), log = u.scales.y.distr === 3, ratio = uPlot.pxRatio;
  const from = Math.max(0, placeOf(x, u.scales.x.min) - 1), to = Math.min(x.length - 1, placeOf(x, u.scales.x.max));
  const bucket = to - from > u.bbox.width ? 0.5 : 1;  // columns of two pixels where there are more points than pixels
  const dotted = lone && to > from && toX(x[to]) - toX(x[from]) > (to - from) * 14 * ratio;
  let pen = false, column = NaN, before = 0, first = 0, low = 0, high = 0, last = 0, count = 0, run = 0;
  const flush = (ends) => {
    if (count > 0) {
      if (pen) path.lineTo(before, first);
      else path.moveTo(before, first);
      if (count > 1) {
        path.lineTo(before, low);
        path.lineTo(before, high);
        path.lineTo(before, last);
      }
      pen = true;
      if (lone && (dotted || (ends && run === 1))) addDot(lone, before, last, 2.6 * ratio);
    }
    count = 0;
  };
  for (let i = from; i <= to; i += 1) {
    const value = y[i];
    if (value !== value || (log && value <= 0)) {
      flush(true);
      pen = false;
      run = 0;
      continue;
    }
    run += 1;
    const at = toX(x[i]), height = toY(value), pixel = Math.round(at * bucket);
    if (count > 0 && pixel === column && !dotted) {
      if (height < low) low = height;
      if (height > high) high = height;
      last = height;
      count += 1;
    } else {
      flush(false);
      column = pixel;
      before = at;
      first = low = high = last = height;
      count = 1;
    }
  }
  flush(true);
  return path;
}
function addDot(path, x, y, radius) {
  path.moveTo(x + radius, y);
  path.arc(x, y, radius, 0, 2 * Math.PI);
}

// What lies between the lower and the upper ends of intervals, a polygon for each stretch without a gap, and a bar where that is one
// point. A logarithmic axis cannot show an interval that reaches 0: it has a gap there.
function bandPath(u, x, low, high) {
  const path = new Path2D(), toX = toPixels(u, "x"), toY = toPixels(u, "y"), log = u.scales.y.distr === 3;
  const from = Math.max(0, placeOf(x, u.scales.x.min) - 1), to = Math.min(x.length - 1, placeOf(x, u.scales.x.max));
  const holds = (i) => low[i] === low[i] && high[i] === high[i] && !(log && low[i] <= 0);
  for (let i = from; i <= to; i += 1) {
    if (!holds(i)) continue;
    let end = i;
    while (end < to && holds(end + 1)) end += 1;
    if (end === i) {
      const half = 3 * uPlot.pxRatio;
      path.rect(toX(x[i]) - half, toY(high[i]), 2 * half, toY(low[i]) - toY(high[i]));
      continue;
    }
    for (let k = i; k <= end; k += 1) path[k === i ? "moveTo" : "lineTo"](toX(x[k]), toY(high[k]));
    for (let k = end; k >= i; k -= 1) path.lineTo(toX(x[k]), toY(low[k]));
    path.closePath();
    i = end;
  }
  return path;
}

// Bars of one of several series, side by side at each place.
function barsPath(u, { x, y }, place, of) {
  const path = new Path2D(), toX = toPixels(u, "x"), toY = toPixels(u, "y"), ground = u.bbox.top + u.bbox.height;
  const wide = (toX(1) - toX(0)) * 0.8, each = wide / of, gap = each > 6 ? 1 : 0;
  for (let i = 0; i < x.length; i += 1) {
    if (!(y[i] > 0)) continue;
    const left = toX(x[i]) - wide / 2 + place * each;
    path.rect(left + gap, toY(y[i]), Math.max(1, each - 2 * gap), ground - toY(y[i]));
  }
  return path;
}

function dotsPath(u, { of, x, y }, flagged) {
  const path = new Path2D(), toX = toPixels(u, "x"), toY = toPixels(u, "y"), radius = 2.4 * uPlot.pxRatio;
  for (let i = 0; i < x.length; i += 1) if (Boolean(of.flags?.[i]) === flagged && y[i] === y[i]) addDot(path, toX(x[i]), toY(y[i]), radius);
  return path;
}

// Draw what the figure shows into the plot of uPlot: first what lies behind (intervals, what is smoothed), then the lines. While it
// moves and the machine cannot keep up, thin lines without intervals do.
function drawLines(plot, u) {
  const { ctx, bbox } = u, ratio = uPlot.pxRatio, shown = plot.columns.map((_, k) => k).filter((k) => plot.shown[k]), hasty = plotsChosen.hasty;
  ctx.save();
  ctx.beginPath();
  const beyond = plot.kind === "lines" && groupsOf.get(plot.group).zoom ? 0 : 4 * ratio;  // the first and the last point are whole
  ctx.rect(Math.round(bbox.left - beyond), Math.round(bbox.top - 2 * ratio), Math.round(bbox.width + 2 * beyond), Math.round(bbox.height + 3 * ratio));
  ctx.clip();
  ctx.lineJoin = "bevel";
  const faint = (k) => plot.faded !== null && !plot.styles[k].keys.includes(plot.faded);
  const brush = (k, alpha, width, dash) => {
    ctx.strokeStyle = ctx.fillStyle = canvasColour(plot.styles[k].colour);
    ctx.globalAlpha = alpha * (faint(k) ? 0.15 : 1);
    ctx.lineWidth = width * ratio;
    ctx.setLineDash(dash.map((length) => length * ratio));
  };
  if (plot.kind === "bars" || plot.kind === "dots") for (const [place, k] of shown.entries()) plot.kind === "bars" ? drawBars(plot, u, k, place, shown.length, brush) : drawDots(plot, u, k, brush);
  else {
    for (const k of hasty ? [] : shown) {
      const { x, y, low, high, mean } = plot.columns[k];
      brush(k, 0.2, 1, []);
      if (low && high) ctx.fill(bandPath(u, x, low, high));
      if (mean) ctx.stroke(tracePath(u, x, y, null));
    }
    for (const k of shown) {
      const { x, y, mean, of } = plot.columns[k], lone = hasty ? null : new Path2D(), width = hasty ? 1 : of.run && shown.length > 6 ? 1.3 : 2;
      (hasty ? [] : plot.covered[k] ?? []).forEach((values, more) => {
        brush(k, 0.4, width + 3 + 2 * more, []);
        ctx.stroke(tracePath(u, x, values, null));
      });
      brush(k, 1, width, plot.styles[k].dash);
      ctx.stroke(tracePath(u, x, mean ?? y, lone));
      if (lone) ctx.fill(lone);
    }
  }
  ctx.restore();
}
function drawBars(plot, u, k, place, of, brush) {
  const bars = barsPath(u, plot.columns[k], place, of);
  brush(k, barOpacity(plot.styles[k].shade), 1, []);
  u.ctx.fill(bars);
}
function drawDots(plot, u, k, brush) {
  brush(k, 0.45, 1.5, []);
  u.ctx.fill(dotsPath(u, plot.columns[k], false));
  brush(k, 1, 1.5, []);
  u.ctx.stroke(dotsPath(u, plot.columns[k], true));
}

// Vertical lines where something was noted, behind the lines.
function drawMarks(plot, u) {
  const { ctx, bbox } = u, toX = toPixels(u, "x");
  if (!plot.marks.length) return;
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  ctx.strokeStyle = canvasColour("var(--watch)");
  ctx.lineWidth = 1.5 * uPlot.pxRatio;
  ctx.setLineDash([3 * uPlot.pxRatio, 3 * uPlot.pxRatio]);
  ctx.beginPath();
  for (const { x } of plot.marks) {
    ctx.moveTo(toX(x), bbox.top);
    ctx.lineTo(toX(x), bbox.top + bbox.height);
  }
  ctx.stroke();
  ctx.restore();
}

// Ticks of an axis, and labels that neither touch one another nor are cut off.
const measuring = document.createElement("canvas").getContext("2d");
const axisFont = () => `13px ${getComputedStyle(document.body).fontFamily}`;
function widthOf(label) {
  measuring.font = plotsFont.value;
  return measuring.measureText(label).width;
}
const plotsFont = { value: "13px sans-serif" };

function linearTicks(from, to, count, whole, isPercent) {
  if (isPercent) return ticks(100 * from, 100 * to, count).map(({ at, label }) => ({ at: at / 100, label: `${label}%` }));
  const most = Math.max(Math.abs(from), Math.abs(to));
  if (most >= 1e6 || most < 1e-3) {
    const power = Math.floor(Math.log10(most)), size = 10 ** power;
    return ticks(from / size, to / size, count).map(({ at, label }) => ({ at: at * size, label: at === 0 ? "0" : `${label}×10${raised(String(power))}` }));
  }
  return ticks(from, to, count, whole);
}

function axisTicks(plot, key, from, to, length) {
  const { percent: isPercent, log } = key === "x" ? plot.xAxis : plot.yAxis;
  if (key === "x" && plot.kind === "bars") return plot.figure.bins.map((label, at) => ({ at, label }));
  if (key === "y") return log ? logTicks(from, to, length, 24, isPercent) : linearTicks(from, to, length / 38, false, isPercent);
  const size = plot.xUnit.size, whole = plot.xAxis.whole;
  for (let count = length / 60; count > 1; count *= 0.8) {
    const found = log ? logTicks(from, to, length, length / count, isPercent) : linearTicks(from / size, to / size, count, whole, isPercent);
    const scale = (at) => (log ? (Math.log10(at / from) / Math.log10(to / from)) * length : ((at * size - from) / (to - from)) * length);
    const fits = found.every(({ at, label }, i) => i === 0 || scale(at) - scale(found[i - 1].at) > (widthOf(label) + widthOf(found[i - 1].label)) / 2 + 12);
    if (fits) return found.map(({ at, label }) => ({ at: at * size, label: scale(at) + widthOf(label) / 2 > length + EDGE - 1 ? "" : label }));
  }
  return [];
}
const EDGE = 32;  // pixels to the right of a plot

// The options of uPlot for a figure: its axes with ticks, no cursor or legend of its own.
function uplotOptions(plot, width, height) {
  const axis = (key) => ({
    scale: key, side: key === "x" ? 2 : 3, font: plotsFont.value, stroke: () => canvasColour("var(--soft)"), gap: key === "x" && plot.turned ? 10 : 6,
    grid: { stroke: () => canvasColour("var(--line)"), width: 1, show: key === "y" || plot.kind !== "bars" }, ticks: { show: false },
    space: 20,
    splits: (u, i, from, to) => {
      const length = (key === "x" ? u.bbox.width : u.bbox.height) / uPlot.pxRatio || (key === "x" ? width - 70 : height - 40);
      plot.ticks[key] = axisTicks(plot, key, from, to, length);
      return plot.ticks[key].map(({ at }) => at);
    },
    filter: (u, splits) => splits,
    values: () => plot.ticks[key].map(({ label }) => label),
    size: (u, labels) => {
      if (!labels) return 40;
      const widest = Math.max(0, ...labels.map(widthOf));
      if (key === "y") return Math.ceil(widest) + 12;
      return plot.turned ? Math.ceil(widest * Math.SQRT1_2) + 28 : 28;
    },
    rotate: key === "x" && plot.turned ? 45 : 0,
  });
  const scale = (key) => ({ time: false, auto: false, range: (u, low, high) => [low, high], ...((key === "x" ? plot.xAxis : plot.yAxis).log ? { distr: 3, log: 10 } : { distr: 1 }) });
  return {
    width, height, padding: [10, EDGE, 0, 0], pxAlign: 0, legend: { show: false }, cursor: { show: false }, focus: { alpha: 1 },
    scales: { x: scale("x"), y: scale("y") }, axes: [axis("x"), axis("y")], series: [{}],
    hooks: { drawAxes: [(u) => drawMarks(plot, u)], draw: [(u) => drawLines(plot, u)] },
  };
}
