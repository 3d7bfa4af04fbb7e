// View 7, "How fast, at what cost?": what was timed, how widely it varied, and the command that repeats it.

import {mountTemplate} from "../template.js";
import {answerSentence, commandBlock, el, emptyState, explanation, formatBytes, formatShort, glossaryTerm, segmentControl, tagChip} from "../text.js";
import {sortableTwin} from "../sorting.js";

const SPEED_METRICS = {
  decode: {name: "decode", title: "tokens per second, writing (more is better)", more: true},
  prefill: {name: "prefill", title: "tokens per second, reading the prompt (more is better)", more: true},
  memory: {name: "peak memory", title: "peak memory", more: false},
  energy: {name: "energy", title: "joules per token (less is better)", more: false},
};

export async function mount(root, store) {
  const found = store.getDocument();
  const entries = speedEntries(found);
  if (!entries.length) {
    const file = found?.runs?.[0]?.file ?? "FILE";
    root.append(
      emptyState("Nothing was timed yet. This fills the view: it warms up, repeats, and says how widely the times vary.", `dither bench ${speedQuoted(file)}`),
      speedExplained());
    return null;
  }
  const state = {key: ["decode", "prefill", "memory", "energy"].find((key) => entries.some((entry) => speedValue(entry, key)))};
  const answer = answerSentence();
  const plot = el("div", {});
  const view = {entries, state, answer, plot, store, handle: null};
  const [controls, commands] = [el("div", {}), el("div", {})];
  controls.append(...speedControls(view));
  commands.append(speedCommands(entries) ?? "");
  root.append(answer, controls, plot, commands, speedExplained());
  await speedDraw(view);
  return {
    async update(changed) {
      const now = speedEntries(changed);
      if (!now.length) return false;
      const known = (list) => Object.keys(SPEED_METRICS).filter((key) => list.some((entry) => speedValue(entry, key)));
      const [before, after] = [known(view.entries), known(now)];
      view.entries = now;
      if (!after.includes(state.key)) state.key = after[0];
      if (before.join() !== after.join()) controls.replaceChildren(...speedControls(view));
      const open = commands.querySelector("details")?.open ?? false;
      commands.replaceChildren(speedCommands(now) ?? "");
      if (open) commands.querySelector("details")?.setAttribute("open", "");
      await speedDraw(view);
      return true;
    },
    destroy() { view.handle?.destroy(); },
  };
}

// What is to be shown, and why some of it cannot.
function speedControls(view) {
  const {entries, state} = view;
  const control = segmentControl({
    label: "Show", options: Object.entries(SPEED_METRICS).map(([key, metric]) => [key, metric.name]), value: state.key,
    onInput: (key) => { state.key = key; speedDraw(view); },
  });
  for (const input of control.node.querySelectorAll("input")) {
    if (entries.some((entry) => speedValue(entry, input.value))) continue;
    input.disabled = true;
    input.parentElement.setAttribute("title", input.value === "energy" ? speedNoEnergy(entries) : "not timed");
  }
  const energy = entries.some((entry) => entry.joules_per_token) ? [] : [el("p", {class: "hint"}, `Energy: ${speedNoEnergy(entries)}.`)];
  return [el("div", {class: "controls"}, control.node), ...energy];
}

// What was timed, with the run's name. A run may have been timed more than once, with other threads.
function speedEntries(found) {
  const runs = new Map((found?.runs ?? []).map((run) => [run.id, run]));
  const entries = (found?.speed ?? []).filter((entry) => runs.has(entry.run)).map((entry) => ({...entry, of: runs.get(entry.run)}));
  const timed = new Map();
  for (const entry of entries) timed.set(entry.of.type, (timed.get(entry.of.type) ?? 0) + 1);
  const labels = new Set();
  for (const entry of entries) {
    const named = timed.get(entry.of.type) > 1 ? entry.of.file : entry.of.type;
    entry.label = labels.has(named) ? `${named}, ${entry.threads} threads` : named;
    labels.add(entry.label);
  }
  return entries.sort((a, b) => a.of.bytes - b.of.bytes);
}

function speedQuoted(name) {
  return /^[\w./+-]+$/.test(name) ? name : `'${name.replaceAll("'", "'\\''")}'`;
}

function speedValue(entry, key) {
  if (key === "memory") return Number.isFinite(entry.peak_memory_bytes) ? {value: entry.peak_memory_bytes} : null;
  return (key === "energy" ? entry.joules_per_token : entry[key]) ?? null;
}

function speedNoEnergy(entries) {
  return entries.map((entry) => entry.joules_note).find(Boolean) || "not readable here";
}

function speedShown(metric, key) {
  if (!metric) return "not known";
  if (key === "memory") return formatBytes(metric.value);
  const round = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : formatShort(value));
  return Number.isFinite(metric.low) && Number.isFinite(metric.high)
    ? `${round(metric.value)} (${round(metric.low)}–${round(metric.high)})` : round(metric.value);
}

const SPEED_COLUMNS = [
  {key: "label", label: "file"}, {key: "size", label: "size", number: true}, {key: "decode", label: "decode, tokens/s", number: true},
  {key: "prefill", label: "prefill, tokens/s", number: true}, {key: "memory", label: "peak memory", number: true},
  {key: "energy", label: "J/token", number: true}, {key: "threads", label: "threads", number: true}, {key: "machine", label: "on"},
  {key: "tag", label: "from"},
];

async function speedDraw(view) {
  const {state, entries, plot, answer} = view;
  const metric = SPEED_METRICS[state.key];
  const shown = entries.filter((entry) => speedValue(entry, state.key));
  const largest = Math.max(...shown.map((entry) => speedValue(entry, state.key).value));
  const unit = state.key !== "memory" ? 1 : largest >= 2 ** 29 ? 2 ** 30 : 2 ** 20;
  const rows = shown.map((entry) => {
    const value = speedValue(entry, state.key);
    const ends = [value.low, value.high].every(Number.isFinite) ? [value.low / unit, value.high / unit] : [null, null];
    return {
      label: entry.label, value: value.value / unit, low: ends[0], high: ends[1], edge: Math.max(value.value / unit, ends[1] ?? 0),
      text: speedShown({value: value.value}, state.key), shown: speedShown(value, state.key), machine: entry.machine,
    };
  });
  answer.replaceChildren(...speedSentence(shown, state.key));
  const change = {
    data: {runs: rows}, label: answer.textContent, columns: SPEED_COLUMNS,
    rows: entries.map((entry) => ({
      label: entry.label, size: formatBytes(entry.of.bytes), decode: speedShown(entry.decode, "decode"), prefill: speedShown(entry.prefill, "prefill"),
      memory: speedShown(speedValue(entry, "memory"), "memory"), energy: entry.joules_per_token ? speedShown(entry.joules_per_token, "energy") : entry.joules_note || "not readable here",
      threads: entry.threads, machine: entry.machine, tag: entry.tag,
    })),
    fill: {
      x_title: speedTitle(state.key, unit === 2 ** 30 ? "GiB" : "MiB", plot.clientWidth < 520),
      x_domain: [0, Math.max(...rows.map((row) => row.edge)) * (plot.clientWidth < 520 ? 1.35 : 1.15)], labels: rows.map((row) => row.label), plot_height: 34 * rows.length,
    },
  };
  if (view.handle) await view.handle.update(change);
  else {
    view.handle = await mountTemplate(plot, await view.store.chart("speed"), {name: "speed", ...change});
    sortableTwin(view.handle, plot, SPEED_COLUMNS);
  }
}

function speedTitle(key, unit, narrow) {
  const title = key === "memory" ? `peak memory, ${unit} (less is better)` : SPEED_METRICS[key].title;
  return narrow ? title.replace(/ \(.*\)$/, "") : title;
}

function speedSentence(shown, key) {
  const {more} = SPEED_METRICS[key];
  const value = (entry) => speedValue(entry, key).value;
  const best = shown.reduce((one, other) => ((more ? value(other) > value(one) : value(other) < value(one)) ? other : one));
  const words = {
    decode: ["writes fastest: ", " tokens per second"], prefill: ["reads a prompt fastest: ", " tokens per second"],
    memory: ["takes the least memory at its peak: ", ""], energy: ["needs the least energy: ", " joules per token"],
  }[key];
  const said = [el("strong", {}, best.label), ` ${words[0]}${speedShown(speedValue(best, key), key)}${words[1]}`];
  const others = shown.filter((entry) => entry !== best && speedOverlaps(speedValue(entry, key), speedValue(best, key), more)).map((entry) => entry.label);
  const unsure = others.length ? `The repeats do not tell it from ${others.slice(0, 3).join(", ")}${others.length > 3 ? " and others" : ""}. ` : "";
  const where = best.machine ? ` on ${best.machine}${best.threads ? `, ${best.threads === 1 ? "one thread" : `${best.threads} threads`}` : ""}` : "";
  return [...said, `${where}. ${unsure}`, tagChip(best.tag, true)];
}

// Whether the spreads of two figures meet.
function speedOverlaps(other, best, more) {
  if (![other.low, other.high, best.low, best.high].every(Number.isFinite)) return false;
  return more ? other.high >= best.low : other.low <= best.high;
}

function speedCommands(entries) {
  const commands = [...new Set(entries.map((entry) => entry.command).filter(Boolean))];
  if (!commands.length) return null;
  return el("details", {}, el("summary", {}, commands.length === 1 ? "Measure it again" : "Measure them again"), commands.map((command) => commandBlock(command)));
}

function speedExplained() {
  return explanation("Why a smaller file is faster",
    el("p", {}, "To write one token, a model reads all of its weights once. The processor is done with its sums long before the next weights arrive, like a "
      + "cook who waits for the shopping: half the bags, half the wait. So the speed of writing (", glossaryTerm("decode"), ") is about the memory's bandwidth divided by the size of the file."),
    el("p", {}, "Reading the prompt (", glossaryTerm("prefill"), ") does many tokens with each weight that was fetched, so there the sums decide, and a smaller file helps little. "
      + "People read 5 to 8 tokens per second."),
    el("p", {}, "The thin line is how widely the repeats varied. A machine that does other work at the same time shows less; what counts is the difference between files timed in one go."));
}
