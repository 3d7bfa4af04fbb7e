// View 2, "Does it fit my machine?": the memory each type takes, part by part, against the memory there is.

import {choose, judge, kvProblem, layerCount, memoryMargin, needed, overheadBytes, usable, usableOnCards} from "../memory.js";
import {mountTemplate} from "../template.js";
import {refillSelect} from "../inner.js";
import {answerSentence, el, emptyState, explanation, formatBytes, formatShort, glossaryTerm, plural, segmentControl, selectControl, sliderControl, tagChip, uniqueId} from "../text.js";
import {sortableTwin} from "../sorting.js";

const FITS_CONTEXTS = [1, 2, 4, 8, 16, 32, 64, 128].map((k) => k * 1024);
const FITS_SLOTS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32];
const FITS_MARKS = {GPU: "● GPU", "part in RAM": "◐ part in RAM", RAM: "● RAM", "from disk": "○ from disk", no: "✕ no"};
const FITS_PARTS = [["weights", "weights"], ["cache", "KV cache"], ["compute", "compute"], ["overhead", "overhead"], ["driver", "GPU driver"], ["margin", "left free"]];
const FITS_GIB = 2 ** 30;

export async function mount(root, store) {
  const found = store.getDocument();
  const fit = found?.fit;
  if (!fit?.weights?.length) {
    const why = found?.runs?.length ? "The original was not found beside the files, and no file here tells its shape" : "No model was found here";
    root.append(emptyState(`${why}, so the memory it needs is not known. This tells it of any model:`, "dither fit MODEL"));
    return null;
  }
  const runs = new Map(found.runs.map((run) => [run.id, run]));
  const types = fitsTypes(fit, runs, found);
  const state = {
    context: fitsNearest(FITS_CONTEXTS, fit.defaults.context), kv: fit.defaults.kv, slots: fitsNearest(FITS_SLOTS, fit.defaults.slots),
    memory: fit.machine.memory.bytes, vram: fitsCards(fit.machine), told: false, chosen: null,
  };
  if (!FITS_CONTEXTS.includes(fit.defaults.context)) state.context = fit.defaults.context;
  const answer = answerSentence();
  answer.setAttribute("aria-live", "polite");
  const plot = el("div", {});
  const view = {fit, types, state, answer, plot, store, handle: null, width: 0, note: el("p", {class: "hint"})};
  const controls = fitsControls(view);
  root.append(answer, fitsFields(view), controls.node, plot, view.note, fitsExplained(fit));
  await fitsDraw(view);
  const watch = new ResizeObserver(() => { if (Math.abs(plot.clientWidth - view.width) > 1) fitsSoon(view); });
  watch.observe(plot);
  return {
    async update(changed) {
      if (!changed.fit?.weights?.length || fitsGround(changed.fit) !== fitsGround(view.fit)) return false;
      view.fit = changed.fit;
      view.types = fitsTypes(view.fit, new Map(changed.runs.map((run) => [run.id, run])), changed);
      view.free.textContent = fitsDetected(view.fit.machine);
      state.chosen = refillSelect(controls.type, fitsTypeOptions(view.types), state.chosen ?? "") || null;
      await fitsDraw(view);
      return true;
    },
    destroy() { watch.disconnect(); view.handle?.destroy(); },
  };
}

// What the controls stand for: another model or another machine needs others.
function fitsGround({shape, constants, defaults, machine}) {
  return JSON.stringify([shape, constants, defaults, machine.memory.bytes, machine.unified, machine.gpus.map((gpu) => [gpu.name, gpu.bytes])]);
}

function fitsTypeOptions(types) {
  return [["", "the best that fits"], ...types.map((entry) => [entry.key, `${entry.label}, ${formatBytes(entry.bytes)} of weights`])];
}

function fitsDetected(machine) {
  return `${formatBytes(machine.memory.bytes)} here${machine.free_bytes === null ? "" : `, ${formatBytes(machine.free_bytes)} free`}`;
}

function fitsCards(machine) {
  return machine.gpus.reduce((sum, gpu) => sum + gpu.bytes, 0);
}

function fitsNearest(steps, value) {
  return steps.reduce((best, step) => (Math.abs(step - value) < Math.abs(best - value) ? step : best));
}

// What is worth choosing among, the largest first: of each type the file that lost least, and the ladder of types that
// could be made. Files of one type weigh about the same, however they were made.
function fitsTypes(fit, runs, found) {
  const parameters = found.reference?.parameters || found.runs[0]?.parameters || 0;
  const best = new Map();
  for (const entry of fit.weights) {
    const usable = entry.run ? runs.get(entry.run)?.container === "gguf" : [...fit.constants.ladder, "F16", "BF16"].includes(entry.type);
    if (usable && fitsBetter(entry, best.get(entry.type))) best.set(entry.type, entry);
  }
  return [...best.values()].map((entry) => {
    const run = runs.get(entry.run);
    return {
      ...entry, label: entry.type, key: entry.type, file: run?.file ?? null, active: entry.active ?? entry.bytes, embedding: entry.embedding ?? 0,
      peak: (found.speed ?? []).find((timed) => timed.run === entry.run && entry.run)?.peak_memory_bytes ?? null,
      bpw: run?.bpw ?? (parameters ? (8 * entry.bytes) / parameters : 16),
    };
  }).sort((a, b) => b.bytes - a.bytes);
}

function fitsBetter(entry, other) {
  if (!other || Boolean(entry.run) !== Boolean(other.run)) return !other || Boolean(entry.run);
  return (entry.quality?.kl ?? Infinity) < (other.quality?.kl ?? Infinity);
}

function fitsFields(view) {
  const {fit, state} = view;
  const field = (label, bytes, detected, set) => {
    const id = uniqueId("memory");
    const input = el("input", {id, type: "number", min: 0, step: "any", inputmode: "decimal", value: fitsGib(bytes), on: {
      input: () => {
        const value = Number(input.value);
        if (input.value === "" || !Number.isFinite(value) || value < 0 || value > 1e5) { input.setAttribute("aria-invalid", "true"); return; }
        input.removeAttribute("aria-invalid");
        set(Math.round(value * FITS_GIB));
        state.told = true;
        fitsSoon(view);
      },
    }});
    return el("div", {class: "control"}, el("label", {for: id}, label), input, detected);
  };
  const {machine} = fit;
  const hint = (text) => el("span", {class: "hint fits-detected"}, text);
  const cards = machine.gpus.length ? machine.gpus.map((gpu) => gpu.name).join(", ") : "no GPU found";
  view.free = hint(fitsDetected(machine));
  return el("div", {class: "fits-fields"},
    field("Memory (RAM), GiB", state.memory, view.free, (bytes) => { state.memory = bytes; }),
    machine.unified ? null : field("GPU memory (VRAM), GiB; 0: none", state.vram, hint(cards), (bytes) => { state.vram = bytes; }));
}

function fitsGib(bytes) {
  return String(Math.round((bytes / FITS_GIB) * 10) / 10);
}

function fitsControls(view) {
  const {state, types, fit} = view;
  const contexts = [...new Set([...FITS_CONTEXTS, state.context])].sort((a, b) => a - b);
  const context = sliderControl({
    label: "Context, tokens for each conversation", min: 0, max: contexts.length - 1, value: contexts.indexOf(state.context),
    format: (index) => fitsTokens(contexts[index]), onInput: (index) => { state.context = contexts[index]; fitsSoon(view); },
  });
  const slots = sliderControl({
    label: "Conversations at once", min: 0, max: FITS_SLOTS.length - 1, value: FITS_SLOTS.indexOf(state.slots),
    format: (index) => String(FITS_SLOTS[index]), onInput: (index) => { state.slots = FITS_SLOTS[index]; fitsSoon(view); },
  });
  const kv = segmentControl({
    label: "KV cache", options: Object.keys(fit.constants.kv_types).map((name) => [name, name]), value: state.kv,
    onInput: (name) => { state.kv = name; fitsSoon(view); },
  });
  for (const input of kv.node.querySelectorAll("input")) {
    const problem = kvProblem(fit.shape, input.value, fit.constants);
    if (!problem) continue;
    input.disabled = true;
    input.parentElement.setAttribute("title", problem);
  }
  const type = selectControl({
    label: "Type", options: fitsTypeOptions(types), value: "", onInput: (key) => { state.chosen = key || null; fitsSoon(view); },
  });
  return {node: el("div", {class: "controls"}, context.node, slots.node, kv.node, type.node), type: type.input};
}

function fitsTokens(count) {
  return count % 1024 ? String(count) : `${count / 1024} K`;
}

let fitsWaiting = 0;
function fitsSoon(view) {
  cancelAnimationFrame(fitsWaiting);
  fitsWaiting = requestAnimationFrame(() => fitsDraw(view));
}

// The machine as memory.js takes it: detected, or as the person says.
function fitsMachine({fit, state}) {
  const {machine} = fit;
  const told = state.memory !== machine.memory.bytes && Math.abs(state.memory - machine.memory.bytes) > 0.06 * FITS_GIB;
  const found = fitsCards(machine);
  const same = state.vram === found || Math.abs(state.vram - found) < 0.06 * FITS_GIB;
  const like = machine.gpus[0];
  const gpus = same ? machine.gpus : state.vram ? [{bytes: state.vram, bandwidth: like?.bandwidth ?? null}] : [];
  return {
    memory: told ? state.memory : machine.memory.bytes, free: told ? null : machine.free_bytes ?? null,
    bandwidth: machine.memory.bandwidth, gpus, unified: machine.unified,
  };
}

function fitsJudged(view, machine) {
  const {fit, state, types} = view;
  return types.map((entry) => {
    const memory = needed(fit.shape, entry.bytes, state, fit.constants);
    const load = {memory, layers: layerCount(fit.shape), active: entry.active, vocabulary: fit.shape.vocabulary, embedding: entry.embedding};
    return {
      ...entry, memory, verdict: judge(load, machine, fit.constants), known: Boolean(entry.quality),
      needsImportance: entry.needs_importance && !entry.run,
    };
  });
}

async function fitsDraw(view) {
  const {fit, state, plot, answer} = view;
  view.width = plot.clientWidth;
  const machine = fitsMachine(view);
  const judged = fitsJudged(view, machine);
  const taken = choose(judged, fit.constants);
  const chosen = judged.find((entry) => entry.key === state.chosen) ?? taken ?? judged.at(-1);
  answer.replaceChildren(...fitsSentence(view, chosen, taken, judged, machine));
  view.note.replaceChildren(...fitsNote(view, chosen, machine));
  const change = fitsChart(view, judged, chosen, machine);
  change.label = answer.textContent;
  if (view.handle) await view.handle.update(change);
  else {
    view.handle = await mountTemplate(plot, await view.store.chart("memory"), {name: "fits", ...change});
    sortableTwin(view.handle, plot, FITS_COLUMNS);
  }
}

const FITS_COLUMNS = [
  {key: "label", label: "type"}, {key: "weights", label: "weights", number: true, format: formatBytes},
  {key: "cache", label: "KV cache", number: true, format: formatBytes}, {key: "compute", label: "compute", number: true, format: formatBytes},
  {key: "overhead", label: "overhead", number: true, format: formatBytes}, {key: "total", label: "total", number: true, format: formatBytes},
  {key: "word", label: "runs"}, {key: "speed", label: "tokens/s (estimate)", number: true},
  {key: "kl", label: "KL, nats", number: true}, {key: "tag", label: "KL is from"},
  {key: "peak", label: "measured peak", number: true, format: (bytes) => (bytes === null ? "not measured" : formatBytes(bytes))},
];

function fitsChart(view, judged, chosen, machine) {
  const {fit} = view;
  const narrow = view.width < 520;
  const limits = fitsLimits(machine, fit.constants);
  const most = Math.max(...judged.map((entry) => entry.memory.total));
  const [unit, unitName] = Math.max(most, ...limits.filter((line) => line.bytes < 4 * most).map((line) => line.bytes)) >= FITS_GIB / 2
    ? [FITS_GIB, "GiB"] : [2 ** 20, "MiB"];
  const margin = (entry) => (entry.verdict.word === "GPU" ? machine.gpus.reduce((sum, gpu) => sum + memoryMargin(gpu.bytes, fit.constants), 0)
    : memoryMargin(machine.memory, fit.constants));
  const driver = (entry) => (machine.unified || !["GPU", "part in RAM"].includes(entry.verdict.word) ? 0 : fit.constants.gpu_runtime * machine.gpus.length);
  const parts = [];
  const marks = [];
  for (const entry of judged) {
    let at = 0;
    for (const [key, part] of FITS_PARTS) {
      const bytes = key === "margin" ? (limits[0].bytes > 4 * most ? 0 : margin(entry)) : key === "driver" ? driver(entry) : entry.memory[key];
      if (!bytes) continue;
      parts.push({
        type: entry.label, part, start: at / unit, end: (at + bytes) / unit, size: formatBytes(bytes), total: formatBytes(entry.memory.total),
        chosen: entry === chosen,
      });
      at += bytes;
    }
    marks.push({type: entry.label, total: at / unit, word: FITS_MARKS[entry.verdict.word], chosen: entry === chosen});
  }
  const end = Math.max(...marks.map((mark) => mark.total));
  const shown = limits.filter((line) => line.bytes / unit < 2.2 * end);
  const right = Math.max(end, ...shown.map((line) => line.bytes / unit)) * (narrow ? 1.55 : 1.22);
  const lines = shown.map((line, index) => ({
    x: line.bytes / unit, name: line.name, size: formatBytes(line.bytes), dash: index ? [2, 3] : [6, 4], y: narrow && index ? -18 : -4,
    dx: line.bytes / unit > right / 2 ? -5 : 5, align: line.bytes / unit > right / 2 ? "right" : "left",
  }));
  const names = FITS_PARTS.map(([, name]) => name).filter((name) => parts.some((part) => part.part === name));
  return {
    data: {parts, types: marks, lines}, columns: FITS_COLUMNS,
    rows: judged.map((entry) => ({
      label: entry.label, ...entry.memory, word: entry.verdict.word,
      speed: entry.verdict.speed ? fitsSpeed(entry.verdict.speed) : entry.verdict.whyNoSpeed,
      kl: entry.quality ? formatShort(entry.quality.kl) : "not known", tag: entry.quality?.tag ?? "", peak: entry.peak,
    })),
    fill: {
      x_title: `memory, ${unitName}${narrow ? "" : " (weights counted, the rest estimated)"}`, x_domain: [0, right], part_names: names,
      types: judged.map((entry) => entry.label), plot_height: 27 * judged.length, legend_columns: narrow ? 2 : names.length,
    },
  };
}

function fitsLimits(machine, constants) {
  const free = machine.free !== null && machine.free < machine.memory ? "free RAM" : "RAM";
  const ram = {name: free, bytes: Math.min(machine.memory, machine.free ?? machine.memory)};
  if (!machine.gpus.length) return [ram];
  const cards = machine.gpus.reduce((sum, gpu) => sum + gpu.bytes, 0);
  return machine.unified ? [{name: "GPU's share", bytes: cards}] : [{name: plural(machine.gpus.length, "GPU"), bytes: cards}, ram];
}

function fitsSpeed(speed) {
  const round = (value) => (value >= 100 ? String(Math.round(value / 10) * 10) : value >= 10 ? value.toFixed(0) : value.toFixed(1));
  return `${round(speed.likely)} (${round(speed.low)}–${round(speed.high)})`;
}

function fitsSentence(view, chosen, taken, judged, machine) {
  const {fit, state} = view;
  const {memory, verdict} = chosen;
  const conversations = state.slots > 1 ? `${state.slots} conversations of ${fitsTokens(state.context)} tokens` : `${fitsTokens(state.context)} tokens of context`;
  if (!taken && !state.chosen) {
    const room = machine.gpus.length ? Math.max(usableOnCards(machine, fit.constants), usable(machine, fit.constants)) : usable(machine, fit.constants);
    return [el("strong", {}, "Nothing fits"), `: even ${chosen.label} needs ${formatBytes(memory.total)} with ${conversations}, and ${formatBytes(room)} may be used. `
      + "Try a shorter context, a quantized cache, or a smaller model. ", tagChip("estimated")];
  }
  const places = {
    GPU: "runs wholly on the GPU", "part in RAM": `runs with ${verdict.gpuLayers} of ${layerCount(fit.shape)} layers on the GPU and the rest in RAM`,
    RAM: "runs in RAM", "from disk": "does not fit: it would run from disk, slowly", no: "does not run here",
  };
  const speed = verdict.speed ? `, at about ${fitsSpeed(verdict.speed)} tokens per second` : "";
  const lead = state.chosen ? [el("strong", {}, chosen.label)] : ["Take ", el("strong", {}, chosen.label), ": it"];
  return [...lead, ` ${places[verdict.word]}, with ${conversations} in ${formatBytes(memory.total)}${speed}. `, tagChip("estimated")];
}

function fitsNote(view, chosen, machine) {
  const {fit, state} = view;
  const {memory} = chosen;
  const quality = chosen.quality
    ? [` It loses ${formatShort(chosen.quality.kl)} nats per token `, tagChip(chosen.quality.tag, true), chosen.quality.tag === "literature" ? " (another model's: measure yours)." : "."] : [];
  const peak = chosen.peak === null ? [] : [` Its peak while it was timed: ${formatBytes(chosen.peak)} `, tagChip("measured", true), ", beside the estimate for the settings above."];
  const have = chosen.file ? ` The file is ${chosen.file}.` : ` No such file yet: dither quantize MODEL --to ${chosen.type}${chosen.needsImportance ? " --evidence evidence" : ""}`;
  const free = machine.free !== null && machine.free < 0.8 * machine.memory ? ` Other programs hold the rest of the RAM's ${formatBytes(machine.memory)} right now.` : "";
  const bandwidth = machine.bandwidth && !machine.gpus.length ? ` Memory is read at ${(machine.bandwidth / 1e9).toFixed(0)} GB/s (${fit.machine.memory.tags?.bandwidth ?? "measured"}).` : "";
  const lines = fitsLimits(machine, fit.constants).map((line) => `${formatBytes(line.bytes)} (${line.name})`).join(" and ");
  return [`Judged by ${lines}. ${chosen.label}: ${formatBytes(memory.weights)} weights `, tagChip("measured", true),
    ` + ${formatBytes(memory.cache)} KV cache + ${formatBytes(memory.compute)} compute + ${formatBytes(overheadBytes(fit.shape, fit.constants))} overhead `,
    tagChip("estimated"), ` for ${plural(state.slots, "conversation")}.`, ...quality, ...peak, have, free, bandwidth];
}

function fitsExplained(fit) {
  return explanation("What takes the memory",
    el("p", {}, "Think of a desk. The weights are the books that must lie open on it. The ", glossaryTerm("KV cache"), " is the notes about the conversation: "
      + "they grow with every token, and every further conversation needs a pile of its own. Compute is the scratch paper, overhead the lamp."),
    el("p", {}, "What does not fit on the fast desk (the GPU) lies on the slow one (RAM); what fits on neither must be fetched from the shelf (the disk) for every single token. "
      + "A sixteenth of each memory, 1 GiB at most, is left free for others."),
    el("p", {}, fitsLayers(fit), " ", "A context of 8 K tokens is about 12 pages of text. A model may allow far more, but every token kept costs memory, whether it is used or not. "
      + "The same numbers as ", el("code", {}, "dither fit"), " prints, computed in this page."));
}

function fitsLayers(fit) {
  return `This model has ${plural(layerCount(fit.shape), "layer")}.`;
}
