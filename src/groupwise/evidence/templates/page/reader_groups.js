// Prompts with their completions: which of them are shown, in which order, and how.

const SHOWN_COMPLETIONS = 4, SHOWN_PROMPT = 400, SHORT = 160; // SHORT: characters of completions that stand beside each other
const openedParts = new WeakMap(); // group or completion -> whether all of it is shown

// Whether a completion is to be shown.
function matches(completion, group, filters, query) {
  if (filters.wrong && completion.correct !== false) return false;
  if (filters.truncated && completion.stop !== "length") return false;
  return !query || factsOf(completion).text.includes(query) || lowered(group.prompt).includes(query) || lowered(group.answer).includes(query);
}

const byOrder = {
  ratio: (completion) => (factsOf(completion).largest ? Math.abs(Math.log(factsOf(completion).largest)) : -1),
  high: (completion) => completion.reward ?? -Infinity,
  low: (completion) => -(completion.reward ?? Infinity),
  long: (completion) => factsOf(completion).length,
};
// Completions of a group in an order: as recorded, those with the highest reward come first.
const inOrder = (completions, order) => {
  const rank = byOrder[order] ?? byOrder.high;
  return [...completions].sort((a, b) => rank(b) - rank(a) || a.row - b.row);
};

// Pairs of groups to show, each with its completions that match: [group, completions, other group, its completions].
function selected(pairs, filters, query, order, comparing) {
  const found = [];
  for (const [group, other] of pairs) {
    if (filters.changed && comparing && !(group && other && verdictOf(group) !== verdictOf(other))) continue;
    const [ours, theirs] = [group, other].map((one) => (one ? inOrder(one.completions.filter((item) => matches(item, one, filters, query)), order) : []));
    if (ours.length || theirs.length) found.push([group, ours, other, theirs]);
  }
  const rank = byOrder[order];
  const best = ([, ours, , theirs]) => Math.max(...[ours[0] ?? theirs[0]].map(rank));
  return rank ? found.sort((a, b) => best(b) - best(a)) : found;
}

// A prompt, and its completions of one side or of both beside each other.
function groupCard([group, ours, other, theirs], view) {
  if (!view.comparing) return make("article", { class: "group" }, problemOf(group, view), sideOf(group, ours, view));
  const columns = [[group, ours, "A"], [other, theirs, "B"]].filter(([one]) => one).map(([one, shown, side]) =>
    make("div", { class: "side" }, make("p", { class: "side-name" }, view.names[side]),
      shown.length ? sideOf(one, shown, view) : make("p", { class: "soft" }, text("reader.none_of_side"))));
  const alone = group && other ? null : make("p", { class: "soft" }, text("reader.other_side", { side: group ? "B" : "A" }));
  return make("article", { class: "group" }, problemOf(group ?? other, view), alone, make("div", { class: "sides" }, ...columns));
}

function problemOf(group, view) {
  const answer = make("p", { class: "answer" }, make("span", { class: "soft" }, `${text("reader.answer")} `), make("bdi", {}, group.answer));
  return make("div", {}, promptText(group, view), group.answer ? answer : null);
}

function promptText(group, view) {
  const long = group.prompt.length > 1.3 * SHOWN_PROMPT && !openedParts.get(group);
  const box = make("h3", { class: "prompt" }, make("bdi", {}, long ? `${group.prompt.slice(0, SHOWN_PROMPT)} …` : group.prompt));
  return long ? make("div", {}, box, opener(group, text("reader.whole_prompt"), view)) : box;
}

// A button that shows all of something.
function opener(thing, label, view) {
  return make("button", { type: "button", class: "more", onclick: () => { openedParts.set(thing, true); view.redraw(); } }, label);
}

// Completions that say the same and got the same, as lists, in the order of their first.
function alike(completions) {
  const found = new Map();
  for (const completion of completions) {
    const key = JSON.stringify([factsOf(completion).text, completion.reward, completion.correct, completion.stop]);
    found.set(key, [...(found.get(key) ?? []), completion]);
  }
  return [...found.values()];
}

function sideOf(group, shown, view) {
  const box = make("div", {}, group.all ? make("p", { class: "soft" }, groupFacts(group)) : null);
  const every = openedParts.get(group) ? shown.map((completion) => [completion]) : alike(shown);
  const all = openedParts.get(group) || every.length <= SHOWN_COMPLETIONS + 1;
  const half = SHOWN_COMPLETIONS / 2; // as recorded the best and the worst, in another order the first ones
  const part = view.order === "recorded" ? [...every.slice(0, half), ...every.slice(-half)] : every.slice(0, SHOWN_COMPLETIONS);
  const chosen = all ? every : part, short = chosen.every(([completion]) => factsOf(completion).text.length < SHORT);
  box.append(make("div", { class: short ? "completions short" : "completions" }, ...chosen.map((same) => completionCard(same[0], view, same.length))));
  if (chosen.length < shown.length) box.append(opener(group, text("reader.all_completions", { count: grouped(shown.length) }), view));
  return box;
}

function groupFacts(group) {
  const judged = group.completions.filter((completion) => completion.correct !== null), mean = meanReward(group);
  const facts = [];
  if (judged.length > 1) facts.push(text("reader.right_of", { right: judged.filter((completion) => completion.correct).length, all: judged.length }));
  if (mean !== null && group.completions.length > 1) facts.push(text("reader.mean_reward", { reward: brief(mean) }));
  return facts.join(" · ");
}

function completionCard(completion, view, count) {
  const whole = openedParts.get(completion) ?? false;
  let [body, cut] = completionText(completion, whole, view);
  if (cut && view.query && factsOf(completion).text.includes(view.query) && !body.querySelector("mark") && completion.text.length < 5000) {
    [body, cut] = completionText(completion, true, view); // what was found is beyond what would be shown
  }
  const card = make("div", { class: "completion" }, completionHead(completion, count), rewardParts(completion), body);
  const label = completion.advantage.length ? text("reader.whole_tokens", { count: grouped(completion.text.length) }) : text("reader.whole");
  if (cut) card.append(opener(completion, label, view));
  return card;
}

function completionHead(completion, count) {
  const { largest } = factsOf(completion), verdict = { true: "right", false: "wrong" }[completion.correct];
  const facts = [
    completion.reward === null ? text("reader.not_scored") : text("reader.reward", { reward: brief(completion.reward) }),
    completion.tokens === null ? null : text("reader.tokens", { count: grouped(completion.tokens) }),
    largest === null || largest === 1 ? null : text("reader.largest", { ratio: brief(largest) }),
  ];
  return make("p", { class: "facts" },
    count > 1 ? make("b", {}, text("reader.same", { count })) : null,
    verdict ? make("span", { class: `verdict ${verdict}` }, `${verdict === "right" ? "✓" : "✗"} ${text(`reader.verdicts.${verdict}`)}`) : null,
    ...facts.filter(Boolean).map((fact) => make("span", {}, fact)),
    completion.stop === "length" ? make("span", { class: "chip" }, text("reader.truncated")) : null);
}

// What the reward is the sum of, unless that is one thing.
function rewardParts(completion) {
  const parts = Object.entries(completion.parts);
  if (parts.length < 2) return null;
  const items = parts.map(([name, value]) => make("li", {}, make("bdi", {}, name), " ", make("b", {}, brief(value))));
  return make("ul", { class: "parts", "aria-label": text("reader.parts") }, ...items);
}
