// "RAW and JPEG": a window into one tensor, original | quantized | difference, beside a picture that went through
// the same quantizer. Canvases hold one pixel a weight and are enlarged without smoothing.

import {saveFile, tableTwin, toCsv} from "../chart.js";
import {decodeBytes, decodeHalves, divergingColors, firstTensor, loadSoon, matricesOf, mixColors, noteText, refillSelect, runControl, runShelf, themeColor, cssColor} from "../inner.js";
import {answerSentence, el, emptyState, explanation, formatNumber, formatPercent, formatShort, glossaryTerm, selectControl, sliderControl} from "../text.js";

const PICTURES_GAIN = 8; // how much the difference is enlarged, always
const PICTURES_TYPES = ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"];
const PICTURES_SIDES = [["original", "Original"], ["quantized", "Quantized"], ["difference", `Difference × ${PICTURES_GAIN}`]];

export async function mount(root, store) {
  const all = store.getDocument().runs ?? [];
  const able = (found) => (found.runs ?? []).filter((run) => (store.live ? found.reference?.path && matricesOf(run).length : Object.keys(run.tiles ?? {}).length));
  const view = {run: null, tensor: null, row: 0, turn: 0};
  const shelf = runShelf(able, store.getDocument(), view);
  const {runs} = shelf;
  if (!runs.length) {
    const why = !store.live ? "This report was written without windows into the tensors."
      : all.length ? "The original model was not found beside the files, so there is nothing to compare them with." : "No file was found whose weights can be shown.";
    root.append(emptyState(why, all.length ? "dither dashboard FOLDER --against MODEL" : "dither quantize MODEL --to Q4_K_M"));
    await picturesLandscapeOnly(root, store);
    return {};
  }
  const chosen = store.selection();
  Object.assign(view, {run: (runs.find((run) => run.id === chosen.run) ?? runs.at(-1)).id, tensor: chosen.tensor, column: 0, kind: null, tile: null, spot: null});
  const parts = picturesParts(runs, view);
  root.append(parts.sentence, parts.controls, parts.message, parts.panels, parts.readout, parts.tools, parts.twin, parts.note,
    parts.landscape, picturesExplanation());

  async function load() {
    const mine = ++view.turn;
    parts.message.textContent = "";
    try {
      const tile = await store.tile({run: view.run, tensor: view.tensor, row: view.row, column: view.column, size: 64});
      if (mine !== view.turn) return;
      if (!tile) throw new Error("this report holds no window into that tensor");
      view.tile = picturesDecoded(tile);
      show();
    } catch (error) {
      if (mine !== view.turn) return;
      parts.message.textContent = `This window cannot be shown: ${error.message}`;
    }
  }
  function show() {
    const {tile} = view;
    view.kind = tile.kinds.includes(view.kind) ? view.kind : tile.type;
    parts.bits.input.max = tile.kinds.length - 1;
    parts.bits.set(tile.kinds.indexOf(view.kind));
    view.spot = null;
    picturesPlace(parts, view, tile);
    picturesDraw(parts, view);
    landscape.show(view.kind, tile.type);
  }
  function names() {
    const run = shelf.chosen();
    const found = store.live ? matricesOf(run).map((tensor) => tensor.name) : Object.keys(run.tiles);
    view.tensor = refillSelect(parts.tensors.input, found.map((name) => [name, name]), firstTensor(found, view.tensor));
  }
  const landscape = await picturesLandscape(parts.landscape, store, view);
  Object.assign(parts.act, {
    run: (id) => { view.run = id; view.kind = null; names(); store.select({run: id, tensor: view.tensor}); return load(); },
    tensor: (name) => { Object.assign(view, {tensor: name, row: 0, column: 0, kind: null}); store.select({run: view.run, tensor: name}); return load(); },
    row: (row) => { view.row = row; return loadSoon(view, load, 120); },
    column: (column) => { view.column = column; return loadSoon(view, load, 120); },
    bits: (at) => { view.kind = view.tile?.kinds[at] ?? null; picturesDraw(parts, view); landscape.show(view.kind, view.tile?.type); },
    spot: () => picturesSpot(parts, view),
    block: () => {
      if (!view.spot) return;
      store.select({run: view.run, tensor: view.tensor, row: view.tile.row + view.spot.row,
        block: Math.floor((view.tile.column + view.spot.column) / Math.max(1, view.tile.block))});
      document.getElementById("palette")?.scrollIntoView({block: "start"});
    },
  });
  names();
  await load();
  const themed = () => { if (view.tile) picturesDraw(parts, view); };
  window.addEventListener("dither-theme", themed);
  const end = store.onSelect(({run, tensor}) => {
    if ((!run || run === view.run) && (!tensor || tensor === view.tensor)) return;
    if (run && shelf.runs.some((each) => each.id === run)) {
      if (run !== view.run) view.kind = null;
      view.run = run;
    }
    parts.runs.input.value = view.run;
    if (tensor && tensor !== view.tensor) Object.assign(view, {row: 0, column: 0, kind: null});
    view.tensor = tensor ?? view.tensor;
    names();
    load();
  });
  return {
    async update(found) {
      const renewed = shelf.renew(found, parts.runs.input);
      if (!renewed) return false;
      if (!renewed.same) {
        names();
        await load();
      }
      return true;
    },
    destroy() { end(); window.removeEventListener("dither-theme", themed); },
  };
}

// Everything on the screen, not yet filled. `act` is what controls call; it is filled by mount.
function picturesParts(runs, view) {
  const act = {};
  const later = (name) => (value) => act[name]?.(value);
  const parts = {
    act, sentence: el("div", {}), message: el("p", {class: "work-note", role: "alert"}), readout: el("p", {class: "readout", role: "status"}),
    twin: el("div", {}), note: el("p", {class: "hint"}), landscape: el("div", {}),
    runs: runControl(runs, view.run, later("run")),
    tensors: selectControl({label: "Tensor", options: [], value: null, onInput: later("tensor")}),
    bits: sliderControl({label: "Stored as", min: 0, max: 0, value: 0, format: (at) => view.tile?.kinds[at] ?? "…", onInput: later("bits")}),
    row: sliderControl({label: "From row", min: 0, max: 0, step: 64, value: 0, onInput: later("row")}),
    column: sliderControl({label: "From column", min: 0, max: 0, step: 64, value: 0, onInput: later("column")}),
  };
  parts.controls = el("div", {class: "controls"}, parts.runs.node, parts.tensors.node, parts.bits.node, parts.row.node, parts.column.node);
  parts.canvases = {};
  parts.marks = {};
  parts.panels = el("div", {class: "panels"}, PICTURES_SIDES.map(([side, title]) => {
    const canvas = el("canvas", {class: "pixels", role: "img", width: 64, height: 64});
    const cursor = el("span", {class: "pixel-cursor", hidden: true});
    const stage = el("div", {class: "pixel-stage", tabindex: side === "original" ? 0 : -1, role: "application", "aria-roledescription": "picture of weights"}, canvas, cursor);
    picturesPointing(stage, view, later("spot"), later("block"));
    parts.canvases[side] = canvas;
    parts.marks[side] = {row: el("div", {class: "outlier-marks", "aria-hidden": "true"}), cursor};
    return el("figure", {class: "panel"}, el("figcaption", {}, title), parts.marks[side].row, stage);
  }));
  const button = (kind, save) => el("button", {type: "button", class: "small", "aria-label": `Save the weights as ${kind}`, on: {click: save}}, kind);
  parts.tools = el("div", {class: "tools"},
    button("PNG", async () => saveFile(`${view.tensor}-${view.kind}.png`, await picturesPng(parts, view))),
    button("SVG", () => saveFile(`${view.tensor}-${view.kind}.svg`, picturesSvg(parts, view))),
    button("CSV", () => saveFile(`${view.tensor}.csv`, new Blob([toCsv(picturesRows(view.tile), PICTURES_COLUMNS)], {type: "text/csv"}))));
  return parts;
}

function picturesDecoded(tile) {
  const kinds = Object.keys(tile.quantized);
  const rank = (kind) => { const at = PICTURES_TYPES.indexOf(kind); return at < 0 ? 10 * picturesBits(kind) : 10 * picturesBits(kind) + 1; };
  kinds.sort((a, b) => rank(b) - rank(a));
  return {...tile, kinds, original: decodeHalves(tile.original),
    quantized: Object.fromEntries(kinds.map((kind) => [kind, decodeHalves(tile.quantized[kind])]))};
}

// Bits as a type's name has them: Q4_K → 4, int8-g128 → 8, BF16 → 16.
function picturesBits(kind) {
  return Number(/\d+/.exec(kind)?.[0] ?? 0);
}

function picturesPlace(parts, view, tile) {
  const [rows, columns] = tile.shape?.length === 2 ? tile.shape : [tile.row + tile.rows, tile.column + tile.columns];
  for (const [slider, at, most] of [[parts.row, tile.row, rows - tile.rows], [parts.column, tile.column, columns - tile.columns]]) {
    slider.input.max = Math.max(0, most);
    slider.input.step = Math.max(1, Math.min(32, most));
    slider.set(at);
    slider.node.hidden = most <= 0 || !view.moves;
  }
}

// What each type loses in this window.
function picturesStatistics(tile, kind) {
  const given = tile.quantized[kind];
  let [squares, noise, most] = [0, 0, 0];
  for (let at = 0; at < given.length; at += 1) {
    const away = given[at] - tile.original[at];
    squares += tile.original[at] ** 2;
    noise += away ** 2;
    most = Math.max(most, Math.abs(away));
  }
  const relative = squares ? Math.sqrt(noise / squares) : 0;
  return {kind, rms: Math.sqrt(noise / given.length), relative, snr: noise ? 10 * Math.log10(squares / noise) : Infinity, most};
}

const PICTURES_COLUMNS = [
  {key: "kind", label: "stored as"}, {key: "rms", label: "RMS error", number: true, format: formatShort},
  {key: "relative", label: "relative error", number: true, format: (value) => formatPercent(value, 2)},
  {key: "snr", label: "signal to noise, dB", number: true, format: (value) => (value === Infinity ? "exact" : formatNumber(value, 1))},
  {key: "most", label: "largest error", number: true, format: formatShort},
];

function picturesRows(tile) {
  return tile.kinds.map((kind) => picturesStatistics(tile, kind));
}

function picturesValues(tile, side, kind) {
  if (side === "original") return tile.original;
  if (side === "quantized") return tile.quantized[kind];
  return tile.quantized[kind].map((value, at) => (value - tile.original[at]) * PICTURES_GAIN);
}

function picturesDraw(parts, view) {
  const {tile, kind} = view;
  const now = picturesStatistics(tile, kind);
  const own = kind === tile.type;
  const outliers = tile.outlier_columns.length;
  parts.sentence.replaceChildren(answerSentence(own ? "As the file stores it, " : "Stored as ", el("strong", {}, kind), ", these weights are ",
    el("strong", {}, now.relative ? formatPercent(now.relative, now.relative < 0.01 ? 2 : 1) : "0 %"), " away from the original",
    outliers ? `; ${outliers === 1 ? "one outlier column coarsens" : `${outliers} outlier columns coarsen`} the blocks around ${outliers === 1 ? "it" : "them"}.` : "."));
  const colors = divergingColors();
  for (const [side, title] of PICTURES_SIDES) {
    const canvas = parts.canvases[side];
    picturesPaint(canvas, tile, picturesValues(tile, side, kind), colors);
    canvas.setAttribute("aria-label", side === "difference" ? `${title} of ${view.tensor}, as ${kind}: ${formatPercent(now.relative, 2)} of its size`
      : `${title} weights ${tile.row} to ${tile.row + tile.rows - 1}, columns ${tile.column} to ${tile.column + tile.columns - 1}, of ${view.tensor}`);
    parts.marks[side].row.replaceChildren(...tile.outlier_columns.map((column) =>
      el("span", {style: {left: `${(100 * (column - tile.column + 0.5)) / tile.columns}%`}, title: `column ${column} stands out`}, "▼")));
  }
  const open = parts.twin.querySelector("details")?.open ?? false;
  parts.twin.replaceChildren(tableTwin(picturesRows(tile), PICTURES_COLUMNS, {open}));
  const marked = outliers ? `▼ marks columns three times as large as most: ${tile.outlier_columns.join(", ")}. ` : "";
  parts.note.textContent = `${marked}Colors end at ±${formatShort(tile.clip)}, which 99.5 % of these weights keep within; `
    + `the difference is always enlarged ${PICTURES_GAIN} times. ${tile.block > 1 ? `${tile.block} neighbors in a row share a scale. ` : ""}${noteText(tile.notes)}`;
  picturesSpot(parts, view);
}

function picturesPaint(canvas, tile, values, colors) {
  canvas.width = tile.columns;
  canvas.height = tile.rows;
  const context = canvas.getContext("2d");
  const image = context.createImageData(tile.columns, tile.rows);
  values.forEach((value, at) => {
    const color = mixColors(colors, tile.clip ? 0.5 + value / tile.clip / 2 : 0.5);
    image.data.set([...color.map(Math.round), 255], 4 * at);
  });
  context.putImageData(image, 0, 0);
}

// The pointer, or arrow keys, choose a weight; Enter goes to its block's palette.
function picturesPointing(stage, view, spot, block) {
  stage.addEventListener("pointermove", (event) => {
    if (!view.tile) return;
    const box = stage.getBoundingClientRect();
    view.spot = {
      row: Math.min(view.tile.rows - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * view.tile.rows))),
      column: Math.min(view.tile.columns - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * view.tile.columns))),
    };
    spot();
  });
  stage.addEventListener("click", block);
  stage.addEventListener("focus", () => { view.spot ??= {row: 0, column: 0}; spot(); });
  stage.addEventListener("keydown", (event) => {
    const moves = {ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0]};
    if (event.key === "Enter") block();
    else if (event.key in moves && view.tile) {
      const now = view.spot ?? {row: 0, column: 0};
      const [down, right] = moves[event.key];
      view.spot = {row: Math.min(view.tile.rows - 1, Math.max(0, now.row + down)), column: Math.min(view.tile.columns - 1, Math.max(0, now.column + right))};
      spot();
    } else return;
    event.preventDefault();
  });
}

function picturesSpot(parts, view) {
  const {tile, spot, kind} = view;
  for (const {cursor} of Object.values(parts.marks)) {
    cursor.hidden = !spot;
    if (!spot) continue;
    cursor.style.left = `${(100 * spot.column) / tile.columns}%`;
    cursor.style.top = `${(100 * spot.row) / tile.rows}%`;
    cursor.style.width = `${100 / tile.columns}%`;
    cursor.style.height = `${100 / tile.rows}%`;
  }
  if (!spot) {
    parts.readout.textContent = "Point at a weight, or walk there with the arrow keys; click or Enter shows the colors of its block.";
    return;
  }
  const at = spot.row * tile.columns + spot.column;
  const [before, after] = [tile.original[at], tile.quantized[kind][at]];
  parts.readout.textContent = `Row ${tile.row + spot.row}, column ${tile.column + spot.column}: ${formatShort(before)} became ${formatShort(after)} (${after >= before ? "+" : "−"}${formatShort(Math.abs(after - before))}).`;
}

// Three panels with their titles as one picture.
async function picturesPng(parts, view) {
  const scale = 6;
  const {rows, columns} = view.tile;
  const wide = columns * scale;
  const canvas = el("canvas", {width: 3 * wide + 64, height: rows * scale + 72});
  const context = canvas.getContext("2d");
  context.fillStyle = cssColor(themeColor("surface"));
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingEnabled = false;
  context.font = "15px sans-serif";
  PICTURES_SIDES.forEach(([side, title], index) => {
    const left = 16 + index * (wide + 16);
    context.fillStyle = cssColor(themeColor("ink"));
    context.fillText(side === "quantized" ? `${title} (${view.kind})` : title, left, 28);
    context.drawImage(parts.canvases[side], left, 40, wide, rows * scale);
  });
  context.fillStyle = cssColor(themeColor("muted"));
  context.fillText(`${view.tensor}, rows from ${view.tile.row}, columns from ${view.tile.column}`, 16, rows * scale + 62);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

// The same as SVG: the weights are small pictures in it, their titles are text.
function picturesSvg(parts, view) {
  const {rows, columns} = view.tile;
  const wide = columns * 6;
  const part = (name, words, text = "") => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(words)) made.setAttribute(key, value);
    made.textContent = text;
    return made;
  };
  const size = {width: 3 * wide + 64, height: rows * 6 + 72};
  const svg = part("svg", {...size, viewBox: `0 0 ${size.width} ${size.height}`, "font-family": "sans-serif", "font-size": 15});
  svg.append(part("rect", {...size, fill: cssColor(themeColor("surface"))}));
  PICTURES_SIDES.forEach(([side, title], index) => {
    const x = 16 + index * (wide + 16);
    svg.append(part("text", {x, y: 28, fill: cssColor(themeColor("ink"))}, side === "quantized" ? `${title} (${view.kind})` : title),
      part("image", {x, y: 40, width: wide, height: rows * 6, "image-rendering": "pixelated", preserveAspectRatio: "none",
        href: parts.canvases[side].toDataURL("image/png")}));
  });
  svg.append(part("text", {x: 16, y: rows * 6 + 62, fill: cssColor(themeColor("muted"))},
    `${view.tensor}, rows from ${view.tile.row}, columns from ${view.tile.column}`));
  return new Blob([new XMLSerializer().serializeToString(svg)], {type: "image/svg+xml"});
}

// The landscape through the same quantizer, once it is there. Returns {show(kind, own)}.
async function picturesLandscape(place, store, view) {
  view.moves = store.live;
  let picture = null;
  try {
    picture = await store.picture(PICTURES_TYPES);
  } catch { /* said below */ }
  if (!picture) {
    place.append(el("p", {class: "hint"}, "This report was written without the picture."));
    return {show() {}};
  }
  const canvases = [0, 1].map(() => el("canvas", {class: "pixels", role: "img", width: picture.columns, height: picture.rows}));
  const captions = [el("figcaption", {}, "A picture, before"), el("figcaption", {})];
  place.append(el("h3", {}, "The same quantizer on a picture"), el("div", {class: "panels two"}, canvases.map((canvas, index) =>
    el("figure", {class: "panel"}, captions[index], el("div", {class: "pixel-stage wide"}, canvas)))),
  el("p", {class: "hint"}, "Weights are not pixels: neighbors among them have nothing to do with each other, and a network forgives what an eye does not. "
    + "What carries over is how a block is rounded. The thin white beam is eight times as bright as white: look at what it does to the sky beside it."));
  const asked = new Map();
  picturesGray(canvases[0], picture, picture.original);
  canvases[0].setAttribute("aria-label", "A landscape: sun, hills, a lighthouse with a thin bright beam, water");
  return {
    async show(kind, own) {
      if (!kind) return;
      let pixels = picture.quantized[kind];
      if (!pixels && store.live) {
        if (!asked.has(kind)) asked.set(kind, store.picture([kind]).then((more) => more.quantized[kind], () => null));
        pixels = await asked.get(kind);
      }
      const stand = pixels ? kind : picturesNearest(Object.keys(picture.quantized), kind);
      picturesGray(canvases[1], picture, pixels ?? picture.quantized[stand]);
      captions[1].textContent = stand === kind ? `Through ${kind}${kind === own ? ", the file's own type" : ""}` : `Through ${stand} (${kind} cannot be drawn)`;
      canvases[1].setAttribute("aria-label", `The same landscape through ${stand}`);
    },
  };
}

async function picturesLandscapeOnly(root, store) {
  const place = el("div", {});
  root.append(place);
  const landscape = await picturesLandscape(place, store, {});
  await landscape.show("Q3_K", null);
}

function picturesNearest(kinds, kind) {
  return kinds.reduce((a, b) => (Math.abs(picturesBits(b) - picturesBits(kind)) < Math.abs(picturesBits(a) - picturesBits(kind)) ? b : a));
}

function picturesGray(canvas, picture, text) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(picture.columns, picture.rows);
  decodeBytes(text).forEach((gray, at) => image.data.set([gray, gray, gray, 255], 4 * at));
  context.putImageData(image, 0, 0);
}

function picturesExplanation() {
  return explanation("What RAW and JPEG have to do with it",
    "A camera's RAW file keeps every brightness it measured. A JPEG keeps a few per block of the picture, chosen so that you hardly notice, in a tenth of the space. "
    + "Quantizing does that to weights: a block of neighbors gets one scale, and every weight becomes the nearest of a few multiples of it.",
    el("p", {}, "Move “Stored as” towards fewer bits: the quantized panel becomes patchy, the difference fills up. Where one column is far larger than the others, its block's scale must "
      + "reach that far, and everything beside it is rounded coarsely: a smear in the difference. Which columns matter is what an ",
    glossaryTerm("importance matrix"), " or a ", glossaryTerm("calibration"), " finds out."));
}
