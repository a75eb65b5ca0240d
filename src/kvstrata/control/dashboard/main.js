// The page: asks the node every few seconds, and shows what it said.

import { branchActions, showActions, showJobs, showPins } from "./act.js";
import { showFleet } from "./fleet.js";
import { History, Metrics } from "./metrics.js";
import { json, text, useToken } from "./node.js";
import { showBytes, showNumbers, showTiers, showTokens } from "./numbers.js";
import { at, el, seconds, show } from "./page.js";
import { Requests } from "./requests.js";
import { Tree } from "./tree.js";

const EVERY_MS = 2000, SPAN_S = 600, TREE_S = 10, TREE_PER_CHUNK_S = 0.005;

const history = new History(SPAN_S);
const requests = new Requests();
const tree = new Tree(branchActions(() => again()));
let treeAt = 0, asking = false, timer;

function state(words, kind) {
  show(at("state"), el("span", { class: `pill ${kind}` }, words));
}

async function look() {
  if (asking) return;
  asking = true;
  try {
    const status = await json("v1/status");
    const when = Date.now() / 1000;
    history.add(new Metrics(await text("metrics"), when));
    await requests.refresh(when, SPAN_S);
    const bad = status.tiers.filter((one) => one.state !== "ok" && one.state !== "scanning").map(({ name }) => name);
    bad.push(...Object.keys(status.tiers_left_out || {}));
    at("node").textContent = `node ${status.pid}, KVStrata ${status.release}, up ${seconds(status.uptime_s)}`;
    if (status.draining !== "no") state("drained: takes no stores", "warn");
    else if (bad.length) state(`not in use: ${bad.join(", ")}`, "bad");
    else state("all is well", "good");
    showNumbers(history, status);
    showTokens(history, (all) => requests.rates(all));
    showTiers(history, status);
    showBytes(history, status);
    showActions(status, again);
    showPins((await json("v1/pins?limit=100")).pins, again);
    showJobs((await json("v1/jobs?limit=20")).jobs, again);
    // A large one is read more seldom: all of it is, each time.
    if (when - treeAt >= TREE_S + TREE_PER_CHUNK_S * tree.chunks.size) {
      treeAt = when;
      await tree.refresh();
    }
    await showFleet();
    at("token").hidden = true;
  } catch (problem) {
    if (problem.status === 401) at("token").hidden = false;
    state(problem.status === 401 ? "a token is needed" : problem.message, "bad");
  } finally {
    asking = false;
  }
}

async function again() {
  treeAt = 0;
  await look();
}

function every() {
  clearInterval(timer);
  // A page that nobody sees asks nothing.
  if (document.visibilityState === "visible") {
    timer = setInterval(look, EVERY_MS);
    look();
  }
}

at("token").addEventListener("submit", (event) => {
  event.preventDefault();
  useToken(at("token-field").value.trim());
  at("token-field").value = "";
  look();
});
document.addEventListener("visibilitychange", every);
every();
