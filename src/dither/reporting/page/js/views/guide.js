// View 8, "Which method?": three questions, commands to copy, and why not the others.

import {mountTemplate} from "../template.js";
import {answerSentence, commandBlock, el, emptyState, explanation, formatBytes, formatCount, tagChip, uniqueId} from "../text.js";

export async function mount(root, store) {
  const found = store.getDocument();
  const guide = found?.guide;
  if (!guide?.answers) {
    root.append(emptyState("The guide is not part of this document.", "dither dashboard"));
    return null;
  }
  const state = Object.fromEntries(guide.questions.map((question) => [question.id, question.options[0].id]));
  const answer = answerSentence();
  answer.setAttribute("aria-live", "polite");
  const result = el("div", {});
  let current = found;
  const show = () => guideShow(guide, current, state, answer, result);
  root.append(answer, el("div", {class: "guide-questions"}, guide.questions.map((question) => guideQuestion(question, state, show))), result);
  show();
  const sums = el("div", {});
  root.append(el("h3", {}, "The methods beside each other"), guideTable(guide), el("p", {class: "hint"}, `Source: ${guide.source}. `, tagChip(guide.tag)),
    el("h3", {}, "How large will it be?"), sums, guideTopics(guide));
  let handle = await guideArithmetic(sums, store, guide, found);
  return {
    async update(changed) {
      const model = ({reference}) => reference?.path || reference?.name;
      const renamed = model(changed) !== model(current);
      const resized = guideSizes(changed) !== guideSizes(current);
      current = changed;
      if (renamed) show();
      if (!resized) return;
      handle?.destroy();
      sums.replaceChildren();
      handle = await guideArithmetic(sums, store, guide, changed);
    },
    destroy() { handle?.destroy(); },
  };
}

function guideQuestion(question, state, show) {
  const name = uniqueId("guide");
  return el("fieldset", {}, el("legend", {}, question.text), el("div", {class: "guide-options"}, question.options.map((option) =>
    el("label", {}, el("input", {type: "radio", name, value: option.id, checked: option.id === state[question.id], on: {
      change: () => { state[question.id] = option.id; show(); },
    }}), el("span", {class: "card"}, el("strong", {}, option.text), el("span", {}, option.hint))))));
}

function guideShow(guide, found, state, answer, result) {
  const path = guide.questions.map((question) => state[question.id]).join("/");
  const said = guide.answers[path];
  answer.replaceChildren("Take ", el("strong", {}, said.title), `. ${said.because}`);
  result.replaceChildren(
    el("h3", {}, "Do this"), guideSteps(said.steps, found),
    said.better.length ? el("p", {}, said.better_why) : "", said.better.length ? guideSteps(said.better, found) : "",
    el("h3", {}, "Why not the others"),
    el("dl", {class: "guide-out"}, said.ruled_out.map((entry) => el("div", {}, el("dt", {}, entry.method), el("dd", {}, entry.reason)))));
}

function guideSteps(steps, found) {
  return el("ol", {class: "guide-steps"}, steps.map((step) => el("li", {},
    el("p", {}, step.why, step.needs ? el("span", {class: "hint"}, ` Needs ${step.needs}.`) : null),
    commandBlock(guideCommand(step, found)))));
}

// MODEL in a command becomes the model of this page, quoted for the shell, or for Python.
export function guideCommand(step, found) {
  const name = found?.reference?.path || found?.reference?.name;
  if (!name) return step.command;
  if (step.kind === "python") return step.command.replace('"MODEL"', () => JSON.stringify(name));
  const plain = name.startsWith("-") ? `./${name}` : name;
  const quoted = /^[\w@%+=:,./-]+$/.test(plain) ? plain : `'${plain.replaceAll("'", `'"'"'`)}'`;
  return step.command.replace(/\bMODEL\b/, () => quoted);
}

function guideTable(guide) {
  const cell = ([text, mark]) => el("td", {},
    mark === "+" ? el("span", {class: "guide-mark for"}, "+", el("span", {class: "off-screen"}, " in its favor: ")) : null,
    mark === "-" ? el("span", {class: "guide-mark against"}, "−", el("span", {class: "off-screen"}, " against it: ")) : null, text);
  return el("div", {class: "scroll guide-methods", tabindex: "0", role: "region", "aria-label": "The methods beside each other"}, el("table", {},
    el("thead", {}, el("tr", {}, el("td", {}), guide.methods.map((method) => el("th", {scope: "col"}, method.method)))),
    el("tbody", {}, guide.factors.map((factor) => el("tr", {}, el("th", {scope: "row"}, factor.title), guide.methods.map((method) => cell(method[factor.id])))))));
}

// Parameters × bits ÷ 8 for this model, beside what its files weigh; and the well-known numbers for 7 B.
async function guideArithmetic(root, store, guide, found) {
  const {example, bits, rule, why} = guide.arithmetic;
  const parameters = found.reference?.parameters || found.runs[0]?.parameters || example;
  const known = parameters !== example;
  const [unit, unitName] = parameters >= 2e8 ? [1e9, "GB"] : [1e6, "MB"];
  const shown = (bytes) => `${(bytes / unit).toFixed(bytes / unit >= 10 ? 1 : 2)} ${unitName}`;
  const bars = bits.map((count) => ({label: `${count} bits`, kind: "parameters × bits ÷ 8", size: (parameters * count) / 8 / unit, shown: shown((parameters * count) / 8)}));
  const files = guideFiles(found);
  for (const run of files) bars.push({label: run.type, kind: "what the file weighs", size: run.bytes / unit, shown: shown(run.bytes)});
  const largest = Math.max(...bars.map((bar) => bar.size));
  const table = (count) => `${count / 1e9 >= 1 ? (count / 1e9).toString() : (count / 1e6).toFixed(1)}`;
  const sum = bits.map((count) => `${table((example * count) / 8)} GB at ${count} bits`).join(", ");
  root.append(el("p", {}, `${rule}. A model of 7 B parameters: ${sum}. `,
    known ? `This one has ${formatCount(parameters)} parameters:` : ""), el("div", {}));
  const handle = await mountTemplate(root.lastChild, await store.chart("arithmetic"), {
    name: "arithmetic", data: {bars}, label: `Sizes by arithmetic, and of real files: ${bars.map((bar) => `${bar.label}, ${bar.shown}`).join("; ")}`,
    columns: [{key: "label", label: "of"}, {key: "kind", label: "is"}, {key: "shown", label: "size", number: true}],
    fill: {x_title: `size, ${unitName} (10⁹ bytes)`.replace("10⁹", unit === 1e9 ? "10⁹" : "10⁶"), x_domain: [0, largest * 1.25], labels: bars.map((bar) => bar.label), plot_height: 32 * bars.length},
  });
  root.append(guideWhy(files, why));
  return handle;
}

// One file of about 8 and one of about 4 bits, to stand beside the arithmetic.
function guideFiles(found) {
  const runs = found.runs.filter((run) => run.bytes);
  const near = (bits) => [...runs].sort((a, b) => Math.abs(a.bpw - bits) - Math.abs(b.bpw - bits))[0];
  return [...new Set([near(8.5), near(4.8)].filter(Boolean))];
}

// What the arithmetic is drawn of, as one text.
function guideSizes(found) {
  return JSON.stringify([found.reference?.parameters, found.runs[0]?.parameters, guideFiles(found).map((run) => [run.id, run.bytes, run.mixed])]);
}

function guideWhy(files, why) {
  const run = files.at(-1);
  const total = run ? run.mixed.reduce((sum, [, , bytes]) => sum + bytes, 0) : 0;
  const bits = /\d/.exec(run?.type ?? "")?.[0];
  const made = bits && total ? el("p", {}, `${run.file} has ${bits} bits in its name, and ${run.bpw.toFixed(2)} per weight. It holds `,
    run.mixed.map(([type, tensors, bytes], index) => `${index ? ", " : ""}${tensors} tensors of ${type} (${guideShare(bytes / total)}, ${formatBytes(bytes)})`),
    ". ", tagChip("measured", true)) : null;
  return el("details", {class: "explain", open: true}, el("summary", {}, "Why a 4-bit file has more than 4 bits"), made, el("ul", {}, why.map((reason) => el("li", {}, reason))));
}

function guideShare(share) {
  return share < 0.005 ? "under 1 %" : `${(100 * share).toFixed(0)} %`;
}

function guideTopics(guide) {
  return el("div", {}, guide.topics.map((topic, index) => {
    const node = explanation(topic.title, topic.text);
    if (index > 2) node.removeAttribute("open");
    return node;
  }));
}
