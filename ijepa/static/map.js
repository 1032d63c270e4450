// One model's map: a canvas of all signs, and one above it for what follows the pointer.

// Lightness rises throughout, and both ends stand out from white and from black.
const SCALE = ["#6a4fb3", "#5070c0", "#3f8fb0", "#4aa888", "#a5bf63", "#f2d349"];
const LEVELS = [["X", "few"], ["D", "some"], ["o", "most"]];
const dark = matchMedia("(prefers-color-scheme: dark)");
let sheet = null; // the context of a canvas that holds all pictures
const tiles = new Map();

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function sign(g, shape, x, y, r) {
  const polygon = (count, turn, radius = r, inner = radius) => {
    for (let i = 0; i < count; i++) {
      const angle = turn + (2 * Math.PI * i) / count;
      const far = i % 2 ? inner : radius;
      g.lineTo(x + far * Math.cos(angle), y + far * Math.sin(angle));
    }
    g.closePath();
  };
  const cross = (turn) => {
    const [long, wide] = [1.15 * r, 0.4 * r];
    const corners = [[wide, wide], [wide, long], [-wide, long], [-wide, wide], [-long, wide], [-long, -wide],
      [-wide, -wide], [-wide, -long], [wide, -long], [wide, -wide], [long, -wide], [long, wide]];
    for (const [u, v] of corners) {
      g.lineTo(x + u * Math.cos(turn) - v * Math.sin(turn), y + u * Math.sin(turn) + v * Math.cos(turn));
    }
    g.closePath();
  };
  g.beginPath();
  if (shape === "o") g.arc(x, y, r, 0, 7);
  else if (shape === "^") polygon(3, -Math.PI / 2, 1.25 * r);
  else if (shape === "v") polygon(3, Math.PI / 2, 1.25 * r);
  else if (shape === "s") g.rect(x - 0.9 * r, y - 0.9 * r, 1.8 * r, 1.8 * r);
  else if (shape === "D") polygon(4, 0, 1.25 * r);
  else cross(shape === "X" ? Math.PI / 4 : 0);
}

function drawSign(g, [shape, fill], x, y, r) {
  sign(g, shape, x, y, r);
  g.fillStyle = fill;
  g.fill();
  g.strokeStyle = color("outline");
  g.lineWidth = Math.max(0.6, r / 6);
  g.stroke();
}

const level = (share) => LEVELS[Math.min(2, Math.floor(share * 2.999))][0];
const onScale = (share) => SCALE[Math.round(share * 5)];

// All signs that can occur, and the number of the one that an image has.
function signs(model) {
  if (state.color === "class") {
    return [data.classes.map((_, label) => [data.markers[label], data.colors[label]]), (row) => data.label[row]];
  }
  const [top, values] = state.color === "hits" ? [5, model.hits] : [10, data.mutual];
  const steps = Array.from({ length: top + 1 }, (_, value) => [level(value / top), onScale(value / top)]);
  return values ? [steps, (row) => values[row]] : [[["o", "#888888"]], () => 0];
}

// Each picture is cut out once: drawing from the whole sheet takes milliseconds every time.
function tileOf(id) {
  if (!tiles.has(id)) {
    const { tile, columns } = data.sprite;
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = tile;
    const cut = sheet.getImageData((id % columns) * tile, Math.floor(id / columns) * tile, tile, tile);
    canvas.getContext("2d").putImageData(cut, 0, 0);
    tiles.set(id, { canvas, address: canvas.toDataURL() });
  }
  return tiles.get(id);
}

function drawImage(g, id, x, y, side) {
  g.imageSmoothingEnabled = side < data.sprite.tile;
  g.drawImage(tileOf(id).canvas, x, y, side, side);
}

class Panel {
  constructor(section, model, view) {
    Object.assign(this, { model, number: view, box: section.querySelector(".map"), note: section.querySelector(".note") });
    this.base = section.querySelector(".base").getContext("2d");
    this.over = section.querySelector(".over").getContext("2d");
    // A fixed shuffle, so that no class lies on top of the others.
    this.order = Array.from({ length: points }, (_, i) => i);
    let seed = 1;
    for (let i = points - 1; i > 0; i--) {
      seed = (seed * 48271) % 2147483647;
      const j = seed % (i + 1);
      [this.order[i], this.order[j]] = [this.order[j], this.order[i]];
    }
    this.resize();
    new ResizeObserver(() => this.resize()).observe(this.box);
  }

  get view() {
    return state.views[this.number];
  }

  resize() {
    const { clientWidth: width, clientHeight: height } = this.box;
    const ratio = Math.min(devicePixelRatio || 1, 2);
    if (width === this.width && height === this.height && ratio === this.ratio) return;
    // Sizes that go with the text grow with it on large screens.
    const unit = parseFloat(getComputedStyle(document.documentElement).fontSize) / 16;
    Object.assign(this, { width, height, ratio, unit });
    for (const g of [this.base, this.over]) {
      g.canvas.width = Math.round(width * ratio);
      g.canvas.height = Math.round(height * ratio);
    }
    this.atlas = null;
    this.draw();
    this.drawOver();
  }

  get scale() {
    return this.view.zoom * 0.92 * Math.min(this.width, this.height);
  }

  // Where an image is on the screen.
  place(row) {
    const [x, y] = this.model[state.projection][row];
    return [(x / 10000 - this.view.x) * this.scale + this.width / 2, (y / 10000 - this.view.y) * this.scale + this.height / 2];
  }

  world(x, y) {
    return [(x - this.width / 2) / this.scale + this.view.x, (y - this.height / 2) / this.scale + this.view.y];
  }

  // Signs are drawn once into a row of stamps: drawing 2,000 paths anew takes four times as long.
  stamps() {
    const [kinds, kindOf] = signs(this.model);
    const base = Math.min(7, Math.max(2.6, Math.sqrt((this.width * this.height) / points) / 4));
    const radius = base * Math.min(1.8, this.view.zoom ** 0.35);
    const key = [state.color, radius.toFixed(1), this.ratio, dark.matches].join();
    if (this.atlas?.key !== key) {
      const side = Math.ceil(2 * this.ratio * (radius * 1.35 + 1));
      const canvas = document.createElement("canvas");
      canvas.width = side * kinds.length;
      canvas.height = 2 * side;
      const g = canvas.getContext("2d");
      kinds.forEach((kind, i) => {
        drawSign(g, kind, (i + 0.5) * side, side / 2, radius * this.ratio);
        g.globalAlpha = 0.16;
        drawSign(g, [kind[0], color("edge")], (i + 0.5) * side, 1.5 * side, radius * this.ratio * 0.8);
        g.globalAlpha = 1;
      });
      this.atlas = { key, canvas, side };
    }
    return { ...this.atlas, kindOf };
  }

  draw() {
    if (!this.width) return;
    const { canvas, side, kindOf } = this.stamps();
    const g = this.base;
    const ratio = this.ratio;
    g.setTransform(1, 0, 0, 1, 0, 0);
    g.clearRect(0, 0, g.canvas.width, g.canvas.height);
    const shown = [];
    for (const row of this.order) {
      if (!visible(row)) continue;
      const [x, y] = this.place(row);
      if (x > -9 && y > -9 && x < this.width + 9 && y < this.height + 9) shown.push([row, x, y]);
    }
    const dim = ([row]) => state.selected && !state.selected.has(row);
    if (state.selected) shown.sort((a, b) => dim(b) - dim(a));
    for (const point of shown) {
      const [row, x, y] = point;
      const top = dim(point) ? side : 0;
      g.drawImage(canvas, kindOf(row) * side, top, side, side, Math.round(x * ratio - side / 2), Math.round(y * ratio - side / 2), side, side);
    }
    g.setTransform(ratio, 0, 0, ratio, 0, 0);
    // Near enough, the images themselves take the place of their signs.
    if (this.view.zoom > 3 && shown.length <= 150) this.drawImages(shown.filter((point) => !dim(point)), kindOf);
    this.drawNames(shown);
  }

  drawImages(shown, kindOf) {
    const kinds = signs(this.model)[0];
    for (const [row, x, y] of shown) {
      const half = 13 * this.unit;
      this.base.fillStyle = kinds[kindOf(row)][1];
      this.base.fillRect(x - half - 2, y - half - 2, 2 * half + 4, 2 * half + 4);
      drawImage(this.base, row, x - half, y - half, 2 * half);
      drawSign(this.base, kinds[kindOf(row)], x + half, y + half, half / 3);
    }
  }

  drawNames(shown) {
    if (data.classes.length > 20 || this.view.zoom > 6 || state.selected) return;
    const spread = new Map();
    for (const [row, x, y] of shown) {
      const label = data.label[row];
      if (!spread.has(label)) spread.set(label, [[], []]);
      spread.get(label)[0].push(x);
      spread.get(label)[1].push(y);
    }
    const middle = (values) => values.sort((a, b) => a - b)[values.length >> 1];
    const g = this.base;
    Object.assign(g, { textAlign: "center", textBaseline: "middle", lineJoin: "round", lineWidth: 4 });
    g.font = `650 ${13 * this.unit}px ${color("sans")}`;
    const taken = [];
    for (const [label, [xs, ys]] of spread) {
      let [x, y] = [middle(xs), middle(ys)];
      const name = data.classes[label].length > 16 ? `${data.classes[label].slice(0, 15)}…` : data.classes[label];
      const half = g.measureText(name).width / 2 + 3;
      x = Math.min(Math.max(x, half), this.width - half);
      // A name on another gives way downwards.
      while (taken.some(([u, v, w]) => Math.abs(u - x) < w + half && Math.abs(v - y) < 17 * this.unit)) y += 6;
      taken.push([x, y, half]);
      g.strokeStyle = color("sheet");
      g.strokeText(name, x, y);
      g.fillStyle = color("ink");
      g.fillText(name, x, y);
    }
  }

  // The image under the pointer or chosen, with the neighbours of both models.
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
    models.forEach((model, number) => {
      g.strokeStyle = color(model.key);
      g.setLineDash(number ? [5, 4] : []);
      for (const id of model.neighbors[row]) {
        if (id >= points) continue;
        const [u, v] = this.place(id);
        g.lineWidth = model === this.model ? 1.4 : 0.8;
        g.beginPath();
        g.moveTo(x, y);
        g.lineTo(u, v);
        g.stroke();
      }
      g.setLineDash([]);
      g.lineWidth = 2.2;
      for (const id of model.neighbors[row]) {
        if (id >= points) continue;
        const [u, v] = this.place(id);
        g.beginPath();
        if (number) g.rect(u - 9, v - 9, 18, 18);
        else g.arc(u, v, 7, 0, 7);
        g.stroke();
      }
    });
    g.lineWidth = 3;
    g.strokeStyle = color("ink");
    g.beginPath();
    g.arc(x, y, 9, 0, 7);
    g.stroke();
    if (pointed >= 0) {
      g.beginPath();
      g.arc(...this.place(pointed), 15, 0, 7);
      g.stroke();
    }
    if (x > 0 && y > 0 && x < this.width && y < this.height) this.drawPicture(g, row, x, y);
  }

  // Beside the image's sign, where the picture hides the fewest neighbours.
  drawPicture(g, row, x, y) {
    const side = 48 * this.unit;
    const near = models.flatMap((model) => model.neighbors[row]).filter((id) => id < points).map((id) => this.place(id));
    const hidden = ([left, top]) =>
      near.filter(([u, v]) => u > left - 9 && u < left + side + 9 && v > top - 9 && v < top + side + 9).length;
    const spots = [[14, -side / 2], [-side - 14, -side / 2], [-side / 2, -side - 14], [-side / 2, 14]]
      .map(([dx, dy]) => [x + dx, y + dy])
      .filter(([left, top]) => left > 2 && top > 2 && left + side < this.width - 2 && top + side < this.height - 2);
    if (!spots.length) return;
    const [left, top] = spots.reduce((best, spot) => (hidden(spot) < hidden(best) ? spot : best));
    g.fillStyle = color("ink");
    g.fillRect(left - 2, top - 2, side + 4, side + 4);
    drawImage(g, row, left, top, side);
  }

  nearest(x, y, reach) {
    let [best, least] = [-1, reach * reach];
    for (let row = 0; row < points; row++) {
      if (!visible(row)) continue;
      const [u, v] = this.place(row);
      const distance = (u - x) ** 2 + (v - y) ** 2;
      if (distance < least) [best, least] = [row, distance];
    }
    return best;
  }

  // The next image in a direction: near, and not far off the line.
  next(row, dx, dy) {
    if (row < 0 || !visible(row)) return this.nearest(this.width / 2, this.height / 2, Infinity);
    const [x, y] = this.place(row);
    let [best, least] = [row, Infinity];
    for (let other = 0; other < points; other++) {
      if (other === row || !visible(other)) continue;
      const [u, v] = this.place(other);
      const along = (u - x) * dx + (v - y) * dy;
      const aside = Math.abs((u - x) * dy - (v - y) * dx);
      const cost = along + 2.5 * aside;
      if (along > 0.5 && aside <= along * 1.5 && cost < least) [best, least] = [other, cost];
    }
    return best;
  }

  zoomBy(factor, x = this.width / 2, y = this.height / 2) {
    const [u, v] = this.world(x, y);
    const view = this.view;
    view.zoom = Math.min(60, Math.max(0.5, view.zoom * factor));
    view.x = u - (x - this.width / 2) / this.scale;
    view.y = v - (y - this.height / 2) / this.scale;
    this.panBy(0, 0);
  }

  panBy(dx, dy) {
    const view = this.view;
    view.x = Math.min(1.5, Math.max(-0.5, view.x - dx / this.scale));
    view.y = Math.min(1.5, Math.max(-0.5, view.y - dy / this.scale));
  }

  // Brings an image into sight without moving what is there already.
  reveal(row) {
    const [x, y] = this.place(row);
    if (x > 20 && y > 20 && x < this.width - 20 && y < this.height - 20) return;
    this.panBy(this.width / 2 - x, this.height / 2 - y);
  }

  inside(path) {
    const found = new Set();
    for (let row = 0; row < points; row++) {
      if (!visible(row)) continue;
      const [x, y] = this.place(row);
      let within = false;
      for (let i = 0, j = path.length - 1; i < path.length; j = i++) {
        const [[a, b], [c, d]] = [path[i], path[j]];
        if (b > y !== d > y && x < ((c - a) * (y - b)) / (d - b) + a) within = !within;
      }
      if (within) found.add(row);
    }
    return found;
  }
}
