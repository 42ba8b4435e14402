// Start the page: language and theme, then the data, then every part draws itself.

function setLanguage(language) {
  page.language = language;
  root.lang = language === "zh" ? "zh-Hans" : "en";
  if (page.data) tell("language");
}

function setTheme(theme) {
  page.theme = theme;
  root.dataset.theme = theme;
  if (page.data) tell("theme");
}

function begin(data) {
  page.data = data;
  tell(...Object.keys(data));
  root.dataset.drawn = "1";
}

setLanguage(remembered("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en"));
const dark = window.matchMedia("(prefers-color-scheme: dark)");
setTheme(remembered("theme") ?? (dark.matches ? "dark" : "light"));
dark.addEventListener("change", () => { if (!remembered("theme")) setTheme(dark.matches ? "dark" : "light"); });
if ("live" in root.dataset) follow();
else {
  const failed = () => document.querySelector("main").prepend(make("p", { role: "alert" }, text("core.failed")));
  unpacked("document").then(begin, failed);
}
