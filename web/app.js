"use strict";
/* The page of search.py: no library, no build; judge.js holds the label and teach views. The address's hash holds all that is asked, so that reload, back and a
   copied address show the same:  #search/r=12&t=make+it+red/r=40&t=...  one step of the trail after each "/".
   File names and captions reach the page as text only (textContent, attributes set by property), never as HTML. */

const $ = (id) => document.getElementById(id);
const many = (n, one) => `${n.toLocaleString("en")} ${one}${n === 1 ? "" : "s"}`;
const ICONS = { // of the 24 x 24 kind
  right: "M5 13l4.5 4.5L19 8",
  wrong: "M6 6l12 12M18 6L6 18",
  full: "M9 4H4v5M15 4h5v5M9 20H4v-5M15 20h5v-5",
};

/** Makes an element: el("a", {href: "#", class: "x", onclick: f}, "text", child). */
function el(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name in made && !name.includes("-")) made[name] = value;
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  if (props.class) made.className = props.class;
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.append(document.createElementNS("http://www.w3.org/2000/svg", "path"));
  svg.firstChild.setAttribute("d", ICONS[name]);
  return svg;
}

/** GET without a body, POST with one; an answer that is no success becomes an Error in the server's words. */
async function api(path, body, signal) {
  const asks = { signal };
  if (body instanceof Blob) Object.assign(asks, { method: "POST", body });
  else if (body) {
    const headers = { "Content-Type": "application/json" };
    Object.assign(asks, { method: "POST", headers, body: JSON.stringify(body) });
  }
  let answer;
  try {
    answer = await fetch("api/" + path, asks);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("search.py does not answer: is it still running?");
  }
  const data = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
  if (!answer.ok) throw new Error(data.error);
  return data;
}

/** A long name cut in its middle: both its beginning and its end tell pictures apart. */
const middle = (name, n = 26) =>
  name.length <= n ? name : name.slice(0, Math.ceil(n / 2) - 1) + "…" + name.slice(1 - Math.floor(n / 2));

const gallery = { total: 0, key: "", blocks: new Map(), items: new Map(), names: new Map() };
const SIZE = 200; // pictures a request of the gallery

const picture = (id, kind = "thumb") => `${kind}/${id}?v=${gallery.key}`;

/** The names and ids of one block of the gallery, asked for once. */
function block(n) {
  if (!gallery.blocks.has(n)) {
    const asked = api(`gallery?start=${n * SIZE}&count=${SIZE}`).then((data) => {
      data.items.forEach((item, i) => {
        gallery.items.set(n * SIZE + i, item);
        gallery.names.set(item.id, item.name);
      });
      return data;
    });
    asked.catch(() => gallery.blocks.delete(n)); // the next look asks again
    gallery.blocks.set(n, asked);
  }
  return gallery.blocks.get(n);
}

// ---- the address -----------------------------------------------------------------------------------------------------

/** A step: reference (id or token of an upload, or null), texts, mode ("", "picture" or "text": one part alone). */
function readAddress() {
  const [view = "search", ...parts] = location.hash.slice(1).split("/");
  const steps = parts.map((part) => {
    const fields = new URLSearchParams(part);
    const r = fields.get("r");
    const reference = r === null ? null : /^\d{1,9}$/.test(r) ? Number(r) : r;
    return { reference, texts: fields.getAll("t"), mode: fields.get("m") || "" };
  });
  return { view: ["label", "teach"].includes(view) ? view : "search", steps, rest: parts };
}

function addressOf(steps) {
  const parts = steps.map((step) => {
    const fields = new URLSearchParams();
    if (step.reference !== null) fields.set("r", step.reference);
    step.texts.forEach((text) => fields.append("t", text));
    if (step.mode) fields.set("m", step.mode);
    return fields.toString();
  });
  return "#" + ["search", ...parts].join("/");
}

const EMPTY = { reference: null, texts: [], mode: "" };
let steps = []; // the trail, the present step last
const now = () => steps[steps.length - 1] || EMPTY;

/** Replaces the present step: what is asked of this picture changes. */
const change = (more) => { location.hash = addressOf([...steps.slice(0, -1), { ...now(), ...more }]); };
/** A new step of the trail: on from a picture that was found. */
const goOn = (id) => {
  const before = now() === EMPTY || (now().reference === null && !now().texts.length) ? steps.slice(0, -1) : steps;
  location.hash = addressOf([...before, { reference: id, texts: [], mode: "" }]);
};
const stepBack = () => { if (steps.length) location.hash = addressOf(steps.slice(0, -1)); };

// ---- grid: a tile exists only while it is seen -----------------------------------------------------------------------

const grid = { node: $("grid"), total: 0, get: () => null, results: false, tiles: new Map(), at: 0, columns: 1, row: 1 };

/** Shows `total` pictures; get(i) -> item or undefined (not known yet: want(i) fetches it). */
function showGrid(total, get, want, results) {
  grid.tiles.forEach((tile) => tile.remove());
  grid.tiles.clear();
  Object.assign(grid, { total, get, want, results, at: 0 });
  layGrid();
}

function layGrid() {
  const width = grid.node.clientWidth, phone = innerWidth <= 720, gap = phone ? 8 : 16;
  const least = grid.results ? (phone ? 150 : 190) : phone ? 104 : 150;
  grid.columns = Math.max(1, Math.floor((width + gap) / (least + gap)));
  grid.side = (width - gap * (grid.columns - 1)) / grid.columns;
  grid.step = grid.side + gap;
  grid.row = grid.side + (grid.results || !phone ? 28 : 0) + gap;
  grid.node.style.height = `${Math.ceil(grid.total / grid.columns) * grid.row}px`;
  grid.tiles.forEach((tile) => tile.remove());
  grid.tiles.clear();
  drawGrid();
}

function drawGrid() {
  if ($("search").hidden) return;
  const top = -grid.node.getBoundingClientRect().top, margin = 400; // pixels above and below that are made ready
  const first = Math.max(0, Math.floor((top - margin) / grid.row)) * grid.columns;
  const last = Math.min(grid.total, (Math.ceil((top + innerHeight + margin) / grid.row) + 1) * grid.columns);
  grid.tiles.forEach((tile, i) => {
    if ((i < first || i >= last) && !tile.contains(document.activeElement)) {
      tile.remove();
      grid.tiles.delete(i);
    }
  });
  for (let i = first; i < last; i++) {
    const old = grid.tiles.get(i), item = grid.get(i);
    if (old && (old.ready || !item)) continue;
    if (!item) grid.want(i);
    const tile = makeTile(i, item);
    if (old) old.replaceWith(tile);
    else grid.node.append(tile);
    grid.tiles.set(i, tile);
  }
}

function makeTile(i, item) {
  const tile = el("div", { class: "tile" + (grid.results ? " result" : ""), role: "listitem" });
  tile.ready = Boolean(item);
  tile.setAttribute("aria-setsize", grid.total);
  tile.setAttribute("aria-posinset", i + 1);
  const x = (i % grid.columns) * grid.step, y = Math.floor(i / grid.columns) * grid.row;
  tile.style.width = `${grid.side}px`;
  tile.style.transform = `translate(${x}px, ${y}px)`;
  const shot = el("button", { class: "shot", type: "button", tabIndex: i === grid.at ? 0 : -1 });
  tile.append(shot);
  if (!item) return tile;
  const says = grid.results ? `${i + 1}: ${item.name}, score ${item.score.toFixed(2)}` : item.name;
  Object.assign(shot, { ariaLabel: `Go on from ${says}`, title: item.name, onclick: () => goOn(item.id) });
  const image = el("img", { src: picture(item.id), alt: "", class: "waiting", draggable: true });
  image.onload = () => image.classList.remove("waiting");
  image.onerror = () => shot.replaceChildren(el("span", { class: "lost" }, "cannot be shown"));
  shot.append(image);
  shot.onfocus = () => focusTile(i, false);
  if (grid.results || innerWidth > 720) {
    const line = el("div", { class: "line" }, el("span", { title: item.name }, middle(item.name, 24)));
    if (grid.results) line.append(el("b", { title: "cosine" }, item.score.toFixed(3)));
    tile.append(line);
  }
  const tools = el("div", { class: "tools" });
  const full = tool("full", `Look at ${item.name}`, () => openLook(i));
  if (grid.results && canMark()) {
    for (const [kind, right] of [["right", true], ["wrong", false]]) {
      tools.append(tool(kind, `Mark ${item.name} as ${kind}`, () => mark(i, right)));
    }
  }
  tools.append(full);
  tile.append(tools);
  paintMark(tile, item);
  return tile;
}

function tool(kind, label, act) {
  const made = el("button", { class: `tool ${kind}`, type: "button", tabIndex: -1, title: label, onclick: act }, icon(kind));
  made.setAttribute("aria-label", label);
  return made;
}

function focusTile(i, move = true) {
  if (!grid.total) return;
  const to = Math.min(Math.max(i, 0), grid.total - 1);
  const before = grid.tiles.get(grid.at);
  if (before) before.firstChild.tabIndex = -1;
  grid.at = to;
  if (move) {
    const box = grid.node.getBoundingClientRect(), y = box.top + Math.floor(to / grid.columns) * grid.row;
    const above = $("query").getBoundingClientRect().height + 16;
    if (y < above) scrollBy(0, y - above);
    else if (y + grid.row > innerHeight) scrollBy(0, y + grid.row - innerHeight + 16);
    drawGrid();
  }
  const tile = grid.tiles.get(to);
  if (!tile) return;
  tile.firstChild.tabIndex = 0;
  if (move) tile.firstChild.focus({ preventScroll: true });
}

let drawing = false;
function soon() { // at most one drawing a frame
  if (!drawing) requestAnimationFrame(() => { drawing = false; drawGrid(); });
  drawing = true;
}
addEventListener("scroll", soon, { passive: true });
addEventListener("resize", () => layGrid());

// ---- search ----------------------------------------------------------------------------------------------------------

let running = null; // AbortController of the search in progress

function problem(error, again) {
  $("problem").hidden = !error;
  $("problem").replaceChildren(error ? error.message : "");
  if (error && again) $("problem").append(el("button", { class: "plain", type: "button", onclick: again }, "Try again"));
}

/** What is asked of the server: the parts that the mode leaves. */
function asks() {
  const { reference, texts, mode } = now();
  return { reference: mode === "text" ? null : reference, texts: mode === "picture" ? [] : texts };
}
const canMark = () => asks().reference !== null && asks().texts.length > 0;

async function showSearch() {
  drawQuery();
  drawTrail();
  problem(null);
  if (running) running.abort();
  const ask = asks();
  if (ask.reference === null && !ask.texts.length) return showGallery();
  running = new AbortController();
  grid.node.setAttribute("aria-busy", "true");
  $("status").textContent = "Searching …";
  try {
    const data = await api("search", ask, running.signal);
    data.results.forEach((item) => gallery.names.set(item.id, item.name));
    if (data.reference) gallery.names.set(ask.reference, data.reference.name);
    drawQuery(); // names are known now
    scrollTo(0, 0);
    showGrid(data.results.length, (i) => data.results[i], () => {}, true);
    $("status").textContent = data.results.length
      ? `${many(data.results.length, "picture")}, the nearest first · ${data.ms} ms` +
        (data.cut ? " · the text is longer than the model reads: its end was left out" : "") +
        (data.unknown ? " · the model does not know some of these words or signs" : "")
      : "There is no other picture to find.";
    grid.node.setAttribute("aria-busy", "false");
  } catch (error) {
    if (error.name === "AbortError") return;
    grid.node.setAttribute("aria-busy", "false");
    showGrid(0, () => null, () => {}, true);
    $("status").textContent = "";
    problem(error, showSearch);
  }
}

async function showGallery() {
  $("status").textContent = "Loading …";
  try {
    const first = await block(0);
    Object.assign(gallery, { total: first.total });
    const left = first.unreadable ? ` ${many(first.unreadable, "file")} could not be read.` : "";
    $("status").textContent = `Choose a picture to start from, or write what you look for.${left}`;
    const want = (i) => block(Math.floor(i / SIZE)).then(soon, (error) => problem(error, showSearch));
    grid.node.setAttribute("aria-busy", "false");
    showGrid(first.total, (i) => gallery.items.get(i), want, false);
  } catch (error) {
    $("status").textContent = "";
    problem(error, start);
  }
}

function drawQuery() {
  const { reference, texts, mode } = now(), holder = $("reference");
  const choose = el("button", { type: "button", onclick: () => $("file").click() });
  holder.className = "reference" + (reference === null ? "" : " has");
  if (reference === null) {
    choose.append("Add a picture");
    choose.title = "Choose, drop or paste a picture of your own";
    holder.replaceChildren(choose);
  } else {
    const name = nameOf(reference);
    choose.append(el("img", { src: picture(reference), alt: "" }));
    choose.onclick = () => openLook(-1);
    choose.title = name;
    choose.ariaLabel = `Look at the reference, ${name}`;
    const away = el("button", { class: "away", type: "button", title: "Without this picture" }, "×");
    away.ariaLabel = "Take the reference away";
    away.onclick = () => change({ reference: null, mode: "" });
    holder.replaceChildren(choose, away);
  }
  document.querySelectorAll(".chip").forEach((chip) => chip.remove());
  texts.forEach((text, i) => {
    const away = el("button", { class: "away", type: "button", ariaLabel: `Take away: ${text}` }, "×");
    away.onclick = () => change({ texts: texts.filter((_, j) => j !== i) });
    $("field").insertBefore(el("span", { class: "chip" }, el("span", { title: text }, text), away), $("text"));
  });
  const hint = reference === null ? "What do you look for?" : "What should change?";
  $("text").placeholder = texts.length ? "and …" : hint;
  $("modes").hidden = reference === null || !texts.length;
  const kinds = [["", "Picture + text"], ["picture", "Picture"], ["text", "Text"]];
  $("modes").replaceChildren(...kinds.map(([kind, label]) => {
    const chosen = mode === kind;
    const button = el("button", { type: "button", role: "radio", tabIndex: chosen ? 0 : -1 }, label);
    button.setAttribute("aria-checked", chosen);
    button.onclick = () => change({ mode: kind });
    return button;
  }));
}

const nameOf = (id) => gallery.names.get(id) || (typeof id === "number" ? `picture ${id}` : "your picture");

function drawTrail() {
  const trail = $("trail");
  trail.hidden = steps.length === 0;
  const items = steps.map((step, i) => {
    const last = i === steps.length - 1;
    const says = step.texts.join(" and ") || (step.reference === null ? "all pictures" : "like this");
    const node = last ? el("span", { class: "now" }) : el("a", { href: addressOf(steps.slice(0, i + 1)) });
    if (last) node.setAttribute("aria-current", "step");
    if (step.reference !== null) node.append(el("img", { src: picture(step.reference), alt: nameOf(step.reference) }));
    node.append(el("b", { title: says }, says));
    return el("li", {}, node);
  });
  trail.replaceChildren(el("li", {}, el("a", { href: "#search", class: "start" }, "All pictures")), ...items);
  trail.scrollLeft = trail.scrollWidth;
}

$("query").onsubmit = (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  $("text").value = "";
  if (!text) return showSearch();
  const mode = now().mode === "picture" ? "" : now().mode;
  change({ texts: [...now().texts, text].slice(0, 8), mode });
};
$("text").onkeydown = (event) => {
  if (event.key === "Backspace" && !$("text").value && now().texts.length) change({ texts: now().texts.slice(0, -1) });
  else if (event.key === "ArrowDown") { event.preventDefault(); focusTile(grid.at); }
  else if (event.key === "Escape") $("text").blur();
};
$("modes").onkeydown = (event) => {
  const all = [...$("modes").children], at = all.indexOf(document.activeElement);
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!by) return;
  event.preventDefault();
  event.stopPropagation();
  const to = (at + by + all.length) % all.length;
  all[to].click();
  setTimeout(() => $("modes").children[to].focus());
};

// ---- a picture of one's own ------------------------------------------------------------------------------------------

async function upload(file) {
  if (!file) return;
  problem(null);
  if (file.size > gallery.most) return problem(new Error(`${file.name} has more than ${gallery.most >> 20} MB`));
  $("status").textContent = `Reading ${file.name} …`;
  try {
    const { token } = await api("upload", file);
    gallery.names.set(token, file.name);
    location.hash = addressOf([...steps.slice(0, -1), { ...now(), reference: token, mode: "" }]);
  } catch (error) {
    $("status").textContent = "";
    problem(error);
  }
}
$("file").onchange = () => { upload($("file").files[0]); $("file").value = ""; };
addEventListener("paste", (event) => upload([...event.clipboardData.files].find((f) => f.type.startsWith("image/"))));
const fromOutside = (event) => [...event.dataTransfer.types].includes("Files");
addEventListener("dragover", (event) => { if (fromOutside(event)) { event.preventDefault(); $("drop").hidden = false; } });
addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").hidden = true; });
addEventListener("drop", (event) => {
  $("drop").hidden = true;
  if (fromOutside(event)) { event.preventDefault(); upload(event.dataTransfer.files[0]); }
});

// ---- marks -----------------------------------------------------------------------------------------------------------

function paintMark(tile, item) {
  const known = item.right === true || item.right === false;
  tile.classList.toggle("marked", known);
  tile.classList.toggle("is-right", item.right === true);
  tile.classList.toggle("is-wrong", item.right === false);
  tile.querySelectorAll(".tool.right, .tool.wrong").forEach((button) => {
    button.setAttribute("aria-pressed", item.right === button.classList.contains("right") && known);
  });
}

/** Right or wrong; the same once more takes it away. */
async function mark(i, right) {
  const item = grid.get(i);
  if (!item || !grid.results) return;
  if (!canMark()) return toast("A mark wants a picture and a text: they become an example to learn from.");
  const value = item.right === right ? null : right;
  try {
    await api("mark", { ...asks(), target: item.id, right: value });
  } catch (error) {
    return problem(error);
  }
  item.right = value;
  if (grid.tiles.has(i)) paintMark(grid.tiles.get(i), item);
  if (look.at === i && $("look").open) openLook(i);
  toast(value === null ? "Mark taken away" : value ? "Marked as right" : "Marked as wrong", () => undo("marks"));
}

async function undo(what) {
  let undone;
  try {
    undone = await api("undo", { what });
  } catch (error) {
    return toast(error.message);
  }
  toast("Undone");
  if (what === "labels") return void (location.hash === `#label/${undone.n}` ? showLabel() : (location.hash = `#label/${undone.n}`));
  const ask = asks();
  if (undone.text !== ask.texts.join(" and ") || undone.reference !== nameOf(ask.reference)) return;
  for (let i = 0; i < grid.total; i++) {
    const item = grid.get(i);
    if (item.id !== undone.target) continue;
    item.right = undone.right;
    if (grid.tiles.has(i)) paintMark(grid.tiles.get(i), item);
    if (look.at === i && $("look").open) openLook(i);
  }
}

let fading = 0;
function toast(text, back) {
  $("toast").hidden = false;
  $("toast").replaceChildren(text + " ");
  if (back) $("toast").append(el("button", { type: "button", onclick: back }, "Undo"));
  clearTimeout(fading);
  fading = setTimeout(() => { $("toast").hidden = true; }, 5000);
}

// ---- a picture in full -----------------------------------------------------------------------------------------------

const look = { at: -1 };

function figure(id, caption) {
  const image = el("img", { src: picture(id, "image"), alt: nameOf(id) });
  return el("figure", {}, el("div", { class: "frame" }, image), el("figcaption", { title: nameOf(id) }, caption));
}

/** i: a place in the grid; -1: the reference. */
function openLook(i) {
  const item = i < 0 ? { id: now().reference } : grid.get(i);
  if (!item || item.id === null) return;
  look.at = i;
  const ask = asks(), both = i >= 0 && grid.results && ask.reference !== null;
  const body = el("div", { class: both ? "pair" : "pair alone" });
  if (both) {
    const words = el("p", { class: "words" }, ask.texts.join(" and ") || "like this");
    const arrow = el("span", { class: "arrow", ariaHidden: "true" }, "→");
    body.append(figure(ask.reference, middle(nameOf(ask.reference), 40)), el("div", { class: "between" }, words, arrow));
  }
  body.append(figure(item.id, middle(nameOf(item.id), 40) + (both ? ` · ${item.score.toFixed(3)}` : "")));
  const row = el("div", { class: "row" });
  if (both && canMark()) {
    for (const [kind, right, key] of [["yes", true, "y"], ["no", false, "n"]]) {
      const button = el("button", { class: `plain ${kind}`, type: "button" }, right ? "Right" : "Wrong", el("kbd", {}, key));
      button.setAttribute("aria-pressed", item.right === right);
      button.onclick = () => mark(i, right);
      row.append(button);
    }
  }
  if (i >= 0) row.append(el("button", { class: "plain", type: "button", onclick: () => { $("look").close(); goOn(item.id); } }, "Go on from it"));
  row.append(el("button", { class: "primary", type: "button", onclick: () => $("look").close() }, "Close"));
  $("look").replaceChildren(body, row);
  if (!$("look").open) $("look").showModal();
}
document.querySelectorAll("dialog").forEach((dialog) => {
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
});
$("look").addEventListener("close", () => { if (look.at >= 0) focusTile(look.at); });
$("help").onclick = () => $("keys").showModal();

// ---- keys ------------------------------------------------------------------------------------------------------------

const MOVES = {
  ArrowRight: () => 1, ArrowLeft: () => -1, ArrowDown: () => grid.columns, ArrowUp: () => -grid.columns,
  PageDown: () => grid.columns * Math.max(1, Math.floor(innerHeight / grid.row) - 1),
  PageUp: () => -grid.columns * Math.max(1, Math.floor(innerHeight / grid.row) - 1),
  Home: () => -grid.at, End: () => grid.total,
};

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  const writing = event.target.closest("input:not([type=radio]), textarea");
  const { view } = readAddress(), key = event.key;
  if (writing) return;
  const onTile = event.target.closest(".tile");
  if ($("look").open) {
    if (key === "y" || key === "n") mark(look.at, key === "y");
    else if (key === "u") undo("marks");
    else if (key === "o") $("look").close();
    else if ((key === "ArrowRight" || key === "ArrowLeft") && look.at >= 0) {
      const to = look.at + (key === "ArrowRight" ? 1 : -1);
      if (grid.get(to)) openLook(to);
    } else return;
    event.preventDefault();
    return;
  }
  if ($("keys").open) return;
  const acts = { "?": () => $("keys").showModal(), 1: () => (location.hash = addressOf(steps)), 2: () => (location.hash = "#label"), 3: () => (location.hash = "#teach") };
  if (view === "label") {
    Object.assign(acts, { a: () => judge("accept"), e: () => judge("edit"), r: () => judge("reject"), s: () => judge("skip"), u: () => judge("undo") });
    const at = labels.pair ? labels.pair.n : labels.total;
    if (at > 0) acts.ArrowLeft = () => (location.hash = `#label/${at - 1}`);
    if (at + 1 < labels.total) acts.ArrowRight = () => (location.hash = `#label/${at + 1}`);
  } else if (view === "search") {
    Object.assign(acts, { "/": () => $("text").focus(), b: stepBack, u: () => undo("marks") });
    if (onTile || event.target === document.body || event.target === $("main")) {
      for (const [name, by] of Object.entries(MOVES)) acts[name] = () => focusTile(grid.at + (onTile ? by() : 0));
    }
    if (onTile) Object.assign(acts, { o: () => openLook(grid.at), y: () => mark(grid.at, true), n: () => mark(grid.at, false) });
  }
  if (!acts[key]) return;
  event.preventDefault();
  acts[key]();
});

// ---- start -----------------------------------------------------------------------------------------------------------

function drawTop() {
  $("folder").textContent = gallery.folder;
  $("count").textContent = `${many(gallery.total, "picture")} · ${middle(gallery.model, 34)}`;
  $("count").title = `The model that answers: ${gallery.model}`;
  document.title = `${gallery.folder} – search`;
}

function route() {
  const { view, steps: wanted } = readAddress();
  ["search", "label", "teach"].forEach((name) => { $(name).hidden = name !== view; });
  document.querySelectorAll("nav a").forEach((link) => {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  });
  $("toast").hidden = true;
  if (view === "search") {
    steps = wanted;
    document.querySelector("nav a").href = addressOf(steps); // the other views lead back to the same search
    showSearch();
  } else if (view === "label") showLabel();
  else showTeach();
}

async function start() {
  problem(null);
  grid.node.setAttribute("aria-busy", "true");
  try {
    const first = await block(0);
    Object.assign(gallery, { total: first.total, key: first.key, folder: first.folder, model: first.model, label: first.label, most: first.most_upload });
    drawTop();
    route();
  } catch (error) {
    problem(error, start);
  }
}
addEventListener("hashchange", route);
addEventListener("DOMContentLoaded", start); // judge.js is there by then
