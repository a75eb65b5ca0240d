// What an operator does: asked for first, and what came of it said.

import { json } from "./node.js";
import { at, bytes, count, el, show } from "./page.js";

export function say(words, bad = false) {
  at("said").textContent = words;
  at("said").className = bad ? "bad" : "quiet";
}

// Ask before it is done; the answer is no unless it is yes.
function confirmed(title, text, yes) {
  const dialog = at("confirm");
  at("confirm-title").textContent = title;
  at("confirm-text").textContent = text;
  at("confirm-yes").textContent = yes;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((answer) =>
    dialog.addEventListener("close", () => answer(dialog.returnValue === "yes"), { once: true }));
}

async function act(words, work) {
  say(`${words}…`);
  try {
    say(await work());
  } catch (problem) {
    say(`${words}: ${problem.message}`, true);
  }
}

const KEYS = 1024, DAY_S = 86400;

export function branchActions(refresh) {
  const clear = async ({ keys, nbytes }) => {
    const text = `${count(keys.length)} chunks, ${bytes(nbytes)}: all that goes on behind it on this node, in every tier. A shared store forgets them for all who use it. Engines compute them again when they are asked for.`;
    if (!(await confirmed("Forget this prefix?", text, "Forget it"))) return;
    await act("forgetting", async () => {
      let objects = 0;
      for (let i = 0; i < keys.length; i += KEYS) objects += (await json("v1/clear", { keys: keys.slice(i, i + KEYS) })).objects;
      return `forgot ${count(objects)} objects`;
    });
    await refresh();
  };
  const pin = async ({ before, chain }) => {
    const prefix = [...before, ...chain.map(({ key }) => key)];
    const name = `dashboard ${chain[0].key.slice(0, 12)}`;
    const text = `${count(prefix.length)} chunks, from the beginning of the prompt to here, are kept for a day as “${name}”, on the tenant's quota of pins.`;
    if (!(await confirmed("Pin this prefix?", text, "Pin it"))) return;
    await act("pinning", async () => {
      const body = { keys: prefix, name, ttl_s: DAY_S };
      if (chain[0].namespace) body.namespace = chain[0].namespace;
      const kept = await json("v1/pin", body);
      return `${count(kept.kept)} of ${count(kept.chunks)} chunks are pinned`;
    });
    await refresh();
  };
  return [{ word: "pin", run: pin }, { word: "forget", run: clear, danger: true }];
}

export function showPins(pins, refresh) {
  if (!pins.length) return show(at("pins"), el("p", { class: "quiet" }, "Nothing is pinned."));
  show(at("pins"), ...pins.map(({ name, owner, chunks, kept, until }) => {
    const unpin = () => act("unpinning", async () => {
      await json("v1/unpin", { owner, name });
      await refresh();
      return `${name} is not pinned any more`;
    });
    return el("p", { class: "row" }, el("code", {}, name), `${count(kept)} of ${count(chunks)} chunks`,
      el("span", { class: "quiet" }, `until ${new Date(1000 * until).toLocaleString()}`),
      el("button", { type: "button", class: "small", "aria-label": `Unpin ${name}`, onclick: unpin }, "unpin"));
  }));
}

export function showActions(status, refresh) {
  const tiers = ["host", ...status.tiers.map(({ name }) => name)];
  const shared = new Set(status.tiers.filter((one) => one.shared).map(({ name }) => name));
  const drained = status.draining !== "no";
  const clear = async () => {
    const tier = at("clear-tier").value;
    const where = tier || "every tier";
    const others = tier ? shared.has(tier) : shared.size > 0;
    const text = `All that is stored in ${where}, of all models and tenants.` +
      (others ? " A store that others use too is cleared for all of them." : "");
    if (!(await confirmed(`Forget ${tier ? `all of ${tier}` : "everything"}?`, text, "Forget it"))) return;
    await act("forgetting", async () => {
      const body = tier ? { everything: true, tiers: [tier] } : { everything: true };
      return `forgot ${count((await json("v1/clear", body)).objects)} objects in ${where}`;
    });
    await refresh();
  };
  const drain = async () => {
    const text = "The node takes no new stores, and writes behind what it has. Engines go on reading, and miss what is not there. You can take it back.";
    if (!(await confirmed("Drain this node?", text, "Drain it"))) return;
    await act("draining", async () => `draining: job ${(await json("v1/drain", {})).id}`);
    await refresh();
  };
  const undrain = () => act("taking stores again", async () => {
    await json("v1/undrain", {});
    await refresh();
    return "the node takes stores again";
  });
  const chosen = at("clear-tier")?.value;
  show(at("act"),
    el("label", { for: "clear-tier" }, "Forget"),
    el("select", { id: "clear-tier" }, el("option", { value: "" }, "every tier"), ...tiers.map((name) => el("option", { value: name }, name))),
    el("button", { type: "button", class: "danger", onclick: clear }, "Forget…"),
    drained
      ? el("button", { type: "button", onclick: undrain }, "Take stores again")
      : el("button", { type: "button", onclick: drain }, "Drain…"),
    el("button", { type: "button", onclick: () => act("writing behind", async () => {
      await json("v1/flush", {});
      return "all that was stored is written";
    }) }, "Write behind now"));
  if (chosen) at("clear-tier").value = chosen;
}

export function showJobs(jobs, refresh) {
  if (!jobs.length) return show(at("jobs"), el("p", { class: "quiet" }, "None runs, and none has ended."));
  show(at("jobs"), ...jobs.map((job) => {
    const share = job.total ? `${count(job.done)} of ${count(job.total)}` : count(job.done);
    const end = () => act("ending", async () => {
      await json(`v1/jobs/${job.id}/cancel`, {});
      await refresh();
      return `${job.id} ends`;
    });
    return el("p", { class: "row" }, el("code", {}, job.id), `${job.kind} ${job.about}`,
      el("span", { class: job.state === "failed" ? "bad" : "" }, job.state), share,
      job.failed ? el("span", { class: "bad" }, `${count(job.failed)} failed: ${job.troubles[0] || ""}`) : null,
      job.note ? el("span", { class: "quiet" }, job.note) : null,
      job.state === "running" ? el("button", { type: "button", class: "small", "aria-label": `End ${job.id}`, onclick: end }, "end") : null);
  }));
}
