// The nodes of the fleet, where there is one.

import { json } from "./node.js";
import { at, bytes, count, el, show } from "./page.js";

let none = false;

export async function showFleet() {
  if (none) return;
  let members;
  try {
    ({ members } = await json("v1/fleet"));
  } catch (problem) {
    none = problem.status === 404; // this node is in no fleet
    if (none) return;
    throw problem;
  }
  at("fleet").hidden = false;
  const head = ["node", "state", "release", "holds", "chunks", "clock"];
  show(at("members"),
    el("thead", {}, el("tr", {}, ...head.map((word) => el("th", { scope: "col" }, word)))),
    el("tbody", {}, ...members.map((one) => {
      const own = one.tiers.filter(({ shared }) => !shared);
      return el("tr", {}, el("th", { scope: "row" }, one.name),
        el("td", {}, el("span", { class: one.state === "member" ? "good" : "warn" }, one.state)),
        el("td", {}, one.release),
        el("td", {}, own.map(({ tier, used_bytes }) => `${bytes(used_bytes)} in ${tier}`).join(", ")),
        el("td", {}, count(own.reduce((sum, { num_chunks }) => sum + num_chunks, 0))),
        el("td", {}, `${Math.round(1000 * one.clock_offset_s)} ms`));
    })));
}
