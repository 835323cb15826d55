"""The dense model beside the pruned one, batch by batch: what its layers give, one at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Queue
from typing import Any

import torch
from torch import Tensor, nn

from depgraph import DepgraphError
from pruners.refitting.recalibration import Observed, WatchNorms
from pruners.refitting.residual import Streams
from pruners.statistics.calls import Call, Watch, run


class Teacher:
    """Runs a model in a thread of its own, which waits until the last thing that it said is heard.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.
    weights : set of str
        Of the layers whose outputs are wanted.
    streams : set of str
        Of the layers for which the stream that they are added to is wanted, see `stream_after`.
    """

    def __init__(self, model: nn.Module, weights: set[str], streams: set[str]) -> None:
        self.model, self.weights, self.streams = model, weights, streams
        self.queue: Queue[tuple[str, Any]] = Queue(maxsize=1)
        self.stopped = threading.Event()

    @contextmanager
    def running(self, inputs: Any) -> Iterator[None]:
        """The model on one batch; it ends with the block, in the middle of a forward if need be."""
        self.stopped.clear()
        thread = threading.Thread(target=self._run, args=(inputs,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.stopped.set()
            while thread.is_alive():
                if not self.queue.empty():
                    self.queue.get()
                thread.join(timeout=0.001)
            while not self.queue.empty():
                self.queue.get()

    def next(self, name: str) -> Any:
        """The output of a layer, by its weight, or what a norm observed, by its buffer of means.

        `stream_after` a layer is what it was added to, with it. Both models call their layers in
        the same order: what comes before is not wanted any more.
        """
        while True:
            found, value = self.queue.get()
            if isinstance(value, Exception):
                raise value
            if found == name:
                return value

    def _run(self, inputs: Any) -> None:
        def after(call: Call, output: Tensor) -> Tensor:
            self._say(call.weight, output)
            return output

        def before(name: str, seen: Observed, mean: Tensor, variance: Tensor) -> None:
            self._say(name, seen)

        def added(name: str, stream: Tensor) -> None:
            self._say(stream_after(name), stream)

        try:
            with (
                torch.no_grad(),
                WatchNorms(self.model, before),
                Watch(self.model, self.weights, after),
                Streams(self.model, self.streams, added),
            ):
                run(self.model, inputs)
        except _Stopped:
            return
        except Exception as error:  # noqa: BLE001  (raised again where it is waited for)
            self.queue.put(("", error))
        else:
            order = DepgraphError("the pruned model calls its layers in another order")
            self.queue.put(("", order))

    def _say(self, name: str, value: Any) -> None:
        if self.stopped.is_set():
            raise _Stopped
        self.queue.put((name, value))


def stream_after(weight: str) -> str:
    """What the stream is called once a layer is added to it."""
    return f"{weight} +"


class _Stopped(DepgraphError):
    """The pruned model needs no more."""
