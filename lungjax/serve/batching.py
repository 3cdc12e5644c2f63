"""The compute thread and its queues.

The thread takes the images in the queue without waiting for a full batch; meanwhile the next batch accumulates.
Saliency maps have a separate queue and alternate with batches of predictions, so that neither starves.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from lungjax.inference.artifacts import image_shape
from lungjax.inference.model import Model
from lungjax.serve.metrics import Metrics
from lungjax.serve.settings import Settings
from lungjax.serve.uploads import UploadError


@dataclass(eq=False)
class _Entry:
    pixels: np.ndarray  # [H, W, C]
    target: int | None = None
    method: str = ""  # "" for a prediction
    result: "asyncio.Future[Any]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Device:
    """The thread and its queues. `ready` is true after compilation; `failure` is the error that prevented it.

    Except for the computation, everything runs in the event loop.
    """

    def __init__(
        self, model: Model, metrics: Metrics, settings: Settings, on_failure: Callable[[BaseException], None]
    ) -> None:
        self.model, self.metrics, self.on_failure = model, metrics, on_failure
        self.limits = {"predict": settings.queue, "explain": settings.explains}
        self.ready = False
        self.failure: BaseException | None = None
        self._queues: dict[str, deque[_Entry]] = {"predict": deque(), "explain": deque()}
        metrics.waiting.set_function(lambda: sum(map(len, self._queues.values())))
        self._change = asyncio.Event()
        self._stopping = False

    def stop(self) -> None:
        """Ends `run` once the queues are empty."""
        self._stopping = True
        self._change.set()

    def check(self, kind: str, count: int = 1) -> None:
        """Raises UploadError if the model is not ready, or `count` images do not fit in the queue `kind`."""
        if self.failure is not None:
            raise UploadError(503, "failed", "the service could not load its model; see its log")
        if not self.ready:
            raise UploadError(503, "starting", "the service is starting; try again in a few seconds")
        if count > self.limits[kind]:  # would not fit in an empty queue either
            raise UploadError(413, "images", f"{count} images in one request; at most {self.limits[kind]} are accepted")
        if len(self._queues[kind]) + count > self.limits[kind]:
            raise UploadError(503, "queue", "too many images are waiting; try again in a second")

    def submit(
        self, kind: str, pixels: Sequence[np.ndarray], target: int | None = None, method: str = ""
    ) -> "list[asyncio.Future[Any]]":
        """Queues images uint8 [H, W, C]. Raises UploadError as `check` does.

        The futures of "predict" give probabilities [classes], those of "explain" (map [H, W], probabilities).
        """
        self.check(kind, len(pixels))
        entries = [_Entry(image, target, method) for image in pixels]
        self._queues[kind].extend(entries)
        self._change.set()
        return [entry.result for entry in entries]

    async def run(self) -> None:
        """Compiles the model, then computes queued images until `stop`."""
        with ThreadPoolExecutor(1, "device") as thread:
            call = partial(asyncio.get_running_loop().run_in_executor, thread)
            try:
                await call(self.model.warm)
            except Exception as error:
                self.failure = error
                self.on_failure(error)
                return
            self.ready = True
            blank = np.zeros((1, *image_shape(self.model.metadata)), np.uint8)
            turn, cold = "predict", list(self.model.methods)[::-1]
            while not self._stopping or any(self._queues.values()):
                if any(self._queues.values()):
                    turn = turn if self._queues[turn] else _other(turn)
                    entries = self._take(turn)
                    try:
                        results = await call(self._compute, turn, entries) if entries else []
                    except Exception as error:
                        results = [error] * len(entries)
                    for entry, result in zip(entries, results, strict=True):
                        if not entry.result.done():  # the request may have timed out
                            failed = isinstance(result, Exception)
                            (entry.result.set_exception if failed else entry.result.set_result)(result)
                    turn = _other(turn)
                elif cold:  # saliency maps are compiled while the service is idle, the default method first
                    try:
                        await call(self.model.maps, blank, np.zeros(1, np.int32), cold.pop())
                    except Exception as error:
                        self.on_failure(error)
                else:
                    self._change.clear()
                    await self._change.wait()

    def _take(self, kind: str) -> list[_Entry]:
        """Removes one image to explain, or the largest batch to predict, from a queue."""
        queue = self._queues[kind]
        fitting = [size for size in self.model.batch_sizes if size <= len(queue)]
        entries = [queue.popleft() for _ in range(max(fitting, default=1) if kind == "predict" else 1)]
        return [entry for entry in entries if not entry.result.cancelled()]

    def _compute(self, kind: str, entries: list[_Entry]) -> list[Any]:
        start = time.perf_counter()
        pixels = np.stack([entry.pixels for entry in entries])
        results = list(self.model.outputs(pixels)["probabilities"])
        if kind == "predict":
            self.metrics.batches.observe(len(entries))
        else:
            target = int(results[0].argmax()) if entries[0].target is None else entries[0].target
            results = [(self.model.maps(pixels, np.asarray([target]), entries[0].method)[0], results[0])]
        self.metrics.device.labels(kind).observe(time.perf_counter() - start)
        return results


def _other(kind: str) -> str:
    return "explain" if kind == "predict" else "predict"
