// A chart's table twin whose columns sort: the heads become buttons, `aria-sort` says how it is sorted.

import {el} from "./text.js";

// `handle` is mountChart's, `root` holds its figure, `columns` are those of the twin. The twin is drawn anew whenever
// the chart's rows change, so the heads are made buttons again each time.
export function sortableTwin(handle, root, columns) {
  const order = {key: null, down: false};
  const dress = () => {
    const heads = [...root.querySelectorAll(".twin thead th")];
    heads.forEach((head, index) => {
      const column = columns[index];
      if (!column || head.querySelector("button")) return;
      const button = el("button", {type: "button", class: "sort", on: {click: () => {
        order.down = order.key === column.key ? !order.down : false;
        order.key = column.key;
        sortingApply(root, index, order.down);
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", order.down ? "descending" : "ascending");
      }}}, head.textContent);
      head.replaceChildren(button);
    });
    const index = columns.findIndex((column) => column.key === order.key);
    if (index >= 0 && heads[index] && !heads[index].hasAttribute("aria-sort")) {
      sortingApply(root, index, order.down);
      heads[index].setAttribute("aria-sort", order.down ? "descending" : "ascending");
    }
  };
  const watch = new MutationObserver(dress);
  watch.observe(root, {childList: true, subtree: true});
  dress();
  return {destroy: () => watch.disconnect()};
}

function sortingApply(root, index, down) {
  const body = root.querySelector(".twin tbody");
  const cells = [...body.rows].map((row) => [sortingValue(row.cells[index].textContent), row]);
  const sign = down ? -1 : 1;
  cells.sort(([a], [b]) => {
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1; // what has no number stays last
    return sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en", {numeric: true}));
  });
  body.append(...cells.map(([, row]) => row));
}

const SORTING_UNITS = {B: 1, KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30, TiB: 2 ** 40, k: 1e3, M: 1e6};

// The number a cell begins with, in bytes where it is a size; else its text.
export function sortingValue(text) {
  const match = /^\s*([-−]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)\s*(B|[KMGT]iB|k|M)?\b/.exec(text);
  if (!match) return text.trim().toLowerCase();
  return Number(match[1].replace("−", "-")) * (SORTING_UNITS[match[2]] ?? 1);
}
