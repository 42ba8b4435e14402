// Mathematics as text, and one plot as SVG.

function make(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "circle", "text"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// Text with $mathematics$ as nodes: single letters italic, _{} and ^{} as subscripts and superscripts. Short formulas stay on one line.
const typeset = (text) => text.split("$").flatMap((part, i) => (i % 2 ? [make("span", { class: part.length < 34 ? "math whole" : "math" }, ...mathematics(part))] : part ? [part] : []));
function mathematics(text) {
  const parts = text.matchAll(/_\{([^}]*)\}|\^\{([^}]*)\}|(\p{Script=Greek}|[A-Za-z]+)|([^_^A-Za-z\p{Script=Greek}]+)/gu);
  return [...parts].map(([, lower, upper, letters, rest]) => {
    if (lower !== undefined) return make("sub", {}, ...mathematics(lower));
    if (upper !== undefined) return make("sup", {}, ...mathematics(upper));
    return letters?.length === 1 ? make("i", {}, letters) : (letters ?? rest);
  });
}
// The same for names that cannot hold elements.
const plain = (text) => text.replaceAll("$", "").replace(/([_^])\{([^}]*)\}/g, "$1$2");

// Points of a function. At each break there is a point on either side, and a gap where the function jumps.
function along(from, to, f, breaks = [], count = 240) {
  const inner = breaks.filter((x) => x > from && x < to).sort((a, b) => a - b);
  const points = [];
  const add = (x) => points.push([x, f(x)]);
  [from, ...inner].forEach((start, i) => {
    const end = inner[i] ?? to, gap = 1e-9 * Math.max(1, Math.abs(end));
    for (let k = 0; k < count; k += 1) add(start + ((end - start) * k) / count + (k === 0 && i > 0 ? gap : 0));
    add(i < inner.length ? end - gap : end);
    if (i < inner.length && Math.abs(f(end - gap) - f(end + gap)) > 1e-6) points.push([end, NaN]);
  });
  return points;
}

// The pieces of a line that lie inside a rectangle (Liang and Barsky's clipping of each segment).
function inside(points, [x0, x1], [y0, y1]) {
  const pieces = [];
  for (let k = 0; k + 1 < points.length; k += 1) {
    const [[ax, ay], [bx, by]] = [points[k], points[k + 1]];
    if (![ax, ay, bx, by].every(Number.isFinite)) continue;
    let enter = 0, leave = 1;
    for (const [at, slope, low, high] of [[ax, bx - ax, x0, x1], [ay, by - ay, y0, y1]]) {
      if (slope === 0) { if (at < low || at > high) leave = -1; continue; }
      const [first, second] = [(low - at) / slope, (high - at) / slope].sort((a, b) => a - b);
      enter = Math.max(enter, first);
      leave = Math.min(leave, second);
    }
    if (enter > leave) continue;
    const at = (t) => [ax + t * (bx - ax), ay + t * (by - ay)];
    const last = pieces.at(-1);
    if (last && enter === 0 && last.end === k) { last.points.push(at(leave)); last.end = leave === 1 ? k + 1 : -1; }
    else pieces.push({ points: [at(enter), at(leave)], end: leave === 1 ? k + 1 : -1 });
  }
  return pieces.map((piece) => piece.points);
}

// An interval that holds the values of the curves, with a margin.
function around(curves, ...others) {
  const values = [...curves.flatMap((curve) => curve.points.map(([, y]) => y)), ...others].filter(Number.isFinite);
  const low = Math.min(...values), high = Math.max(...values), margin = 0.06 * (high - low) || 1;
  return [low - margin, high + margin];
}

// What the legend shows of a curve: a piece of it.
function swatch(style) {
  const mark = style === "dot" ? make("circle", { class: "dot", cx: 17, cy: 6, r: 4 }) : make("line", { class: `curve ${style}`, x1: 1, x2: 33, y1: 6, y2: 6 });
  return make("svg", { class: "swatch", width: 34, height: 12, "aria-hidden": "true" }, mark);
}

// Draw a plot: {x, y: [from, to], integer, curves, dots, markers, verticals, zero}. Returns the x of a horizontal position in it.
function drawPlot(svg, plot, width) {
  const height = Math.round(Math.min(400, Math.max(240, width * 0.56)));
  const [x0, x1] = plot.x, [y0, y1] = plot.y;
  const rows = ticks(y0, y1, height / 55), columns = ticks(x0, x1, width / (plot.integer ? 45 : 95), plot.integer);
  const left = 14 + 8 * Math.max(...rows.map((row) => row.label.length)), right = 30, top = 10, bottom = 26;
  const sx = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right);
  const sy = (y) => height - bottom - ((y - y0) / (y1 - y0)) * (height - top - bottom);
  const holds = ([x, y]) => x >= x0 && x <= x1 && y >= y0 && y <= y1;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  Object.assign(svg.dataset, { x0, x1, y0, y1, left, right, top, bottom, width, height });
  const parts = [];
  for (const { at, label } of columns) {
    parts.push(make("line", { class: "axis", x1: sx(at), x2: sx(at), y1: sy(y0), y2: sy(y1) }), make("text", { x: sx(at), y: height - 8, "text-anchor": "middle" }, label));
  }
  for (const { at, label } of rows) {
    const grid = make("line", { class: at === 0 && y0 < 0 ? "axis zero" : "axis", x1: sx(x0), x2: sx(x1), y1: sy(at), y2: sy(at) });
    parts.push(grid, make("text", { x: left - 7, y: sy(at) + 4.5, "text-anchor": "end" }, label));
  }
  const circle = (kind, [x, y], r) => make("circle", { class: kind, cx: sx(x), cy: sy(y), r });
  parts.push(...(plot.dots ?? []).filter(holds).map((dot) => circle("dot", dot, 3)));
  for (const x of (plot.verticals ?? []).filter((x) => x > x0 && x < x1)) parts.push(make("line", { class: "curve c3 dotted", x1: sx(x), x2: sx(x), y1: sy(y0), y2: sy(y1) }));
  for (const curve of plot.curves) {
    const d = inside(curve.points, plot.x, plot.y).map((piece) => `M${piece.map(([x, y]) => `${sx(x).toFixed(2)},${sy(y).toFixed(2)}`).join("L")}`).join("");
    parts.push(make("path", { class: `curve ${curve.style}`, d }));
    if (curve.dotted) parts.push(...curve.points.filter(holds).map((point) => circle(`point ${curve.style}`, point, 4)));
  }
  parts.push(...(plot.markers ?? []).filter(holds).map((marker) => circle("marker", marker, 6)));
  svg.replaceChildren(...parts);
  return (px) => x0 + ((px - left) / (width - left - right)) * (x1 - x0);
}
