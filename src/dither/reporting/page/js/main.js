// Starts the page: theme, sections, live reload.
//
// A view is a module with `async function mount(root, store)`. It fills `root`, and may return {update(document)},
// which is called when a new document arrives and keeps what a person has set. A view is mounted anew where it has no
// `update`, or where that returns false because the new document needs other controls.

import {createStore, hideToken} from "./store.js";
import {el, emptyState, formatBytes, formatCount, plural} from "./text.js";

const MAIN_VIEWS = {
  which: () => import("./views/which.js"),
  fits: () => import("./views/fits.js"),
  inside: () => import("./views/inside.js"),
  pictures: () => import("./views/pictures.js"),
  palette: () => import("./views/palette.js"),
  answers: () => import("./views/answers.js"),
  speed: () => import("./views/speed.js"),
  guide: () => import("./views/guide.js"),
  work: () => import("./views/work.js"),
  glossary: () => import("./views/glossary.js"),
};

export async function startPage() {
  hideToken();
  startTheme();
  const store = createStore();
  for (const node of document.querySelectorAll("[data-live]")) if (!store.live) node.remove();
  try {
    await store.load();
  } catch (error) {
    document.getElementById("empty").replaceChildren(emptyState(`The results could not be read. ${error.message}`));
    return;
  }
  showLead(store);
  followSections();
  const mounted = new Map();
  await mountAll(store, mounted);
  arriveAtHash();
  let turn = Promise.resolve(); // one document after the other: two mountings of a view would mix
  store.subscribe(() => {
    turn = turn.then(async () => {
      showLead(store);
      for (const [name, view] of [...mounted]) await refreshView(name, view, store, mounted);
    });
  });
  store.listen((heard) => showState(store, heard));
  showState(store, true);
  document.documentElement.dataset.ready = "true";
}

// The section the address names comes first, then the others from the top.
async function mountAll(store, mounted) {
  const first = location.hash.slice(1);
  const names = Object.keys(MAIN_VIEWS).sort((a, b) => (b === first) - (a === first));
  for (const name of names) if (document.getElementById(name)) await mountView(name, store, mounted);
}

async function mountView(name, store, mounted) {
  const root = document.querySelector(`[data-view="${name}"]`);
  const state = {subscribed: false, handle: null};
  const own = Object.assign(Object.create(store), {
    subscribe(listener) { state.subscribed = true; return store.subscribe(listener); },
  });
  root.replaceChildren();
  try {
    const view = await MAIN_VIEWS[name]();
    state.handle = (await view.mount(root, own)) ?? null;
  } catch (error) {
    console.error(error);
    root.replaceChildren(emptyState(`This part of the page failed: ${error.message}`));
  }
  mounted.set(name, state);
}

async function refreshView(name, state, store, mounted) {
  try {
    if (state.handle?.update && (await state.handle.update(store.getDocument())) !== false) return;
  } catch (error) {
    console.error(error);
  }
  if (state.subscribed) return;
  state.handle?.destroy?.();
  await mountView(name, store, mounted);
}

// Title, the sentence under it, refused files, and what to do where there is nothing at all.
function showLead(store) {
  const found = store.getDocument();
  const {reference, runs = [], problems = []} = found;
  document.title = `${found.title || "Dither"} · Dither`;
  document.getElementById("title").textContent = found.title || "Nothing measured yet";
  document.getElementById("summary").textContent = leadSentence(reference, runs);
  document.getElementById("problems").replaceChildren(...(problems.length ? [problemList(problems)] : []));
  document.getElementById("empty").replaceChildren(...(runs.length ? [] : [emptyState(
    "No quantized file was found here. Make one, measure it, and it appears on this page by itself.",
    "dither quantize MODEL --to Q4_K_M --measure")]));
  const made = new Date(found.made);
  document.getElementById("foot").replaceChildren(el("p", {},
    `Made by ${found.tool}${Number.isNaN(made.getTime()) ? "" : `, ${made.toISOString().slice(0, 16).replace("T", " ")} UTC`}. `,
    "Every number on this page was measured on these files, or says that it is an estimate or from the literature."));
}

function leadSentence(reference, runs) {
  if (!runs.length) return "";
  const files = plural(runs.length, "quantized file");
  if (!reference) return `${files}, compared.`;
  const parts = [reference.parameters ? `${formatCount(reference.parameters)} parameters` : null,
    reference.bytes ? formatBytes(reference.bytes) : null].filter(Boolean);
  return `${files} of ${reference.name}${parts.length ? `, whose original has ${parts.join(" in ")}` : ""}.`;
}

function problemList(problems) {
  return el("details", {class: "problems", open: problems.length < 4},
    el("summary", {}, `${plural(problems.length, "file")} could not be shown`),
    el("ul", {}, problems.map((problem) => el("li", {}, el("code", {}, problem.file), " ", problem.reason))));
}

function showState(store, heard) {
  const state = document.getElementById("state");
  const words = store.live ? (heard ? "Live" : "Connection lost") : "Report";
  state.className = `state ${store.live ? (heard ? "heard" : "lost") : "still"}`;
  if (state.textContent !== words) state.textContent = words;
}

// Light, dark, or what the system says; kept in this browser.
function startTheme() {
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const kept = () => { try { return localStorage.getItem("dither-theme"); } catch { return null; } };
  const dark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const show = () => {
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", dark() ? "Use light colors" : "Use dark colors");
    window.dispatchEvent(new Event("dither-theme"));
  };
  if (kept() === "dark" || kept() === "light") document.documentElement.dataset.theme = kept();
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("dither-theme", document.documentElement.dataset.theme); } catch { /* from disk */ }
    show();
  });
  system.addEventListener("change", show);
  show();
}

// Marks the section in sight in the navigation.
function followSections() {
  const links = new Map([...document.querySelectorAll("nav.sections a")].map((link) => [link.hash.slice(1), link]));
  const sections = [...document.querySelectorAll("main > section")];
  let current = null;
  const mark = () => {
    const line = innerHeight / 3;
    const seen = sections.filter((section) => section.getBoundingClientRect().top <= line).at(-1) ?? sections[0];
    if (seen === current) return;
    current = seen;
    for (const [id, link] of links) {
      if (id === seen.id) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
    const link = links.get(seen.id);
    const list = link.closest("nav");
    if (list.scrollWidth > list.clientWidth) list.scrollLeft = link.offsetLeft - list.clientWidth / 2 + link.offsetWidth / 2;
  };
  addEventListener("scroll", () => requestAnimationFrame(mark), {passive: true});
  addEventListener("resize", mark);
  mark();
}

// Views that were mounted after the browser jumped have moved the place it jumped to.
function arriveAtHash() {
  const target = location.hash.length > 1 ? document.getElementById(decodeURIComponent(location.hash.slice(1))) : null;
  if (target) target.scrollIntoView({block: "start"});
}

startPage();
