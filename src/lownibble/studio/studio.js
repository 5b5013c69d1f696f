// The studio's page. It asks the server for everything: options, plans, jobs and curves; nothing is made from data but text.
"use strict";
const $ = (what, where = document) => where.querySelector(what), all = (what, where = document) => [...where.querySelectorAll(what)];
const GIB = 2 ** 30;
const KINDS = ["weights", "codes", "constants", "adapters", "gradients", "optimizer", "activations", "workspace", "the rest"];
const METHODS = { full: "Full", lora: "LoRA", qlora: "QLoRA" };
const STATUS = { running: "running", ok: "done", failed: "failed", interrupted: "stopped", died: "died" };
const GROUPS = { "": "The run", data: "Data", quant: "4-bit base (quant)", lora: "Adapters (lora)", train: "Training" };
const BASIC = ["train.max_steps", "train.num_train_epochs", "train.learning_rate", "train.batch_size", "train.max_length", "lora.r", "train.objective", "train.output_dir"];
const ASKED = { // what a command's dialog shows at first; its other options are one click away
  merge: ["adapter", "output", "onto"], export: ["source", "output", "format", "dtype"], serve: ["model", "adapters", "port", "any_base"],
  eval: ["model", "adapter", "task", "data.path", "data.max_eval_rows"], quantize: ["model", "output", "quant.quant_type", "rounding"],
};

let form = null, jobs = [], rows = null, job = null, silent = 0;
const values = {}, checked = new Set();

function el(name, options = {}, ...inside) {
  const { data, aria, ...rest } = options, made = Object.assign(document.createElement(name), rest);
  for (const [key, value] of Object.entries(data || {})) made.dataset[key] = value;
  for (const [key, value] of Object.entries(aria || {})) made.setAttribute(`aria-${key}`, value);
  made.append(...inside.filter((each) => each !== null && each !== undefined && each !== false));
  return made;
}
const gib = (n) => `${(n / GIB).toFixed(n < 10 * GIB ? 2 : 1)} GiB`;
const whole = (n) => Math.round(n).toLocaleString("en");
const span = (s) => (s < 90 ? `${s.toFixed(s < 10 ? 1 : 0)} s` : s < 5400 ? `${(s / 60).toFixed(0)} min` : s < 172800 ? `${(s / 3600).toFixed(1)} h` : `${(s / 86400).toFixed(1)} days`);
const dollars = (n) => `$${n < 1 ? n.toFixed(3) : n < 100 ? n.toFixed(2) : whole(n)}`;
const range = (r, show) => `${show(r.likely)} (${show(r.low)} to ${show(r.high)})`;
const say = (text) => { $("#said").textContent = text; };
function later(work, ms) { let timer; return () => { clearTimeout(timer); timer = setTimeout(work, ms); }; }

// Ids of runs are names of folders, which may hold anything.
const linkTo = (id) => `#job/${encodeURIComponent(id)}`, pathOf = (id) => `jobs/${encodeURIComponent(id)}`;
function place() {
  let text = location.hash.slice(1);
  try { text = decodeURIComponent(text); } catch { /* typed by hand: a plain % */ }
  const [name, ...rest] = text.split("/");
  return { name: ["new", "runs", "job"].includes(name) ? name : "new", id: rest.join("/") };
}

class Refused extends Error {}
async function api(path, body) {
  let answer;
  const post = { method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" } };
  try { answer = await fetch(`/api/${path}`, body === undefined ? {} : post); }
  catch { throw new Refused("The studio does not answer. Jobs go on without it; start it again: lownibble studio"); }
  const found = await answer.json().catch(() => ({ error: `${answer.status} ${answer.statusText}` }));
  if (answer.status === 401 && !$("#keyed").open) { $("#keyed").showModal(); $("#key").focus(); }
  if (!answer.ok || found.error) throw new Refused(found.error);
  return found;
}

// ---- options

// One option's label and control; `set(text)` is called with '' for the default.
function field(option, value, set, words) {
  const plain = option.name.split(".").at(-1).replaceAll("_", " "), label = words || plain[0].toUpperCase() + plain.slice(1);
  const id = `o-${option.name.replaceAll(".", "-")}-${Math.random().toString(36).slice(2, 7)}`;
  let control;
  if (!option.open) {
    control = el("select", { id });
    const first = option.default === "" ? [new Option("default", "")] : [];
    control.append(...first, ...option.choices.map((each) => new Option(each === option.default ? `${each} (default)` : each, each)));
    control.value = value || option.default;
    control.onchange = () => set(control.value === option.default ? "" : control.value);
  } else {
    control = el("input", { id, value: value || "", placeholder: option.default || "", spellcheck: false, ...(option.numeric && { inputMode: "decimal" }) });
    const list = { model: "models", "data.path": "paths", "data.eval_path": "paths" }[option.name];
    if (list) control.setAttribute("list", list);
    control.oninput = () => set(control.value.trim() ? control.value : "");
  }
  control.setAttribute("aria-describedby", `${id}-help`);
  control.dataset.option = option.name;
  return el("div", { className: "field", data: { find: `${option.flag} ${option.name} ${option.help}`.toLowerCase() } },
    el("label", { htmlFor: id, title: option.flag }, label), control, el("small", { id: `${id}-help`, textContent: option.help }));
}
const what = () => $("input[name=what]:checked").value;
const options = (command) => form.commands[command].fields;
const option = (command, name) => options(command).find((each) => each.name === name);
const current = (name) => values[name] || option(what(), name).default;
const taken = (command) => Object.fromEntries(options(command).filter((each) => values[each.name]).map((each) => [each.name, values[each.name]]));

function set(name) { return (text) => { values[name] = text; changed(name); }; }
const refresh = later(() => { check(); plan(); }, 250);
function changed(name) {
  if (name === "data.path") shorten();
  if (name === "model" || name.startsWith("data.") || ["train.max_length", "train.objective"].includes(name)) stale();
  if (what() === "study") study();
  refresh();
}

function build() {
  const lists = { models: [...form.models, ...products("model")], paths: ["demo", ...new Set(jobs.map((each) => each.facts["data.path"]).filter(Boolean))] };
  for (const [id, each] of Object.entries(lists)) { $(`#${id}`)?.remove(); document.body.append(el("datalist", { id }, ...each.map((value) => new Option(value, value)))); }
  const put = (where, names, command, words = {}) => $(where).replaceChildren(...names.map((name) => option(command, name)).filter(Boolean).map((each) => field(each, values[each.name], set(each.name), words[each.name])));
  const command = what() === "study" ? "train" : what();
  put("#subject", ["model", "data.path", "data.prompt_template", "data.completion_template"], command, { model: "Model", "data.path": "Data", "data.prompt_template": "Prompt, from a row's fields", "data.completion_template": "Completion" });
  put("#basic", BASIC, command, { "train.max_steps": "Steps", "train.num_train_epochs": "Epochs", "train.learning_rate": "Learning rate", "train.output_dir": "Output folder", "lora.r": "Adapter rank (r)", "train.batch_size": "Rows in a step", "train.max_length": "Tokens in a row", "train.objective": "Objective" });
  if (what() === "train") method(); else if (what() === "compare") put("#how", ["methods"], "compare", { methods: "Methods, separated by commas" }); else study(true);
  $("#options").hidden = what() === "study";
  const shown = new Set(["model", "data.path", "data.prompt_template", "data.completion_template", "method", "methods", ...BASIC]);
  const groups = Object.entries(GROUPS).map(([group, title]) => el("div", { className: "group" }, el("h3", { textContent: title }),
    el("div", { className: "three" }, ...options(command).filter((each) => each.group === group && !shown.has(each.name)).map((each) => field(each, values[each.name], set(each.name))))));
  $("#every").replaceChildren(...groups);
  $("#start").textContent = { train: "Start training", compare: "Start comparing", study: "Start the study" }[what()];
  find();
}
function find() {
  const words = $("#find").value.toLowerCase().split(/\s+/).filter(Boolean);
  all("#every .field").forEach((each) => { each.hidden = !words.every((word) => each.dataset.find.includes(word)); });
  all("#every .group").forEach((each) => { each.hidden = !$(".field:not([hidden])", each); });
}
function method() {
  const about = { qlora: "frozen base in 4 bits, small adapters: least memory", lora: "frozen base in 16 or 32 bits, small adapters", full: "every weight is trained: most memory" };
  const chosen = values.method || "qlora";
  $("#how").replaceChildren(el("div", { className: "methods", role: "radiogroup", ariaLabel: "method" }, ...Object.entries(about).map(([name, words]) => {
    const input = el("input", { type: "radio", name: "method", value: name, checked: name === chosen, onchange: () => set("method")(name) });
    return el("label", {}, input, el("span", {}, el("b", { textContent: METHODS[name] }), el("small", { textContent: words })));
  })));
}
function study(first) {
  const text = (name, or) => JSON.stringify(name.endsWith("_template") ? values[name].replace(/\\[nt\\]/g, (two) => ({ n: "\n", t: "\t", "\\": "\\" })[two[1]]) : values[name] || or);
  const steps = Number(values["train.max_steps"]) || 40;
  const toml = `name = "LoRA and QLoRA on my data"\nseeds = [0, 1, 2]\n\n[models]\nmine = ${text("model", "demo")}\n\n[methods]\nlora = { method = "lora" }\nqlora = { method = "qlora" }\n\n[tasks.mine]\nkind = "classification"\ndata = { path = ${text("data.path", "demo")}, max_eval_rows = 128${values["data.prompt_template"] ? `, prompt_template = ${text("data.prompt_template")}` : ""}${values["data.completion_template"] ? `, completion_template = ${text("data.completion_template")}` : ""} }\ntrain = { batch_size = 8, max_length = 128 }\n\n[train]\nmax_steps = ${steps}\n`;
  if (first) {
    $("#how").replaceChildren(el("div", { className: "field" }, el("label", { htmlFor: "toml", textContent: "The study: every model × method × task × seed is a run (docs/study.md)" }),
      el("textarea", { id: "toml", rows: 18, spellcheck: false, value: toml, oninput: (event) => { event.target.dataset.own = "1"; refresh(); } })));
  } else if (!$("#toml").dataset.own) $("#toml").value = toml;
}

let checking = 0;
async function check() {
  const mine = ++checking, wrong = $("#wrong");
  let command = null, why = "";
  try { command = (await api("check", what() === "study" ? { command: "study", toml: $("#toml").value } : { command: what(), values: taken(what()) })).command; } catch (error) { why = error.message; }
  if (mine !== checking) return;
  if (command !== null) $("#command").textContent = command;
  wrong.textContent = why;
  wrong.hidden = command !== null;
  $("#start").disabled = command === null;
}

// ---- rows

function stale() { if (rows) { rows = null; $("#preview").classList.add("stale"); $("#looking").textContent = "Changed since this preview."; } }
async function look() {
  const button = $("#look");
  button.disabled = true;
  $("#looking").textContent = "Reading and tokenising…";
  try {
    const own = taken("data");
    if (own[EPOCHS] === lengthened) delete own[EPOCHS];
    rows = await api("preview", { command: what(), values: own });
    $("#looking").textContent = "";
    $("#preview").replaceChildren(...preview(rows), ...lengthen(rows));
  } catch (error) {
    rows = null;
    $("#looking").textContent = "";
    $("#preview").replaceChildren(el("p", { className: "wrong", role: "alert", textContent: error.message }));
  }
  $("#preview").classList.remove("stale");
  $("#preview").hidden = false;
  button.disabled = false;
  plan();
}
function preview(found) {
  const side = (name, of) => `${name}: ${whole(of.rows)} rows, ${whole(of.tokens)} tokens, ${Math.round(100 * of.label_share)}% of them trained; lengths ${Object.entries(of.lengths).map(([k, v]) => `${k} ${v}`).join(", ")}`;
  const most = Math.max(...found.training.histogram.map(([, n]) => n));
  const bars = el("div", { className: "histogram", role: "img", ariaLabel: `Rows by length: ${found.training.histogram.map(([upto, n]) => `up to ${upto} tokens ${n}`).join(", ")}` },
    ...found.training.histogram.map(([upto, n]) => { const bar = el("i"); bar.style.height = `${Math.max(2, 100 * n / most)}%`; return el("span", { title: `up to ${upto} tokens: ${n} rows` }, bar, el("small", { textContent: upto })); }));
  return [
    el("p", {}, el("b", { textContent: found.data }), ` ${found.form} rows, tokenised for ${found.model}`),
    el("p", { className: "quiet", textContent: side("training", found.training) }), el("p", { className: "quiet", textContent: side("evaluation", found.evaluation) }),
    ...found.warnings.map((line) => el("p", { className: "warning", textContent: line })), bars,
    ...found.rows.map((row) => el("figure", { className: "example" }, el("figcaption", { textContent: `${row.origin}, ${row.tokens} tokens; what is trained is marked${"label" in row ? `; a ${row.label ? "good" : "bad"} answer` : ""}` }),
      el("p", {}, ...row.pieces.flatMap(([text, trained], n) => ["rejected_from" in row && !n && el("b", { textContent: "chosen: " }), n === row.rejected_from && el("b", { textContent: "\nrejected: " }), el(trained ? "mark" : "span", { textContent: text })])))),
  ];
}
async function upload(file) {
  $("#looking").textContent = `Uploading ${file.name}…`;
  try {
    const answer = await fetch(`/api/upload?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file, headers: { "content-type": "application/octet-stream" } });
    const found = await answer.json();
    if (!answer.ok) throw new Refused(found.error);
    values["data.path"] = found.path;
    build();
    check();
    await look();
  } catch (error) {
    $("#looking").textContent = "";
    $("#preview").hidden = false;
    $("#preview").replaceChildren(el("p", { className: "wrong", role: "alert", textContent: error instanceof Refused ? error.message : "The upload broke off. Try again, or give the file's path." }));
  }
  $("#file").value = "";
}
// A short run teaches little: the page sets the epochs, until the user says how long it is to be. Where steps are set, epochs do nothing.
const EPOCHS = "train.num_train_epochs";
let lengthened = "";
function lengthen(found) {
  const own = values[EPOCHS] && values[EPOCHS] !== lengthened;
  if (own || what() === "study" || current("train.max_steps")) return [];
  lengthened = String(found.suggested_epochs || "");
  if ((values[EPOCHS] || "") !== lengthened) { set(EPOCHS)(lengthened); build(); }
  return lengthened ? [el("p", { className: "note", textContent: `One epoch of ${whole(found.training.rows)} rows is a short run, which teaches little: Epochs is set to ${lengthened}.` })] : [];
}
function shorten() {
  if (!lengthened || values[EPOCHS] !== lengthened) return;
  values[EPOCHS] = lengthened = "";
  all(`[data-option="${EPOCHS}"]`).forEach((each) => { each.value = ""; });
}
// Tokens that the run trains on, once the rows have been looked at. Packed rows are full.
function tokens() {
  if (!rows) return null;
  const of = rows.training, number = (name) => Number(current(name)), steps = number("train.max_steps");
  const inRow = current("train.packing") === "true" ? number("train.max_length") : of.tokens / of.rows;
  const seen = steps ? steps * number("train.batch_size") * number("train.gradient_accumulation_steps") * inRow : of.tokens * number("train.num_train_epochs");
  return Math.max(1, Math.round(seen)) || null;
}

// ---- the plan

let planning = 0;
async function plan() {
  const mine = ++planning, box = $("#plan");
  $("#planned").hidden = what() === "study";
  if (what() === "study") return;
  box.setAttribute("aria-busy", "true");
  try {
    const found = await api("plan", { command: what(), values: taken(what()), gpu: $("#card").value, tokens: tokens() });
    if (mine === planning) box.replaceChildren(...planned(found));
  } catch (error) { if (mine === planning) box.replaceChildren(el("p", { className: "quiet", textContent: `No plan: ${error.message}` })); }
  if (mine === planning) { box.removeAttribute("aria-busy"); cards(); }
}
function pill(words, fits) { return el("span", { className: `pill ${!fits ? "bad" : words === "fits" ? "good" : "fair"}`, textContent: words }); }
function planned(found) {
  const made = found.plan, list = made.rows, tokens = made.config.tokens, out = [];
  const parts = (row) => { const kinds = row.memory.kinds, sum = Object.values(kinds).reduce((a, b) => a + b, 0); return { ...kinds, "the rest": Math.max(0, row.memory.device_bytes.likely - sum) }; };
  const most = Math.max(list[0].memory_bytes, ...list.map((row) => row.memory.device_bytes.likely));
  for (const row of list) {
    const bytes = row.memory.device_bytes, bar = el("div", { className: "bytes", role: "img" }), limit = el("b");
    const kinds = Object.entries(parts(row)).filter(([, n]) => n > 0);
    bar.ariaLabel = `${gib(bytes.likely)} of ${gib(row.memory_bytes)}: ${kinds.map(([kind, n]) => `${kind} ${gib(n)}`).join(", ")}`;
    for (const [kind, n] of kinds) { const part = el("i", { className: `k${KINDS.indexOf(kind) < 0 ? 8 : KINDS.indexOf(kind)}`, title: `${kind}: ${gib(n)}` }); part.style.width = `${100 * n / most}%`; bar.append(part); }
    limit.style.left = `${100 * row.memory_bytes / most}%`; limit.title = `the card: ${gib(row.memory_bytes)}`; bar.append(limit);
    const facts = [`needs ${range({ low: bytes.low / GIB, likely: bytes.likely / GIB, high: bytes.high / GIB }, (n) => n.toFixed(1))} GiB`];
    if (row.speed) facts.push(`${range(row.speed.tokens_per_s, whole)} tokens/s`);
    if (row.speed?.hours) facts.push(`takes ${range({ low: row.speed.hours.low * 3600, likely: row.speed.hours.likely * 3600, high: row.speed.hours.high * 3600 }, span)}`);
    if (row.speed?.dollars) facts.push(`costs ${range(row.speed.dollars, dollars)}`);
    if (row.largest_batch_size) facts.push(`room for ${whole(row.largest_batch_size)} rows a step, or rows of ${whole(row.largest_max_length)} tokens`);
    out.push(el("div", { className: `planned ${row.method === found.method ? "mine" : ""}` },
      el("div", { className: "between" }, el("b", { textContent: METHODS[row.method] }), pill(row.verdict, row.fits)), bar,
      el("p", { className: "quiet", textContent: facts.join(" · ") })));
  }
  const seen = new Set(list.flatMap((row) => Object.keys(parts(row)).filter((kind) => parts(row)[kind] > 0)));
  out.push(el("p", { className: "legend" }, ...KINDS.filter((kind) => seen.has(kind)).map((kind) => el("span", {}, el("i", { className: `k${KINDS.indexOf(kind)}` }), kind))));
  for (const [name, { method, reasons }] of Object.entries(made.advice)) out.push(el("p", {}, el("b", { textContent: `Recommended on ${name}: ${METHODS[method] || "none fits"}. ` }), reasons.join(" ")));
  for (const why of Object.values(made.refused)) out.push(el("p", { className: "quiet", textContent: why }));
  if (!tokens) out.push(el("p", { className: "quiet", textContent: "Preview the rows for time and dollars of this run." }));
  return out;
}
// Every card: asked for only while it is open.
let dealing = 0;
async function cards() {
  const mine = ++dealing, box = $("#cards");
  if (!$("#fits").open || what() === "study") return;
  let found;
  try { found = await api("plan", { command: what(), values: taken(what()), gpu: "all", tokens: tokens() }); } catch { found = null; }
  if (mine !== dealing) return;
  if (!found) { box.replaceChildren(); return; }
  const list = found.plan.rows, names = [...new Set(list.map((row) => row.device))], methods = [...new Set(list.map((row) => row.method))];
  const title = Object.fromEntries(form.devices.map((each) => [each.name, each.title.split(",")[0]]));
  box.replaceChildren(el("table", {},
    el("thead", {}, el("tr", {}, el("th", { textContent: "card" }), ...methods.map((each) => el("th", { textContent: METHODS[each] })))),
    el("tbody", {}, ...names.map((name) => el("tr", {}, el("th", { scope: "row", textContent: title[name] || name }), ...methods.map((each) => {
      const row = list.find((one) => one.device === name && one.method === each);
      const more = [row?.speed?.hours && span(row.speed.hours.likely * 3600), row?.speed?.dollars && dollars(row.speed.dollars.likely)].filter(Boolean);
      return row ? el("td", {}, pill(row.verdict, row.fits), row.fits && more.length ? ` ${more.join(", ")}` : "") : el("td", { textContent: "–" });
    }))))));
}

// ---- starting

async function start(body, button) {
  button.disabled = true;
  try {
    const made = await api("jobs", body);
    say(`Started ${made.id}`);
    await poll();
    location.hash = linkTo(made.id);
    return null;
  } catch (error) { return error.message; } finally { button.disabled = false; }
}
async function startForm() {
  const body = what() === "study" ? { command: "study", values: {}, toml: $("#toml").value } : { command: what(), values: taken(what()), gpu: $("#card").value, tokens: tokens() };
  const why = await start(body, $("#start"));
  $("#wrong").hidden = !why;
  if (why) $("#wrong").textContent = why; else { values["train.output_dir"] = ""; build(); check(); }
}
// A command's dialog, with some options filled in.
function ask(command, title, about, given) {
  const dialog = $("#ask"), chosen = { ...given };
  let mine = 0;
  const update = later(async () => {
    const now = ++mine;
    let words = null, why = "";
    try { words = (await api("check", { command, values: clean() })).command; } catch (error) { why = error.message; }
    if (now !== mine) return;
    if (words === null) refuse(why); else { $(".command", dialog).textContent = words; $("#refused").hidden = true; }
  }, 150);
  const clean = () => Object.fromEntries(Object.entries(chosen).filter(([, text]) => text));
  const refuse = (text) => { $("#refused").textContent = text; $("#refused").hidden = false; };
  const fields = (list) => list.map((each) => field(each, chosen[each.name], (text) => { chosen[each.name] = text; update(); }));
  $("#asked").textContent = title;
  $("#about").textContent = about;
  $("#asks").replaceChildren(...fields(ASKED[command].map((name) => option(command, name))));
  $("#rest").replaceChildren(...fields(options(command).filter((each) => !ASKED[command].includes(each.name))));
  $("#more").open = false;
  $("#refused").hidden = true;
  $(".command", dialog).textContent = "";
  const leaf = ["merge", "export", "quantize"].includes(command);
  if (leaf) $("[data-option=output]", dialog).placeholder = "a new one in the studio's folder";
  $("form", dialog).onsubmit = async (event) => { event.preventDefault(); const why = await start({ command, values: clean() }, $("#go")); if (why) refuse(why); else dialog.close(); };
  dialog.showModal();
  update();
}

// ---- runs

function products(kind) { return jobs.flatMap((each) => (each.status === "ok" && each.output && (kind === "model") === (each.kind === "merge") ? [each.output] : [])); }
const named = (each) => each.output || each.facts.adapter || each.facts.model || each.facts.source || each.id;
const badge = (each) => el("span", { className: `pill ${{ running: "live", ok: "good", failed: "bad", died: "bad", interrupted: "fair" }[each.status]}`, textContent: each.status === "running" && each.asked ? "stopping" : STATUS[each.status] || each.status });
const done = (each) => each.runs.reduce((sum, run) => sum + run.step, 0), total = (each) => each.runs.reduce((sum, run) => sum + run.total, 0);
const ago = (at) => { const s = Date.now() / 1000 - at; return s < 60 ? "just now" : s < 3600 ? `${Math.round(s / 60)} min ago` : s < 86400 ? `${Math.round(s / 3600)} h ago` : new Date(at * 1000).toLocaleDateString(); };

const cardsShown = new Map();
function list() {
  const box = $("#list");
  if (!jobs.length) { box.replaceChildren(el("p", { className: "quiet" }, "Nothing has been started in this folder yet. ", el("a", { href: "#new", textContent: "Start a run" }), ".")); return; }
  const keys = new Set(jobs.map((each) => each.id));
  for (const [id, item] of cardsShown) if (!keys.has(id)) { item.remove(); cardsShown.delete(id); }
  if (!box.firstElementChild?.matches(".run")) box.replaceChildren();
  jobs.forEach((each, place) => {
    const mark = JSON.stringify([each.status, each.asked, each.seen, each.note, ago(each.started)]);
    let item = cardsShown.get(each.id);
    if (!item) { item = el("article", { className: "run" }); cardsShown.set(each.id, item); }
    if (box.children[place] !== item) box.insertBefore(item, box.children[place] || null);
    if (item.dataset.mark === mark) return;
    item.dataset.mark = mark;
    const run = each.runs.find((one) => one.phase === "training") || each.runs.at(-1);
    const figures = run ? [each.runs.length > 1 && run.name, run.loss !== null && `loss ${charts.short(run.loss)}`, run.evaluation !== null && `evaluation ${charts.short(run.evaluation)}`, run.tokens_per_s !== null && `${whole(run.tokens_per_s)} tokens/s`].filter(Boolean).join(" · ") : "";
    const focus = document.activeElement?.closest(".run") === item ? document.activeElement.tagName : null;
    item.replaceChildren(
      each.runs.length ? el("input", { type: "checkbox", checked: checked.has(each.id), ariaLabel: `show ${named(each)} beside others`, onchange: (event) => { if (event.target.checked) checked.add(each.id); else checked.delete(each.id); beside(); } }) : el("span"),
      el("div", { className: "grow" }, el("div", { className: "between" }, el("a", { href: linkTo(each.id), textContent: named(each) }), badge(each)),
        el("p", { className: "quiet", textContent: [each.kind, each.own ? ago(each.started) : `from a terminal, ${ago(each.started)}`, figures].filter(Boolean).join(" · ") }),
        each.status === "running" && total(each) ? el("progress", { max: total(each), value: done(each), ariaLabel: `step ${done(each)} of ${total(each)}` }) : null,
        each.note ? el("p", { className: each.status === "interrupted" ? "quiet" : "wrong", textContent: each.note }) : null));
    if (focus) item.querySelector(focus.toLowerCase())?.focus();
  });
}
let besideSeen = "";
async function beside(force = true) {
  const box = $("#beside"), shown = jobs.filter((each) => checked.has(each.id));
  box.hidden = !shown.length;
  if (!shown.length) { besideSeen = ""; return; }
  const seen = JSON.stringify(shown.map((each) => [each.id, each.seen, each.status]));
  if (!force && seen === besideSeen) return;
  besideSeen = seen;
  const found = await Promise.all(shown.map((each) => api(pathOf(each.id))));
  if (seen !== besideSeen) return; // others were chosen since, or they went on
  if (!box.firstChild) box.append(el("div", { className: "card" }, el("h2", { textContent: "Side by side" }), el("div", { className: "charts" }, el("figure", { id: "b-loss" }), el("figure", { id: "b-rate" })), el("div", { className: "wide" }, el("table"))));
  const lines = found.flatMap((each) => each.curves.map((curve) => ({ each, curve, name: [named(each), curve.name].filter(Boolean).join(" ") })));
  charts.draw($("#b-loss"), { title: "Loss", x: "step", clip: true, series: lines.flatMap(({ curve, name }, i) => [{ name, x: curve.step, y: curve.loss, colour: i }, { x: curve.evaluations.map((e) => e[0]), y: curve.evaluations.map((e) => e[1]), dots: true, colour: i }]), note: "lines: training; dots: evaluation" });
  charts.draw($("#b-rate"), { title: "Tokens/s", x: "step", zero: true, series: lines.map(({ curve, name }, i) => ({ name, x: curve.step, y: curve.tokens_per_s, colour: i })) });
  const flags = found.map((each) => Object.fromEntries([...each.command.matchAll(/--([\w-]+)(?:[ =](?!--)('[^']*'|\S+))?/g)].map(([, name, value]) => [name, value ?? "yes"])));
  const differing = [...new Set(flags.flatMap(Object.keys))].filter((name) => name !== "output" && new Set(flags.map((each) => each[name])).size > 1);
  const line = (name, cells) => el("tr", {}, el("th", { scope: "row", textContent: name }), ...cells.map((text) => el("td", { textContent: text ?? "–" })));
  const last = (each, what) => each.runs.map((run) => (each.runs.length > 1 ? `${run.name} ` : "") + (run[what] === null ? "–" : what === "loss" || what === "evaluation" ? charts.short(run[what]) : whole(run[what]))).join(", ");
  $("table", box).replaceChildren(el("thead", {}, el("tr", {}, el("td"), ...found.map((each) => el("th", { scope: "col" }, el("a", { href: linkTo(each.id), textContent: named(each) }))))),
    el("tbody", {}, line("status", found.map((each) => STATUS[each.status])), line("step", found.map((each) => `${done(each)} of ${total(each)}`)), line("training loss", found.map((each) => last(each, "loss"))), line("evaluation loss", found.map((each) => last(each, "evaluation"))),
      line("tokens/s", found.map((each) => last(each, "tokens_per_s"))), line("peak memory", found.map((each) => (each.result?.memory ? gib(each.result.memory.measured_bytes) : each.memory.peak ? gib(each.memory.peak) : null))),
      ...differing.map((name) => line(`--${name}`, flags.map((each) => each[name])))));
}

// ---- one job

async function showJob(id, fresh) {
  const box = $("#job");
  if (fresh) { job = null; box.replaceChildren(el("p", { className: "quiet", textContent: "…" })); }
  let found;
  let why = "";
  try { found = await api(pathOf(id)); } catch (error) { why = error.message; }
  if (place().name !== "job" || place().id !== id) return;
  if (why) {
    job = null; // what `fill` fills is gone
    box.replaceChildren(el("h1", { textContent: id }), el("p", { className: "wrong", textContent: why }));
    return;
  }
  if (!job || job.id !== id) skeleton(box, found);
  job = found;
  fill(found);
}
function skeleton(box, found) {
  const part = (id) => el("div", { id });
  box.replaceChildren(el("p", {}, el("a", { href: "#runs", textContent: "← Runs" })), el("div", { className: "between" }, el("h1", { textContent: named(found), tabIndex: -1 }), el("span", { id: "j-badge" })),
    el("div", { className: "row", id: "j-buttons" }), part("j-note"), part("j-progress"), part("j-figures"), part("j-result"), part("j-next"),
    el("div", { className: "charts", id: "j-charts", hidden: true }, el("figure", { id: "c-loss" }), el("figure", { id: "c-memory" }), el("figure", { id: "c-rate" })),
    el("h2", { textContent: "Command" }), el("pre", { className: "command", tabIndex: 0, textContent: found.command }), el("div", { className: "row" }, el("button", { type: "button", className: "copy", textContent: "Copy", ariaLabel: "Copy the command" })),
    el("details", { id: "j-logs", open: true }, el("summary", { textContent: "Log" }), el("pre", { id: "j-log", className: "log", tabIndex: 0, ariaLabel: "log" })));
}
function button(words, work, main) { return el("button", { type: "button", className: main ? "main" : "", textContent: words, onclick: (event) => work(event.target) }); }
function same(box, mark, make) { if (box.dataset.mark !== mark) { box.dataset.mark = mark; box.replaceChildren(...make()); } }
function act(what) { return async (pressed) => { const { id } = job; pressed.disabled = true; try { await api(`${pathOf(id)}/${what}`, {}); await poll(); await showJob(id); } catch (error) { $("#j-note").replaceChildren(el("p", { className: "wrong", role: "alert", textContent: error.message })); pressed.disabled = false; } }; }
function fill(found) {
  const mark = JSON.stringify([found.status, found.asked, found.address, found.report, found.products]);
  same($("#j-badge"), mark, () => [badge(found)]);
  same($("#j-buttons"), mark, () => {
    const made = [];
    if (found.status === "running" && found.own) made.push(button(found.asked ? "Stop now" : "Stop", act("stop")));
    if (found.status !== "running" && found.status !== "ok" && found.own) made.push(button(found.kind === "train" || found.kind === "compare" ? "Resume" : "Run again", act("resume"), true));
    if (found.report) made.push(el("a", { className: "button main", href: `/api/${pathOf(found.id)}/report`, target: "_blank", rel: "noopener", textContent: "Open the report" }));
    if (found.address) {
      const at = new URL(found.address);
      if (["0.0.0.0", "[::]"].includes(at.hostname)) at.hostname = location.hostname;
      made.push(el("a", { className: "button main", id: "chat", href: at.origin, target: "_blank", rel: "noopener", textContent: "Open the chat: base beside adapter" }));
    }
    return made;
  });
  same($("#j-note"), found.note + found.asked + found.status + found.warnings.join(), () => [
    found.note ? el("p", { className: found.status === "interrupted" ? "warning" : "wrong", role: "alert", textContent: found.note }) : null,
    found.status === "running" && found.asked ? el("p", { className: "warning", textContent: "Asked to stop: a run ends its step and saves a checkpoint first. 'Stop now' ends it at once; Resume then goes on from the last checkpoint." }) : null,
    ...found.warnings.map((line) => el("p", { className: "warning", textContent: line })),
  ].filter(Boolean));
  const run = found.runs.find((one) => one.phase === "training") || found.runs.at(-1), peak = found.result?.memory?.measured_bytes || found.memory.peak;
  const said = found.log.trim().split("\n").at(-1), trains = ["train", "compare"].includes(found.kind);
  const ending = trains && run && total(found) && done(found) >= total(found) && run === found.runs.at(-1);
  const doing = ending ? "ending: the last evaluation, then saving" : total(found) > done(found) ? `step ${whole(done(found))} of ${whole(total(found))}` : trains || said.startsWith("$ ") ? "getting ready: reading the model and the rows" : said;
  same($("#j-progress"), `${found.status}${doing}`, () => (found.status !== "running" || found.address ? [] : [
    el("progress", { ...(total(found) && { max: total(found), value: done(found) }), ariaLabel: "progress" }), el("p", { className: "quiet", textContent: doing })]));
  const figures = [];
  const whose = found.runs.length > 1 ? `${run.name}: ` : "";
  if (run && !found.result?.methods) figures.push([`${whose}training loss`, run.loss === null ? "–" : charts.short(run.loss)], [`${whose}evaluation loss`, run.evaluation === null ? "–" : charts.short(run.evaluation)], [`${whose}tokens/s`, run.tokens_per_s === null ? "–" : whole(run.tokens_per_s)]);
  if (found.status === "running" && run?.seconds_left) figures.push(["left", span(run.seconds_left)]);
  if (peak) figures.push(["peak memory", gib(peak)]);
  const own = found.result?.memory?.planned_bytes, plan = own ? [own.low, own.likely, own.high] : found.planned; // the run's own knows its rows
  if (plan) figures.push([own ? "planned memory" : "planned memory, rows of full length", gib(plan[1])]);
  $("#j-figures").className = figures.length ? "figures" : "";
  same($("#j-figures"), JSON.stringify(figures), () => figures.map(([name, text]) => el("div", {}, el("b", { textContent: text }), el("small", { textContent: name }))));
  const curves = found.curves;
  $("#j-charts").hidden = !found.runs.length;
  if (found.runs.length) {
    const upTo = done(found) > total(found) / 3 ? found.runs[0]?.total : 0, colours = curves.length > 1, mean = Math.max(1, ...curves.map((c) => c.mean_of));
    charts.draw($("#c-loss"), { title: "Loss", x: "step", clip: true, upTo, note: `line: training${mean > 1 ? `, means of ${mean} steps` : ""}; dots: evaluation`, series: curves.flatMap((c, i) => [{ name: colours ? c.name : "", x: c.step, y: c.loss, colour: i }, { x: c.evaluations.map((e) => e[0]), y: c.evaluations.map((e) => e[1]), dots: true, colour: colours ? i : 1 }]) });
    charts.draw($("#c-memory"), { title: "Memory", x: "seconds", zero: true, fromZero: true, note: `GiB, ${plan ? "line: measured; band: the plan" : "measured"}`, band: plan ? [plan[0] / GIB, plan[2] / GIB, "planned"] : null, series: [{ x: found.memory.seconds, y: found.memory.bytes.map((n) => n / GIB), colour: 2, dash: 0 }] });
    charts.draw($("#c-rate"), { title: "Tokens/s", x: "step", zero: true, clip: true, upTo, series: curves.map((c, i) => ({ name: colours ? c.name : "", x: c.step, y: c.tokens_per_s, colour: colours ? i : 4, dash: colours ? i : 0 })) });
  }
  same($("#j-next"), mark, () => next(found));
  same($("#j-result"), JSON.stringify(found.result), () => result(found.result));
  const log = $("#j-log"), atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 24;
  if (log.textContent !== found.log) { log.textContent = found.log; if (atEnd) log.scrollTop = log.scrollHeight; }
  $("#j-logs").hidden = !found.own;
}
function next(found) {
  const made = [], model = found.facts.model || found.result?.config?.model || "demo";
  if (found.status !== "ok") return made;
  for (const product of found.products) {
    const buttons = [], { path, folder, what } = product;
    if (what === "adapter") {
      buttons.push(button("Chat", (pressed) => start({ command: "serve", values: { model, adapters: folder, port: "0", ...(found.facts.method === "lora" && { any_base: "true" }) } }, pressed), true));
      buttons.push(button("Merge…", () => ask("merge", "Merge", "Make the adapter part of its base's weights. The loss of doing so is measured first.", { adapter: path })));
      buttons.push(button("Export…", () => ask("export", "Export", "Write the adapter for another tool: llama.cpp (gguf), PEFT, servers.", { source: path })));
      buttons.push(button("Evaluate…", () => ask("eval", "Evaluate", "Score the base with this adapter on rows.", { model, adapter: path, "data.path": found.facts["data.path"] || "demo" })));
    }
    if (what === "model") {
      buttons.push(button("Export…", () => ask("export", "Export", "Write the model for another tool: llama.cpp (gguf), transformers, bitsandbytes.", { source: path }), true));
      buttons.push(button("Chat", (pressed) => start({ command: "serve", values: { model: path, port: "0" } }, pressed)));
      buttons.push(button("Quantise…", () => ask("quantize", "Quantise", "Pack the layers into a checkpoint of fewer bits.", { model: path })));
    }
    if (what === "adapter" || what === "model") buttons.push(button("Serve…", () => ask("serve", "Serve", "An OpenAI-compatible server, with a chat page.", what === "adapter" ? { model, adapters: folder } : { model: path })));
    made.push(el("div", { className: "card next" }, el("p", {}, el("b", { textContent: { adapter: "Adapter ", model: "Model ", file: "File " }[what] }), el("code", { textContent: path })), el("div", { className: "row" }, ...buttons)));
  }
  return made;
}
function result(found) {
  if (!found) return [];
  const out = [];
  if (found.evaluations) out.push(el("p", {}, `Evaluation loss ${charts.short(found.evaluations[0].loss)} → `, el("b", { textContent: charts.short(found.evaluations[1].loss) }), ...Object.entries(found.evaluations[1].scores || {}).map(([name, value]) => `; ${name} ${charts.short(found.evaluations[0].scores?.[name] ?? NaN)} → ${charts.short(value)}`), "."));
  if (found.memory) out.push(el("p", { className: "quiet", textContent: `Memory: planned ${range(found.memory.planned_bytes, gib)}, measured ${gib(found.memory.measured_bytes)}, error ${(100 * found.memory.error).toFixed(1)}%.` }));
  if (found.methods) out.push(el("div", { className: "wide" }, el("table", {}, el("thead", {}, el("tr", {}, ...["method", "", "evaluation loss", "peak memory"].map((text) => el("th", { textContent: text })))),
    el("tbody", {}, ...found.methods.map((each) => el("tr", {}, el("th", { scope: "row", textContent: each.method }), el("td", { textContent: each.status === "ok" ? "" : `${each.status}: ${each.error || ""}` }), el("td", { textContent: each.eval_loss ? charts.short(each.eval_loss) : "–" }), el("td", { textContent: each.peak_bytes ? gib(each.peak_bytes) : "–" })))))));
  if (found.advice?.method) out.push(el("p", {}, el("b", { textContent: `Recommendation: ${found.advice.method}. ` }), (found.advice.reasons || []).join(" ")));
  else if (Array.isArray(found.advice)) out.push(...found.advice.map((line) => el("p", { className: "quiet", textContent: line })));
  return out;
}

// ---- the whole

function view() {
  const { name: shown, id } = place();
  for (const each of ["new", "runs", "job"]) $(`#${each}`).hidden = each !== shown;
  all("nav a").forEach((link) => { if (link.hash === `#${shown}`) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current"); });
  if (shown === "job") showJob(id, true);
  if (shown === "runs") { list(); beside(); }
  scrollTo(0, 0);
}
let polling = null, memorySeen = 0;
function poll() { polling ||= once().finally(() => { polling = null; }); return polling; }
async function once() {
  const before = Object.fromEntries(jobs.map((each) => [each.id, each.status]));
  let found;
  try { found = await api("jobs"); silent = 0; } catch (error) { if (++silent > 1) banner(error.message); return; }
  jobs = found.jobs;
  $("#older").hidden = !found.left_out;
  $("#older").textContent = `${whole(found.left_out)} older ones are in the folder.`;
  banner(found.disk_free < 512e6 ? `The disk is almost full: ${(found.disk_free / 1e6).toFixed(0)} MB are free. Free some space, or runs cannot save; a run that stops for it can be resumed.` : "");
  const running = jobs.filter((each) => each.status === "running").length;
  $("#running").hidden = !running;
  $("#running").textContent = `${running}`;
  $("#running").ariaLabel = `${running} running`;
  for (const each of jobs) if (before[each.id] && before[each.id] !== each.status) say(`${named(each)}: ${STATUS[each.status] || each.status}`);
  if (!$("#runs").hidden) { list(); beside(false); }
  const now = jobs.find((each) => each.id === place().id);
  if (!$("#job").hidden && now && (!job || now.seen !== job.seen || now.status !== job.status || now.asked !== job.asked || (now.status === "running" && Date.now() - memorySeen > 1500))) { memorySeen = Date.now(); await showJob(now.id); }
}
function banner(text) { const box = $("#banner"); box.hidden = !text; if (box.textContent !== text) box.textContent = text; }
async function loop() { try { await poll(); } finally { setTimeout(loop, document.hidden ? 3000 : 400); } }

async function open() {
  form = await api("form");
  $("#where").textContent = `${form.folder} · ${form.version}`;
  $("#card").replaceChildren(...form.devices.map((each) => new Option(each.title, each.name)));
  $("#card").value = form.here;
  await poll();
  build();
  check();
  plan();
  view();
  loop();
}
$("#cancel").onclick = () => $("#ask").close();
$(".skip").onclick = (event) => { event.preventDefault(); $("#main").focus(); }; // its hash is none of the page's places
$("#card").onchange = plan;
$("#fits").ontoggle = cards;
$("#look").onclick = look;
$("#find").oninput = find;
$("#start").onclick = startForm;
$("#form").onsubmit = (event) => { event.preventDefault(); };
$("#file").onchange = (event) => { if (event.target.files[0]) upload(event.target.files[0]); };
all("input[name=what]").forEach((input) => { input.onchange = () => { shorten(); stale(); build(); check(); plan(); }; });
document.addEventListener("click", async (event) => {
  if (!event.target.matches(".copy")) return;
  const text = $(".command", event.target.closest("dialog, .start, section")).textContent;
  try { await navigator.clipboard.writeText(text); say("Copied"); event.target.textContent = "Copied"; }
  catch { getSelection().selectAllChildren($(".command", event.target.closest("dialog, .start, section"))); event.target.textContent = "Press Ctrl+C"; }
  setTimeout(() => { event.target.textContent = "Copy"; }, 1500);
});
addEventListener("hashchange", () => { view(); $("#main").focus({ preventScroll: true }); });
addEventListener("resize", later(() => { if (job && !$("#job").hidden) fill(job); if (!$("#runs").hidden) beside(); }, 150));
$("#enter").onclick = async () => {
  try { await api("key", { key: $("#key").value }); $("#keyed").close(); $("#key").value = ""; if (form) poll(); else open(); }
  catch (error) { $("#nokey").textContent = error.message; $("#nokey").hidden = false; }
};
$("#keyed form").onsubmit = (event) => { event.preventDefault(); $("#enter").click(); };
open().catch((error) => banner(error.message));
