"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
// a series is told by its dashes too, for whom colours look alike and for a print in grey
const SERIES = ["var(--one)", "var(--two)", "var(--three)", "var(--four)"];
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
const byId = (id) => document.getElementById(id);

function make(name, attributes = {}, text = null) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  return node;
}

function svg(name, attributes, text = null) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  return node;
}

function chip(color, text) {
  const node = make("span", { class: "chip" });
  const box = make("i");
  box.style.background = color;
  node.append(box, text);
  return node;
}

function line(index, attributes) {
  const dashes = DASHES[(index + Math.floor(index / SERIES.length)) % DASHES.length];
  return { fill: "none", stroke: SERIES[index % SERIES.length], "stroke-width": 1.8, "stroke-dasharray": dashes, ...attributes };
}

// a table with a header row, whose first column names the rows
function makeTable(caption, header, rows) {
  const table = make("table", { class: "losses" });
  const head = make("tr");
  head.append(...header.map((text, index) => make("th", { scope: "col", class: index ? "number" : "" }, text)));
  const body = rows.map(([name, ...values]) => {
    const row = make("tr");
    row.append(make("th", { scope: "row" }, name), ...values.map((value) => make("td", { class: "number" }, value)));
    return row;
  });
  const [thead, tbody] = [make("thead"), make("tbody")];
  thead.append(head);
  tbody.append(...body);
  table.append(make("caption", {}, caption), thead, tbody);
  const scroll = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption });
  scroll.append(table);
  return scroll;
}

// numbers behind a picture; made when they are looked at, since they may be thousands
function numbers(details, fillIn) {
  details.addEventListener("toggle", () => { if (details.open) fillIn(); });
  return details;
}

// --- curves

// as many decimals as it takes to tell the ticks apart
function short(value, range) {
  const decimals = Math.max(0, Math.min(6, 1 - Math.floor(Math.log10(range))));
  return value.toFixed(decimals);
}

function drawCurve(curve) {
  const [width, height, left, bottom, top] = [360, 190, 44, 24, 8];
  const unit = curve.unit || "step";
  const points = curve.series.flatMap((series) => series.points);
  const steps = points.map((point) => point[0]);
  const values = points.map((point) => point[1]);
  const [first, last] = [Math.min(...steps), Math.max(...steps)];
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (high - low < 1e-9) { low -= 0.5; high += 0.5; }
  const x = (step) => left + ((step - first) / (last - first || 1)) * (width - left - 8);
  const y = (value) => height - bottom - ((value - low) / (high - low)) * (height - bottom - top);
  const shown = (value) => short(value, high - low);
  const ends = curve.series.map(({ name, points: own }) => `${name} from ${shown(own[0][1])} to ${shown(own[own.length - 1][1])}`);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${curve.title} by ${unit}: ${ends.join("; ")}` });
  for (let tick = 0; tick <= 4; tick++) {
    const value = low + ((high - low) * tick) / 4;
    picture.append(
      svg("line", { x1: left, x2: width - 8, y1: y(value), y2: y(value), class: "grid" }),
      svg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, shown(value)),
    );
  }
  for (const step of new Set([first, Math.round((first + last) / 2), last])) {
    picture.append(svg("text", { x: x(step), y: height - 6, "text-anchor": step === last ? "end" : step === first ? "start" : "middle" }, `${step}`));
  }
  const legend = make("p", { class: "legend" });
  curve.series.forEach((series, index) => {
    const path = series.points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    picture.append(svg("polyline", line(index, { points: path, "stroke-linejoin": "round" })));
    const sample = svg("svg", { viewBox: "0 0 30 10", "aria-hidden": "true" });
    sample.append(svg("line", line(index, { x1: 0, x2: 30, y1: 5, y2: 5 })));
    const entry = make("span", { class: "chip" });
    entry.append(sample, series.name);
    legend.append(entry);
  });
  const figure = make("figure");
  const caption = make("figcaption", {}, curve.title);
  caption.append(make("small", {}, `${curve.note}; by ${unit}`));
  const details = make("details");
  details.append(make("summary", {}, "Numbers"));
  figure.append(caption, picture, legend, numbers(details, () => {
    if (details.querySelector("table")) return;
    const at = curve.series.map((series) => new Map(series.points));
    const rows = [...new Set(steps)].sort((a, b) => a - b).map((step) => [`${step}`, ...at.map((own) => (own.has(step) ? own.get(step).toPrecision(4) : ""))]);
    details.append(makeTable(curve.title, [unit, ...curve.series.map((series) => series.name)], rows));
  }));
  return figure;
}

// --- heat maps

// viridis and a blue-white-red scale, by a few of their points
const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const DIVERGING = [[33, 102, 172], [146, 197, 222], [247, 247, 247], [244, 165, 130], [178, 24, 43]];

function ramp(colors, share) {
  const at = Math.max(0, Math.min(1, share)) * (colors.length - 1);
  const index = Math.min(colors.length - 2, Math.floor(at));
  return colors[index].map((low, channel) => Math.round(low + (colors[index + 1][channel] - low) * (at - index)));
}

function quantile(values, share) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

const current = () => data.routing[Number(byId("source").value)];
const percent = (value) => `${(100 * value).toFixed(1)} %`;

function fill(select, entries) {
  select.replaceChildren(...entries.map(([value, text]) => make("option", { value }, text)));
}

function drawMaps() {
  const routing = current();
  const rows = routing.kinds[byId("kind").value];
  const tasks = Object.keys(routing.load);
  const experts = routing.load[tasks[0]][0].length;
  const loads = tasks.map((task) => rows.map((row) => routing.load[task][row]));
  const difference = document.querySelector("input[name=show]:checked").value === "difference";
  const mean = rows.map((_, row) => loads[0][row].map((_, expert) => loads.reduce((sum, load) => sum + load[row][expert], 0) / tasks.length));
  const shown = difference ? loads.map((load) => load.map((line, row) => line.map((value, expert) => value - mean[row][expert]))) : loads;
  const all = shown.flat(2).map(Math.abs);
  // the last percent of cells may saturate, or a single busy expert would leave the rest in one shade
  const top = difference ? Math.max(quantile(all, 0.99), 0.001) : Math.max(quantile(all, 0.99), 2 / experts);
  const color = (value) => (difference ? ramp(DIVERGING, (value / top + 1) / 2) : ramp(VIRIDIS, value / top));
  byId("maps").replaceChildren(...tasks.map((task, index) => {
    const figure = make("figure");
    const caption = make("figcaption", {}, task);
    caption.append(make("small", {}, `${routing.tasks[task].toLocaleString("en")} tokens`));
    const canvas = make("canvas", { width: experts, height: rows.length, role: "img", "aria-label": `load of ${experts} experts in ${rows.length} layers on ${task}; its numbers are in the table below` });
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(experts, rows.length);
    shown[index].flat().forEach((value, cell) => pixels.data.set([...color(value), 255], 4 * cell));
    context.putImageData(pixels, 0, 0);
    canvas.addEventListener("mousemove", (event) => {
      const expert = Math.min(experts - 1, Math.floor((event.offsetX / canvas.clientWidth) * experts));
      const row = Math.min(rows.length - 1, Math.floor((event.offsetY / canvas.clientHeight) * rows.length));
      canvas.title = `${routing.layers[rows[row]]}, expert ${expert}: ${percent(shown[index][row][expert])}`;
    });
    figure.append(caption, canvas);
    return figure;
  }));
  if (byId("map-numbers").open) {
    const header = ["layer", ...mean[0].map((_, expert) => `expert ${expert}`)];
    const words = difference ? "difference from the mean task" : "share of the choices";
    byId("map-tables").replaceChildren(...tasks.map((task, index) => makeTable(
      `${task}: ${words}, percent`, header, shown[index].map((line, row) => [routing.layers[rows[row]], ...line.map((value) => (100 * value).toFixed(1))]),
    )));
  }
  const colors = difference ? DIVERGING : VIRIDIS;
  const gradient = make("span", { class: "ramp" });
  gradient.style.background = `linear-gradient(to right, ${colors.map((rgb) => `rgb(${rgb})`).join(", ")})`;
  const [low, high] = difference ? [`-${percent(top)}`, `+${percent(top)} of the choices`] : ["0", `${percent(top)} or more; all experts used alike: ${percent(1 / experts)}`];
  byId("scale").replaceChildren(low, gradient, high);
  const statistics = routing.statistics;
  byId("routing-note").textContent = `Experts from left to right, layers from top to bottom. Entropy ${statistics.entropy.mean.toFixed(3)} (1 is perfect balance), ${statistics.dead.sum} dead experts in ${routing.layers.length} routers of ${experts}.`;
}

function drawSimilarity() {
  const { similarity, chance } = current().statistics;
  const tasks = Object.keys(similarity);
  const values = tasks.flatMap((a) => tasks.filter((b) => b !== a).map((b) => similarity[a][b]));
  const low = Math.min(...values, ...Object.values(chance));
  const cell = (value, own) => {
    const share = (value - low) / (1 - low || 1);
    const node = make("td", {}, own ? `(${value.toFixed(2)})` : value.toFixed(2));
    const rgb = ramp([[255, 255, 255], [146, 197, 222], [33, 102, 172]], share);
    node.style.background = `rgb(${rgb})`;
    node.style.color = share > 0.75 ? "#fff" : "#1d2433";
    return node;
  };
  const head = make("tr");
  head.append(make("td"), ...tasks.map((task) => make("th", { scope: "col" }, task)));
  const body = tasks.map((a) => {
    const row = make("tr");
    row.append(make("th", { scope: "row" }, a), ...tasks.map((b) => cell(a === b ? chance[a] : similarity[a][b], a === b)));
    return row;
  });
  const [thead, tbody] = [make("thead"), make("tbody")];
  thead.append(head);
  tbody.append(...body);
  byId("similarity").replaceChildren(make("caption", {}, `Similarity of two tasks' routing, ${current().name}`), thead, tbody);
}

function drawBalance() {
  const routing = current();
  const rows = routing.kinds[byId("kind").value];
  const { entropy, dead } = routing.statistics;
  const [width, height, left, bottom] = [720, 150, 34, 22];
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `entropy by layer, mean ${current().statistics.entropy.mean.toFixed(3)}` });
  const step = (width - left - 8) / rows.length;
  for (const tick of [0, 0.5, 1]) {
    const y = height - bottom - tick * (height - bottom - 16);
    picture.append(svg("line", { x1: left, x2: width - 8, y1: y, y2: y, class: "grid" }), svg("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, `${tick}`));
  }
  rows.forEach((row, index) => {
    const layer = routing.layers[row];
    const tall = entropy.layers[layer] * (height - bottom - 16);
    const bar = svg("rect", { x: left + index * step + step * 0.1, y: height - bottom - tall, width: step * 0.8, height: tall, class: dead.layers[layer] ? "fill-dead" : "fill-even" });
    bar.append(svg("title", {}, `${layer}: entropy ${entropy.layers[layer].toFixed(3)}, ${dead.layers[layer]} dead`));
    picture.append(bar);
    if (dead.layers[layer]) picture.append(svg("text", { x: left + (index + 0.5) * step, y: 12, "text-anchor": "middle" }, `${dead.layers[layer]}`));
    if (index % Math.ceil(rows.length / 15) === 0) picture.append(svg("text", { x: left + (index + 0.5) * step, y: height - 6, "text-anchor": "middle" }, `${index}`));
  });
  const caption = make("p", { class: "legend" });
  caption.append(chip("var(--one)", "entropy"), chip("var(--two)", "entropy, with dead experts (their number on top)"));
  const details = make("details");
  details.append(make("summary", {}, "Numbers"), makeTable("Balance by layer", ["layer", "entropy", "dead experts"], rows.map((row) => {
    const layer = routing.layers[row];
    return [layer, entropy.layers[layer].toFixed(3), `${dead.layers[layer]}`];
  })));
  byId("balance").replaceChildren(picture, caption, details);
}

// --- tokens

// golden angle: neighbours in number are far apart in hue
const hue = (expert) => (expert * 137.508) % 360;
const shade = (expert, weight = 100) => `hsl(${hue(expert).toFixed(0)} 75% ${(92 - 0.24 * Math.min(100, weight)).toFixed(0)}%)`;

function drawTokens() {
  const routing = current();
  const text = routing.texts[Number(byId("text").value)];
  const rows = routing.kinds[byId("kind").value];
  const layer = rows[Number(byId("layer").value)];
  const numbered = byId("numbers").checked;
  byId("layer-name").textContent = routing.layers[layer];
  const used = new Map();
  const nodes = text.tokens.map((token, index) => {
    const [expert, weight] = [text.experts[layer][index], text.weights[layer][index]];
    used.set(expert, (used.get(expert) || 0) + 1);
    // one stop of the Tab key for the whole text; arrow keys move within it
    const node = make("span", { tabindex: index ? "-1" : "0", role: "option", "aria-selected": "false" }, token);
    node.style.background = shade(expert, weight);
    if (numbered) node.append(make("sub", {}, `${expert}`));
    const words = `expert ${expert}, weight ${weight} %`;
    node.title = words;
    node.setAttribute("aria-label", `${token.trim() || "white space"}: ${words}`);
    const tell = () => { byId("token-detail").textContent = `“${token.trim() || token}”: ${words} in ${routing.layers[layer]}`; };
    node.addEventListener("mouseenter", tell);
    node.addEventListener("focus", () => {
      for (const other of byId("token-text").children) { other.tabIndex = other === node ? 0 : -1; other.setAttribute("aria-selected", `${other === node}`); }
      tell();
    });
    return node;
  });
  byId("token-text").replaceChildren(...nodes);
  const legend = [...used].sort((a, b) => b[1] - a[1]).map(([expert, count]) => chip(shade(expert), `expert ${expert} (${count})`));
  byId("token-legend").replaceChildren(...legend);
}

function moveInText(event) {
  const nodes = [...byId("token-text").children];
  const at = nodes.indexOf(document.activeElement);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: nodes.length - 1 }[event.key];
  if (at < 0 || to === undefined) return;
  event.preventDefault();
  nodes[Math.max(0, Math.min(nodes.length - 1, to))].focus();
}

function chooseKind() {
  const rows = current().kinds[byId("kind").value];
  byId("layer").max = rows.length - 1;
  byId("layer").value = Math.min(Number(byId("layer").value), rows.length - 1);
  drawMaps();
  drawBalance();
  drawTokens();
}

function chooseSource() {
  const routing = current();
  fill(byId("kind"), Object.keys(routing.kinds).map((kind) => [kind, kind]));
  byId("kind-label").hidden = Object.keys(routing.kinds).length < 2;
  fill(byId("text"), routing.texts.map((text, index) => [index, `${text.task}: ${text.tokens.join("").trim().slice(0, 40)}…`]));
  drawSimilarity();
  chooseKind();
}

if (data.curves.length) byId("curves").append(...data.curves.map(drawCurve));
if (data.forgetting.length) byId("forgetting-curves").append(...data.forgetting.map(drawCurve));
if (data.routing.length) {
  fill(byId("source"), data.routing.map((routing, index) => [index, routing.name]));
  byId("source-label").hidden = data.routing.length < 2;
  byId("source").addEventListener("change", chooseSource);
  byId("kind").addEventListener("change", chooseKind);
  byId("text").addEventListener("change", drawTokens);
  byId("layer").addEventListener("input", drawTokens);
  byId("numbers").addEventListener("change", drawTokens);
  byId("token-text").addEventListener("keydown", moveInText);
  numbers(byId("map-numbers"), drawMaps);
  for (const input of document.querySelectorAll("input[name=show]")) input.addEventListener("change", drawMaps);
  chooseSource();
}
