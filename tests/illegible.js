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
      const top = Math.max(box.top + margin, view?.top ?? -Infinity), bottom = Math.min(box.bottom - margin, view?.bottom ?? Infinity);
      if (left < right && top < bottom) boxes.push({ text, owner: parent, left, right, top, bottom });
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
  for (const [canvas, texts] of window.drawnTexts ?? []) {
    if (!canvas.isConnected || !shown(canvas)) continue;
    const place = canvas.getBoundingClientRect(), scale = canvas.width / place.width, outer = scrolls(canvas);
    for (const { text, size, corners } of texts) {
      if (!text.trim()) continue;
      if (size / scale < smallest - 0.05) found.push(`${size / scale} px in a plot: ${text}`);
      if (corners.some(([x, y]) => x < -1 || y < -1 || x > canvas.width + 1 || y > canvas.height + 1)) found.push(`cut off by its plot: ${text}`);
      const onPage = corners.map(([x, y]) => [place.left + x / scale, place.top + y / scale]);
      const [xs, ys] = [0, 1].map((axis) => onPage.map((corner) => corner[axis]));
      const box = { left: Math.min(...xs), right: Math.max(...xs), top: Math.min(...ys), bottom: Math.max(...ys) };
      if (!outer && (box.left < -0.5 || box.right > innerWidth + 0.5)) found.push(`beyond the page: ${text}`);
      // Each text is an owner of its own: two of one plot may not cover one another either.
      boxes.push({ text, owner: document.createElement("i"), corners: onPage, ...box });
    }
  }
  const cornersOf = (box) => box.corners ?? [[box.left, box.top], [box.right, box.top], [box.right, box.bottom], [box.left, box.bottom]];
  // Whether two texts, which may be written obliquely, are apart: seen along a side of one of them there is space between them.
  const apart = (a, b) => [a, b].some((one) => {
    const sides = cornersOf(one);
    return [0, 1].some((i) => {
      const [dx, dy] = [sides[i + 1][0] - sides[i][0], sides[i + 1][1] - sides[i][1]], length = Math.hypot(dx, dy) || 1;
      const [mine, other] = [sides, cornersOf(b === one ? a : b)].map((corners) => corners.map(([x, y]) => (x * dx + y * dy) / length));
      return Math.min(Math.max(...mine), Math.max(...other)) - Math.max(Math.min(...mine), Math.min(...other)) <= 1;
    });
  });
  boxes.sort((a, b) => a.top - b.top);
  for (let i = 0; i < boxes.length; i += 1) {
    for (let k = i + 1; k < boxes.length && boxes[k].top < boxes[i].bottom - 1; k += 1) {
      const [a, b] = [boxes[i], boxes[k]];
      const covered = Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - b.top > 1;
      if (covered && !apart(a, b) && !a.owner.contains(b.owner) && !b.owner.contains(a.owner)) found.push(`overlap: ${a.text} | ${b.text}`);
    }
  }
  return found;
}
