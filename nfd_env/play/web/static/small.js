// Small things that every part uses, and what they share.

export const $ = (id) => document.getElementById(id);

/** The state of the page: one connection, what was told about the world, the last numbers. */
export const page = { link: null, hello: null, hud: {}, stopped: "" };

export function send(message) {
  if (page.hello) page.link?.send(message);
}

export function control(name, value) {
  send(value === undefined ? { t: "control", do: name } : { t: "control", do: name, value });
}

// The sign behind the first two says that they are text: telephones show pictures of buttons.
export const GLYPHS = { left: "◀\uFE0E", right: "▶\uFE0E", up: "▲", down: "▼", fire: "●", jump: "⤒", attack: "✕" };

export function text(id, words) {
  const element = $(id);
  if (element.textContent !== String(words)) element.textContent = words;
}
export function share(on, value) {
  return !on ? "off" : value == null ? "–" : `${Math.round(100 * value)} %`;
}
export function pressed(name, on) {
  document.querySelector(`[data-do="${name}"]`).setAttribute("aria-pressed", String(Boolean(on)));
}
export function push(list, value, size) {
  list.push(value);
  if (list.length > size) list.shift();
}
export function percentile(list, q) {
  const sorted = [...list].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(q / 100 * sorted.length))];
}
export function rate(list) {
  return list.length ? 1000 * list.length / list.reduce((sum, gap) => sum + gap, 0) : 0;
}
export function escapeText(words) {
  const span = document.createElement("span");
  span.textContent = words;
  return span.innerHTML;
}

/** A window over the picture, which a `slight` one leaves to be seen; without a title it goes away. */
export function overlay(title, body = "", button = "", act = null, slight = false) {
  $("overlay").classList.toggle("slight", slight);
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

export function state(kind, words) {
  $("status").dataset.state = kind;
  $("status").querySelector("b").textContent = words;
}

let toastTimer = 0;
export function toast(words) {
  text("toast", words);
  $("toast").classList.add("on");
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => $("toast").classList.remove("on"), 3000);
}
