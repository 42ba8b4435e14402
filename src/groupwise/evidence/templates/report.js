// Draw the figures, again whenever the theme changes, and show the recorded completions.
const specs = JSON.parse(document.getElementById("specs").textContent);
const groups = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const button = document.getElementById("theme");

function setTheme(dark) {
  root.dataset.theme = dark ? "dark" : "light";
  button.textContent = dark ? "Light" : "Dark";
  drawFigures(dark);
}

async function drawFigures(dark) {
  for (const [id, spec] of Object.entries(specs)) {
    const container = document.querySelector(`#${id} .chart`);
    const line = dark ? "#2c333d" : "#e3e7ec";
    const config = { background: "transparent", axis: { gridColor: line, domainColor: line, tickColor: line } };
    try {
      await window.vegaEmbed(container, spec, { theme: dark ? "dark" : undefined, actions: false, renderer: "svg", config });
    } catch (error) {
      container.textContent = `This figure could not be drawn: ${error.message}`;
      console.error(error);
    }
  }
  root.dataset.drawn = dark ? "dark" : "light";
}

// Colour strength of a token, from -1 (full --low colour) to 1 (full --high colour).
const strength = {
  advantage: (x) => Math.tanh(x),
  ratio: (x) => Math.tanh(5 * Math.log(x)),
  entropy: (x) => Math.min(1, x / 1.5),
  probability: (x) => 1 - x,
  clipped: (x) => (x ? -1 : 0),
};
const names = ["advantage", "ratio", "entropy", "probability", "clipped"];

function showCompletions() {
  const quantity = document.getElementById("quantity").value;
  const step = Number(document.getElementById("step").value);
  const reader = document.getElementById("reader");
  reader.replaceChildren();
  for (const group of groups.filter((g) => g.step === step)) {
    const box = document.createElement("div");
    box.className = "group";
    const title = document.createElement("h3");
    title.textContent = group.prompt;
    box.append(title);
    for (const completion of group.completions) box.append(asElement(completion, quantity));
    reader.append(box);
  }
  if (!groups.length) reader.textContent = "This run recorded no tokens (training.tokens_every).";
}

function asElement(completion, quantity) {
  const box = document.createElement("div");
  box.className = "completion";
  const head = document.createElement("p");
  head.className = "soft";
  const verdict = { true: "correct, ", false: "wrong, ", null: "" }[completion.correct];
  head.textContent = `${verdict}reward ${completion.reward}${completion.stop === "length" ? ", truncated" : ""}`;
  const tokens = document.createElement("div");
  tokens.className = "tokens";
  completion.text.forEach((text, i) => {
    if (completion.left_out && i === completion.start) {
      const gap = document.createElement("p");
      gap.className = "soft";
      gap.textContent = `… ${completion.left_out.toLocaleString("en")} tokens left out …`;
      tokens.append(gap);
    }
    const span = document.createElement("span");
    span.textContent = text;
    const value = completion[quantity][i];
    if (value !== null) {
      const s = strength[quantity](value);
      span.style.backgroundColor = `color-mix(in srgb, var(${s < 0 ? "--low" : "--high"}) ${Math.round(70 * Math.abs(s))}%, transparent)`;
    }
    if (completion.role[i] !== "assistant") span.classList.add("answered");
    if (completion.clipped[i]) span.classList.add("clipped");
    span.title = `${completion.role[i]}\n` + names.map((name) => `${name} ${completion[name][i] ?? "not computed"}`).join("\n");
    tokens.append(span);
  });
  box.append(head, tokens);
  return box;
}

for (const step of [...new Set(groups.map((g) => g.step))]) document.getElementById("step").append(new Option(step, step));
document.getElementById("step").selectedIndex = document.getElementById("step").options.length - 1;
for (const id of ["step", "quantity"]) document.getElementById(id).addEventListener("change", showCompletions);
button.addEventListener("click", () => setTheme(root.dataset.theme !== "dark"));
const preference = window.matchMedia("(prefers-color-scheme: dark)");
preference.addEventListener("change", (event) => setTheme(event.matches));
showCompletions();
setTheme(preference.matches);
