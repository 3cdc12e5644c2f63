"""Loads the service: throughput and latency, garbage among good requests for minutes, and the time to the first answer.

    python -m tests.benchmarks.serve_load --models=RUN_OR_NETWORK,... [--seconds=8] [--rounds=5] [--minutes=10]
        [--starts=3] [--images=FOLDER] [--out=FILE]

- Throughput: one client that asks for one image at a time, and 32 at once, in turns; images a second of each, the
  ratio of each round (median, lowest and highest), p50 and p95 of the latency, and the server's processor time an
  image. `others` is the share of the cores that other programs took, at most.
- Garbage (`--minutes`, with the first model): 12 clients, a tenth of whose requests are of the kinds in `garbage`;
  counts by kind and status, the server's memory every 10 seconds, and how it grows over the second half.
- Start (`--starts`): from starting the process until /predict answers 200, with the compilation cache as it is after
  a first start that is not counted.

A model that is no folder is a network with random weights, which is as fast. The clients are one process of their own
with plain sockets that stay open. Images are 512 px PNG files of the slices in `--images`, else drawn ones. Prints
markdown; --out gets everything as JSON.
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

from tests.benchmarks.serve_requests import encoded, garbage, good, pictures, request, untrained

MANY = 32
MIXED = 12  # clients of the mixed load
PART = 0.1  # of garbage
HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
TICK = os.sysconf("SC_CLK_TCK")


class Server:
    """A service in a process of its own; its log is read and its lines are counted."""

    def __init__(self, model: str, *flags: str) -> None:
        self.started = time.perf_counter()
        command = [sys.executable, "-m", "lungjax.serve", f"--model={model}", "--port=0", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.log: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found = re.match(r"http://127\.0\.0\.1:(\d+)/", line)
            if found:
                self.port = int(found[1])
                return
        raise SystemExit("".join(self.log))

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if not re.search(r" (GET|POST) /\w* (200|4\d\d) ", line):
                self.log.append(line)

    def first_answer(self, body: bytes) -> float:
        """Returns the seconds from starting the process to the first 200 of /predict."""
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                url, kind = f"http://127.0.0.1:{self.port}/predict", {"Content-Type": "image/png"}
                with urllib.request.urlopen(urllib.request.Request(url, body, kind), timeout=120) as answer:
                    answer.read()
                    return time.perf_counter() - self.started
            if self.process.poll() is not None:
                raise SystemExit("".join(self.log))
            time.sleep(0.05)

    def memory(self) -> float:
        """Returns its resident memory in MiB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]

    def processor(self) -> float:
        """Returns the processor seconds it took so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def batches(self) -> tuple[float, float]:
        """Returns how many images it computed so far, and in how many batches."""
        text = urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics").read().decode()
        names = ("lungjax_batch_images_sum", "lungjax_batch_images_count")
        images, count = (float(re.search(rf"^{name} (\S+)$", text, re.M)[1]) for name in names)  # type: ignore[index]
        return images, count

    def stop(self) -> int:
        """Ends it as a service manager does; returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)


class Client:
    """One connection that stays open."""

    def __init__(self, port: int) -> None:
        self.port, self.writer = port, None

    async def ask(self, data: bytes) -> tuple[int, bytes]:
        """Sends a request and returns status and body of the answer."""
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            if data == b"slow":
                await self._slow()
            elif data == b"chunked":
                await self._chunked()
            else:
                self.writer.write(data)
                with contextlib.suppress(ConnectionError):  # it may have answered already
                    await self.writer.drain()
            head = await self.reader.readuntil(b"\r\n\r\n")
            size = int(re.search(rb"content-length: (\d+)", head.lower())[1])  # type: ignore[index]
            body = await self.reader.readexactly(size)
        except BaseException:
            self.close()
            raise
        if b"connection: close" in head.lower():
            self.close()
        return int(head[9:12]), body

    def close(self) -> None:
        """Ends the connection."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    async def _slow(self) -> None:
        assert self.writer is not None
        self.writer.write(HEAD + b"Content-Length: 900\r\n\r\n")
        for _ in range(60):
            if self.reader._buffer:  # type: ignore[attr-defined]
                return
            self.writer.write(b"x")
            await asyncio.sleep(0.5)

    async def _chunked(self) -> None:
        assert self.writer is not None
        self.writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(80):
                self.writer.write(b"100000\r\n" + bytes(2**20) + b"\r\n")
                await self.writer.drain()
            self.writer.write(b"0\r\n\r\n")


async def closed_loop(port: int, clients: int, seconds: float, requests: list[bytes]) -> list[float]:
    """Returns the seconds of each answer of so many clients that ask again and again."""
    found: list[float] = []
    turns = itertools.cycle(requests)
    end = time.perf_counter() + seconds

    async def one() -> None:
        client = Client(port)
        while time.perf_counter() < end:
            began = time.perf_counter()
            status, body = await client.ask(next(turns))
            if status != 200:
                raise SystemExit(f"{status}: {body[:300]!r}")
            found.append(time.perf_counter() - began)
        client.close()

    await asyncio.gather(*(one() for _ in range(clients)))
    return found


def throughput(model: str, images: list[Image.Image], seconds: float, rounds: int) -> dict[str, Any]:
    """Measures one client at a time against 32, in turns."""
    server = Server(model)
    requests = [request(encoded(image), "image/png") for image in images]
    server.first_answer(encoded(images[0]))
    asyncio.run(closed_loop(server.port, MANY, 2, requests))
    rows: dict[int, list[dict[str, float]]] = defaultdict(list)
    for _ in range(rounds):
        for clients in (1, MANY):
            busy, own, began = busy_seconds(), server.processor() + time.process_time(), time.perf_counter()
            used, computed = server.processor(), server.batches()
            found = asyncio.run(closed_loop(server.port, clients, seconds, requests))
            wall = time.perf_counter() - began
            batches = [after - before for before, after in zip(computed, server.batches(), strict=True)]
            ours = server.processor() + time.process_time() - own
            rows[clients].append(
                {
                    "rate": len(found) / wall,
                    "p50": 1000 * statistics.median(found),
                    "p95": 1000 * float(np.percentile(found, 95)),
                    "processor_ms": 1000 * (server.processor() - used) / len(found),
                    "batch": batches[0] / batches[1],
                    "others": max(0.0, (busy_seconds() - busy - ours) / wall / (os.cpu_count() or 1)),
                }
            )
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


def busy_seconds() -> float:
    """Returns the processor seconds that all programs took since the machine's start."""
    user, nice, system, _, _, irq, soft = (int(x) for x in Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + soft) / TICK


def mixed(model: str, images: list[Image.Image], minutes: float) -> dict[str, Any]:
    """Sends good requests and garbage for minutes."""
    fine, bad = good(images), garbage(images)
    server = Server(model)
    server.first_answer(encoded(images[0]))
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: dict[str, str] = {}
    unexplained = 0
    times: list[float] = []
    memory: list[tuple[float, float]] = []
    began = time.perf_counter()
    end = began + 60 * minutes
    names, weights = list(fine), [weight for weight, _ in fine.values()]

    async def one(seed: int) -> None:
        nonlocal unexplained
        rng, client = random.Random(seed), Client(server.port)
        while time.perf_counter() < end:
            wrong = rng.random() < PART
            name = rng.choice(list(bad)) if wrong else rng.choices(names, weights)[0]
            data = rng.choice(bad[name] if wrong else fine[name][1])
            start = time.perf_counter()
            try:
                status, body = await client.ask(data)
            except (ConnectionError, asyncio.IncompleteReadError) as error:
                counts[f"{'bad' if wrong else 'good'}: {name}"][type(error).__name__] += 1
                continue
            counts[f"{'bad' if wrong else 'good'}: {name}"][str(status)] += 1
            if wrong:
                said = json.loads(body).get("error", "")
                reasons.setdefault(f"{name} {status}", said)
                unexplained += not said
            else:
                times.append(time.perf_counter() - start)
        client.close()

    async def watch() -> None:
        while time.perf_counter() < end:
            memory.append((time.perf_counter() - began, server.memory()))
            await asyncio.sleep(10)

    async def everything() -> None:
        await asyncio.gather(watch(), *(one(seed) for seed in range(MIXED)))

    asyncio.run(everything())
    code = server.stop()
    half = memory[len(memory) // 2 :]
    slope = np.polyfit([at / 60 for at, _ in half], [size for _, size in half], 1)[0] if len(half) > 2 else float("nan")
    sums = {kind: sum((c for k, c in counts.items() if k.startswith(kind)), Counter()) for kind in ("good", "bad")}
    return {
        "model": Path(model).name,
        "minutes": minutes,
        "good": dict(sums["good"]),
        "bad": dict(sums["bad"]),
        "good_all_answered": set(sums["good"]) <= {"200"},
        "bad_all_4xx": all(re.fullmatch(r"4\d\d", status) for status in sums["bad"]),
        "bad_without_a_reason": unexplained,
        "p50_ms": 1000 * statistics.median(times),
        "p95_ms": 1000 * float(np.percentile(times, 95)),
        "exit": code,
        "memory_first": memory[min(6, len(memory) - 1)][1],
        "memory_last": memory[-1][1],
        "memory_most": max(size for _, size in memory),
        "memory_mib_a_minute": float(slope),
        "memory": memory,
        "log": server.log[:50],
        "kinds": {kind: dict(found) for kind, found in sorted(counts.items())},
        "reasons": dict(sorted(reasons.items())),
    }


def starts(model: str, images: list[Image.Image], count: int) -> list[float]:
    """Returns the seconds of so many starts, after one that fills the cache."""
    found = []
    for _ in range(count + 1):
        server = Server(model)
        found.append(server.first_answer(encoded(images[0])))
        server.stop()
    return found[1:]


def tables(found: dict[str, Any]) -> Iterator[str]:
    """Yields the results as markdown."""
    if found["throughput"]:
        heads = [
            "images/s, one",
            "p50, p95 ms",
            "images/s, 32",
            "p50, p95 ms",
            "ratio",
            "processor ms an image",
            "batch",
        ]
        yield "| | " + " | ".join([*heads, "others"]) + " |"
        yield "| --- " + "| ---: " * (len(heads) + 1) + "|"
    for row in found["throughput"]:
        one, many, (ratio, low, high) = row["one"], row["many"], row["ratio"]
        cells = [row["model"], f"{one['rate']:.1f}", f"{one['p50']:.1f}, {one['p95']:.1f}", f"{many['rate']:.1f}"]
        cells += [f"{many['p50']:.0f}, {many['p95']:.0f}", f"{ratio:.2f} ({low:.2f}..{high:.2f})"]
        cells += [
            f"{one['processor_ms']:.1f}, {many['processor_ms']:.1f}",
            f"{many['batch']:.1f}",
            f"{row['others']:.0%}",
        ]
        yield f"| {' | '.join(cells)} |"
    if found["starts"]:
        yield "\n| seconds from the start to the first answer | median | most |\n| --- | ---: | ---: |"
    for name, seconds in found["starts"].items():
        yield f"| {name} | {statistics.median(seconds):.1f} | {max(seconds):.1f} |"
    told = found["mixed"]
    if told:
        yield f"\n{told['minutes']:g} minutes of {told['model']}: good {told['good']}, bad {told['bad']}, of these"
        yield f"without a reason {told['bad_without_a_reason']}; p50 {told['p50_ms']:.0f}, p95 {told['p95_ms']:.0f} ms."
        yield f"Memory {told['memory_first']:.0f} MiB after a minute, {told['memory_last']:.0f} at the end, at most"
        yield f"{told['memory_most']:.0f}; second half {told['memory_mib_a_minute']:+.2f} MiB a minute."
        yield "\n| kind | answers |\n| --- | --- |"
        for kind, counts in told["kinds"].items():
            yield f"| {kind} | {', '.join(f'{count} x {status}' for status, count in sorted(counts.items()))} |"


def main() -> None:
    """Measures what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", required=True)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--starts", type=int, default=0)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    images = pictures(given.images)
    folder = Path(tempfile.mkdtemp(prefix="serve_load-"))
    models = [m if Path(m).exists() else untrained(m, folder, images) for m in given.models.split(",")]
    found: dict[str, Any] = {"throughput": [], "starts": {}, "mixed": None, "cores": os.cpu_count()}
    if given.starts:
        found["starts"] = {Path(model).name: starts(model, images, given.starts) for model in models}
    if given.rounds:
        found["throughput"] = [throughput(model, images, given.seconds, given.rounds) for model in models]
    if given.minutes:
        found["mixed"] = mixed(models[0], images, given.minutes)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(tables(found)))


if __name__ == "__main__":
    main()
