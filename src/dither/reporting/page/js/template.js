// Templates of charts filled as `reporting/charts.py` fills them: a string that is nothing but "$name" is a parameter.

import {mountChart} from "./chart.js";

const TEMPLATE_COLORS = ["ink", "muted", "accent", "surface", "line", "grid", "good", "warn", "bad"];

export function fillTemplate(part, params) {
  if (Array.isArray(part)) return part.map((value) => fillTemplate(value, params));
  if (part !== null && typeof part === "object") {
    return Object.fromEntries(Object.entries(part).map(([key, value]) =>
      [key, key === "$schema" ? value : fillTemplate(value, params)]));
  }
  if (typeof part !== "string" || !part.startsWith("$")) return part;
  if (!(part.slice(1) in params)) throw new Error(`the chart needs a value for ${part.slice(1)}`);
  return params[part.slice(1)];
}

export function filledSpec(template, params) {
  const {usermeta = {}, ...spec} = template;
  return fillTemplate(spec, {...templateColors(), ...usermeta.defaults, ...params});
}

function templateColors() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(TEMPLATE_COLORS.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

// mountChart with a template: `options.fill` are the template's parameters. The handle's update takes `fill` too;
// when the theme changes the template is filled anew, in the new colors.
export async function mountTemplate(root, template, {fill, ...options}) {
  let params = fill;
  const handle = await mountChart(root, {...options, spec: filledSpec(template, params)});
  const themed = () => handle.update({spec: filledSpec(template, params)});
  window.addEventListener("dither-theme", themed);
  return {
    ...handle,
    update({fill: changed = {}, ...change}) {
      params = {...params, ...changed};
      return handle.update({...change, spec: filledSpec(template, params)});
    },
    destroy() {
      window.removeEventListener("dither-theme", themed);
      handle.destroy();
    },
  };
}
