// Elements and words. Everything from the node becomes text, never markup.

export function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "onclick") made.addEventListener("click", value);
    else if (typeof value === "boolean") made.toggleAttribute(key, value);
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export const at = (id) => document.getElementById(id);

// Show new children only where they differ: focus and selection survive a refresh.
export function show(place, ...children) {
  const fresh = el(place.localName, {}, ...children);
  if (fresh.innerHTML !== place.dataset.shown) {
    place.dataset.shown = fresh.innerHTML;
    place.replaceChildren(...fresh.childNodes);
  }
}

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

export function bytes(count) {
  let unit = 0;
  while (count >= 1024 && unit < UNITS.length - 1) [count, unit] = [count / 1024, unit + 1];
  return `${count < 10 && unit ? count.toFixed(1) : Math.round(count)} ${UNITS[unit]}`;
}

export function count(number) {
  if (number >= 1e9) return `${(number / 1e9).toFixed(1)} G`;
  if (number >= 1e6) return `${(number / 1e6).toFixed(1)} M`;
  if (number >= 1e4) return `${(number / 1e3).toFixed(1)} k`;
  return String(Math.round(number));
}

export function seconds(number) {
  if (number < 1) return `${Math.round(1000 * number)} ms`;
  if (number < 120) return `${number.toFixed(1)} s`;
  if (number < 7200) return `${Math.round(number / 60)} min`;
  if (number < 172800) return `${Math.round(number / 3600)} h`;
  return `${Math.round(number / 86400)} days`;
}

export const percent = (share) => (Number.isFinite(share) ? `${(100 * share).toFixed(1)} %` : "–");
