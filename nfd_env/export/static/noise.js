// All randomness of a world, the same numbers as nfd_env.inference.noise gives.

const GAMMA = 0x9e3779b97f4a7c15n, FACTORS = [0xbf58476d1ce4e5b9n, 0x94d049bb133111ebn];
const word = (x) => BigInt.asUintN(64, x); // in this form engines compute with machine words

/** SplitMix64 as a hash of a counter, and Box and Muller's: {normal: Float32Array, uniform}. */
export function noise(key, frame, count) {
  let counter = key + BigInt(frame) * (GAMMA << 20n);
  const next = () => {
    counter = word(counter + GAMMA);
    let bits = word((counter ^ (counter >> 30n)) * FACTORS[0]);
    bits = word((bits ^ (bits >> 27n)) * FACTORS[1]);
    return bits ^ (bits >> 31n);
  };
  const uniform = Number(next() >> 40n) * 2 ** -24, normal = new Float32Array(count);
  for (let i = 0; i < count; i += 2) {
    const bits = next();
    const radius = Math.sqrt(-2 * Math.log((Number(bits >> 32n) + 1) * 2 ** -32));
    const angle = Number(bits & 0xffffffffn) * (2 * Math.PI * 2 ** -32);
    normal[i] = radius * Math.cos(angle);
    if (i + 1 < count) normal[i + 1] = radius * Math.sin(angle);
  }
  return { normal, uniform };
}

// BLAKE2b (RFC 7693) of fewer than 128 bytes, to 8 bytes.
const START = [
  0x6a09e667f3bcc908n, 0xbb67ae8584caa73bn, 0x3c6ef372fe94f82bn, 0xa54ff53a5f1d36f1n,
  0x510e527fade682d1n, 0x9b05688c2b3e6c1fn, 0x1f83d9abfb41bd6bn, 0x5be0cd19137e2179n,
];
const ORDERS = [
  "0123456789abcdef", "ea489fd61c02b753", "b8c052fdae367194", "7931dcbe265a40f8", "905724afe1bc683d",
  "2c6a0b834d75fe19", "c51fed4a0763928b", "db7ec13950f4862a", "6fe9b308c2d714a5", "a2847615fb9e3cd0",
].map((row) => [...row].map((digit) => parseInt(digit, 16)));
const MIXED = [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15], [0, 5, 10, 15], [1, 6, 11, 12], [2, 7, 8, 13], [3, 4, 9, 14]];

/** A 63-bit hash of whole numbers, as nfd_env.inference.noise.mix gives it. */
export function mix(...numbers) {
  const text = new TextEncoder().encode(numbers.join(",")), block = new Uint8Array(128);
  block.set(text);
  const words = [...new BigUint64Array(block.buffer)]; // little endian, as all browsers' machines are
  const first = START[0] ^ 0x01010008n, v = [first, ...START.slice(1), ...START];
  v[12] ^= BigInt(text.length);
  v[14] ^= word(-1n);
  const turned = (x, places) => (x >> places) | word(x << (64n - places));
  for (let round = 0; round < 12; round++) {
    const order = ORDERS[round % 10];
    MIXED.forEach(([a, b, c, d], i) => {
      for (const [at, one, two] of [[order[2 * i], 32n, 24n], [order[2 * i + 1], 16n, 63n]]) {
        v[a] = word(v[a] + v[b] + words[at]);
        v[d] = turned(v[d] ^ v[a], one);
        v[c] = word(v[c] + v[d]);
        v[b] = turned(v[b] ^ v[c], two);
      }
    });
  }
  return (first ^ v[0] ^ v[8]) >> 1n;
}
