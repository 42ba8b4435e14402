// Colours, strokes and numbers of the figures: what stands for what.

const LINE_COLOURS = 10;
const strokeDashes = [[], [7, 4], [2, 3], [11, 3, 2, 3], [15, 5], [5, 2, 1, 2]];
const colourPlaces = new Map();

// The colour of a setting as CSS, the same as long as the page is open. After all colours come darker and lighter ones.
function settingColour(id) {
  for (const setting of page.data.settings) if (!colourPlaces.has(setting.id)) colourPlaces.set(setting.id, colourPlaces.size);
  return lineColour(colourPlaces.get(id) ?? 0);
}
function lineColour(place) {
  const colour = `var(--line-${place % LINE_COLOURS})`, lap = Math.floor(place / LINE_COLOURS) % 3;
  return lap === 0 ? colour : `color-mix(in oklab, ${colour} 55%, var(${lap === 1 ? "--ink" : "--card"}))`;
}

// CSS colours as a canvas takes them, found anew for each theme.
const canvasColours = new Map();
const colourProbe = make("span", { hidden: true });
function canvasColour(colour) {
  if (!canvasColours.has(colour)) {
    if (!colourProbe.isConnected) document.body.append(colourProbe);
    colourProbe.style.color = colour;
    canvasColours.set(colour, getComputedStyle(colourProbe).color);
  }
  return canvasColours.get(colour);
}

const settingName = (id) => page.data.settings.find((setting) => setting.id === id)?.name ?? "";
const runName = (id) => page.data.runs.find((run) => run.id === id)?.name ?? id;

// The lines or series of a figure.
const drawnIn = (figure) => (figure.kind === "lines" ? figure.lines : figure.series) ?? [];

// What colours of a figure stand for: settings, or the runs of one setting, or what is measured.
function colouredBy(figure) {
  if (page.data.settings.length > 1) return "setting";
  return figure.kind === "lines" && new Set(drawnIn(figure).map((line) => line.run)).size > 1 ? "run" : "label";
}

// Each line's colour, stroke, name and the keys of the legends that hide it.
function styled(figure, of) {
  const by = colouredBy(figure), metrics = metricsOf(figure), several = metrics.length > 1;
  const runs = page.data.runs.map((run) => run.id);
  const place = by === "run" ? Math.max(0, runs.indexOf(of.run)) : of.dash;
  const keys = [by === "setting" ? `setting ${of.setting}` : null, by === "run" ? `run ${of.run}` : null, several ? `label ${figure.id} ${of.dash}` : null];
  const who = by === "setting" ? (of.run ? runName(of.run) : settingName(of.setting)) : by === "run" ? runName(of.run) : "";
  return {
    colour: by === "setting" ? settingColour(of.setting) : lineColour(place),
    dash: by === "label" || !several ? [] : strokeDashes[of.dash % strokeDashes.length],
    shade: by === "label" || !several ? 0 : of.dash,
    keys: keys.filter((key) => key !== null),
    name: () => [who, several || !who ? say(of.label) : ""].filter(Boolean).join(" · "),
  };
}

// What a figure measures, each with its place.
function metricsOf(figure) {
  const found = new Map();
  for (const of of drawnIn(figure)) if (!found.has(of.dash)) found.set(of.dash, of.label);
  return [...found].map(([dash, label]) => ({ dash, label }));
}

// A piece of a line, a bar or a dot as a legend shows it.
function lineSwatch(kind, colour, dash, shade = 0) {
  const attributes = { class: "swatch", width: 34, height: 14, viewBox: "0 0 34 14", "aria-hidden": "true" };
  if (kind === "bars") return make("svg", attributes, make("rect", { x: 9, y: 1, width: 16, height: 12, style: `fill: ${colour}; fill-opacity: ${barOpacity(shade)}; stroke: ${colour}` }));
  if (kind === "dots") return make("svg", attributes, make("circle", { cx: 17, cy: 7, r: 4, style: `fill: ${colour}` }));
  if (kind === "over") return make("svg", attributes, ...[[9, 0.4], [2.5, 1]].map(([width, alpha]) => make("line", { x1: 1, x2: 33, y1: 7, y2: 7, style: `stroke: ${colour}; stroke-width: ${width}; stroke-opacity: ${alpha}` })));
  if (kind === "ring") return make("svg", attributes, make("circle", { cx: 17, cy: 7, r: 4, style: `fill: none; stroke: ${colour}; stroke-width: 2` }));
  if (kind === "band") return make("svg", attributes, make("rect", { x: 1, y: 1, width: 32, height: 12, style: `fill: ${colour}; fill-opacity: .25` }));
  return make("svg", attributes, make("line", { x1: 1, x2: 33, y1: 7, y2: 7, style: `stroke: ${colour}; stroke-width: 2.5; stroke-dasharray: ${dash.join(" ") || "none"}` }));
}
const barOpacity = (shade) => [1, 0.4, 0.15][shade % 3];

// The unit of a figure's numbers, which its axis has in parentheses, as it stands after a number.
function withUnit(figure, value) {
  const unit = figure.y.percent ? null : /[(（]([^()（）]+)[)）]$/.exec(say(figure.y.title))?.[1];
  if (!unit) return value;
  return `${value} ${value === "1" ? unit.replace(/^([a-z]{2,})s$/, "$1") : unit}`;
}

const valueText = (value, isPercent) => (isPercent ? percent(value) : format(value));

// Places of a logarithmic axis, with their labels: powers of ten, and 2 and 5 or 3 times those where there is room.
function logTicks(from, to, length, apart, isPercent = false) {
  if (isPercent) return logTicks(100 * from, 100 * to, length, apart).map(({ at, label }) => ({ at: at / 100, label: `${label}%` }));
  const decade = length / (Math.log10(to) - Math.log10(from)), every = Math.max(1, Math.ceil(apart / decade));
  const factors = decade * 0.3 > apart ? [1, 2, 5] : decade * 0.47 > apart ? [1, 3] : [1];
  if (to / from < 12) return ticks(from, to, length / (1.6 * apart)).filter(({ at }) => at > 0);
  const found = [], first = Math.floor(Math.log10(from));
  for (let power = Math.ceil(first / every) * every - every; 10 ** power <= to; power += every) {
    for (const factor of factors) {
      const at = Number(`${factor}e${power}`);
      if (at >= from * 0.999999 && at <= to * 1.000001) found.push({ at, label: power < -3 || power > 5 ? `${factor === 1 ? "" : `${factor}×`}10${raised(String(power))}` : format(at) });
    }
  }
  return found;
}

// Seconds in the unit that suits a length of time.
function timeUnit(seconds) {
  if (seconds < 600) return { key: "seconds", size: 1 };
  return seconds < 3 * 3600 ? { key: "minutes", size: 60 } : { key: "hours", size: 3600 };
}
