// Keys, touch buttons and gamepads, and the keys that a person has chosen instead of the usual ones.

import { $, GLYPHS, control, page, send, toast } from "./small.js";

const NAMES = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down", Space: "space",
  Enter: "return", Tab: "tab", Backspace: "backspace", ShiftLeft: "left shift", ShiftRight: "right shift",
  ControlLeft: "left ctrl", ControlRight: "right ctrl", AltLeft: "left alt" };
const down = new Map();          // source of a press -> key of the game
export const waiting = new Map(); // input number -> when it happened
let seq = 0;

export const held = () => [...down.values()];

export function press(source, key) {
  if (down.has(source)) return;
  const already = held().includes(key);
  down.set(source, key);
  if (!already) send({ t: "key", k: key, d: 1, n: count() });
  light();
}

export function release(source) {
  const key = down.get(source);
  if (key === undefined) return;
  down.delete(source);
  if (!held().includes(key)) send({ t: "key", k: key, d: 0, n: count() });
  light();
}

/** Number an input, and note when it happened. */
function count() {
  seq += 1;
  if (!page.hud.paused && !page.hud.over && page.hello) waiting.set(seq, performance.now());
  if (waiting.size > 200) waiting.clear();
  return seq;
}

export function letGo() {
  if (down.size || tilts.size) send({ t: "release", n: seq });
  down.clear();
  tilts.clear();
  waiting.clear();
  light();
}

function light() {
  const lit = new Set(down.values());
  for (const span of $("keys").children) span.classList.toggle("down", lit.has(span.dataset.key));
  for (const button of $("pad").children) button.classList.toggle("down", lit.has(button.dataset.key));
}

// ---- keyboard ------------------------------------------------------------------------------

function keyName(event) {
  if (NAMES[event.code]) return NAMES[event.code];
  return event.key.length === 1 ? event.key.toLowerCase() : "";
}

/** The key of the game that a key of the keyboard stands for, "" for none. */
function meaning(key) {
  return chosen[key] ?? (page.hello.keys.includes(key) ? key : "");
}

/** Listen to the keyboard; `shortcuts` are for keys that the game does not use. */
export function listen(shortcuts, replaying) {
  window.addEventListener("keydown", (event) => {
    if (event.ctrlKey && !NAMES[event.code] || event.metaKey || !page.hello) return;
    if ($("keymap").open) return choose(event);
    if (event.target.tagName === "SELECT" || event.target.type === "range") return;
    const key = keyName(event), meant = meaning(key);
    if (meant && !replaying()) {
      event.preventDefault();
      if (!event.repeat) press(event.code, meant);
    } else if (shortcuts[key] && !event.repeat && !event.altKey) {
      event.preventDefault();
      shortcuts[key]();
    }
  });
  window.addEventListener("keyup", (event) => release(event.code));
  window.addEventListener("blur", letGo);
}

// ---- keys of one's own ---------------------------------------------------------------------

let chosen = {};                 // key of the keyboard -> key of the game
let asking = "";                 // key of the game that a key is being chosen for

const place = () => `nfd keys ${page.hello.world}`;

function load() {
  chosen = {};
  asking = "";
  try {
    const stored = JSON.parse(localStorage.getItem(place()) || "{}");
    for (const [key, meant] of Object.entries(stored)) {
      if (page.hello.keys.includes(meant)) chosen[key] = meant;
    }
  } catch { /* no storage here, or not ours: the usual keys */ }
}

function store() {
  try {
    if (Object.keys(chosen).length) localStorage.setItem(place(), JSON.stringify(chosen));
    else localStorage.removeItem(place());
  } catch { toast("This browser keeps nothing: the keys are for now only."); }
}

function choose(event) {
  if (!asking) return; // the dialogue's own keys
  event.preventDefault();
  event.stopPropagation();
  const key = keyName(event);
  if (event.key !== "Escape") {
    if (!key) return;
    if (key === asking) delete chosen[key];
    else chosen[key] = asking;
    store();
  }
  asking = "";
  rows();
}

function rows() {
  const { hello } = page, groups = new Map();
  const order = buttons().map((b) => b.label);
  const place = (key) => (order.indexOf(hello.labels[key]) + 1) || order.length + 1;
  for (const key of [...hello.keys].sort((a, b) => place(a) - place(b))) {
    const label = hello.labels[key] || key;
    groups.set(label, [...(groups.get(label) || []), key]);
  }
  $("keymap-rows").replaceChildren(...[...groups].map(([label, keys]) => {
    const usual = keys.filter((key) => !(key in chosen));
    const own = Object.keys(chosen).filter((key) => keys.includes(chosen[key]));
    const row = document.createElement("div"), name = document.createElement("span");
    name.textContent = label;
    const caps = document.createElement("span");
    for (const key of [...own, ...usual]) {
      caps.append(kbd(cap(key)));
    }
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.key = keys[0];
    button.textContent = asking === keys[0] ? "press a key…" : "add a key";
    button.setAttribute("aria-pressed", String(asking === keys[0]));
    button.onclick = () => { asking = asking === keys[0] ? "" : keys[0]; rows(); };
    row.append(name, caps, button);
    return row;
  }));
}

export function editKeys() {
  if (!page.hello) return;
  letGo();
  const wasPaused = Boolean(page.hud.paused);
  if (!wasPaused) control("pause", true);
  asking = "";
  rows();
  $("keymap").showModal();
  $("keymap").onclose = () => { asking = ""; hints(); if (!wasPaused) control("pause", false); };
  // Escape gives up the choice of a key first.
  $("keymap").oncancel = (event) => { if (asking) { event.preventDefault(); asking = ""; rows(); } };
}
$("keymap-reset").onclick = () => { chosen = {}; store(); asking = ""; rows(); };
$("keymap-close").onclick = () => $("keymap").close();

// ---- what is shown of the keys -------------------------------------------------------------

/** The game's buttons, ways to turn at their sides. */
function buttons() {
  const order = { left: 0, up: 1, down: 2, right: 9 };
  return [...page.hello.buttons].sort((a, b) => (order[a.label] ?? 5) - (order[b.label] ?? 5));
}

/** What is printed on a key. */
const cap = (key) => GLYPHS[key] || (key.length === 1 ? key.toUpperCase() : key);

const shownKey = (key) => {
  const own = Object.keys(chosen).find((k) => chosen[k] === key);
  return cap(own || key);
};

function kbd(key) {
  return Object.assign(document.createElement("kbd"), { textContent: key });
}

function hints() {
  const parts = [];
  for (const { label, key } of buttons().slice(0, 10)) parts.push([shownKey(key), label]);
  const rest = { P: "pause", ".": "step", R: "reset", N: "new seed", G: "ahead", J: "speculate", V: "replay", X: "real", E: "keys" };
  if (!page.hello.has_ahead) delete rest.G;
  if (!page.hello.steps.length) delete rest.J;
  if (!(page.hello.views?.length > 1)) delete rest.X;
  const used = new Set([...page.hello.keys, ...Object.keys(chosen)]);
  for (const [key, words] of Object.entries(rest)) if (!used.has(key.toLowerCase())) parts.push([key, words]);
  $("hint").replaceChildren(...parts.map(([key, words]) => {
    const span = document.createElement("span");
    span.append(kbd(key), ` ${words}`);
    return span;
  }));
  for (const span of $("keys").children) span.textContent = GLYPHS[span.dataset.label] || shownKey(span.dataset.key);
}

/** A world has been entered: its keys, buttons and gamepad. */
export function setUpInput() {
  load();
  waiting.clear();
  $("pad").replaceChildren(...buttons().map(padButton));
  $("keys").replaceChildren(...buttons().slice(0, 8).map(({ label, key }) => {
    const span = document.createElement("span");
    span.dataset.key = key;
    span.dataset.label = label;
    return span;
  }));
  hints();
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

// ---- gamepad -------------------------------------------------------------------------------

const BUTTONS = { a: 0, b: 1, x: 2, y: 3, lb: 4, rb: 5, lt: 6, rt: 7, ls: 10, rs: 11, dpup: 12, dpdown: 13, dpleft: 14, dpright: 15 };
const AXES = { leftx: 0, lefty: 1, rightx: 2, righty: 3 };
const DEAD = 0.12, CROSS = 0.5, AXIS_MS = 33; // a message for each axis at most that often
const tilts = new Map();         // entry of the action -> {value, at}
let polling = false;

function poll() {
  const pads = [...navigator.getGamepads()].filter(Boolean);
  polling = pads.length > 0;
  if (!polling) { letGo(); return; }
  if (page.hello && !document.hidden && document.hasFocus() && !$("keymap").open) {
    pads.forEach(read);
    // One that rests does not hold back another.
    for (const [name, entry] of Object.entries(page.hello.gamepad.axes)) {
      tilt(entry, pads.map((pad) => deflection(pad, name)).reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a)));
    }
  }
  requestAnimationFrame(poll);
}

function read(pad) {
  const plan = page.hello.gamepad, value = (name) => pad.axes[AXES[name]] ?? 0;
  for (const [name, key] of Object.entries(plan.buttons)) {
    let on = Boolean(pad.buttons[BUTTONS[name]]?.pressed);
    // Where the left stick tilts no axis, it is a cross.
    if (name === "dpleft" && !("leftx" in plan.axes)) on ||= value("leftx") < -CROSS;
    if (name === "dpright" && !("leftx" in plan.axes)) on ||= value("leftx") > CROSS;
    if (name === "dpup" && !("lefty" in plan.axes)) on ||= value("lefty") < -CROSS;
    if (name === "dpdown" && !("lefty" in plan.axes)) on ||= value("lefty") > CROSS;
    const source = `gamepad${pad.index} ${name}`;
    if (on) press(source, key); else release(source);
  }
}

function deflection(pad, name) {
  let raw = (name in AXES ? pad.axes[AXES[name]] : pad.buttons[BUTTONS[name]]?.value) ?? 0;
  if (name.endsWith("y")) raw = -raw; // browsers count downwards
  const size = Math.max(0, (Math.abs(raw) - DEAD) / (1 - DEAD));
  return Math.sign(raw) * Math.round(50 * Math.min(size, 1)) / 50 || 0;
}

function tilt(entry, value) {
  const now = performance.now(), before = tilts.get(entry) || { value: 0, at: 0 };
  if (before.value === value || now - before.at < AXIS_MS) return;
  tilts.set(entry, { value, at: now });
  send({ t: "axis", i: entry, v: value, n: count() });
}

window.addEventListener("gamepadconnected", (event) => {
  toast(`Gamepad: ${event.gamepad.id.slice(0, 40)}`);
  if (!polling) { polling = true; requestAnimationFrame(poll); }
});
