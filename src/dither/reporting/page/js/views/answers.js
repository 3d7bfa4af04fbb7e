// "Does it answer differently?": both models on one prompt, side by side as they write, and both reading one text.
//
// Live, both are asked through the server; exported, recorded answers are shown, and may be replayed. The first
// token that differs is marked; what follows is compared again by its longest common subsequence, because after
// one different word a model goes on from a different text.

import {refillSelect, runControl} from "../inner.js";
import {answerSentence, el, emptyState, explanation, formatPercent, formatSeconds, formatShort, glossaryTerm, plural, segmentControl, selectControl, sliderControl} from "../text.js";
import {saveFile, tableTwin, toCsv} from "../chart.js";

const ANSWERS_LONGEST = 700; // tokens of each side that are compared

export async function mount(root, store) {
  const all = store.getDocument().runs ?? [];
  const able = store.live && store.getDocument().reference?.path;
  const askable = (found) => found.runs.filter((run) => able || run.answers?.length || run.forced?.length);
  let runs = askable(store.getDocument());
  if (!runs.length) {
    const file = all[0]?.file ?? "FILE";
    root.append(emptyState(all.length ? "No answers were recorded, and the original was not found, so neither can be asked here." : "No file was found that could be asked anything.",
      `dither answers ${/^[\w.-]+$/.test(file) ? file : "FILE"} --against MODEL`), answersExplanation());
    return {};
  }
  const chosen = store.selection();
  const recorded = runs.find((run) => run.answers?.length || run.forced?.length);
  const view = {run: (runs.find((run) => run.id === chosen.run) ?? recorded ?? runs.at(-1)).id, mode: "answers"};
  const bodies = {answers: el("div", {}), forced: el("div", {hidden: true})};
  const picker = runControl(runs, view.run, (id) => { view.run = id; store.select({run: id}); show(); });
  const modes = segmentControl({label: "Compare", options: [["answers", "Their answers"], ["forced", "What they expect in a text"]], value: view.mode, onInput: (mode) => {
    view.mode = mode;
    for (const [name, body] of Object.entries(bodies)) body.hidden = name !== mode;
  }});
  root.append(el("div", {class: "controls"}, picker.node, modes.node), bodies.answers, bodies.forced, answersExplanation());
  let stops = [];
  const run = () => runs.find((each) => each.id === view.run);
  function show() {
    const typed = [...root.querySelectorAll("textarea")].filter((area) => area.value !== area.defaultValue).map(({id, value}) => [id, value]);
    for (const stop of stops) stop();
    stops = [answersSide(bodies.answers, run(), store, able), forcedSide(bodies.forced, run(), store, able)];
    for (const [id, value] of typed) { // another file, the same question
      const area = root.querySelector(`#${id}`);
      if (area) area.value = value;
    }
  }
  show();
  const end = store.onSelect((selected) => {
    if (!selected.run || selected.run === view.run || !runs.some((each) => each.id === selected.run)) return;
    view.run = selected.run;
    picker.input.value = view.run;
    show();
  });
  return {
    update(found) {
      const now = askable(found);
      if (!now.length || able !== (store.live && found.reference?.path)) return false;
      const before = run();
      runs = now;
      view.run = refillSelect(picker.input, runs.map((each) => [each.id, each.file]), view.run);
      const told = (one) => JSON.stringify([one.id, one.answers, one.forced]);
      if (told(before) !== told(run())) show(); // else a prompt that is typed, an answer that comes, stay
      return true;
    },
    destroy() { end(); for (const stop of stops) stop(); },
  };
}

// Prompt, two columns, sentence. Returns what ends a stream that still runs.
function answersSide(body, run, store, able) {
  const sentence = el("div", {role: "status"});
  const columns = el("div", {class: "pair answers-pair"});
  const twin = el("div", {});
  const error = el("p", {class: "work-note", role: "alert"});
  let ended = () => {};
  const finish = (answer) => {
    sentence.replaceChildren(answerSentence(...answersSentence(answer)));
    columns.replaceChildren(...answersColumns(answer));
    twin.replaceChildren(answersTools(run, answer), tableTwin(answersRows(answer), ANSWERS_COLUMNS));
  };
  const replay = (answer) => {
    ended();
    const length = Math.max(answer.original.tokens.length, answer.quantized.tokens.length);
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) { finish(answer); return; }
    let at = 0;
    const timer = setInterval(() => {
      at += 1;
      columns.replaceChildren(...answersPlain(answer.original.tokens.slice(0, at), answer.quantized.tokens.slice(0, at)));
      if (at >= length) { clearInterval(timer); finish(answer); }
    }, 45);
    ended = () => clearInterval(timer);
  };
  const parts = [];
  const answers = run.answers ?? [];
  if (answers.length) {
    const select = selectControl({label: "Recorded prompts", options: answers.map((answer, at) => [String(at), answersShort(answer.prompt)]), value: "0",
      onInput: (at) => { ended(); finish(answers[at]); }});
    const again = el("button", {type: "button", on: {click: () => replay(answers[select.input.value])}}, "Replay");
    parts.push(el("div", {class: "answers-recorded"}, select.node, again));
  }
  if (able) parts.push(answersForm(run, store, {columns, sentence, twin, error, finish, start: (stop) => { ended(); ended = stop; }}));
  if (!parts.length) parts.push(emptyState(`No answers of ${run.file} were recorded.`, `dither answers ${/^[\w.-]+$/.test(run.file) ? run.file : "FILE"} --against MODEL`));
  body.replaceChildren(sentence, ...parts, error, columns, twin);
  if (answers.length) finish(answers[0]);
  return () => ended();
}

// The live prompt: both models write at once.
function answersForm(run, store, act) {
  const text = el("textarea", {rows: 2, id: "answers-prompt", maxlength: 8000, placeholder: "Once upon a time"});
  const length = sliderControl({label: "Longest answer", min: 16, max: 256, step: 16, value: 64, format: (count) => `${count} tokens`});
  const ask = el("button", {type: "submit", class: "primary"}, "Ask both");
  const stop = el("button", {type: "button", hidden: true}, "Stop");
  const form = el("form", {class: "answers-form"}, el("label", {for: "answers-prompt"}, "Ask both models"), text,
    el("div", {class: "answers-buttons"}, length.node, ask, stop));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const prompt = text.value.trim() ? text.value : text.placeholder;
    const abort = new AbortController();
    const written = {original: [], quantized: []};
    act.start(() => abort.abort());
    stop.onclick = () => abort.abort();
    ask.disabled = true;
    stop.hidden = false;
    act.error.textContent = "";
    act.twin.replaceChildren();
    act.sentence.replaceChildren(answerSentence("Both models are being opened …"));
    act.columns.replaceChildren(...answersPlain([], []));
    let answer = null;
    try {
      await store.stream("/api/answer", {run: run.id, prompt, max_tokens: Number(length.input.value)}, (piece) => {
        if (piece.error) throw new Error(`${piece.error.thing}: ${piece.error.reason}. ${piece.error.way_out}`);
        if (piece.done) { answer = piece.answer ?? null; return; }
        written[piece.side]?.push(piece.text);
        act.sentence.replaceChildren(answerSentence("Both models are answering …"));
        act.columns.replaceChildren(...answersPlain(written.original, written.quantized));
      }, abort.signal);
    } catch (error) {
      if (error.name !== "AbortError") act.error.textContent = error.message;
    }
    ask.disabled = false;
    stop.hidden = true;
    if (written.original.length + written.quantized.length || answer) act.finish(answer ?? answersMade(prompt, written));
    else act.sentence.replaceChildren();
  });
  return form;
}

function answersMade(prompt, written) {
  const side = (tokens) => ({tokens, seconds: Number.NaN});
  return {prompt, original: side(written.original), quantized: side(written.quantized), first_divergence: answersApart(written.original, written.quantized)};
}

function answersApart(left, right) {
  const at = left.findIndex((token, index) => token !== right[index]);
  return at >= 0 ? at : left.length === right.length ? null : left.length;
}

function answersShort(prompt) {
  const line = prompt.replaceAll("\n", " ⏎ ");
  return line.length > 70 ? `${line.slice(0, 69)}…` : line;
}

function answersSentence(answer) {
  const at = answer.first_divergence;
  if (at === null || at === undefined) return [el("strong", {}, "Both answer alike"), `, ${plural(answer.original.tokens.length, "token")} long.`];
  const [left, right] = [answer.original, answer.quantized].map((side) => side.tokens[at]);
  const said = (token) => (token === undefined ? "ends" : `says “${token.trim() || "a new line"}”`);
  const steps = answersDiff(answer.original.tokens, answer.quantized.tokens);
  const kept = steps.filter((step) => step.kind === "same").length;
  return ["The answers part at ", el("strong", {}, `token ${at + 1}`), `: the original ${said(left)}, the quantized ${said(right)}. `,
    `${formatPercent(kept / Math.max(1, answer.original.tokens.length), 0)} of the original's tokens stand in both, in the same order.`];
}

function answersPlain(original, quantized) {
  return [["Original", original], ["Quantized", quantized]].map(([title, tokens]) =>
    el("figure", {class: "answer-side"}, el("figcaption", {}, title), el("p", {class: "written"}, tokens.join(""), el("span", {class: "caret", "aria-hidden": "true"}, "▏"))));
}

// Both sides, what they share as it is, what only one has marked by an underline or a strike and a sign.
function answersColumns(answer) {
  const steps = answersDiff(answer.original.tokens, answer.quantized.tokens);
  return [["Original", "original", "gone"], ["Quantized", "quantized", "come"]].map(([title, side, own]) => {
    const written = el("p", {class: "written"});
    let at = 0;
    let open = null;
    for (const step of steps) {
      if (step.kind !== "same" && step.kind !== own) continue;
      if (at === answer.first_divergence) {
        written.append(el("span", {class: "parting", title: "Here the answers part"}, "▸", el("span", {class: "off-screen"}, " here the answers part: ")));
        open = null;
      }
      if (step.kind === "same") { written.append(step.text); open = null; }
      else {
        if (!open) { open = el(own === "gone" ? "del" : "ins", {}); written.append(open); }
        open.append(step.text);
      }
      at += 1;
    }
    if (answer.first_divergence === at) written.append(el("span", {class: "parting", title: "Here the answers part"}, "▸"));
    const seconds = answer[side].seconds;
    return el("figure", {class: "answer-side"}, el("figcaption", {}, title, el("span", {class: "hint"},
      ` ${plural(answer[side].tokens.length, "token")}${Number.isFinite(seconds) && seconds > 0 ? ` in ${formatSeconds(seconds)}` : ""}`)), written);
  });
}

// Longest common subsequence of two lists of tokens, as steps: same, gone (only left), come (only right).
function answersDiff(leftAll, rightAll) {
  const left = leftAll.slice(0, ANSWERS_LONGEST);
  const right = rightAll.slice(0, ANSWERS_LONGEST);
  const width = right.length + 1;
  const best = new Uint16Array((left.length + 1) * width);
  for (let i = left.length - 1; i >= 0; i -= 1) {
    for (let j = right.length - 1; j >= 0; j -= 1) {
      best[i * width + j] = left[i] === right[j] ? best[(i + 1) * width + j + 1] + 1 : Math.max(best[(i + 1) * width + j], best[i * width + j + 1]);
    }
  }
  const steps = [];
  let [i, j] = [0, 0];
  while (i < left.length || j < right.length) {
    if (i < left.length && j < right.length && left[i] === right[j]) { steps.push({kind: "same", text: left[i]}); i += 1; j += 1; }
    else if (j >= right.length || (i < left.length && best[(i + 1) * width + j] >= best[i * width + j + 1])) { steps.push({kind: "gone", text: left[i]}); i += 1; }
    else { steps.push({kind: "come", text: right[j]}); j += 1; }
  }
  for (const text of leftAll.slice(ANSWERS_LONGEST)) steps.push({kind: "gone", text});
  for (const text of rightAll.slice(ANSWERS_LONGEST)) steps.push({kind: "come", text});
  return steps;
}

const ANSWERS_COLUMNS = [{key: "place", label: "token", number: true}, {key: "original", label: "original"}, {key: "quantized", label: "quantized"}, {key: "same", label: "same"}];

function answersRows(answer) {
  const [left, right] = [answer.original.tokens, answer.quantized.tokens];
  return Array.from({length: Math.max(left.length, right.length)}, (_, at) => ({
    place: at + 1, original: left[at] ?? "", quantized: right[at] ?? "", same: left[at] === right[at] ? "yes" : "no"}));
}

function answersTools(run, answer) {
  return el("div", {class: "tools"}, el("button", {type: "button", class: "small", "aria-label": "Save both answers as CSV", on: {click: () =>
    saveFile(`${run.file}-answers.csv`, new Blob([toCsv(answersRows(answer), ANSWERS_COLUMNS)], {type: "text/csv"}))}}, "CSV"));
}

// The teacher-forced side: a text, underlined by how far apart the two expectations are.
function forcedSide(body, run, store, able) {
  const sentence = el("div", {role: "status"});
  const place = el("div", {});
  const error = el("p", {class: "work-note", role: "alert"});
  let turn = 0;
  const finish = (forced) => {
    sentence.replaceChildren(answerSentence(...forcedSentence(forced)));
    place.replaceChildren(forcedText(forced), forcedLegend(), forcedTools(run, forced), tableTwin(forcedRows(forced), FORCED_COLUMNS));
  };
  const parts = [];
  const texts = run.forced ?? [];
  if (texts.length > 1) {
    parts.push(selectControl({label: "Recorded texts", options: texts.map((each, at) => [String(at), answersShort(each.text ?? "")]), value: "0", onInput: (at) => finish(texts[at])}).node);
  }
  if (able) {
    const text = el("textarea", {rows: 3, id: "forced-text", maxlength: 8000}, texts[0]?.text?.slice(0, 400) ?? "The sea was quiet, and the old man slept in the boat until the morning came.");
    const read = el("button", {type: "submit", class: "primary"}, "Let both read it");
    const form = el("form", {class: "answers-form"}, el("label", {for: "forced-text"}, "A text for both models to read"), text, el("div", {class: "answers-buttons"}, read));
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const mine = ++turn;
      error.textContent = "";
      read.disabled = true;
      sentence.replaceChildren(answerSentence("Both models are reading …"));
      try {
        const found = await store.post("/api/forced", {run: run.id, text: text.value});
        if (mine === turn) finish(found);
      } catch (failed) {
        if (mine === turn) { sentence.replaceChildren(); error.textContent = failed.message; }
      }
      read.disabled = false;
    });
    parts.push(form);
  }
  if (!parts.length && !texts.length) parts.push(emptyState(`No text was read by ${run.file}.`, `dither answers ${/^[\w.-]+$/.test(run.file) ? run.file : "FILE"} --against MODEL --text TEXT`));
  body.replaceChildren(sentence, ...parts, error, place);
  if (texts.length) finish(texts[0]);
  return () => { turn += 1; };
}

const FORCED_STEPS = [0.02, 0.1, 0.5]; // nats at which the underline grows

function forcedStep(kl) {
  return kl === null || kl === undefined ? 0 : FORCED_STEPS.filter((limit) => kl >= limit).length;
}

function forcedScored(forced) {
  return forced.tokens.filter((token) => Number.isFinite(token.kl));
}

function forcedSentence(forced) {
  const scored = forcedScored(forced);
  if (!scored.length) return ["This text is too short to compare."];
  const mean = scored.reduce((sum, token) => sum + token.kl, 0) / scored.length;
  const worst = scored.reduce((a, b) => (b.kl > a.kl ? b : a));
  const same = scored.filter((token) => token.same_top).length / scored.length;
  return ["Reading the same ", plural(scored.length, "token"), ", both expect the same next one in ", el("strong", {}, formatPercent(same, 0)), " of places; their expectations are ",
    el("strong", {}, `${formatShort(mean)} nats`), " apart on average, furthest before “", worst.text.trim() || "⏎", `” (${formatShort(worst.kl)}).`];
}

// Tokens as buttons of which one is in the tab order; arrow keys walk, and what both expected stands below.
function forcedText(forced) {
  const detail = el("div", {class: "forced-detail", "aria-live": "polite"}, el("p", {class: "hint"}, "Point at a token, or walk there with the arrow keys, to see what both models expected in its place."));
  const buttons = forced.tokens.map((token, at) => {
    const kl = Number.isFinite(token.kl) ? `KL ${formatShort(token.kl)} nats` : "not scored, nothing precedes it";
    const button = el("button", {type: "button", class: `token kl-${forcedStep(token.kl)}${token.same_top ? "" : " turned"}`, tabindex: at === 0 ? 0 : -1,
      title: `${kl}${token.same_top ? "" : "; another token likeliest"}`, "aria-label": `${token.text.trim() || "new line"}, ${kl}${token.same_top ? "" : ", another token likeliest"}`}, token.text.replaceAll("\n", "⏎\n"));
    const look = () => detail.replaceChildren(...forcedDetail(token));
    button.addEventListener("pointerenter", look);
    button.addEventListener("focus", look);
    return button;
  });
  const text = el("div", {class: "forced-text", role: "group", "aria-label": "The text, token by token"}, buttons);
  text.addEventListener("keydown", (event) => {
    const at = buttons.indexOf(document.activeElement);
    const to = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: buttons.length - 1}[event.key];
    if (at < 0 || to === undefined || !buttons[to]) return;
    buttons[at].tabIndex = -1;
    buttons[to].tabIndex = 0;
    buttons[to].focus();
    event.preventDefault();
  });
  return el("div", {}, text, detail);
}

function forcedDetail(token) {
  if (!Number.isFinite(token.kl)) return [el("p", {class: "hint"}, "Nothing precedes the first token, so nothing was expected.")];
  const side = (title, top) => el("div", {}, el("h4", {}, title), el("ol", {class: "expected"}, top.map(([word, share]) => el("li", {},
    el("span", {class: "expected-bar", style: {width: `${(100 * share).toFixed(1)}%`}, "aria-hidden": "true"}),
    el("span", {}, word.replaceAll("\n", "⏎").trim() || "␣", word === token.text ? el("span", {class: "hint"}, " (what came)") : null), el("span", {class: "number"}, formatPercent(share))))));
  return [el("p", {}, "Before “", el("strong", {}, token.text.trim() || "⏎"), `”: KL ${formatShort(token.kl)} nats. `,
    token.same_top ? "Both find the same token likeliest." : "They find different tokens likeliest."),
  el("div", {class: "pair"}, side("The original expected", token.top_original), side("The quantized file expected", token.top_quantized))];
}

function forcedLegend() {
  const steps = [`below ${FORCED_STEPS[0]}`, `from ${FORCED_STEPS[0]}`, `from ${FORCED_STEPS[1]}`, `from ${FORCED_STEPS[2]} nats`];
  return el("p", {class: "hint forced-legend"}, "Underline: ", steps.map((words, step) => el("span", {class: `token kl-${step}`}, words)), el("span", {class: "token turned"}, "another token likeliest"));
}

const FORCED_COLUMNS = [{key: "place", label: "token", number: true}, {key: "text", label: "text"}, {key: "kl", label: "KL, nats", number: true, format: formatShort},
  {key: "original", label: "original expects"}, {key: "quantized", label: "quantized expects"}];

function forcedRows(forced) {
  const top = (list) => (list[0] ? `${list[0][0].trim() || "⏎"} (${formatPercent(list[0][1])})` : "");
  return forced.tokens.map((token, at) => ({place: at + 1, text: token.text, kl: token.kl, original: top(token.top_original), quantized: top(token.top_quantized)}));
}

function forcedTools(run, forced) {
  return el("div", {class: "tools"}, el("button", {type: "button", class: "small", "aria-label": "Save the divergences as CSV", on: {click: () =>
    saveFile(`${run.file}-text.csv`, new Blob([toCsv(forcedRows(forced), FORCED_COLUMNS)], {type: "text/csv"}))}}, "CSV"));
}

function answersExplanation() {
  return explanation("Why the answers part, and what that means",
    "A model writes one token at a time, and here always the likeliest. Where two tokens are nearly equally likely, the smallest rounding can tip the balance, and from then on both models "
      + "go on from different texts. So an early parting alone says little: look at whether what follows still makes sense.",
    el("p", {}, "The fair comparison is the other one: both read the ", el("em", {}, "same"), " text, and at every token we compare what they expected next. The ",
      glossaryTerm("KL divergence"), " there is 0 where they agree; a thick underline is a place where the quantized file would have hesitated, or chosen otherwise."));
}
