// The frontier as the document has it. Python computes points, axes and places of labels for every metric
// (reporting/frontier.py); what depends on the budget and on the width of the view is looked up here.

// Metrics that some file has.
export function knownMetrics(frontier) {
  return Object.keys(frontier?.metrics ?? {}).filter((key) => frontier.metrics[key].points.length);
}

// What is drawn of a metric in a view of some width, under a budget in bytes: {points, best, height}.
// Along the frontier every larger file is better, so the best under a budget is the last that fits.
export function drawnFrontier(frontier, runs, key, width, budget) {
  const metric = frontier.metrics[key];
  const known = new Map(runs.map((run) => [run.id, run]));
  const at = metric.points.findLastIndex((point) => point.pareto && known.get(point.id).bytes <= budget);
  const layout = metric.layouts.findLast((one) => one.view <= width) ?? metric.layouts[0];
  const places = layout.chosen[metric.points[at]?.id] ?? layout.places;
  const points = metric.points.map((point, index) => {
    const {file: name, type: label, bytes, metrics} = known.get(point.id);
    const [dx, dy, align] = frontier.sides[places[index]] ?? [0, 0, "left"];
    return {...point, name, label, bytes, value: metrics[key].value, tag: metrics[key].tag, chosen: index === at,
      named: places[index] !== null, dx, dy, align, baseline: "middle"};
  });
  return {points, best: points[at] ?? null, height: layout.height};
}
