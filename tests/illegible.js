// What is wrong with how a page reads; tests/pages.py runs it in the page.
(smallest) => {
  const found = [], boxes = [];
  const shown = (element) => element.checkVisibility({ visibilityProperty: true });
  const scrolls = (element) => element.closest(".scroll") !== null;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement, text = node.textContent.trim();
    if (!text || parent.closest("script, style, option, .unseen") || !shown(parent)) continue;
    const size = parseFloat(getComputedStyle(parent).fontSize);
    if (size < smallest) found.push(`${size} px: ${text}`);
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects()) {
      if (box.width < 0.5) continue;
      if (!scrolls(parent) && (box.left < -0.5 || box.right > innerWidth + 0.5)) found.push(`beyond the page: ${text}`);
      const picture = parent.closest("svg")?.getBoundingClientRect();
      if (picture && (box.left < picture.left - 0.5 || box.right > picture.right + 0.5 || box.top < picture.top - 1 || box.bottom > picture.bottom + 1)) found.push(`cut off by its plot: ${text}`);
      for (let outer = parent; outer && !scrolls(outer); outer = outer.parentElement) {
        const limit = outer.getBoundingClientRect(), style = getComputedStyle(outer);
        if (style.overflowX !== "visible" && outer !== document.body && box.right > limit.right + 0.5) found.push(`cut off: ${text}`);
      }
      const margin = 0.22 * box.height;  // a line box is taller than its letters
      const view = parent.closest(".scroll")?.getBoundingClientRect();  // what is scrolled out of view covers nothing
      const left = Math.max(box.left, view?.left ?? -Infinity), right = Math.min(box.right, view?.right ?? Infinity);
      if (left < right) boxes.push({ text, owner: parent, left, right, top: box.top + margin, bottom: box.bottom - margin });
    }
  }
  const brush = document.createElement("canvas").getContext("2d");
  for (const control of [...document.querySelectorAll("input, select, button, textarea")].filter(shown)) {
    const box = control.getBoundingClientRect(), style = getComputedStyle(control);
    brush.font = `${style.fontSize} ${style.fontFamily}`;
    if (parseFloat(style.fontSize) < smallest) found.push(`${style.fontSize}: ${control.id}`);
    if (control.localName === "select") {
      for (const option of control.options) {
        const needed = brush.measureText(option.textContent).width + parseFloat(style.paddingLeft) + 24;
        if (needed > box.width) found.push(`cut off in a list: ${option.textContent}`);
      }
    }
    if (!scrolls(control) && (box.left < -0.5 || box.right > innerWidth + 0.5)) found.push(`beyond the page: ${control.id}`);
    boxes.push({ text: `<${control.localName} ${control.id}>`, owner: control, left: box.left, right: box.right, top: box.top, bottom: box.bottom });
  }
  boxes.sort((a, b) => a.top - b.top);
  for (let i = 0; i < boxes.length; i += 1) {
    for (let k = i + 1; k < boxes.length && boxes[k].top < boxes[i].bottom - 1; k += 1) {
      const [a, b] = [boxes[i], boxes[k]];
      const covered = Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - b.top > 1;
      if (covered && !a.owner.contains(b.owner) && !b.owner.contains(a.owner)) found.push(`overlap: ${a.text} | ${b.text}`);
    }
  }
  return found;
}
