"use strict";
// The fleet, and the run that is named behind the address's #. Asks the page's own server every few seconds.
const EVERY = 3000;
const CURVES = { reward: "reward", tokens_per_second: "tokens a second", seconds: "seconds of a step" };
const at = (id) => document.getElementById(id);
const chosen = () => decodeURIComponent(location.hash.slice(1));
const plots = {};

function make(tag, given = {}, ...children) {
  const node = Object.assign(document.createElement(tag), given);
  node.append(...children);
  return node;
}

function table({ columns, rows }) {
  const head = make("tr", {}, ...columns.map((name) => make("th", { textContent: name })));
  const lines = rows.map((row) => {
    const link = make("a", { href: `#${encodeURIComponent(`${row[0]}/${row[1]}`)}`, textContent: row[1] });
    return make("tr", {}, ...row.map((text, column) => make("td", {}, column === 1 ? link : text)));
  });
  at("fleet").replaceChildren(make("thead", {}, head), make("tbody", {}, ...lines));
}

function curve(name, title, steps) {
  const data = [steps.map((one) => one.number), steps.map((one) => one[name])];
  if (plots[name]) return plots[name].setData(data);
  const style = getComputedStyle(document.documentElement);
  const colour = (of) => style.getPropertyValue(of).trim();
  const figure = make("figure", {}, make("figcaption", { textContent: title }));
  at("charts").append(figure);
  const axis = { stroke: colour("--dim"), grid: { stroke: colour("--line"), width: 1 } };
  const width = () => Math.max(200, figure.clientWidth - 16);
  plots[name] = new uPlot({
    width: width(), height: 200, scales: { x: { time: false } },
    axes: [{ ...axis }, { ...axis, size: 56 }], series: [{ label: "step" }, { label: title, stroke: colour("--link") }],
  }, data, figure);
  const plot = plots[name];
  new ResizeObserver(() => plot.setSize({ width: width(), height: 200 })).observe(figure);
}

function show(run) {
  at("run").hidden = !run;
  if (!run) return;
  at("title").textContent = run.title;
  at("text").textContent = run.text;
  for (const [name, title] of Object.entries(CURVES)) if (run.steps.length) curve(name, title, run.steps);
}

function forget() {
  at("charts").replaceChildren();
  for (const name of Object.keys(plots)) delete plots[name];
}

let timer;
async function ask() {
  clearTimeout(timer);
  try {
    const found = await (await fetch(`/data?run=${encodeURIComponent(chosen())}`)).json();
    at("said").className = found.error ? "bad" : "dim";
    at("said").textContent = found.error ?? `${found.fleet.rows.length} jobs, ${new Date().toLocaleTimeString()}`;
    if (!found.error) { table(found.fleet); show(found.run); }
  } catch {
    at("said").className = "bad";
    at("said").textContent = "kubectl rlhf dashboard has ended: start it anew";
  }
  timer = setTimeout(ask, EVERY);
}

addEventListener("hashchange", () => { forget(); ask(); });
ask();
