// What a model needs in memory, and where it would run: capacity/memory.py, speed.py and advice.py in JavaScript.
//
// The same numbers in, the same bytes out: tests/reporting/test_fit_golden.py feeds both sides the vectors of
// tests/capacity/golden.json and machines drawn at random, and asks for equality, not for closeness.  Every
// constant comes with the document (`fit.constants`), so that there is one place to change it.
//
// A shape's layers are listed one by one, {keys, values, window, state}, or alike ones counted as in golden.json:
// {count, layer: {…}}.
// Bytes stay below 2^53, where a double counts exactly: a cache of eight petabytes is beyond every slider here.

export const PLACES = ["GPU", "part in RAM", "RAM"]; // the fastest first

function memoryLayers(shape) {
  return shape.layers.map((entry) => (entry.layer ? entry : { count: 1, layer: entry }));
}

function memoryPadded(count, step) {
  return Math.ceil(count / step) * step;
}

export function memoryMargin(bytes, constants) {
  return Math.min(constants.margin_most, Math.floor(bytes / constants.margin_share));
}

function memoryCells(context, window, batch, constants) {
  const whole = memoryPadded(context, constants.cells);
  return window ? memoryPadded(Math.min(whole, window + batch), constants.cells) : whole;
}

function memoryBatchTokens(context, slots, constants) {
  return Math.min(constants.batch, slots * memoryPadded(context, constants.cells));
}

function memoryRowBytes(numbers, kv, constants) {
  const [block, size] = constants.kv_types[kv];
  return Math.ceil(numbers / block) * size;
}

export function cacheBytes(shape, wish, constants) {
  const batch = memoryBatchTokens(wish.context, wish.slots, constants);
  let total = 0;
  for (const { count, layer } of memoryLayers(shape)) {
    const row = memoryRowBytes(layer.keys || 0, wish.kv, constants) + memoryRowBytes(layer.values || 0, wish.kv, constants);
    total += count * (memoryCells(wish.context, layer.window || 0, batch, constants) * row + 4 * (layer.state || 0));
  }
  return wish.slots * total;
}

export function computeBytes(shape, wish, constants) {
  const batch = memoryBatchTokens(wish.context, wish.slots, constants);
  const seen = new Map(); // of windowed layers and of the others, the cells of the last one
  for (const { layer } of memoryLayers(shape)) {
    if (layer.keys) seen.set(Boolean(layer.window), memoryCells(wish.context, layer.window || 0, batch, constants));
  }
  let mask = 0;
  for (const count of seen.values()) mask += 2 * count;
  const logits = 4 * shape.vocabulary * wish.slots;
  const states = 4 * wish.slots * memoryLargest(shape, "state");
  const rotations = seen.size * memoryRotationBytes(shape.head, wish.kv);
  return batch * (4 * memoryActivations(shape) + 32 + mask) + logits + states + rotations;
}

function memoryActivations(shape) {
  const feedForward = 5 * shape.width + 3 * shape.inner;
  let attention = shape.width + 3 * shape.query + memoryLargest(shape, "keys") + memoryLargest(shape, "values");
  if (shape.latent) attention = 5 * shape.width + 2 * shape.query + shape.latent;
  const recurrence = shape.width + 7 * (shape.scan || 0);
  const used = shape.experts_used || 0;
  const experts = used ? 3 * shape.width + shape.inner + 2 * used * shape.width : 0;
  return Math.max(feedForward, attention, recurrence, experts);
}

function memoryRotationBytes(head, kv) {
  const size = head & -head;
  return kv === "f16" || size < 64 ? 0 : 4 * (size * size + 64 * 64);
}

export function overheadBytes(shape, constants) {
  const merges = shape.merges === false ? 0 : constants.merge;
  return constants.runtime + shape.vocabulary * (constants.token + merges);
}

// All of it: `wish` is {context, kv, slots}.
export function needed(shape, weights, wish, constants) {
  const parts = {
    weights,
    cache: cacheBytes(shape, wish, constants),
    compute: computeBytes(shape, wish, constants),
    overhead: overheadBytes(shape, constants),
  };
  return { ...parts, total: parts.weights + parts.cache + parts.compute + parts.overhead };
}

// llama.cpp refuses a quantized cache whose heads are no whole blocks.
export function kvProblem(shape, kv, constants) {
  return shape.head % constants.kv_types[kv][0] ? `${kv} does not fit heads of ${shape.head} numbers` : "";
}

export function layerCount(shape) {
  return Math.max(1, memoryLayers(shape).reduce((sum, group) => sum + group.count, 0));
}

// Bytes of the machine's own memory that a model may take.  `machine`: {memory, free, bandwidth, gpus: [{bytes,
// bandwidth}], unified}; free is null where a person said what the memory is.
export function usable(machine, constants) {
  const room = machine.free === null ? machine.memory : Math.min(machine.free, machine.memory);
  return Math.max(0, room - memoryMargin(machine.memory, constants));
}

export function usableOnCards(machine, constants) {
  return machine.gpus.reduce((sum, gpu) => sum + gpu.bytes - memoryMargin(gpu.bytes, constants), 0);
}

// Where it runs best and how fast: `load` is {memory (as `needed` gives it), layers, active, vocabulary, embedding}.
export function judge(load, machine, constants) {
  const { memory } = load;
  const ram = usable(machine, constants);
  const cards = usableOnCards(machine, constants);
  const gpus = machine.gpus.length;
  const perGpu = machine.unified ? 0 : constants.gpu_runtime * gpus;
  const onGpu = memory.total - load.embedding - memory.overhead + perGpu;
  if (gpus && onGpu <= cards && (machine.unified || load.embedding + memory.overhead <= ram)) {
    return { word: "GPU", gpuLayers: load.layers, ...memorySpeedAt(load, machine, 1, constants) };
  }
  if (gpus && !machine.unified) {
    const moved = memory.weights - load.embedding + memory.cache;
    const share = moved ? Math.max(0, (cards - perGpu - memory.compute) / moved) : 0;
    const layers = Math.trunc(load.layers * Math.min(1, share));
    const left = memory.total - (moved * layers) / load.layers;
    if (layers && left <= ram) {
      return { word: "part in RAM", gpuLayers: layers, ...memorySpeedAt(load, machine, layers / load.layers, constants) };
    }
  }
  const none = gpus ? 0 : null;
  if (memory.total <= ram) return { word: "RAM", gpuLayers: none, ...memorySpeedAt(load, machine, 0, constants) };
  if (memory.total - memory.weights <= ram) {
    return { word: "from disk", gpuLayers: none, speed: null, whyNoSpeed: "the disk decides" };
  }
  return { word: "no", gpuLayers: null, speed: null, whyNoSpeed: "it does not run" };
}

function memorySpeedAt(load, machine, onGpu, constants) {
  const read = load.active + load.memory.cache / 2;
  const gpu = machine.gpus.length ? machine.gpus[0].bandwidth : null;
  const parts = [[onGpu, gpu, "the GPU"], [1 - onGpu, machine.bandwidth, "the memory"]];
  const reads = [];
  for (const [share, bandwidth, name] of parts) {
    if (share && !bandwidth) return { speed: null, whyNoSpeed: `the bandwidth of ${name} is not known` };
    if (share) reads.push([memoryRoundHalfEven(read * share), bandwidth]);
  }
  const layers = load.layers * (onGpu * constants.gpu_layer + (1 - onGpu) * constants.cpu_layer);
  return { speed: decodeSpeed(reads, layers + load.vocabulary * constants.sampling, constants), whyNoSpeed: "" };
}

// Tokens per second: `reads` are [bytes per token, bytes per second], `fixed` seconds per token beside reading.
export function decodeSpeed(reads, fixed, constants) {
  let seconds = 0;
  for (const [count, bandwidth] of reads) seconds += count / bandwidth;
  return {
    likely: 1 / (seconds / constants.likely + fixed),
    low: 1 / (seconds / constants.low + 2 * fixed),
    high: 1 / (seconds / constants.high + fixed / 2),
  };
}

// The one to take, as `advice.choose` does: `judged` are {type, bytes, bpw, needsImportance, known, verdict}, `known`
// whether anything is known of its loss.  In the fastest memory that holds a good one, the least loss at reading speed.
export function choose(judged, constants) {
  const rank = (entry) => constants.ladder.indexOf(entry.type);
  const leastGood = constants.ladder.indexOf(constants.least_good);
  const isGood = (entry) => (entry.known ? rank(entry) <= leastGood : entry.bpw >= constants.good_bits);
  const quick = (entry) => !entry.verdict.speed || entry.verdict.speed.likely >= constants.reading;
  const fitting = judged.filter((entry) => rank(entry) >= 0 && PLACES.includes(entry.verdict.word));
  for (const importance of [false, true]) {
    for (const place of PLACES) {
      const good = fitting.filter((entry) => isGood(entry) && entry.verdict.word === place)
        .filter((entry) => importance || !entry.needsImportance);
      if (!good.length) continue;
      const fast = good.filter(quick);
      return fast.length ? memoryLeast(fast, rank) : memoryLeast(good, (entry) => entry.bytes);
    }
  }
  return fitting.length ? memoryLeast(fitting, rank) : null;
}

function memoryLeast(entries, key) {
  return entries.reduce((best, entry) => (key(entry) < key(best) ? entry : best));
}

function memoryLargest(shape, part) {
  return memoryLayers(shape).reduce((most, group) => Math.max(most, group.layer[part] || 0), 0);
}

function memoryRoundHalfEven(value) {
  const below = Math.floor(value);
  const rest = value - below;
  if (rest !== 0.5) return Math.round(value);
  return below % 2 === 0 ? below : below + 1;
}
