// The way to the server: one WebSocket. A page without a server has another file in this place.

/** Names of the worlds that can be played. */
export async function listWorlds() {
  const answer = await fetch("api/worlds");
  if (!answer.ok) {
    const error = new Error((await answer.text()) || answer.statusText);
    error.refused = answer.status === 401 || answer.status === 403;
    throw error;
  }
  return (await answer.json()).worlds;
}

/** Enter a world. `on` has `message(object)`, `picture(header, blob)` and `closed()`. */
export function enter(world, seed, on) {
  const url = new URL("ws", location.href);
  url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  url.search = "";
  url.searchParams.set("world", world);
  if (seed) url.searchParams.set("seed", seed);
  const socket = new WebSocket(url);
  socket.binaryType = "arraybuffer";
  socket.onmessage = ({ data }) => {
    if (typeof data === "string") return on.message(JSON.parse(data));
    const length = new DataView(data).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
    const picture = new Uint8Array(data, 4 + length), type = picture[0] === 0x89 ? "image/png" : "image/jpeg";
    on.picture(header, new Blob([picture], { type }));
  };
  socket.onclose = () => on.closed();
  return {
    send: (message) => { if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message)); },
    close: () => socket.close(),
  };
}
