// One model's map: a canvas of all signs, and one above it for what follows the pointer.

// Lightness rises throughout, and both ends stand out from white and from black.
const SCALE = ["#6a4fb3", "#5070c0", "#3f8fb0", "#4aa888", "#a5bf63", "#f2d349"];
const LEVELS = ["X", "D", "o"]; // few, some, most
const PLUS = [[0.4, 0.4], [0.4, 1.15], [-0.4, 1.15], [-0.4, 0.4], [-1.15, 0.4], [-1.15, -0.4],
  [-0.4, -0.4], [-0.4, -1.15], [0.4, -1.15], [0.4, -0.4], [1.15, -0.4], [1.15, 0.4]];
const CORNERS = { // of each shape but the circle
  o: [],
  "^": [[0, -1.25], [1.08, 0.62], [-1.08, 0.62]],
  v: [[0, 1.25], [1.08, -0.62], [-1.08, -0.62]],
  s: [[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]],
  D: [[0, -1.25], [1.25, 0], [0, 1.25], [-1.25, 0]],
  P: PLUS,
  X: PLUS.map(([u, v]) => [(u - v) / Math.SQRT2, (u + v) / Math.SQRT2]),
};
const dark = matchMedia("(prefers-color-scheme: dark)");
let sheet = null; // the context of a canvas that holds all pictures
const tiles = new Map();

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function sign(g, shape, x, y, r) {
  g.beginPath();
  if (shape === "o") g.arc(x, y, r, 0, 7);
  for (const [u, v] of CORNERS[shape]) g.lineTo(x + u * r, y + v * r);
  g.closePath();
}

function drawSign(g, [shape, fill], x, y, r) {
  sign(g, shape, x, y, r);
  g.fillStyle = fill;
  g.fill();
  g.strokeStyle = color("outline");
  g.lineWidth = Math.max(0.6, r / 6);
  g.stroke();
}

const signOf = (share) => [LEVELS[Math.round(share * 5) >> 1], SCALE[Math.round(share * 5)]];

// All signs that can occur, and the number of the one that an image has.
function signs(model) {
  if (state.color === "class") return [data.signs, (row) => data.label[row]];
  const [top, values] = state.color === "hits" ? [5, model.hits] : [10, data.mutual];
  const steps = Array.from({ length: top + 1 }, (_, value) => signOf(value / top));
  return values ? [steps, (row) => values[row]] : [[["o", "#888888"]], () => 0];
}

// Each picture is cut out once: drawing from the whole sheet takes milliseconds every time.
function tileOf(id) {
  if (!tiles.has(id)) {
    const { tile, columns } = data.sprite;
    const canvas = make("canvas", { width: tile, height: tile });
    const cut = sheet.getImageData((id % columns) * tile, Math.floor(id / columns) * tile, tile, tile);
    canvas.getContext("2d").putImageData(cut, 0, 0);
    tiles.set(id, { canvas, address: canvas.toDataURL() });
  }
  return tiles.get(id);
}

function drawImage(g, id, x, y, side, frame) {
  g.fillStyle = frame;
  g.fillRect(x - 2, y - 2, side + 4, side + 4);
  g.imageSmoothingEnabled = side < data.sprite.tile;
  g.drawImage(tileOf(id).canvas, x, y, side, side);
}

class Panel {
  constructor(section, model, view) {
    Object.assign(this, { model, number: view, box: section.querySelector(".map"), note: section.querySelector(".note") });
    this.base = section.querySelector(".base").getContext("2d");
    this.over = section.querySelector(".over").getContext("2d");
    // A fixed shuffle, so that no class lies on top of the others.
    const place = (row) => ((row + 1) * 48271) % 65521;
    this.order = allRows.toSorted((a, b) => place(a) - place(b));
    this.resize();
    new ResizeObserver(() => this.resize()).observe(this.box);
  }

  get view() {
    return state.views[this.number];
  }

  resize() {
    const { clientWidth: width, clientHeight: height } = this.box;
    const ratio = Math.min(devicePixelRatio || 1, 2);
    // Sizes that go with the text grow with it on large screens.
    const unit = parseFloat(getComputedStyle(document.documentElement).fontSize) / 16;
    Object.assign(this, { width, height, ratio, unit });
    for (const g of [this.base, this.over]) {
      g.canvas.width = Math.round(width * ratio);
      g.canvas.height = Math.round(height * ratio);
    }
    this.stamps = new Map();
    this.redraw();
  }

  get scale() {
    return this.view.zoom * 0.92 * Math.min(this.width, this.height);
  }

  // Where an image is on the screen.
  place(row) {
    const [x, y] = this.model[state.projection][row];
    return [(x / 10000 - this.view.x) * this.scale + this.width / 2, (y / 10000 - this.view.y) * this.scale + this.height / 2];
  }

  // A mark as a small picture, kept: drawing 2,000 paths takes four times as long.
  stamp([shape, fill], radius, dim) {
    const key = [shape, fill, radius.toFixed(1), dim].join();
    if (!this.stamps.has(key)) {
      const side = Math.ceil(2 * this.ratio * (radius * 1.35 + 1));
      const canvas = make("canvas", { width: side, height: side });
      const g = canvas.getContext("2d");
      g.globalAlpha = dim ? 0.16 : 1;
      drawSign(g, [shape, dim ? color("edge") : fill], side / 2, side / 2, radius * this.ratio * (dim ? 0.8 : 1));
      this.stamps.set(key, canvas);
    }
    return this.stamps.get(key);
  }

  redraw() {
    this.drawOver();
    if (!this.width) return;
    const [kinds, kindOf] = signs(this.model);
    const base = Math.min(7, Math.max(2.6, Math.sqrt((this.width * this.height) / points) / 4));
    const radius = base * Math.min(1.8, this.view.zoom ** 0.35);
    const g = this.base;
    const ratio = this.ratio;
    g.reset();
    const shown = [];
    for (const row of this.order) {
      if (!visible(row)) continue;
      const [x, y] = this.place(row);
      if (x > -9 && y > -9 && x < this.width + 9 && y < this.height + 9) shown.push([row, x, y]);
    }
    const dim = ([row]) => state.selected?.has(row) === false;
    shown.sort((a, b) => dim(b) - dim(a));
    for (const [row, x, y] of shown) {
      const mark = this.stamp(kinds[kindOf(row)], radius, dim([row]));
      g.drawImage(mark, Math.round(x * ratio - mark.width / 2), Math.round(y * ratio - mark.width / 2));
    }
    g.setTransform(ratio, 0, 0, ratio, 0, 0);
    // Near enough, the images themselves take the place of their signs.
    const close = this.view.zoom > 3 && shown.length <= 150;
    const half = 13 * this.unit;
    for (const [row, x, y] of close ? shown.filter((point) => !dim(point)) : []) {
      drawImage(g, row, x - half, y - half, 2 * half, kinds[kindOf(row)][1]);
      drawSign(g, kinds[kindOf(row)], x + half, y + half, half / 3);
    }
    this.drawNames(shown);
  }

  drawNames(shown) {
    if (data.classes.length > 20 || this.view.zoom > 6 || state.selected) return;
    const g = this.base;
    Object.assign(g, { textAlign: "center", textBaseline: "middle", lineJoin: "round", lineWidth: 4 });
    Object.assign(g, { strokeStyle: color("sheet"), fillStyle: color("ink"), font: `650 ${13 * this.unit}px ${color("sans")}` });
    const taken = [];
    for (const [label, marks] of Map.groupBy(shown, ([row]) => data.label[row])) {
      const [left, top] = [1, 2].map((axis) => marks.map((mark) => mark[axis]).sort((a, b) => a - b)[marks.length >> 1]);
      const name = data.classes[label].length > 16 ? `${data.classes[label].slice(0, 15)}…` : data.classes[label];
      const half = g.measureText(name).width / 2 + 3;
      const x = Math.min(Math.max(left, half), this.width - half);
      let y = top; // a name on another gives way downwards
      while (taken.some(([u, v, w]) => Math.abs(u - x) < w + half && Math.abs(v - y) < 17 * this.unit)) y += 6;
      taken.push([x, y, half]);
      g.strokeText(name, x, y);
      g.fillText(name, x, y);
    }
  }

  // The image under the pointer or chosen, with the neighbors of both models.
  drawOver(path = null) {
    const g = this.over;
    g.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    g.clearRect(0, 0, this.width, this.height);
    const row = active();
    if (row >= 0) this.drawNeighbors(g, row);
    if (!path) return;
    g.beginPath();
    for (const [x, y] of path) g.lineTo(x, y);
    g.closePath();
    Object.assign(g, { lineWidth: 1.5, strokeStyle: color("ink"), fillStyle: color("outline") });
    g.globalAlpha = 0.15;
    g.fill();
    g.globalAlpha = 1;
    g.stroke();
  }

  drawNeighbors(g, row) {
    const [x, y] = this.place(row);
    const outline = (shape, [u, v], radius, lineWidth) => {
      sign(g, shape, u, v, radius);
      g.lineWidth = lineWidth;
      g.stroke();
    };
    models.forEach((model, number) => {
      const near = model.neighbors[row].filter((id) => id < points).map((id) => this.place(id));
      Object.assign(g, { strokeStyle: color(model.key), lineWidth: model === this.model ? 1.4 : 0.8 });
      g.setLineDash(number ? [5, 4] : []);
      g.beginPath();
      for (const place of near) {
        g.moveTo(x, y);
        g.lineTo(...place);
      }
      g.stroke();
      g.setLineDash([]);
      for (const place of near) outline(number ? "s" : "o", place, number ? 10 : 7, 2.2);
    });
    g.strokeStyle = color("ink");
    outline("o", [x, y], 9, 3);
    if (pointed >= 0) outline("o", this.place(pointed), 15, 3);
    if (x < 0 || y < 0 || x > this.width || y > this.height) return;
    // The image next to its mark, on the side with more room.
    const side = 48 * this.unit;
    const left = x < this.width / 2 ? x + 14 : x - side - 14;
    const top = Math.min(Math.max(y - side / 2, 3), this.height - side - 3);
    drawImage(g, row, left, top, side, color("ink"));
  }

  // The shown image of the least cost, which is a function of its place; -1 if none is below the limit.
  best(cost, limit = Infinity) {
    let [best, least] = [-1, limit];
    for (const row of shownRows()) {
      const found = cost(...this.place(row));
      if (found < least) [best, least] = [row, found];
    }
    return best;
  }

  nearest(x, y, reach) {
    return this.best((u, v) => Math.hypot(u - x, v - y), reach);
  }

  // The next image in a direction: near, and not far off the line.
  next(row, dx, dy) {
    if (row < 0 || !visible(row)) return this.nearest(this.width / 2, this.height / 2);
    const [x, y] = this.place(row);
    const found = this.best((u, v) => {
      const along = (u - x) * dx + (v - y) * dy;
      const aside = Math.abs((u - x) * dy - (v - y) * dx);
      return along > 0.5 && aside <= along * 1.5 ? along + 2.5 * aside : Infinity;
    });
    return found < 0 ? row : found;
  }

  // What is at a place stays there.
  zoomBy(factor, x = this.width / 2, y = this.height / 2) {
    const before = this.view.zoom;
    this.view.zoom = Math.min(60, Math.max(0.5, before * factor));
    const growth = this.view.zoom / before - 1;
    this.panBy((this.width / 2 - x) * growth, (this.height / 2 - y) * growth);
  }

  panBy(dx, dy) {
    const view = this.view;
    view.x = Math.min(1.5, Math.max(-0.5, view.x - dx / this.scale));
    view.y = Math.min(1.5, Math.max(-0.5, view.y - dy / this.scale));
    this.redraw();
    keepState();
  }

  // Brings an image into sight without moving what is there already.
  reveal(row) {
    const [x, y] = this.place(row);
    if (x > 9 && y > 9 && x < this.width - 9 && y < this.height - 9) return;
    this.panBy(this.width / 2 - x, this.height / 2 - y);
  }

  inside(path) {
    return new Set(shownRows().filter((row) => {
      const [x, y] = this.place(row);
      return path.reduce((within, [a, b], i) => {
        const [c, d] = path.at(i - 1);
        return b > y !== d > y && x < ((c - a) * (y - b)) / (d - b) + a ? !within : within;
      }, false);
    }));
  }
}
