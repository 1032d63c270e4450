// The controls, the pointer and the keys; every change goes through update().

readFragment(isState(location.hash) ? location.hash.slice(1) : "");
let [hovered, pointed] = [-1, -1];
const active = () => (hovered >= 0 ? hovered : state.chosen);
let panels = [];

function update({ list = true } = {}) {
  for (const name of Object.keys(CHOICES)) {
    (byId("tools").elements[name] ?? byId("browser").elements[name]).value = state[name];
  }
  byId("tools").elements.disagree.checked = state.disagree;
  for (const chip of byId("chips").children) {
    chip.setAttribute("aria-pressed", chip.dataset.label ? state.classes.has(Number(chip.dataset.label)) : !state.classes.size);
  }
  for (const panel of panels) {
    panel.box.classList.toggle("selecting", state.drag !== "pan");
    panel.note.textContent = panel.model.notes[state.projection];
    panel.redraw();
  }
  showLegend();
  showStatus();
  showChosen();
  if (list) showQueries();
  byId("missing").hidden = true;
  keepState();
}

function choose(row) {
  state.chosen = row;
  hovered = pointed = -1;
  if (row >= 0) for (const panel of panels) panel.reveal(row);
  update({ list: false });
}

function hover(row) {
  if (row === hovered) return;
  hovered = row;
  point(-1);
  showChosen();
}

// A neighbor under the pointer is shown on the maps.
function point(row) {
  pointed = row;
  for (const panel of panels) panel.drawOver();
}

// Other images pass: the browser begins at its first page.
function restrict(changes) {
  Object.assign(state, changes, { page: 0 });
  update();
}

const select = (rows) => restrict({ selected: rows?.size ? rows : null });

// ---- words about what is shown

function signImage(kind) {
  const canvas = make("canvas", { width: 28, height: 28 });
  drawSign(canvas.getContext("2d"), kind, 14, 14, 9);
  return imageAt(canvas.toDataURL());
}

function showLegend() {
  const [top, words] = state.color === "hits" ? [5, "Of five neighbors, right:"] : [10, "Of ten neighbors, shared:"];
  const values = (step) => (top === 5 || !step ? `${step}` : `${2 * step - 1}–${2 * step}`);
  const steps = [0, 1, 2, 3, 4, 5].map((step) => make("span", {}, signImage(signOf(step / 5)), values(step)));
  byId("legend").replaceChildren(...(state.color === "class" ? [] : [make("span", {}, words), ...steps]));
}

// Halves round up, as in the report, whatever the last bit of a mean says.
const rounded = (share) => `${(100 * share + 1e-9).toFixed(1)}%`;

function means(rows) {
  if (!rows.length || !models[0].hits) return "not defined";
  const mean = (model) => rows.reduce((sum, row) => sum + model.hits[row], 0) / (5 * rows.length);
  return models.map((model) => `${model.name} ${rounded(mean(model))}`).join(", ");
}

function showStatus() {
  const rows = shownRows();
  const shown = `${rows.length.toLocaleString("en")} of ${points.toLocaleString("en")} images shown`;
  byId("status").textContent = rows.length ? `${shown}; their precision@5: ${means(rows)}.` : `${shown}.`;
  showSelection();
}

function showSelection() {
  const box = byId("selection");
  box.hidden = !state.selected;
  if (!state.selected) return;
  const rows = [...state.selected].filter(visible);
  const classes = [...Map.groupBy(rows, className)].sort((a, b) => b[1].length - a[1].length);
  const common = classes.slice(0, 6).map(([name, found]) => `${name} ${found.length}`);
  const thumbs = rows.slice(0, 40).map((row) =>
    makeButton(() => choose(row), { ariaLabel: `Image ${data.index[row]}, ${className(row)}` }, imageOf(row)));
  const more = rows.length > 40 ? " The first 40 are below." : "";
  const found = `${rows.length} selected (${common.join(", ")}). Precision@5: ${means(rows)}.${more}`;
  const words = rows.length ? found : "No selected image passes the filters.";
  const clear = makeButton(() => select(null), { id: "clear" }, "Clear selection");
  refill(box, make("p", {}, words), make("div", { className: "thumbs" }, ...thumbs), clear);
}

function say(row) {
  const each = models.map((model) => `${model.name} ${fraction(model, row)}`).join(", ");
  byId("spoken").textContent = `Image ${data.index[row]}, ${className(row)}. Precision@5: ${each}.`;
}

// ---- controls

function setUpChips() {
  const chip = (text, count, label) => {
    const toggle = () => {
      if (label === undefined) state.classes.clear();
      else if (!state.classes.delete(label)) state.classes.add(label);
      restrict();
    };
    const sign = label === undefined ? [] : [signImage(data.signs[label])];
    const number = make("span", { className: "count" }, count);
    const button = makeButton(toggle, {}, ...sign, make("span", {}, `${text} `), number);
    if (label !== undefined) button.dataset.label = label;
    return button;
  };
  const classes = [...Map.groupBy(allRows, (row) => data.label[row])].sort((a, b) => a[0] - b[0]);
  const chips = classes.map(([label, rows]) => chip(data.classes[label], rows.length, label));
  refill(byId("chips"), chip("All classes", points), ...chips);
}

function setUpControls() {
  setUpChips();
  byId("browser").elements.sort.append(...Object.entries(SORTS).map(([value, name]) => new Option(name, value)));
  byId("tools").addEventListener("change", ({ target }) => {
    if (target.type === "checkbox") return restrict({ disagree: target.checked });
    state[target.name] = target.value;
    return update({ list: false });
  });
  byId("tools").addEventListener("click", ({ target }) => target.dataset.do && view(target.dataset.do, panels));
  byId("browser").addEventListener("submit", (event) => {
    event.preventDefault();
    const index = byId("browser").elements.index.value.trim();
    if (rowOf(index) >= 0) choose(rowOf(index));
    if (index) goTo(index);
  });
  byId("browser").elements.sort.addEventListener("change", ({ target }) => restrict({ sort: target.value }));
  for (const button of document.querySelectorAll("[data-page]")) {
    button.addEventListener("click", () => {
      state.page += Number(button.dataset.page);
      update();
      byId("browse").scrollIntoView({ block: "start" });
    });
  }
  byId("download").addEventListener("click", download);
}

function view(what, which) {
  for (const panel of which) {
    if (what === "reset") Object.assign(panel.view, WHOLE);
    panel.zoomBy({ in: 1.5, out: 1 / 1.5, reset: 1 }[what]);
  }
}

function download() {
  const href = URL.createObjectURL(new Blob([byId("metrics").textContent], { type: "application/json" }));
  make("a", { href, download: "metrics.json" }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10000);
}

// ---- pointer and keys on a map

function setUpPointer(panel) {
  const box = panel.box;
  const fingers = new Map();
  let [path, start, moved] = [null, null, false];
  const at = (event) => {
    const frame = box.getBoundingClientRect();
    return [event.clientX - frame.left - box.clientLeft, event.clientY - frame.top - box.clientTop];
  };

  box.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    fingers.set(event.pointerId, at(event));
    box.setPointerCapture(event.pointerId);
    start = at(event);
    moved = fingers.size > 1;
    path = (state.drag !== "pan" || event.shiftKey) && fingers.size === 1 ? [start] : null;
  });
  box.addEventListener("pointermove", (event) => {
    const [before, [x, y]] = [fingers.get(event.pointerId), at(event)];
    if (fingers.size === 2 && before) {
      const other = [...fingers].find(([id]) => id !== event.pointerId)[1];
      const apart = ([u, v]) => Math.hypot(u - other[0], v - other[1]);
      fingers.set(event.pointerId, [x, y]);
      return panel.zoomBy(apart([x, y]) / Math.max(1, apart(before)), ...other);
    }
    if (!start) return hover(panel.nearest(x, y, 16));
    moved ||= Math.hypot(x - start[0], y - start[1]) > 5;
    if (!moved || !before) return undefined;
    fingers.set(event.pointerId, [x, y]);
    box.classList.toggle("grabbing", !path);
    if (!path) return panel.panBy(x - before[0], y - before[1]);
    path = state.drag === "box" ? [start, [x, start[1]], [x, y], [start[0], y]] : [...path, [x, y]];
    return panel.drawOver(path);
  });
  const end = (event) => {
    if (!fingers.delete(event.pointerId) || fingers.size) return;
    box.classList.remove("grabbing");
    const [drawn, click] = [path, !moved && event.type === "pointerup"];
    start = path = null;
    if (click) choose(panel.nearest(...at(event), event.pointerType === "mouse" ? 16 : 26));
    else if (drawn && event.type === "pointerup") select(panel.inside(drawn));
    else panel.drawOver();
  };
  for (const type of ["pointerup", "pointercancel"]) box.addEventListener(type, end);
  box.addEventListener("pointerleave", () => !start && hover(-1));
  box.addEventListener("wheel", (event) => {
    // Without Ctrl (which a pinch on a touchpad sends as well) the wheel scrolls the page.
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    panel.zoomBy(Math.exp(-event.deltaY / 200), ...at(event));
  }, { passive: false });
  box.addEventListener("dblclick", (event) => panel.zoomBy(2, ...at(event)));
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const VIEWS = { "+": "in", "=": "in", "-": "out", 0: "reset" };

function setUpKeys(panel) {
  const go = (row) => {
    if (row < 0) return;
    panel.reveal(row);
    hover(row);
    say(row);
  };
  const toggle = (row) => select(new Set(state.selected).symmetricDifference(new Set([row])));
  const keys = {
    Enter: () => active() >= 0 && choose(active()),
    " ": () => active() >= 0 && toggle(active()),
    Home: () => go(panel.next(-1)),
    Escape: () => (hovered >= 0 || state.chosen >= 0 ? choose(-1) : select(null)),
  };
  panel.box.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const arrow = ARROWS[event.key];
    if (arrow && event.shiftKey) panel.panBy(-60 * arrow[0], -60 * arrow[1]);
    else if (arrow) go(panel.next(active(), ...arrow));
    else if (VIEWS[event.key]) view(VIEWS[event.key], [panel]);
    else if (keys[event.key]) keys[event.key]();
    else return;
    event.preventDefault();
  });
}

// ---- beginning

async function begin() {
  if (!Map.groupBy) return; // a browser from before 2024 keeps the notices
  for (const part of document.querySelectorAll(".scripted")) part.hidden = false;
  for (const part of document.querySelectorAll(".unscripted")) part.hidden = true;
  const sprite = byId("sprite");
  await sprite.decode();
  const canvas = new OffscreenCanvas(sprite.naturalWidth, sprite.naturalHeight);
  sheet = canvas.getContext("2d", { willReadFrequently: true });
  sheet.drawImage(sprite, 0, 0);
  panels = models.map((model, i) => new Panel(document.querySelector(`[data-model="${model.key}"]`), model, i));
  setUpControls();
  panels.forEach(setUpPointer);
  panels.forEach(setUpKeys);
  const follow = () => {
    update();
    if (state.wanted) goTo(state.wanted);
  };
  addEventListener("hashchange", ({ newURL }) => {
    const { hash } = new URL(newURL); // the page may have written its own into the address since
    if (!isState(hash)) return keepState();
    if (hash.slice(1) === fragment()) return undefined; // as after Back from a definition
    hovered = pointed = -1;
    readFragment(hash.slice(1));
    return follow();
  });
  dark.addEventListener("change", () => {
    for (const panel of panels) panel.stamps.clear();
    setUpChips();
    update();
  });
  follow();
  document.body.dataset.ready = "yes";
}

begin();
