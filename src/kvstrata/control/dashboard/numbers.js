// What is known at a glance: the numbers, the charts, the tiers.

import { chart } from "./chart.js";
import { at, bytes, count, el, percent, seconds, show } from "./page.js";

const SPAN_S = 600, LEAST_S = 60;

function number(name, value, about) {
  return el("div", {}, el("dt", {}, name), el("dd", {}, value, about ? el("small", {}, about) : null));
}

// As long as it has been looked at.
function span(history) {
  const now = history.last.when;
  return { now, span_s: Math.min(SPAN_S, Math.max(LEAST_S, now - history.samples[0].when)) };
}

export function showNumbers(history, status) {
  const asked = history.rise("asked_tokens_total"), own = history.rise("engine_tokens_total");
  const hit = history.rise("hit_tokens_total"), all = history.last;
  const span = Math.max(1, history.last.when - history.samples[0].when);
  const allAsked = all.sum("asked_tokens_total");
  show(at("numbers"),
    number("tokens hit", percent(hit / (asked - own)), "of what engines did not have; last 10 min"),
    number("hit since start", percent(all.sum("hit_tokens_total") / (allAsked - all.sum("engine_tokens_total"))), `${count(allAsked)} tokens asked`),
    number("first token saved", seconds(all.sum("ttft_saved_seconds_total")), "since start, over all requests"),
    number("requests", count((60 * history.rise("requests_total")) / span), "a minute"),
    number("host memory", percent(status.host.allocated_bytes / status.host.capacity_bytes), `${bytes(status.host.allocated_bytes)} of ${bytes(status.host.capacity_bytes)}`),
    number("leases", count(status.leases.count), bytes(status.leases.bytes)),
  );
}

export function showTokens(history, reasons) {
  const tiers = [...new Set(history.last.all("hit_tokens_total").map(({ labels }) => labels.tier))];
  const series = [
    { name: "the engine's own", points: history.rates("engine_tokens_total") },
    ...tiers.map((tier) => ({ name: `from ${tier}`, points: history.rates("hit_tokens_total", { tier }) })),
    ...reasons(history).map(({ why, points }) => ({ name: `computed: ${why}`, points })),
  ];
  chart(at("tokens"), "Prompt tokens a second", series, (value) => `${count(value)}/s`,
    { stacked: true, base: 10, ...span(history) });
}

export function showBytes(history, status) {
  const series = status.tiers.flatMap(({ name: tier }) => [
    { name: `read from ${tier}`, points: history.rates("tier_read_bytes_total", { tier }) },
    { name: `written to ${tier}`, points: history.rates("tier_write_bytes_total", { tier }) },
  ]);
  if (!series.length) return show(at("bytes"), el("p", { class: "quiet" }, "This node has host memory only."));
  chart(at("bytes"), "Bytes a second", series, (value) => `${bytes(value)}/s`,
    { stacked: false, base: 1024, ...span(history) });
}

function bar(used, capacity) {
  if (!capacity) return "–";
  const meter = el("meter", { min: "0", max: String(capacity), value: String(used), "aria-label": percent(used / capacity) });
  return el("span", {}, meter, ` ${bytes(used)} of ${bytes(capacity)}`);
}

function tier(name, state, used, capacity, chunks, more, evicted) {
  const good = state === "ok" || state === "scanning";
  return el("tr", {},
    el("th", { scope: "row" }, name),
    el("td", {}, el("span", { class: good ? "good" : "bad" }, state)),
    el("td", {}, bar(used, capacity)),
    el("td", { class: "number" }, chunks === undefined ? "–" : count(chunks)),
    el("td", { class: "number" }, more ? bytes(more) : "–"),
    el("td", { class: "number" }, count(evicted)));
}

export function showTiers(history, status) {
  const head = ["tier", "state", "used", "chunks", "waiting to be written", "objects evicted, 10 min"];
  const evicted = (name) => history.rise("left_objects_total", { tier: name, cause: "evicted" });
  show(at("tiers"),
    el("thead", {}, el("tr", {}, ...head.map((word, place) => el("th", { scope: "col", class: place > 2 ? "number" : "" }, word)))),
    el("tbody", {},
      tier("host", "ok", status.host.allocated_bytes, status.host.capacity_bytes, status.host.num_chunks, 0, evicted("host")),
      ...status.tiers.map((one) =>
        tier(one.name, one.state, one.used_bytes, one.capacity_bytes, one.num_chunks, one.queued_bytes, evicted(one.name))),
      ...Object.entries(status.tiers_left_out || {}).map(([name, why]) =>
        tier(name, `left out: ${why}`, 0, 0, undefined, 0, 0))));
}
