// Which completions can be read, and reading them: out of the report itself, or from the live page's server.

const isLive = "live" in root.dataset;
const STEPS_KEPT = 12; // steps that the live page keeps, so that going back and forth asks the server once
const SOURCES = ["tokens", "texts", "held_out"];
const recentSteps = new Map();
let storedSteps = null; // of the report: key -> StepToRead
let unpacking = null;

const stepKey = (run, step, source, first) => `${run} ${source} ${step} ${first}`;

// Unpack what the report holds, once.
function stored() {
  unpacking ??= unpacked("reading").then((steps) => {
    storedSteps = new Map(steps.map((step) => [stepKey(step.run, step.step, step.source, 0), step]));
  });
  return unpacking;
}

// The completions of a step from the group number `first` on, as a StepToRead. Throws an Error that says why there are none.
async function readStep(run, step, source, first = 0) {
  const key = stepKey(run, step, source, first);
  if (!isLive) {
    await stored();
    const found = storedSteps.get(key);
    if (!found) throw new Error(text("reader.missing"));
    return found;
  }
  const found = recentSteps.get(key) ?? (await fetchStep(run, step, source, first));
  recentSteps.delete(key);
  recentSteps.set(key, found);
  if (recentSteps.size > STEPS_KEPT) recentSteps.delete(recentSteps.keys().next().value);
  return found;
}
whenChanged((changed) => { if (changed.has("segments")) recentSteps.clear(); }); // a resume writes steps again

// The steps of a run that can be read here, as ascending pairs of a first and a last step.
function stepRanges(run, source) {
  if (isLive) {
    const known = page.data.runs.find((item) => item.id === run)?.readable[source] ?? [];
    return source === "texts" ? known : known.map((step) => [step, step]);
  }
  const steps = [...(storedSteps?.values() ?? [])].filter((item) => item.run === run && item.source === source);
  return steps.map((item) => item.step).sort((a, b) => a - b).map((step) => [step, step]);
}
const sourcesOf = (run) => SOURCES.filter((source) => stepRanges(run, source).length);

// Steps by their place among those of ranges.
const countSteps = (ranges) => ranges.reduce((sum, [first, last]) => sum + last - first + 1, 0);
function stepAt(ranges, place) {
  for (const [first, last] of ranges) {
    if (place <= last - first) return first + place;
    place -= last - first + 1;
  }
  return ranges.at(-1)?.[1] ?? 0;
}
// The place of the step nearest to one.
function placeInRanges(ranges, step) {
  let before = 0, best = 0, distance = Infinity;
  for (const [first, last] of ranges) {
    const near = Math.min(last, Math.max(first, step));
    if (Math.abs(near - step) < distance) [best, distance] = [before + near - first, Math.abs(near - step)];
    before += last - first + 1;
  }
  return best;
}

// What is searched in a completion, and its largest ratio; worked out once.
const completionFacts = new WeakMap();
function factsOf(completion) {
  let facts = completionFacts.get(completion);
  if (!facts) {
    const whole = completion.text.join("");
    let largest = null;
    for (const ratio of completion.ratio) {
      if (ratio > 0 && (largest === null || Math.abs(Math.log(ratio)) > Math.abs(Math.log(largest)))) largest = ratio;
    }
    facts = { text: lowered(whole), largest, length: completion.tokens ?? whole.length };
    completionFacts.set(completion, facts);
  }
  return facts;
}
// In lower case, unless that moves places: "İ" becomes two characters.
function lowered(string) {
  const lower = string.toLowerCase();
  return lower.length === string.length ? lower : string;
}

// What a group's completions are together: "right", "wrong", "mixed"; of a graded reward the mean reward, as a number; null: not known.
function verdictOf(group) {
  const judged = group.completions.filter((completion) => completion.correct !== null);
  if (judged.length) {
    const right = judged.filter((completion) => completion.correct).length;
    return right === judged.length ? "right" : right ? "mixed" : "wrong";
  }
  return meanReward(group);
}
function meanReward(group) {
  const rewards = group.completions.map((completion) => completion.reward).filter((reward) => reward !== null);
  return rewards.length ? rewards.reduce((sum, reward) => sum + reward, 0) / rewards.length : null;
}

// Groups of the two sides by problem: pairs of a group and the one with the same key; what one side alone has comes last, in turn.
function paired(groups, others) {
  const waiting = new Map();
  for (const group of others) waiting.set(group.key, [...(waiting.get(group.key) ?? []), group]);
  const pairs = groups.map((group) => [group, waiting.get(group.key)?.shift() ?? null]);
  const ours = pairs.filter((pair) => !pair[1]), theirs = [...waiting.values()].flat().map((group) => [null, group]);
  const alone = Array.from({ length: Math.max(ours.length, theirs.length) }, (_, i) => [ours[i], theirs[i]]).flat().filter(Boolean);
  return [...pairs.filter((pair) => pair[1]), ...alone];
}
