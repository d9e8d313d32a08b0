// The browser player: one WebSocket, one canvas, no dependencies.
"use strict";

const $ = (id) => document.getElementById(id);
const view = $("view"), pen = view.getContext("2d", { willReadFrequently: true });
const REPLAY_BYTES = 48 * 1024 * 1024;
const GLYPHS = { left: "◀", right: "▶", up: "▲", down: "▼", fire: "●", jump: "⤒", attack: "✕" };
const NAMES = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down", Space: "space",
  Enter: "return", Tab: "tab", Backspace: "backspace", ShiftLeft: "left shift", ShiftRight: "right shift",
  ControlLeft: "left ctrl", ControlRight: "right ctrl", AltLeft: "left alt" };

let socket = null, hello = null, hud = {}, retry = 0, retryTimer = 0, stopped = "";
let seq = 0, hiddenPause = false, drawing = Promise.resolve();
const down = new Map();          // source of a press -> key name
const waiting = new Map();       // input number -> when it happened
const latencies = [], gaps = [];
let lastArrival = 0;            // of the picture before, while play goes on; else 0
let frames = [], frameBytes = 0; // the last minute: {blob, at, hud}
const replay = { on: false, playing: false, timer: 0, frames: [] };

// ---- connection ----------------------------------------------------------------------------

async function start() {
  try {
    const answer = await fetch("api/worlds");
    if (!answer.ok) throw new Error((await answer.text()) || answer.statusText);
    const about = await answer.json();
    const wanted = new URLSearchParams(location.search).get("world");
    const select = $("world");
    select.replaceChildren(...about.worlds.map((name) => new Option(name, name)));
    if (about.worlds.includes(wanted)) select.value = wanted;
    connect();
  } catch (error) {
    state("down", "no server");
    overlay("No answer", "The server cannot be reached. Trying again…");
    again();
  }
}

function connect() {
  clearTimeout(retryTimer);
  stopped = "";
  hello = null;
  state("wait", "connecting");
  const url = new URL("ws", location.href);
  url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  url.search = "";
  url.searchParams.set("world", $("world").value);
  const seed = new URLSearchParams(location.search).get("seed");
  if (seed) url.searchParams.set("seed", seed);
  const mine = socket = new WebSocket(url);
  mine.binaryType = "arraybuffer";
  mine.onmessage = (event) => {
    if (mine !== socket) return;
    if (typeof event.data === "string") receive(JSON.parse(event.data));
    else picture(event.data, mine);
  };
  mine.onclose = () => { if (mine === socket) closed(); };
}

function send(message) {
  if (socket && socket.readyState === WebSocket.OPEN && hello) socket.send(JSON.stringify(message));
}

function receive(message) {
  if (message.t === "loading") {
    overlay("Loading", message.world);
  } else if (message.t === "hello") {
    hello = message;
    retry = 0;
    waiting.clear();
    latencies.length = gaps.length = lastArrival = 0;
    forgetFrames();
    setUp();
    overlay();
    state("live", "live");
    if (document.hidden) hide();
  } else if (message.t === "bye") {
    if (message.code === 4006) return; // the server may be started again: see closed()
    stopped = message.code;
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
  hello = null;
  if (stopped && stopped !== 4001) return;
  if (!stopped) {
    state("down", "reconnecting");
    overlay("Connection lost", "Trying to reach the server again…");
  }
  again();
}

function again() {
  clearTimeout(retryTimer);
  retry = Math.min(retry + 1, 6);
  retryTimer = setTimeout($("world").options.length ? connect : start, stopped ? 4000 : 400 * retry);
}

// ---- pictures ------------------------------------------------------------------------------

function picture(buffer, from) {
  const arrived = performance.now();
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const blob = new Blob([new Uint8Array(buffer, 4 + length)], { type: "image/jpeg" });
  // One after the other, so that pictures never change places.
  drawing = drawing.then(() => draw(header, blob, arrived, from)).catch(() => {});
}

async function draw(header, blob, arrived, from) {
  const image = await createImageBitmap(blob);
  if (from === socket && !replay.on) paint(image);
  image.close();
  if (from !== socket) return; // of a connection that has been replaced meanwhile
  const now = performance.now();
  send({ t: "ack", n: header.n });
  keep(blob, header, now);
  for (const [number, since] of waiting) {
    if (number > header.seq) break;
    waiting.delete(number);
    if (!header.paused && !header.over) push(latencies, now - since, 120);
  }
  // The rest between two episodes and a pause are no frame times.
  if (lastArrival) push(gaps, arrived - lastArrival, 160);
  lastArrival = header.over || header.paused ? 0 : arrived;
  hud = header;
  show();
}

function paint(image) {
  if (view.width !== image.width || view.height !== image.height) {
    view.width = image.width;
    view.height = image.height;
  }
  pen.drawImage(image, 0, 0);
}

function keep(blob, header, at) {
  if (header.paused && frames.length && frames[frames.length - 1].step === header.step) return;
  frames.push({ blob, at, step: header.step });
  frameBytes += blob.size;
  const oldest = at - 1000 * (hello ? hello.replay_seconds : 60);
  while (frames.length && (frames[0].at < oldest || frameBytes > REPLAY_BYTES)) {
    frameBytes -= frames.shift().blob.size;
  }
}

function forgetFrames() {
  frames = [];
  frameBytes = 0;
}

// ---- heads-up display ----------------------------------------------------------------------

let lastShow = 0;

function show() {
  const now = performance.now();
  const important = hud.over || hud.paused;
  if (!important && now - lastShow < 90) return;
  lastShow = now;
  text("h-action", GLYPHS[hud.action] ? `${GLYPHS[hud.action]} ${hud.action}` : hud.action || "–");
  text("h-reward", hud.step ? (hud.reward >= 0 ? "+" : "") + hud.reward.toFixed(2) : "–");
  text("h-return", String(Math.round(hud.return * 10) / 10));
  text("h-step", String(hud.step));
  text("h-fps", hud.paused ? "–" : rate(gaps.slice(-70)).toFixed(1));
  text("h-latency", latencies.length ? `${percentile(latencies, 50).toFixed(0)} / ${percentile(latencies, 95).toFixed(0)} ms` : "–");
  text("h-ahead", share(hud.lookahead, hud.guessed));
  text("h-accepted", share(hud.speculation, hud.acceptance));
  text("h-steps", hud.sampling_steps ?? "–");
  text("players", hud.players > 1 ? `${hud.players} players` : "");
  pressed("pause", hud.paused);
  document.querySelector('[data-do="pause"] use').setAttribute("href", hud.paused ? "#i-play" : "#i-pause");
  for (const name of ["lookahead", "speculation", "teacher"]) pressed(name, hud[name]);
  pressed("agent", hud.agent);
  if (document.activeElement !== $("speed")) $("speed").value = String(hud.speed);
  if (document.activeElement !== $("sampling")) $("sampling").value = String(hud.sampling_steps);
  $("badge-agent").hidden = !hud.agent;
  $("badge-teacher").hidden = !hud.teacher;
  $("badge-speed").hidden = hud.speed === 1;
  text("badge-speed", `×${hud.speed}`);
  if (!replay.on && hello && !stopped) {
    if (hud.over) overlay("Episode over", `return ${Math.round(hud.return * 10) / 10} in ${hud.step} steps`);
    else if (hud.paused) overlay("Paused", "", "Play on", () => control("pause", false));
    else overlay();
  }
  graph();
}

function graph() {
  const canvas = $("times"), ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  if (!width) return;
  if (canvas.width !== Math.round(width * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const c = canvas.getContext("2d");
  c.setTransform(ratio, 0, 0, ratio, 0, 0);
  c.clearRect(0, 0, width, height);
  const goal = hello ? 1000 / (hello.fps * (hud.speed || 1)) : 28;
  const top = Math.max(3 * goal, 1);
  const y = (ms) => height - 2 - (height - 6) * Math.min(ms, top) / top;
  c.strokeStyle = "#33405c";
  c.setLineDash([3, 4]);
  c.beginPath(); c.moveTo(0, y(goal)); c.lineTo(width, y(goal)); c.stroke();
  c.setLineDash([]);
  const bar = width / 160, first = 160 - gaps.length;
  gaps.forEach((gap, i) => {
    c.fillStyle = gap > 2 * goal ? "#ff6b6b" : gap > 1.4 * goal ? "#ffb84d" : "#6ea8ff";
    c.fillRect((first + i) * bar, y(gap), Math.max(bar - 1, 1), height - y(gap));
  });
  text("graph-label", gaps.length ? `p50 ${percentile(gaps, 50).toFixed(0)} · p95 ${percentile(gaps, 95).toFixed(0)} ms · goal ${goal.toFixed(0)} ms` : "");
}

function setUp() {
  document.title = `${hello.world} – nfd`;
  document.documentElement.style.setProperty("--aspect", hello.aspect || view.width / view.height);
  $("speed").replaceChildren(...hello.speeds.map((s) => new Option(`× ${s}`, String(s))));
  $("sampling").replaceChildren(...hello.steps.map((s) => new Option(`${s} step${s > 1 ? "s" : ""}`, String(s))));
  const generated = hello.steps.length > 0;
  $("sampling").closest("label").hidden = !generated;
  const there = { speculation: generated, teacher: hello.has_teacher, agent: hello.has_agent };
  for (const [name, is] of Object.entries(there)) document.querySelector(`[data-do="${name}"]`).hidden = !is;
  const order = { left: 0, up: 1, down: 2, right: 9 };
  const buttons = [...hello.buttons].sort((a, b) => (order[a.label] ?? 5) - (order[b.label] ?? 5));
  $("pad").replaceChildren(...buttons.map(padButton));
  $("keys").replaceChildren(...buttons.map(({ label, key }) => {
    const span = document.createElement("span");
    span.dataset.key = key;
    span.textContent = GLYPHS[label] || key;
    return span;
  }));
  const own = buttons.map((b) => `<kbd>${escapeText(GLYPHS[b.key] || b.key)}</kbd> ${escapeText(b.label)}`);
  $("hint").innerHTML = `${own.join(" &nbsp; ")} &nbsp;·&nbsp; <kbd>P</kbd> pause &nbsp; <kbd>.</kbd> step &nbsp; <kbd>R</kbd> reset &nbsp; <kbd>N</kbd> new seed &nbsp; <kbd>G</kbd> ahead &nbsp; <kbd>J</kbd> speculate &nbsp; <kbd>V</kbd> replay`;
}

function overlay(title, body = "", button = "", act = null) {
  const key = title ? `${title}|${body}|${button}` : "";
  if ($("overlay").dataset.key === key) return;
  $("overlay").dataset.key = key;
  $("overlay").hidden = !title;
  text("overlay-title", title || "");
  text("overlay-text", body);
  $("overlay-button").hidden = !button;
  text("overlay-button", button);
  $("overlay-button").onclick = act;
}

function state(kind, words) {
  $("status").dataset.state = kind;
  $("status").querySelector("b").textContent = words;
}

let toastTimer = 0;
function toast(words) {
  text("toast", words);
  $("toast").classList.add("on");
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => $("toast").classList.remove("on"), 3000);
}

// ---- input ---------------------------------------------------------------------------------

function press(source, key) {
  if (down.has(source)) return;
  const already = [...down.values()].includes(key);
  down.set(source, key);
  if (!already) input(key, 1);
  light();
}

function release(source) {
  const key = down.get(source);
  if (key === undefined) return;
  down.delete(source);
  if (![...down.values()].includes(key)) input(key, 0);
  light();
}

function input(key, d) {
  seq += 1;
  if (!hud.paused && !hud.over && hello) waiting.set(seq, performance.now());
  if (waiting.size > 200) waiting.clear();
  send({ t: "key", k: key, d, n: seq });
}

function letGo() {
  if (down.size) send({ t: "release", n: seq });
  down.clear();
  waiting.clear();
  light();
}

function light() {
  const held = new Set(down.values());
  for (const span of $("keys").children) span.classList.toggle("down", held.has(span.dataset.key));
  for (const button of $("pad").children) button.classList.toggle("down", held.has(button.dataset.key));
}

function keyName(event) {
  if (NAMES[event.code]) return NAMES[event.code];
  return event.key.length === 1 ? event.key.toLowerCase() : "";
}

function control(name, value) {
  send(value === undefined ? { t: "control", do: name } : { t: "control", do: name, value });
}

const SHORTCUTS = {
  p: () => control("pause"), ".": () => control("step"), r: () => control("reset"), n: () => control("seed"),
  o: () => control("agent"), g: () => control("lookahead"), j: () => control("speculation"),
  m: () => hello.has_teacher && control("teacher"), v: () => (replay.on ? closeReplay() : openReplay()),
  "-": () => nudge("speed", -1), "+": () => nudge("speed", 1), "=": () => nudge("speed", 1),
  t: () => nudge("sampling", 1, true),
};

function nudge(id, by, around = false) {
  const select = $(id), count = select.options.length;
  const to = select.selectedIndex + by;
  select.selectedIndex = around ? (to + count) % count : Math.max(0, Math.min(count - 1, to));
  select.onchange();
}

window.addEventListener("keydown", (event) => {
  if (event.ctrlKey && !NAMES[event.code] || event.metaKey) return;
  if (event.target.tagName === "SELECT" || event.target.type === "range") return;
  const key = keyName(event);
  if (hello && hello.keys.includes(key) && !replay.on) {
    event.preventDefault();
    if (!event.repeat) press(event.code, key);
  } else if (hello && SHORTCUTS[key] && !event.repeat && !event.altKey) {
    event.preventDefault();
    SHORTCUTS[key]();
  }
});
window.addEventListener("keyup", (event) => release(event.code));
window.addEventListener("blur", letGo);
document.addEventListener("visibilitychange", () => (document.hidden ? hide() : unhide()));
window.addEventListener("pagehide", () => { letGo(); if (socket) socket.close(); });
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
  if (!hud.paused) {
    hiddenPause = true;
    control("pause", true);
  }
}

function unhide() {
  if (hiddenPause) control("pause", false);
  hiddenPause = false;
}

function padButton({ label, key }) {
  const button = document.createElement("button");
  button.type = "button";
  button.dataset.key = key;
  button.setAttribute("aria-label", label);
  if (GLYPHS[label]) button.textContent = GLYPHS[label];
  else button.append(Object.assign(document.createElement("small"), { textContent: label }));
  button.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    try { button.setPointerCapture(event.pointerId); } catch { /* the finger is up already */ }
    press(`pointer${event.pointerId}`, key);
    if (navigator.vibrate && navigator.userActivation?.hasBeenActive) navigator.vibrate(8);
  });
  for (const kind of ["pointerup", "pointercancel", "lostpointercapture"]) {
    button.addEventListener(kind, (event) => release(`pointer${event.pointerId}`));
  }
  button.addEventListener("contextmenu", (event) => event.preventDefault());
  return button;
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
  if (socket) socket.close();
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

// ---- replay and download -------------------------------------------------------------------

let wasPaused = false;

function openReplay() {
  if (frames.length < 2) return toast("There is nothing to replay yet.");
  letGo();
  wasPaused = Boolean(hud.paused);
  if (!wasPaused) control("pause", true);
  replay.on = true;
  replay.frames = frames.slice();
  $("replay").hidden = false;
  $("badge-replay").hidden = false;
  overlay();
  $("replay-at").max = String(replay.frames.length - 1);
  seek(0);
  playReplay(true);
}

function closeReplay() {
  if (!replay.on) return;
  playReplay(false);
  replay.on = false;
  replay.frames = [];
  $("replay").hidden = true;
  $("badge-replay").hidden = true;
  if (!wasPaused) control("pause", false);
}

async function seek(at) {
  $("replay-at").value = String(at);
  const shown = replay.frames[at];
  const seconds = (shown.at - replay.frames[replay.frames.length - 1].at) / 1000;
  text("replay-time", `${seconds.toFixed(1)} s`);
  const image = await createImageBitmap(shown.blob);
  if (replay.on && Number($("replay-at").value) === at) paint(image);
  image.close();
}

function playReplay(on) {
  replay.playing = on;
  clearInterval(replay.timer);
  $("replay-play").querySelector("use").setAttribute("href", on ? "#i-pause" : "#i-play");
  if (!on || !hello) return;
  replay.timer = setInterval(() => {
    const next = Number($("replay-at").value) + 1;
    seek(next < replay.frames.length ? next : 0);
  }, 1000 / hello.fps);
}

$("replay-open").onclick = () => (replay.on ? closeReplay() : openReplay());
$("replay-close").onclick = closeReplay;
$("replay-play").onclick = () => playReplay(!replay.playing);
$("replay-at").oninput = () => { playReplay(false); seek(Number($("replay-at").value)); };
$("download").onclick = async () => {
  if (!hello) return;
  $("download").disabled = true;
  toast("Making the film…");
  try {
    const answer = await fetch(`clip/${hello.key}.mp4`);
    if (!answer.ok) throw new Error(await answer.text());
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await answer.blob());
    link.download = `${hello.world}.mp4`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    toast("The last minute is in your downloads.");
  } catch (error) {
    toast(`No film: ${error.message}`);
  }
  $("download").disabled = false;
};

// ---- small things --------------------------------------------------------------------------

function text(id, words) {
  const element = $(id);
  if (element.textContent !== String(words)) element.textContent = words;
}
function share(on, value) {
  return !on ? "off" : value == null ? "–" : `${Math.round(100 * value)} %`;
}
function pressed(name, on) {
  document.querySelector(`[data-do="${name}"]`).setAttribute("aria-pressed", String(Boolean(on)));
}
function push(list, value, size) {
  list.push(value);
  if (list.length > size) list.shift();
}
function percentile(list, q) {
  const sorted = [...list].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(q / 100 * sorted.length))];
}
function rate(list) {
  return list.length ? 1000 * list.length / list.reduce((sum, gap) => sum + gap, 0) : 0;
}
function escapeText(words) {
  const span = document.createElement("span");
  span.textContent = words;
  return span.innerHTML;
}

// For tests and the curious.
window.nfd = {
  get hud() { return hud; }, get hello() { return hello; }, latencies, gaps,
  get held() { return [...down.values()]; }, get frames() { return frames.length; },
  get fps() { return rate(gaps); },
};
start();
