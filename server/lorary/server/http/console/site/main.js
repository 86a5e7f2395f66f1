// The page's life: sign in where that is asked, then look every few seconds for as long as somebody looks at it.

import { Adapters } from "./adapters.js";
import { ApiError, ask, token } from "./api.js";
import { $, setText } from "./dom.js";
import { Metrics } from "./metrics.js";
import { Moves } from "./moves.js";
import { Playground } from "./playground.js";

const STATE_S = 5;
const FIGURES_S = 2;

const moves = new Moves(() => look.now());
const adapters = new Adapters(moves);
const playground = new Playground();
const metrics = new Metrics();

/** Something that is done again and again while the page is seen; an error is shown and it goes on. */
class Loop {
  constructor(periodS, work) {
    this.periodS = periodS;
    this.work = work;
    this.timer = 0;
    this.isRunning = false;
    this.isWanted = false;
  }

  start() {
    if (!this.isWanted) {
      this.isWanted = true;
      this.now();
    }
  }

  stop() {
    this.isWanted = false;
    clearTimeout(this.timer);
  }

  async now() {
    clearTimeout(this.timer);
    if (this.isRunning || !this.isWanted) return;
    this.isRunning = true;
    let waitS = this.periodS;
    try {
      await this.work();
    } catch (error) {
      waitS = Math.max(waitS, onProblem(error));
    } finally {
      this.isRunning = false;
    }
    if (this.isWanted && !document.hidden) this.timer = setTimeout(() => this.now(), waitS * 1000);
  }
}

const look = new Loop(STATE_S, async () => show(await ask("state")));
const measure = new Loop(FIGURES_S, async () => metrics.add(await ask("figures")));

function show(state) {
  $("trouble").hidden = true;
  $("sign-in").hidden = true;
  $("main").hidden = false;
  const isAdmin = state.caller.role === "admin";
  for (const node of document.querySelectorAll("[data-admin]")) node.hidden = !isAdmin;
  const { base, quantization, dtype, device, version } = state.server;
  setText($("server"), [base, quantization === "none" ? dtype : quantization, device, `v${version}`].join(" · "));
  $("caller").hidden = $("sign-out").hidden = !state.caller.has_token;
  setText($("caller"), `${state.caller.name} (${state.caller.role})`);
  adapters.show(state, isAdmin);
  playground.show(state);
  isAdmin ? measure.start() : measure.stop();
}

/** Show what went wrong; return the seconds for which to leave the server alone. */
function onProblem(error) {
  if (!(error instanceof ApiError)) throw error;
  if (error.status === 401) {
    signedOut(token.get() ? error.message : "");
    return 0;
  }
  setText($("trouble"), `${error.message} Trying again.`);
  $("trouble").hidden = false;
  return error.retryAfterS;
}

function signedOut(problem) {
  look.stop();
  measure.stop();
  playground.stop();
  token.clear();
  $("main").hidden = $("caller").hidden = $("sign-out").hidden = true;
  setText($("server"), "");
  for (const node of document.querySelectorAll("[data-admin]")) node.hidden = true;
  $("trouble").hidden = true;
  $("sign-in").hidden = false;
  setText($("sign-in-problem"), problem);
  $("token").focus();
}

$("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  token.set($("token").value.trim());
  $("token").value = "";
  look.start();
});
$("sign-out").addEventListener("click", () => signedOut(""));
for (const button of document.querySelectorAll("[data-close]")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) {
    look.now();
    measure.now();
  }
});
look.start();
