// A small line chart: a title, the latest values, lines over time, and what a pointer is at.

import { el, setText, svg } from "./dom.js";

const WIDTH = 240;
const HEIGHT = 72;
const KEPT = 300;

export class Chart {
  /** `lines` are their names; `write` makes text of a value; `top` is the least that the axis reaches. */
  constructor({ title, lines, write, top = 0 }) {
    this.title = title;
    this.write = write;
    this.top = top;
    this.points = []; // [seconds, values]; a value that is not known is null
    this.values = lines.map((name, i) => ({ name, node: el("b", { class: `line${i}` }) }));
    this.paths = lines.map((_, i) => svg("path", { class: `line${i}`, "vector-effect": "non-scaling-stroke" }));
    this.cursor = svg("line", { class: "cursor", y1: 0, y2: HEIGHT, "vector-effect": "non-scaling-stroke", hidden: true });
    this.graph = svg(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" },
      svg("line", { class: "axis", x1: 0, x2: WIDTH, y1: HEIGHT, y2: HEIGHT }),
      svg("line", { class: "axis", x1: 0, x2: WIDTH, y1: HEIGHT / 2, y2: HEIGHT / 2 }),
      ...this.paths,
      this.cursor,
    );
    this.scale = el("span", { class: "muted" });
    this.when = el("span", { class: "muted" });
    this.node = el(
      "figure",
      { class: "chart" },
      el("figcaption", {}, title),
      el("p", { class: "values" }, ...this.values.map(({ name, node }) => el("span", {}, node, name && ` ${name}`))),
      this.graph,
      el("p", { class: "scale" }, this.scale, this.when),
    );
    this.graph.addEventListener("pointermove", (event) => this.point(event));
    this.graph.addEventListener("pointerleave", () => this.unpoint());
  }

  add(atS, values) {
    this.points.push([atS, values]);
    if (this.points.length > KEPT) this.points.shift();
    this.draw();
  }

  clear() {
    this.points = [];
    for (const path of this.paths) path.removeAttribute("d");
  }

  draw() {
    const known = this.points.flatMap(([, values]) => values).filter((value) => value !== null);
    const top = niceTop(Math.max(this.top, ...known));
    const [first] = this.points[0];
    const [last, latest] = this.points.at(-1);
    const span = Math.max(last - first, 60);
    this.x = (atS) => WIDTH - ((last - atS) / span) * WIDTH;
    const y = (value) => HEIGHT - (value / top) * (HEIGHT - 2);
    this.paths.forEach((path, i) => {
      let drawn = "";
      let isDown = false;
      for (const [atS, values] of this.points) {
        if (values[i] === null) {
          isDown = false;
          continue;
        }
        drawn += `${isDown ? "L" : "M"}${this.x(atS).toFixed(1)} ${y(values[i]).toFixed(1)}`;
        isDown = true;
      }
      path.setAttribute("d", drawn);
    });
    setText(this.scale, `top ${this.write(top)}`);
    if (this.cursor.hasAttribute("hidden")) this.tell(latest, `last ${Math.round(span / 60)} min`);
    const said = this.values.map(({ name }, i) => `${name} ${this.written(latest[i])}`).join(", ");
    this.graph.setAttribute("aria-label", `${this.title}: ${said}`);
  }

  written(value) {
    return value === null ? "–" : this.write(value);
  }

  tell(values, when) {
    this.values.forEach(({ node }, i) => setText(node, this.written(values[i])));
    setText(this.when, when);
  }

  point(event) {
    if (!this.points.length) return;
    const box = this.graph.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * WIDTH;
    const far = ([atS]) => Math.abs(this.x(atS) - x);
    const [atS, values] = this.points.reduce((a, b) => (far(b) < far(a) ? b : a));
    this.cursor.removeAttribute("hidden");
    this.cursor.setAttribute("x1", this.x(atS));
    this.cursor.setAttribute("x2", this.x(atS));
    this.tell(values, `${Math.round(this.points.at(-1)[0] - atS)} s ago`);
  }

  unpoint() {
    this.cursor.setAttribute("hidden", "");
    if (this.points.length) this.draw();
  }
}

/** Return the least of 1, 2, 5, 10, 20 … that is not below a value, or the like of it below 1. */
function niceTop(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}
