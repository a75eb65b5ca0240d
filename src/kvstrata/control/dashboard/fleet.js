// The nodes of the fleet, where there is one.

import { json } from "./node.js";
import { at, bytes, count, el, show } from "./page.js";

export async function showFleet() {
  const { members } = await json("v1/fleet");
  at("fleet").hidden = !members.length;
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
