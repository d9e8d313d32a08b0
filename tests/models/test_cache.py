"""What went through the ring cache equals the windowed forward over the whole sequence."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from nfd_env.inference.rollout import new_cache
from nfd_env.models import cache as cache_module
from nfd_env.models.cache import FrameCache
from nfd_env.models.dynamics import Dynamics
from tests.models import small
from tests.models.small import WINDOW, random_frames

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
LONG = 6 * WINDOW + 1


def stream(
    network: Dynamics, cache: FrameCache, inputs: tuple[Tensor, ...], start: int, stop: int
) -> Tensor:
    """Commit the frames from ``start`` to ``stop`` one by one, each drafted for its velocity."""
    made = []
    for t in range(start, stop):
        frame = [x[:, t : t + 1] for x in inputs]
        made.append(network.stream(cache, *frame, commit=0))
        assert network.stream(cache, *frame, commit=1).shape[1] == 0
    return torch.cat(made, 1)


@pytest.fixture(params=["inference", "gradients", "unlooked"], autouse=True)
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inference takes shortcuts on the CPU, which must not show, and some that a GPU cannot."""
    if request.param == "unlooked":
        monkeypatch.setattr(cache_module, "may_look", lambda x: False)
    with torch.inference_mode(request.param != "gradients"):
        yield


@pytest.fixture(params=[0, 1, 2], ids="recent {}".format)
def network(request: pytest.FixtureRequest) -> Dynamics:
    return small.small_dynamics(recent=request.param)


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("commits", [1, 2, 3])
def test_streaming_equals_the_windowed_forward(network: Dynamics, commits: int, batch: int) -> None:
    inputs = random_frames(batch, LONG)
    cache = new_cache(network, batch, commits)
    made = []
    for start in range(0, LONG, commits):
        part = [x[:, start : start + commits] for x in inputs]
        made.append(network.stream(cache, *part, commit=0))
        network.stream(cache, *part, commit=part[0].shape[1])
    torch.testing.assert_close(torch.cat(made, 1), network(*inputs), **CLOSE)
    assert cache.length.tolist() == [LONG] * batch


@pytest.mark.parametrize(("commits", "drafts"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_drafts_see_the_history_and_one_another_and_leave_no_trace(
    network: Dynamics, commits: int, drafts: int
) -> None:
    history = random_frames(2, LONG, 0)
    draft = random_frames(2, LONG + drafts, 1)
    cache = new_cache(network, 2, max(drafts, commits))
    for start in range(0, LONG - commits + 1, commits):
        stop = start + commits
        both = [
            torch.cat((h[:, start:stop], d[:, stop : stop + drafts]), 1)
            for h, d in zip(history, draft, strict=True)
        ]
        made = network.stream(cache, *both, commit=commits)
        whole = [
            torch.cat((h[:, :stop], d[:, stop : stop + drafts]), 1)
            for h, d in zip(history, draft, strict=True)
        ]
        torch.testing.assert_close(made, network(*whole)[:, stop:], **CLOSE)
        # A pass without anything finished, as in the later denoising steps.
        again = network.stream(cache, *(x[:, commits:] for x in both), commit=0)
        torch.testing.assert_close(again, made, **CLOSE)


@pytest.mark.parametrize("count", [2, WINDOW, LONG])
def test_a_context_is_taken_in_one_pass(network: Dynamics, count: int) -> None:
    inputs = random_frames(2, count + 2 * LONG)
    at_once, one_by_one = new_cache(network, 2), new_cache(network, 2)
    stream(network, at_once, inputs, 0, 3)  # of which it forgets everything
    network.fill(at_once, *(x[:, :count] for x in inputs))
    stream(network, one_by_one, inputs, 0, count)
    torch.testing.assert_close(
        stream(network, at_once, inputs, count, count + 2 * LONG),
        stream(network, one_by_one, inputs, count, count + 2 * LONG),
        **CLOSE,
    )


@pytest.mark.parametrize("at", [2, 2 * WINDOW + 1])
def test_masked_reset(network: Dynamics, at: int) -> None:
    inputs = random_frames(3, at + 2 * WINDOW)
    stop = at + 2 * WINDOW
    cache, untouched, fresh = (new_cache(network, 3) for _ in range(3))
    stream(network, cache, inputs, 0, at)
    stream(network, untouched, inputs, 0, at)
    cache.reset(torch.tensor([False, True, False]))
    made = stream(network, cache, inputs, at, stop)
    others = [0, 2]
    expected = stream(network, untouched, inputs, at, stop)
    assert torch.equal(made[others], expected[others])
    torch.testing.assert_close(made[1], stream(network, fresh, inputs, at, stop)[1], **CLOSE)
    assert (made[1] - expected[1]).abs().max() > 1e-3
    assert cache.length.tolist() == [stop, stop - at, stop]


def test_rows_at_different_places(network: Dynamics) -> None:
    inputs = random_frames(2, LONG)
    cache = new_cache(network, 2)
    ahead = new_cache(network, 1)
    stream(network, ahead, tuple(x[:1] for x in inputs), 0, 7)
    cache.put([0], ahead)
    behind = tuple(torch.stack((x[0, 7:15], x[1, :8])) for x in inputs)
    made = stream(network, cache, behind, 0, 8)
    whole = network(*inputs)
    torch.testing.assert_close(made[0], whole[0, 7:15], **CLOSE)
    torch.testing.assert_close(made[1], whole[1, :8], **CLOSE)


def test_taken_rows_are_independent_copies(network: Dynamics) -> None:
    inputs = random_frames(2, 12)
    cache = new_cache(network, 2)
    stream(network, cache, inputs, 0, 6)
    twin, swapped = cache.take([0, 1]), cache.take([1, 0, 1])
    keys, values, length = twin.keys.clone(), twin.values.clone(), twin.length.clone()
    expected = stream(network, cache, inputs, 6, 12)
    cache.reset(torch.tensor([True, True]))
    assert torch.equal(twin.keys, keys) and torch.equal(twin.values, values)
    assert torch.equal(twin.length, length)
    assert torch.equal(stream(network, twin, inputs, 6, 12), expected)
    order = [1, 0, 1]
    made = stream(network, swapped, tuple(x[order] for x in inputs), 6, 12)
    torch.testing.assert_close(made, expected[order], **CLOSE)


def test_put_leaves_the_other_rows_and_the_source_alone(network: Dynamics) -> None:
    inputs = random_frames(3, 10)
    cache, source = new_cache(network, 3), new_cache(network, 1)
    stream(network, cache, inputs, 0, 5)
    keys, length = cache.keys.clone(), cache.length.clone()
    cache.put([1], source)
    assert torch.equal(cache.keys[:, [0, 2]], keys[:, [0, 2]])
    assert cache.length.tolist() == [5, 0, 5] and length.tolist() == [5, 5, 5]
    stream(network, cache, inputs, 5, 8)
    assert source.length.tolist() == [0] and not source.keys.any()


def test_the_buffers_do_not_grow(network: Dynamics) -> None:
    cache = new_cache(network, 1, 2)
    shape = (2, 1, 2, WINDOW - 1 + 2 + 2, network.config.tokens, 16)
    assert cache.keys.shape == cache.values.shape == shape
    stream(network, cache, random_frames(1, LONG), 0, LONG)
    assert cache.keys.shape == cache.values.shape == shape


@pytest.mark.parametrize(
    ("count", "commit"), [(2, 2), (3, 1), (1, 2), (1, -1), (WINDOW + 2, WINDOW + 1)]
)
def test_more_frames_than_there_is_room_for(network: Dynamics, count: int, commit: int) -> None:
    cache = new_cache(network, 1)
    stream(network, cache, random_frames(1, 1), 0, 1)
    with pytest.raises(ValueError, match="a pass may finish at most"):
        network.stream(cache, *random_frames(1, count), commit=commit)
    assert cache.length.tolist() == [1]


def test_rows_may_finish_different_numbers_of_frames(network: Dynamics) -> None:
    commits, drafts, batch = 3, 2, 3
    history, draft = random_frames(batch, LONG, 0), random_frames(batch, LONG + drafts, 1)
    cache = new_cache(network, batch, max(drafts, commits))
    finished = [0] * batch
    generator = torch.Generator().manual_seed(0)
    while max(finished) + commits <= LONG:
        counts = torch.randint(1, commits + 1, (batch,), generator=generator).tolist()
        count = max(counts) + drafts
        parts, expected = [], []
        for row, (done, more) in enumerate(zip(finished, counts, strict=True)):
            stop = done + more
            whole = [
                torch.cat((h[row : row + 1, :stop], d[row : row + 1, stop : stop + drafts]), 1)
                for h, d in zip(history, draft, strict=True)
            ]
            expected.append(network(*whole)[0, done:])
            padding = [x.new_full((count, *x.shape[2:]), 0.5) for x in whole]
            parts.append([torch.cat((x[0, done:], p)) for x, p in zip(whole, padding, strict=True)])
        both = [
            torch.stack([part[:count] for part in column]) for column in zip(*parts, strict=True)
        ]
        made = network.stream(cache, *both, commit=counts)  # type: ignore[misc]
        for row, target in enumerate(expected):
            target = target[min(counts) :]
            torch.testing.assert_close(made[row, : len(target)], target, **CLOSE)
        finished = [done + more for done, more in zip(finished, counts, strict=True)]
        assert cache.length.tolist() == finished
    assert len(set(finished)) > 1
