// Words, numbers and elements. Everything that comes from a file is inserted as text, never as markup:
// `el` is the only way the page makes elements, and it knows no innerHTML.

// el("p", {class: "answer"}, "some ", el("strong", {}, name)); children: strings, numbers, nodes, null, arrays.
// Attributes are set as attributes; `on` holds listeners: el("button", {on: {click: …}}, "Go").
export function el(tag, attributes, ...children) {
  return fillElement(document.createElement(tag), attributes, children);
}

// The same for SVG.
export function svgEl(tag, attributes, ...children) {
  return fillElement(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fillElement(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    } else if (/^on/i.test(name) || name === "srcdoc") {
      throw new Error(`an attribute ${name} would run text as code`);
    } else if (name === "style") {
      for (const [property, set] of Object.entries(value)) node.style.setProperty(property, set);
    } else if (name === "value") {
      node.value = value;
      if (node.tagName !== "TEXTAREA" && node.tagName !== "SELECT") node.setAttribute("value", value);
    } else if ((name === "href" || name === "src") && !/^(#|\/(?!\/)|https?:|data:|blob:)/i.test(String(value))) {
      continue; // javascript: and the like
    } else {
      node.setAttribute(name, value === true ? "" : String(value));
    }
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false)
    .map((child) => (child instanceof Node ? child : String(child))));
  return node;
}

// Sizes as `dither.units` writes them: 999 B, 4.00 MiB, 93.8 MiB.
export function formatBytes(count) {
  if (!Number.isFinite(count)) return "–";
  let size = count;
  let unit = "B";
  for (const larger of ["KiB", "MiB", "GiB", "TiB"]) {
    if (Math.abs(size) < 1024) break;
    size /= 1024;
    unit = larger;
  }
  if (unit === "B") return `${size.toFixed(0)} B`;
  return `${size.toFixed(size < 10 ? 2 : size < 100 ? 1 : 0)} ${unit}`;
}

// Counts as `dither.units` writes them: 134.5 M, 8.0 B, 950.
export function formatCount(count) {
  if (!Number.isFinite(count)) return "–";
  for (const [factor, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(count) >= factor) return `${(count / factor).toFixed(1)} ${unit}`;
  }
  return count.toFixed(0);
}

// 0.4 s, 1 min 15 s, 2 h 1 min.
export function formatSeconds(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return `${minutes} min ${whole % 60} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// Three digits that count: 0.00954, 9.4e-5, 1.50, 0; for KL divergences, errors and ratios.
export function formatShort(value) {
  if (!Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  if (Math.abs(value) < 0.0005) return value.toExponential(1);
  return value.toPrecision(Math.abs(value) >= 1000 ? 4 : 3);
}

// A share as percent: 0.9731 → 97.3 %.
export function formatPercent(share, digits = 1) {
  return Number.isFinite(share) ? `${(100 * share).toFixed(digits)} %` : "–";
}

export function formatNumber(value, digits = 2) {
  return Number.isFinite(value) ? value.toFixed(digits) : "–";
}

// A metric {value, low, high} as "0.0123 (0.0117 … 0.0130)".
export function formatInterval(metric, format = formatShort) {
  if (!metric) return "–";
  if (!Number.isFinite(metric.low) || !Number.isFinite(metric.high)) return format(metric.value);
  return `${format(metric.value)} (${format(metric.low)} … ${format(metric.high)})`;
}

export function plural(count, one, many = `${one}s`) {
  return `${count} ${count === 1 ? one : many}`;
}

// "a", "a and b", "a, b and c".
export function joinWords(words) {
  return words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`;
}

// Where a number comes from: a small label beside it. Measured numbers carry none unless asked.
export function tagChip(tag, always = false) {
  if (!tag || (tag === "measured" && !always)) return null;
  const words = {measured: "measured", estimated: "estimate", literature: "literature"};
  return el("span", {class: `tag tag-${words[tag] ? tag : "estimated"}`}, words[tag] ?? "estimate");
}

// The one sentence above a chart. `parts` as for `el`; the text is what charts use as their label.
export function answerSentence(...parts) {
  return el("p", {class: "answer"}, ...parts);
}

// What a newcomer reads beside a chart, open at first. Paragraphs are strings or nodes.
export function explanation(title, ...paragraphs) {
  return el("details", {class: "explain", open: true}, el("summary", {}, title),
    ...paragraphs.map((paragraph) => (paragraph instanceof Node ? paragraph : el("p", {}, paragraph))));
}

// A word of the glossary, linked: glossaryTerm("KL divergence") → #term-kl-divergence.
export function glossaryTerm(word, shown = word) {
  return el("a", {class: "term", href: `#${glossaryId(word)}`}, shown);
}

export function glossaryId(word) {
  return `term-${String(word).toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "")}`;
}

// A command, with a button that copies it.
export function commandBlock(command, label = "Copy the command") {
  const code = el("code", {}, command);
  return el("div", {class: "command"}, el("pre", {tabindex: "0", role: "group", "aria-label": "Command"}, code),
    copyButton(() => code.textContent, label));
}

export function copyButton(text, label = "Copy") {
  const button = el("button", {type: "button", class: "small", "aria-label": label}, "Copy");
  button.addEventListener("click", async () => {
    const copied = await copyText(text());
    button.textContent = copied ? "Copied" : "Press Ctrl+C";
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  });
  return button;
}

async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { // no permission, or a page from disk
    const area = el("textarea", {class: "off-screen", "aria-hidden": "true"});
    area.value = text;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    return copied;
  }
}

// What stands where there is nothing to show yet, and the command that fills it.
export function emptyState(sentence, command = null) {
  return el("div", {class: "empty"}, el("p", {}, sentence), command ? commandBlock(command) : null);
}

let textCounter = 0;
export function uniqueId(prefix = "id") {
  textCounter += 1;
  return `${prefix}-${textCounter}`;
}

// A labelled slider: {label, min, max, step, value, format, onInput}. Returns {node, input, set(value)}.
export function sliderControl({label, min, max, step = 1, value, format = String, onInput = () => {}}) {
  const id = uniqueId("slider");
  const input = el("input", {type: "range", id, min, max, step, value});
  const output = el("output", {for: id}, format(Number(value)));
  const show = () => {
    output.textContent = format(Number(input.value));
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.addEventListener("input", () => { show(); onInput(Number(input.value)); });
  show();
  const node = el("div", {class: "control"}, el("label", {for: id}, label), input, output);
  return {node, input, set: (to) => { input.value = to; show(); }};
}

// A labelled choice: {label, options: [[value, shown], …], value, onInput}. Returns {node, input}.
export function selectControl({label, options, value, onInput = () => {}}) {
  const id = uniqueId("select");
  const input = el("select", {id}, options.map(([key, shown]) =>
    el("option", {value: key, selected: key === value}, shown)));
  input.addEventListener("change", () => onInput(input.value));
  return {node: el("div", {class: "control"}, el("label", {for: id}, label), input), input};
}

// A row of exclusive choices (radio buttons that look like one): same arguments as selectControl.
export function segmentControl({label, options, value, onInput = () => {}}) {
  const name = uniqueId("segment");
  const buttons = options.map(([key, shown]) => el("label", {},
    el("input", {type: "radio", name, value: key, checked: key === value, on: {change: () => onInput(key)}}),
    el("span", {}, shown)));
  return {node: el("fieldset", {class: "segments"}, el("legend", {}, label), el("div", {}, buttons))};
}
