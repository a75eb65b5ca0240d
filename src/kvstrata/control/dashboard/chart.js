// Charts in SVG: areas on top of each other, or lines. Each has its numbers as a table for readers.

import { seconds } from "./page.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 900, HEIGHT = 220, LEFT = 84, RIGHT = 12, TOP = 12, BOTTOM = 24;
const COLOURS = 8;

function svg(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// A round number above: of tens, or of bytes' units.
function ceiling(value, base) {
  if (!(value > 0)) return 1;
  const power = base ** Math.floor(Math.log(value) / Math.log(base));
  return [1, 2, 5, 10, 20, 50, 100, 200, 500, 1024].map((step) => step * power).find((step) => step >= value);
}

// series: [{name, points: [[when_s, value]]}], all with the same times.
export function chart(place, title, series, words, { stacked, span_s, now, base }) {
  const shown = series.filter((one) => one.points.some(([, value]) => value > 0));
  const x = (when) => LEFT + (WIDTH - LEFT - RIGHT) * (1 - Math.min(1, (now - when) / span_s));
  const floor = new Array(series[0]?.points.length || 0).fill(0);
  const layers = shown.map((one) => {
    const low = stacked ? [...floor] : floor.map(() => 0);
    const high = one.points.map(([, value], i) => low[i] + value);
    if (stacked) high.forEach((value, i) => (floor[i] = value));
    return { name: one.name, times: one.points.map(([when]) => when), low, high };
  });
  const top = ceiling(Math.max(0, ...layers.flatMap((one) => one.high)), base);
  const y = (value) => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value / top);
  const path = (times, values) => times.map((when, i) => `${x(when).toFixed(1)},${y(values[i]).toFixed(1)}`);
  const drawn = layers.map((one, number) => {
    const colour = number % COLOURS;
    const upper = path(one.times, one.high);
    if (!stacked) return svg("path", { class: `line l${colour}`, d: `M${upper.join("L")}` });
    const lower = path(one.times, one.low).reverse();
    return svg("path", { class: `f${colour}`, d: `M${[...upper, ...lower].join("L")}Z` });
  });
  const lines = [0, 0.5, 1].flatMap((share) => [
    svg("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y(share * top), y2: y(share * top) }),
    svg("text", { x: LEFT - 8, y: y(share * top) + 4, "text-anchor": "end" }, words(share * top)),
  ]);
  const times = [1, 0.5, 0].map((share) =>
    svg("text", { x: x(now - share * span_s), y: HEIGHT - 6, "text-anchor": share === 1 ? "start" : share ? "middle" : "end" },
      share ? `${seconds(share * span_s)} ago` : "now"),
  );
  const summary = shown.length
    ? shown.map((one) => `${one.name} ${words(one.points.at(-1)?.[1] || 0)}`).join(", ")
    : "nothing yet";
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title}. Now: ${summary}` },
    ...lines, ...drawn, ...times);
  const legend = document.createElement("ul");
  legend.className = "legend";
  for (const [number, one] of shown.entries()) {
    const item = document.createElement("li");
    const key = svg("svg", { viewBox: "0 0 10 10", "aria-hidden": "true" }, svg("rect", { class: `f${number % COLOURS}`, width: 10, height: 10 }));
    item.append(key, `${one.name} ${words(one.points.at(-1)?.[1] || 0)}`);
    legend.append(item);
  }
  if (!shown.length) legend.append(Object.assign(document.createElement("li"), { textContent: "nothing yet" }));
  place.replaceChildren(picture, legend);
}
