// The interactive figures. A panel is data: controls, curves and readouts as functions of the controls' values.
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
const dead = (p, size) => p ** size + (1 - p) ** size;

// What one token of each completion weighs in the loss, by aggregation.
function weights(mode, lengths, limit) {
  const total = lengths.reduce((a, b) => a + b, 0);
  const of = { sequence_mean: (n) => 1 / (lengths.length * n), token_mean: () => 1 / total, sequence_sum: (n) => 1 / n, constant: () => 1 / (lengths.length * limit) };
  return lengths.map(of[mode]);
}

// DCPO's smoothed advantage of a right and a wrong answer after each visit of a prompt; rewards 1 and 0.
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

// Numbers from a normal distribution, the same at every visit of the page.
function normal(count) {
  let state = 12345;
  const uniform = () => (state = (state * 16807) % 2147483647) / 2147483647; // Lehmer's generator, exact in doubles
  return Array.from({ length: count }, () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform()));
}
const noise = normal(2048);
function drift(length, spread, bias) {
  const token = noise.slice(0, length).map((z) => bias + spread * z);
  let sum = 0;
  return token.map((x, t) => { sum += x; return { t: t + 1, token: x, sum, mean: sum / (t + 1) }; });
}

const slider = (id, en, zh, min, max, step, value) => ({ id, label: { en, zh }, min, max, step, value });
const panels = [
  {
    id: "ceiling", dragX: "q",
    title: { en: "The clip's ceiling", zh: "裁剪的天花板" },
    text: { en: "The updates on one batch of rollouts may raise a token of probability π_old up to (1 + ε_high) π_old before its gradient stops: little for the unlikely, and no limit at all where that exceeds 1. It stops the gradient, not the weights: momentum and shared weights can overshoot.",
      zh: "一批 rollout 上的若干次更新最多把概率为 π_old 的 token 推到 (1 + ε_high) π_old，之后梯度归零：对低概率 token 余地很小，而当它超过 1 时就不再构成限制。停下的是梯度而不是权重：动量与共享权重仍可能越过。" },
    controls: [slider("high", "ε_high", "ε_high", 0.01, 1, 0.01, 0.2), slider("q", "π_old", "π_old", 0.01, 1, 0.01, 0.1)],
    x: { en: "π_old", zh: "π_old", from: 0, to: 1 }, y: { en: "π_new", zh: "π_new", from: 0, to: 1 },
    curves: (v) => [
      { name: { en: "ceiling min(1, (1 + ε_high) π_old)", zh: "天花板 min(1, (1 + ε_high) π_old)" }, points: along(0, 1, (q) => ceiling(q, v.high)) },
      { name: { en: "no change", zh: "不变" }, points: [[0, 0], [1, 1]], style: "c4 dashed" },
    ],
    dots: () => tokens.map((token) => [token.p, Math.min(1, token.p * token.ratio)]),
    marker: (v) => [v.q, ceiling(v.q, v.high)],
    readouts: (v) => [
      [{ en: "ceiling at π_old", zh: "π_old 处的天花板" }, short(ceiling(v.q, v.high))],
      [{ en: "room to rise, ε_high π_old", zh: "上升余地 ε_high π_old" }, short(ceiling(v.q, v.high) - v.q)],
      [{ en: "no limit above π_old =", zh: "π_old 高于此值时不再受限" }, short(1 / (1 + v.high))],
    ],
  },
  {
    id: "compounding", dragX: "n",
    title: { en: "Compounding, when every update ends at the ceiling", zh: "每次更新都触顶时的复利" },
    text: { en: "A token that the clip stops at every update grows as π₀ (1 + ε)ⁿ until it reaches 1. The gap between two clips is ((1 + ε₂)/(1 + ε₁))ⁿ: 3.64 times after 20 updates for 0.28 against 0.20, and it ends when the faster one is at 1.",
      zh: "若每次更新都被裁剪拦住，概率按 π₀ (1 + ε)ⁿ 增长，直到等于 1。两种裁剪之间的差距为 ((1 + ε₂)/(1 + ε₁))ⁿ:0.28 对 0.20 在 20 次更新后为 3.64 倍，并在较快者到达 1 时终止。" },
    controls: [slider("start", "π₀", "π₀", 0.001, 0.5, 0.001, 0.01), slider("target", "target", "目标", 0.01, 1, 0.01, 0.1), slider("first", "ε₁", "ε₁", 0.05, 1, 0.01, 0.2), slider("second", "ε₂", "ε₂", 0.05, 1, 0.01, 0.28), slider("n", "updates n", "更新次数 n", 0, 60, 1, 20)],
    x: { en: "saturated updates", zh: "触顶的更新次数", from: 0, to: 60 }, y: { en: "π", zh: "π", from: 0, to: 1 },
    curves: (v) => [
      { name: { en: "ε₁", zh: "ε₁" }, points: along(0, 60, (n) => climb(v.start, n, v.first)) },
      { name: { en: "ε₂", zh: "ε₂" }, points: along(0, 60, (n) => climb(v.start, n, v.second)) },
      { name: { en: "target", zh: "目标" }, points: [[0, v.target], [60, v.target]], style: "c4 dashed" },
    ],
    marker: (v) => [v.n, climb(v.start, v.n, v.first)],
    readouts: (v) => [
      [{ en: "updates to the target, ε₁", zh: "达到目标所需更新 ε₁" }, short(Math.max(0, stepsToReach(v.start, v.target, v.first)))],
      [{ en: "updates to the target, ε₂", zh: "达到目标所需更新 ε₂" }, short(Math.max(0, stepsToReach(v.start, v.target, v.second)))],
      [{ en: "ratio of the two after n", zh: "n 次后两者之比" }, short(climb(v.start, v.n, v.second) / climb(v.start, v.n, v.first))],
    ],
  },
  {
    id: "sequence",
    title: { en: "Token clip against sequence clip, with length", zh: "token 裁剪与序列裁剪，随长度变化" },
    text: { en: "Log ratios of tokens (dots), drawn at random. Their sum drifts with √T (the ratio of the whole sequence), their mean settles (GSPO's ratio). A clip on tokens stops the gradient of each point past its bound and says nothing of the sum; GSPO's looks at the mean, so at the sum by T times its bound.",
      zh: "随机抽取的 token 对数比率(圆点)。其和随 √T 漂移(整个序列的比率)，其均值趋于稳定(GSPO 的比率)。token 裁剪对越界的每一点停止梯度，与总和无关；GSPO 看的是均值，因此对总和的界是其 T 倍。" },
    controls: [slider("length", "length T", "长度 T", 16, 2048, 16, 512), slider("spread", "spread of a token's log ratio", "token 对数比率的标准差", 0.001, 0.2, 0.001, 0.03), slider("bias", "mean of a token's log ratio", "token 对数比率的均值", -0.01, 0.01, 0.0005, 0), slider("tokenClip", "token clip ε", "token 裁剪 ε", 0.05, 0.5, 0.01, 0.2), slider("sequenceClip", "sequence clip ε", "序列裁剪 ε", 0.0001, 0.02, 0.0001, 0.0004)],
    x: { en: "token", zh: "token", from: 0, to: (v) => v.length }, y: { en: "log ratio", zh: "对数比率", from: (v) => Math.min(-0.1, ...drift(v.length, v.spread, v.bias).map((d) => d.sum)) * 1.05, to: (v) => Math.max(0.1, ...drift(v.length, v.spread, v.bias).map((d) => d.sum)) * 1.05 },
    curves: (v) => {
      const d = drift(v.length, v.spread, v.bias);
      return [
        { name: { en: "sum: the sequence's ratio", zh: "和：序列的比率" }, points: d.map((p) => [p.t, p.sum]) },
        { name: { en: "mean: GSPO's ratio", zh: "均值：GSPO 的比率" }, points: d.map((p) => [p.t, p.mean]) },
        { name: { en: "token clip", zh: "token 裁剪" }, points: [[0, Math.log(1 + v.tokenClip)], [v.length, Math.log(1 + v.tokenClip)]], style: "c2 dashed" },
        { name: { en: "typical sum, μT + σ√T", zh: "典型的和 μT + σ√T" }, points: along(0, v.length, (t) => v.bias * t + v.spread * Math.sqrt(t)), style: "c4 dashed" },
      ];
    },
    dots: (v) => drift(v.length, v.spread, v.bias).filter((_, i) => i % Math.ceil(v.length / 512) === 0).map((p) => [p.t, p.token]),
    marker: (v) => { const d = drift(v.length, v.spread, v.bias); return [v.length, d[d.length - 1].sum]; },
    readouts: (v) => {
      const d = drift(v.length, v.spread, v.bias), last = d[d.length - 1];
      const free = d.filter((p) => Math.exp(p.token) > 1 + v.tokenClip || Math.exp(p.token) < 1 - v.tokenClip).length;
      return [
        [{ en: "typical sum σ√T", zh: "典型的和 σ√T" }, short(v.spread * Math.sqrt(v.length))],
        [{ en: "typical mean σ/√T", zh: "典型的均值 σ/√T" }, short(v.spread / Math.sqrt(v.length))],
        [{ en: "tokens past the token clip", zh: "越过 token 裁剪的 token" }, percent(free / v.length)],
        [{ en: "this sequence past the sequence clip", zh: "该序列是否越过序列裁剪" }, say(Math.exp(last.mean) > 1 + v.sequenceClip || Math.exp(last.mean) < 1 - v.sequenceClip ? { en: "yes (with a matching sign of A: all its tokens)", zh: "是(若 A 的符号相符：全部 token)" } : { en: "no", zh: "否" })],
        [{ en: "log₁₀ of (1 + ε)ᵀ, tokens", zh: "token 裁剪 (1 + ε)ᵀ 的 log₁₀" }, short(v.length * Math.log10(1 + v.tokenClip))],
        [{ en: "(1 + ε)ᵀ, sequence", zh: "序列裁剪 (1 + ε)ᵀ" }, short((1 + v.sequenceClip) ** v.length)],
      ];
    },
  },
  {
    id: "dynamic", dragX: "q",
    title: { en: "DCPO's bounds beside fixed ones", zh: "DCPO 的动态边界与固定边界" },
    text: { en: "DCPO solves |(r − 1) r q| ≤ ε for the ratio r: the less likely the token, the wider its bounds (the upper one ends at 10; the plot at 4). For q ≤ 4 ε_low the constraint asks for no lower bound; the paper imposes 0.5.",
      zh: "DCPO 对比率 r 求解 |(r − 1) r q| ≤ ε:token 越不可能，边界越宽(上界止于 10，图止于 4)。当 q ≤ 4 ε_low 时该约束并不要求下界；论文规定为 0.5。" },
    controls: [slider("low", "ε_low", "ε_low", 0.01, 0.5, 0.01, 0.16), slider("high", "ε_high", "ε_high", 0.01, 0.5, 0.01, 0.2), slider("fixed", "fixed ε", "固定 ε", 0.01, 0.5, 0.01, 0.2), slider("q", "q = π_old", "q = π_old", 0.005, 1, 0.005, 0.1)],
    x: { en: "q", zh: "q", from: 0, to: 1 }, y: { en: "ratio", zh: "比率", from: 0, to: 4 },
    curves: (v) => [
      { name: { en: "DCPO, upper", zh: "DCPO 上界" }, points: along(0.005, 1, (q) => Math.min(4, dynamicHigh(q, v.high))) },
      { name: { en: "DCPO, lower", zh: "DCPO 下界" }, points: along(0.005, 1, (q) => dynamicLow(q, v.low)) },
      { name: { en: "fixed", zh: "固定边界" }, points: [[0, 1 + v.fixed], [1, 1 + v.fixed]], style: "c4 dashed" },
      { name: null, points: [[0, 1 - v.fixed], [1, 1 - v.fixed]], style: "c4 dashed" },
    ],
    marker: (v) => [v.q, Math.min(4, dynamicHigh(v.q, v.high))],
    readouts: (v) => [
      [{ en: "lower bound at q", zh: "q 处的下界" }, short(dynamicLow(v.q, v.low))],
      [{ en: "upper bound at q", zh: "q 处的上界" }, short(dynamicHigh(v.q, v.high))],
      [{ en: "probability it may reach", zh: "可达到的概率" }, short(Math.min(1, v.q * dynamicHigh(v.q, v.high)))],
    ],
  },
  {
    id: "overlong", dragX: "length",
    title: { en: "The soft overlong punishment", zh: "柔性超长惩罚" },
    text: { en: "DAPO takes nothing off a completion up to L_max − L_cache tokens, then linearly more, to −1 at L_max, the generation cap.",
      zh: "DAPO 对长度不超过 L_max − L_cache 的回复不作惩罚，此后线性加重，在生成上限 L_max 处为 −1。" },
    controls: [slider("limit", "L_max", "L_max", 1024, 32768, 256, 20480), slider("cache", "L_cache", "L_cache", 256, 16384, 256, 4096), slider("length", "length", "长度", 0, 32768, 128, 18432)],
    x: { en: "tokens", zh: "token 数", from: 0, to: 32768 }, y: { en: "reward added", zh: "附加奖励", from: -1, to: 0 },
    curves: (v) => [{ name: { en: "punishment", zh: "惩罚" }, points: along(0, 32768, (n) => overlong(n, v.limit, Math.min(v.cache, v.limit)), 1024) }],
    marker: (v) => [v.length, overlong(v.length, v.limit, Math.min(v.cache, v.limit))],
    readouts: (v) => [[{ en: "punishment", zh: "惩罚" }, short(overlong(v.length, v.limit, Math.min(v.cache, v.limit)))], [{ en: "begins at", zh: "开始于" }, short(v.limit - Math.min(v.cache, v.limit))]],
  },
  {
    id: "aggregation",
    title: { en: "How much a token weighs", zh: "一个 token 有多重" },
    text: { en: "Two completions of different length. The sequence mean (GRPO) gives a token of the long one less; the token mean (DAPO) treats all alike, so the long one counts more as a whole; Dr.GRPO divides by a constant. Shown: what all tokens of the second weigh together, by its length.",
      zh: "两个长度不同的回复。序列均值(GRPO)使长回复的 token 更轻;token 均值(DAPO)一视同仁，因而长回复整体更重；Dr.GRPO 除以常数。所示为第二个回复的全部 token 的总权重随其长度的变化。" },
    controls: [slider("first", "length of the first", "第一个的长度", 1, 2000, 1, 100), slider("second", "length of the second", "第二个的长度", 1, 2000, 1, 400), slider("limit", "constant length (Dr.GRPO)", "常数长度(Dr.GRPO)", 100, 4000, 100, 2000)],
    x: { en: "length of the second", zh: "第二个的长度", from: 1, to: 2000 }, y: { en: "weight of all its tokens", zh: "其全部 token 的权重", from: 0, to: 1 },
    curves: (v) => ["sequence_mean", "token_mean", "constant"].map((mode) => ({
      name: { sequence_mean: { en: "sequence mean (GRPO)", zh: "序列均值(GRPO)" }, token_mean: { en: "token mean (DAPO)", zh: "token 均值(DAPO)" }, constant: { en: "constant (Dr.GRPO)", zh: "常数(Dr.GRPO)" } }[mode],
      points: along(1, 2000, (n) => Math.min(1, n * weights(mode, [v.first, n], v.limit)[1])),
    })),
    marker: (v) => [v.second, v.second * weights("token_mean", [v.first, v.second], v.limit)[1]],
    dragX: "second",
    readouts: (v) => [
      [{ en: "per token, sequence mean", zh: "每 token，序列均值" }, weights("sequence_mean", [v.first, v.second], v.limit).map(short).join(" / ")],
      [{ en: "per token, token mean", zh: "每 token,token 均值" }, weights("token_mean", [v.first, v.second], v.limit).map(short).join(" / ")],
      [{ en: "per token, sum of sequence means (DCPO)", zh: "每 token，序列均值之和(DCPO)" }, weights("sequence_sum", [v.first, v.second], v.limit).map(short).join(" / ")],
      [{ en: "per token, constant", zh: "每 token，常数" }, weights("constant", [v.first, v.second], v.limit).map(short).join(" / ")],
    ],
  },
  {
    id: "smoothing",
    title: { en: "Smoothed advantages, visit by visit", zh: "逐次访问的平滑优势" },
    text: { en: "DCPO blends the advantage within this visit's group with the one over all answers to the prompt so far, and takes the smaller in absolute value. When a group agrees (all right, all wrong) the plain advantage is zero; the smoothed one still teaches, if earlier visits differed.",
      zh: "DCPO 把本次组内优势与该提示迄今全部回答上的优势混合，取绝对值较小者。当一组全对或全错时普通优势为零；若此前结果不同，平滑优势仍能提供信号。" },
    controls: [slider("size", "group size G", "组大小 G", 2, 32, 1, 16), ...[1, 2, 3, 4, 5, 6].map((i) => slider(`v${i}`, `share right, visit ${i}`, `第 ${i} 次正确比例`, 0, 1, 0.125, [0.25, 0.5, 0.75, 1, 1, 1][i - 1]))],
    x: { en: "visit", zh: "访问", from: 1, to: 6 }, y: { en: "advantage", zh: "优势", from: -3, to: 3 },
    curves: (v) => {
      const s = smoothed([1, 2, 3, 4, 5, 6].map((i) => Math.round(v[`v${i}`] * v.size)), v.size);
      return [
        { name: { en: "right answer, smoothed", zh: "正确回答，平滑" }, points: s.map((x) => [x.visit, x.right]) },
        { name: { en: "wrong answer, smoothed", zh: "错误回答，平滑" }, points: s.map((x) => [x.visit, x.wrong]) },
        { name: { en: "right answer, plain (GRPO)", zh: "正确回答，普通(GRPO)" }, points: s.map((x) => [x.visit, x.fresh]), style: "c4 dashed" },
      ];
    },
    marker: (v) => [6, smoothed([1, 2, 3, 4, 5, 6].map((i) => Math.round(v[`v${i}`] * v.size)), v.size)[5].right],
    readouts: (v) => {
      const s = smoothed([1, 2, 3, 4, 5, 6].map((i) => Math.round(v[`v${i}`] * v.size)), v.size);
      return [[{ en: "right answer, last visit", zh: "正确回答，最后一次" }, short(s[5].right)], [{ en: "the same, plain", zh: "同上，普通" }, short(s[5].fresh)]];
    },
  },
  {
    id: "dead", dragX: "p",
    title: { en: "When a group learns nothing", zh: "一组何时学不到东西" },
    text: { en: "A group whose answers are all right or all wrong has no advantage: probability pᴳ + (1 − p)ᴳ at pass rate p. Larger groups see more of the hard and the easy problems, at more rollouts.",
      zh: "全对或全错的组没有优势：通过率为 p 时概率为 pᴳ + (1 − p)ᴳ。组越大，越能从难题与易题中得到信号，但需要更多 rollout。" },
    controls: [slider("size", "group size G", "组大小 G", 2, 64, 1, 16), slider("p", "pass rate p", "通过率 p", 0, 1, 0.01, 0.9)],
    x: { en: "pass rate", zh: "通过率", from: 0, to: 1 }, y: { en: "share of dead groups", zh: "无信号组的比例", from: 0, to: 1 },
    curves: (v) => [{ name: { en: "dead groups", zh: "无信号的组" }, points: along(0, 1, (p) => dead(p, v.size)) }],
    marker: (v) => [v.p, dead(v.p, v.size)],
    readouts: (v) => [[{ en: "dead groups at p", zh: "p 处无信号的组" }, percent(dead(v.p, v.size))], [{ en: "groups to generate for each mixed one", zh: "每得到一个混合组需生成的组数" }, dead(v.p, v.size) < 1 ? short(1 / (1 - dead(v.p, v.size))) : "∞"]],
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
  document.getElementById("run").textContent = tokens.length ? say({ en: `${tokens.length} tokens of your run are the dots on the first figure.`, zh: `第一张图中的圆点是你的运行中的 ${tokens.length} 个 token。` }) : "";
  for (const element of document.querySelectorAll("[data-en]")) element.textContent = element.dataset[language];
  document.getElementById("contents").replaceChildren(...panels.map((panel) => make("a", { href: `#${panel.id}` }, say(panel.title))));
  for (const panel of drawn) panel.draw();
}
document.getElementById("theme").addEventListener("click", () => { dark = !dark; drawAll(); });
document.getElementById("language").addEventListener("click", () => { language = language === "en" ? "zh" : "en"; drawAll(); });
window.addEventListener("resize", drawAll);
drawAll();
