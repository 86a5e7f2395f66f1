// What the charts show, worked out from two looks at the server's counters.

import { Chart } from "./charts.js";
import { $ } from "./dom.js";
import { number, seconds } from "./format.js";

const WINDOW_S = 30;
const TTFT = "lorary_time_to_first_token_seconds_bucket";

export class Metrics {
  constructor() {
    this.looks = []; // of the last WINDOW_S
    const percent = (value) => `${number(value)} %`;
    this.charts = {
      tokens: new Chart({ title: "Tokens a second", lines: ["written", "read"], write: number }),
      answers: new Chart({ title: "Answers", lines: ["running", "waiting"], write: number, top: 4 }),
      first: new Chart({ title: "First token, last 30 s", lines: ["p50", "p95"], write: seconds }),
      shared: new Chart({ title: "Adapters in one step", lines: ["on average"], write: number, top: 2 }),
      cache: new Chart({ title: "Keys and values", lines: ["of their memory"], write: percent, top: 10 }),
      memory: new Chart({ title: "Memory of adapters", lines: ["on the device"], write: (value) => `${number(value)} MiB` }),
    };
    $("charts").append(...Object.values(this.charts).map((chart) => chart.node));
  }

  add(figures) {
    const look = new Look(figures);
    const previous = this.looks.at(-1);
    if (previous && isAnothers(previous, look)) {
      this.looks = [];
      for (const chart of Object.values(this.charts)) chart.clear();
    } else if (previous) {
      this.draw(previous, look);
    }
    this.looks.push(look);
    while (this.looks.length > 1 && look.atS - this.looks[1].atS >= WINDOW_S) this.looks.shift();
  }

  draw(previous, look) {
    const { charts } = this;
    const passed = look.atS - previous.atS;
    if (passed <= 0) return;
    const grown = (name, labels) => look.sum(name, labels) - previous.sum(name, labels);
    const rate = (kind) => grown("lorary_tokens_total", { kind }) / passed;
    charts.tokens.add(look.atS, [rate("generation"), rate("prompt")]);
    charts.answers.add(look.atS, [look.sum("lorary_requests_running"), look.sum("lorary_requests_waiting")]);
    charts.first.add(look.atS, [0.5, 0.95].map((share) => quantile(this.looks[0], look, share)));
    const steps = grown("lorary_step_distinct_adapters_count");
    charts.shared.add(look.atS, [steps ? grown("lorary_step_distinct_adapters_sum") / steps : null]);
    const capacity = look.sum("lorary_kv_tokens_capacity");
    charts.cache.add(look.atS, [capacity ? (100 * look.sum("lorary_kv_tokens_used")) / capacity : 0]);
    charts.memory.add(look.atS, [look.sum("lorary_adapter_bytes") / 2 ** 20]);
  }
}

/** Whether a look is at another server, behind the same address: its clock or a counter went back. */
function isAnothers(previous, look) {
  const tokens = "lorary_tokens_total";
  return look.atS < previous.atS || look.sum(tokens) < previous.sum(tokens);
}

class Look {
  constructor({ at_s: atS, samples }) {
    this.atS = atS;
    this.samples = new Map();
    for (const [name, labels, value] of samples) {
      if (!this.samples.has(name)) this.samples.set(name, []);
      this.samples.get(name).push([labels, value]);
    }
  }

  /** Return the sum of a metric's samples that have these labels. */
  sum(name, labels = {}) {
    const wanted = Object.entries(labels);
    return (this.samples.get(name) ?? [])
      .filter(([has]) => wanted.every(([key, value]) => has[key] === value))
      .reduce((sum, [, value]) => sum + value, 0);
  }

  /** Return a histogram's cumulative counts as [upper bound, count], lowest first. */
  buckets(name) {
    return (this.samples.get(name) ?? []).map(([{ le }, count]) => [le === "+Inf" ? Infinity : Number(le), count]);
  }
}

/** Return a quantile of what was observed between two looks, as Prometheus would; null if nothing was. */
function quantile(before, after, share) {
  const counts = new Map(before.buckets(TTFT));
  const grown = after.buckets(TTFT).map(([bound, count]) => [bound, count - (counts.get(bound) ?? 0)]);
  const total = grown.at(-1)?.[1] ?? 0;
  if (!total) return null;
  const rank = share * total;
  let low = 0;
  let below = 0;
  for (const [bound, count] of grown) {
    if (count >= rank) return bound === Infinity ? low : low + ((bound - low) * (rank - below)) / (count - below);
    low = bound;
    below = count;
  }
  return low;
}
