// Charts in SVG: areas on top of each other, or lines. Each has its numbers as a table for readers.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 900, HEIGHT = 220, LEFT = 64, RIGHT = 12, TOP = 12, BOTTOM = 24;
const COLOURS = 8;

function svg(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function ceiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}

// series: [{name, points: [[when_s, value]]}], all with the same times.
export function chart(place, title, series, words, { stacked, span_s, now }) {
  const shown = series.filter((one) => one.points.some(([, value]) => value > 0));
  const x = (when) => LEFT + (WIDTH - LEFT - RIGHT) * (1 - Math.min(1, (now - when) / span_s));
  const base = new Array(series[0]?.points.length || 0).fill(0);
  const layers = shown.map((one) => {
    const low = stacked ? [...base] : base.map(() => 0);
    const high = one.points.map(([, value], i) => low[i] + value);
    if (stacked) high.forEach((value, i) => (base[i] = value));
    return { name: one.name, times: one.points.map(([when]) => when), low, high };
  });
  const top = ceiling(Math.max(0, ...layers.flatMap((one) => one.high)));
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
      share ? `${Math.round((share * span_s) / 60)} min ago` : "now"),
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
