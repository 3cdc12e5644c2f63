"""Load test of the service: throughput, latency, startup time, and valid requests during attacks.

    python -m tests.benchmarks.serve_load --models=RUN_OR_NETWORK,... [--rounds=5] [--minutes=10] [--starts=3]
        [--images=FOLDER] [--seconds=5]

A model is a run folder, or the name of a network, which is trained for one step. Images come from FOLDER, or are
phantoms.
"""

import atexit
import contextlib
import http.client
import itertools
import json
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.benchmarks import harness
from tests.benchmarks.serve_requests import (
    HEADERS,
    MARKER,
    TOKEN,
    Request,
    attacks,
    encoded,
    malformed,
    pictures,
    request,
    valid,
)

MANY = 32  # clients of the throughput test
MIXED = 12  # clients of the mixed load test
MALFORMED_FRACTION = 0.1


def untrained(network: str, folder: Path) -> str:
    """Trains a network for one step, since a trained one is not faster; returns the folder of the run."""
    command = [sys.executable, "-m", "lungjax.main", "--experiment=phantom_demo:dataset=phantom_ct/tiny"]
    settings = {"model.name": network, "input.size": 224, "train.steps": 1, "train.eval_steps": 1, "eval.draws": 0}
    options = [f"--set={name}={value}" for name, value in settings.items()]
    subprocess.run([*command, *options, f"--workdir={folder / network}", f"--data_dir={folder / 'data'}"], check=True)
    return str(folder / network)


class Server:
    def __init__(self, model: str) -> None:
        self.start = time.perf_counter()
        command = [sys.executable, "-m", "lungjax.serve", f"--model={model}", "--port=0"]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        env = os.environ | {"LUNGJAX_TOKEN": TOKEN}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True, env=env)
        atexit.register(self.process.kill)  # also after an error
        for line in self.process.stdout:
            if url := re.match(r"http://127\.0\.0\.1:(\d+)/", line):
                self.port = int(url[1])
                return
        raise SystemExit(self.read_log())

    def read_log(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def check_log(self) -> str:
        """Returns a summary of the log. Raises SystemExit if it contains a value of an upload."""
        log = self.read_log()
        if MARKER in log:
            raise SystemExit(f"the log contains values of uploads:\n{log}")
        lines = [line[20:] for line in log.splitlines()]  # without the time
        other = Counter(line for line in lines if not re.search(r" \d+ ms \d+ images$", line))
        return f"Log without values of uploads: {len(log) / 2**20:.2f} MiB; lines of no request: {dict(other)}."

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def first_answer(self, body: bytes) -> float:
        """Returns the seconds from the start of the process to the first successful prediction."""
        while self.process.poll() is None:
            with contextlib.suppress(ConnectionError):
                if send(self.connect(), request(body, "image/png"))[0] == 200:
                    return time.perf_counter() - self.start
            time.sleep(0.05)
        raise SystemExit(self.read_log())

    def processor(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def batches(self) -> np.ndarray:
        """Returns the numbers of images and of batches computed so far."""
        connection = self.connect()
        connection.request("GET", "/metrics", headers=HEADERS)
        text = connection.getresponse().read().decode()
        names = ("lungjax_batch_images_sum", "lungjax_batch_images_count")
        return np.asarray([float(re.search(rf"^{name} (\S+)$", text, re.M)[1]) for name in names])

    def stop(self) -> int:
        """Stops the service as a service manager does; returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)


def send(connection: http.client.HTTPConnection, data: Request) -> tuple[int, bytes]:
    """Sends a request over a reused connection; returns the status and body of the response."""
    path, body, headers = data
    chunked = callable(body) and "Content-Length" not in headers
    headers = HEADERS | headers | ({"Transfer-Encoding": "chunked"} if chunked else {})
    try:
        with contextlib.suppress(ConnectionError):  # the service may already have answered and closed the connection
            connection.request("POST", path, body() if callable(body) else body, headers, encode_chunked=chunked)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        connection.close()
        raise


def clients(count: int, run: Callable[[int], Any]) -> list[Any]:
    """Returns the results of `run(i)` for clients 0 to `count` - 1, each in its own thread."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def closed_loop(server: Server, count: int, seconds: float, requests: list[Request]) -> list[float]:
    """Returns the latencies in milliseconds of `count` clients that each send one request after another."""
    turns, end = itertools.cycle(requests), time.perf_counter() + seconds

    def run(_: int) -> list[float]:
        connection, latencies = server.connect(), []
        while (start := time.perf_counter()) < end:
            status, body = send(connection, next(turns))
            if status != 200:
                raise SystemExit(f"{status}: {body[:300]!r}")
            latencies.append(1e3 * (time.perf_counter() - start))
        connection.close()
        return latencies

    return list(itertools.chain(*clients(count, run)))


def throughput(model: str, images: list[Image.Image], seconds: float, rounds: int) -> list[str]:
    """Measures one client and 32 clients in turns; returns the cells of a table row."""
    server = Server(model)
    requests = [request(encoded(image), "image/png") for image in images]
    server.first_answer(encoded(images[0]))

    def turn(count: int) -> dict[str, float]:
        watch = harness.Watch(lambda: server.processor() + time.process_time())
        used, computed = server.processor(), server.batches()
        latencies = closed_loop(server, count, seconds, requests)
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
    """Sends valid and malformed requests while the service is attacked; returns the results as Markdown."""
    good, bad = valid(images), malformed(images)
    server = Server(model)
    server.first_answer(encoded(images[0]))
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))  # for the attack with idle connections
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    without_reason: set[str] = set()
    latencies: list[float] = []
    memory: list[float] = []  # MiB, every 10 seconds
    end = time.perf_counter() + 60 * minutes
    weights = [weight for weight, _ in good.values()]

    def run(seed: int) -> None:
        rng, connection = random.Random(seed), server.connect()
        while (start := time.perf_counter()) < end:
            wrong = rng.random() < MALFORMED_FRACTION
            name = rng.choice(list(bad)) if wrong else rng.choices(list(good), weights)[0]
            kind = f"{'bad' if wrong else 'good'}: {name}"
            try:
                status, body = send(connection, rng.choice(bad[name] if wrong else good[name][1]))
            except (OSError, http.client.HTTPException) as error:
                counts[kind][type(error).__name__] += 1
                continue
            counts[kind][str(status)] += 1
            if not wrong:
                latencies.append(1e3 * (time.perf_counter() - start))
            elif not json.loads(body).get("error"):
                without_reason.add(f"{name} {status}")
        connection.close()

    def watch() -> None:
        while time.perf_counter() < end:
            memory.append(harness.resident(server.process.pid))
            time.sleep(10)

    def attack(name: str, step: Callable[[], str]) -> None:
        while time.perf_counter() < end:
            try:
                outcome = step()
            except OSError as error:
                outcome = type(error).__name__
            counts[name][outcome] += 1
            time.sleep(0.5)

    jobs: list[Callable[[], None]] = [watch, *(partial(run, seed) for seed in range(1, MIXED + 1))]
    jobs += [partial(attack, *item) for item in attacks(images, server.port).items()]
    clients(len(jobs), lambda i: jobs[i]())
    code = server.stop()
    sums = {kind: sum((c for k, c in counts.items() if k.startswith(kind)), Counter()) for kind in ("good", "bad")}
    p50, p95 = np.percentile(latencies, [50, 95])
    kinds = [(k, ", ".join(f"{n} x {status}" for status, n in sorted(c.items()))) for k, c in sorted(counts.items())]
    return (
        f"{minutes:g} minutes of {Path(model).name}: good {dict(sums['good'])}, bad {dict(sums['bad'])}, "
        f"without a reason {sorted(without_reason)}; p50 {p50:.0f}, p95 {p95:.0f} ms; exit code {code}.\n"
        f"Memory {memory[0]:.0f} MiB at the start, {memory[min(6, len(memory) - 1)]:.0f} after a minute, "
        f"{memory[-1]:.0f} at the end, at most {max(memory):.0f}.\n"
        f"{server.check_log()}\n\n{harness.table(('kind', 'answers'), kinds)}"
    )


def start_times(model: str, images: list[Image.Image], count: int) -> list[float]:
    """Returns the durations of `count` starts in seconds, after a first start that fills the compilation cache."""

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
        models = [m if Path(m).exists() else untrained(m, Path(folder)) for m in args.models.split(",")]
        if args.starts:
            times = {Path(model).name: start_times(model, images, args.starts) for model in models}
            rows = [(name, f"{statistics.median(own):.1f}", f"{max(own):.1f}") for name, own in times.items()]
            print(harness.table(("seconds from the start to the first answer", "median", "max"), rows) + "\n")
        if args.rounds:
            heads = ("", "images/s, one", "p50, p95 ms", "images/s, 32", "p50, p95 ms", "ratio",
                     "CPU ms per image: one, 32", "mean batch", "others")  # fmt: skip
            rows = [throughput(model, images, args.seconds, args.rounds) for model in models]
            print(harness.table(heads, rows) + "\n")
        if args.minutes:
            print(mixed_load(models[0], images, args.minutes))


if __name__ == "__main__":
    main()
