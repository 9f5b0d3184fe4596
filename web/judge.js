"use strict";
/* The two further views of the page: label (is what the VDG says of a mined pair right?) and teach (training on what was
   said). Loaded after app.js, whose el, api, figure, toast and undo it uses; app.js calls showLabel, judge, showTeach. */

// ---- label: a mined pair and what the VDG says of it -----------------------------------------------------------------

const labels = { pair: null, editing: false };
const DONE = { accept: "accepted", edit: "edited", reject: "rejected", skip: "skipped" };

async function showLabel() {
  const { rest } = readAddress();
  try {
    drawLabel(await api("label" + (/^\d+$/.test(rest[0] || "") ? `?at=${rest[0]}` : "")));
  } catch (error) {
    labels.pair = null;
    const head = el("h2", {}, gallery.label ? "This did not work" : "No pairs to judge");
    $("label").replaceChildren(el("div", { class: "empty" }, head, el("p", {}, error.message)));
  }
}

function drawLabel(data) {
  const { counts, total, pair } = data, judged = Object.values(counts).reduce((a, b) => a + b, 0);
  const said = judged - (counts.skip || 0);
  Object.assign(labels, { pair, editing: false, total });
  const shares = Object.entries(DONE).map(([verdict, word]) => {
    const n = counts[verdict] || 0;
    return verdict === "skip" ? `${n} ${word}` : `${n} ${word}${said ? ` (${Math.round((100 * n) / said)} %)` : ""}`;
  });
  const head = el("div", { class: "head" }, el("h2", {}, pair ? "Does the text turn the first into the second?" : "All pairs are judged"));
  head.append(el("p", { id: "counts" }, `${judged.toLocaleString("en")} of ${many(total, "pair")}: ${shares.join(", ")}`));
  const share = el("div", { class: "share", ariaHidden: "true" });
  Object.keys(DONE).forEach((verdict) => {
    const part = el("i", { class: verdict });
    part.style.width = `${(100 * (counts[verdict] || 0)) / total}%`;
    share.append(part);
  });
  if (!pair) {
    const again = el("a", { href: "#label/0" }, "look through them again");
    const empty = el("div", { class: "empty" }, el("p", {}, "Accepted and edited texts are in accepted.jsonl; "), again, labelRow());
    return $("label").replaceChildren(head, share, empty);
  }
  for (const end of ["reference", "target"]) gallery.names.set(pair[end].id, pair[end].name);
  const words = el("p", { class: "words", id: "delta", dir: "auto" }, pair.label ? pair.label.delta : pair.delta);
  const between = el("div", { class: "between", id: "between" }, words, el("span", { class: "arrow", ariaHidden: "true" }, "→"));
  if (pair.label) between.append(el("p", { class: "soft" }, `${DONE[pair.label.verdict]} before`));
  const [reference, target] = [pair.reference, pair.target].map((p) => figure(p.id, middle(p.name, 40)));
  $("label").replaceChildren(head, share, el("div", { class: "pair square" }, reference, between, target), labelRow());
}

function labelRow() {
  const row = el("div", { class: "row" });
  const all = [["accept", "Accept", "a"], ["edit", "Edit", "e"], ["reject", "Reject", "r"], ["skip", "Skip", "s"], ["undo", "Undo", "u"]];
  for (const [verdict, label, key] of labels.pair ? all : all.slice(4)) {
    const button = el("button", { class: verdict === "accept" ? "primary" : "plain", type: "button" }, label, el("kbd", {}, key));
    button.onclick = () => judge(verdict);
    row.append(button);
  }
  return row;
}

async function judge(verdict, delta) {
  if (verdict === "undo") return undo("labels");
  if (!labels.pair) return;
  if (verdict === "edit" && delta === undefined) return labels.editing ? saveEdit() : edit();
  const n = labels.pair.n;
  labels.pair = null; // a second key press before the answer judges nothing
  try {
    const data = await api("label", { n, verdict, delta });
    if (location.hash !== "#label") history.replaceState(null, "", "#label");
    drawLabel(data);
  } catch (error) {
    toast(error.message);
    showLabel();
  }
}

function edit() {
  labels.editing = true;
  const field = el("textarea", { value: $("delta").textContent, maxLength: 500, ariaLabel: "What turns the first into the second", dir: "auto" });
  field.id = "edited";
  field.onkeydown = (event) => {
    event.stopPropagation();
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); saveEdit(); }
    if (event.key === "Escape") drawAgain();
  };
  const save = el("button", { class: "primary", type: "button", onclick: saveEdit }, "Save", el("kbd", {}, "Enter"));
  const leave = el("button", { class: "plain", type: "button", onclick: drawAgain }, "Leave", el("kbd", {}, "Esc"));
  $("between").replaceChildren(field, el("div", { class: "row" }, save, leave));
  field.focus();
  field.select();
}
const drawAgain = () => { location.hash === "#label" ? showLabel() : (location.hash = "#label"); };

function saveEdit() {
  const text = $("edited").value.trim();
  if (!text) return toast("Write a text, or leave with Esc and reject the pair.");
  judge(text === labels.pair.delta ? "accept" : "edit", text);
}

// ---- teach -----------------------------------------------------------------------------------------------------------

let looking = 0; // timer of the next look at a training

async function showTeach() {
  clearTimeout(looking);
  try {
    drawTeach(await api("teach"));
  } catch (error) {
    $("teach").replaceChildren(el("div", { class: "problem", role: "alert" }, error.message, el("button", { class: "plain", onclick: showTeach }, "Try again")));
  }
}

async function teach(path, body) {
  try {
    drawTeach(await api(path, body));
    const first = await api("gallery?start=0&count=0");
    gallery.model = first.model;
    drawTop();
  } catch (error) {
    toast(error.message);
  }
}

function drawTeach(data) {
  const going = data.state === "training", focused = document.activeElement && document.activeElement.id;
  const judged = (data.labels.accept || 0) + (data.labels.edit || 0), learns = data.right - data.held_out + judged;
  const numbers = [[data.right - data.held_out, "right marks to learn from"], [judged, "accepted or edited labels"], [data.held_out, "right marks held out, to measure"], [data.wrong, "wrong marks"]];
  const card = el("div", { class: "card" }, el("h2", {}, "Teach it what you mean"));
  card.append(el("p", {}, "It trains on what you marked as right and on the labels you accepted or edited, in the background, on this computer. The marks of every fifth reference are held out: the table shows how often their picture is found among the first, before and after."));
  card.append(el("div", { class: "numbers" }, ...numbers.map(([n, what]) => el("div", {}, el("b", {}, n.toLocaleString("en")), el("span", {}, what)))));
  const button = el("button", { class: going ? "plain" : "primary", type: "button", id: "teach-it" }, going ? "Stop" : "Teach it");
  button.disabled = !going && learns < data.fewest;
  button.onclick = () => teach("teach", going ? { stop: true } : {});
  card.append(button);
  if (button.disabled) card.append(el("p", { class: "status" }, `It needs ${data.fewest} examples or more; mark results of a search as right.`));
  if (going) {
    const bar = el("progress", { max: data.steps, value: data.step || 0, ariaLabel: "Training" });
    const left = data.seconds_left ? `, about ${many(data.seconds_left, "second")} left` : "";
    const says = data.step ? `Step ${data.step} of ${data.steps}, loss ${data.loss.toFixed(3)}${left}` : "Getting ready …";
    card.append(bar, el("p", { id: "progress", role: "status" }, says));
  } else if (data.state === "failed") {
    card.append(el("div", { class: "problem", role: "alert" }, `It was not taught: ${data.error}`));
  } else if (data.state === "done") {
    const better = data.better ? "It got better on the held-out marks, and now answers." : "It did not get better on the held-out marks; the model before goes on answering.";
    card.append(el("p", { id: "progress", role: "status", class: "status" }, data.after ? better : "Done. Without held-out marks nothing tells whether it got better; choose below."));
  }
  if (data.gone) card.append(el("p", { class: "status" }, `Left out: ${many(data.gone, "example")} whose pictures are gone.`));
  $("teach").replaceChildren(card, tableOfModels(data, going));
  if (focused && $(focused)) $(focused).focus();
  if (going && readAddress().view === "teach") looking = setTimeout(showTeach, 1000);
}

function tableOfModels(data, going) {
  const ks = ["R@1", "R@5", "R@10"];
  const row = (number, name, record) => {
    const radio = el("input", { type: "radio", name: "using", id: `use-${number}`, checked: data.using === number, disabled: going });
    radio.onchange = () => teach("use", { teach: number });
    const cells = [el("td", {}, el("label", { title: name }, radio, middle(name, 44)))];
    for (const k of ks) {
      const { before, after } = record || {};
      const kind = !after ? "" : after[k] > before[k] ? "up" : after[k] < before[k] ? "down" : "";
      cells.push(el("td", { class: kind }, after ? `${before[k].toFixed(0)} → ${after[k].toFixed(0)} %` : "–"));
    }
    cells.push(el("td", {}, record ? `${many(record.train + record.pseudo, "example")}, ${record.seconds} s` : "–"));
    return el("tr", {}, ...cells);
  };
  const head = ["The model that answers", "found first", "in the first 5", "in the first 10", "learned from"];
  const rows = data.taught.map((record) => row(record.number, `taught (${record.number})`, record));
  const table = el("table", {}, el("thead", {}, el("tr", {}, ...head.map((name) => el("th", { scope: "col" }, name)))));
  table.append(el("tbody", {}, row(0, data.base, null), ...rows));
  return el("div", { class: "card scroll" }, table);
}
