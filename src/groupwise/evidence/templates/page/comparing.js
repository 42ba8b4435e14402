// Pairs of settings: which is better by more than seeds explain, with the interval of each difference drawn.

const FEW_UNKNOWN = 3; // More pairs without a verdict are folded away.

// The scale of each measure's intervals, the same for all pairs, with zero in it.
function scalesOfComparisons(comparisons) {
  const scales = {};
  for (const { measure, low, high } of comparisons.filter((item) => item.low !== null)) {
    const scale = (scales[measure] ??= { from: 0, to: 0 });
    scale.from = Math.min(scale.from, low);
    scale.to = Math.max(scale.to, high);
  }
  return scales;
}

// The text below says the same, so this is hidden from screen readers.
function drawnInterval({ low, middle, high }, scale) {
  if (low === null || !(scale.to > scale.from)) return make("span", { class: "compared-interval" });
  const at = (value) => `${2 + (96 * (value - scale.from)) / (scale.to - scale.from)}%`;
  const place = (name, from, to) => {
    const part = make("span", { class: name });
    part.style.left = at(from);
    if (to !== undefined) part.style.right = `calc(100% - ${at(to)})`;
    return part;
  };
  return make("span", { class: "compared-interval", "aria-hidden": "true" }, place("zero", 0), place("whisker", low, high), place("middle", middle));
}

function comparisonRow(item, scales) {
  const label = text(`comparing.measures.${item.measure}`, { measure: say(page.data.measure) });
  return make("div", { class: `compared ${item.verdict}` },
    make("div", { class: "compared-facts" }, make("span", { class: "compared-verdict" }, text(`comparing.verdicts.${item.verdict}`)),
      make("span", {}, label), make("span", { class: "compared-change" }, say(item.difference)), drawnInterval(item, scales[item.measure])),
    make("p", {}, say(item.text)));
}

// "B against A", with the colours of the settings, in the order of the language.
function pairHeading(first, second) {
  const parts = text("comparing.pair", { first: "\u0001", second: "\u0002" }).split(/(\u0001|\u0002)/);
  return make("h3", {}, ...parts.map((part) => (part === "\u0001" ? settingLabel(first) : part === "\u0002" ? settingLabel(second) : part)));
}

function comparedPairs(comparisons, scales) {
  const pairs = new Map();
  for (const item of comparisons) pairs.set(`${item.first} ${item.second}`, [...(pairs.get(`${item.first} ${item.second}`) ?? []), item]);
  return [...pairs.values()].map((items) => make("article", { class: "compared-pair" }, pairHeading(items[0].first, items[0].second), ...items.map((item) => comparisonRow(item, scales))));
}

const unknownShown = { open: false };
section("comparing", "comparing.heading", ["comparisons", "settings", "measure"], () => {
  const every = page.data.comparisons;
  if (!every.length) return null;
  const scales = scalesOfComparisons(every), known = every.filter((item) => item.verdict !== "unknown"), unknown = every.filter((item) => item.verdict === "unknown");
  const note = known.length ? make("p", { class: "soft" }, text("comparing.note")) : null;
  if (unknown.length <= FEW_UNKNOWN) return [note, ...comparedPairs(every, scales)];
  const summary = make("summary", { "data-key": "unknown" }, text("comparing.undecided", { count: unknown.length }));
  const folded = make("details", { open: unknownShown.open, ontoggle: (event) => { unknownShown.open = event.target.open; } }, summary, ...comparedPairs(unknown, scales));
  return [note, ...comparedPairs(known, scales), folded];
});
