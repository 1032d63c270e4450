"use strict";
// What the page knows (data), what the reader chose (state), and the address that keeps it.

const data = JSON.parse(document.getElementById("data").textContent);
const points = data.points;
const models = data.models;
const allRows = Array.from({ length: points }, (_, row) => row);
const paired = models.length === 2;
const rowOfIndex = new Map(data.index.slice(0, points).map((index, row) => [index, row]));
const byId = (id) => document.getElementById(id);

const SORTS = {
  ...(paired
    ? { gap: "largest disagreement", hf: "HF better first", local: "local better first", shared: "fewest shared neighbors" }
    : { worst: "lowest precision@5", best: "highest precision@5" }),
  index: "image index",
};
const CHOICES = {
  projection: ["tsne", "pca"],
  color: paired && data.mutual ? ["class", "hits", "mutual"] : ["class", "hits"],
  drag: ["pan", "lasso", "box"],
  sort: Object.keys(SORTS),
};
const WHOLE = { x: 0.5, y: 0.5, zoom: 1 }; // the view of all images
const state = {};

const className = (id) => data.classes[data.label[id]];
const gap = (row) => (paired && models[0].hits ? models[1].hits[row] - models[0].hits[row] : 0);

const fraction = (model, row) => (model.hits ? `${model.hits[row]} of 5` : "not defined");
const visible = (row) => (!state.classes.size || state.classes.has(data.label[row])) && (!state.disagree || gap(row) !== 0);
const rowOf = (index) => (/^\d+$/.test(index) ? rowOfIndex.get(Number(index)) ?? -1 : -1);
const shownRows = () => allRows.filter(visible); // those that pass the filters

function fragment() {
  const kept = new URLSearchParams();
  for (const [name, values] of Object.entries(CHOICES)) {
    if (state[name] !== values[0]) kept.set(name, state[name]);
  }
  if (state.classes.size) kept.set("classes", [...state.classes].sort((a, b) => a - b).join(" "));
  if (state.disagree) kept.set("differ", "1");
  if (state.chosen >= 0) kept.set("image", data.index[state.chosen]);
  if (state.page) kept.set("page", state.page + 1);
  state.views.forEach((view, i) => {
    const numbers = [view.x, view.y, view.zoom].map((number) => +number.toFixed(4)).join(" ");
    if (numbers !== Object.values(WHOLE).join(" ")) kept.set(`view-${models[i].key}`, numbers);
  });
  return kept.toString();
}

// Links travel between runs: what this page does not have is ignored, but a missing image is reported.
function readFragment(text) {
  const kept = new URLSearchParams(text);
  for (const [name, values] of Object.entries(CHOICES)) {
    state[name] = values.find((value) => value === kept.get(name)) ?? values[0];
  }
  const labels = (kept.get("classes") ?? "").split(" ").filter(Boolean).map(Number);
  state.classes = new Set(labels.filter((label) => label in data.classes));
  state.selected = null;
  state.disagree = paired && kept.get("differ") === "1";
  state.wanted = kept.get("image");
  state.chosen = rowOf(state.wanted);
  state.page = Math.max(0, Math.floor(Number(kept.get("page")) || 1) - 1);
  state.views = models.map((model) => {
    const [x, y, zoom] = (kept.get(`view-${model.key}`) ?? "").split(" ").map(Number);
    const valid = x > -1 && x < 2 && y > -1 && y < 2 && zoom >= 0.5 && zoom <= 60;
    return valid ? { x, y, zoom } : { ...WHOLE };
  });
}

// An anchor of the page, such as a definition, is not a state.
const isState = (hash) => hash === "" || hash.includes("=");

let keeping = 0;
function keepState() {
  clearTimeout(keeping);
  keeping = setTimeout(() => {
    const hash = `#${fragment()}`;
    if (hash !== "#" || location.hash.includes("=")) {
      history.replaceState(null, "", hash === "#" ? location.pathname + location.search : hash);
    }
  }, 250);
}
