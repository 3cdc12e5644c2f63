"""One thread that computes, and the queues in front of it.

The thread takes the images that wait: none waits for a batch to fill, and while one batch is computed the next one
gathers. Saliency maps have a separate queue and alternate with batches of predictions, so that neither starves.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lungjax.serve.metrics import Metrics
from lungjax.serve.uploads import UploadError


@dataclass(eq=False)
class _Entry:
    pixels: np.ndarray  # [H, W, C]
    target: int | None = None
    method: str = ""  # "" for a prediction
    result: "Future[Any]" = field(default_factory=Future)


class Device:
    """The thread and its queues. `ready` is set after compilation; `failure` is the error that prevented it."""

    def __init__(
        self,
        model: Any,  # `inference.model.Model`
        metrics: Metrics,
        queue: int,
        explains: int,
        on_failure: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        self.model, self.metrics, self.on_failure = model, metrics, on_failure
        self.limits = {"predict": queue, "explain": explains}
        self.ready = threading.Event()
        self.failure: BaseException | None = None
        self._queues: dict[str, deque[_Entry]] = {"predict": deque(), "explain": deque()}
        self._change = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)

    def start(self) -> None:
        """Starts the thread, which compiles first."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the images that wait."""
        with self._change:
            self._stopping = True
            self._change.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def check(self, kind: str, count: int = 1) -> None:
        """Raises UploadError if it is not ready, or has no room for `count` images ("predict" or "explain")."""
        if self.failure is not None:
            raise UploadError(503, "failed", "the service could not load its model; see its log")
        if not self.ready.is_set():
            raise UploadError(503, "starting", "the service is starting; try again in a few seconds")
        if len(self._queues[kind]) + count > self.limits[kind]:
            raise UploadError(503, "queue", "too many images are waiting; try again in a second")

    def predict(self, pixels: Sequence[np.ndarray]) -> "list[Future[np.ndarray]]":
        """Queues images uint8 [H, W, C]; the futures get probabilities [classes]. Raises UploadError as `check`."""
        return self._enqueue("predict", [_Entry(image) for image in pixels])

    def explain(self, pixels: Sequence[np.ndarray], target: int | None, method: str) -> "list[Future[Any]]":
        """Queues images; the futures get (map [H, W], probabilities [classes]). Raises UploadError as `check`."""
        return self._enqueue("explain", [_Entry(image, target, method) for image in pixels])

    def _enqueue(self, kind: str, entries: list[_Entry]) -> "list[Future[Any]]":
        with self._change:
            self.check(kind, len(entries))
            self._queues[kind].extend(entries)
            self._count()
            self._change.notify()
        return [entry.result for entry in entries]

    def _count(self) -> None:
        self.metrics.waiting.set(sum(map(len, self._queues.values())))

    def _work(self) -> None:
        try:
            self.model.warm()
        except BaseException as error:
            self.failure = error
            self.on_failure(error)
            return
        self.ready.set()
        turn, cold = "predict", list(self.model.methods)[::-1]
        while True:
            # Saliency maps are compiled while the service is idle, the default method first.
            while cold and not self._stopping and not any(self._queues.values()):
                self._warm(cold.pop())
            with self._change:
                while not any(self._queues.values()):
                    if self._stopping:
                        return
                    self._change.wait()
                turn = turn if self._queues[turn] else _other(turn)
                entries = self._take(turn)
                self._count()
            entries = [entry for entry in entries if entry.result.set_running_or_notify_cancel()]
            if entries:
                self._compute(turn, entries)
            turn = _other(turn)

    def _warm(self, method: str) -> None:
        try:
            self.model.maps(np.zeros((1, *self.model.image_shape), np.uint8), np.zeros(1, np.int32), method)
        except Exception as error:
            self.on_failure(error)

    def _take(self, kind: str) -> list[_Entry]:
        """Takes one saliency map, or the images of the largest batch size that the queue can fill."""
        queue = self._queues[kind]
        fitting = [size for size in self.model.batch_sizes if size <= len(queue)]
        return [queue.popleft() for _ in range(max(fitting, default=1) if kind == "predict" else 1)]

    def _compute(self, kind: str, entries: list[_Entry]) -> None:
        start = time.perf_counter()
        try:
            pixels = np.stack([entry.pixels for entry in entries])
            results = list(self.model.outputs(pixels)["probabilities"])
            if kind == "predict":
                self.metrics.batches.observe(len(entries))
            else:
                target = int(results[0].argmax()) if entries[0].target is None else entries[0].target
                results = [(self.model.maps(pixels, np.asarray([target]), entries[0].method)[0], results[0])]
        except Exception as error:
            for entry in entries:
                entry.result.set_exception(error)
            return
        self.metrics.device.labels(kind).observe(time.perf_counter() - start)
        for entry, result in zip(entries, results, strict=True):
            entry.result.set_result(result)


def _other(kind: str) -> str:
    return "explain" if kind == "predict" else "predict"
