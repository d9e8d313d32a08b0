// The way to the world where there is no server: a worker computes it in this browser.

const about = fetch("world.json").then((answer) => {
  if (!answer.ok) throw new Error(answer.statusText);
  return answer.json();
});

/** Names of the worlds that can be played. */
export async function listWorlds() {
  return [(await about).hello.world];
}

/** Enter the world. `on` has `message(object)`, `picture(header, blob)` and `closed()`. */
export function enter(world, seed, on) {
  const worker = new Worker(`worker.js${location.search}`, { type: "module" });
  worker.onmessage = ({ data }) => {
    if (data.t === "bye") worker.terminate();
    if (data.t === "picture") on.picture(data.header, data.blob); else on.message(data);
  };
  worker.onerror = (event) => on.message({ t: "bye", code: 4005, why: event.message || "the worker cannot be started" });
  return { send: (message) => worker.postMessage(message), close: () => worker.terminate() };
}
