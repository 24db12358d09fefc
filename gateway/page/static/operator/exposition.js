// Metrics in the text format of Prometheus.

const SAMPLE = /^(\w+)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** Returns the samples of a text: name, labels and value. */
export function parse(text) {
  return text.split('\n').map((line) => SAMPLE.exec(line)).filter(Boolean)
    .map(([, name, labels = '', value]) => ({ name, labels: parseLabels(labels), value: Number(value) }));
}

const parseLabels = (text) => Object.fromEntries(
  [...text.matchAll(LABEL)].map(([, name, value]) => [name, value.replace(/\\(.)/g, (_, c) => (c === 'n' ? '\n' : c))]));

/** The metrics of one moment. */
export class Metrics {
  constructor(text) {
    this.samples = parse(text);
  }

  /** Returns the samples of a metric whose labels match. */
  of(name, matches = () => true) {
    return this.samples.filter((sample) => sample.name === name && matches(sample.labels));
  }

  /** Returns the sum over all workers and labels; undefined if there is no such metric. */
  sum(name, matches) {
    const found = this.of(name, matches);
    return found.length ? found.reduce((sum, { value }) => sum + value, 0) : undefined;
  }

  /** Returns pairs of a label's value and the sum of its samples, largest first. */
  by(label, name, matches) {
    const sums = new Map();
    for (const { labels, value } of this.of(name, matches)) sums.set(labels[label], (sums.get(labels[label]) ?? 0) + value);
    return [...sums].filter(([, value]) => value).sort((a, b) => b[1] - a[1]);
  }
}

/** Returns by how much a counter has grown, over the workers that have reported it both times. A counter that is
 * smaller than before has begun at 0 again: its worker was restarted. */
export function increase(name, before, now) {
  const reports = (metrics) => new Set(metrics.of('pomelo_worker_up').filter(({ value }) => value).map(({ labels }) => labels.worker));
  const earlier = reports(before);
  return [...reports(now)].filter((worker) => earlier.has(worker)).reduce((total, worker) => {
    const sum = (metrics) => metrics.sum(name, (labels) => labels.worker === worker) ?? 0;
    const [from, to] = [sum(before), sum(now)];
    return total + (to < from ? to : to - from);
  }, 0);
}
