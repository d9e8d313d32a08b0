"""CUDA graphs: a step's many small operations take a GPU longer to launch than to run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

Function = Callable[..., Sequence[Tensor]]

# Capturing costs several calls, so what is called less often is not worth it.
CALLS_BEFORE_CAPTURE = 2
# One thread at a time captures, or fills, replays and reads a graph's memory.
_using = threading.Lock()


class CapturedCall:
    """One function of tensors on a GPU, replayed as a CUDA graph from the third call on.

    Every call must bring tensors of the same shapes, and the function must launch the same
    operations on the same memory whatever they hold: everything that changes from call to call is
    an input or an output. It may write to memory of its own, to which a repeated call with the same
    inputs must do the same.
    """

    def __init__(self) -> None:
        """Nothing is captured yet."""
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []

    def __call__(self, function: Function, *inputs: Tensor) -> list[Tensor]:
        """Call ``function``, which is the same in all calls, or replay it.

        Returns:
            Its outputs, which later calls leave alone.
        """
        self._calls += 1
        if self._calls <= CALLS_BEFORE_CAPTURE:
            return list(function(*inputs))
        with _using:
            if self._graph is None:
                self._capture(function, inputs)
            assert self._graph is not None
            for mine, given in zip(self._inputs, inputs, strict=True):
                mine.copy_(given)
            self._graph.replay()
            return [output.clone() for output in self._outputs]

    def _capture(self, function: Function, inputs: Sequence[Tensor]) -> None:
        device = inputs[0].device
        self._inputs = [given.clone(memory_format=torch.contiguous_format) for given in inputs]
        # What libraries allocate in a first call on another stream must not be captured.
        stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            function(*self._inputs)
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the GPU.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._outputs = list(function(*self._inputs))
        self._graph = graph


class CapturedCalls:
    """Captured calls by what they are about, and by the owner of the memory that they use."""

    def __init__(self) -> None:
        """Nothing is captured yet."""
        self._of: WeakKeyDictionary[object, dict[Hashable, CapturedCall]] = WeakKeyDictionary()

    def __reduce__(self) -> Any:
        """A copy has captured nothing: graphs belong to the memory that they were captured on."""
        return CapturedCalls, ()

    def __call__(
        self, owner: object, key: Hashable, function: Function, *inputs: Tensor
    ) -> list[Tensor]:
        """Call ``function``, or replay it; see ``CapturedCall``.

        Args:
            owner: has the memory that ``function`` uses; its graphs are given up with it.
            key: the same for equal functions and shapes of inputs.
            function: see ``CapturedCall``.
            inputs: its arguments.
        """
        with _using:
            call = self._of.setdefault(owner, {}).setdefault(key, CapturedCall())
        return call(function, *inputs)
