// What is held, as a tree of prefixes: a chain of chunks is one line, a branch a level more.

import { json } from "./node.js";
import { at, bytes, count, el, show } from "./page.js";

const PAGE = 1000, MOST = 20000, SHOWN = 50;

export class Tree {
  constructor(actions) {
    this.actions = actions;
    this.chunks = new Map();
    this.whole = false;
    this.open = new Set();
  }

  // All of it: pages go by key, and where a part is missing a branch may begin anywhere.
  async refresh() {
    const chunks = new Map();
    let next = "";
    do {
      const page = await json(`v1/chunks?limit=${PAGE}&after=${next}`);
      for (const one of page.chunks) chunks.set(one.key, one);
      next = page.next;
    } while (next && chunks.size < MOST);
    this.chunks = chunks;
    this.whole = !next;
    this.show();
  }

  show() {
    const children = new Map();
    const roots = [];
    for (const one of this.chunks.values()) {
      if (!this.chunks.has(one.parent)) roots.push(one);
      else if (children.has(one.parent)) children.get(one.parent).push(one);
      else children.set(one.parent, [one]);
    }
    const branches = roots.map((root) => this.branch(root, children));
    branches.sort((a, b) => b.nbytes - a.nbytes);
    if (!branches.length) return show(at("chunks"), el("li", { class: "quiet" }, "Nothing is held."));
    const rest = branches.length - SHOWN;
    show(at("chunks"), ...branches.slice(0, SHOWN).map((one) => this.line(one)),
      rest > 0 ? el("li", { class: "quiet" }, `and ${count(rest)} smaller ones`) : null,
      this.whole ? null : el("li", { class: "warn" },
        `More than ${count(MOST)} chunks: these are parts of prefixes, and not for acting on. kvstrata ls lists all.`));
    for (const details of at("chunks").querySelectorAll("details"))
      details.ontoggle = () => (details.open ? this.open.add(details.dataset.key) : this.open.delete(details.dataset.key));
  }

  // A chain of chunks up to where it ends or branches. Without recursion: prompts are long.
  branch(first, children) {
    const top = { before: [], chain: [], below: [], keys: [], nbytes: 0, tokens: 0 };
    const stack = [[first, top]];
    const all = [top];
    while (stack.length) {
      let [chunk, place] = stack.pop();
      for (;;) {
        place.chain.push(chunk);
        const after = children.get(chunk.key) || [];
        if (after.length !== 1) {
          for (const one of after) {
            const before = [...place.before, ...place.chain.map(({ key }) => key)];
            const below = { before, chain: [], below: [], keys: [], nbytes: 0, tokens: 0 };
            place.below.push(below);
            all.push(below);
            stack.push([one, below]);
          }
          break;
        }
        [chunk] = after;
      }
    }
    for (const one of all.reverse()) {
      one.keys = [...one.chain.map(({ key }) => key), ...one.below.flatMap(({ keys }) => keys)];
      const own = one.chain.reduce((sum, { tiers }) => sum + Object.values(tiers).reduce((a, b) => a + b, 0), 0);
      one.nbytes = own + one.below.reduce((sum, { nbytes }) => sum + nbytes, 0);
      one.tokens = one.chain.reduce((sum, { num_tokens }) => sum + num_tokens, 0);
    }
    return top;
  }

  line(branch) {
    const [first] = branch.chain;
    const tiers = new Map();
    for (const one of branch.chain)
      for (const [tier, nbytes] of Object.entries(one.tiers)) tiers.set(tier, (tiers.get(tier) || 0) + nbytes);
    const where = [...tiers].map(([tier, nbytes]) => `${bytes(nbytes)} in ${tier}`).join(", ");
    const used = Math.max(...branch.chain.map((one) => one.used || 0));
    const about = [
      branch.tokens ? `${count(branch.tokens)} tokens from ${first.start}` : `${count(branch.chain.length)} chunks`,
      where,
      used ? `used ${new Date(1000 * used).toLocaleTimeString()}` : "",
    ].filter(Boolean);
    const name = first.key.slice(0, 12);
    const buttons = el("span", {}, ...(this.whole ? this.actions : []).map(({ word, run, danger }) =>
      el("button", { type: "button", class: danger ? "small danger" : "small", "aria-label": `${word} ${name} and what goes on behind it`, onclick: () => run(branch) }, word)));
    const head = [el("code", {}, name), " ", about.join("; "), " ", buttons];
    if (!branch.below.length) return el("li", {}, ...head);
    return el("li", {}, ...head,
      el("details", { open: this.open.has(first.key), "data-key": first.key },
        el("summary", {}, `${count(branch.below.length)} ways on, ${count(branch.keys.length - branch.chain.length)} chunks`),
        el("ul", {}, ...branch.below.map((one) => this.line(one)))));
  }
}
