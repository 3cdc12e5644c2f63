"""One thread that computes, and what waits for it.

The thread takes what is there: nobody waits for others to come, and while one batch is computed the next one gathers.
Heat maps have a line of their own and take turns with batches of predictions, so neither can starve the other.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from lungjax.serve.metrics import Meters
from lungjax.serve.uploads import UploadError


class Model(Protocol):
    """What is asked of a `lungjax.inference.predictor.Predictor`."""

    sizes: Any  # batch sizes, ascending
    methods: Any

    def warm(self) -> None:
        """Compiles."""

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Returns probabilities [B, classes]."""

    def blank(self) -> np.ndarray:
        """Returns an empty image, [1, H, W, C]."""

    def explain(self, pixels: np.ndarray, targets: np.ndarray | None = None, method: str = "gradcam") -> Any:
        """Returns maps [B, H, W] and probabilities [B, classes]."""


@dataclass(eq=False)
class _Entry:
    pixels: np.ndarray  # [H, W, C]
    target: int | None = None
    method: str = ""  # "" for a prediction
    answer: "Future[Any]" = field(default_factory=Future)


class Device:
    """The thread and its lines. `ready` is set once everything is compiled; `failure` says why it never will be."""

    def __init__(
        self,
        model: Model,
        meters: Meters,
        queue: int,
        explains: int,
        failed: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        self.model, self.meters, self.failed = model, meters, failed
        self.most = {"predict": queue, "explain": explains}
        self.ready = threading.Event()
        self.failure: BaseException | None = None
        self._lines: dict[str, deque[_Entry]] = {"predict": deque(), "explain": deque()}
        self._change = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)

    def start(self) -> None:
        """Starts the thread, which compiles first."""
        self._thread.start()

    def stop(self) -> None:
        """Lets it compute what waits, and ends it."""
        with self._change:
            self._stopping = True
            self._change.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def check(self, kind: str, count: int = 1) -> None:
        """Raises Refused if it is not ready yet, or has no room for `count` more images ("predict" or "explain")."""
        if self.failure is not None:
            raise UploadError(503, "failed", "the service could not load its model; its log says why")
        if not self.ready.is_set():
            raise UploadError(503, "starting", "the service is starting; try again in a few seconds")
        if len(self._lines[kind]) + count > self.most[kind]:
            raise UploadError(503, "queue", "too many images wait already; try again in a second")

    def predict(self, pixels: Sequence[np.ndarray]) -> "list[Future[np.ndarray]]":
        """Lines up images uint8 [H, W, C]; each future gets probabilities [classes]. Raises Refused as `check`."""
        return self._line_up("predict", [_Entry(one) for one in pixels])

    def explain(self, pixels: Sequence[np.ndarray], target: int | None, method: str) -> "list[Future[Any]]":
        """Lines up images; each future gets (map [H, W], probabilities [classes]). Raises Refused as `check`."""
        return self._line_up("explain", [_Entry(one, target, method) for one in pixels])

    def _line_up(self, kind: str, entries: list[_Entry]) -> "list[Future[Any]]":
        with self._change:
            self.check(kind, len(entries))
            self._lines[kind].extend(entries)
            self._count()
            self._change.notify()
        return [entry.answer for entry in entries]

    def _count(self) -> None:
        self.meters.waiting.set(sum(map(len, self._lines.values())))

    def _work(self) -> None:
        try:
            self.model.warm()
        except BaseException as error:
            self.failure = error
            self.failed(error)
            return
        self.ready.set()
        turn, cold = "predict", list(self.model.methods)[::-1]
        while True:
            # Heat maps are compiled while nobody asks for anything, the usual one first.
            while cold and not self._stopping and not any(self._lines.values()):
                self._warm(cold.pop())
            with self._change:
                while not any(self._lines.values()):
                    if self._stopping:
                        return
                    self._change.wait()
                turn = turn if self._lines[turn] else _other(turn)
                entries = self._take(turn)
                self._count()
            entries = [entry for entry in entries if entry.answer.set_running_or_notify_cancel()]
            if entries:
                self._compute(turn, entries)
            turn = _other(turn)

    def _warm(self, method: str) -> None:
        try:
            self.model.explain(self.model.blank(), method=method)
        except Exception as error:
            self.failed(error)

    def _take(self, kind: str) -> list[_Entry]:
        """Takes one heat map, or as many images as fill the largest batch that those waiting can fill."""
        line = self._lines[kind]
        count = max((n for n in self.model.sizes if n <= len(line)), default=1) if kind == "predict" else 1
        return [line.popleft() for _ in range(count)]

    def _compute(self, kind: str, entries: list[_Entry]) -> None:
        started = time.perf_counter()
        try:
            pixels = np.stack([entry.pixels for entry in entries])
            if kind == "predict":
                found = list(self.model(pixels))
                self.meters.batches.observe(len(entries))
            else:
                target, method = entries[0].target, entries[0].method
                maps, chances = self.model.explain(pixels, None if target is None else np.asarray([target]), method)
                found = [(maps[0], chances[0])]
        except Exception as error:
            for entry in entries:
                entry.answer.set_exception(error)
            return
        self.meters.device.labels(kind).observe(time.perf_counter() - started)
        for entry, value in zip(entries, found, strict=True):
            entry.answer.set_result(value)


def _other(kind: str) -> str:
    return "explain" if kind == "predict" else "predict"
