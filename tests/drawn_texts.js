// Keeps what is written on canvases, for tests/illegible.js; runs before the page's own scripts.
(() => {
  const texts = new Map();  // canvas -> what stands on it
  window.drawnTexts = texts;
  const brush = CanvasRenderingContext2D.prototype;
  const { fillText, clearRect } = brush;
  const clear = (canvas) => texts.set(canvas, []);
  brush.clearRect = function (x, y, width, height) {
    if (width * height >= 0.9 * this.canvas.width * this.canvas.height) clear(this.canvas);
    return clearRect.call(this, x, y, width, height);
  };
  for (const name of ["width", "height"]) {
    const { get, set } = Object.getOwnPropertyDescriptor(HTMLCanvasElement.prototype, name);
    Object.defineProperty(HTMLCanvasElement.prototype, name, {
      configurable: true, enumerable: true, get,
      set(value) { clear(this); set.call(this, value); },
    });
  }
  brush.fillText = function (text, x, y, ...rest) {
    const size = parseFloat(/([\d.]+)px/.exec(this.font)?.[1] ?? "10"), around = this.measureText(text), to = this.getTransform();
    const corners = [[-around.actualBoundingBoxLeft, -around.actualBoundingBoxAscent], [around.actualBoundingBoxRight, around.actualBoundingBoxDescent]];
    const [[left, top], [right, bottom]] = corners;
    const points = [[left, top], [right, top], [right, bottom], [left, bottom]].map(([dx, dy]) => to.transformPoint(new DOMPoint(x + dx, y + dy)));
    if (!texts.has(this.canvas)) clear(this.canvas);
    texts.get(this.canvas).push({ text: String(text), size: size * Math.hypot(to.a, to.b), corners: points.map(({ x, y }) => [x, y]) });
    return fillText.call(this, text, x, y, ...rest);
  };
})();
