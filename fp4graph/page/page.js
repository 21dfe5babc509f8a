"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const COLORS = ["#ffffd9", "#edf8b1", "#c7e9b4", "#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8", "#253494", "#081d58"];
const MARKS = ["#0072B2", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#F0E442"];
const byId = (id) => document.getElementById(id);
const state = { study: 0, setting: 0, on: new Set(), shown: null };
const study = () => DATA.studies[state.study];
const setting = () => study().settings[state.setting];

// --- small things

function make(name, attributes = {}, ...children) {
  const svg = ["svg", "rect", "text", "g", "line", "circle", "path", "title", "defs", "pattern"].includes(name);
  const node = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.filter((each) => each !== null));
  return node;
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(digits - 1) : String(+value.toPrecision(digits));
}

function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  for (; Math.abs(value) >= 1000 && unit < units.length - 1; unit += 1) value /= 1000;
  return `${number(value)} ${units[unit]}`;
}

/** Returns a word as a shell takes it. */
const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);

const withError = (value, error) => number(value) + (error ? ` ± ${number(error, 2)}` : "");

/** Returns a colour for each value, by its logarithm where values spread, and the two ends. */
function colors(values) {
  const known = values.filter((value) => value > 0);
  const high = Math.max(...known, 1e-12);
  const least = Math.min(...known, high);
  const logarithmic = high / least > 20;
  const low = logarithmic ? Math.max(least, high / 1e4) : 0;
  const place = (value) => logarithmic ? Math.log(Math.max(value, low) / low) / Math.log(high / low) : value / high;
  return { low, high, of: (value) => COLORS[Math.round(Math.min(Math.max(place(value), 0), 1) * (COLORS.length - 1))] };
}

// --- selectors, as fp4graph/study/selections.py writes them

function clauses(indices) {
  const { cells, roles } = study();
  const blocks = new Map();
  for (const role of roles) {
    const own = indices.filter((i) => cells[i].role === role).map((i) => cells[i].block).sort((a, b) => a - b);
    if (own.length) blocks.set(role, own);
  }
  const groups = new Map();
  for (const [role, own] of blocks) {
    const whole = cells.filter((cell) => cell.role === role).length === own.length;
    const key = whole ? "" : runs(own).join(";");
    groups.set(key, [...(groups.get(key) ?? []), role]);
  }
  const found = [];
  for (const [key, names] of groups) {
    const text = names.join(",");
    if (key === "") found.push(text);
    else found.push(...key.split(";").map((run) => `${text},blocks=${run}`));
  }
  return found;
}

function runs(blocks) {
  const found = [];
  let start = 0;
  blocks.forEach((block, at) => {
    if (blocks[at + 1] === block + 1) return;
    found.push(blocks[start] === block ? `${block}` : `${blocks[start]}..${block}`);
    start = at + 1;
  });
  return found;
}

function shortest(on) {
  const every = study().cells.map((_, i) => i);
  if (every.length && on.size === every.length) return "all";
  const within = clauses(every.filter((i) => on.has(i)));
  const without = clauses(every.filter((i) => !on.has(i)));
  if (!within.length) return "none";
  if (within.length <= without.length) return within.join(" | ");
  return ["all", ...without.map((clause) => `!(${clause})`)].join(",");
}

// --- what is chosen

function chosen() {
  const { cells } = study();
  const how = setting();
  const total = { kl: 0, variance: 0, unknown: 0, dense: 0, now: 0, measured: 0 };
  cells.forEach((cell, i) => {
    total.dense += cell.dense;
    total.now += state.on.has(i) ? how.bytes[i] : cell.dense;
    if (!state.on.has(i)) return;
    if (how.kl[i] === null) total.unknown += 1;
    total.kl += how.kl[i] ?? 0;
    total.variance += (how.se[i] ?? 0) ** 2;
    total.measured += how.measured[i];
  });
  const rate = millisecondsPerByte();
  return { ...total, se: Math.sqrt(total.variance), ms: rate && -rate * (total.dense - total.now) };
}

/** Returns what latency's best row of the format gained for each byte of linears that it saved. */
function millisecondsPerByte() {
  const dense = DATA.latency.find((row) => row.format === null);
  const packed = DATA.latency.filter((row) => row.format === setting()?.format && row.weight_bytes < dense?.weight_bytes);
  if (!dense || !packed.length) return null;
  const row = packed.reduce((a, b) => (b.weight_bytes < a.weight_bytes ? b : a));
  const width = dense.weight_bytes / Math.max(study().cells.reduce((sum, cell) => sum + cell.dense, 0), 1);
  return ((dense.per_token_ms.p50 - row.per_token_ms.p50) / (dense.weight_bytes - row.weight_bytes)) * Math.min(width, 1);
}

function update() {
  if (!study().settings.length) return;
  document.querySelectorAll("#heat .cell").forEach((node) => node.classList.toggle("on", state.on.has(+node.dataset.index)));
  const total = chosen();
  const how = setting();
  const rows = [
    ["linears on", `${state.on.size} of ${study().cells.length}`],
    ["KL, predicted", `${withError(total.kl, total.se)} nats a token` + (total.unknown ? `, ${total.unknown} unknown` : "")],
    ["from", `${total.measured} measured, ${state.on.size - total.measured - total.unknown} estimated`],
    ["block linears", `${bytes(total.now)} of ${bytes(total.dense)} (${number((100 * total.now) / Math.max(total.dense, 1))} %)`],
  ];
  if (total.ms !== null) rows.push(["time a token", `${number(total.ms)} ms (by bytes, from latency)`]);
  byId("totals").replaceChildren(...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  const selector = shortest(state.on);
  byId("selector").textContent = selector;
  const model = study().model || "MODEL";
  const options = [`--format ${how.format}`];
  if (how.activations !== "none") options.push(`--activations ${how.activations}`);
  if (how.quantizer !== "rtn") options.push(`--quantizer ${how.quantizer}`);
  if (how.needs_data) options.push("--calibration FILE");
  byId("command").textContent = `fp4graph export ${quoted(model)} --select '${selector}' ${options.join(" ")} --out DIR`;
  moveStar(total);
}

function toggle(indices) {
  const all = indices.every((i) => state.on.has(i));
  indices.forEach((i) => (all ? state.on.delete(i) : state.on.add(i)));
  update();
}

function upTo(budget) {
  const how = setting();
  const order = how.kl.map((kl, i) => [kl, i]).filter(([kl]) => kl !== null).sort((a, b) => a[0] - b[0]);
  state.on.clear();
  let sum = 0;
  for (const [kl, i] of order) {
    sum += Math.max(kl, 0);
    if (sum > budget) break;
    state.on.add(i);
  }
  update();
}

// --- the heat map

function drawMap() {
  const { cells, roles } = study();
  const how = setting();
  const heat = byId("heat");
  heat.replaceChildren();
  byId("scale").textContent = "";
  byId("map").hidden = !how;
  if (!how) return;
  const blocks = [...new Set(cells.map((cell) => cell.block))].sort((a, b) => a - b);
  const left = 9 * Math.max(...roles.map((role) => role.length), 4) + 8;
  const size = Math.max(18, Math.min(27, Math.floor((820 - left) / blocks.length)));
  const width = left + size * blocks.length + 4;
  const height = 24 + size * roles.length + 4;
  heat.setAttribute("width", width);
  heat.setAttribute("height", height);
  heat.setAttribute("viewBox", `0 0 ${width} ${height}`);
  heat.append(make("defs", {}, make("pattern", { id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse" },
    make("rect", { width: 6, height: 6, fill: "#cfd4da" }), make("path", { d: "M0 6L6 0", stroke: "#7b8794" }))));
  const of = (test) => cells.map((cell, i) => (test(cell) ? i : -1)).filter((i) => i >= 0);
  roles.forEach((role, row) => heat.append(make("text", {
    class: "name", x: left - 8, y: 24 + size * row + size / 2 + 4, "text-anchor": "end", "data-role": role,
    onclick: () => toggle(of((cell) => cell.role === role)) }, role)));
  const step = Math.ceil(22 / size);
  blocks.forEach((block, column) => heat.append(make("text", {
    class: "name", x: left + size * (column + 0.5), y: 16, "text-anchor": "middle", "data-block": block,
    onclick: () => toggle(of((cell) => cell.block === block)) }, column % step ? "·" : String(block))));
  const scale = colors(how.kl.filter((kl) => kl !== null));
  cells.forEach((cell, i) => {
    const known = how.kl[i] !== null;
    const rectangle = make("rect", {
      class: known ? "cell" : "cell unknown", x: left + 1.5 + size * blocks.indexOf(cell.block), y: 25.5 + size * roles.indexOf(cell.role),
      width: size - 3, height: size - 3, "data-index": i, fill: known ? scale.of(how.kl[i]) : null,
      onclick: () => { toggle([i]); show(i); }, onmouseenter: () => show(i) },
      make("title", {}, `${cell.role}, block ${cell.block}: ${known ? `${withError(how.kl[i], how.se[i])} nats` : "not measured"}`));
    heat.append(rectangle);
  });
  const spread = make("svg", { width: 190, height: 14, style: "display:inline-block;vertical-align:middle" },
    ...COLORS.map((color, i) => make("rect", { x: i * 21, width: 21, height: 14, fill: color })));
  byId("scale").append("KL, nats a token: ", number(scale.low), " ", spread, " ", number(scale.high), "; hatched: not measured; framed: on");
}

function show(i) {
  const cell = study().cells[i];
  const how = setting();
  const found = study().outliers[i];
  const rows = [
    [how.measured[i] ? "KL, measured" : "KL, estimated", how.kl[i] === null ? "unknown" : `${withError(how.kl[i], how.se[i])} nats`],
    ["parameters", number(cell.parameters)],
    ["bytes", `${bytes(how.bytes[i])} of ${bytes(cell.dense)}`],
  ];
  const rate = millisecondsPerByte();
  if (rate) rows.push(["time", `${number(-1000 * rate * (cell.dense - how.bytes[i]))} µs a token`]);
  for (const side of found ? ["input", "weight"] : []) {
    const [ratio, kurtosis, channels] = found[side];
    rows.push([`${side}, outliers`, `max / p99.9 ${number(ratio)}, kurtosis ${number(kurtosis)}, ${channels} channels`]);
  }
  for (const other of study().settings) {
    if (other !== how && other.kl[i] !== null) rows.push([other.name, `${withError(other.kl[i], other.se[i])} nats`]);
  }
  if (cell.paths.length) rows.push(["path", cell.paths.join(", ")]);
  byId("panel").replaceChildren(make("h3", {}, `${cell.role}, block ${cell.block}`),
    make("dl", {}, ...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])));
}

// --- plots

let star = null;
function moveStar(total) {
  if (!star || !star.isConnected) return;
  const at = star.place(total.now, total.kl);
  star.node.setAttribute("transform", `translate(${at[0]},${at[1]})`);
  star.node.style.display = total.kl > 0 ? "" : "none";
}

function plot(title, xName, points, xText, withStar) {
  const [width, height, left, bottom, top] = [520, 330, 62, 46, 34];
  const xs = points.map((point) => point.x);
  const ys = points.map((point) => point.y).filter((y) => y > 0);
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  const pad = (x1 - x0 || Math.abs(x1) || 1) * 0.04;
  const [y0, y1] = [Math.min(...ys) / 1.4, Math.max(...ys) * 1.4];
  const px = (x) => left + ((x - x0 + pad) / (x1 - x0 + 2 * pad)) * (width - left - 16);
  const py = (y) => height - bottom - (Math.log(Math.max(y, y0) / y0) / Math.log(y1 / y0)) * (height - top - bottom);
  const node = make("svg", { viewBox: `0 0 ${width} ${height}`, width: "100%", role: "img", "aria-label": title },
    make("text", { x: left, y: 16, style: "font-weight:600" }, title),
    make("line", { class: "axis", x1: left, x2: width - 16, y1: height - bottom, y2: height - bottom }),
    make("line", { class: "axis", x1: left, x2: left, y1: top, y2: height - bottom }),
    make("text", { x: (left + width - 16) / 2, y: height - 6, "text-anchor": "middle" }, xName),
    make("text", { x: 14, y: (height - bottom + top) / 2, "text-anchor": "middle", transform: `rotate(-90 14 ${(height - bottom + top) / 2})` }, "KL, nats a token"));
  for (const share of [0, 1, 2, 3, 4]) {
    const x = x0 + ((x1 - x0) * share) / 4;
    node.append(make("text", { x: px(x), y: height - bottom + 17, "text-anchor": "middle" }, xText(x)));
  }
  for (let power = Math.ceil(Math.log10(y0)); power <= Math.log10(y1); power += 1) {
    node.append(make("text", { x: left - 6, y: py(10 ** power) + 4, "text-anchor": "end" }, number(10 ** power)),
      make("line", { class: "axis", x1: left - 3, x2: left, y1: py(10 ** power), y2: py(10 ** power) }));
  }
  const groups = [...new Set(points.map((point) => point.group))];
  const sorted = [...points].sort((a, b) => a.x - b.x || a.y - b.y);
  let least = Infinity;
  const best = new Set(sorted.filter((point) => point.y < least && ((least = point.y), true)));
  for (const point of [...sorted.filter((each) => !best.has(each)), ...best]) {
    node.append(make("circle", { cx: px(point.x), cy: py(point.y), r: best.has(point) ? 5 : 3.5,
      class: best.has(point) ? null : "beaten", fill: best.has(point) ? MARKS[groups.indexOf(point.group) % MARKS.length] : null },
      make("title", {}, `${point.label}, ${point.group}: ${number(point.y)} nats, ${xText(point.x)}`)));
  }
  groups.forEach((group, i) => node.append(
    make("circle", { cx: left + 18, cy: height - bottom - 14 - 17 * i, r: 5, fill: MARKS[i % MARKS.length] }),
    make("text", { x: left + 28, y: height - bottom - 10 - 17 * i }, group)));
  if (withStar) {
    const mark = make("path", { class: "star", d: "M0 -9L2.6 -2.8 9 -2.6 4 1.6 5.6 8 0 4.4 -5.6 8 -4 1.6 -9 -2.6 -2.6 -2.8Z" });
    node.append(mark);
    star = { node: mark, place: (x, y) => [px(Math.min(Math.max(x, x0 - pad), x1 + pad)), py(Math.min(y, y1))], get isConnected() { return mark.isConnected; } };
  }
  return node;
}

function drawPlots() {
  const { cells, trials } = study();
  const dense = cells.reduce((sum, cell) => sum + cell.dense, 0) || Math.max(0, ...trials.map((trial) => trial.saved));
  const group = (trial) => `${trial.format} ${trial.mode}`;
  const shown = trials.filter((trial) => trial.format !== "dense" && trial.kl > 0);
  const plots = [];
  if (shown.length > 1) {
    const points = shown.map((trial) => ({ x: dense - trial.saved, y: trial.kl, group: group(trial), label: trial.label }));
    plots.push(plot("KL against bytes", "bytes of block linears", points, bytes, true));
  }
  const timed = DATA.latency.flatMap((row) => shown
    .filter((trial) => trial.selector === row.selector && trial.format === row.format && trial.quantizer === row.quantizer)
    .map((trial) => ({ x: row.per_token_ms.p50, y: trial.kl, group: group(trial), label: trial.label })));
  if (timed.length) plots.push(plot("KL against time", "milliseconds a token, median", timed, (x) => number(x), false));
  const plans = DATA.policy.filter((row) => row.measured_kl > 0)
    .map((row) => ({ x: row.bits, y: row.measured_kl, group: "plans", label: row.plan }));
  if (plans.length > 1) plots.push(plot("Plans: KL against bits", "bits a weight of block linears", plans, (x) => number(x), false));
  byId("pareto").hidden = !plots.length;
  document.querySelector("#pareto .plots").replaceChildren(...plots);
}

// --- the passage

function half(bits) {
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  return exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction;
}

function drawPassage() {
  const { tokens, passages, trials } = study();
  const found = Object.keys(passages ?? {});
  byId("passage").hidden = !found.length || !tokens?.length;
  if (byId("passage").hidden) return;
  byId("of").replaceChildren(...found.map((i) => make("option", { value: i }, `${trials[i].label}, ${trials[i].format} ${trials[i].mode} ${trials[i].quantizer}`)));
  const draw = () => {
    const content = Uint8Array.from(atob(passages[byId("of").value]), (each) => each.charCodeAt(0));
    const kl = tokens.map((_, i) => half(content[2 * i] | (content[2 * i + 1] << 8)));
    const scale = colors(kl);
    document.querySelector("#passage .tokens").replaceChildren(...tokens.map((token, i) => {
      const color = scale.of(kl[i]);
      const ink = COLORS.indexOf(color) > 4 ? "#ffffff" : "#1a1a1a";
      return make("span", { style: `background:${color};color:${ink}`, title: `${number(kl[i])} nats` }, token);
    }));
  };
  byId("of").onchange = draw;
  draw();
}

// --- tables

function table(name, rows) {
  if (!rows.length) return null;
  const flat = rows.map((row) => Object.fromEntries(Object.entries(row).flatMap(([key, value]) =>
    value && typeof value === "object" && !Array.isArray(value) ? Object.entries(value).map(([inner, each]) => [`${key}.${inner}`, each]) : [[key, value]])));
  const keys = [...new Set(flat.flatMap(Object.keys))];
  const isNumber = (key) => flat.every((row) => typeof row[key] === "number" || row[key] === null || row[key] === undefined);
  const body = make("tbody");
  const fill = () => body.replaceChildren(...flat.map((row) => make("tr", {}, ...keys.map((key) => {
    const value = row[key];
    const text = typeof value === "number" ? number(value, 4) : Array.isArray(value) ? value.map(String).join(" × ") : String(value ?? "–");
    return make("td", { class: isNumber(key) ? "number" : text.length > 40 ? "long" : null, title: text.length > 40 ? text : null }, text);
  }))));
  let last = null;
  const sort = (key) => {
    const sign = last === key ? -1 : 1;
    last = sign === 1 ? key : null;
    const of = (row) => row[key] ?? -Infinity;
    flat.sort((a, b) => sign * (isNumber(key) ? of(b) - of(a) || 0 : String(a[key]).localeCompare(String(b[key]))));
    fill();
  };
  const head = make("tr", {}, ...keys.map((key) => make("th", { class: isNumber(key) ? "number" : null },
    make("button", { onclick: () => sort(key), title: `sort by ${key}` }, key))));
  const csv = () => {
    const field = (value) => `"${String(Array.isArray(value) ? value.join("x") : value ?? "").replaceAll('"', '""')}"`;
    const lines = [keys, ...flat.map((row) => keys.map((key) => row[key]))].map((line) => line.map(field).join(","));
    const link = make("a", { href: URL.createObjectURL(new Blob([lines.join("\n")], { type: "text/csv" })), download: `${name}.csv` });
    link.click();
  };
  const details = make("details", { "data-table": name }, make("summary", {}, `${name} (${rows.length})`),
    make("p", {}, make("button", { onclick: csv }, "CSV")));
  details.addEventListener("toggle", () => {
    if (!details.open || body.childElementCount) return;
    fill();
    details.append(make("div", { class: "tables" }, make("table", {}, make("thead", {}, head), body)));
  });
  return details;
}

function cellRows() {
  return study().settings.flatMap((how) => study().cells.map((cell, i) => ({
    role: cell.role, block: cell.block, format: how.name, kl: how.kl[i], kl_se: how.se[i], bytes: how.bytes[i], dense: cell.dense,
    from: how.kl[i] === null ? "unknown" : how.measured[i] ? "measured" : "estimated" })));
}

function drawTables() {
  const { trials, outliers, cells } = study();
  const reached = Object.entries(outliers).map(([i, found]) => ({ role: cells[i].role, block: cells[i].block,
    ...Object.fromEntries(["input", "weight"].flatMap((side) => ["ratio", "kurtosis", "outlier_channels"].map((key, at) => [`${side}.${key}`, found[side][at]]))) }));
  const found = [["trials", trials], ["linears", cellRows()], ["outliers", reached], ["latency", DATA.latency], ["plans", DATA.policy], ["calibrations", DATA.calibrations]];
  byId("tables").replaceChildren(make("h2", {}, "Tables"), ...found.map(([name, rows]) => table(name, rows)).filter(Boolean));
  const receipts = table("runs", study().receipts);
  byId("receipts").replaceChildren(make("h2", {}, "Where the numbers are from"), ...(receipts ? [receipts] : ["No trial says."]));
  if (receipts) receipts.open = true;
}

// --- the page

/** Shows what is said of the chosen format; text between backticks, and selectors, as code. */
function drawWords() {
  const { words, settings } = study();
  const own = words.filter((each) => each.startsWith(`${setting()?.name}: `));
  const shown = settings.length ? own.map((each) => each.slice(setting().name.length + 2)) : words;
  const parts = (text) => text.split(/`([^`]*)`|"([^"]*)"/).filter((part) => part !== undefined)
    .map((part, i) => (i % 2 ? make("code", {}, part) : part));
  document.querySelector("#summary ul").replaceChildren(...shown.map((each) => make("li", {}, ...parts(each))));
  byId("summary").hidden = !shown.length;
}

function drawSetting() {
  drawWords();
  drawMap();
  update();
}

function drawStudy() {
  state.on.clear();
  state.setting = 0;
  byId("setting").replaceChildren(...study().settings.map((how, i) => make("option", { value: i }, how.name)));
  drawPlots();
  drawPassage();
  drawTables();
  drawSetting();
}

byId("study").append(...DATA.studies.map((each, i) => make("option", { value: i }, each.title)));
byId("study").onchange = (event) => { state.study = +event.target.value; drawStudy(); };
byId("setting").onchange = (event) => { state.setting = +event.target.value; drawSetting(); };
byId("all").onclick = () => { study().cells.forEach((_, i) => state.on.add(i)); update(); };
byId("none").onclick = () => { state.on.clear(); update(); };
byId("budget").oninput = (event) => upTo(+event.target.value || 0);
document.querySelectorAll("[data-copy]").forEach((button) => {
  button.onclick = () => {
    const output = byId(button.dataset.copy);
    getSelection().selectAllChildren(output);  // where a browser lets no page write, one key copies it
    navigator.clipboard?.writeText(output.textContent).catch(() => {});
  };
});
drawStudy();
