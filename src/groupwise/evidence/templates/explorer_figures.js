// The figures. Each is an object: its controls, made from a run's settings (empty without a run), and from the controls' values its
// plots, numbers and tables. Every number comes from `theory`, which is Python's module of that name, translated.

const choice = (id, options, value, when) => ({ kind: "choice", id, options, value: options.includes(value) ? value : options[0], own: value !== undefined && !options.includes(value) ? value : null, when });
const numbers = (id, value, most) => ({ kind: "numbers", id, value, most });
const checks = (id, options, value) => ({ kind: "checks", id, options, value });

// A slider; the range and the step are widened where a run's setting asks for it. One that is `open` has no limit at its end, where
// it stands without a value.
function slider(id, [min, max, step], value, { when, open } = {}) {
  const known = Number.isFinite(value) ? value : max;
  if (known < min) min = known;
  if (known > max) max = known * 1.25;
  const onGrid = () => Math.abs((known - min) / step - Math.round((known - min) / step)) < 1e-6;
  for (let tries = 0; tries < 6 && !onGrid(); tries += 1) step /= 10;
  return { kind: "slider", id, min, max: min + Math.ceil((max - min) / step - 1e-9) * step, step, value: known, when, open };
}
// A clip bound's: of GSPO's size where the run's is.
const epsilon = (id, value, options) => slider(id, value < 0.01 ? [value / 10, value * 10, value / 10] : [0.01, 1, 0.01], value, options);
// The settings of a run that bounds of this kind have; those of fixed bounds stand for a token's, or a sequence's ratio.
const clipOf = (s, bounds, ratio) => (s.bounds === bounds && (!ratio || (s.ratio === "token") === (ratio === "token")) ? s : {});

const tokensOf = (state) => state.run?.steps[state.step] ?? { p: [], ratio: [], weights: [], rewards: [] };
const pairs = (a, b) => a.map((value, i) => [value, b[i]]).filter(([, y]) => y !== null);

const reads = (names) => (v) => names.includes(v.surrogate);
const bounded = (v) => reads(["clip", "gmpo"])(v) && v.bounds !== "none";
function surrogateFigure(v) {
  const width = 5 * Math.max(v.clip_low, v.clip_high), narrow = bounded(v) && width < 0.1;
  const cap = v.surrogate === "cispo" ? v.cispo_cap : v.ratio_cap;
  const limit = { cispo: cap, dppo: 1 + v.divergence_limit / v.old }[v.surrogate] ?? 0;
  const end = Math.max(3, Math.min(1.2 * limit, 1.05 / v.old));
  const x = narrow ? [1 - width, 1 + width] : [0, end];
  const settings = { ...v, ratio_cap: cap, low: theory.lower_bound(bounded(v) ? v.bounds : "none", v.old, v.clip_low), high: theory.upper_bound(bounded(v) ? v.bounds : "none", v.old, v.clip_high, cap) };
  const from = (advantage) => (narrow ? theory.surrogate(v.surrogate, 1, v.old, advantage, settings)[0] : 0);
  const at = (ratio, advantage) => {
    const [objective, gradient] = theory.surrogate(v.surrogate, ratio, v.old, advantage, settings);
    return [objective - from(advantage), gradient];
  };
  const last = Math.min(x[1], 1 / v.old), ratio = Math.min(Math.max(v.ratio, x[0]), last);
  const breaks = [settings.low, settings.high, cap, v.dual_clip, 1 + v.divergence_limit / v.old, 1 - v.divergence_limit / v.old];
  const unclipped = (part) => [1, -1].map((a) => ({ name: a > 0 ? "unclipped" : null, style: "c4 dashed", points: x.map((r) => [r, a * (part === 0 && narrow ? r - 1 : r)]) }));
  const curves = (part) => [
    ...unclipped(part),
    ...[["positive", "c0", 1], ["negative", "c1", -1]].map(([name, style, advantage]) => ({ name, style, points: along(Math.max(x[0], 1e-3), last, (r) => at(r, advantage)[part], breaks) })),
  ];
  const verticals = [settings.low, settings.high].filter((bound) => bound > 0 && Number.isFinite(bound));
  const plots = ["objective", "gradient"].map((y, part) => {
    const drawn = curves(part);
    // log π falls without end towards a ratio of 0, so the range leaves out the first twentieth.
    const shown = drawn.map((curve) => ({ points: curve.points.filter(([r]) => r >= x[0] + 0.05 * (x[1] - x[0])) }));
    return { id: y, x, y: around(shown), labels: ["ratio", narrow && part === 0 ? "change" : y], curves: drawn, verticals, verticalsName: "limits", markers: [1, -1].map((a) => [ratio, at(ratio, a)[part]]) };
  });
  const numbersShown = [["at_positive", format(at(ratio, 1)[1])], ["at_negative", format(at(ratio, -1)[1])]];
  return { plots, readouts: bounded(v) ? [...numbersShown, ["bounds_at", verticals.map((bound) => format(bound, 6)).join(" … ")]] : numbersShown };
}

const noise = theory.normal_noise(2048);
function sequenceFigure(v) {
  const token = noise.slice(0, v.length).map((z) => v.bias + v.spread * z), sums = theory.running_sums(token);
  const last = sums.at(-1), mean = last / v.length, bound = Math.log(theory.upper_bound("fixed", 1, v.tokenClip, 1));
  const leaves = (log, epsilon) => Math.exp(log) > theory.upper_bound("fixed", 1, epsilon, 1) || Math.exp(log) < theory.lower_bound("fixed", 1, epsilon);
  const curves = [
    { name: "sum", style: "c0", points: sums.map((sum, i) => [i + 1, sum]) },
    { name: "mean", style: "c1", points: sums.map((sum, i) => [i + 1, sum / (i + 1)]) },
    { name: "bound", style: "c2 dashed", points: [[0, bound], [v.length, bound]] },
    { name: "typical", style: "c4 dashed", points: along(0, v.length, (t) => v.bias * t + v.spread * Math.sqrt(t)) },
  ];
  const shown = Math.ceil(v.length / 512);
  return {
    plots: [{ x: [0, v.length], y: around(curves), labels: ["x", "y"], curves, dots: token.map((x, i) => [i + 1, x]).filter((_, i) => i % shown === 0), dotsName: "tokens", markers: [[v.length, last]] }],
    readouts: [
      ["typical_sum", format(v.spread * Math.sqrt(v.length))],
      ["typical_mean", format(v.spread / Math.sqrt(v.length))],
      ["outside", percent(token.filter((x) => leaves(x, v.tokenClip)).length / v.length)],
      ["sequence_outside", leaves(mean, v.sequenceClip) ? { key: "all_clipped" } : { page: "no" }],
      ["token_product", format(theory.log10_product_bound(v.tokenClip, v.length))],
      ["sequence_product", format(10 ** theory.log10_product_bound(v.sequenceClip, v.length))],
    ],
  };
}

const ESTIMATORS = ["grpo", "dr_grpo", "rloo", "maxrl", "lite_ppo", "reinforce_pp", "dcpo", "gdpo"];
const LINES = ["c0", "c1 dashed", "c2 broken", "c3 dotted", "c5", "c6 dashed", "c7 broken", "c8 dotted"];
// Which of them a run's settings are; null: none.
function estimatorOf(s) {
  const group = s.center === "group" ? { group: "grpo", batch: "lite_ppo", mean: "maxrl", none: "dr_grpo" }[s.scale] : undefined;
  return { group, leave_one_out: "rloo", smoothed: "dcpo", decoupled: "gdpo", reward_to_go: "reinforce_pp" }[s.advantage] ?? null;
}
function advantagesFigure(v, state) {
  const different = [...new Set(v.rewards)].sort((a, b) => a - b), eps = state.settings.advantage_eps ?? 1e-6;
  const of = (name) => {
    const found = theory.group_estimate(v.rewards, v.rest, name, v.ddof === "ddof_1" ? 1 : 0, eps);
    return different.map((reward) => found[v.rewards.indexOf(reward)]);
  };
  const own = estimatorOf(state.settings);
  const all = ESTIMATORS.map((name, i) => ({ name, style: LINES[i], values: of(name) }));
  const curves = all.filter((curve) => v.shown.includes(curve.name)).map((curve) => ({ ...curve, dotted: true, points: different.map((reward, i) => [reward, curve.values[i]]) }));
  const margin = 0.08 * (different.at(-1) - different[0]) || 0.5;
  return {
    plots: [{ x: [different[0] - margin, different.at(-1) + margin], y: around([...curves, { points: [[0, 0]] }]), labels: ["x", "y"], curves }],
    readouts: [["mean", format(theory.mean(v.rewards))], ["deviation", format(theory.deviation(v.rewards, v.ddof === "ddof_1" ? 1 : 0))]],
    notes: [own ? ["own_estimator", { name: [own] }] : null, different.length === 1 ? ["zero_variance"] : null, state.rewardsOf === v.rewards ? ["of_run", { step: state.run.steps[state.step].step }] : null],
    table: {
      head: [["estimator"], ...different.map((reward) => ["column", { reward: format(reward), count: v.rewards.filter((r) => r === reward).length }])],
      rows: all.map((curve) => [[curve.name], ...curve.values.map((x) => format(x))]),
    },
  };
}

function turnsFigure(v, state) {
  const group = [v.first, v.second, v.third], most = Math.max(...group.map((rewards) => rewards.length));
  const credit = theory.turn_credit(group, v.estimator, v.gamma, state.settings.ddof ?? 1, state.settings.advantage_eps ?? 1e-6);
  const curves = credit.map((values, i) => ({ name: ["conversation", { number: i + 1 }], style: ["c0", "c1 dashed", "c2 broken"][i], points: values.flatMap((value, k) => [[k + 0.5, value], [k + 1.5, value]]) }));
  return {
    plots: [{ x: [0.5, most + 0.5], y: around([...curves, { points: [[0, 0]] }]), integer: true, labels: ["x", "y"], curves }],
    readouts: [],
    table: {
      head: [["x"], ...credit.map((_, i) => ["spoken", { number: i + 1 }])],
      rows: Array.from({ length: most }, (_, k) => [["turn", { number: k + 1 }], ...credit.map((values) => (k < values.length ? format(values[k]) : "–"))]),
    },
  };
}

function truncationFigure(v) {
  const before = theory.zipf_probabilities(50, v.exponent, v.temperature), after = theory.truncated_probabilities(before, v.top_k, v.top_p, v.min_p);
  const steps = (values) => values.flatMap((value, i) => [[i + 0.5, value], [i + 1.5, value]]);
  const kept = after.filter((p) => p > 0).length, mass = before[0] / after[0];
  const curves = [{ name: "before", style: "c4 dashed", points: steps(before) }, { name: "after", style: "c0", points: steps(after) }];
  return {
    plots: [{ x: [0.5, 50.5], y: [0, 1.06 * after[0]], integer: true, labels: ["x", "y"], curves }],
    readouts: [["kept", format(kept)], ["mass", format(mass)], ["product", format(mass ** 100)]],
  };
}

const CORRECTIONS = [["none", "c4 dashed"], ["tis", "c0"], ["mis", "c1 broken"], ["icepop", "c2 dotted"]];
function correctionFigure(v, state) {
  const low = Math.min(v.low, v.high), end = Math.max(3, 1.3 * v.high), breaks = [low, v.high];
  const weights = (ratio) => CORRECTIONS.slice(1).map(([name]) => format(theory.correction_weight(name, ratio, low, v.high))).join(" / ");
  const curves = CORRECTIONS.map(([name, style]) => ({ name, style, points: along(0, end, (w) => theory.correction_weight(name, w, low, v.high), breaks) }));
  const own = ["tis", "mis", "icepop"].includes(state.settings.correction) ? state.settings.correction : "none";
  return {
    plots: [{ x: [0, end], y: [-0.05 * v.high, Math.max(1, v.high) * 1.1], labels: ["x", "y"], curves, dots: tokensOf(state).weights.filter((w) => w !== null).map((w) => [w, theory.correction_weight(own, w, low, v.high)]), markers: [[v.w, theory.correction_weight("tis", v.w, low, v.high)]] }],
    readouts: [["token_level", weights(v.w)], ["sequence_ratio", format(v.w ** v.tokens)], ["sequence_level", weights(v.w ** v.tokens)]],
    notes: state.run ? [["own_correction", { name: [own] }]] : [],
  };
}

const figures = [
  {
    id: "surrogate", dragX: "ratio", layout: "pair",
    controls: (s) => {
      const [clip_low, clip_high] = [s.clip_low ?? 0.2, s.clip_high ?? 0.28], narrow = clip_high < 0.01;
      return [
        choice("surrogate", ["clip", "policy_gradient", "cispo", "sapo", "gmpo", "dppo", "vespo"], s.surrogate),
        choice("bounds", ["fixed", "exponential", "dynamic", "none"], s.bounds, reads(["clip", "gmpo"])),
        epsilon("clip_low", clip_low, { when: bounded }),
        epsilon("clip_high", clip_high, { when: bounded }),
        slider("ratio_cap", [1.1, 12, 0.1], s.surrogate === "cispo" ? 12 : s.ratio_cap, { when: reads(["clip"]), open: true }),
        slider("cispo_cap", [1.1, 12, 0.1], s.surrogate === "cispo" ? s.ratio_cap : 5, { when: reads(["cispo"]) }),
        slider("dual_clip", [1.1, 6, 0.1], s.dual_clip, { when: reads(["clip"]), open: true }),
        slider("gate_positive", [0.05, 10, 0.05], s.gate_positive ?? 1, { when: reads(["sapo"]) }),
        slider("gate_negative", [0.05, 10, 0.05], s.gate_negative ?? 1.05, { when: reads(["sapo"]) }),
        slider("divergence_limit", [0, 1, 0.01], s.divergence_limit ?? 0.2, { when: reads(["dppo"]) }),
        slider("power_positive", [0, 6, 0.1], s.power_positive ?? 2, { when: reads(["vespo"]) }),
        slider("decay_positive", [0.1, 6, 0.1], s.decay_positive ?? 3, { when: reads(["vespo"]) }),
        slider("power_negative", [0, 6, 0.1], s.power_negative ?? 3, { when: reads(["vespo"]) }),
        slider("decay_negative", [0.1, 6, 0.1], s.decay_negative ?? 2, { when: reads(["vespo"]) }),
        slider("old", [0.01, 1, 0.01], 0.1),
        narrow ? slider("ratio", [1 - 5 * clip_high, 1 + 5 * clip_high, clip_high / 10], 1 + clip_high / 2) : slider("ratio", [0.05, 6, 0.05], 1.2),
      ];
    },
    draw: surrogateFigure,
  },
  {
    id: "ceiling", dragX: "q",
    controls: (s) => [epsilon("high", clipOf(s, "fixed", "token").clip_high ?? 0.2), slider("q", [0.01, 1, 0.01], 0.1)],
    draw: (v, state) => {
      const top = theory.clip_ceiling(v.q, v.high), tokens = tokensOf(state);
      return {
        plots: [{
          x: [0, 1], y: [0, 1], labels: ["x", "y"],
          curves: [{ name: "bound", style: "c0", points: along(0, 1, (q) => theory.clip_ceiling(q, v.high), [theory.upper_clip_is_inert_above(v.high)]) }, { name: "same", style: "c4 dashed", points: [[0, 0], [1, 1]] }],
          dots: tokens.p.map((p, i) => [p, Math.min(1, p * tokens.ratio[i])]), markers: [[v.q, top]],
        }],
        readouts: [["at", format(top)], ["increase", format(top - v.q)], ["inert", format(theory.upper_clip_is_inert_above(v.high))]],
      };
    },
  },
  {
    id: "compounding", dragX: "n",
    controls: (s) => {
      const first = clipOf(s, "fixed", "token").clip_high;
      return [slider("start", [0.001, 0.5, 0.001], 0.01), slider("target", [0.01, 1, 0.01], 0.1), slider("first", [0.05, 1, 0.01], first >= 0.05 ? first : 0.2), slider("second", [0.05, 1, 0.01], first === 0.28 ? 0.2 : 0.28), slider("n", [0, 60, 1], 20)];
    },
    draw: (v) => {
      const climb = (epsilon) => along(0, 60, (n) => theory.probability_after(v.start, n, epsilon), [theory.steps_to_reach(v.start, 1, epsilon)]);
      const needed = (epsilon) => format(Math.max(0, theory.steps_to_reach(v.start, v.target, epsilon)));
      const at = (epsilon) => theory.probability_after(v.start, v.n, epsilon);
      return {
        plots: [{ x: [0, 60], y: [0, 1], labels: ["x", "y"], curves: [{ name: "first", style: "c0", points: climb(v.first) }, { name: "second", style: "c1 broken", points: climb(v.second) }, { name: "target", style: "c4 dashed", points: [[0, v.target], [60, v.target]] }], markers: [[v.n, at(v.first)]] }],
        readouts: [["to_first", needed(v.first)], ["to_second", needed(v.second)], ["factor", format(at(v.second) / at(v.first))]],
      };
    },
  },
  {
    id: "dynamic", dragX: "q",
    controls: (s) => [epsilon("low", clipOf(s, "dynamic").clip_low ?? 0.16), epsilon("high", clipOf(s, "dynamic").clip_high ?? 0.2), epsilon("fixed", clipOf(s, "fixed", "token").clip_high ?? 0.2), slider("q", [0.005, 1, 0.005], 0.1)],
    draw: (v, state) => {
      const low = (q) => theory.lower_bound("dynamic", q, v.low), high = (q) => theory.upper_bound("dynamic", q, v.high, 10), tokens = tokensOf(state);
      return {
        plots: [{
          x: [0, 1], y: [0, 4], labels: ["x", "y"],
          curves: [
            { name: "upper", style: "c0", points: along(0.001, 1, high, [], 960) },
            { name: "lower", style: "c1", points: along(0.001, 1, low, [4 * v.low], 960) },
            { name: "constant", style: "c4 dashed", points: [[0, theory.upper_bound("fixed", 1, v.fixed, 1)], [1, theory.upper_bound("fixed", 1, v.fixed, 1)]] },
            { name: null, style: "c4 dashed", points: [[0, theory.lower_bound("fixed", 1, v.fixed)], [1, theory.lower_bound("fixed", 1, v.fixed)]] },
          ],
          dots: pairs(tokens.p, tokens.ratio), markers: [[v.q, Math.min(4, high(v.q))]],
        }],
        readouts: [["at_low", format(low(v.q))], ["at_high", format(high(v.q))], ["probability", format(Math.min(1, v.q * high(v.q)))]],
      };
    },
  },
  {
    id: "sequence",
    controls: (s) => [
      slider("length", [16, 2048, 16], Math.min(2048, s.max_tokens ?? 512)), slider("spread", [0.001, 0.2, 0.001], 0.03), slider("bias", [-0.01, 0.01, 0.0005], 0),
      slider("tokenClip", [0.05, 0.5, 0.01], clipOf(s, "fixed", "token").clip_high ?? 0.2), epsilon("sequenceClip", clipOf(s, "fixed", "sequence").clip_high ?? 0.0004),
    ],
    draw: sequenceFigure,
  },
  {
    id: "advantages",
    controls: (s) => [numbers("rewards", s.rewards ?? [1, 1, 0, 0, 0, 0, 0, 0], 64), numbers("rest", [1, 1, 1, 0], 64), choice("ddof", ["ddof_1", "ddof_0"], s.ddof === 0 ? "ddof_0" : "ddof_1"), checks("shown", ESTIMATORS, [...new Set(["grpo", "dr_grpo", "rloo", "maxrl", "lite_ppo", estimatorOf(s) ?? "grpo"])])],
    draw: advantagesFigure,
  },
  {
    id: "smoothing",
    controls: (s) => [slider("size", [2, 32, 1], s.group_size ?? 16), ...[0.25, 0.5, 0.75, 1, 1, 1].map((share, i) => slider(`v${i + 1}`, [0, 1, 0.125], share))],
    draw: (v) => {
      const visits = theory.smoothed_visits([v.v1, v.v2, v.v3, v.v4, v.v5, v.v6].map((share) => Math.round(share * v.size)), v.size);
      const curves = [["right", "c0"], ["wrong", "c1"], ["fresh", "c4 dashed"]].map(([name, style], part) => ({ name, style, dotted: true, points: visits.map((values, i) => [i + 1, values[part]]) }));
      return {
        plots: [{ x: [0.8, 6.2], y: around([...curves, { points: [[1, -2], [1, 2]] }]), integer: true, labels: ["x", "y"], curves, markers: [[6, visits[5][0]]] }],
        readouts: [["last", format(visits[5][0])], ["last_fresh", format(visits[5][2])]],
      };
    },
  },
  {
    id: "zero-variance", dragX: "p",
    controls: (s) => [slider("size", [2, 64, 1], s.group_size ?? 16), slider("p", [0, 1, 0.01], 0.9)],
    draw: (v) => {
      const share = theory.dead_group_probability(v.p, v.size);
      return {
        plots: [{ x: [0, 1], y: [0, 1], labels: ["x", "y"], curves: [{ name: "share", style: "c0", points: along(0, 1, (p) => theory.dead_group_probability(p, v.size)) }], markers: [[v.p, share]] }],
        readouts: [["at", percent(share)], ["generated", format(1 / (1 - share))]],
      };
    },
  },
  {
    id: "turns",
    controls: (s) => [
      numbers("first", [0, 0.5, 1], 12), numbers("second", [0.5, 0, 0], 12), numbers("third", [0, 0, 0, 1], 12),
      choice("estimator", ["turns", "process", "group"], s.advantage === "process" || s.advantage === "group" ? s.advantage : "turns"), slider("gamma", [0, 1, 0.01], s.advantage === "turns" ? s.gamma : 1, { when: (v) => v.estimator === "turns" }),
    ],
    draw: turnsFigure,
  },
  {
    id: "aggregation", dragX: "second",
    controls: (s) => {
      const most = s.max_tokens ?? 2000, step = Math.max(1, Math.round(most / 200));
      return [slider("first", [1, most, 1], Math.max(1, Math.round(most / 20))), slider("second", [1, most, 1], Math.max(1, Math.round(most / 5))), slider("limit", [step, 2 * most, step], most)];
    },
    draw: (v, state) => {
      const most = state.settings.max_tokens ?? 2000, weight = (mode, length) => theory.token_weight(mode, length, [v.first, length], v.limit);
      const curves = [["sequence_mean", "c0"], ["token_mean", "c1"], ["constant", "c2"]].map(([name, style]) => ({ name, style, points: along(1, most, (n) => n * weight(name, n)) }));
      const both = (mode) => [v.first, v.second].map((length) => format(theory.token_weight(mode, length, [v.first, v.second], v.limit))).join(" / ");
      return {
        plots: [{ x: [0, most], y: [0, 1], labels: ["x", "y"], curves, markers: [[v.second, v.second * weight("token_mean", v.second)]] }],
        readouts: ["sequence_mean", "token_mean", "sequence_sum", "constant"].map((mode) => [`weights_${mode}`, both(mode)]),
      };
    },
  },
  {
    id: "overlong", dragX: "length",
    controls: (s) => {
      const limit = s.max_tokens ?? 20480, step = Math.max(1, Math.round(limit / 160)), cache = s.overlong_cache > 0 ? s.overlong_cache * limit : 0.2 * limit;
      return [slider("limit", [step, 1.6 * limit, step], limit), slider("cache", [step, limit, step], Math.max(1, Math.round(cache))), slider("length", [0, 1.6 * limit, step], step * Math.round((0.9 * limit) / step))];
    },
    draw: (v, state) => {
      const end = 1.6 * (state.settings.max_tokens ?? 20480), cache = Math.min(v.cache, v.limit), penalty = (n) => theory.overlong_penalty(n, v.limit, cache);
      return {
        plots: [{ x: [0, end], y: [-1.05, 0.05], labels: ["x", "y"], curves: [{ name: "penalty", style: "c0", points: along(0, end, penalty, [v.limit - cache, v.limit]) }], markers: [[v.length, penalty(v.length)]] }],
        readouts: [["penalty", format(penalty(v.length))], ["begins", format(v.limit - cache)]],
      };
    },
  },
  {
    id: "truncation",
    controls: (s) => {
      return [slider("exponent", [0.2, 4, 0.1], 1), slider("temperature", [0.1, 2, 0.05], s.temperature ?? 1), slider("top_k", [0, 50, 1], Math.min(50, s.top_k ?? 0)), slider("top_p", [0.01, 1, 0.01], s.top_p ?? 0.8), slider("min_p", [0, 0.5, 0.01], s.min_p ?? 0)];
    },
    draw: truncationFigure,
  },
  {
    id: "correction", dragX: "w",
    controls: (s) => [slider("low", [0, 1, 0.01], s.correction_low ?? 0.5), slider("high", [1, 10, 0.1], s.correction_high ?? 2), slider("w", [0, 3, 0.01], 1.5), slider("tokens", [1, 200, 1], 10)],
    draw: correctionFigure,
  },
];
