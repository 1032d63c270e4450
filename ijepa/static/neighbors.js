// Rows of a query with its neighbors in both models, and the browser that lists them.

const PER_PAGE = 8;
const RINGS = { local: "○", hf: "□" }; // as on the maps

function make(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

function makeButton(action, text = "", label = "") {
  const button = make("button", "", text);
  button.type = "button";
  if (label) button.setAttribute("aria-label", label);
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
function imageAt(address) {
  const image = make("img");
  Object.assign(image, { decoding: "sync", alt: "", src: address });
  return image;
}

const imageOf = (id) => imageAt(tileOf(id).address);

function neighborTile(query, model, rank) {
  const id = model.neighbors[query][rank];
  const similarity = model.similarities[query][rank].toFixed(model.digits).replace("-", "−");
  const right = data.label[id] === data.label[query];
  const both = paired && models.every((other) => other.neighbors[query].includes(id));
  const tile = makeButton(() => choose(id));
  tile.className = right ? "tile" : "tile wrong";
  tile.append(id < points ? imageOf(id) : make("div", "absent", "not on the map"));
  tile.append(make("b", model.digits > 2 ? "long" : "", `${right ? "✓" : "✗"} ${similarity}`), make("span", "", `${both ? "◎ " : ""}${className(id)}`));
  const words = `, ${right ? "right class" : "wrong class"}, image ${data.index[id]}${both ? ", listed by both models" : ""}`;
  tile.append(make("span", "unseen", words));
  if (data.paths) tile.append(make("span", "path", data.paths[id]));
  tile.title = [`image ${data.index[id]}: ${className(id)}`, data.paths?.[id]].filter(Boolean).join("\n");
  tile.disabled = id >= points;
  for (const type of ["pointerenter", "focus"]) tile.addEventListener(type, () => point(id));
  for (const type of ["pointerleave", "blur"]) tile.addEventListener(type, () => point(-1));
  return tile;
}

function queryRow(query) {
  const row = make("article", "query");
  row.setAttribute("aria-label", `Image ${data.index[query]}, ${className(query)}`);
  const image = make("div", "image");
  const words = make("div");
  words.append(make("p", "", className(query)), make("p", "note", `image ${data.index[query]}`));
  if (data.paths) words.append(make("p", "path", data.paths[query]));
  const find = () => {
    choose(query);
    goTo(data.index[query]);
  };
  words.append(makeButton(find, "Find on maps", `Find on maps: image ${data.index[query]}`));
  image.append(imageOf(query), words);
  row.append(image);
  for (const model of models) {
    const side = make("div", model.key);
    const title = make("h3");
    const ring = make("span", "ring", RINGS[model.key]);
    ring.setAttribute("aria-hidden", "true");
    title.append(ring, ` ${model.name} `, make("span", "", `precision@5: ${fraction(hits(model, query))}`));
    const list = make("ol");
      for (const rank of model.neighbors[query].keys()) {
      const item = make("li");
      item.append(neighborTile(query, model, rank));
      list.append(item);
    }
    side.append(title, list);
    row.append(side);
  }
  return row;
}

// Ties stand in the order of the images, so that a link shows the same page everywhere.
function sortedRows() {
  const mutual = (row) => (data.mutual ? data.mutual[row] : 0);
  const cost = {
    gap: (row) => -100 * Math.abs(gap(row)) + mutual(row),
    hf: (row) => -100 * gap(row) + mutual(row),
    local: (row) => 100 * gap(row) + mutual(row),
    shared: mutual,
    worst: (row) => hits(models[0], row) ?? 0,
    best: (row) => -(hits(models[0], row) ?? 0),
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
  const which = state.selected ? "selected images" : state.classes.size || state.disagree ? "images that pass the filters" : "images";
  byId("found").textContent = `${rows.length.toLocaleString("en")} ${which}`;
}

function showChosen() {
  const row = active();
  const rings = models.map((model) => `${RINGS[model.key]} ${model.name}`).join(", ");
  const empty = make("p", "empty", `Point at an image on a map, or go to one by arrow keys: here and on the maps its nearest neighbors are shown (${rings}).`);
  refill(byId("chosen"), row >= 0 ? queryRow(row) : empty);
}

// Goes to an image on the maps, or says that it is not there.
function goTo(index) {
  const found = rowOf(index) >= 0;
  byId("missing").hidden = found;
  byId("missing").textContent = `image ${index} is not on this page`;
  byId(found ? "explore" : "missing").scrollIntoView({ block: "start" });
}
