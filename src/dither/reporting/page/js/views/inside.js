// "What was lost inside?": layers across, kinds of tensor down, the loss as a color and, where there is room, a number.
//
// Colors mean the same for every file of the page: their scale ends at the largest and smallest number of all runs,
// so that switching files shows which lost more, not which scale was stretched.

import {mountTemplate} from "../template.js";
import {cssColor, inkOn, mixColors, refillSelect, runControl, sameWeights, tensorWords, themeColor} from "../inner.js";
import {answerSentence, el, emptyState, explanation, formatNumber, formatPercent, formatShort, glossaryTerm, segmentControl} from "../text.js";

const INSIDE_METRICS = {
  relative_error: {
    label: "Relative error", title: "relative error", format: (value) => formatPercent(value, value < 0.01 ? 2 : 1), axis: ".1~%",
    decades: 1, missing: "No file here keeps the errors of its tensors, and the original was not found to compare with.",
  },
  bpw: {label: "Bits per weight", title: "bits per weight", format: (value) => formatNumber(value, 1), axis: "~g", decades: 0.3, missing: ""},
  kl_alone: {
    label: "KL alone", title: "KL divergence, nats per token", format: formatShort, axis: ".0e", decades: 2,
    missing: "KL by tensor needs sensitivities: “dither plan MODEL --evidence FOLDER” measures them, and this page then finds them beside the files.",
  },
};
const INSIDE_ORDER = ["attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate_inp", "ffn_gate", "ffn_up", "ffn_down"];
const INSIDE_HINT = "A click on a cell shows its weights. With the map in focus, arrow keys walk and Enter opens.";
const INSIDE_ROOM = 42; // pixels that a number in a cell needs

export async function mount(root, store) {
  let runs = insideRuns(store.getDocument());
  if (!runs.length) {
    root.append(emptyState("No file was found whose tensors can be listed.", "dither quantize MODEL --to Q4_K_M"));
    return {};
  }
  const view = {
    runs, run: (runs.find((run) => run.id === store.selection().run) ?? insideMostLossy(runs)).id, metric: null, at: 0, cells: [], cursor: [],
  };
  view.metric = Object.keys(INSIDE_METRICS).find((key) => insideKnown(runs, key).length) ?? "bpw";
  const sentence = el("div", {});
  const readout = el("p", {class: "readout", role: "status", "aria-live": "polite"}, INSIDE_HINT);
  const picker = runControl(runs, view.run, (id) => { view.run = id; store.select({run: id}); return show(); });
  const metrics = segmentControl({
    label: "Color shows", options: Object.entries(INSIDE_METRICS).map(([key, metric]) => [key, metric.label]), value: view.metric,
    onInput: (key) => { view.metric = key; return show(); },
  });
  const reasons = insideDisable(metrics.node, runs);
  const place = el("div", {class: "heat"});
  root.append(sentence, el("div", {class: "controls"}, picker.node, metrics.node), ...reasons, place, readout, insideExplanation());

  const open = (cell) => {
    if (!cell.matrix) return;
    store.select({run: view.run, tensor: cell.name});
    document.getElementById("pictures")?.scrollIntoView({block: "start"});
  };
  const options = () => {
    const run = runs.find((each) => each.id === view.run);
    Object.assign(view, insideCells(run, runs, view.metric, place.clientWidth));
    view.at = Math.min(view.at, view.cells.length - 1);
    const words = insideSentence(run, view);
    sentence.replaceChildren(answerSentence(...words));
    return {
      data: {cells: view.cells, cursor: view.cursor}, rows: view.cells.filter((cell) => cell.matrix || cell.value !== null),
      label: sentence.textContent, fill: view.fill,
    };
  };
  const chart = await mountTemplate(place, await store.chart("inside"), {
    ...options(), name: "lost-inside", title: "the heat map", onClick: (datum) => open(datum), rowAction: "Open",
    columns: [
      {key: "name", label: "tensor"}, {key: "type", label: "stored as"}, {key: "bits", label: "bits per weight", number: true},
      {key: "error", label: "relative error", number: true}, {key: "alone", label: "KL if only it is quantized", number: true},
    ],
  });
  async function show() {
    readout.textContent = INSIDE_HINT;
    view.cursor.length = 0;
    await chart.update(options());
  }
  insideKeys(place, view, {
    move: async () => {
      const cell = view.cells[view.at];
      readout.textContent = `${cell.name}: ${cell.type}, ${cell.bits} bits per weight, relative error ${cell.error}, `
        + `KL if only it is quantized ${cell.alone}.${cell.matrix ? " Enter shows its weights." : ""}`;
      view.cursor.splice(0, 1, {...cell}); // in place: a chart that is drawn anew keeps it
      await chart.view()?.data("cursor", [{...cell}]).runAsync();
    },
    open: () => open(view.cells[view.at]),
  });
  const themed = () => show();
  window.addEventListener("dither-theme", themed);
  const end = store.onSelect(({run}) => {
    if (!run || run === view.run || !runs.some((each) => each.id === run)) return;
    view.run = run;
    picker.input.value = run;
    show();
  });
  return {
    async update(found) {
      const [before, now] = [runs, insideRuns(found)];
      const known = (all) => Object.keys(INSIDE_METRICS).filter((key) => insideKnown(all, key).length).join();
      if (!now.length || known(now) !== known(before)) return false;
      runs = now;
      view.run = refillSelect(picker.input, runs.map((run) => [run.id, run.file]), view.run);
      if (runs.length !== before.length || !runs.every((run, at) => sameWeights(run, before[at]))) await show(); // the scale is of all
      return true;
    },
    destroy() { end(); window.removeEventListener("dither-theme", themed); chart.destroy(); },
  };
}

function insideRuns(found) {
  return (found.runs ?? []).filter((run) => insideTensors(run).length);
}

function insideTensors(run) {
  return (run.tensors ?? []).filter((tensor) => tensor.shape.length > 1);
}

function insideKnown(runs, key) {
  return runs.flatMap((run) => insideTensors(run).map((tensor) => tensor[key])).filter((value) => Number.isFinite(value) && value > 0);
}

function insideMostLossy(runs) {
  return runs.reduce((worst, run) => (run.bpw < worst.bpw ? run : worst));
}

// Choices without data cannot be chosen; why not is said below.
function insideDisable(node, runs) {
  const reasons = [];
  for (const input of node.querySelectorAll("input")) {
    if (insideKnown(runs, input.value).length) continue;
    input.disabled = true;
    input.closest("label").classList.add("off");
    reasons.push(el("p", {class: "hint"}, INSIDE_METRICS[input.value].missing));
  }
  return reasons;
}

// Every tensor as a cell, top to bottom and left to right, and what the template needs.
function insideCells(run, runs, metric, width) {
  const tensors = insideTensors(run);
  const layers = [...new Set(tensors.map((tensor) => tensor.layer).filter((layer) => layer !== null))].sort((a, b) => a - b);
  const [first, last] = layers.length ? [layers[0], layers.at(-1)] : [0, 0];
  const kinds = insideKindsInOrder(tensors);
  const known = insideKnown(runs, metric);
  const domain = insideDomain(known, INSIDE_METRICS[metric].decades);
  const roomy = (Math.max(width, 300) - 140) / (last - first + 1) > INSIDE_ROOM;
  const ramp = ["ramp-0", "ramp-1", "ramp-2"].map(themeColor);
  const cells = tensors.map((tensor) => {
    const value = tensor[metric];
    const state = !Number.isFinite(value) ? "unknown" : value > 0 ? "value" : "exact";
    const span = tensor.layer === null ? [first - 0.5, last + 0.5] : [tensor.layer - 0.5, tensor.layer + 0.5];
    const color = mixColors(ramp, state === "value" ? Math.log(value / domain[0]) / Math.log(domain[1] / domain[0]) : 0);
    const text = state === "value" ? INSIDE_METRICS[metric].format(value) : state === "exact" ? "exact" : "?";
    return {
      name: tensor.name, words: tensorWords(tensor), kind: tensor.kind, type: tensor.type, left: span[0], right: span[1],
      layer: tensor.layer, value: state === "value" ? value : null, state, matrix: tensor.type !== "F32",
      text: roomy || tensor.layer === null ? text : "", ink: state === "value" ? inkOn(color) : cssColor(themeColor("muted")),
      bits: formatNumber(tensor.bpw, 2), error: insideTagged(tensor.relative_error, tensor.error_tag, (v) => formatPercent(v, 2)),
      alone: insideTagged(tensor.kl_alone, tensor.kl_tag, formatShort),
    };
  });
  cells.sort((a, b) => kinds.indexOf(a.kind) - kinds.indexOf(b.kind) || a.left - b.left);
  const step = Math.max(1, Math.ceil((last - first + 1) / Math.max(4, Math.floor(width / 44))));
  return {
    cells, kinds, metric,
    fill: {
      plot_height: 26 * kinds.length,
      x_domain: [first - 0.5, last + 0.5], x_values: layers.filter((layer) => (layer - first) % step === 0), kinds, domain,
      value_title: INSIDE_METRICS[metric].title, format: INSIDE_METRICS[metric].axis,
    },
  };
}

function insideTagged(value, tag, format) {
  if (!Number.isFinite(value)) return "not known";
  return `${value === 0 ? "none" : format(value)}${tag && tag !== "measured" ? ` (${tag === "estimated" ? "estimate" : tag})` : ""}`;
}

// What stands before the layers, the layers' kinds as a layer computes them, what stands after.
function insideKindsInOrder(tensors) {
  const kinds = [...new Set(tensors.map((tensor) => tensor.kind))];
  const rank = (kind) => {
    const outside = tensors.some((tensor) => tensor.kind === kind && tensor.layer === null);
    if (outside) return kind.startsWith("output") ? 1000 : -1;
    const at = INSIDE_ORDER.findIndex((known) => kind === known || kind === `${known}_exps` || kind === `${known}_shexp`);
    return at < 0 ? 500 : at;
  };
  return kinds.sort((a, b) => rank(a) - rank(b));
}

// Ends of a scale, at least so many decades apart: equal losses must not look unequal.
function insideDomain(known, decades) {
  if (!known.length) return [1, 10];
  const [least, most] = [Math.min(...known), Math.max(...known)];
  const wide = Math.max(1, 10 ** decades / (most / least)) ** 0.5;
  return [least / wide, most * wide];
}

function insideSentence(run, view) {
  const known = view.cells.filter((cell) => cell.value !== null && cell.matrix);
  const format = INSIDE_METRICS[view.metric].format;
  if (!known.length) return ["Of ", el("strong", {}, run.file), " nothing was lost that is known here."];
  const worst = known.reduce((a, b) => (b.value > a.value ? b : a));
  const best = known.reduce((a, b) => (b.value < a.value ? b : a));
  const name = el("strong", {}, worst.words);
  if (view.metric === "bpw") {
    return ["In ", el("strong", {}, run.file), ", ", name, ` has most bits per weight, ${format(worst.value)}; ${best.words} has fewest, ${format(best.value)}.`];
  }
  if (view.metric === "kl_alone") {
    return ["In ", el("strong", {}, run.file), ", ", name, ` matters most: quantizing nothing else would cost ${format(worst.value)} nats per token, `,
      `${formatShort(worst.value / best.value)} times what ${best.words} costs.`];
  }
  return ["In ", el("strong", {}, run.file), ", ", name, ` lost most, ${format(worst.value)} of its size, stored as ${worst.type}; `,
    `${best.words} lost least, ${format(best.value)}.`];
}

// Arrow keys walk from cell to cell, Home and End to the ends, Enter opens.
function insideKeys(place, view, act) {
  const plot = place.querySelector(".plot");
  plot.tabIndex = 0;
  plot.setAttribute("role", "application");
  plot.setAttribute("aria-roledescription", "heat map");
  plot.setAttribute("aria-label", "Heat map of tensors. Arrow keys move from tensor to tensor, Enter shows its weights.");
  plot.addEventListener("keydown", (event) => {
    const now = view.cells[view.at];
    const row = (kind) => view.cells.filter((cell) => cell.kind === kind);
    const nearest = (kind) => row(kind).reduce((a, b) =>
      (Math.abs(b.left + b.right - now.left - now.right) < Math.abs(a.left + a.right - now.left - now.right) ? b : a));
    const line = row(now.kind);
    const kind = view.kinds.indexOf(now.kind);
    const moves = {
      ArrowRight: () => line[Math.min(line.length - 1, line.indexOf(now) + 1)], ArrowLeft: () => line[Math.max(0, line.indexOf(now) - 1)],
      ArrowDown: () => nearest(view.kinds[Math.min(view.kinds.length - 1, kind + 1)]), ArrowUp: () => nearest(view.kinds[Math.max(0, kind - 1)]),
      Home: () => view.cells[0], End: () => view.cells.at(-1),
    };
    if (event.key === "Enter") act.open();
    else if (event.key in moves) {
      view.at = view.cells.indexOf(moves[event.key]());
      act.move();
    } else return;
    event.preventDefault();
  });
  plot.addEventListener("focus", () => act.move());
}

function insideExplanation() {
  return explanation("How to read this map",
    el("p", {}, "A model is a stack of layers, and every layer holds the same few kinds of matrix: four for attention (",
      el("em", {}, "attn_q, attn_k, attn_v, attn_output"), ") and three for the feed-forward part (", el("em", {}, "ffn_gate, ffn_up, ffn_down"),
      "). Each cell is one of them; what stands outside the layers, such as the table of words, spans the width."),
    el("p", {}, el("strong", {}, "Relative error"), " is how far the stored weights lie from the original ones: 10 % means that the differences are "
      + "a tenth as large as the weights. It says how coarsely a matrix was rounded, not how much the model minds. That is what ",
      el("strong", {}, "KL"), " shows: how far the model's predictions move (", glossaryTerm("KL divergence"),
      ") if only this one matrix is quantized. A matrix with a large error can be harmless, and one with a small error costly; "
      + "good plans give their ", glossaryTerm("bits per weight"), " to the costly ones."),
    "The scale is logarithmic, and the same for all files on this page. A dashed cell is exact, or not known.");
}
