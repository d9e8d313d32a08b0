// From held keys to an encoded action: nfd_env's KeyLatch and Keymap.

export class Keys {
  /** `map`: {additive, noop: {value, label}, bindings: [{keys, at, value, label}], axes: [...]}. */
  constructor(map) {
    this.map = map;
    this.known = new Set(map.bindings.flatMap((binding) => binding.keys));
    this.held = new Set();
    this.tapped = new Set(); // since a step took them, whether or not they are still down
    this.tilts = new Map();
  }

  press(key) {
    if (!this.known.has(key) || this.held.has(key)) return;
    this.held.add(key);
    this.tapped.add(key);
  }

  release(key) { this.held.delete(key); }

  tilt(entry, value) { if (this.map.axes[entry]) this.tilts.set(entry, Math.max(-1, Math.min(1, value))); }

  releaseAll() {
    for (const part of [this.held, this.tapped, this.tilts]) part.clear();
  }

  /** The action of one step: {action, label}. The taps that it came from are spent. */
  choose() {
    const { map, tapped } = this, taps = [...tapped];
    const pressed = [...[...this.held].filter((key) => !tapped.has(key)), ...taps];
    const place = new Map(pressed.map((key, index) => [key, index]));
    const newest = (binding) => Math.max(...binding.keys.map((key) => place.get(key)));
    let active = map.bindings.filter((binding) => binding.keys.every((key) => place.has(key)));
    const tilts = [...this.tilts].filter(([, value]) => value).sort(([a], [b]) => a - b);
    const action = Float32Array.from(map.noop.value);
    if (!active.length && !tilts.length) return { action, label: map.noop.label };
    if (map.additive) {
      active.sort((a, b) => newest(a) - newest(b)); // of two opposite ones the newer wins
    } else {
      // A tap before a held key, then the bigger chord, then the key pressed last.
      const tap = (binding) => Math.min(taps.length, ...binding.keys.map((key) => taps.indexOf(key)).filter((i) => i >= 0));
      active.sort((a, b) => tap(a) - tap(b) || b.keys.length - a.keys.length || newest(b) - newest(a));
      active = active.slice(0, 1);
    }
    const labels = active.map((binding) => binding.label);
    for (const [entry, value] of tilts) {
      const { low, rest, high, both_ways: both, names } = map.axes[entry];
      const to = both ? (value > 0 ? high : low) : low + high - rest;
      action[entry] = rest + Math.abs(value) * (to - rest);
      labels.push(`${names[Number(action[entry] > rest)]} ${Math.round(100 * Math.abs(value))}%`);
    }
    for (const binding of active) {
      action.set(binding.value, binding.at);
      for (const key of binding.keys) tapped.delete(key);
    }
    return { action, label: [...new Set(labels)].join("+") };
  }
}
