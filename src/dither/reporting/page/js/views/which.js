// View 1, "Which should I take?": size against loss, a budget, and the sentence that follows from it.

import {drawnFrontier, knownMetrics} from "../frontier.js";
import {mountTemplate} from "../template.js";
import {refillSelect} from "../inner.js";
import {answerSentence, el, emptyState, explanation, formatBytes, formatInterval, formatShort, glossaryTerm, segmentControl, selectControl, sliderControl, tagChip} from "../text.js";
import {sortableTwin} from "../sorting.js";

const WHICH_FILLED_BY = {decode_tokens_per_second: "dither bench", joules_per_token: "dither bench"};
const WHICH_STEPS = 200; // of the slider

export async function mount(root, store) {
  const {runs = [], frontier = null} = store.getDocument() ?? {};
  const measured = knownMetrics(frontier);
  if (!measured.length) {
    root.append(emptyState(
      runs.length ? "None of these files is measured yet, so what they lost is unknown." : "No quantized file to choose among yet.",
      runs.length ? whichMeasure(store.getDocument()) : "dither quantize MODEL --to Q4_K_M --measure"));
    if (runs.length) root.append(whichSizes(runs));
    return null;
  }
  const state = {key: measured.includes("kl_mean") ? "kl_mean" : measured[0], budget: whichBudget(store.getDocument())};
  const answer = answerSentence();
  answer.setAttribute("aria-live", "polite");
  const plot = el("div", {});
  const view = {root, store, state, answer, runs, frontier, plot, handle: null, width: 0, reach: whichReach(runs)};
  const slider = sliderControl({
    label: "Budget: the largest file you would take", min: 0, max: WHICH_STEPS, value: whichStep(state.budget, view.reach),
    format: (step) => formatBytes(whichBytes(step, view.reach)),
    onInput: (step) => { state.budget = whichBytes(step, view.reach); whichSoon(view); },
  });
  state.budget = whichBytes(Number(slider.input.value), view.reach);
  const axis = el("div", {}, whichAxis(frontier, state, () => whichDraw(view)));
  const compare = whichCompare(view);
  root.append(answer, el("div", {class: "controls"}, slider.node), axis, plot, compare.node, whichExplained());
  await whichDraw(view);
  const watch = new ResizeObserver(() => { if (Math.abs(plot.clientWidth - view.width) > 1) whichSoon(view); });
  watch.observe(plot);
  return {
    async update(found) {
      const known = knownMetrics(found.frontier);
      if (!known.length) return false;
      const before = knownMetrics(view.frontier);
      [view.runs, view.frontier] = [found.runs, found.frontier];
      view.reach = whichReach(view.runs);
      const step = whichStep(state.budget - 0.5 * whichBytes(1, [0, view.reach[1] - view.reach[0]]), view.reach); // the nearest
      slider.set(step);
      state.budget = whichBytes(step, view.reach);
      if (!known.includes(state.key)) state.key = known[0];
      if (known.join() !== before.join()) axis.replaceChildren(whichAxis(view.frontier, state, () => whichDraw(view)));
      compare.update();
      await whichDraw(view);
      return true;
    },
    destroy() { watch.disconnect(); view.handle?.destroy(); },
  };
}

// From a little below the smallest file to a little above the largest, in bytes.
function whichReach(runs) {
  const sizes = runs.map((run) => run.bytes);
  const [least, most] = [Math.min(...sizes), Math.max(...sizes)];
  return most > least ? [least - 0.03 * (most - least), most + 0.05 * (most - least)] : [least * 0.8, most * 1.2];
}

function whichMeasure(found) {
  const command = found.runs.map((run) => run.measure_command).find(Boolean);
  return command ?? `dither measure ${found.runs[0].file} --against ${found.reference?.name ?? "MODEL"}`;
}

function whichSizes(runs) {
  const sorted = [...runs].sort((a, b) => a.bytes - b.bytes);
  return el("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": "Files and their sizes"}, el("table", {},
    el("thead", {}, el("tr", {}, ["file", "type", "size", "bits per weight"].map((name) => el("th", {scope: "col"}, name)))),
    el("tbody", {}, sorted.map((run) => el("tr", {}, el("th", {scope: "row"}, run.file), el("td", {}, run.type),
      el("td", {}, formatBytes(run.bytes)), el("td", {}, run.bpw.toFixed(2)))))));
}

// A first budget: just enough for about 4.8 bits per weight, where most people begin.
function whichBudget(found) {
  const nearest = [...found.runs].sort((a, b) => Math.abs(a.bpw - 4.85) - Math.abs(b.bpw - 4.85))[0];
  return nearest.bytes * 1.02;
}

function whichStep(bytes, reach) {
  return Math.min(WHICH_STEPS, Math.max(0, Math.ceil(WHICH_STEPS * (bytes - reach[0]) / (reach[1] - reach[0]))));
}

function whichBytes(step, reach) {
  return reach[0] + (step / WHICH_STEPS) * (reach[1] - reach[0]);
}

function whichAxis({metrics}, state, redraw) {
  const keys = Object.keys(metrics);
  const control = segmentControl({
    label: "Compare by", options: keys.map((key) => [key, metrics[key].name]), value: state.key,
    onInput: (key) => { state.key = key; redraw(); },
  });
  const missing = [];
  for (const input of control.node.querySelectorAll("input")) {
    if (metrics[input.value].points.length) continue;
    input.disabled = true;
    const reason = WHICH_FILLED_BY[input.value] ? `${WHICH_FILLED_BY[input.value]} measures it` : "dither measure measures it";
    input.parentElement.setAttribute("title", `Not known for these files: ${reason}.`);
    missing.push(`${metrics[input.value].name} (${reason})`);
  }
  return el("div", {class: "which-axis"}, control.node,
    missing.length ? el("p", {class: "hint"}, `Not known for these files: ${missing.join(", ")}.`) : null);
}

let whichWaiting = 0;
function whichSoon(view) {
  cancelAnimationFrame(whichWaiting);
  whichWaiting = requestAnimationFrame(() => whichDraw(view));
}

async function whichDraw(view) {
  const {state, runs, frontier, plot} = view;
  const metric = frontier.metrics[state.key];
  view.width = plot.clientWidth;
  const {points, best, height} = drawnFrontier(frontier, runs, state.key, view.width, state.budget);
  for (const point of points) {
    point.size = formatBytes(point.bytes);
    point.shown = whichShown(runs.find((run) => run.id === point.id).metrics[state.key], metric);
  }
  view.answer.replaceChildren(...whichSentence(view, best, points));
  const budget = state.budget / frontier.unit_bytes;
  const inside = budget >= metric.x_domain[0] && budget <= metric.x_domain[1];
  const families = [...new Set(points.map((point) => point.family))];
  const change = {
    data: {points, budget: inside ? [{x: budget}] : []}, label: view.answer.textContent,
    rows: whichRows(view, points), columns: WHICH_COLUMNS,
    fill: {
      x_title: `size, ${frontier.unit}`, y_title: metric.title, x_domain: metric.x_domain,
      y_scale: {...(metric.scale === "log" ? {type: "log"} : {zero: false}), domain: metric.y_domain, nice: false},
      y_values: metric.y_ticks, plot_height: height, families, legend_columns: view.width < 520 ? 1 : Math.min(families.length, 3),
    },
  };
  if (view.handle) await view.handle.update(change);
  else {
    view.handle = await mountTemplate(plot, await view.store.chart("frontier"), {
      name: "which", ...change, onClick: (datum) => { if (datum.id) view.store.select({run: datum.id}); },
    });
    sortableTwin(view.handle, plot, WHICH_COLUMNS);
  }
}

const WHICH_COLUMNS = [
  {key: "file", label: "file"}, {key: "type", label: "type"}, {key: "made", label: "made by"},
  {key: "bytes", label: "size", number: true, format: formatBytes},
  {key: "bpw", label: "bits per weight", number: true, format: (value) => value.toFixed(2)},
  {key: "value", label: "value", number: true, format: (value, row) => row.shown},
  {key: "frontier", label: "beaten by none"}, {key: "tag", label: "from"},
];

function whichRows({runs, frontier, state}, points) {
  const rows = points.map((point) => {
    const run = runs.find((other) => other.id === point.id);
    return {
      file: run.file, type: run.type, made: run.family, bytes: run.bytes, bpw: run.bpw, value: point.value, shown: point.shown,
      frontier: point.pareto ? "yes" : "", tag: point.tag,
    };
  });
  const known = new Set(points.map((point) => point.id));
  const rest = runs.filter((run) => !known.has(run.id)).map((run) => ({
    file: run.file, type: run.type, made: run.family, bytes: run.bytes, bpw: run.bpw, value: null, shown: run.comparable === false ? "not comparable: another text or original, or an older file" : "not measured",
    frontier: "", tag: "",
  }));
  return [...rows, ...rest].map((row) => ({...row, metric: frontier.metrics[state.key].name}));
}

function whichShown(metric, {factor}) {
  return formatInterval(metric, (value) => whichShort(value * factor));
}

function whichShort(value) {
  return Math.abs(value) >= 10 ? value.toFixed(1) : formatShort(value);
}

function whichSentence({runs, frontier, state}, best, points) {
  const budget = formatBytes(state.budget);
  if (!best) {
    const least = points[0];
    return [`Nothing measured is as small as ${budget}: the smallest is `, el("strong", {}, least.label), ` with ${formatBytes(least.bytes)}.`];
  }
  const run = runs.find((other) => other.id === best.id);
  const {kl_mean: kl, same_top: top} = run.metrics;
  const words = [`Best under ${budget}: `, el("strong", {}, run.type), ` (${run.family}, ${formatBytes(run.bytes)})`];
  const picks = (value, digits) => `picks the original's likeliest word ${(100 * value).toFixed(digits)} % of the time`;
  if (state.key === "same_top") {
    words.push(`: it ${picks(top.value, top.value > 0.995 ? 2 : 1)}`, kl ? `, and loses ${formatShort(kl.value)} nats per token` : "");
  } else {
    const loses = kl ? `loses ${formatShort(kl.value)} nats per token${whichEnds(kl)}` : "";
    const also = top ? picks(top.value, top.value > 0.995 ? 1 : 0) : "";
    if (state.key !== "kl_mean") words.push(`, by ${frontier.metrics[state.key].name}: ${best.shown}`);
    if (loses || also) words.push(state.key === "kl_mean" ? ": it " : "; it ", [loses, also].filter(Boolean).join(", and "));
  }
  words.push(". ", tagChip(best.tag, true));
  return words;
}

function whichEnds(metric) {
  return Number.isFinite(metric.low) && Number.isFinite(metric.high) ? ` (${formatShort(metric.low)}–${formatShort(metric.high)})` : "";
}

// Two files beside each other, in a sentence; what is chosen stays chosen as long as it is there.
function whichCompare(view) {
  const said = el("p", {class: "which-verdict", "aria-live": "polite"});
  const chosen = {};
  let known = [];
  const show = () => {
    const words = whichVerdict(...["a", "b"].map((part) => known.find((run) => run.id === chosen[part])));
    if (said.textContent !== words) said.textContent = words;
  };
  const pick = (part, label) => selectControl({label, options: [], value: null, onInput: (id) => { chosen[part] = id; show(); }});
  const [first, second] = [pick("a", "This one"), pick("b", "with this one")];
  const node = el("div", {});
  const part = el("div", {class: "which-compare"}, el("h3", {}, "Compare two"), el("div", {class: "controls"}, first.node, second.node), said);
  const update = () => {
    const measured = new Set(view.frontier.metrics.kl_mean.points.map((point) => point.id));
    known = view.runs.filter((run) => measured.has(run.id)).sort((a, b) => b.bytes - a.bytes);
    if (known.length < 2) { part.remove(); return; }
    if (!part.parentNode) node.append(part);
    const names = known.map((run) => [run.id, run.file]);
    const gone = (part) => !known.some((run) => run.id === chosen[part]);
    if (gone("a")) chosen.a = known[0].id;
    if (gone("b")) chosen.b = known[Math.min(known.length - 1, Math.ceil(known.length / 2))].id;
    refillSelect(first.input, names, chosen.a);
    refillSelect(second.input, names, chosen.b);
    show();
  };
  update();
  return {node, update};
}

function whichVerdict(a, b) {
  if (a === b) return "That is the same file twice.";
  const [larger, smaller] = a.bytes >= b.bytes ? [a, b] : [b, a];
  const saved = 100 * (1 - smaller.bytes / larger.bytes);
  const [p, q] = [smaller.metrics.kl_mean, larger.metrics.kl_mean];
  const sized = saved < 0.05 ? `${smaller.file} and ${larger.file} are of the same size` : `${smaller.file} is ${saved.toFixed(saved < 10 ? 1 : 0)} % smaller than ${larger.file}`;
  const apart = p.low > q.high || q.low > p.high;
  if ([p.low, p.high, q.low, q.high].every(Number.isFinite) && !apart) {
    return `${sized}, and their losses cannot be told apart on this text: ${formatInterval(p)} and ${formatInterval(q)} nats per token.`;
  }
  const [worse, better, file] = p.value > q.value ? [p, q, smaller] : [q, p, larger];
  const times = better.value > 0 ? `${(worse.value / better.value).toFixed(worse.value / better.value < 10 ? 1 : 0)} times as much` : "more";
  return `${sized}; ${file.file} loses ${times}: ${formatInterval(worse)} against ${formatInterval(better)} nats per token.`;
}

function whichExplained() {
  return explanation("How to read this",
    el("p", {}, "Each mark is a file. Further left is smaller, further down lost less: the lower left corner is where one wants to be (the upper left, where more is better). "
      + "The line joins the files that nothing beats; every other file is larger or worse than one of them. Take the best mark left of your budget."),
    el("p", {}, glossaryTerm("KL divergence"), " asks, for every word of a text: how differently would the two models have gone on? It is like having "
      + "a photograph and its JPEG described by the same person: at 0.001 the descriptions are the same, at 0.1 details go missing, at 1 it is another picture."),
    el("p", {}, "The bar through a mark is its 95 % interval. Where two bars overlap, the difference may be luck. "
      + "The axis is logarithmic: the way from 0.01 to 0.1 is as long as from 0.1 to 1."));
}
