// The last requests: each opens into its record, and says why it computed what it computed.

import { json } from "./node.js";
import { at, count, el, seconds, show } from "./page.js";

const LIMIT = 200, SHOWN = 20;
const ORDERS = {
  latest: (one) => one.number,
  slowest: (one) => one.load_s || 0,
  missed: (one) => (one.prompt_tokens || 0) - (one.loaded_tokens || 0) - (one.local_tokens || 0),
};

export class Requests {
  constructor() {
    this.records = new Map();
    this.looked = false;
    this.reasons = []; // [when, why, tokens] of requests that ended while this page looked
    this.open = new Set();
    at("order").addEventListener("change", () => this.show());
  }

  async refresh(when, span_s) {
    const { records } = await json(`v1/requests?limit=${LIMIT}`);
    if (records.length && !records.some(({ number }) => this.records.has(number))) this.records.clear();
    for (const one of records) {
      if (this.looked && !this.records.has(one.number))
        for (const { why, tokens } of one.reasons || []) this.reasons.push([when, String(why), tokens]);
      this.records.set(one.number, one);
    }
    for (const number of [...this.records.keys()].sort((a, b) => b - a).slice(LIMIT)) this.records.delete(number);
    this.looked = true; // what had ended before was computed before
    this.reasons = this.reasons.filter(([then]) => then >= when - span_s);
    this.show();
  }

  // What was computed and why, in tokens a second, as [{why, points}].
  rates(history) {
    const times = history.samples.map((one) => one.when);
    const tokens = new Map();
    for (const [when, why, more] of this.reasons) {
      if (!tokens.has(why)) tokens.set(why, new Map());
      const place = tokens.get(why);
      place.set(when, (place.get(when) || 0) + more);
    }
    return [...tokens].sort().map(([why, sums]) => ({
      why,
      points: times.slice(1).map((when, i) => [when, (sums.get(when) || 0) / Math.max(1e-3, when - times[i])]),
    }));
  }

  show() {
    const order = ORDERS[at("order").value];
    const sorted = [...this.records.values()].sort((a, b) => order(b) - order(a)).slice(0, SHOWN);
    if (!sorted.length) return show(at("requests"), el("p", { class: "quiet" }, "No request has ended yet."));
    show(at("requests"), ...sorted.map((one) => this.line(one)));
    for (const details of at("requests").querySelectorAll("details"))
      details.ontoggle = () => (details.open ? this.open.add(details.dataset.number) : this.open.delete(details.dataset.number));
  }

  line(one) {
    const loaded = one.loaded_tokens || 0, own = one.local_tokens || 0, prompt = one.prompt_tokens || 0;
    const computed = Math.max(0, prompt - loaded - own);
    const reasons = (one.reasons || []).map((reason) =>
      el("li", {}, `${count(reason.tokens)} tokens: ${reason.why}`,
        reason.tier ? `, ${reason.tier}` : "", reason.detail ? ` (${reason.detail})` : "",
        reason.ago_s ? `, ${seconds(reason.ago_s)} before` : ""));
    const fields = Object.entries(one).filter(([name, value]) => name !== "reasons" && value !== "" && value !== null);
    return el("details", { open: this.open.has(String(one.number)), "data-number": String(one.number) },
      el("summary", {},
        el("code", {}, one.request), el("span", {}, `${count(prompt)} tokens`),
        el("span", { class: "good" }, `${count(loaded)} loaded`), el("span", {}, `${count(own)} the engine's`),
        el("span", { class: computed ? "warn" : "" }, `${count(computed)} computed`),
        one.load_s ? el("span", { class: "quiet" }, `load ${seconds(one.load_s)}`) : null),
      reasons.length ? el("ul", { class: "reasons" }, ...reasons) : null,
      el("dl", {}, ...fields.flatMap(([name, value]) => [
        el("dt", {}, name.replaceAll("_", " ")),
        el("dd", {}, typeof value === "object" ? JSON.stringify(value) : String(value))])));
  }
}
