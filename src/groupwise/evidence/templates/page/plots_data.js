// The numbers of a figure's lines as columns, on the x axis that is shown.

const xAxes = ["step", "completions", "seconds"];

function numbersOf(list) {
  const numbers = new Float64Array(list.length);
  for (let i = 0; i < numbers.length; i += 1) numbers[i] = list[i] ?? NaN;
  return numbers;
}

// The first place in an ascending column whose number is not below `value`.
function placeOf(column, value) {
  let from = 0, to = column.length;
  while (from < to) {
    const middle = (from + to) >> 1;
    if (column[middle] < value) from = middle + 1;
    else to = middle;
  }
  return from;
}

function nearestPlace(column, value) {
  const after = placeOf(column, value);
  if (after === 0) return 0;
  if (after === column.length) return after - 1;
  return value - column[after - 1] <= column[after] - value ? after - 1 : after;
}

// Steps as completions or seconds of a line's run, or in the mean of its setting, from nothing before the first step on; null: they are
// not known.
function onAxis(line, steps, axis) {
  if (axis === "step") return steps;
  const run = page.data.runs.find((one) => one.id === line?.run), setting = page.data.settings.find((one) => one.id === line?.setting);
  const clock = run?.clock ?? setting?.clock;
  if (!clock?.steps.length) return null;
  const known = clock.steps, at = clock[axis], column = new Float64Array(steps.length);
  for (let i = 0, k = 0; i < steps.length; i += 1) {
    while (k < known.length && known[k] < steps[i]) k += 1;
    const from = k === 0 ? 0 : known[k - 1], low = k === 0 ? 0 : at[k - 1];
    if (k === known.length) column[i] = at[k - 1];
    else column[i] = known[k] === from ? at[k] : low + ((at[k] - low) * (steps[i] - from)) / (known[k] - from);
  }
  return column;
}

// The mean over the points within half a window of steps on either side. The sum goes along with the window, and is summed anew now and
// then, and after a value left that was far greater than what stays: its rounding error would stay too.
function movingMean(steps, values, window) {
  const half = (window - 1) / 2, means = new Float64Array(values.length);
  let from = 0, to = 0, sum = 0, count = 0;
  for (let i = 0; i < values.length; i += 1) {
    let left = 0;
    for (; to < steps.length && steps[to] <= steps[i] + half; to += 1) if (values[to] === values[to]) { sum += values[to]; count += 1; }
    for (; steps[from] < steps[i] - half; from += 1) if (values[from] === values[from]) { sum -= values[from]; count -= 1; left = Math.max(left, Math.abs(values[from])); }
    if (i % 64 === 0 || left > 1000 * Math.abs(sum)) {
      sum = 0;
      for (let k = from; k < to; k += 1) if (values[k] === values[k]) sum += values[k];
    }
    means[i] = values[i] === values[i] ? sum / count : NaN;
  }
  return means;
}

// A line of a figure over training steps as columns; null: its x axis is not known.
function columnsOfLine(line, axis, window) {
  const steps = numbersOf(line.steps), x = onAxis(line, steps, axis), y = numbersOf(line.values);
  if (x === null) return null;
  return {
    of: line, steps, x, y, low: line.low ? numbersOf(line.low) : null, high: line.high ? numbersOf(line.high) : null,
    mean: window > 1 && line.values.length > 2 ? movingMean(steps, line.means ? numbersOf(line.means) : y, window) : null,
  };
}
const columnsOfSeries = (series) => ({ of: series, steps: null, x: numbersOf(series.x), y: numbersOf(series.y), low: null, high: null, mean: null });

// Lowest and highest y between two x, how many values a logarithmic axis leaves out, and how many ends of intervals; null: there is no value.
function yRange(all, from, to, log) {
  let low = Infinity, high = -Infinity, leftOut = 0, bandless = 0;
  for (const { x, y, low: lower, high: upper } of all) {
    const last = x[x.length - 1] < from || x[0] > to ? -1 : Math.min(x.length - 1, placeOf(x, to));
    for (let i = Math.max(0, placeOf(x, from) - 1); i <= last; i += 1) {
      const value = y[i];
      if (value !== value) continue;
      if (log && value <= 0) { leftOut += x[i] >= from && x[i] <= to ? 1 : 0; continue; }
      low = Math.min(low, value);
      high = Math.max(high, value);
      if (log && lower?.[i] <= 0) { bandless += 1; continue; }
      if (lower && lower[i] === lower[i]) low = Math.min(low, lower[i]);
      if (upper && upper[i] === upper[i]) high = Math.max(high, upper[i]);
    }
  }
  return low <= high ? { low, high, leftOut, bandless } : leftOut ? { low: 0.1, high: 1, leftOut, bandless } : null;
}

// Where each line is covered by lines that are drawn after it, within `near` of the height of the plot: its values at the points where
// one line covers it, and at those where several do, others being NaN; null: nowhere. Lines that cross are not covered.
const MOST_COMPARED = 60;
function coincidences(all, range, log, near) {
  if (all.length > MOST_COMPARED) return all.map(() => null);
  const scale = (value) => (log ? Math.log(value) : value), least = near * (scale(range.high) - scale(range.low) || 1);
  return all.map((lower, i) => {
    const counts = new Uint8Array(lower.x.length), y = lower.mean ?? lower.y;
    for (const upper of all.slice(i + 1)) cover(counts, lower.x, y, upper.x, upper.mean ?? upper.y, (a, b) => Math.abs(scale(a) - scale(b)) < least);
    const parts = [1, 2].map((count) => y.map((value, k) => (Math.min(2, counts[k]) === count ? value : NaN)));
    return counts.some((count) => count > 0) ? parts : null;
  });
}
// Count the points of a line that another one passes closely, of stretches that are not short.
function cover(counts, x, y, otherX, otherY, close) {
  const enough = Math.min(x.length, Math.max(2, x.length / 48));
  for (let i = 0, k = 0, run = 0; i <= x.length; i += 1) {
    while (k < otherX.length && otherX[k] < x[i]) k += 1;
    const known = i < x.length && k < otherX.length && (k > 0 || otherX[0] === x[i]);
    const share = known && otherX[k] > x[i] ? (x[i] - otherX[k - 1]) / (otherX[k] - otherX[k - 1]) : 1;
    const value = !known ? NaN : share === 1 ? otherY[k] : otherY[k - 1] + share * (otherY[k] - otherY[k - 1]);
    if (close(y[i], value)) run += 1;
    else {
      if (run >= enough) for (let back = i - run; back < i; back += 1) counts[back] += 1;
      run = 0;
    }
  }
}

// What a line does, in four points: first, last, lowest and highest, as places in its columns; null: it has no value.
function summaryOf({ y }) {
  let first = -1, last = -1, lowest = -1, highest = -1;
  for (let i = 0; i < y.length; i += 1) {
    if (y[i] !== y[i]) continue;
    if (first < 0) first = lowest = highest = i;
    last = i;
    if (y[i] < y[lowest]) lowest = i;
    if (y[i] > y[highest]) highest = i;
  }
  return first < 0 ? null : { first, last, lowest, highest };
}
