"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const SERIES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"];
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

// --- training curves

// as many decimals as it takes to tell the ticks apart
function short(value, range) {
  const decimals = Math.max(0, Math.min(6, 1 - Math.floor(Math.log10(range))));
  return value.toFixed(decimals);
}

function drawCurve(curve, colors) {
  const [width, height, left, bottom, top] = [360, 190, 44, 24, 8];
  const points = curve.series.flatMap((series) => series.points);
  const steps = points.map((point) => point[0]);
  const values = points.map((point) => point[1]);
  const [first, last] = [Math.min(...steps), Math.max(...steps)];
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (high - low < 1e-9) { low -= 0.5; high += 0.5; }
  const x = (step) => left + ((step - first) / (last - first || 1)) * (width - left - 8);
  const y = (value) => height - bottom - ((value - low) / (high - low)) * (height - bottom - top);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": curve.title });
  for (let tick = 0; tick <= 4; tick++) {
    const value = low + ((high - low) * tick) / 4;
    picture.append(
      svg("line", { x1: left, x2: width - 8, y1: y(value), y2: y(value), stroke: "#e3e7ee" }),
      svg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, short(value, high - low)),
    );
  }
  for (const step of [first, Math.round((first + last) / 2), last]) {
    picture.append(svg("text", { x: x(step), y: height - 6, "text-anchor": step === last ? "end" : step === first ? "start" : "middle" }, `${step}`));
  }
  for (const series of curve.series) {
    const line = series.points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    picture.append(svg("polyline", { points: line, fill: "none", stroke: colors[series.name], "stroke-width": 1.8, "stroke-linejoin": "round" }));
  }
  const figure = make("figure");
  const caption = make("figcaption", {}, curve.title);
  caption.append(make("small", {}, `${curve.note}; by step`));
  figure.append(caption, picture);
  return figure;
}

function drawCurves() {
  const names = [...new Set(data.curves.flatMap((curve) => curve.series.map((series) => series.name)))];
  const colors = Object.fromEntries(names.map((name, index) => [name, SERIES[index % SERIES.length]]));
  for (const name of names) byId("curve-legend").append(chip(colors[name], name));
  for (const curve of data.curves) byId("curves").append(drawCurve(curve, colors));
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
    const canvas = make("canvas", { width: experts, height: rows.length, role: "img", "aria-label": `load of ${experts} experts in ${rows.length} layers on ${task}` });
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
    node.style.color = share > 0.75 ? "#fff" : "inherit";
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
  byId("similarity").replaceChildren(thead, tbody);
}

function drawBalance() {
  const routing = current();
  const rows = routing.kinds[byId("kind").value];
  const { entropy, dead } = routing.statistics;
  const [width, height, left, bottom] = [720, 150, 34, 22];
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "entropy by layer" });
  const step = (width - left - 8) / rows.length;
  for (const tick of [0, 0.5, 1]) {
    const y = height - bottom - tick * (height - bottom - 16);
    picture.append(svg("line", { x1: left, x2: width - 8, y1: y, y2: y, stroke: "#e3e7ee" }), svg("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, `${tick}`));
  }
  rows.forEach((row, index) => {
    const layer = routing.layers[row];
    const tall = entropy.layers[layer] * (height - bottom - 16);
    const bar = svg("rect", { x: left + index * step + step * 0.1, y: height - bottom - tall, width: step * 0.8, height: tall, fill: dead.layers[layer] ? "#d55e00" : "#6da7d3" });
    bar.append(svg("title", {}, `${layer}: entropy ${entropy.layers[layer].toFixed(3)}, ${dead.layers[layer]} dead`));
    picture.append(bar);
    if (dead.layers[layer]) picture.append(svg("text", { x: left + (index + 0.5) * step, y: 12, "text-anchor": "middle" }, `${dead.layers[layer]}`));
    if (index % Math.ceil(rows.length / 15) === 0) picture.append(svg("text", { x: left + (index + 0.5) * step, y: height - 6, "text-anchor": "middle" }, `${index}`));
  });
  const caption = make("p", { class: "legend" });
  caption.append(chip("#6da7d3", "entropy"), chip("#d55e00", "entropy, with dead experts (their number on top)"));
  byId("balance").replaceChildren(picture, caption);
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
  const numbers = byId("numbers").checked;
  byId("layer-name").textContent = routing.layers[layer];
  const used = new Map();
  const nodes = text.tokens.map((token, index) => {
    const [expert, weight] = [text.experts[layer][index], text.weights[layer][index]];
    used.set(expert, (used.get(expert) || 0) + 1);
    const node = make("span", { tabindex: "0" }, token);
    node.style.background = shade(expert, weight);
    if (numbers) node.append(make("sub", {}, `${expert}`));
    const words = `expert ${expert}, weight ${weight} %`;
    node.title = words;
    const tell = () => { byId("token-detail").textContent = `“${token.trim() || token}”: ${words} in ${routing.layers[layer]}`; };
    node.addEventListener("mouseenter", tell);
    node.addEventListener("focus", tell);
    return node;
  });
  byId("token-text").replaceChildren(...nodes);
  const legend = [...used].sort((a, b) => b[1] - a[1]).map(([expert, count]) => chip(shade(expert), `expert ${expert} (${count})`));
  byId("token-legend").replaceChildren(...legend);
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

if (data.curves.length) drawCurves();
if (data.routing.length) {
  fill(byId("source"), data.routing.map((routing, index) => [index, routing.name]));
  byId("source-label").hidden = data.routing.length < 2;
  byId("source").addEventListener("change", chooseSource);
  byId("kind").addEventListener("change", chooseKind);
  byId("text").addEventListener("change", drawTokens);
  byId("layer").addEventListener("input", drawTokens);
  byId("numbers").addEventListener("change", drawTokens);
  for (const input of document.querySelectorAll("input[name=show]")) input.addEventListener("change", drawMaps);
  chooseSource();
}
