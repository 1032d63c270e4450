// Rows of a query with its neighbors in both models, and the browser that lists them.

const PER_PAGE = 8;
const RINGS = { local: "○", hf: "□" }; // as on the maps

function make(tag, properties = {}, ...content) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...content);
  return made;
}

function makeButton(action, properties, ...content) {
  const button = make("button", { type: "button", ...properties }, ...content);
  button.addEventListener("click", action);
  return button;
}

// After a redraw the keyboard focus is on the same button as before.
function refill(box, ...content) {
  const place = [...box.querySelectorAll("button")].indexOf(document.activeElement);
  box.replaceChildren(...content);
  box.querySelectorAll("button")[place]?.focus();
}

// An img and not a canvas: a browser gives every canvas a layer, which makes a page of many slow.
const imageAt = (src) => make("img", { decoding: "sync", alt: "", src });
const imageOf = (id) => imageAt(tileOf(id).address);
const pathOf = (id, tag) => (data.paths ? [make(tag, { className: "path" }, data.paths[id])] : []);

function neighborTile(query, model, rank) {
  const id = model.neighbors[query][rank];
  const similarity = model.similarities[query][rank].toFixed(model.digits).replace("-", "−");
  const right = data.label[id] === data.label[query];
  const both = paired && models.every((other) => other.neighbors[query].includes(id));
  const words = `, ${right ? "right class" : "wrong class"}, image ${data.index[id]}${both ? ", listed by both models" : ""}`;
  const title = [`image ${data.index[id]}: ${className(id)}`, data.paths?.[id]].filter(Boolean).join("\n");
  const tile = makeButton(
    () => choose(id),
    { className: right ? "tile" : "tile wrong", title, disabled: id >= points },
    id < points ? imageOf(id) : make("div", { className: "absent" }, "not on the map"),
    make("b", { className: model.digits > 2 ? "long" : "" }, `${right ? "✓" : "✗"} ${similarity}`),
    make("span", {}, `${both ? "◎ " : ""}${className(id)}`),
    make("span", { className: "unseen" }, words),
    ...pathOf(id, "span"),
  );
  for (const type of ["pointerenter", "focus"]) tile.addEventListener(type, () => point(id < points ? id : -1));
  for (const type of ["pointerleave", "blur"]) tile.addEventListener(type, () => point(-1));
  return tile;
}

function queryRow(query) {
  const index = `image ${data.index[query]}`;
  const find = () => {
    choose(query);
    goTo(data.index[query]);
  };
  const words = make(
    "div", {},
    make("p", {}, className(query)),
    make("p", { className: "note" }, index),
    ...pathOf(query, "p"),
    makeButton(find, { ariaLabel: `Find on maps: ${index}` }, "Find on maps"),
  );
  const sides = models.map((model) => {
    const ring = make("span", { ariaHidden: "true" }, RINGS[model.key]);
    const precision = make("span", {}, `precision@5: ${fraction(model, query)}`);
    const tiles = model.neighbors[query].map((_, rank) => make("li", {}, neighborTile(query, model, rank)));
    return make("div", { className: model.key }, make("h3", {}, ring, ` ${model.name} `, precision), make("ol", {}, ...tiles));
  });
  const ariaLabel = `Image ${data.index[query]}, ${className(query)}`;
  return make("article", { className: "query", ariaLabel }, make("div", { className: "image" }, imageOf(query), words), ...sides);
}

// Ties are in the order of the images, so that a link shows the same page everywhere.
function sortedRows() {
  const mutual = (row) => (data.mutual ? data.mutual[row] : 0);
  const cost = {
    gap: (row) => -100 * Math.abs(gap(row)) + mutual(row),
    hf: (row) => -100 * gap(row) + mutual(row),
    local: (row) => 100 * gap(row) + mutual(row),
    shared: mutual,
    worst: (row) => models[0].hits?.[row] ?? 0,
    best: (row) => -(models[0].hits?.[row] ?? 0),
    index: (row) => data.index[row],
  }[state.sort];
  return shownRows().filter((row) => !state.selected || state.selected.has(row)).sort((a, b) => cost(a) - cost(b) || a - b);
}

function showQueries() {
  const rows = sortedRows();
  const pages = Math.max(1, Math.ceil(rows.length / PER_PAGE));
  state.page = Math.min(state.page, pages - 1);
  const first = state.page * PER_PAGE;
  refill(byId("queries"), ...rows.slice(first, first + PER_PAGE).map(queryRow));
  byId("page").textContent = `${state.page + 1} of ${pages}`;
  for (const button of document.querySelectorAll("[data-page]")) {
    const target = state.page + Number(button.dataset.page);
    button.disabled = target < 0 || target >= pages;
  }
  const filters = state.classes.size || state.disagree ? " passing the filters" : "";
  const noun = `${state.selected ? "selected " : ""}${rows.length === 1 ? "image" : "images"}`;
  byId("found").textContent = `${rows.length.toLocaleString("en")} ${noun}${filters}`;
}

function showChosen() {
  const row = active();
  const rings = models.map((model) => `${RINGS[model.key]} ${model.name}`).join(", ");
  const help = `Point at an image on a map, or go to one by arrow keys, to see its nearest neighbors here and on the maps (${rings}).`;
  refill(byId("chosen"), row >= 0 ? queryRow(row) : make("p", { className: "empty" }, help));
}

// Goes to an image on the maps, or says that it is not there.
function goTo(index) {
  const found = rowOf(index) >= 0;
  byId("missing").hidden = found;
  byId("missing").textContent = `image ${index} is not on this page`;
  byId(found ? "explore" : "missing").scrollIntoView({ block: "start" });
  if (found) say(rowOf(index));
}
