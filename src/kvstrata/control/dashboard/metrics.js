// The node's metrics, out of the text that Prometheus reads.

const LINE = /^kvstrata_(\w+?)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

export class Metrics {
  constructor(text, when) {
    this.when = when;
    this.values = new Map();
    for (const line of text.split("\n")) {
      const found = LINE.exec(line);
      if (!found) continue;
      const labels = Object.fromEntries(
        [...(found[2] || "").matchAll(LABEL)].map(([, name, value]) => [name, value]),
      );
      if (!this.values.has(found[1])) this.values.set(found[1], []);
      this.values.get(found[1]).push({ labels, value: Number(found[3]) });
    }
  }

  all(name) {
    return this.values.get(name) || [];
  }

  sum(name, wanted = {}) {
    return this.all(name)
      .filter(({ labels }) => Object.entries(wanted).every(([key, value]) => labels[key] === value))
      .reduce((sum, { value }) => sum + value, 0);
  }
}

// The last of them, and what was added between two.
export class History {
  constructor(span_s) {
    this.span_s = span_s;
    this.samples = [];
  }

  add(metrics) {
    const last = this.samples.at(-1);
    // A node that was started again counts from nothing.
    if (last && metrics.sum("uptime_seconds") < last.sum("uptime_seconds")) this.samples = [];
    this.samples.push(metrics);
    while (this.samples[0].when < metrics.when - this.span_s) this.samples.shift();
  }

  get last() {
    return this.samples.at(-1);
  }

  // How much a counter rose within the last so many seconds.
  rise(name, wanted, within_s = this.span_s) {
    const first = this.samples.find((one) => one.when >= this.last.when - within_s);
    return Math.max(0, this.last.sum(name, wanted) - first.sum(name, wanted));
  }

  // Its rises per second, as [time, value].
  rates(name, wanted) {
    return this.samples.slice(1).map((one, number) => {
      const before = this.samples[number];
      const rise = one.sum(name, wanted) - before.sum(name, wanted);
      return [one.when, Math.max(0, rise) / Math.max(1e-3, one.when - before.when)];
    });
  }
}
