// One person's play, in a worker: the clock, the controls and the episodes of nfd_env's Session.

import { Keys } from "./keys.js";
import { hasGpu, load } from "./runtime.js";
import { World } from "./world.js";

const IN_FLIGHT = 6; // pictures that the page may leave unacknowledged before it misses some
const given = new URLSearchParams(self.location.search);

let about, world, keys;
let wanted = null;               // an episode to begin: {seed}, null for the seed's next one
let paused = false, speed = 1, single = 0, changed = false;
let over = false, endedAt = 0, steps = 0, total = 0, reward = 0, action = "", hazard = null;
let seq = 0, sent = 0, acknowledged = 0, dropped = 0;

const refuse = (why) => postMessage({ t: "refused", why });
const hasRoom = () => sent - acknowledged < IN_FLIGHT;
const period = () => 1000 / (about.hello.fps * speed);

const CONTROLS = {
  pause: (value) => { paused = value ?? !paused; },
  step: () => { single = Math.min(single + (paused ? 1 : 0), 8); paused = true; },
  reset: () => { wanted ??= { seed: null }; },
  seed: (value) => {
    const seed = value ?? crypto.getRandomValues(new Uint32Array(1))[0];
    if (Number.isInteger(seed) && seed >= 0 && seed < 2 ** 32) wanted = { seed };
    else refuse(`seed must be from 0 to ${2 ** 32 - 1}`);
  },
  speed: (value) => {
    if (about.hello.speeds.includes(value)) speed = value;
    else refuse(`speed must be one of ${about.hello.speeds}`);
  },
};

const MESSAGES = {
  key: ({ k, d, n }) => {
    if (d && over && performance.now() - endedAt > 0.4 * about.restart_ms) CONTROLS.reset();
    if (d) keys.press(k); else keys.release(k);
    seq = Math.max(seq, n);
  },
  axis: ({ i, v, n }) => { keys.tilt(i, v); seq = Math.max(seq, n); },
  release: () => keys.releaseAll(),
  ack: ({ n }) => { acknowledged = n; },
  control: ({ do: name, value }) => {
    if (CONTROLS[name]) CONTROLS[name](value);
    else refuse(`${name} needs nfd serve`);
    changed = true;
  },
};

// ---- the clock -----------------------------------------------------------------------------

// Messages come in between two steps only, also where the steps fill all the time there is: a
// timer of 0 ms would wait for longer than this does.
const channel = new MessageChannel();
let wake = () => {};
channel.port1.onmessage = () => wake();
function rest(ms) {
  return new Promise((done) => {
    wake = done;
    if (ms > 0) setTimeout(done, ms); else channel.port2.postMessage(0);
  });
}

onmessage = ({ data }) => { MESSAGES[data.t]?.(data); wake(); };

async function run() {
  let due = performance.now();
  for (;;) {
    const isOver = over && !paused && performance.now() - endedAt >= about.restart_ms;
    if (wanted || isOver) {
      const seed = wanted ? wanted.seed : null;
      wanted = null;
      await world.reset(seed);
      over = changed = false;
      steps = total = reward = 0;
      action = "";
      await show(0);
      due = performance.now() + period();
    } else if (changed && paused && hasRoom()) {
      changed = false;
      await show(0);
    }
    const now = performance.now();
    if (now >= due) {
      due = now - due > 2 * period() ? now + period() : due + period(); // what is lost is lost
      if (!over && (!paused || single > 0)) await step();
    }
    await rest(due - performance.now());
  }
}

async function step() {
  if (paused) single -= 1;
  const answering = seq, choice = keys.choose();
  const made = await world.step(choice.action);
  ({ reward, hazard } = made);
  action = choice.label;
  steps += 1;
  total += reward;
  over = made.terminated || made.truncated;
  if (over) endedAt = performance.now();
  await show(answering);
}

async function show(answering) {
  if (!hasRoom() && !over) { // the next step makes up for it, or in a pause the next room
    dropped += 1;
    changed = true;
    return;
  }
  const blob = await world.picture();
  sent += 1;
  const round = (value, places) => Number(value.toFixed(places));
  postMessage({
    t: "picture", blob, header: {
      action, reward: round(reward, 4), return: round(total, 3), step: steps, episode: world.episode + 1,
      seed: world.seed, over, paused, speed, sampling_steps: about.sampling_steps,
      hazard: hazard === null ? null : round(hazard, 4), n: sent, seq: answering, players: 1, dropped,
    },
  });
}

async function main() {
  about = await (await fetch("world.json")).json();
  keys = new Keys(about.keymap);
  const say = (what) => postMessage({ t: "loading", what });
  const backend = given.get("backend"), gpu = await hasGpu(backend);
  let where, failed = backend === "webgpu" && !gpu ? "there is none in this browser" : "";
  if (gpu) where = await begin(true, say).catch((error) => { failed = String(error.message || error); });
  where ||= await begin(false, say);
  const seed = given.get("seed");
  CONTROLS.seed(/^\d{1,10}$/.test(seed) && Number(seed) < 2 ** 32 ? Number(seed) : undefined);
  postMessage({ ...about.hello, where });
  if (failed) refuse(`WASM computes, for WebGPU cannot: ${failed}`.slice(0, 300));
  await run();
}

/** Make the world; a GPU also has to draw a first frame, for which it compiles its programs. */
async function begin(gpu, say) {
  const runtime = await load(about, gpu, say);
  world = new World(about, runtime);
  if (gpu) {
    say("what the GPU runs");
    await world.reset(0);
    await world.step(keys.choose().action);
    await world.picture();
  }
  return runtime.where;
}

main().catch((error) => postMessage({ t: "bye", code: 4005, why: String(error.message || error) }));
