// Promote and roll back. A move always says where this page saw the alias, so the second of two admins is told.

import { ask } from "./api.js";
import { $, el, say, setText } from "./dom.js";

export class Moves {
  constructor(onMoved) {
    this.onMoved = onMoved;
    this.target = null; // {name, version} to promote
    this.log = null; // what the server said last of the adapter in the dialog
    $("promote-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.promote();
    });
    $("promote-alias").addEventListener("input", () => this.showEffect());
  }

  async openPromote(adapter, version) {
    this.target = { name: adapter.name, version: version.version };
    setText($("promote-title"), `Promote ${adapter.name}@${version.version}`);
    setText($("promote-problem"), "");
    $("promote-reason").value = "";
    $("promote-alias").value = "";
    this.log = null;
    setText($("promote-effect"), "");
    $("promote").showModal();
    await this.refresh("promote-problem");
    if (!this.log) return;
    const aliases = Object.keys(this.log.aliases);
    $("promote-aliases").replaceChildren(...aliases.map((alias) => el("option", { value: alias })));
    const other = aliases.find((alias) => this.log.aliases[alias].version !== this.target.version);
    $("promote-alias").value = other ?? (aliases.length ? "" : "prod");
    this.showEffect();
  }

  /** Say what would happen, in the words of the log. */
  showEffect() {
    const alias = $("promote-alias").value.trim();
    const known = this.log?.aliases[alias];
    const { version } = this.target;
    let text = "";
    if (alias && !known) text = `${alias} is new; it will point at version ${version}.`;
    else if (known?.version === version) text = `${alias} points at version ${version} already.`;
    else if (known) text = `${alias}: version ${known.version} → ${version}`;
    if (known?.canary) text += `; its canary, version ${known.canary}, ends`;
    setText($("promote-effect"), text);
  }

  async promote() {
    if (!this.log) return;
    const alias = $("promote-alias").value.trim();
    const body = {
      ...this.target,
      alias,
      expect_version: this.log.aliases[alias]?.version ?? 0,
      reason: $("promote-reason").value.trim(),
    };
    if (await this.move("promote", body, "promote-problem")) {
      $("promote").close();
      say(`${alias} of ${body.name} points at version ${body.version}.`);
    } else {
      this.showEffect();
    }
  }

  async openHistory(name) {
    this.target = { name };
    this.log = null;
    setText($("history-title"), `Aliases of ${name}`);
    setText($("history-problem"), "");
    $("history-reason").value = "";
    $("history-aliases").replaceChildren();
    $("history-moves").replaceChildren();
    $("history").showModal();
    await this.refresh("history-problem");
    this.showHistory();
  }

  showHistory() {
    if (!this.log) return;
    const aliases = Object.entries(this.log.aliases);
    $("history-aliases").replaceChildren(
      ...aliases.map(([alias, at]) => this.alias(alias, at)),
      aliases.length ? "" : el("p", { class: "muted" }, "It has no aliases."),
    );
    $("history-moves").replaceChildren(
      ...this.log.moves.map((move) =>
        el(
          "tr",
          {},
          el("td", {}, el("time", { datetime: move.at, title: move.at }, new Date(move.at).toLocaleString())),
          el("td", {}, move.alias),
          el("td", {}, described(move)),
          el("td", {}, move.actor),
          el("td", {}, move.reason),
        ),
      ),
    );
  }

  alias(alias, at) {
    const back = at.canary ? "End the canary" : at.before ? `Roll back to version ${at.before}` : "";
    return el(
      "div",
      { class: "alias-row" },
      el("span", { class: "alias" }, alias),
      el("span", {}, `version ${at.version}`, at.canary ? `, canary ${at.canary}` : ""),
      back &&
        el(
          "button",
          { class: "small", type: "button", "aria-label": `${alias}: ${back}`, click: () => this.rollBack(alias, at) },
          back,
        ),
    );
  }

  async rollBack(alias, at) {
    const body = {
      name: this.target.name,
      alias,
      expect_version: at.version,
      reason: $("history-reason").value.trim(),
    };
    const moved = await this.move("rollback", body, "history-problem");
    if (moved) {
      await this.refresh("history-problem");
      say(`${alias} of ${body.name} points at version ${moved.to_version}.`);
    }
    this.showHistory();
  }

  /** Move an alias; on a refusal say why, and look again at where things are. Returns what was done, or null. */
  async move(path, body, problem) {
    setText($(problem), "");
    try {
      const moved = await ask(path, { body });
      this.onMoved();
      return moved;
    } catch (error) {
      await this.refresh(problem);
      setText($(problem), error.message);
      return null;
    }
  }

  async refresh(problem) {
    try {
      this.log = await ask(`moves/${this.target.name}`);
    } catch (error) {
      setText($(problem), error.message);
    }
  }
}

function described(move) {
  const at = (version) => (version === null ? "nothing" : String(version));
  if (move.kind === "canary") return move.canary ? `canary ${move.canary} beside ${at(move.to_version)}` : "canary ended";
  const arrow = `${at(move.from_version)} → ${at(move.to_version)}`;
  return move.kind === "rollback" ? `${arrow} (rollback)` : arrow;
}
