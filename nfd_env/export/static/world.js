// The learned world of one player, step by step: what NFDVectorEnv does for one environment.

import { mix, noise } from "./noise.js";

export class World {
  constructor(about, { Tensor, sessions }) {
    this.about = about;
    this.Tensor = Tensor;
    this.sessions = sessions;
    this.seed = 0;
    this.episode = 0;
    const [height, width] = about.frame_size;
    this.canvas = new OffscreenCanvas(width, height);
    this.image = new ImageData(width, height);
    this.image.data.fill(255);
  }

  floats(values, shape) { return new this.Tensor("float32", values, shape); }

  frames(values) { return this.floats(values, [values.length / this.size, ...this.about.latent_shape]); }

  get size() { return this.about.latent_shape.reduce((a, b) => a * b); }

  /** Begin an episode: the first of a seed, or with null the next one of the seed there is. */
  async reset(seed) {
    const { about, size } = this, { sessions } = this;
    this.episode = seed === null ? this.episode + 1 : 0;
    this.seed = seed ?? this.seed;
    this.key = mix(this.seed, this.episode);
    const start = mix(this.seed, this.episode, about.start_salt) % BigInt(about.starts);
    const context = await sessions.starts.run({ start: new this.Tensor("int64", [start], [1]) });
    const count = context.latents.dims[0], width = context.actions.dims[1];
    const latents = (k) => context.latents.data.slice(k * size, (k + 1) * size);
    const actions = (k) => context.actions.data.slice(k * width, (k + 1) * width);
    this.memory = this.floats(new Float32Array(about.memory), [1, about.memory]);
    for (let k = 1; k < count; k++) await this.judge(latents(k), actions(k));
    // Frames are numbered from the first that the dynamics sees.
    const first = Math.max(0, count - about.window);
    const length = about.ring.reduce((a, b) => a * b);
    this.keep(this.floats(new Float32Array(length), about.ring), this.floats(new Float32Array(length), about.ring));
    this.before = new Float32Array(size);
    this.recent = new Float32Array(about.recent * size); // the frames before that one, oldest first
    for (let k = first; k < count; k++) {
      this.frame = k - first;
      this.remember(latents(k), noise(this.key, this.frame, 2 * size).normal, actions(k));
      if (k + 1 < count) await this.draw(actions(k), new Float32Array((1 + about.renoisings) * size));
    }
    this.shown = latents(count - 1);
    this.steps = 0;
  }

  /** Advance by one encoded action: {reward, hazard, terminated, truncated}. */
  async step(action) {
    const { about, size } = this;
    const { normal, uniform } = noise(this.key, this.frame + 1, (2 + about.renoisings) * size);
    const own = new Float32Array((1 + about.renoisings) * size);
    own.set(normal.subarray(0, size));
    own.set(normal.subarray(2 * size), size);
    this.shown = await this.draw(action, own);
    this.frame += 1;
    const { reward, hazard } = await this.judge(this.shown, action);
    this.remember(this.shown, normal, action);
    this.steps += 1;
    const truncated = about.max_episode_steps > 0 && this.steps >= about.max_episode_steps;
    return { reward, hazard, terminated: uniform < hazard, truncated };
  }

  /** The last frame, at the history level, and the action into it. */
  remember(latents, normal, action) {
    const { size, about } = this;
    const level = about.history_level, history = normal.subarray(size, 2 * size);
    if (about.recent) {
      this.recent.copyWithin(0, size);
      this.recent.set(this.before, this.recent.length - size);
    }
    this.before = latents.map((value, i) => value + level * (history[i] - value));
    this.action = action;
  }

  keep(keys, values) {
    this.keys?.dispose();
    this.values?.dispose();
    this.keys = keys;
    this.values = values;
  }

  /** Take the last frame into the ring, and draw what follows. */
  async draw(action, own) {
    const { about } = this, row = (values) => this.floats(values, [1, values.length]);
    const made = await this.sessions.dynamics.run({
      before: this.frames(this.before), action_before: row(this.action), action: row(action),
      frame: new this.Tensor("int64", [BigInt(this.frame)], [1]), noise: this.frames(own),
      keys: this.keys, values: this.values,
      ...(about.recent ? { recent: this.floats(this.recent, [1, about.recent, ...about.latent_shape]) } : {}),
    });
    this.keep(made.new_keys, made.new_values);
    return made.latents.data;
  }

  async judge(latents, action) {
    const made = await this.sessions.heads.run({
      latents: this.frames(latents), action: this.floats(action, [1, action.length]), memory: this.memory,
    });
    this.memory = made.new_memory;
    return { reward: made.reward.data[0], hazard: made.hazard.data[0] };
  }

  /** The last frame as a PNG. */
  async picture() {
    const { picture } = await this.sessions.decoder.run({ latents: this.frames(this.shown) });
    const { data } = this.image;
    for (let from = 0, to = 0; from < picture.data.length; from += 3, to += 4) data.set(picture.data.subarray(from, from + 3), to);
    this.canvas.getContext("2d").putImageData(this.image, 0, 0);
    return this.canvas.convertToBlob({ type: "image/png" });
  }
}
