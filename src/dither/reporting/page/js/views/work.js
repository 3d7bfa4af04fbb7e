// Work: forms for jobs, the command each stands for, and the jobs there are.
//
// The forms come from the server (`dashboard/forms.py`), which also makes the command: what is shown is what
// will run. Jobs go on when the page is closed; they are read again when it is opened.

import {commandBlock, copyButton, el, emptyState, formatSeconds, segmentControl, uniqueId} from "../text.js";

export async function mount(root, store) {
  const list = jobList(store);
  const quiet = store.onMessage(async (message) => { // before asking: what happens in between is not told again
    if (message.type === "job") list.put(message.job);
    else if (message.type === "open") { // what happened to jobs while nobody listened
      const now = await store.get("/api/jobs").catch(() => []);
      for (const job of now.reverse()) list.put(job);
    }
  });
  const [forms, jobs] = await Promise.all([store.get("/api/forms"), store.get("/api/jobs")])
    .catch((problem) => { quiet(); throw problem; });
  const typed = {}; // by form, what was filled in, so that a look at another form loses nothing
  const place = el("div", {});
  const show = (kind) => place.replaceChildren(jobForm(forms.find((form) => form.kind === kind), typed, store, list));
  root.append(
    el("p", {class: "answer"}, "Start a job here and close the page if you like: it goes on, and is here when you come back."),
    segmentControl({label: "What to do", options: forms.map((form) => [form.kind, form.label]), value: forms[0].kind,
      onInput: show}).node,
    place, el("h3", {}, "Jobs"), list.node);
  show(forms[0].kind);
  list.fill(jobs);
  return {update: () => {}, destroy: quiet};
}

function jobForm(form, typed, store, list) {
  const values = (typed[form.kind] ??= {});
  const names = uniqueId("known");
  const problems = el("ul", {class: "work-wrong", "aria-live": "polite", hidden: true});
  const command = el("code", {});
  const wrong = new Map();
  let turn = 0;

  const check = async () => {
    const mine = ++turn;
    try {
      const found = await store.post("/api/command", {kind: form.kind, fields: values});
      if (mine !== turn) return null;
      command.textContent = found.command;
      return found.problems;
    } catch (error) {
      if (mine === turn) command.textContent = `(${error.message})`;
      return null;
    }
  };
  const mark = (found) => {
    for (const [name, {input, note}] of wrong) {
      const problem = found.find((one) => one.field === name);
      if (problem) input.setAttribute("aria-invalid", "true");
      else input.removeAttribute("aria-invalid");
      note.textContent = problem ? `This ${problem.reason}.` : "";
    }
    const others = found.filter((one) => !wrong.has(one.field));
    problems.replaceChildren(...others.map((one) => el("li", {},
      one.field === "target" ? `What to aim for ${one.reason}.` : `${one.field} ${one.reason}.`)));
    problems.hidden = others.length === 0;
  };
  const changed = (name, value) => {
    if (value === "" || value === false) delete values[name];
    else values[name] = value;
    check().then((found) => {
      if (found && node.dataset.tried) mark(found);
    });
  };
  const field = (one) => {
    const made = jobField(one, values[one.name], (value) => changed(one.name, value), names);
    wrong.set(one.name, made);
    return made.node;
  };

  const plain = form.fields.filter((one) => !one.more && !one.one_of);
  const targets = form.fields.filter((one) => one.one_of);
  const more = form.fields.filter((one) => one.more);
  const start = el("button", {type: "submit", class: "primary"}, "Start");
  const node = el("form", {novalidate: true, "aria-label": form.label},
    el("p", {class: "hint"}, form.says),
    el("div", {class: "work-form"},
      plain.slice(0, 1).map(field),
      targets.length ? jobTarget(targets, values, changed, wrong, names) : null,
      plain.slice(1).map(field),
      more.length ? el("details", {class: "work-more"}, el("summary", {}, "More options"),
        el("div", {class: "work-form"}, more.map(field))) : null),
    knownPlaces(names, store),
    problems,
    el("p", {class: "hint"}, "The same in a terminal"),
    el("div", {class: "command"}, el("pre", {tabindex: "0", role: "group", "aria-label": "Equivalent command"}, command),
      copyButton(() => command.textContent, "Copy the command")),
    start);
  node.addEventListener("submit", async (event) => {
    event.preventDefault();
    node.dataset.tried = "true";
    start.disabled = true;
    try {
      const found = await check();
      if (!found) return;
      mark(found);
      if (found.length) {
        (node.querySelector("[aria-invalid]") ?? start).focus();
        return;
      }
      const job = await store.post("/api/jobs", {kind: form.kind, fields: values});
      list.put(job);
      list.show(job.id);
    } catch (error) {
      problems.replaceChildren(el("li", {}, error.message));
      problems.hidden = false;
    } finally {
      start.disabled = false;
    }
  });
  check();
  return node;
}

// One of several things to aim for: a choice, and the field of what was chosen.
function jobTarget(targets, values, changed, wrong, names) {
  const place = el("div", {});
  const chosen = targets.find((one) => one.name in values) ?? targets[0];
  const show = (name) => {
    for (const one of targets) {
      wrong.delete(one.name);
      if (one.name !== name && one.name in values) changed(one.name, "");
    }
    const one = targets.find((each) => each.name === name);
    const made = jobField(one, values[name], (value) => changed(name, value), names);
    wrong.set(one.one_of, made);
    wrong.set(name, made);
    place.replaceChildren(made.node);
  };
  const select = el("select", {id: uniqueId("target")}, targets.map((one) =>
    el("option", {value: one.name, selected: one === chosen}, one.label)));
  select.addEventListener("change", () => show(select.value));
  show(chosen.name);
  return [el("div", {class: "work-field"}, el("label", {for: select.id}, "Aim for"), select), place];
}

function jobField(one, value, onInput, names) {
  const id = uniqueId("field");
  const note = el("p", {class: "work-note", id: `${id}-note`, "aria-live": "polite"});
  const hint = one.hint ? el("p", {class: "hint", id: `${id}-hint`}, one.hint) : null;
  const shared = {id, "aria-describedby": [hint ? `${id}-hint` : null, `${id}-note`].filter(Boolean).join(" ")};
  if (one.kind === "flag") {
    const input = el("input", {...shared, type: "checkbox", checked: value === true});
    input.addEventListener("change", () => onInput(input.checked));
    return {input, note, node: el("div", {class: "work-field"},
      el("div", {class: "work-check"}, input, el("label", {for: id}, one.label)), hint, note)};
  }
  const words = {...shared, placeholder: one.placeholder || null, autocomplete: "off", spellcheck: "false",
    autocapitalize: "off", required: one.required};
  let input;
  const known = one.kind === "name" && one.choices.length ? offered(`${id}-known`, one.choices) : null;
  if (one.kind === "choice") {
    input = el("select", shared, el("option", {value: ""}, "As it comes"),
      one.choices.map((choice) => el("option", {value: choice, selected: choice === value}, choice)));
  } else if (one.kind === "paths") {
    input = el("textarea", {...words, rows: 3, value: value ?? ""});
  } else {
    const list = known ? known.id : one.kind === "path" ? names : null;
    input = el("input", {...words, type: "text", list, value: value ?? "",
      inputmode: one.kind === "integer" ? "numeric" : one.kind === "number" ? "decimal" : null});
  }
  input.addEventListener(one.kind === "choice" ? "change" : "input", () => onInput(input.value.trim()));
  return {input, note, node: el("div", {class: `work-field${one.kind === "paths" ? " wide" : ""}`},
    el("label", {for: id}, one.label), input, known, hint, note)};
}

function offered(id, values) {
  return el("datalist", {id}, values.map((value) => el("option", {value})));
}

// The files this page already knows, offered where a path is typed.
function knownPlaces(id, store) {
  const found = store.getDocument();
  const paths = [found.reference?.path, ...found.runs.map((run) => run.path)].filter(Boolean);
  return offered(id, paths);
}

function jobList(store) {
  const node = el("div", {class: "jobs"});
  const nodes = new Map();
  const empty = emptyState("No job has been started yet.");
  const tidy = () => { if (nodes.size === 0) node.replaceChildren(empty); else empty.remove(); };
  const add = (job) => {
    const made = jobEntry(job, store);
    nodes.set(job.id, made);
    node.prepend(made.node);
    tidy();
  };
  const put = (job) => {
    const old = nodes.get(job.id);
    if (old) old.update(job);
    else add(job);
  };
  tidy();
  return {
    node, put,
    // The youngest first.  What a message has told of a job by now is younger than this list.
    fill: (jobs) => {
      for (const job of jobs) {
        if (!nodes.has(job.id)) add(job);
        node.append(nodes.get(job.id).node);
      }
    },
    show: (id) => nodes.get(id)?.node.scrollIntoView({block: "nearest"}),
  };
}

const JOB_STATES = {waiting: "Waiting", running: "Running", done: "Done", failed: "Failed", cancelled: "Cancelled"};

// One job; what changes is changed in place, so that focus and an opened log stay.
function jobEntry(first, store) {
  const state = el("span", {class: "job-state", role: "status"});
  const cancel = el("button", {type: "button", class: "small"}, "Cancel");
  const bar = el("progress", {max: 1, "aria-label": `Progress of ${first.kind}`});
  const words = el("p", {class: "hint"});
  const error = el("div", {class: "error", hidden: true});
  const log = el("pre", {tabindex: "0", role: "group", "aria-label": "Log"});
  const lines = el("details", {class: "job-lines"}, el("summary", {}, "Log"), log);
  const title = el("h4", {}, jobTitle(first));
  const node = el("article", {class: "job", "data-job": first.id, "aria-label": `${first.kind}, started from this page`},
    el("div", {class: "job-head"}, title, state, cancel),
    bar, words, error, commandBlock(first.command), lines);
  cancel.addEventListener("click", async () => {
    cancel.disabled = true;
    try {
      update(await store.post(`/api/jobs/${encodeURIComponent(first.id)}/cancel`));
    } catch (problem) {
      words.textContent = problem.message;
      cancel.disabled = false;
    }
  });

  let changed = 0;
  const update = (job) => {
    if (job.changed < changed) return; // an answer that was on its way when a younger message came
    changed = job.changed;
    const goes = job.state === "running" || job.state === "waiting";
    state.dataset.state = job.state;
    title.textContent = jobTitle(job);
    const said = job.cancelling ? "Ending" : JOB_STATES[job.state] ?? job.state;
    if (state.textContent !== said) state.textContent = said;
    cancel.hidden = !goes;
    cancel.disabled = job.cancelling;
    bar.hidden = job.state !== "running";
    if (job.progress.total > 0) bar.value = Math.min(1, job.progress.done / job.progress.total);
    else bar.removeAttribute("value");
    words.textContent = jobWords(job);
    error.hidden = !job.error;
    if (job.error) {
      error.replaceChildren(el("p", {}, el("strong", {}, job.error.thing), ` ${job.error.reason}.`),
        ...(job.error.way_out ? [el("p", {}, job.error.way_out)] : []));
    }
    log.textContent = job.lines.join("\n");
    lines.hidden = job.lines.length === 0;
  };
  update(first);
  return {node, update};
}

function jobTitle(job) {
  const kind = job.kind.charAt(0).toUpperCase() + job.kind.slice(1);
  return job.made ? `${kind}: ${job.made}` : kind;
}

function jobWords(job) {
  if (job.state === "waiting") return "Begins when the job before it has ended.";
  if (job.state === "running") {
    const {done, total, what} = job.progress;
    return [total > 0 ? `${Math.floor((100 * done) / total)} %` : "Beginning",
      job.eta_seconds === null ? null : `about ${formatSeconds(job.eta_seconds)} left`, what || null].filter(Boolean).join(" · ");
  }
  const took = job.started && job.ended ? formatSeconds(job.ended - job.started) : null;
  return [took ? `took ${took}` : null,
    job.ended ? new Date(1000 * job.ended).toLocaleString() : null].filter(Boolean).join(" · ");
}
