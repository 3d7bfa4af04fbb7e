// Charts: a Vega-Lite template, rows, and what every chart here has: a theme, a label that can be read aloud,
// a table twin, and buttons for PNG, SVG and CSV.
//
// Traps this file knows. Data put in after embedding clips the axes, so rows are written into the spec before.
// vega-embed's own menu fails accessibility checks, so it is off. Vega compiles expressions with `new Function`
// unless told to interpret them (`ast`): told so, the page needs no 'unsafe-eval' in its content policy.
// vega-tooltip writes HTML: ours writes text.

import {el, formatShort} from "./text.js";

// Mounts a chart into `root` and returns its handle.
//
//   spec     a Vega-Lite template without data (store.chart("which")); width is the container's unless a number
//   data     rows, or {name: rows, …} for a spec whose layers name their data
//   name     of exported files: "which" → which.png
//   label    the sentence a screen reader says
//   columns  of the table twin and the CSV: [{key, label, format, number: true|false}]
//   rows     for the twin, where they are not `data`
//   params   {NAME: value} for the spec's `params`
//   onClick  (datum) => …, for marks; the table twin's rows get the same as buttons through `rowAction`
//   rowAction  label of that button: "Open"
//
// The handle: update({data, label, rows, params, spec}), param(name, value), destroy(), view() (Vega's).
export async function mountChart(root, options) {
  const state = {params: {}, ...options};
  const plot = el("div", {class: "plot"});
  const twin = el("div", {});
  const figure = el("figure", {class: "chart"}, plot, chartTools(state), twin);
  root.append(figure);
  let view = null;
  let turn = 0;
  let drawnWidth = 0;

  const draw = async () => {
    const mine = ++turn;
    drawnWidth = plot.clientWidth;
    if (!drawnWidth) return; // not laid out yet: the observer below draws when it is
    const stage = el("div", {});
    const made = await embedChart(stage, state, drawnWidth);
    if (mine !== turn) { made.finalize(); return; }
    view?.finalize();
    plot.replaceChildren(stage);
    view = made.view;
    state.view = view;
    if (state.onClick) view.addEventListener("click", (_, item) => { if (item?.datum) state.onClick(item.datum); });
  };
  const drawTwin = () => {
    const open = twin.querySelector("details")?.open ?? false;
    twin.replaceChildren(tableTwin(chartRows(state), state.columns, {
      open, action: state.onClick && state.rowAction ? {label: state.rowAction, run: state.onClick} : null,
    }));
  };
  const observer = new ResizeObserver(() => {
    if (Math.abs(plot.clientWidth - drawnWidth) > 1) chartSoon(draw);
  });
  const themed = () => chartSoon(draw);
  observer.observe(plot);
  window.addEventListener("dither-theme", themed);
  drawTwin();
  await draw();

  return {
    figure,
    view: () => view,
    async update(change) {
      Object.assign(state, change, {params: {...state.params, ...change.params}});
      if (change.data || change.rows || change.columns) drawTwin();
      await draw();
    },
    param(name, value) {
      state.params[name] = value;
      if (view) view.signal(name, value).runAsync();
    },
    destroy() {
      turn += 1;
      observer.disconnect();
      window.removeEventListener("dither-theme", themed);
      view?.finalize();
      figure.remove();
    },
  };
}

const chartWaiting = new Map();
function chartSoon(draw) {
  clearTimeout(chartWaiting.get(draw));
  chartWaiting.set(draw, setTimeout(() => { chartWaiting.delete(draw); draw(); }, 80));
}

function chartRows(state) {
  if (state.rows) return state.rows;
  return Array.isArray(state.data) ? state.data : Object.values(state.data ?? {})[0] ?? [];
}

async function embedChart(stage, state, width) {
  const spec = structuredClone(state.spec);
  if (Array.isArray(state.data)) spec.data = {values: structuredClone(state.data)};
  else if (state.data) spec.datasets = structuredClone(state.data);
  for (const param of spec.params ?? []) {
    if (Object.hasOwn(state.params, param.name)) param.value = state.params[param.name];
  }
  spec.description = state.label ?? state.name;
  if (!("hconcat" in spec || "vconcat" in spec || "concat" in spec || "facet" in spec) && typeof spec.width !== "number") {
    spec.width = width;
    spec.autosize ??= {type: "fit-x", contains: "padding"};
  }
  spec.background = "transparent";
  const made = await window.vegaEmbed(stage, spec, {
    mode: "vega-lite", logLevel: 1, renderer: "svg", actions: false, defaultStyle: false, ast: true,
    config: chartTheme(), tooltip: chartTooltip, loader: {load: refuseLoading, http: refuseLoading, file: refuseLoading},
  });
  stage.setAttribute("role", "img"); // one picture with a sentence; its numbers are in the table twin
  stage.setAttribute("aria-label", spec.description);
  stage.querySelector("svg")?.setAttribute("aria-hidden", "true");
  return made;
}

async function refuseLoading() {
  throw new Error("a chart loads nothing: its rows stand in the page");
}

// The page's colors and type for Vega, read from the CSS variables in force.
export function chartTheme() {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(`--${name}`).trim();
  const series = [1, 2, 3, 4, 5, 6, 7, 8].map((index) => color(`series-${index}`));
  const font = style.getPropertyValue("--font").trim() || "system-ui, sans-serif";
  const text = {labelColor: color("muted"), titleColor: color("ink"), labelFont: font, titleFont: font, labelFontSize: 12,
    titleFontSize: 12.5, titleFontWeight: 550};
  return {
    font, background: "transparent", padding: 4,
    view: {stroke: null},
    axis: {...text, gridColor: color("grid"), domainColor: color("line"), tickColor: color("line"), tickSize: 4,
      labelPadding: 6, titlePadding: 12, gridDash: [2, 3]},
    legend: {...text, symbolSize: 90, orient: "bottom", titlePadding: 6},
    header: text,
    title: {color: color("ink"), font, fontSize: 14, fontWeight: 600, anchor: "start"},
    range: {category: series, ramp: [color("ramp-0"), color("ramp-1"), color("ramp-2")],
      heatmap: [color("ramp-0"), color("ramp-1"), color("ramp-2")],
      diverging: [color("minus"), color("middle"), color("plus")],
      symbol: ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left"]},
    mark: {color: series[0]}, point: {filled: true, size: 90}, line: {strokeWidth: 2}, rule: {color: color("muted")},
    bar: {color: series[0]}, text: {color: color("ink"), font, fontSize: 12}, rect: {stroke: null},
  };
}

// Vega's tooltip handler: an object's entries as lines of text.
let chartTip = null;
function chartTooltip(_handler, event, _item, value) {
  if (value === null || value === undefined || value === "") {
    if (chartTip) chartTip.hidden = true;
    return;
  }
  if (!chartTip) {
    chartTip = el("div", {class: "tooltip", role: "tooltip"});
    document.body.append(chartTip);
  }
  const lines = typeof value === "object" ? Object.entries(value) : [[null, value]];
  chartTip.replaceChildren(...lines.map(([key, shown]) => el("div", {},
    key === null ? null : el("span", {class: "key"}, key), el("span", {}, chartValue(shown)))));
  chartTip.hidden = false;
  const box = chartTip.getBoundingClientRect();
  const left = Math.min(event.clientX + 14, innerWidth - box.width - 8);
  const top = event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 18;
  chartTip.style.left = `${Math.max(8, left)}px`;
  chartTip.style.top = `${Math.max(8, top)}px`;
}

function chartValue(value) {
  return typeof value === "number" && !Number.isInteger(value) ? formatShort(value) : String(value);
}

// Rows as a table, folded away under a summary; what a screen reader or a doubter reads instead of the chart.
export function tableTwin(rows, columns = null, {open = false, action = null, summary = "Table of these numbers"} = {}) {
  const shown = chartColumns(rows, columns);
  const head = el("tr", {}, shown.map((column) => el("th", {scope: "col", class: column.number ? "number" : null}, column.label)),
    action ? el("th", {scope: "col"}, el("span", {class: "off-screen"}, "Action")) : null);
  const body = rows.map((row) => el("tr", {}, shown.map((column, index) => {
    const text = column.format ? column.format(row[column.key], row) : chartCell(row[column.key]);
    return index === 0 ? el("th", {scope: "row"}, text) : el("td", {class: column.number ? "number" : null}, text);
  }), action ? el("td", {}, el("button", {type: "button", class: "small", on: {click: () => action.run(row)},
    "aria-label": `${action.label} ${chartCell(row[shown[0]?.key])}`}, action.label)) : null));
  return el("details", {class: "twin", open}, el("summary", {}, summary),
    el("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": summary},
      el("table", {}, el("thead", {}, head), el("tbody", {}, body))));
}

function chartColumns(rows, columns) {
  return columns ?? Object.keys(rows[0] ?? {}).map((key) => ({key, label: key, number: typeof rows[0][key] === "number"}));
}

function chartCell(value) {
  return value === null || value === undefined ? "–" : chartValue(value);
}

// Buttons that keep a chart as a file. `state` is what mountChart holds: {name, view, data, rows, columns}.
function chartTools(state) {
  const button = (kind, save) => el("button", {type: "button", class: "small",
    "aria-label": `Save ${state.title ?? state.name} as ${kind}`, on: {click: save}}, kind);
  return el("div", {class: "tools"},
    button("PNG", async () => saveFile(`${state.name}.png`, await chartPicture(state, "png"))),
    button("SVG", async () => saveFile(`${state.name}.svg`, await chartPicture(state, "svg"))),
    button("CSV", () => saveFile(`${state.name}.csv`, new Blob([toCsv(chartRows(state), state.columns)], {type: "text/csv"}))));
}

async function chartPicture(state, kind) {
  const surface = getComputedStyle(document.documentElement).getPropertyValue("--surface").trim();
  const view = state.view.background(surface);
  try {
    if (kind === "svg") return new Blob([labelledSvg(await view.toSVG(), state.label ?? state.name)], {type: "image/svg+xml"});
    const canvas = await view.toCanvas(2);
    return await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  } finally {
    view.background("transparent");
  }
}

function labelledSvg(text, label) {
  const parsed = new DOMParser().parseFromString(text, "image/svg+xml");
  parsed.documentElement.setAttribute("role", "img");
  parsed.documentElement.setAttribute("aria-label", label);
  return new XMLSerializer().serializeToString(parsed);
}

// Rows as CSV (RFC 4180). Text that a spreadsheet would take for a formula gets an apostrophe in front.
export function toCsv(rows, columns = null) {
  const shown = chartColumns(rows, columns);
  const cell = (value) => {
    if (value === null || value === undefined) return "";
    const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const lines = [shown.map((column) => cell(column.label)), ...rows.map((row) => shown.map((column) => cell(row[column.key])))];
  return lines.map((line) => line.join(",")).join("\r\n") + "\r\n";
}

// Hands a blob to the browser as a download.
export function saveFile(name, blob) {
  const url = URL.createObjectURL(blob);
  const link = el("a", {href: url, download: name.replace(/[^\w.-]+/g, "-")});
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
