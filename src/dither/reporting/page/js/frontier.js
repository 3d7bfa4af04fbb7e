// The frontier: which files nothing beats, which is best under a budget, and where labels go.
//
// The same as showing/frontier.py, which draws the model card's picture; tests/showing/test_frontier.py compares.

// Axes a person may choose: `better` is the direction, `type` of the scale, `factor` what the number is shown in.
export const FRONTIER_METRICS = {
  kl_mean: {name: "mean KL", title: "KL divergence, nats per token (less is better)", better: "less", type: "log", factor: 1},
  kl_p99: {name: "99 % KL", title: "KL divergence of the worst 1 %, nats (less is better)", better: "less", type: "log", factor: 1},
  same_top: {name: "same top token", title: "same likeliest token, % (more is better)", better: "more", type: "linear", factor: 100},
  delta_ppl: {name: "ΔPPL", title: "perplexity above the original's (less is better)", better: "less", type: "linear", factor: 1},
  decode_tokens_per_second: {name: "tokens/s", title: "tokens per second, decoding (more is better)", better: "more", type: "linear", factor: 1},
  joules_per_token: {name: "J/token", title: "energy, joules per token (less is better)", better: "less", type: "linear", factor: 1},
};

const FRONTIER_CONTAINERS = {
  gguf: "GGUF", gptq: "GPTQ", awq: "AWQ", "compressed-tensors": "compressed-tensors", compressed: "compressed-tensors",
  bitsandbytes: "bitsandbytes", bnb: "bitsandbytes", fp8: "FP8", safetensors: "safetensors",
};
const FRONTIER_FAMILIES = 8; // as many shapes as can be told apart

export function familyOf(run) {
  const container = FRONTIER_CONTAINERS[run.container] ?? run.container;
  return run.recipe ? `${container}, ${run.recipe}` : container;
}

// Runs with the metric, but for those measured on another text or another original than most.
export function comparableRuns(runs, key) {
  return runs.filter((run) => run.comparable !== false && Number.isFinite(run.metrics?.[key]?.value));
}

// One point a run that has the metric, the smallest first.  `unit` is bytes per unit of the size axis.
export function frontierPoints(runs, key, unit) {
  const metric = FRONTIER_METRICS[key];
  const known = comparableRuns(runs, key);
  const floor = frontierFloor(known, key);
  const place = (value) => (metric.type === "log" ? Math.max(value, floor) : value) * metric.factor;
  const families = [...new Set(known.map(familyOf))];
  const points = known.map((run) => {
    const {value, low, high, tag} = run.metrics[key];
    const both = Number.isFinite(low) && Number.isFinite(high);
    const family = families.indexOf(familyOf(run)) < FRONTIER_FAMILIES - 1 || families.length <= FRONTIER_FAMILIES
      ? familyOf(run) : "others";
    return {
      id: run.id, name: run.file, label: run.type, family, bytes: run.bytes, x: run.bytes / unit, value, tag,
      y: place(value), low: both ? place(low) : null, high: both ? place(high) : null, pareto: false,
    };
  });
  points.sort((a, b) => a.bytes - b.bytes || (metric.better === "less" ? a.value - b.value : b.value - a.value));
  let best = null;
  for (const point of points) {
    if (best === null || frontierBeats(point.value, best, metric)) {
      point.pareto = true;
      best = point.value;
    }
  }
  return points;
}

// A logarithm has no zero: what is equal to the original stands at the foot of the chart.
function frontierFloor(runs, key) {
  const values = runs.flatMap((run) => [run.metrics[key].value, run.metrics[key].low]).filter((value) => value > 0);
  return values.length ? Math.min(...values) / 2 : 1e-6;
}

function frontierBeats(value, other, metric) {
  return metric.better === "less" ? value < other : value > other;
}

// The best point of at most `bytes`; of equals the smallest.
export function bestUnder(points, key, bytes) {
  let best = null;
  for (const point of points) {
    if (point.bytes <= bytes && (best === null || frontierBeats(point.value, best.value, FRONTIER_METRICS[key]))) best = point;
  }
  return best;
}

// Where the axes end: room for intervals, points at the rim and labels beside them.
export function frontierDomains(points, type) {
  const xs = points.map((point) => point.x);
  const ys = points.flatMap((point) => [point.y, point.low ?? point.y, point.high ?? point.y]);
  const [left, right] = [Math.min(...xs), Math.max(...xs)];
  const [bottom, top] = [Math.min(...ys), Math.max(...ys)];
  const wide = right - left || left || 1;
  const x = [Math.max(0, left - 0.08 * wide), right + 0.12 * wide];
  if (type === "log") {
    const grown = Math.max(1.25, (top / bottom) ** 0.08);
    return {x, y: [bottom / grown, top * grown]};
  }
  const tall = top - bottom || Math.abs(top) * 0.2 || 1;
  return {x, y: [bottom - 0.1 * tall, top + 0.1 * tall]};
}

// 1, 2 and 5 times the powers of ten in a range; the powers alone where those would crowd.
export function logTicks([low, high]) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    for (const step of high / low > 300 ? [1] : [1, 2, 5]) ticks.push(Number(`${step}e${power}`));
  }
  const inside = ticks.filter((tick) => tick >= low && tick <= high);
  return inside.length > 1 ? inside : null; // so narrow a range is the chart's own to divide
}

// Gives each point a place for its label that touches no other label, point or interval, or none: `named` says.
// Places beside the frontier's line go before places on it. The chosen one and those on the frontier come first.  Width and height are the plot's, in pixels.
export function placeLabels(points, domains, type, width, height) {
  const across = (x) => ((x - domains.x[0]) / (domains.x[1] - domains.x[0])) * width;
  const scale = type === "log" ? Math.log : (y) => y;
  const up = (y) => height - ((scale(y) - scale(domains.y[0])) / (scale(domains.y[1]) - scale(domains.y[0]))) * height;
  const taken = [];
  for (const point of points) {
    const [x, y] = [across(point.x), up(point.y)];
    taken.push([x - 6, y - 6, x + 6, y + 6]);
    if (point.low !== null) taken.push([x - 2, up(point.high), x + 2, up(point.low)]);
  }
  const line = frontierLine(points.filter((point) => point.pareto).map((point) => [across(point.x), up(point.y)]));
  const order = [...points.keys()].sort((a, b) => frontierTurn(points[a]) - frontierTurn(points[b]) || a - b);
  for (const index of order) {
    const point = points[index];
    const [x, y] = [across(point.x), up(point.y)];
    const wide = 8.3 * point.label.length;
    const fitting = FRONTIER_SIDES.map((side) => [side, frontierBox(side, x, y, wide)]).filter(([, box]) =>
      box[0] >= 0 && box[2] <= width && box[1] >= 0 && box[3] <= height && frontierClear(box, taken));
    const [side, box] = fitting.find(([, one]) => frontierClear(one, line)) ?? fitting[0] ?? [null, null];
    point.named = Boolean(side);
    [point.dx, point.dy, point.align] = side ?? [0, 0, "left"];
    point.baseline = "middle";
    if (box) taken.push(box);
  }
  return points;
}

const FRONTIER_SIDES = [
  [11, 0, "left"], [11, -11, "left"], [11, 11, "left"], [-11, 0, "right"], [-11, -11, "right"], [-11, 11, "right"],
  [0, -17, "center"], [0, 17, "center"], [11, -22, "left"], [-11, 22, "right"],
];

function frontierBox([dx, dy, align], x, y, wide) {
  const left = align === "left" ? x + dx : align === "right" ? x + dx - wide : x - wide / 2;
  return [left, y + dy - 8, left + wide, y + dy + 8];
}

// The frontier's line as small boxes, closer than a label is high.
function frontierLine(corners) {
  const boxes = [];
  for (let at = 1; at < corners.length; at += 1) {
    const [[x, y], [right, below]] = [corners[at - 1], corners[at]];
    const steps = Math.max(1, Math.ceil(Math.hypot(right - x, below - y) / 6));
    for (let step = 0; step <= steps; step += 1) {
      const [px, py] = [x + ((right - x) * step) / steps, y + ((below - y) * step) / steps];
      boxes.push([px - 1, py - 1, px + 1, py + 1]);
    }
  }
  return boxes;
}

function frontierTurn(point) {
  return point.chosen ? 0 : point.pareto ? 1 : 2;
}

function frontierClear(a, taken) {
  return !taken.some((b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3]);
}
