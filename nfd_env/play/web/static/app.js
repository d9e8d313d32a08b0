// The browser player: one connection, one canvas, no dependencies. This part holds the connection.

import { editKeys, held, letGo, listen, setUpInput } from "./input.js";
import { closeReplay, keepDrift, openReplay } from "./replay.js";
import { $, control, overlay, page, rate, send, state, toast } from "./small.js";
import { enter, listWorlds } from "./transport.js";
import { film, fitPicture, forget, gaps, latencies, picture } from "./view.js";

let retry = 0, retryTimer = 0, hiddenPause = false;

async function start() {
  try {
    const worlds = await listWorlds();
    const wanted = new URLSearchParams(location.search).get("world");
    const select = $("world");
    select.replaceChildren(...worlds.map((name) => new Option(name, name)));
    if (worlds.includes(wanted)) select.value = wanted;
    connect();
  } catch (error) {
    state("down", "no server");
    if (error.refused) {
      state("down", "not let in");
      return overlay("Not let in", error.message);
    }
    overlay("No answer", "The server cannot be reached. Trying again…");
    again();
  }
}

function connect() {
  clearTimeout(retryTimer);
  page.stopped = "";
  page.hello = null;
  state("wait", "connecting");
  const mine = page.link = enter($("world").value, new URLSearchParams(location.search).get("seed"), {
    message: (message) => { if (mine === page.link) receive(message); },
    picture: (header, blob) => { if (mine === page.link) picture(header, blob, mine); },
    closed: () => { if (mine === page.link) closed(); },
  });
}

function receive(message) {
  if (message.t === "loading") {
    overlay("Loading", message.what || message.world);
  } else if (message.t === "hello") {
    page.hello = message;
    page.hud = {}; // what it said of the play before, a pause for one, is over
    retry = 0;
    forget();
    setUp();
    overlay();
    state("live", page.hello.where || "live");
    if (document.hidden) hide();
  } else if (message.t === "bye") {
    if (message.code === 4006) return; // the server may be started again: see closed()
    page.stopped = message.code;
    if (message.code === 4001) {
      state("down", "full");
      overlay("The server is full", `${message.why}. Waiting for one to become free…`);
    } else {
      state("down", "stopped");
      const title = message.code === 4002 ? "Still there?" : "Stopped";
      overlay(title, message.why, message.code === 4002 ? "Play on" : "Try again", connect);
    }
  } else if (message.t === "refused") {
    toast(message.why);
  }
}

function closed() {
  letGo();
  page.hello = null;
  if (page.stopped && page.stopped !== 4001) return;
  if (!page.stopped) {
    state("down", "reconnecting");
    overlay("Connection lost", "Trying to reach the server again…");
  }
  again();
}

function again() {
  clearTimeout(retryTimer);
  retry = Math.min(retry + 1, 6);
  retryTimer = setTimeout(start, page.stopped ? 4000 : 400 * retry);
}

function setUp() {
  const { hello } = page;
  document.title = `${hello.world} – nfd`;
  fitPicture();
  $("speed").replaceChildren(...hello.speeds.map((s) => new Option(`× ${s}`, String(s))));
  $("sampling").replaceChildren(...hello.steps.map((s) => new Option(`${s} step${s > 1 ? "s" : ""}`, String(s))));
  const generated = hello.steps.length > 0;
  $("sampling").closest("label").hidden = !generated;
  const there = { lookahead: hello.has_ahead, speculation: generated, teacher: hello.has_teacher, agent: hello.has_agent, view: hello.views?.length > 1 };
  for (const [name, is] of Object.entries(there)) document.querySelector(`[data-do="${name}"]`).hidden = !is;
  $("download").hidden = !hello.key;
  $("drift-keep").hidden = true; // until there is some
  $("badge-saving").hidden = !hello.saving;
  setUpInput();
}

// ---- controls ------------------------------------------------------------------------------

const SHORTCUTS = {
  p: () => control("pause"), ".": () => control("step"), r: () => control("reset"), n: () => control("seed"),
  o: () => control("agent"), g: () => page.hello.has_ahead && control("lookahead"), j: () => page.hello.steps.length && control("speculation"),
  m: () => page.hello.has_teacher && control("teacher"), v: () => (film.replaying ? closeReplay() : openReplay()),
  "-": () => nudge("speed", -1), "+": () => nudge("speed", 1), "=": () => nudge("speed", 1),
  x: () => page.hello.views?.length > 1 && control("view"),
  t: () => nudge("sampling", 1, true), e: editKeys, b: keepDrift,
};

function nudge(id, by, around = false) {
  const select = $(id), count = select.options.length;
  if (!count) return;
  const to = select.selectedIndex + by;
  select.selectedIndex = around ? (to + count) % count : Math.max(0, Math.min(count - 1, to));
  select.onchange();
}

listen(SHORTCUTS, () => film.replaying);
document.addEventListener("visibilitychange", () => (document.hidden ? hide() : unhide()));
window.addEventListener("pagehide", () => { letGo(); page.link?.close(); });
window.addEventListener("pageshow", (event) => { if (event.persisted) connect(); });

// Somebody who watches, the agent's play for one, is there too: it takes a move of the mouse.
let awakeAt = 0;
window.addEventListener("pointermove", () => {
  if (performance.now() - awakeAt < 10000) return;
  awakeAt = performance.now();
  send({ t: "awake" });
});

function hide() {
  letGo();
  if (!page.hud.paused) {
    hiddenPause = true;
    control("pause", true);
  }
}

function unhide() {
  if (hiddenPause) control("pause", false);
  hiddenPause = false;
}

for (const button of document.querySelectorAll("[data-do]")) {
  button.addEventListener("click", () => {
    control(button.dataset.do);
    button.blur();
  });
}
$("speed").onchange = () => control("speed", Number($("speed").value));
$("sampling").onchange = () => control("sampling_steps", Number($("sampling").value));
$("world").onchange = () => {
  const url = new URL(location.href);
  url.searchParams.set("world", $("world").value);
  history.replaceState(null, "", url);
  letGo();
  closeReplay();
  page.link?.close();
  retry = 0;
  connect();
  $("world").blur();
};
for (const id of ["speed", "sampling"]) $(id).addEventListener("change", () => $(id).blur());

const coarse = window.matchMedia("(pointer: coarse)");
const setTouch = () => document.body.classList.toggle("touch", coarse.matches || navigator.maxTouchPoints > 0 && window.innerWidth < 900);
coarse.addEventListener("change", setTouch);
window.addEventListener("touchstart", () => document.body.classList.add("touch"), { once: true, passive: true });
setTouch();
window.addEventListener("resize", fitPicture);
$("keymap-open").onclick = () => { editKeys(); $("keymap-open").blur(); };

// For tests and the curious.
window.nfd = {
  get hud() { return page.hud; }, get hello() { return page.hello; }, latencies, gaps,
  get held() { return held(); }, get frames() { return film.frames.length; },
  get fps() { return rate(gaps); },
};
start();
