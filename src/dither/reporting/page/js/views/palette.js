// "The colors one block can use": the numbers that a block may take, which of them it takes, and three other
// palettes of sixteen for the very same weights.

import {mountTemplate} from "../template.js";
import {cssColor, divergingColors, firstTensor, inkOn, loadSoon, matricesOf, mixColors, noteText, refillSelect, runControl, runShelf, themeColor} from "../inner.js";
import {answerSentence, el, emptyState, explanation, formatPercent, formatShort, glossaryTerm, plural, selectControl, sliderControl} from "../text.js";

const PALETTE_SWATCHES = 32; // more are drawn in the chart alone
const PALETTE_BINS = 24;

export async function mount(root, store) {
  const all = store.getDocument().runs ?? [];
  const able = (found) => (found.runs ?? []).filter((run) => (store.live ? found.reference?.path && paletteTensors(run).length : Object.keys(run.palettes ?? {}).length));
  const view = {run: null, tensor: null, row: 0, turn: 0};
  const shelf = runShelf(able, store.getDocument(), view);
  const {runs} = shelf;
  if (!runs.length) {
    const why = !store.live ? "This report was written without the palette of a block."
      : all.length ? "The original model was not found beside the files, so the weights that became these numbers are not known." : "No file was found whose blocks can be shown.";
    root.append(emptyState(why, all.length ? "dither dashboard FOLDER --against MODEL" : "dither quantize MODEL --to Q4_K_M"));
    return {};
  }
  const chosen = store.selection();
  const fourBits = runs.find((run) => /(^|[^\d])4/.test(run.type)) ?? runs[0];
  Object.assign(view, {run: (runs.find((run) => run.id === chosen.run) ?? fourBits).id, tensor: chosen.tensor, block: 0, found: null});
  const sentence = el("div", {});
  const message = el("p", {class: "work-note", role: "alert"});
  const swatches = el("div", {});
  const note = el("p", {class: "hint"});
  const [upper, lower] = [el("div", {}), el("div", {})];
  const picker = runControl(runs, view.run, (id) => { view.run = id; names(); store.select({run: id, tensor: view.tensor}); return load(); });
  const tensors = selectControl({label: "Tensor", options: [], value: null, onInput: (name) => {
    Object.assign(view, {tensor: name, row: 0, block: 0});
    store.select({run: view.run, tensor: name});
    return load();
  }});
  const row = sliderControl({label: "Row", min: 0, max: 0, value: 0, onInput: (to) => { view.row = to; loadSoon(view, load, 100); }});
  const block = sliderControl({label: "Block of the row", min: 0, max: 0, value: 0, onInput: (to) => { view.block = to; loadSoon(view, load, 100); }});
  row.node.hidden = block.node.hidden = !store.live;
  root.append(sentence, el("div", {class: "controls"}, picker.node, tensors.node, row.node, block.node), message, swatches,
    el("h3", {}, "Where the weights lie, and what they may become"), upper, el("h3", {}, "Other palettes of sixteen for the same weights"), lower,
    note, paletteExplanation());
  const charts = {};

  function names() {
    const run = shelf.chosen();
    const found = store.live ? paletteTensors(run).map((tensor) => tensor.name) : Object.keys(run.palettes);
    view.tensor = refillSelect(tensors.input, found.map((name) => [name, name]), firstTensor(found, view.tensor));
  }
  async function load() {
    const mine = ++view.turn;
    message.textContent = "";
    try {
      const found = await store.palette({run: view.run, tensor: view.tensor, row: view.row, block: view.block});
      if (mine !== view.turn) return;
      if (!found) throw new Error("this report holds no palette of that tensor");
      view.found = found;
      Object.assign(view, {row: found.row ?? 0, block: found.index ?? 0});
      await show();
    } catch (error) {
      if (mine === view.turn) message.textContent = `This block cannot be shown: ${error.message}`;
    }
  }
  async function show() {
    const {found} = view;
    for (const [slider, at, most] of [[row, found.row ?? 0, (found.rows ?? 1) - 1], [block, found.index ?? 0, (found.blocks ?? 1) - 1]]) {
      slider.input.max = Math.max(0, most);
      slider.set(at);
    }
    const grids = paletteGrids(found);
    sentence.replaceChildren(answerSentence(...paletteSentence(found, grids)));
    swatches.replaceChildren(paletteSwatches(found));
    const ends = paletteEnds(found, grids);
    const [first, second] = [paletteHistogram(found, ends, sentence.textContent), paletteStrips(found, grids, ends)];
    note.textContent = paletteNote(found);
    if (charts.upper) await Promise.all([charts.upper.update(first), charts.lower.update(second)]);
    else {
      charts.upper = await mountTemplate(upper, await store.chart("histogram"), first);
      charts.lower = await mountTemplate(lower, await store.chart("palette"), second);
    }
  }
  names();
  await load();
  const themed = () => { if (view.found) show(); };
  window.addEventListener("dither-theme", themed);
  const end = store.onSelect((selected) => {
    const changed = (selected.run && selected.run !== view.run) || (selected.tensor && selected.tensor !== view.tensor);
    const moved = selected.block !== undefined && store.live && (selected.row !== view.row || selected.block !== view.block);
    if (!changed && !moved) return;
    if (selected.run && shelf.runs.some((each) => each.id === selected.run)) view.run = selected.run;
    picker.input.value = view.run;
    Object.assign(view, {tensor: selected.tensor ?? view.tensor, row: moved ? selected.row ?? 0 : 0, block: moved ? selected.block : 0});
    names();
    load();
  });
  return {
    async update(found) {
      const renewed = shelf.renew(found, picker.input);
      if (!renewed) return false;
      if (!renewed.same) {
        names();
        await load();
      }
      return true;
    },
    destroy() { end(); window.removeEventListener("dither-theme", themed); charts.upper?.destroy(); charts.lower?.destroy(); },
  };
}

function paletteTensors(run) {
  return matricesOf(run).filter((tensor) => !["F16", "BF16", "F64"].includes(tensor.type));
}

// The file's own palette, then the others: levels, counts of the nearest, and the error of rounding to the nearest.
function paletteGrids(found) {
  const grids = [{name: found.type, levels: found.levels, used: found.used}];
  for (const [key, name] of [["uniform", "equal steps"], ["iq4_nl", "IQ4_NL"], ["nf4", "NF4"]]) {
    if (found[key]?.length) grids.push({name: name === found.type ? `${name}, fitted` : name, levels: found[key]});
  }
  for (const grid of grids) {
    const counts = new Array(grid.levels.length).fill(0);
    let squares = 0;
    for (const value of found.values) {
      let best = 0;
      grid.levels.forEach((level, at) => { if (Math.abs(level - value) < Math.abs(grid.levels[best] - value)) best = at; });
      counts[best] += 1;
      squares += (grid.levels[best] - value) ** 2;
    }
    grid.used ??= counts;
    grid.error = Math.sqrt(squares / Math.max(1e-300, found.values.reduce((sum, value) => sum + value * value, 0)));
  }
  return grids;
}

function paletteSentence(found, grids) {
  const used = found.used.filter((count) => count > 0).length;
  const said = found.how === "occurring" ? [el("strong", {}, plural(used, "different number")), " in"]
    : [el("strong", {}, `${used} of ${plural(found.levels.length, "level")}`), " used by"];
  const others = grids.slice(1);
  const best = others.length ? others.reduce((a, b) => (b.error < a.error ? b : a)) : null;
  const rest = best ? ` Of sixteen numbers, ${best.name === "equal steps" ? "equal steps" : `those of ${best.name}`} would lie closest to these weights: ${formatPercent(best.error)} away.` : "";
  return [...said, ` the ${found.block} weights of this ${found.type} block.`, rest];
}

// A little square for every level, with how many weights took it.
function paletteSwatches(found) {
  if (found.levels.length > PALETTE_SWATCHES) return el("p", {class: "hint"}, `${found.levels.length} levels are too many to draw as swatches; the chart has them all.`);
  const colors = divergingColors();
  const most = Math.max(...found.levels.map(Math.abs), Number.MIN_VALUE);
  return el("ol", {class: "swatches", "aria-label": "Levels of the block"}, found.levels.map((level, at) => {
    const color = mixColors(colors, 0.5 + level / most / 2);
    const used = found.used[at];
    return el("li", {class: used ? null : "unused", style: {background: cssColor(color), color: inkOn(color)},
      title: `${formatShort(level)}: ${used ? plural(used, "weight") : "not used"}`},
    el("span", {class: "off-screen"}, `${formatShort(level)}: `), used ? String(used) : el("span", {"aria-label": "not used"}, "×"));
  }));
}

function paletteEnds(found, grids) {
  const every = [...found.values, ...grids.flatMap((grid) => grid.levels)];
  const [least, most] = [Math.min(...every), Math.max(...every)];
  const room = 0.04 * (most - least || 1);
  return [least - room, most + room];
}

function paletteHistogram(found, ends, label) {
  const width = (ends[1] - ends[0]) / PALETTE_BINS;
  const counts = new Array(PALETTE_BINS).fill(0);
  for (const value of found.values) counts[Math.min(PALETTE_BINS - 1, Math.floor((value - ends[0]) / width))] += 1;
  const bars = counts.map((count, at) => ({left: ends[0] + at * width, right: ends[0] + (at + 1) * width, count,
    range: `${formatShort(ends[0] + at * width)} to ${formatShort(ends[0] + (at + 1) * width)}`})).filter((bar) => bar.count);
  const levels = found.levels.map((level, at) => ({x: level, used: found.used[at], shown: formatShort(level)}));
  return {
    data: {bars, levels}, rows: levels, name: "palette", title: "the palette", label, fill: {x_domain: ends},
    columns: [{key: "shown", label: "number", number: true}, {key: "used", label: "weights that take it", number: true}],
  };
}

function paletteStrips(found, grids, ends) {
  const colors = divergingColors();
  const most = Math.max(...grids.flatMap((grid) => grid.levels.map(Math.abs)), Number.MIN_VALUE);
  const [surface, muted, ink] = ["surface", "muted", "ink"].map((name) => cssColor(themeColor(name)));
  const levels = grids.flatMap((grid) => grid.levels.map((level, at) => ({
    grid: grid.name, x: level, used: grid.used[at], shown: formatShort(level),
    fill: grid.used[at] ? cssColor(mixColors(colors, 0.5 + level / most / 2)) : surface, stroke: grid.used[at] ? ink : muted, shape: grid.used[at] ? "square" : "cross",
  })));
  const weights = grids.flatMap((grid) => found.values.map((value) => ({grid: grid.name, x: value})));
  const names = grids.map((grid) => grid.name);
  return {
    data: {levels, weights}, name: "palettes", title: "the palettes", label: `The levels of ${names.join(", ")} for the same block`,
    fill: {plot_height: 52 * names.length, x_domain: ends, grids: names, mark_size: found.levels.length > 64 ? 24 : innerWidth < 600 ? 55 : 110},
    rows: grids.map((grid) => ({grid: grid.name, levels: grid.levels.length, used: grid.used.filter((count) => count > 0).length, error: grid.error})),
    columns: [{key: "grid", label: "palette"}, {key: "levels", label: "levels", number: true}, {key: "used", label: "used", number: true},
      {key: "error", label: "error of the nearest level", number: true, format: (value) => formatPercent(value, 2)}],
  };
}

function paletteNote(found) {
  const how = {deduced: "The levels were found again from the stored numbers: this format's reader keeps no codes. ",
    occurring: "This type chooses weights in groups, from a book of patterns: shown are the numbers that occur, of either sign. "}[found.how] ?? "";
  return `${how}Squares are levels that weights take, crosses are levels that none does; the ticks below them are the weights. ${noteText(found.notes)}`;
}

function paletteExplanation() {
  return explanation("Sixteen colors for one block",
    "An old trick of computer graphics: keep a picture with sixteen colors, but choose the sixteen for this picture. A quantized block does the same. "
    + "Four bits can name sixteen numbers, and the block's own scale says which sixteen they are.",
    el("p", {}, "Equal steps are simple, but weights crowd around zero, and many steps far outside stay unused. IQ4_NL (an ", glossaryTerm("I-quant"),
      ") and NF4 put their levels closer together near zero. What is best differs from block to block: move the sliders. How many neighbors share a palette is the ",
      glossaryTerm("group size"), "; smaller groups fit better and cost more bits for their scales."));
}
