// The interactive figures. A panel is an object: its sliders, and its curves, marker and readouts as functions of the sliders' values.
const tokens = JSON.parse(document.getElementById("tokens").textContent);
const root = document.documentElement;
let language = (navigator.language || "en").startsWith("zh") ? "zh" : "en";
let dark = window.matchMedia("(prefers-color-scheme: dark)").matches;
const say = (text) => text[language];
const short = (x) => (x === 0 ? "0" : Math.abs(x) >= 1e5 || Math.abs(x) < 1e-3 ? x.toExponential(2) : String(Number(x.toPrecision(4))));
const percent = (x) => `${Number((100 * x).toPrecision(4))} %`;
const along = (from, to, f, n = 240) => Array.from({ length: n + 1 }, (_, i) => from + ((to - from) * i) / n).map((x) => [x, f(x)]);

// Closed forms.
const ceiling = (q, high) => Math.min(1, (1 + high) * q);
const climb = (start, steps, high) => Math.min(1, start * (1 + high) ** steps);
const stepsToReach = (start, target, high) => Math.log(target / start) / Math.log(1 + high);
const dynamicLow = (q, low) => 0.5 + 0.5 * Math.sqrt(Math.max(1 - (4 * low) / q, 0));
const dynamicHigh = (q, high) => Math.min(10, 0.5 + 0.5 * Math.sqrt(1 + (4 * high) / q));
const overlong = (length, limit, cache) => (length <= limit - cache ? 0 : length <= limit ? (limit - cache - length) / cache : -1);
// The probability that a group of `size` completions is all correct or all wrong, at pass rate p.
const zeroVariance = (p, size) => p ** size + (1 - p) ** size;

// The weight that one token of each completion has in the loss, by aggregation mode.
function tokenWeights(mode, lengths, limit) {
  const total = lengths.reduce((a, b) => a + b, 0);
  const of = { sequence_mean: (n) => 1 / (lengths.length * n), token_mean: () => 1 / total, sequence_sum: (n) => 1 / n, constant: () => 1 / (lengths.length * limit) };
  return lengths.map(of[mode]);
}

// DCPO's smoothed advantage of a correct and of a wrong completion at each visit of a prompt, for rewards 1 and 0.
// `fresh` is the GRPO advantage of a correct completion in that visit's group.
function smoothed(rightPerVisit, size) {
  let count = 0, mean = 0, variance = 0;
  return rightPerVisit.map((right, visit) => {
    const i = visit + 1, newMean = right / size, newVariance = newMean * (1 - newMean);
    variance = (newVariance + (i - 1) * variance + ((i - 1) / i) * (mean - newMean) ** 2) / i;
    mean = (count * mean + right) / (count + size);
    count += size;
    const standard = (r, m, v) => (v > 1e-12 ? (r - m) / Math.sqrt(v) : 0);
    const one = (reward) => {
      const fresh = standard(reward, newMean, newVariance), all = standard(reward, mean, variance);
      const byNew = ((i - 1) * fresh + all) / i, byTotal = (fresh + (i - 1) * all) / i;
      return Math.abs(byNew) < Math.abs(byTotal) ? byNew : byTotal;
    };
    return { visit: i, right: one(1), wrong: one(0), fresh: standard(1, newMean, newVariance) };
  });
}

// Normally distributed pseudo-random numbers (Box-Muller), the same whenever the page is opened.
function normal(count) {
  let state = 12345;
  const uniform = () => (state = (state * 16807) % 2147483647) / 2147483647; // Lehmer's generator; its integers are exact in doubles.
  return Array.from({ length: count }, () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform()));
}
const noise = normal(2048);
// Token log ratios drawn from a normal distribution, with their running sum and mean.
function drift(length, spread, bias) {
  const token = noise.slice(0, length).map((z) => bias + spread * z);
  let sum = 0;
  return token.map((x, t) => { sum += x; return { t: t + 1, token: x, sum, mean: sum / (t + 1) }; });
}

const slider = (id, en, zh, min, max, step, value) => ({ id, label: { en, zh }, min, max, step, value });
const panels = [
  {
    id: "ceiling", dragX: "q",
    title: { en: "The upper clip bound", zh: "裁剪上界" },
    text: { en: "Within the updates on one batch of rollouts, a token with positive advantage and old probability π_old has no gradient once its probability exceeds (1 + ε_high) π_old. For unlikely tokens this allows only a small increase; where the bound exceeds 1 it has no effect. Clipping removes the token's gradient but does not hold its probability: momentum and the gradients of other tokens, through shared model parameters, can push it past the bound.",
      zh: "在同一批 rollout 的各次更新中，优势为正、旧概率为 π_old 的 token 一旦概率超过 (1 + ε_high) π_old，其梯度即为零。低概率 token 只能小幅上升；当该上界超过 1 时则不起作用。裁剪只去掉该 token 的梯度，并不固定其概率：动量以及其他 token 经共享模型参数传来的梯度仍可能使其越过上界。" },
    controls: [slider("high", "ε_high", "ε_high", 0.01, 1, 0.01, 0.2), slider("q", "π_old", "π_old", 0.01, 1, 0.01, 0.1)],
    x: { en: "π_old", zh: "π_old", from: 0, to: 1 }, y: { en: "π_new", zh: "π_new", from: 0, to: 1 },
    curves: (v) => [
      { name: { en: "upper bound min(1, (1 + ε_high) π_old)", zh: "上界 min(1, (1 + ε_high) π_old)" }, points: along(0, 1, (q) => ceiling(q, v.high)) },
      { name: { en: "no change", zh: "不变" }, points: [[0, 0], [1, 1]], style: "c4 dashed" },
    ],
    dots: () => tokens.map((token) => [token.p, Math.min(1, token.p * token.ratio)]),
    marker: (v) => [v.q, ceiling(v.q, v.high)],
    readouts: (v) => [
      [{ en: "upper bound at π_old", zh: "π_old 处的上界" }, short(ceiling(v.q, v.high))],
      [{ en: "largest allowed increase, min(ε_high π_old, 1 − π_old)", zh: "允许的最大增幅 min(ε_high π_old, 1 − π_old)" }, short(ceiling(v.q, v.high) - v.q)],
      [{ en: "no effect above π_old =", zh: "π_old 高于此值时上界不起作用" }, short(1 / (1 + v.high))],
    ],
  },
  {
    id: "compounding", dragX: "n",
    title: { en: "Compound growth when every step ends at the upper bound", zh: "每一步都到达上界时的复合增长" },
    text: { en: "If every step (the updates on one batch of rollouts) raises a token to its upper bound, its probability grows as π₀ (1 + ε)ⁿ until it reaches 1. For two bounds ε₁ and ε₂ the probabilities differ by the factor ((1 + ε₂)/(1 + ε₁))ⁿ, which is 3.64 after 20 steps for 0.28 and 0.20, until the faster one reaches 1.",
      zh: "若每一步(同一批 rollout 上的各次更新)都把 token 推到上界，其概率按 π₀ (1 + ε)ⁿ 增长，直到等于 1。两个上界 ε₁ 与 ε₂ 下的概率相差 ((1 + ε₂)/(1 + ε₁))ⁿ 倍：0.28 与 0.20 在 20 步后相差 3.64 倍，直到较快者到达 1。" },
    controls: [slider("start", "π₀", "π₀", 0.001, 0.5, 0.001, 0.01), slider("target", "target probability", "目标概率", 0.01, 1, 0.01, 0.1), slider("first", "ε₁", "ε₁", 0.05, 1, 0.01, 0.2), slider("second", "ε₂", "ε₂", 0.05, 1, 0.01, 0.28), slider("n", "steps n", "步数 n", 0, 60, 1, 20)],
    x: { en: "steps that end at the upper bound", zh: "到达上界的步数", from: 0, to: 60 }, y: { en: "π", zh: "π", from: 0, to: 1 },
    curves: (v) => [
      { name: { en: "ε₁", zh: "ε₁" }, points: along(0, 60, (n) => climb(v.start, n, v.first)) },
      { name: { en: "ε₂", zh: "ε₂" }, points: along(0, 60, (n) => climb(v.start, n, v.second)) },
      { name: { en: "target probability", zh: "目标概率" }, points: [[0, v.target], [60, v.target]], style: "c4 dashed" },
    ],
    marker: (v) => [v.n, climb(v.start, v.n, v.first)],
    readouts: (v) => [
      [{ en: "steps to the target with ε₁", zh: "ε₁ 达到目标所需步数" }, short(Math.max(0, stepsToReach(v.start, v.target, v.first)))],
      [{ en: "steps to the target with ε₂", zh: "ε₂ 达到目标所需步数" }, short(Math.max(0, stepsToReach(v.start, v.target, v.second)))],
      [{ en: "probability with ε₂ over that with ε₁, after n", zh: "n 步后 ε₂ 与 ε₁ 的概率之比" }, short(climb(v.start, v.n, v.second) / climb(v.start, v.n, v.first))],
    ],
  },
  {
    id: "sequence",
    title: { en: "Token clip and sequence clip by completion length", zh: "token 裁剪与序列裁剪随回复长度的变化" },
    text: { en: "Token log ratios (dots) drawn from a normal distribution. Without a bias, the typical size of their sum (the log ratio of the whole sequence) grows as √T and that of their mean (the log of GSPO's ratio) falls as 1/√T. A token clip stops the gradient of single tokens past the bound and does not limit the sum. GSPO clips the mean, which bounds the sum by T times the bound on the mean.",
      zh: "从正态分布抽取的 token 对数比率(圆点)。均值为零时，其和(整个序列的对数比率)的典型大小按 √T 增长，其均值(GSPO 比率的对数)按 1/√T 减小。token 裁剪只停止越界 token 各自的梯度，并不限制总和；GSPO 裁剪均值，因此总和的界是均值的界的 T 倍。" },
    controls: [slider("length", "length T", "长度 T", 16, 2048, 16, 512), slider("spread", "standard deviation σ of token log ratios", "token 对数比率的标准差 σ", 0.001, 0.2, 0.001, 0.03), slider("bias", "mean μ of token log ratios", "token 对数比率的均值 μ", -0.01, 0.01, 0.0005, 0), slider("tokenClip", "token clip ε", "token 裁剪 ε", 0.05, 0.5, 0.01, 0.2), slider("sequenceClip", "sequence clip ε", "序列裁剪 ε", 0.0001, 0.02, 0.0001, 0.0004)],
    x: { en: "position of the token", zh: "token 位置", from: 0, to: (v) => v.length }, y: { en: "log ratio", zh: "对数比率", from: (v) => Math.min(-0.1, ...drift(v.length, v.spread, v.bias).map((d) => d.sum)) * 1.05, to: (v) => Math.max(0.1, ...drift(v.length, v.spread, v.bias).map((d) => d.sum)) * 1.05 },
    curves: (v) => {
      const d = drift(v.length, v.spread, v.bias);
      return [
        { name: { en: "sum: log ratio of the sequence", zh: "和：序列的对数比率" }, points: d.map((p) => [p.t, p.sum]) },
        { name: { en: "mean: log of GSPO's ratio", zh: "均值：GSPO 比率的对数" }, points: d.map((p) => [p.t, p.mean]) },
        { name: { en: "upper bound of the token clip", zh: "token 裁剪的上界" }, points: [[0, Math.log(1 + v.tokenClip)], [v.length, Math.log(1 + v.tokenClip)]], style: "c2 dashed" },
        { name: { en: "typical sum, μT + σ√T", zh: "典型的和 μT + σ√T" }, points: along(0, v.length, (t) => v.bias * t + v.spread * Math.sqrt(t)), style: "c4 dashed" },
      ];
    },
    dots: (v) => drift(v.length, v.spread, v.bias).filter((_, i) => i % Math.ceil(v.length / 512) === 0).map((p) => [p.t, p.token]),
    marker: (v) => { const d = drift(v.length, v.spread, v.bias); return [v.length, d[d.length - 1].sum]; },
    readouts: (v) => {
      const d = drift(v.length, v.spread, v.bias), last = d[d.length - 1];
      const outside = d.filter((p) => Math.exp(p.token) > 1 + v.tokenClip || Math.exp(p.token) < 1 - v.tokenClip).length;
      return [
        [{ en: "typical sum σ√T", zh: "典型的和 σ√T" }, short(v.spread * Math.sqrt(v.length))],
        [{ en: "typical mean σ/√T", zh: "典型的均值 σ/√T" }, short(v.spread / Math.sqrt(v.length))],
        [{ en: "tokens outside the token clip", zh: "超出 token 裁剪范围的 token" }, percent(outside / v.length)],
        [{ en: "sequence outside the sequence clip", zh: "该序列是否超出序列裁剪范围" }, say(Math.exp(last.mean) > 1 + v.sequenceClip || Math.exp(last.mean) < 1 - v.sequenceClip ? { en: "yes (all its tokens are clipped if A has the matching sign)", zh: "是(若 A 的符号相符，则全部 token 被裁剪)" } : { en: "no", zh: "否" })],
        [{ en: "log₁₀ (1 + ε)ᵀ, token clip", zh: "log₁₀ (1 + ε)ᵀ，token 裁剪" }, short(v.length * Math.log10(1 + v.tokenClip))],
        [{ en: "(1 + ε)ᵀ, sequence clip", zh: "(1 + ε)ᵀ，序列裁剪" }, short((1 + v.sequenceClip) ** v.length)],
      ];
    },
  },
  {
    id: "dynamic", dragX: "q",
    title: { en: "DCPO's dynamic clip bounds and fixed ones", zh: "DCPO 的动态裁剪边界与固定边界" },
    text: { en: "DCPO derives the bounds on the ratio r from |(r − 1) r q| ≤ ε, where q = π_old: the less likely the token, the wider its bounds. The upper bound is capped at 10 (the plot ends at 4). For q ≤ 4 ε_low the constraint implies no lower bound; the paper sets 0.5.",
      zh: "DCPO 由 |(r − 1) r q| ≤ ε(q = π_old)导出比率 r 的边界：token 概率越低，边界越宽。上界最大为 10(图只画到 4)。当 q ≤ 4 ε_low 时该约束不给出下界；论文取 0.5。" },
    controls: [slider("low", "ε_low", "ε_low", 0.01, 0.5, 0.01, 0.16), slider("high", "ε_high", "ε_high", 0.01, 0.5, 0.01, 0.2), slider("fixed", "fixed ε", "固定 ε", 0.01, 0.5, 0.01, 0.2), slider("q", "q = π_old", "q = π_old", 0.005, 1, 0.005, 0.1)],
    x: { en: "q = π_old", zh: "q = π_old", from: 0, to: 1 }, y: { en: "ratio r", zh: "比率 r", from: 0, to: 4 },
    curves: (v) => [
      { name: { en: "DCPO, upper bound", zh: "DCPO 上界" }, points: along(0.005, 1, (q) => Math.min(4, dynamicHigh(q, v.high))) },
      { name: { en: "DCPO, lower bound", zh: "DCPO 下界" }, points: along(0.005, 1, (q) => dynamicLow(q, v.low)) },
      { name: { en: "fixed bounds 1 ± ε", zh: "固定边界 1 ± ε" }, points: [[0, 1 + v.fixed], [1, 1 + v.fixed]], style: "c4 dashed" },
      { name: null, points: [[0, 1 - v.fixed], [1, 1 - v.fixed]], style: "c4 dashed" },
    ],
    marker: (v) => [v.q, Math.min(4, dynamicHigh(v.q, v.high))],
    readouts: (v) => [
      [{ en: "lower bound at q", zh: "q 处的下界" }, short(dynamicLow(v.q, v.low))],
      [{ en: "upper bound at q", zh: "q 处的上界" }, short(dynamicHigh(v.q, v.high))],
      [{ en: "probability at the upper bound", zh: "上界处的概率" }, short(Math.min(1, v.q * dynamicHigh(v.q, v.high)))],
    ],
  },
  {
    id: "overlong", dragX: "length",
    title: { en: "The soft overlong punishment", zh: "柔性超长惩罚" },
    text: { en: "DAPO adds to the reward a penalty for length: 0 up to L_max − L_cache tokens, then falling linearly to −1 at L_max, the generation limit.",
      zh: "DAPO 在奖励上加一个长度惩罚：不超过 L_max − L_cache 个 token 时为 0，此后线性下降，在生成上限 L_max 处为 −1。" },
    controls: [slider("limit", "L_max", "L_max", 1024, 32768, 256, 20480), slider("cache", "L_cache", "L_cache", 256, 16384, 256, 4096), slider("length", "completion length", "回复长度", 0, 32768, 128, 18432)],
    x: { en: "completion length (tokens)", zh: "回复长度(token)", from: 0, to: 32768 }, y: { en: "added to the reward", zh: "加到奖励上的值", from: -1, to: 0 },
    curves: (v) => [{ name: { en: "punishment", zh: "惩罚" }, points: along(0, 32768, (n) => overlong(n, v.limit, Math.min(v.cache, v.limit)), 1024) }],
    marker: (v) => [v.length, overlong(v.length, v.limit, Math.min(v.cache, v.limit))],
    readouts: (v) => [[{ en: "punishment", zh: "惩罚" }, short(overlong(v.length, v.limit, Math.min(v.cache, v.limit)))], [{ en: "begins above (tokens)", zh: "超过此长度开始(token)" }, short(v.limit - Math.min(v.cache, v.limit))]],
  },
  {
    id: "aggregation",
    title: { en: "Token weights by loss aggregation", zh: "各种损失聚合方式下的 token 权重" },
    text: { en: "Two completions of different length. The sequence mean (GRPO) gives the tokens of the longer completion a smaller weight each. The token mean (DAPO) gives all tokens the same weight, so the longer completion has the larger total weight. Dr.GRPO divides by a constant. The plot shows the total weight of the second completion's tokens by its length.",
      zh: "两个长度不同的回复。序列均值(GRPO)使较长回复的每个 token 权重更小；token 均值(DAPO)使所有 token 权重相同，因而较长回复的总权重更大；Dr.GRPO 除以常数。图中为第二个回复全部 token 的总权重随其长度的变化。" },
    controls: [slider("first", "length of the first completion", "第一个回复的长度", 1, 2000, 1, 100), slider("second", "length of the second completion", "第二个回复的长度", 1, 2000, 1, 400), slider("limit", "constant length (Dr.GRPO)", "常数长度(Dr.GRPO)", 100, 4000, 100, 2000)],
    x: { en: "length of the second completion (tokens)", zh: "第二个回复的长度(token)", from: 1, to: 2000 }, y: { en: "total token weight", zh: "token 总权重", from: 0, to: 1 },
    curves: (v) => ["sequence_mean", "token_mean", "constant"].map((mode) => ({
      name: { sequence_mean: { en: "sequence mean (GRPO)", zh: "序列均值(GRPO)" }, token_mean: { en: "token mean (DAPO)", zh: "token 均值(DAPO)" }, constant: { en: "constant (Dr.GRPO)", zh: "常数(Dr.GRPO)" } }[mode],
      points: along(1, 2000, (n) => Math.min(1, n * tokenWeights(mode, [v.first, n], v.limit)[1])),
    })),
    marker: (v) => [v.second, v.second * tokenWeights("token_mean", [v.first, v.second], v.limit)[1]],
    dragX: "second",
    readouts: (v) => [
      [{ en: "weight per token (first / second), sequence mean", zh: "每 token 权重(第一/第二)，序列均值" }, tokenWeights("sequence_mean", [v.first, v.second], v.limit).map(short).join(" / ")],
      [{ en: "weight per token, token mean", zh: "每 token 权重，token 均值" }, tokenWeights("token_mean", [v.first, v.second], v.limit).map(short).join(" / ")],
      [{ en: "weight per token, sum of sequence means (DCPO)", zh: "每 token 权重，序列均值之和(DCPO)" }, tokenWeights("sequence_sum", [v.first, v.second], v.limit).map(short).join(" / ")],
      [{ en: "weight per token, constant", zh: "每 token 权重，常数" }, tokenWeights("constant", [v.first, v.second], v.limit).map(short).join(" / ")],
    ],
  },
  {
    id: "smoothing",
    title: { en: "DCPO's smoothed advantages over visits of a prompt", zh: "DCPO 的平滑优势随提示访问次数的变化" },
    text: { en: "Each time a prompt is visited, DCPO standardises the rewards once within the new group and once over all completions of the prompt so far. It averages the two advantages with two sets of weights and takes the average that is smaller in absolute value. GRPO's advantage is zero in a zero-variance group (all correct or all wrong); the smoothed advantage is not, if the rewards of earlier visits differed.",
      zh: "每次访问一个提示时，DCPO 分别在新的一组内和该提示迄今的全部回复上标准化奖励，再以两组权重对两个优势加权平均，取绝对值较小者。在零方差组(全对或全错)中 GRPO 的优势为零；若此前各次访问的奖励不同，平滑优势不为零。" },
    controls: [slider("size", "group size G", "组大小 G", 2, 32, 1, 16), ...[1, 2, 3, 4, 5, 6].map((i) => slider(`v${i}`, `share correct, visit ${i}`, `第 ${i} 次访问的正确比例`, 0, 1, 0.125, [0.25, 0.5, 0.75, 1, 1, 1][i - 1]))],
    x: { en: "visit", zh: "访问", from: 1, to: 6 }, y: { en: "advantage", zh: "优势", from: -3, to: 3 },
    curves: (v) => {
      const s = smoothed([1, 2, 3, 4, 5, 6].map((i) => Math.round(v[`v${i}`] * v.size)), v.size);
      return [
        { name: { en: "correct completion, smoothed (DCPO)", zh: "正确回复，平滑(DCPO)" }, points: s.map((x) => [x.visit, x.right]) },
        { name: { en: "wrong completion, smoothed (DCPO)", zh: "错误回复，平滑(DCPO)" }, points: s.map((x) => [x.visit, x.wrong]) },
        { name: { en: "correct completion, within the group (GRPO)", zh: "正确回复，组内(GRPO)" }, points: s.map((x) => [x.visit, x.fresh]), style: "c4 dashed" },
      ];
    },
    marker: (v) => [6, smoothed([1, 2, 3, 4, 5, 6].map((i) => Math.round(v[`v${i}`] * v.size)), v.size)[5].right],
    readouts: (v) => {
      const s = smoothed([1, 2, 3, 4, 5, 6].map((i) => Math.round(v[`v${i}`] * v.size)), v.size);
      return [[{ en: "correct completion, last visit, smoothed", zh: "正确回复，最后一次访问，平滑" }, short(s[5].right)], [{ en: "the same, within the group (GRPO)", zh: "同上，组内(GRPO)" }, short(s[5].fresh)]];
    },
  },
  {
    id: "zero-variance", dragX: "p",
    title: { en: "Zero-variance groups", zh: "零方差组" },
    text: { en: "When the completions of a group are all correct or all wrong, every advantage is zero and the group gives no gradient. At pass rate p this has the probability pᴳ + (1 − p)ᴳ. Larger groups are mixed more often on hard and easy problems, and cost more completions.",
      zh: "当一组的回复全对或全错时，所有优势为零，该组不产生梯度。通过率为 p 时其概率为 pᴳ + (1 − p)ᴳ。组越大，在难题与易题上越常是混合组，但需要生成更多回复。" },
    controls: [slider("size", "group size G", "组大小 G", 2, 64, 1, 16), slider("p", "pass rate p", "通过率 p", 0, 1, 0.01, 0.9)],
    x: { en: "pass rate p", zh: "通过率 p", from: 0, to: 1 }, y: { en: "share of zero-variance groups", zh: "零方差组的比例", from: 0, to: 1 },
    curves: (v) => [{ name: { en: "zero-variance groups", zh: "零方差组" }, points: along(0, 1, (p) => zeroVariance(p, v.size)) }],
    marker: (v) => [v.p, zeroVariance(v.p, v.size)],
    readouts: (v) => [[{ en: "zero-variance groups at p", zh: "p 处的零方差组" }, percent(zeroVariance(v.p, v.size))], [{ en: "groups generated per mixed group", zh: "每得到一个混合组需生成的组数" }, zeroVariance(v.p, v.size) < 1 ? short(1 / (1 - zeroVariance(v.p, v.size))) : "∞"]],
  },
];

const make = (name, attributes = {}, text) => {
  const svg = ["svg", "g", "path", "line", "circle", "text"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
};
const edges = (axis, values) => ["from", "to"].map((end) => (typeof axis[end] === "function" ? axis[end](values) : axis[end]));

class Panel {
  constructor(panel) {
    this.panel = panel;
    this.values = Object.fromEntries(panel.controls.map((control) => [control.id, control.value]));
    this.box = make("section", { class: "panel", id: panel.id });
    this.title = make("h2");
    this.text = make("p");
    this.svg = make("svg", { role: "img", class: panel.dragX ? "draggable" : "" });
    this.legend = make("div", { class: "legend" });
    this.sliders = make("div", { class: "sliders" });
    this.readouts = make("dl", { class: "readouts" });
    this.inputs = panel.controls.map((control) => this.addSlider(control));
    this.box.append(this.title, this.text, this.svg, this.legend, this.sliders, this.readouts);
    if (panel.dragX) this.allowDragging();
  }

  addSlider(control) {
    const label = make("label");
    const name = make("span"), value = make("output");
    const input = make("input", { type: "range", min: control.min, max: control.max, step: control.step, value: control.value, id: `${this.panel.id}-${control.id}` });
    input.addEventListener("input", () => { this.values[control.id] = Number(input.value); this.draw(); });
    label.append(name, value, input);
    this.sliders.append(label);
    return { control, name, value, input };
  }

  allowDragging() {
    const control = this.inputs.find((input) => input.control.id === this.panel.dragX);
    const move = (event) => {
      const x = this.unscale(event.clientX - this.svg.getBoundingClientRect().left);
      control.input.value = x;
      control.input.dispatchEvent(new Event("input"));
    };
    this.svg.addEventListener("pointerdown", (event) => { this.svg.setPointerCapture(event.pointerId); move(event); });
    this.svg.addEventListener("pointermove", (event) => { if (this.svg.hasPointerCapture(event.pointerId)) move(event); });
  }

  draw() {
    const { panel, values } = this;
    const width = Math.max(260, this.svg.clientWidth || 640), height = Math.round(Math.min(380, Math.max(240, width * 0.5)));
    const left = 54, right = 14, top = 12, bottom = 40;
    const [x0, x1] = edges(panel.x, values), [y0, y1] = edges(panel.y, values);
    const sx = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right);
    const sy = (y) => height - bottom - ((y - y0) / (y1 - y0)) * (height - top - bottom);
    this.unscale = (px) => x0 + ((px - left) / (width - left - right)) * (x1 - x0);
    this.title.textContent = say(panel.title);
    this.text.textContent = say(panel.text);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("height", height);
    this.svg.setAttribute("aria-label", say(panel.title));
    Object.assign(this.svg.dataset, { x0, x1, y0, y1, left, right, top, bottom, width, height });
    this.svg.replaceChildren(...this.axes(sx, sy, [x0, x1], [y0, y1], width, height));
    for (const [x, y] of panel.dots?.(values) ?? []) this.svg.append(make("circle", { class: "dot", cx: sx(x), cy: sy(y), r: 3 }));
    this.legend.replaceChildren();
    panel.curves(values).forEach((curve, i) => {
      const style = curve.style ?? `c${i}`;
      const d = curve.points.map(([x, y], k) => `${k ? "L" : "M"}${sx(x).toFixed(2)},${sy(y).toFixed(2)}`).join("");
      this.svg.append(make("path", { class: `curve ${style}`, d }));
      if (curve.name) {
        const colours = { c0: "accent", c1: "low", c2: "high", c3: "watch", c4: "soft" };
        this.legend.append(make("span", { style: `--key: var(--${colours[style.slice(0, 2)]})` }, say(curve.name)));
      }
    });
    const [mx, my] = panel.marker(values);
    this.svg.append(make("circle", { class: "marker", cx: sx(mx), cy: sy(my), r: 6 }));
    for (const { control, name, value } of this.inputs) {
      name.textContent = say(control.label);
      value.textContent = short(values[control.id]);
    }
    this.readouts.replaceChildren(...panel.readouts(values).map(([label, value]) => {
      const pair = make("div");
      pair.append(make("dt", {}, say(label)), make("dd", {}, value));
      return pair;
    }));
  }

  axes(sx, sy, [x0, x1], [y0, y1], width, height) {
    const parts = [];
    for (let i = 0; i <= 4; i++) {
      const x = x0 + ((x1 - x0) * i) / 4, y = y0 + ((y1 - y0) * i) / 4;
      parts.push(make("line", { class: "axis", x1: sx(x), x2: sx(x), y1: sy(y0), y2: sy(y1) }), make("line", { class: "axis", x1: sx(x0), x2: sx(x1), y1: sy(y), y2: sy(y) }));
      parts.push(make("text", { x: sx(x), y: height - 22, "text-anchor": i === 4 ? "end" : i ? "middle" : "start" }, short(x)), make("text", { x: 48, y: sy(y) + 4, "text-anchor": "end" }, short(y)));
    }
    parts.push(make("text", { x: (sx(x0) + sx(x1)) / 2, y: height - 5, "text-anchor": "middle" }, say(this.panel.x)));
    parts.push(make("text", { x: 58, y: 22, "text-anchor": "start" }, say(this.panel.y)));
    return parts;
  }
}

const drawn = panels.map((panel) => new Panel(panel));
document.getElementById("panels").append(...drawn.map((panel) => panel.box));

function drawAll() {
  root.dataset.theme = dark ? "dark" : "light";
  root.lang = language;
  document.getElementById("theme").textContent = say(dark ? { en: "Light", zh: "浅色" } : { en: "Dark", zh: "深色" });
  document.getElementById("language").textContent = language === "en" ? "中文" : "English";
  document.getElementById("run").textContent = tokens.length ? say({ en: `${tokens.length} tokens of your run are shown as dots in the first figure.`, zh: `第一张图中的圆点是你的运行中的 ${tokens.length} 个 token。` }) : "";
  for (const element of document.querySelectorAll("[data-en]")) element.textContent = element.dataset[language];
  document.getElementById("contents").replaceChildren(...panels.map((panel) => make("a", { href: `#${panel.id}` }, say(panel.title))));
  for (const panel of drawn) panel.draw();
}
document.getElementById("theme").addEventListener("click", () => { dark = !dark; drawAll(); });
document.getElementById("language").addEventListener("click", () => { language = language === "en" ? "zh" : "en"; drawAll(); });
window.addEventListener("resize", drawAll);
drawAll();
