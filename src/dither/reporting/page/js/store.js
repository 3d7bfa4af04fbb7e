// What the page knows: the results document, what is selected, and how to ask for more.
//
// The page has two lives. Live, the document comes from /api/document and more can be asked of the server;
// exported, everything stands in <script type="application/json"> elements and nothing leaves the page.

const TOKEN = /^[A-Za-z0-9_-]{8,200}$/;

export function createStore() {
  const inlined = inlinedJson("dither-document");
  const charts = inlinedJson("dither-charts") ?? {};
  const listeners = new Set();
  const selectors = new Set();
  const messages = new Set();
  let current = inlined;
  let asked = 0, taken = 0; // the last question for the document, and the one whose answer is shown
  let selected = {run: null, tensor: null};

  const store = {
    live: inlined === null,

    // The results document, as the Python side wrote it.
    getDocument: () => current,

    // Calls back with every new document. Returns a function that ends it.
    subscribe(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },

    run: (id) => (current?.runs ?? []).find((run) => run.id === id) ?? null,

    // What the views share: which run, which tensor. select({run, tensor}) tells all who asked with onSelect.
    selection: () => selected,
    select(change) {
      selected = {...selected, ...change};
      for (const listener of [...selectors]) listener(selected);
    },
    onSelect(listener) {
      selectors.add(listener);
      return () => selectors.delete(listener);
    },

    // A Vega-Lite template of charts/NAME.json, without data; a fresh copy every time.
    async chart(name) {
      charts[name] ??= await getJson(`/charts/${encodeURIComponent(name)}.json`);
      return structuredClone(charts[name]);
    },

    // Tile, palette and picture: of the server, or what the export holds (null where it holds none).
    async tile({run, tensor, row = 0, column = 0, size = 64}) {
      if (store.live) return getJson("/api/tile", {run, tensor, row, column, size});
      return store.run(run)?.tiles?.[tensor] ?? null;
    },
    async palette({run, tensor, row = 0, block = 0}) {
      if (store.live) return getJson("/api/palette", {run, tensor, row, block});
      return store.run(run)?.palettes?.[tensor] ?? null;
    },
    async picture(types = []) {
      if (store.live) return getJson("/api/picture", {types: types.join(",")});
      return inlinedJson("dither-picture") ?? current?.picture ?? null;
    },

    // GET and POST of the live page; an Error's message is what the server said went wrong.
    get: (path, query) => getJson(path, query),
    post: (path, body) => postJson(path, body),

    // POST whose answer is a stream of events: `onEvent(object)` for each. `signal` of an AbortController ends it.
    stream: (path, body, onEvent, signal) => streamEvents(path, body, onEvent, signal),

    // Messages of /api/events other than "document", such as {"type": "job", …}.
    onMessage(listener) {
      messages.add(listener);
      return () => messages.delete(listener);
    },

    async load() {
      if (!store.live) return current;
      const mine = ++asked;
      const found = await getJson("/api/document");
      if (mine > taken) [current, taken] = [found, mine]; // answers may overtake each other
      return current;
    },

    // Listens to the server for as long as the page is open; `onState(true|false)` says whether it is heard.
    listen(onState) {
      if (!store.live) return;
      const source = new EventSource("/api/events");
      // What changed while nobody listened (between the first look and now, or while the server was away) was not told.
      const renew = async () => {
        const before = JSON.stringify(current);
        try {
          await store.load();
        } catch {
          return; // gone again: the next opening looks again
        }
        if (JSON.stringify(current) !== before) for (const listener of [...listeners]) listener(current);
      };
      source.onopen = () => {
        onState(true);
        for (const listener of [...messages]) listener({type: "open"});
        renew();
      };
      source.onerror = () => onState(false);
      source.onmessage = (event) => {
        const message = JSON.parse(event.data);
        if (message.type !== "document") {
          for (const listener of [...messages]) listener(message);
          return;
        }
        renew();
      };
    },
  };
  return store;
}

function inlinedJson(id) {
  const node = document.getElementById(id);
  return node ? JSON.parse(node.textContent) : null;
}

// A token in the address becomes a cookie on the first answer; it should not stay to be copied or seen.
export function hideToken() {
  const url = new URL(location.href);
  if (!TOKEN.test(url.searchParams.get("token") ?? "")) return;
  url.searchParams.delete("token");
  history.replaceState(null, "", url);
}

async function getJson(path, query = null) {
  const words = new URLSearchParams();
  for (const [name, value] of Object.entries(query ?? {})) {
    if (value !== null && value !== undefined) words.set(name, String(value));
  }
  const text = words.toString();
  return readAnswer(await fetch(text ? `${path}?${text}` : path, {credentials: "same-origin"}));
}

async function postJson(path, body) {
  return readAnswer(await fetch(path, postOptions(body)));
}

function postOptions(body, signal = undefined) {
  return {
    method: "POST", credentials: "same-origin", signal,
    headers: {"Content-Type": "application/json"}, body: JSON.stringify(body ?? {}),
  };
}

async function readAnswer(response) {
  const answer = await response.json().catch(() => null);
  if (response.ok) return answer;
  throw answerError(response, answer);
}

function answerError(response, answer) {
  const said = answer?.error;
  const error = new Error(said ? `${said.thing}: ${said.reason}. ${said.way_out ?? ""}`.trim()
    : `the server answered ${response.status}`);
  error.status = response.status;
  error.said = said ?? null;
  return error;
}

async function streamEvents(path, body, onEvent, signal) {
  const response = await fetch(path, postOptions(body, signal));
  if (!response.ok) throw answerError(response, await response.json().catch(() => null));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let kept = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    kept += value;
    const events = kept.split("\n\n");
    kept = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim());
      if (data.length) onEvent(JSON.parse(data.join("\n")));
    }
  }
}
