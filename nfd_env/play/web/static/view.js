// Pictures and the heads-up display.

import { $, GLYPHS, control, overlay, page, percentile, pressed, push, rate, send, share, text, toast } from "./small.js";
import { waiting } from "./input.js";

const REPLAY_BYTES = 48 * 1024 * 1024;
const view = $("view"), pen = view.getContext("2d", { willReadFrequently: true });
export const latencies = [], gaps = [];
export const film = { frames: [], bytes: 0, replaying: false }; // the last minute: {blob, at, step}
let lastArrival = 0;            // of the picture before, while play goes on; else 0
let drawing = Promise.resolve();

export function picture(header, blob, from) {
  const arrived = performance.now();
  // One after the other, so that pictures never change places.
  drawing = drawing.then(() => draw(header, blob, arrived, from)).catch(() => {});
}

async function draw(header, blob, arrived, from) {
  const image = await createImageBitmap(blob);
  if (from === page.link && !film.replaying) paint(image);
  image.close();
  if (from !== page.link) return; // of a connection that has been replaced meanwhile
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
  page.hud = header;
  show();
}

export function paint(image) {
  if (view.width !== image.width || view.height !== image.height) {
    view.width = image.width;
    view.height = image.height;
    fitPicture();
  }
  pen.drawImage(image, 0, 0);
}

function keep(blob, header, at) {
  const { frames } = film;
  if (header.paused && frames.length && frames[frames.length - 1].step === header.step) return;
  frames.push({ blob, at, step: header.step });
  film.bytes += blob.size;
  const oldest = at - 1000 * (page.hello ? page.hello.replay_seconds : 60);
  while (frames.length && (frames[0].at < oldest || film.bytes > REPLAY_BYTES)) {
    film.bytes -= frames.shift().blob.size;
  }
}

/** Nothing of the play before counts any more. */
export function forget() {
  [view.width, view.height] = page.hello.size;
  film.frames = [];
  film.bytes = 0;
  latencies.length = gaps.length = lastArrival = 0;
}

/** Give the picture its room: with hard edges, every pixel is a whole number of dots high. */
export function fitPicture() {
  const { hello } = page, frame = $("frame");
  if (!hello) return;
  const { width: columns, height: rows } = view, aspect = hello.aspect || columns / rows;
  document.documentElement.style.setProperty("--aspect", aspect);
  view.classList.toggle("pixelated", hello.display === "pixelated");
  frame.style.width = "";
  if (hello.display !== "pixelated") return;
  const dots = window.devicePixelRatio || 1;
  const times = Math.floor(frame.clientWidth / aspect * dots / rows);
  if (times >= 1) frame.style.width = `${times * rows / dots * aspect}px`;
}

let lastShow = 0, noticed = "", shownView = "";

function show() {
  const { hud, hello, stopped } = page;
  const now = performance.now();
  const important = hud.over || hud.paused || hud.view !== shownView;
  if (!important && now - lastShow < 90) return;
  lastShow = now;
  shownView = hud.view;
  text("h-action", GLYPHS[hud.action] ? `${GLYPHS[hud.action]} ${hud.action}` : hud.action || "–");
  $("h-action").classList.toggle("long", hud.action.length > 14); // of several axes, with their shares
  text("h-reward", hud.step ? (hud.reward >= 0 ? "+" : "") + hud.reward.toFixed(2) : "–");
  text("h-return", String(Math.round(hud.return * 10) / 10));
  text("h-step", String(hud.step));
  text("h-fps", hud.paused ? "–" : rate(gaps.slice(-70)).toFixed(1));
  text("h-latency", latencies.length ? `${percentile(latencies, 50).toFixed(0)} / ${percentile(latencies, 95).toFixed(0)}` : "–");
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
  pressed("view", hud.view === "real" || hud.view === "split");
  $("badge-view").hidden = hud.view !== "real" && hud.view !== "split";
  text("badge-view", hud.view === "split" ? `real | dream${hud.apart == null ? "" : `, ${hud.apart} dB apart`}` : "real game");
  $("frame").classList.toggle("split", hud.view === "split"); // beside what differs, not over a picture
  if (hud.notice && hud.notice !== noticed) toast(hud.notice);
  noticed = hud.notice;
  const drift = hud.drift ?? null; // red above 1, in the middle of the bar
  $("drift").hidden = $("badge-drift").hidden = drift === null || film.replaying; // of the newest
  $("badge-drift").hidden ||= drift <= 1;
  $("drift").classList.toggle("red", drift > 1);
  $("drift").firstChild.style.width = `${Math.min(50 * drift, 100)}%`;
  if (drift !== null && hello?.key) $("drift-keep").hidden = false;
  $("badge-speed").hidden = hud.speed === 1;
  text("badge-speed", `×${hud.speed}`);
  if (!film.replaying && hello && !stopped) {
    const button = hud.paused ? "Play on" : "", play = () => control("pause", false);
    if (hud.over) overlay("Episode over", `return ${Math.round(hud.return * 10) / 10} in ${hud.step} steps`, button, play, true);
    else if (hud.paused) overlay("Paused", "", button, play, true);
    else overlay();
  }
  graph();
}

function graph() {
  const canvas = $("times"), ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  if (!width) return;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const c = canvas.getContext("2d");
  c.setTransform(ratio, 0, 0, ratio, 0, 0);
  c.clearRect(0, 0, width, height);
  const { hud, hello } = page;
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
  text("graph-label", gaps.length ? `p50 ${percentile(gaps, 50).toFixed(0)} · p95 ${percentile(gaps, 95).toFixed(0)} · goal ${goal.toFixed(0)}` : "");
}
