// The replay of the last minute, and its film.

import { $, control, overlay, page, text, toast } from "./small.js";
import { letGo } from "./input.js";
import { film, paint } from "./view.js";

const replay = { frames: [], timer: 0, playing: false, wasPaused: false };

export function openReplay() {
  if (film.frames.length < 2) return toast("There is nothing to replay yet.");
  letGo();
  replay.wasPaused = Boolean(page.hud.paused);
  if (!replay.wasPaused) control("pause", true);
  film.replaying = true;
  replay.frames = film.frames.slice();
  $("replay").hidden = false;
  $("badge-replay").hidden = false;
  $("drift").hidden = $("badge-drift").hidden = true;
  overlay();
  $("replay-at").max = String(replay.frames.length - 1);
  seek(0);
  run(true);
}

export function closeReplay() {
  if (!film.replaying) return;
  run(false);
  film.replaying = false;
  replay.frames = [];
  $("replay").hidden = true;
  $("badge-replay").hidden = true;
  if (!replay.wasPaused) control("pause", false);
}

async function seek(at) {
  $("replay-at").value = String(at);
  const shown = replay.frames[at];
  const seconds = (shown.at - replay.frames[replay.frames.length - 1].at) / 1000;
  text("replay-time", `${seconds.toFixed(1)} s`);
  const image = await createImageBitmap(shown.blob);
  if (film.replaying && Number($("replay-at").value) === at) paint(image);
  image.close();
}

function run(on) {
  replay.playing = on;
  clearInterval(replay.timer);
  $("replay-play").querySelector("use").setAttribute("href", on ? "#i-pause" : "#i-play");
  if (!on || !page.hello) return;
  replay.timer = setInterval(() => {
    const next = Number($("replay-at").value) + 1;
    seek(next < replay.frames.length ? next : 0);
  }, 1000 / page.hello.fps);
}

async function download(button, kind, what) {
  const { hello } = page;
  if (!hello) return;
  $(button).disabled = true;
  toast(`Making the ${what}…`);
  try {
    const answer = await fetch(`clip/${hello.key}.${kind}`);
    if (!answer.ok) throw new Error(await answer.text());
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await answer.blob());
    link.download = `${hello.world}.${kind}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    toast(`The ${what} is in your downloads.`);
  } catch (error) {
    toast(`No ${what}: ${error.message}`);
  }
  $(button).disabled = false;
}

/** What led to this picture, where drift is measured. */
export function keepDrift() {
  if (!$("drift-keep").hidden) download("drift-keep", "npz", "drift of the last seconds");
}

$("replay-open").onclick = () => (film.replaying ? closeReplay() : openReplay());
$("replay-close").onclick = closeReplay;
$("replay-play").onclick = () => run(!replay.playing);
$("replay-at").oninput = () => { run(false); seek(Number($("replay-at").value)); };
$("download").onclick = () => download("download", "mp4", "film of the last minute");
$("drift-keep").onclick = keepDrift;
