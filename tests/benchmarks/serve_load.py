"""Load test of the service: throughput, latency, malformed requests for minutes, and start-up time.

    python -m tests.benchmarks.serve_load --models=RUN_OR_NETWORK,... [--seconds=8] [--rounds=5] [--minutes=10]
        [--starts=3] [--images=FOLDER] [--out=FILE]

- Throughput: one client that sends one image at a time, and 32 clients, in turns; images per second of each, the ratio
  of each round (median, lowest and highest), p50 and p95 of the latency, and the server's processor time per image.
  `others` is the largest share of the cores that other programs used.
- Malformed requests (`--minutes`, with the first model): 12 clients, a tenth of whose requests are malformed; counts by
  kind and status, the server's memory every 10 seconds, and its growth over the second half.
- Start (`--starts`): from the start of the process until /predict answers 200, with the compilation cache of a first
  start, which is not counted.

A model that is not a folder is a network with random weights. The clients are one process with open connections. Images
are 512 px PNG files of the slices in `--images`, or random ones. Prints markdown; --out gets everything as JSON.
"""

import argparse
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
import threading
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.benchmarks.serve_requests import encoded, malformed, pictures, random_run, request, valid
from tests.benchmarks.train_peers import busy_seconds

MANY = 32  # clients of the throughput test
MIXED = 12  # clients of the mixed load
MALFORMED_FRACTION = 0.1
HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
TICK = os.sysconf("SC_CLK_TCK")


class Server:
    """A service in a separate process. `log` has the lines other than those of answered requests."""

    def __init__(self, model: str) -> None:
        self.started = time.perf_counter()
        command = [sys.executable, "-m", "lungjax.serve", f"--model={model}", "--port=0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.log: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        for line in self.process.stdout:
            url = re.match(r"http://127\.0\.0\.1:(\d+)/", line)
            if url:
                self.port = int(url[1])
                return
        raise SystemExit("".join(self.log))

    def _read(self) -> None:
        for line in self.process.stderr:
            if not re.search(r" (GET|POST) /\w* (200|4\d\d) ", line):
                self.log.append(line)

    def first_answer(self, body: bytes) -> float:
        """Returns the seconds from the start of the process to the first 200 of /predict."""
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                url, headers = f"http://127.0.0.1:{self.port}/predict", {"Content-Type": "image/png"}
                with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=120) as answer:
                    answer.read()
                    return time.perf_counter() - self.started
            if self.process.poll() is not None:
                raise SystemExit("".join(self.log))
            time.sleep(0.05)

    def memory(self) -> float:
        """Returns its resident memory in MiB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024

    def processor(self) -> float:
        """Returns its processor seconds so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def batches(self) -> np.ndarray:
        """Returns the number of computed images and of batches so far."""
        text = urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics").read().decode()
        names = ("lungjax_batch_images_sum", "lungjax_batch_images_count")
        return np.asarray([float(re.search(rf"^{name} (\S+)$", text, re.M)[1]) for name in names])

    def stop(self) -> int:
        """Ends it as a service manager does; returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)


class Client:
    """One connection that stays open."""

    def __init__(self, port: int) -> None:
        self.port, self.writer = port, None

    async def send(self, data: bytes) -> tuple[int, bytes]:
        """Sends a request and returns status and body of the answer."""
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            with contextlib.suppress(ConnectionError):  # it may have answered already
                async for part, pause in self._parts(data):
                    self.writer.write(part)
                    await self.writer.drain()
                    await asyncio.sleep(pause)
            head = await self.reader.readuntil(b"\r\n\r\n")
            body = await self.reader.readexactly(int(re.search(rb"content-length: (\d+)", head.lower())[1]))
        except BaseException:
            self.close()
            raise
        if b"connection: close" in head.lower():
            self.close()
        return int(head[9:12]), body

    async def _parts(self, data: bytes) -> Any:
        if data == b"slow":
            yield HEAD + b"Content-Length: 900\r\n\r\n", 0
            for _ in range(60):
                if self.reader._buffer:
                    return
                yield b"x", 0.5
        elif data == b"chunked":
            yield HEAD + b"Transfer-Encoding: chunked\r\n\r\n", 0
            for _ in range(80):
                yield b"100000\r\n" + bytes(2**20) + b"\r\n", 0
            yield b"0\r\n\r\n", 0
        else:
            yield data, 0

    def close(self) -> None:
        """Ends the connection."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None


async def closed_loop(port: int, clients: int, seconds: float, requests: list[bytes]) -> list[float]:
    """Returns the latency of each answer to `clients` that send one request after the other."""
    latencies: list[float] = []
    turns = itertools.cycle(requests)
    end = time.perf_counter() + seconds

    async def run() -> None:
        client = Client(port)
        while time.perf_counter() < end:
            start = time.perf_counter()
            status, body = await client.send(next(turns))
            if status != 200:
                raise SystemExit(f"{status}: {body[:300]!r}")
            latencies.append(time.perf_counter() - start)
        client.close()

    await asyncio.gather(*(run() for _ in range(clients)))
    return latencies


def throughput(model: str, images: list[Image.Image], seconds: float, rounds: int) -> dict[str, Any]:
    """Measures one client and 32 clients in turns."""
    server = Server(model)
    requests = [request(encoded(image), "image/png") for image in images]
    server.first_answer(encoded(images[0]))
    asyncio.run(closed_loop(server.port, MANY, 2, requests))
    rows: dict[int, list[dict[str, float]]] = defaultdict(list)
    for _ in range(rounds):
        for clients in (1, MANY):
            busy, own, start = busy_seconds(), time.process_time(), time.perf_counter()
            used, computed = server.processor(), server.batches()
            latencies = asyncio.run(closed_loop(server.port, clients, seconds, requests))
            wall, used = time.perf_counter() - start, server.processor() - used
            images_done, batches = server.batches() - computed
            others = busy_seconds() - busy - used - (time.process_time() - own)
            row = {"rate": len(latencies) / wall, "p50": 1000 * statistics.median(latencies)}
            row |= {"p95": 1000 * float(np.percentile(latencies, 95)), "processor_ms": 1000 * used / len(latencies)}
            row |= {"batch": images_done / batches, "others": max(0.0, others / wall / (os.cpu_count() or 1))}
            rows[clients].append(row)
    ratios = sorted(many["rate"] / one["rate"] for one, many in zip(rows[1], rows[MANY], strict=True))
    return {
        "model": Path(model).name,
        "one": {key: statistics.median(row[key] for row in rows[1]) for key in rows[1][0]},
        "many": {key: statistics.median(row[key] for row in rows[MANY]) for key in rows[1][0]},
        "ratio": [statistics.median(ratios), ratios[0], ratios[-1]],
        "others": max(row["others"] for row in (*rows[1], *rows[MANY])),
        "exit": server.stop(),
        "rounds": {"one": rows[1], "many": rows[MANY]},
    }


def mixed_load(model: str, images: list[Image.Image], minutes: float) -> dict[str, Any]:
    """Sends valid and malformed requests."""
    good, bad = valid(images), malformed(images)
    server = Server(model)
    server.first_answer(encoded(images[0]))
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: dict[str, str] = {}
    latencies: list[float] = []
    memory: list[tuple[float, float]] = []
    start = time.perf_counter()
    end = start + 60 * minutes
    names, weights = list(good), [weight for weight, _ in good.values()]

    async def run(seed: int) -> None:
        rng, client = random.Random(seed), Client(server.port)
        while time.perf_counter() < end:
            wrong = rng.random() < MALFORMED_FRACTION
            name = rng.choice(list(bad)) if wrong else rng.choices(names, weights)[0]
            data = rng.choice(bad[name] if wrong else good[name][1])
            kind, sent = f"{'bad' if wrong else 'good'}: {name}", time.perf_counter()
            try:
                status, body = await client.send(data)
            except (ConnectionError, asyncio.IncompleteReadError) as error:
                counts[kind][type(error).__name__] += 1
                continue
            counts[kind][str(status)] += 1
            if wrong:
                reason = json.loads(body).get("error", "")
                reasons[f"{name} {status}"] = reason and reasons.get(f"{name} {status}", reason)
            else:
                latencies.append(time.perf_counter() - sent)
        client.close()

    async def watch() -> None:
        while time.perf_counter() < end:
            memory.append((time.perf_counter() - start, server.memory()))
            await asyncio.sleep(10)

    async def everything() -> None:
        await asyncio.gather(watch(), *(run(seed) for seed in range(MIXED)))

    asyncio.run(everything())
    code, half = server.stop(), np.asarray(memory[len(memory) // 2 :])
    sums = {kind: sum((c for k, c in counts.items() if k.startswith(kind)), Counter()) for kind in ("good", "bad")}
    sizes = [size for _, size in memory]
    return {
        "model": Path(model).name,
        "minutes": minutes,
        "good": dict(sums["good"]),
        "bad": dict(sums["bad"]),
        "good_all_answered": set(sums["good"]) <= {"200"},
        "bad_all_4xx": all(re.fullmatch(r"4\d\d", status) for status in sums["bad"]),
        "bad_without_reason": [kind for kind, reason in reasons.items() if not reason],
        "p50_ms": 1000 * statistics.median(latencies),
        "p95_ms": 1000 * float(np.percentile(latencies, 95)),
        "exit": code,
        "memory_first": sizes[min(6, len(sizes) - 1)],
        "memory_last": sizes[-1],
        "memory_max": max(sizes),
        "memory_mib_per_minute": float(np.polyfit(half[:, 0] / 60, half[:, 1], 1)[0]) if len(half) > 2 else None,
        "memory": memory,
        "log": server.log[:50],
        "kinds": {kind: dict(found) for kind, found in sorted(counts.items())},
        "reasons": dict(sorted(reasons.items())),
    }


def start_times(model: str, images: list[Image.Image], count: int) -> list[float]:
    """Returns the seconds of `count` starts, after one that fills the compilation cache."""
    seconds = []
    for _ in range(count + 1):
        server = Server(model)
        seconds.append(server.first_answer(encoded(images[0])))
        server.stop()
    return seconds[1:]


def tables(results: dict[str, Any]) -> Iterator[str]:
    """Yields the results as markdown."""
    if results["throughput"]:
        heads = ("", "images/s, one", "p50, p95 ms", "images/s, 32", "p50, p95 ms", "ratio", "processor ms per image",
                 "batch", "others")  # fmt: skip
        yield f"| {' | '.join(heads)} |\n| --- {'| ---: ' * (len(heads) - 1)}|"
    for row in results["throughput"]:
        one, many, (ratio, low, high) = row["one"], row["many"], row["ratio"]
        cells = [row["model"], f"{one['rate']:.1f}", f"{one['p50']:.1f}, {one['p95']:.1f}", f"{many['rate']:.1f}"]
        cells += [f"{many['p50']:.0f}, {many['p95']:.0f}", f"{ratio:.2f} ({low:.2f}..{high:.2f})"]
        cells += [f"{one['processor_ms']:.1f}, {many['processor_ms']:.1f}", f"{many['batch']:.1f}"]
        yield f"| {' | '.join([*cells, format(row['others'], '.0%')])} |"
    if results["starts"]:
        yield "\n| seconds from the start to the first answer | median | max |\n| --- | ---: | ---: |"
    for name, seconds in results["starts"].items():
        yield f"| {name} | {statistics.median(seconds):.1f} | {max(seconds):.1f} |"
    mixed = results["mixed"]
    if mixed:
        yield f"\n{mixed['minutes']:g} minutes of {mixed['model']}: good {mixed['good']}, bad {mixed['bad']}, without a"
        yield f"reason {mixed['bad_without_reason']}; p50 {mixed['p50_ms']:.0f}, p95 {mixed['p95_ms']:.0f} ms. Memory"
        yield f"{mixed['memory_first']:.0f} MiB after a minute, {mixed['memory_last']:.0f} at the end, at most"
        yield f"{mixed['memory_max']:.0f}; second half {mixed['memory_mib_per_minute']} MiB per minute."
        yield "\n| kind | answers |\n| --- | --- |"
        for kind, counts in mixed["kinds"].items():
            yield f"| {kind} | {', '.join(f'{count} x {status}' for status, count in sorted(counts.items()))} |"


def main() -> None:
    """Measures what the flags say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", required=True)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--starts", type=int, default=0)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    images = pictures(args.images)
    folder = Path(tempfile.mkdtemp(prefix="serve_load-"))
    models = [m if Path(m).exists() else random_run(m, folder, images) for m in args.models.split(",")]
    results: dict[str, Any] = {"throughput": [], "starts": {}, "mixed": None, "cores": os.cpu_count()}
    if args.starts:
        results["starts"] = {Path(model).name: start_times(model, images, args.starts) for model in models}
    if args.rounds:
        results["throughput"] = [throughput(model, images, args.seconds, args.rounds) for model in models]
    if args.minutes:
        results["mixed"] = mixed_load(models[0], images, args.minutes)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(tables(results)))


if __name__ == "__main__":
    main()
