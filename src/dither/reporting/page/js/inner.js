// What the four views into a file share: which run and tensor, numbers out of base64, colors out of numbers.

import {joinWords, selectControl} from "./text.js";

// Matrices of a run, largest loss first where losses are known; vectors have no blocks to look into.
export function matricesOf(run) {
  return (run?.tensors ?? []).filter((tensor) => tensor.shape.length > 1 && tensor.type !== "F32");
}

// The tensor to begin with: the one selected, else of the middle layer, where nothing is special.
export function firstTensor(names, wanted) {
  if (names.includes(wanted)) return wanted;
  const downs = names.filter((name) => name.includes("ffn_down"));
  return downs[Math.floor(downs.length / 2)] ?? names[0] ?? null;
}

export function runControl(runs, value, onInput, label = "File") {
  return selectControl({label, options: runs.map((run) => [run.id, run.file]), value, onInput});
}

// Whether two documents say the same of a run's weights, so that what was read of them still holds.
export function sameWeights(one, other) {
  const told = (run) => JSON.stringify([run?.path, run?.bytes, run?.recipe, run?.notes, run?.tensors]);
  return told(one) === told(other);
}

// The runs that a view can show, beside their original. `renew` takes those of another document, and says whether
// what was read of the chosen one still holds; false where there is none left to show.
export function runShelf(able, document, view) {
  const shelf = {runs: able(document)};
  let reference = document.reference?.path;
  shelf.chosen = () => shelf.runs.find((run) => run.id === view.run);
  shelf.renew = (found, input) => {
    const now = able(found);
    if (!now.length) return false;
    const [before, original] = [shelf.chosen(), reference];
    shelf.runs = now;
    reference = found.reference?.path;
    view.run = refillSelect(input, now.map((run) => [run.id, run.file]), view.run);
    return {same: reference === original && sameWeights(before, shelf.chosen())};
  };
  return shelf;
}

// Loads once a slider has come to rest; an answer that is on its way would set it back.
export function loadSoon(view, load, wait) {
  view.turn += 1;
  clearTimeout(view.timer);
  view.timer = setTimeout(load, wait);
}

// A select's options anew, its choice kept where it is still there. Returns the choice.
export function refillSelect(input, options, wanted) {
  const keep = options.some(([key]) => key === wanted) ? wanted : options[0]?.[0] ?? "";
  input.replaceChildren(...options.map(([key, shown]) => {
    const option = document.createElement("option");
    option.value = key;
    option.textContent = shown;
    return option;
  }));
  input.value = keep;
  return keep;
}

// Little-endian float16 in base64, as numbers.
export function decodeHalves(text) {
  const bytes = decodeBytes(text);
  const found = new Float32Array(bytes.length >> 1);
  for (let at = 0; at < found.length; at += 1) {
    const bits = bytes[2 * at] | (bytes[2 * at + 1] << 8);
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    const size = exponent === 0 ? fraction * 2 ** -24
      : exponent === 31 ? Number.NaN : (1 + fraction / 1024) * 2 ** (exponent - 15);
    found[at] = bits & 32768 ? -size : size;
  }
  return found;
}

export function decodeBytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

// A color variable of the page as [red, green, blue].
export function themeColor(name) {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

// From several colors and a place between 0 and 1: the color there.
export function mixColors(colors, place) {
  const at = Math.min(1, Math.max(0, place)) * (colors.length - 1);
  const left = Math.min(colors.length - 2, Math.floor(at));
  return colors[left].map((part, index) => part + (colors[left + 1][index] - part) * (at - left));
}

export function cssColor(color) {
  return `rgb(${color.map(Math.round).join(" ")})`;
}

// Black or white: whichever reads better on the color (relative luminance of WCAG 2).
export function inkOn(color) {
  const [red, green, blue] = color.map((part) => (part / 255 <= 0.04045 ? part / 3294.6 : ((part / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 ? "#15171b" : "#ffffff";
}

export function divergingColors() {
  return [themeColor("minus"), themeColor("middle"), themeColor("plus")];
}

// "blk.12.ffn_down.weight" → "ffn_down of layer 12".
export function tensorWords(tensor) {
  return tensor.layer === null ? tensor.kind : `${tensor.kind} of layer ${tensor.layer}`;
}

export function noteText(notes) {
  return notes?.length ? joinWords(notes) : "";
}
