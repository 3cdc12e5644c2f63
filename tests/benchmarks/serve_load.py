"""Load test of the service: throughput, latency, malformed requests for minutes, and start-up time.

    python -m tests.benchmarks.serve_load --models=RUN_OR_NETWORK,... [--rounds=5] [--minutes=10] [--starts=3]
        [--images=FOLDER] [--seconds=5]

A model that is not a folder is a network with random weights. Images are those of FOLDER, or phantoms.
"""

import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from tests.benchmarks import harness
from tests.benchmarks.serve_requests import Request, encoded, malformed, pictures, random_run, request, valid

MANY = 32  # clients of the throughput test
MIXED = 12  # clients of the mixed load
MALFORMED_FRACTION = 0.1


class Server:
    def __init__(self, model: str) -> None:
        self.started = time.perf_counter()
        command = [sys.executable, "-m", "lungjax.serve", f"--model={model}", "--port=0"]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True)
        for line in self.process.stdout:
            if url := re.match(r"http://127\.0\.0\.1:\d+/", line):
                self.url = url[0]
                return
        self.fail()

    def fail(self) -> None:
        self.log.seek(0)
        raise SystemExit(self.log.read())

    def first_answer(self, body: bytes) -> float:
        """Returns the seconds from the start of the process to the first 200 of /predict."""
        while self.process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                post = urllib.request.Request(f"{self.url}predict", body, {"Content-Type": "image/png"})
                urllib.request.urlopen(post, timeout=120).read()
                return time.perf_counter() - self.started
            time.sleep(0.05)
        return self.fail()

    def processor(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def batches(self) -> np.ndarray:
        """Returns the number of computed images and of batches so far."""
        text = urllib.request.urlopen(f"{self.url}metrics").read().decode()
        names = ("lungjax_batch_images_sum", "lungjax_batch_images_count")
        return np.asarray([float(re.search(rf"^{name} (\S+)$", text, re.M)[1]) for name in names])

    def stop(self) -> int:
        """Ends it as a service manager does; returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)


class Client:
    def __init__(self, server: Server) -> None:
        self.port, self.writer = int(server.url.split(":")[2].strip("/")), None

    async def send(self, data: Request) -> tuple[int, bytes]:
        """Sends a request and returns status and body of the answer."""
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            with contextlib.suppress(ConnectionError):  # it may have answered already
                for part, pause in [(data, 0)] if isinstance(data, bytes) else data:
                    self.writer.write(part)
                    await self.writer.drain()
                    await asyncio.sleep(pause)
                    if pause and self.reader._buffer:
                        break
            head = await self.reader.readuntil(b"\r\n\r\n")
            body = await self.reader.readexactly(int(re.search(rb"content-length: (\d+)", head.lower())[1]))
        except BaseException:
            self.close()
            raise
        if b"connection: close" in head.lower():
            self.close()
        return int(head[9:12]), body

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


async def closed_loop(server: Server, clients: int, seconds: float, requests: list[bytes]) -> list[float]:
    """Returns the milliseconds of each answer to `clients` that send one request after the other."""
    latencies: list[float] = []
    turns, end = itertools.cycle(requests), time.perf_counter() + seconds

    async def run() -> None:
        client = Client(server)
        while (start := time.perf_counter()) < end:
            status, body = await client.send(next(turns))
            if status != 200:
                raise SystemExit(f"{status}: {body[:300]!r}")
            latencies.append(1e3 * (time.perf_counter() - start))
        client.close()

    await asyncio.gather(*(run() for _ in range(clients)))
    return latencies


def throughput(model: str, images: list[Image.Image], seconds: float, rounds: int) -> list[str]:
    """Measures one client and 32 clients in turns; returns the cells of a row."""
    server = Server(model)
    requests = [request(encoded(image), "image/png") for image in images]
    server.first_answer(encoded(images[0]))

    def turn(clients: int) -> dict[str, float]:
        watch = harness.Watch(lambda: server.processor() + time.process_time())
        used, computed = server.processor(), server.batches()
        latencies = asyncio.run(closed_loop(server, clients, seconds, requests))
        wall, _, others = watch.read()
        used, (computed, batches) = server.processor() - used, server.batches() - computed
        p50, p95 = np.percentile(latencies, [50, 95])
        return {
            "rate": len(latencies) / wall, "p50": p50, "p95": p95, "processor_ms": 1e3 * used / len(latencies),
            "batch": computed / batches, "others": others,
        }  # fmt: skip

    turns = harness.take_turns({n: lambda n=n: turn(n) for n in (1, MANY)}, rounds)
    server.stop()
    one, many = ({key: statistics.median(t[key] for t in turns[n]) for key in turns[n][0]} for n in (1, MANY))
    rates = {n: [t["rate"] for t in turns[n]] for n in turns}
    return [
        Path(model).name, f"{one['rate']:.1f}", f"{one['p50']:.1f}, {one['p95']:.1f}", f"{many['rate']:.1f}",
        f"{many['p50']:.0f}, {many['p95']:.0f}", harness.ratio(rates[MANY], rates[1]),
        f"{one['processor_ms']:.1f}, {many['processor_ms']:.1f}", f"{many['batch']:.1f}",
        f"{max(t['others'] for own in turns.values() for t in own):.0%}",
    ]  # fmt: skip


def mixed_load(model: str, images: list[Image.Image], minutes: float) -> str:
    """Sends valid and malformed requests; returns the results as markdown."""
    good, bad = valid(images), malformed(images)
    server = Server(model)
    server.first_answer(encoded(images[0]))
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    without_reason: set[str] = set()
    latencies: list[float] = []
    memory: list[tuple[float, float]] = []  # minutes, MiB
    start = time.perf_counter()
    end = start + 60 * minutes
    weights = [weight for weight, _ in good.values()]

    async def run(seed: int) -> None:
        rng, client = random.Random(seed), Client(server)
        while (sent := time.perf_counter()) < end:
            wrong = rng.random() < MALFORMED_FRACTION
            name = rng.choice(list(bad)) if wrong else rng.choices(list(good), weights)[0]
            kind = f"{'bad' if wrong else 'good'}: {name}"
            try:
                status, body = await client.send(rng.choice(bad[name] if wrong else good[name][1]))
            except (ConnectionError, asyncio.IncompleteReadError) as error:
                counts[kind][type(error).__name__] += 1
                continue
            counts[kind][str(status)] += 1
            if not wrong:
                latencies.append(1e3 * (time.perf_counter() - sent))
            elif not json.loads(body).get("error"):
                without_reason.add(f"{name} {status}")
        client.close()

    async def watch() -> None:
        while time.perf_counter() < end:
            memory.append(((time.perf_counter() - start) / 60, harness.resident(server.process.pid)[0]))
            await asyncio.sleep(10)

    async def everything() -> None:
        await asyncio.gather(watch(), *(run(seed) for seed in range(MIXED)))

    asyncio.run(everything())
    code, sizes, half = server.stop(), [size for _, size in memory], np.asarray(memory[len(memory) // 2 :])
    sums = {kind: sum((c for k, c in counts.items() if k.startswith(kind)), Counter()) for kind in ("good", "bad")}
    growth = f"{np.polyfit(*half.T, 1)[0]:+.2f}" if len(half) > 2 else "?"
    p50, p95 = np.percentile(latencies, [50, 95])
    kinds = [(k, ", ".join(f"{n} x {status}" for status, n in sorted(c.items()))) for k, c in sorted(counts.items())]
    return (
        f"{minutes:g} minutes of {Path(model).name}: good {dict(sums['good'])}, bad {dict(sums['bad'])}, "
        f"without a reason {sorted(without_reason)}"
        f"; p50 {p50:.0f}, p95 {p95:.0f} ms; exit code {code}.\nMemory {sizes[0]:.0f} MiB at the start, "
        f"{sizes[min(6, len(sizes) - 1)]:.0f} after a minute, {sizes[-1]:.0f} at the end, at most {max(sizes):.0f}; "
        f"second half {growth} MiB per minute.\n\n{harness.table(('kind', 'answers'), kinds)}"
    )


def start_times(model: str, images: list[Image.Image], count: int) -> list[float]:
    """Returns the seconds of `count` starts, after one that fills the compilation cache."""

    def start() -> float:
        server = Server(model)
        seconds = server.first_answer(encoded(images[0]))
        server.stop()
        return seconds

    return harness.take_turns({"start": start}, count)["start"]


def main() -> None:
    args = harness.parse(__doc__, ["models"], models=str, seconds=5.0, rounds=5, minutes=0.0, starts=0, images=Path)
    images = pictures(args.images)
    with tempfile.TemporaryDirectory() as folder:
        models = [m if Path(m).exists() else random_run(m, Path(folder), images) for m in args.models.split(",")]
        if args.starts:
            times = {Path(model).name: start_times(model, images, args.starts) for model in models}
            rows = [(name, f"{statistics.median(own):.1f}", f"{max(own):.1f}") for name, own in times.items()]
            print(harness.table(("seconds from the start to the first answer", "median", "max"), rows) + "\n")
        if args.rounds:
            heads = ("", "images/s, one", "p50, p95 ms", "images/s, 32", "p50, p95 ms", "ratio",
                     "processor ms per image", "batch", "others")  # fmt: skip
            rows = [throughput(model, images, args.seconds, args.rounds) for model in models]
            print(harness.table(heads, rows) + "\n")
        if args.minutes:
            print(mixed_load(models[0], images, args.minutes))


if __name__ == "__main__":
    main()
