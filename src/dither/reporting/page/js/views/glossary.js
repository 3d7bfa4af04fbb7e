// The glossary: every term in one paragraph, the view that shows it, a search; and the links from everywhere else.

import {el, glossaryId, plural} from "../text.js";

const GLOSSARY_TITLES = {
  which: "Which should I take?", fits: "Does it fit my machine?", inside: "What was lost inside?", pictures: "RAW and JPEG",
  palette: "The colors one block can use", answers: "Does it answer differently?", speed: "How fast, at what cost?",
  guide: "Which method?", work: "Work",
};

export async function mount(root, store) {
  const entries = store.getDocument()?.glossary ?? [];
  const list = el("dl", {class: "glossary"}, entries.map(glossaryEntry));
  const count = el("p", {class: "hint", role: "status"}, plural(entries.length, "term"));
  const find = el("input", {type: "search", "aria-label": "Find a term", placeholder: "Find a term", on: {
    input: () => glossaryFilter(list, find.value, count),
  }});
  root.append(
    el("p", {class: "answer"}, "The words of the field, each in a few sentences."),
    el("div", {class: "controls"}, el("div", {class: "control"}, find)), count, list,
  );
  const arrive = () => {
    const target = location.hash.startsWith("#term-") ? document.getElementById(location.hash.slice(1)) : null;
    if (!target || !list.contains(target)) return;
    find.value = "";
    glossaryFilter(list, "", count);
    target.scrollIntoView({block: "center"});
  };
  window.addEventListener("hashchange", arrive);
  arrive();
  const links = () => { for (const part of document.querySelectorAll(".explain")) glossaryLinks(part, entries); };
  links();
  const watch = new MutationObserver(() => requestAnimationFrame(links)); // views are mounted anew when results change
  watch.observe(document.getElementById("content") ?? document.body, {childList: true, subtree: true});
  return {
    update() {}, // its text does not change while the page is open
    destroy() { watch.disconnect(); window.removeEventListener("hashchange", arrive); },
  };
}

function glossaryEntry(entry) {
  return el("div", {class: "glossary-entry", "data-words": [entry.term, ...entry.aliases, entry.text].join(" ").toLowerCase()},
    el("dt", {id: glossaryId(entry.term)}, entry.term),
    el("dd", {}, entry.text, " ",
      GLOSSARY_TITLES[entry.view] ? el("a", {class: "glossary-view", href: `#${entry.view}`, "aria-label":
        `${entry.term} is shown in: ${GLOSSARY_TITLES[entry.view]}`}, `See: ${GLOSSARY_TITLES[entry.view]}`) : null));
}

function glossaryFilter(list, words, count) {
  const wanted = words.trim().toLowerCase();
  let shown = 0;
  for (const entry of list.children) {
    entry.hidden = !entry.dataset.words.includes(wanted);
    shown += entry.hidden ? 0 : 1;
  }
  count.textContent = shown ? plural(shown, "term") : "No term has that word.";
}

// Links the first use of each term in an explanation to its paragraph; an explanation is done once.
export function glossaryLinks(root, entries) {
  if (root.dataset.linked || !entries.length) return;
  root.dataset.linked = "true";
  const byWord = new Map();
  for (const entry of entries) for (const word of [entry.term, ...entry.aliases]) byWord.set(word.toLowerCase(), entry.term);
  for (const link of root.querySelectorAll("a.term")) byWord.delete(link.textContent.toLowerCase());
  const words = [...byWord.keys()].sort((a, b) => b.length - a.length).map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  const pattern = new RegExp(`(?<![\\p{L}\\p{N}_-])(${words.join("|")})(?![\\p{L}\\p{N}_-])`, "giu");
  const seen = new Set([...root.querySelectorAll("a.term")].map((link) => link.hash));
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) if (!walker.currentNode.parentElement.closest("a, code, summary, button")) texts.push(walker.currentNode);
  for (const text of texts) glossaryLinkText(text, pattern, byWord, seen);
}

function glossaryLinkText(text, pattern, byWord, seen) {
  const parts = [];
  let at = 0;
  for (const match of text.data.matchAll(pattern)) {
    const anchor = `#${glossaryId(byWord.get(match[0].toLowerCase()) ?? match[0])}`;
    if (seen.has(anchor)) continue;
    seen.add(anchor);
    parts.push(text.data.slice(at, match.index), el("a", {class: "term", href: anchor}, match[0]));
    at = match.index + match[0].length;
  }
  if (parts.length) text.replaceWith(...parts, text.data.slice(at));
}
