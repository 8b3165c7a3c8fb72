"use strict";
// The page of a run. Everything it shows is in the element "data"; it asks no network for anything.
const run = JSON.parse(document.getElementById("data").textContent);
const COLOURS = ["#3b82f6", "#f59e0b", "#10b981", "#a855f7", "#ef4444", "#14b8a6", "#ec4899", "#84cc16"];
const PHASES = ["generate", "forward", "shape", "train", "sync"];
const OF_PHASE = [...COLOURS.slice(0, PHASES.length), "#8b949e"]; // the last: idle
const charts = [];

function make(tag, given = {}, ...children) {
  const node = Object.assign(document.createElement(tag), given);
  node.append(...children.filter((child) => child !== null));
  return node;
}

function section(id, title, ...children) {
  const node = make("section", { id }, make("h2", { textContent: title }), ...children);
  document.querySelector("main").append(node);
  document.getElementById("nav").append(make("a", { href: `#${id}`, textContent: title }));
  return node;
}

function number(value, digits = 4) {
  if (typeof value !== "number") return "–";
  return Math.abs(value) >= 1e6 || (value && Math.abs(value) < 1e-3)
    ? value.toExponential(2) : String(Number(value.toPrecision(digits)));
}

function seconds(value) {
  if (value < 60) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  const minutes = Math.floor(value / 60);
  return minutes < 60 ? `${minutes} min ${Math.round(value % 60)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

const colour = (name) => () => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const present = (values) => (values ?? []).filter((value) => value !== null);
const last = (values) => present(values).at(-1) ?? null;

// charts

function axis(extra = {}) {
  return { stroke: colour("--dim"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") },
    size: 66, ...extra };
}

function chart(title, data, series, more = {}) {
  const figure = make("figure", {}, make("figcaption", { textContent: title }));
  const draw = () => {
    const width = Math.max(200, figure.clientWidth - 16);
    if (figure.plot) return figure.plot.setSize({ width, height: 220 });
    const options = { width, height: 220, scales: { x: { time: false } }, axes: [axis({ size: 36 }), axis({ values: (_, ticks) => ticks.map((tick) => number(tick)) })],
      series: [{ label: more.x ?? "step" }, ...series], cursor: { sync: { key: more.x ?? "step" } }, ...more.options };
    figure.plot = new uPlot(options, data, figure);
    charts.push(figure.plot);
  };
  // Drawn when it comes into view: a run may have a hundred metrics.
  new IntersectionObserver((seen) => seen.some((one) => one.isIntersecting) && draw(), { rootMargin: "300px" })
    .observe(figure);
  new ResizeObserver(() => figure.plot && draw()).observe(figure);
  return figure;
}

function line(label, at, extra = {}) {
  return { label, stroke: COLOURS[at % COLOURS.length], width: 1.5, spanGaps: true,
    points: { show: run.steps.length < 2 || undefined, size: 4 }, value: (_, value) => number(value), ...extra };
}

// Metrics that belong together share a chart; any other has its own.
const TOGETHER = [
  ["reward (mean, deviation)", (name) => ["reward/mean", "reward/std"].includes(name)],
  ["staleness, steps", (name) => name.startsWith("rollout/staleness")],
  ["mismatch of engine and trainer", (name) => ["mismatch/abs", "mismatch/kl"].includes(name)],
  ["weight sync, seconds", (name) => ["sync/seconds", "seconds/sync"].includes(name)],
];

function groups() {
  const left = new Set(Object.keys(run.series));
  const found = TOGETHER.map(([title, belongs]) => [title, [...left].filter(belongs)]).filter(([, names]) => names.length);
  found.forEach(([, names]) => names.forEach((name) => left.delete(name)));
  const first = ["rollout/tokens_per_second", "rollout/length", "train/loss", "train/kl", "train/entropy", "train/grad_norm"];
  const rank = (name) => (first.indexOf(name) + 1 || (name.startsWith("eval/") ? 50 : 100));
  return [...found, ...[...left].sort((a, b) => rank(a) - rank(b) || a.localeCompare(b)).map((name) => [name, [name]])];
}

function curves() {
  const grid = make("div", { className: "grid" });
  const filter = make("input", { type: "search", placeholder: "find a metric", ariaLabel: "find a metric" });
  const all = groups().map(([title, names]) => {
    const figure = chart(title, [run.steps, ...names.map((name) => run.series[name])], names.map(line));
    figure.words = `${title} ${names.join(" ")}`.toLowerCase();
    return figure;
  });
  grid.append(...all);
  filter.addEventListener("input", () => {
    const wanted = filter.value.toLowerCase().split(/\s+/);
    all.forEach((figure) => { figure.hidden = !wanted.every((word) => figure.words.includes(word)); });
  });
  section("curves", "Curves", filter, all.length ? grid : make("p", { textContent: "No metrics were found." }));
}

// a step's time

function spent(index) {
  const value = (name) => run.series[`seconds/${name}`]?.[index] ?? 0;
  const parts = PHASES.map((name) => [name, value(name)]);
  const rest = value("step") - parts.reduce((sum, [, took]) => sum + took, 0);
  return [...parts, ["idle", Math.max(0, rest)]];
}

function stacked() {
  const steps = run.steps.map((step, index) => [step, index]).filter(([, index]) => run.series["seconds/step"][index] !== null);
  const names = [...PHASES, "idle"];
  const each = steps.map(([, index]) => spent(index).map(([, took]) => took));
  const sums = names.map((_, at) => each.map((took) => took.slice(0, at + 1).reduce((sum, one) => sum + one, 0)));
  const series = names.map((name, at) => line(name, at, {
    stroke: OF_PHASE[at], fill: OF_PHASE[at] + "80", points: { show: false }, value: (_, __, ___, index) => (index === null ? "–" : seconds(each[index][at])),
  }));
  const bands = names.slice(1).map((_, at) => ({ series: [at + 2, at + 1] }));
  return chart("seconds of a step, by phase", [steps.map(([step]) => step), ...sums], series,
    { options: { bands, scales: { x: { time: false }, y: { range: (_, __, most) => [0, most || 1] } } } });
}

function timeline() {
  if (!run.series["seconds/step"]) return;
  const known = run.steps.map((step, index) => [step, index]).filter(([, index]) => run.series["seconds/step"][index] !== null);
  const choice = make("input", { type: "range", min: 0, max: known.length - 1, value: known.length - 1, ariaLabel: "step" });
  const words = make("p"), bar = make("div", { className: "bar" }), key = make("p");
  const show = () => {
    const [step, index] = known[choice.value], parts = spent(index);
    const whole = parts.reduce((sum, [, took]) => sum + took, 0) || 1;
    words.textContent = `step ${step}: ${seconds(run.series["seconds/step"][index])}, idle ${(100 * parts.at(-1)[1] / whole).toFixed(1)} %`;
    bar.replaceChildren(...parts.map(([name, took], at) => Object.assign(make("span", { title: `${name} ${seconds(took)}` }),
      { style: `width:${100 * took / whole}%;background:${OF_PHASE[at]}` })));
    key.replaceChildren(...parts.map(([name, took], at) => make("span", {}, Object.assign(make("span", { className: "key" }),
      { style: `background:${OF_PHASE[at]}` }), `${name} ${seconds(took)}`)));
  };
  choice.addEventListener("input", show);
  section("time", "Where the time goes", stacked(), words, choice, bar, key,
    make("p", { className: "dim", textContent: "Phases follow each other as the driver waits for them. Idle is what of a step no phase covers." }));
  show();
}

// tables

function table(columns, rows, open = null) {
  const body = make("tbody"), filter = make("input", { type: "search", placeholder: "find", ariaLabel: "find in the table" });
  let order = null, up = true;
  const cell = (column, row) => make("td", { className: typeof row[column] === "number" ? "number" : "",
    textContent: typeof row[column] === "number" ? number(row[column]) : row[column] ?? "–" });
  const draw = () => {
    const wanted = filter.value.toLowerCase();
    const shown = rows.filter((row) => columns.some((column) => String(row[column] ?? "").toLowerCase().includes(wanted)));
    const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a ?? "").localeCompare(String(b ?? "")));
    if (order !== null) shown.sort((a, b) => compare(a[order], b[order]) * (up ? 1 : -1));
    body.replaceChildren(...shown.slice(0, 500).map((row) => {
      const line = make("tr", {}, ...columns.map((column) => cell(column, row)));
      if (open) {
        line.tabIndex = 0;
        line.addEventListener("click", () => open(row));
        line.addEventListener("keydown", (event) => event.key === "Enter" && open(row));
      }
      return line;
    }));
  };
  const heads = columns.map((column) => {
    const button = make("button", { textContent: column, title: "sort" });
    button.addEventListener("click", () => { up = order === column ? !up : false; order = column; draw(); });
    return make("th", { className: rows.some((row) => typeof row[column] === "number") ? "number" : "" }, button);
  });
  filter.addEventListener("input", draw);
  draw();
  return make("div", {}, filter, make("div", { className: "scroll" }, make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body)));
}

function metrics() {
  const rows = Object.entries(run.series).map(([metric, values]) => {
    const there = present(values);
    return { metric, first: there[0], last: there.at(-1), least: there.reduce((a, b) => Math.min(a, b), Infinity),
      most: there.reduce((a, b) => Math.max(a, b), -Infinity), steps: there.length };
  });
  if (rows.length) section("metrics", "Metrics", table(["metric", "first", "last", "least", "most", "steps"], rows));
}

// samples

function histogram() {
  const choice = make("select", { ariaLabel: "step" }, ...run.histograms.map((one, at) => make("option", { value: at, textContent: `step ${one.step}` })));
  choice.value = run.histograms.length - 1;
  const place = make("div");
  const show = () => {
    const { step, low, high, counts } = run.histograms[choice.value], width = (high - low) / counts.length;
    const middles = counts.map((_, at) => low + (at + 0.5) * width);
    place.replaceChildren(chart(`rewards of step ${step}`, [middles, counts], [line("samples", 0, {
      paths: uPlot.paths.bars({ size: [0.9] }), fill: COLOURS[0] + "80", points: { show: false } })], { x: "reward" }));
  };
  choice.addEventListener("change", show);
  show();
  return make("div", {}, choice, place);
}

function tokens(row) {
  if (!row.logprobs) return null;
  const box = make("div", {}, make("p", { className: "dim", textContent: "Tokens (ids) by the engine's log probability: red is unlikely." }));
  row.logprobs.forEach((logprob, at) => {
    const share = Math.min(1, -logprob / 5);
    box.append(Object.assign(make("span", { className: "token", title: `log probability ${logprob}, weights ${row.versions?.[at] ?? "–"}`,
      textContent: row.tokens[at] }), { style: `background:hsl(${120 - 120 * share} 70% 75%)` }));
  });
  return box;
}

function samples() {
  if (!run.histograms.length) {
    section("samples", "Samples", make("p", { textContent: "No samples were recorded: telemetry.rolloutsEverySteps is 0, or the run is younger." }));
    return;
  }
  const detail = make("div");
  const parts = [...new Set(run.samples.flatMap((row) => Object.keys(row.parts)))];
  const rows = run.samples.map((row) => ({ ...row, ...row.parts, prompt: row.prompt.slice(0, 120), answer: row.completion.slice(0, 120), whole: row }));
  const open = (row) => {
    const { prompt, completion } = row.whole;
    detail.replaceChildren(make("h2", { textContent: `Sample ${row.sample} of step ${row.step}, reward ${number(row.reward)}` }),
      make("pre", { textContent: prompt }), make("pre", { textContent: completion }), tokens(row.whole) ?? "");
    detail.scrollIntoView({ block: "nearest" });
  };
  section("samples", "Samples", histogram(), make("p", { className: "dim", textContent: run.samplesNote }),
    table(["step", "sample", "group", "reward", ...parts, "advantage", "length", "finish", "group mean", "prompt", "answer"], rows, open), detail);
}

// how it went

function attempts() {
  const nodes = run.attempts.map(({ number: attempt, error, log }) => make("details", { open: attempt === run.attempts.at(-1).number && Boolean(error) },
    make("summary", {}, `attempt ${attempt}  `, make("span", { className: "bad", textContent: error })), make("pre", { textContent: log })));
  const failures = run.failures.map((one) => make("details", {}, make("summary", {}, `${one.time} ${one.class} ${one.reason}, step ${one.step}: ${one.message}`),
    make("pre", { textContent: one.words ?? "" })));
  section("attempts", "Attempts and failures", ...failures, ...nodes, nodes.length ? "" : make("p", { textContent: "No log was kept." }),
    run.turns.length ? table(["number", "attempt", "time", "host", "resumed"], run.turns) : "");
}

function kept() {
  if (run.checkpoints.length) section("checkpoints", "Checkpoints", table(["step", "attempt", "version", "GiB", "name"], run.checkpoints));
}

function configuration() {
  section("configuration", "Configuration",
    make("pre", { textContent: run.configuration || "A checkpoint.path holds no configuration; the page of a job in a cluster (kubectl rlhf report NAME) has it." }),
    make("h2", { textContent: "Model" }), make("pre", { textContent: run.model || "no checkpoint tells of it" }),
    make("h2", { textContent: "Versions" }), make("pre", { textContent: run.versions.join("\n") }));
}

function head() {
  document.getElementById("summary").textContent = `${run.source}, made ${run.made}`;
  const took = present(run.series["seconds/step"]).reduce((sum, one) => sum + one, 0);
  const cards = { steps: run.steps.at(-1) ?? 0, reward: last(run.series["reward/mean"]), "tokens/s": last(run.series["rollout/tokens_per_second"]),
    attempts: run.attempts.length || null, checkpoints: run.checkpoints.length };
  const shown = Object.entries(cards).map(([name, value]) => make("div", { className: "card" }, name, make("b", { textContent: number(value) })));
  shown.push(make("div", { className: "card" }, "in steps", make("b", { textContent: seconds(took) })));
  document.getElementById("cards").append(...shown);
  const amiss = run.unread.map((one) => make("p", { className: "bad", textContent: `not read: ${one}` }));
  document.querySelector("header").append(...amiss);
}

for (const part of [head, curves, timeline, metrics, samples, attempts, kept, configuration]) {
  try {
    part();
  } catch (error) { // a part that cannot be shown must not cost the others
    document.querySelector("main").append(make("p", { className: "bad", textContent: `${part.name}: ${error}` }));
    console.error(error);
  }
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach((plot) => plot.redraw(false, true)));
