// The table of adapters: a row for each version, kept from one look to the next, so that nothing loses its focus.

import { $, el, setText } from "./dom.js";
import { ago, mebibytes, number, short } from "./format.js";

// Heading, class of its cells, whether only admins are told, and what it says of a version.
const COLUMNS = [
  ["Adapter", "name", false, null],
  ["Version", "num", false, (v) => String(v.version)],
  ["Aliases", "", false, null],
  ["Where", "", false, null],
  ["Rank", "num", false, (v) => (v.rank ? String(v.rank) : "")],
  ["Memory", "num", true, (v) => (v.device_bytes ? `${mebibytes(v.device_bytes)}, ${v.num_pages} p.` : "")],
  ["Running", "num", true, (v) => (v.num_running ? String(v.num_running) : "")],
  ["Answered", "num", true, null],
  ["Last used", "", true, (v) => (v.last_used_ms ? ago(v.last_used_ms) : "")],
  ["Probes", "", true, (v) => v.verified],
  ["Digest", "", false, null],
  ["", "actions", true, null],
];

export class Adapters {
  constructor(moves) {
    this.moves = moves;
    this.rows = new Map(); // by name and version
    this.isAdmin = null;
    this.state = null;
    $("filter").addEventListener("input", () => this.draw());
  }

  show(state, isAdmin) {
    if (this.isAdmin !== isAdmin) {
      this.isAdmin = isAdmin;
      this.rows.clear();
      $("rows").replaceChildren();
      const shown = COLUMNS.filter(([, , isAdmins]) => isAdmin || !isAdmins);
      $("columns").replaceChildren(...shown.map(([title, kind]) => heading(title, kind)));
    }
    this.state = state;
    this.draw();
  }

  draw() {
    if (!this.state) return;
    const { adapters } = this.state;
    const wanted = $("filter").value.trim().toLowerCase();
    const total = adapters.flatMap((a) => a.versions).reduce((sum, v) => sum + (v.num_served ?? 0), 0);
    const order = [];
    let numVersions = 0;
    for (const adapter of adapters) {
      // Newest first: it is what people look for.
      const versions = [...adapter.versions].reverse();
      numVersions += versions.length;
      const texts = [adapter.name, ...versions.flatMap((v) => v.aliases)];
      if (wanted && !texts.some((text) => text.includes(wanted))) continue;
      versions.forEach((version, i) => order.push([adapter, version, i === 0, total]));
    }
    this.place(order);
    setText($("adapters-count"), `${adapters.length} with ${numVersions} versions`);
    $("no-adapters").hidden = adapters.length > 0;
    $("table").hidden = adapters.length === 0;
    this.notices();
  }

  /** Put the rows in order; those that stay are changed where they are. */
  place(order) {
    const body = $("rows");
    const kept = new Set();
    let next = body.firstChild;
    for (const [adapter, version, isFirst, total] of order) {
      const key = `${adapter.name}@${version.version}`;
      kept.add(key);
      let row = this.rows.get(key);
      if (!row) this.rows.set(key, (row = new Row(adapter.name, this.isAdmin, this.moves)));
      row.show(adapter, version, isFirst, total);
      if (row.node === next) next = next.nextSibling;
      else body.insertBefore(row.node, next);
    }
    for (const [key, row] of this.rows) {
      if (!kept.has(key)) {
        row.node.remove();
        this.rows.delete(key);
      }
    }
  }

  /** Say what an operator should look at: a registry that is away, aliases that are behind, canaries. */
  notices() {
    const { trouble, behind = [], rollouts = [] } = this.state;
    const said = [];
    if (trouble) said.push(["bad", `The registry is away; what is known keeps serving. ${trouble}`]);
    for (const one of behind) said.push(["bad", `${one.ref} stays at version ${one.version}: ${one.reason}`]);
    for (const r of rollouts) said.push([r.problem ? "bad" : "note", canary(r)]);
    const texts = said.map(([, text]) => text).join("\n");
    if (texts === this.said) return;
    this.said = texts;
    $("notices").replaceChildren(...said.map(([kind, text]) => el("p", { class: `notice ${kind}` }, text)));
  }
}

function heading(title, kind) {
  return el("th", { scope: "col", class: kind }, title || el("span", { class: "hidden" }, "Actions"));
}

function canary(r) {
  const copies = r.shadow ? ` and a copy of ${number(r.shadow)} % of the others` : "";
  return (
    `${r.ref}: version ${r.canary_version} is the canary of version ${r.holder_version}, with ` +
    `${number(r.percent)} % of its calls${copies}; ${r.state}${r.problem ? `: ${r.problem}` : ""}. ` +
    `Failed: ${r.canary.errors} of ${r.canary.calls}, where ${r.holder.errors} of ${r.holder.calls} failed before.`
  );
}

class Row {
  constructor(name, isAdmin, moves) {
    this.isAdmin = isAdmin;
    this.cells = COLUMNS.filter(([, , isAdmins]) => isAdmin || !isAdmins).map(([title, kind, , text]) => ({
      title,
      text,
      node: el("td", { class: kind, "data-title": title }),
    }));
    this.node = el("tr", {}, ...this.cells.map((cell) => cell.node));
    // Shown once for all versions; but a card on a phone, and whoever is read a row, needs it in each.
    this.name = this.cell("Adapter").appendChild(el("span"));
    this.aliases = this.cell("Aliases");
    this.where = this.cell("Where").appendChild(el("span", { class: "tier" }));
    this.digest = this.cell("Digest").appendChild(el("code"));
    if (!isAdmin) return;
    this.served = el("span");
    this.bar = el("meter", { min: 0, max: 1, "aria-hidden": "true" });
    this.cell("Answered").append(this.served, this.bar);
    this.history = el(
      "button",
      { class: "quiet small", type: "button", click: () => moves.openHistory(name) },
      "History…",
    );
    this.cell("").append(
      el(
        "button",
        { class: "quiet small", type: "button", click: () => moves.openPromote(this.adapter, this.version) },
        "Promote…",
      ),
      this.history,
    );
  }

  cell(title) {
    return this.cells.find((cell) => cell.title === title).node;
  }

  show(adapter, version, isFirst, total) {
    this.adapter = adapter;
    this.version = version;
    this.node.classList.toggle("first", isFirst);
    setText(this.name, adapter.name);
    for (const { text, node } of this.cells) if (text) setText(node, text(version));
    this.showAliases(version);
    const tier = version.quarantined ? "quarantined" : version.residency;
    this.where.className = `tier ${tier}`;
    setText(this.where, version.pinned ? `${tier}, pinned` : tier);
    setText(this.digest, short(version.digest));
    this.digest.title = version.digest;
    if (!this.isAdmin) return;
    setText(this.served, version.num_served ? number(version.num_served) : "");
    this.bar.hidden = !version.num_served;
    this.bar.value = total ? version.num_served / total : 0;
    this.history.hidden = !isFirst;
    this.node.querySelectorAll("button")[0].setAttribute("aria-label", `Promote ${adapter.name}@${version.version}`);
    this.history.setAttribute("aria-label", `History of ${adapter.name}`);
  }

  showAliases(version) {
    const canaries = (version.canaries ?? []).map((c) => `${c.alias} ${number(c.percent)} %`);
    const said = [...version.aliases, ...canaries].join("\n");
    if (said === this.saidAliases) return;
    this.saidAliases = said;
    this.aliases.replaceChildren(
      ...version.aliases.map((alias) => el("span", { class: "alias" }, alias)),
      ...canaries.map((text) => el("span", { class: "alias canary", title: "canary" }, text)),
    );
  }
}
