"""Several people in one batched world, and frames generated before they are asked for.

All env logic is ``NFDVectorEnv``'s: one env holds every slot, and branches of it (its saved rows,
restored into envs of other sizes that share the weights) are stepped. A branch made in the idle
time before a tick is a draft: when the real action was among those assumed, its row goes back into
the slot, else it is dropped. Noise depends on (seed, episode, frame) only, so a draft is the frame
that a plain step would have made.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.play.game import Outcome, Sampling
from nfd_env.play.keys import Keymap
from nfd_env.sources.spec import SourceConfig

_FORGET = 0.997  # an answer; about a tenth a second at the usual rates


@dataclass(frozen=True)
class _Draft:
    """Row ``row`` of ``branch`` is a slot after one assumed action."""

    branch: NFDVectorEnv
    row: int
    outcome: Outcome


class Slots:
    """``count`` independent copies of a world, stepped together; use it from one thread."""

    def __init__(
        self,
        world: str | PathLike[str],
        count: int = 1,
        device: str | torch.device = "auto",
        sampling_steps: int | None = None,
        max_episode_steps: int | None = None,
        speculative_frames: int = 1,
        dynamics: str | None = None,
        drift: bool = False,
    ) -> None:
        """Load the world; see ``NFDVectorEnv`` for the arguments and errors.

        With ``speculative_frames`` = 1 speculation can still be switched on, with 2 frames. With
        ``drift`` each outcome's info has ``ood``, see ``nfd_env.play.drift``.
        """
        self._all = NFDVectorEnv(
            world,
            count,
            device,
            sampling_steps,
            max_episode_steps=max_episode_steps,
            dynamics=dynamics,
            # Room for drafts, whether or not a slot makes them: what one slot saves, another
            # must be able to take.
            speculative_frames=2 if speculative_frames == 1 else speculative_frames,
            obs_type="latent",
            autoreset_mode=AutoresetMode.DISABLED,
            ood=drift,
        )
        self.count = count
        self.world = self._all.world
        self.spec = self.world.spec
        self.name, self.fps = self.spec.name, float(self.spec.fps)
        self.frame_shape: tuple[int, ...] = (*self.spec.frame_size, 3)
        self.display_aspect = self.spec.source.display_aspect
        self.display = self.spec.display
        self.keymap = Keymap.from_source(self.spec.source, self._all.single_action_space)
        first = Sampling(
            self._all.sampling.steps,
            speculation=speculative_frames > 1,
            teacher=self._all.world.dynamics == "teacher",
        )
        self.default_sampling: Sampling | None = first
        self.steps_of: tuple[int, int] | None = None
        if self.spec.teacher is not None:
            student, teacher = self.spec.sampling.steps, self.spec.teacher.steps
            self.steps_of = (student, first.steps) if first.teacher else (first.steps, teacher)
        self._sampling = [first] * count
        self._drafts: dict[int, dict[bytes, _Draft]] = {}
        self._costs: dict[tuple[Sampling, int], float] = {}
        self._warm: set[tuple[Sampling, int]] = set()
        self._started = False
        self.views: tuple[str, ...] = ("dream",)
        self.source: SourceConfig | None = self.spec.source

    def reset(self, slot: int, seed: int | None = None) -> np.ndarray:
        """Start an episode; without a seed the next one of the slot's seed.

        Returns:
            Its first frame, uint8 (H, W, 3).
        """
        return self._begin(slot, seed)

    def view(self, slot: int) -> str:
        """See ``Game``."""
        return "dream"

    def set_view(self, slot: int, view: str) -> np.ndarray:
        """There is no other; see ``nfd_env.play.twin``."""
        return self._all.frames()[slot].cpu().numpy()

    def beside(self, slot: int) -> np.ndarray | None:
        """Nothing is shown beside it."""
        return None

    def close(self) -> None:
        """It holds nothing that must be given back."""

    def _begin(
        self, slot: int, seed: int | None, context: Mapping[str, Any] | None = None
    ) -> np.ndarray:
        """Start an episode, from a context of the real game or from one of the world's own."""
        self._drafts.pop(slot, None)
        if not self._started:
            self._all.reset(seed=np.random.SeedSequence().generate_state(self.count).tolist())
            self._started = True
        # In a branch, because the slot's own dynamics must read the frames that it starts from.
        branch = self._branch([slot], self._sampling[slot])
        branch.reset(seed=[seed], options={} if context is None else {"context": context})
        self._all.restore_state(branch.save_state(), [slot])
        return branch.frames()[0].cpu().numpy()

    def seed_of(self, slot: int) -> int:
        """The seed of a slot's episodes."""
        return self._all.np_random_seed[slot]

    def set_sampling(self, slot: int, sampling: Sampling) -> None:
        """How this slot's frames are drawn from now on.

        Reset a slot whose dynamics change: what it remembers was read by the other network.
        """
        if self._sampling[slot] != sampling:
            self._sampling[slot] = sampling
            self._drafts.pop(slot, None)

    def has_draft(self, slot: int) -> bool:
        """Whether frames wait for this slot's next action."""
        return slot in self._drafts

    def take_drafts(self, actions: Mapping[int, Any]) -> dict[int, Outcome]:
        """Hand out the frames that are there already; drops the slots' other drafts.

        Args:
            actions: slot -> action. Slots that nothing was generated for are left as they are.
        """
        hits: dict[int, _Draft] = {}
        for slot, action in actions.items():
            draft = self._drafts.pop(slot, {}).get(_key(action))
            if draft is not None:
                hits[slot] = draft
        by_branch: dict[int, list[int]] = defaultdict(list)
        for slot, draft in hits.items():
            by_branch[id(draft.branch)].append(slot)
        for slots in by_branch.values():
            branch = hits[slots[0]].branch
            self._all.restore_state(branch.save_state([hits[s].row for s in slots]), slots)
        return {slot: draft.outcome for slot, draft in hits.items()}

    def step(self, actions: Mapping[int, Any]) -> dict[int, Outcome]:
        """Advance some slots by one action each, in as few batches as their sampling allows."""
        made: dict[int, Outcome] = {}
        for sampling, slots in self._by_sampling(actions).items():
            branch, outcomes = self._step(slots, [actions[s] for s in slots], sampling, False)
            self._all.restore_state(branch.save_state(), slots)
            made.update(zip(slots, outcomes, strict=True))
            for slot in slots:
                self._drafts.pop(slot, None)
        return made

    def draft(self, guesses: Mapping[int, Sequence[Any]]) -> None:
        """Generate the next frame of some slots for each of the assumed actions.

        The slots themselves stay where they are until ``take_drafts``.
        """
        for sampling, slots in self._by_sampling(guesses).items():
            rows = [slot for slot in slots for _ in guesses[slot]]
            actions = [action for slot in slots for action in guesses[slot]]
            branch, outcomes = self._step(rows, actions, sampling, True)
            for slot in slots:
                self._drafts[slot] = {}
            for row, slot in enumerate(rows):
                self._drafts[slot][_key(actions[row])] = _Draft(branch, row, outcomes[row])

    def cost(self, rows: Mapping[int, int]) -> float:
        """Seconds that a batch is expected to take; 0 when nothing is known yet.

        Each answer forgets a little of what was measured, so that a size that was too dear in a
        busy moment is tried again after some seconds.

        Args:
            rows: slot -> how many rows of it.
        """
        groups = self._by_sampling(rows)
        return sum(self._cost(s, sum(rows[i] for i in slots)) for s, slots in groups.items())

    def _cost(self, sampling: Sampling, rows: int) -> float:
        key = sampling, rows
        if key in self._costs:
            self._costs[key] *= _FORGET
            return self._costs[key]
        if not self._costs:
            return 0.0

        def guess(known: tuple[Sampling, int]) -> float:
            # Decoding and the heads cost about as much as one more denoising step.
            steps = (sampling.steps + 1) / (known[0].steps + 1)
            # Bigger batches cost less than in proportion; the first one will tell.
            return self._costs[known] * steps * max(1.0, rows / known[1]) ** 0.5

        return guess(min(self._costs, key=lambda k: (k[0] != sampling, abs(k[1] - rows))))

    def _by_sampling(self, slots: Mapping[int, Any]) -> dict[Sampling, list[int]]:
        groups: dict[Sampling, list[int]] = defaultdict(list)
        for slot in slots:
            groups[self._sampling[slot]].append(slot)
        return groups

    def _branch(self, rows: list[int], sampling: Sampling) -> NFDVectorEnv:
        """An env with a copy of these slots."""
        branch = self._all.take(rows)
        distilled = self.spec.teacher is not None
        kind = ("teacher" if sampling.teacher else "student") if distilled else None
        branch.set_sampling(sampling.steps, dynamics=kind)
        branch.drafting = sampling.speculation
        return branch

    def _step(
        self, rows: list[int], actions: list[Any], sampling: Sampling, guessed: bool
    ) -> tuple[NFDVectorEnv, list[Outcome]]:
        began = time.perf_counter()
        branch = self._branch(rows, sampling)
        _, rewards, terminated, truncated, info = branch.step(np.stack(actions))
        frames = branch.frames().cpu().numpy()
        if sampling.speculation:
            used, lost = (info["speculation"][k] for k in ("accepted", "dropped"))
            info["acceptance"] = used / np.maximum(used + lost, 1)
        outcomes = [
            Outcome(
                frames[i],
                float(rewards[i]),
                bool(terminated[i]),
                bool(truncated[i]),
                {k: v[i].item() for k, v in info.items() if k[0] != "_" and np.ndim(v) == 1},
                guessed,
                dreamed=True,
            )
            for i in range(len(rows))
        ]
        took = time.perf_counter() - began
        # Down at once and up slowly: one hiccup of the machine must not end the drafting.
        # The first batch of a size also pays for memory and is not counted.
        key = sampling, len(rows)
        if key in self._warm:
            before = self._costs.get(key, took)
            self._costs[key] = min(took, before + 0.2 * (took - before))
        self._warm.add(key)
        return branch, outcomes


def _key(action: Any) -> bytes:
    array = np.asarray(action)
    return array.tobytes() if array.dtype.kind == "f" else array.astype(np.int64).tobytes()
