// Numbers as text.

const minus = (text) => text.replace("-", "−");
const raised = (digits) => [...digits].map((digit) => (digit === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit])).join("");

const formatters = new Map();
function rounded(x, key, options) {
  if (!formatters.has(key)) formatters.set(key, new Intl.NumberFormat("en-US", options));
  return formatters.get(key).format(x);
}

// A number with four significant digits, an integer whole.
function format(x, digits = 4) {
  if (Number.isNaN(x)) return "–";
  if (!Number.isFinite(x)) return x > 0 ? "∞" : "−∞";
  if (x !== 0 && (Math.abs(x) >= 1e6 || Math.abs(x) < 1e-4)) {
    const [factor, power] = x.toExponential(3).split("e");
    return minus(`${Number(factor)} × 10${raised(power.replace("+", ""))}`);
  }
  const most = Number.isInteger(x) ? 7 : digits;
  return minus(rounded(x, `most ${most}`, { maximumSignificantDigits: most }).replace(/^-0$/, "0"));
}
const percent = (x) => `${format(100 * x)}%`;

// Round positions in an interval, about `count` of them, with their labels.
function ticks(from, to, count, integer = false) {
  const rough = (to - from) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max([1, 2, 5, 10].find((factor) => factor * power >= 0.7 * rough) * power, integer ? 1 : 0);
  const places = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const found = [];
  for (let i = Math.ceil(from / step - 1e-9); i * step <= to + step * 1e-9; i += 1) {
    const label = rounded(i * step, `places ${places}`, { minimumFractionDigits: places, maximumFractionDigits: places });
    found.push({ at: i * step, label: minus(label.replace(/^-(?=[0.]+$)/, "")) });
  }
  return found;
}

