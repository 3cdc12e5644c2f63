"""A trained network as an HTTP service: python -m lungjax.serve --model=runs/my_run

It answers at http://127.0.0.1:8000: a page for people, /predict and /explain for programs, described at /docs. It needs
the extra `serve`. SIGTERM and Ctrl-C let it finish what it is computing.
"""

import importlib.util
import logging
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from lungjax import cli

NEEDED = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")
LEAST_TOKEN = 16  # characters

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("model", None, "A run's folder, or a model.pyz or model.onnx of lungjax.export.")
    flags.DEFINE_string("host", "127.0.0.1", "The address to listen at; others than loopback are open to others.")
    flags.DEFINE_integer("port", 8000, "The port; 0 takes a free one.", 0, 65535)
    flags.DEFINE_list(
        "allowed_hosts", [], "Further names by which it may be called; a proxy in front must pass Host on."
    )
    flags.DEFINE_string("token_file", None, "A file with the token that requests must bring; or LUNGJAX_TOKEN.")
    flags.DEFINE_float("max_mb", 64, "MiB of one file.", 0.001)
    flags.DEFINE_float("max_request_mb", 256, "MiB of one request.", 0.001)
    flags.DEFINE_float("max_held_mb", 512, "MiB of all requests together.", 0.001)
    flags.DEFINE_integer("max_files", 64, "Files of one request.", 1)
    flags.DEFINE_float("max_megapixels", 30, "Million pixels of one image.", 0.0001)
    flags.DEFINE_integer("max_side", 10_000, "Pixels along a side of one image.", 1)
    flags.DEFINE_integer("max_requests", 128, "Requests at once.", 1)
    flags.DEFINE_integer("max_queue", 256, "Images that may wait for the device.", 1)
    flags.DEFINE_integer("max_explains", 32, "Heat maps that may wait for the device.", 1)
    flags.DEFINE_float("max_seconds", 60, "Seconds to decode and compute one request.", 0.01)
    flags.DEFINE_float("read_seconds", 10, "Seconds for a body, and one more for each 64 KiB of it.", 0.01)


def main(_: list[str]) -> None:
    """Opens the model, takes the port, and serves until it is told to stop."""
    if not FLAGS.model:
        raise app.UsageError("--model=M is missing: a run's folder, or a model.pyz or model.onnx")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} not installed: pip install 'lungjax[serve]'")
    # The decoding threads share the cores out; numpy's own threads would wait for each other, at five times the cost.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash must not leave uploads in a core file
    from lungjax.runtime import environment

    environment.prepare_jax()
    from lungjax.serve.settings import Settings
    from lungjax.serve.uploads import MIB, Limits

    settings = Settings(
        host=FLAGS.host,
        names=tuple(name.lower() for name in FLAGS.allowed_hosts),
        token=read_token(FLAGS.token_file),
        file=Limits(int(FLAGS.max_mb * MIB), int(FLAGS.max_megapixels * 1e6), FLAGS.max_side),
        request_bytes=int(FLAGS.max_request_mb * MIB),
        held_bytes=int(FLAGS.max_held_mb * MIB),
        files=FLAGS.max_files,
        requests=FLAGS.max_requests,
        queue=FLAGS.max_queue,
        explains=FLAGS.max_explains,
        read_seconds=FLAGS.read_seconds,
        seconds=FLAGS.max_seconds,
    )
    listening = listen(FLAGS.host, FLAGS.port)
    sys.exit(serve(settings, listening))


def serve(settings: Any, listening: socket.socket) -> int:
    """Serves until a signal; returns the exit code."""
    import uvicorn

    from lungjax.inference import predictor
    from lungjax.serve.app import build
    from lungjax.serve.middleware import LOG, describe
    from lungjax.serve.protocol import Patient

    LOG.setLevel(logging.INFO)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    LOG.addHandler(handler)
    LOG.propagate = False
    model = predictor.open_model(FLAGS.model)
    codes = [0]

    def failed(error: BaseException) -> None:
        LOG.error("the model could not be compiled: %s", describe(error))
        codes[0] = 1
        server.should_exit = True

    config = uvicorn.Config(
        build(model, settings, failed),
        http=Patient,
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=settings.requests + 1024,  # the guard answers with words before that
        backlog=256,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(settings.seconds) + 5,
    )
    server = uvicorn.Server(config)
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # what it would say of requests, the guard says
    # uvicorn raises the signal that stopped it once more when it is done; that one is not to end the process.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    greet(model.metadata, settings, listening)
    server.run(sockets=[listening])
    return codes[0]


def greet(told: Any, settings: Any, listening: socket.socket) -> None:
    """Prints where it is, what it is, and who can reach it."""
    from lungjax.config.metadata import NOTICE

    address, port = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    images = sum(told.counts.get("train", {}).values())
    trained = f"trained on {told.dataset}" + (f" ({images} images)" if images else "")
    print(f"{told.name}: tells {', '.join(told.classes)} apart, {trained}.")
    print(NOTICE)
    if settings.open_to_others and not settings.token:
        print(f"WARNING: whoever reaches {shown} can use it: no token was given (--token_file or LUNGJAX_TOKEN).")
    if settings.open_to_others:
        print("WARNING: it speaks plain HTTP: images and token can be read on the way. Put a proxy with TLS before it.")
    print(f"http://{shown}:{port}/", flush=True)


def listen(host: str, port: int) -> socket.socket:
    """Returns a bound socket. Raises ValueError if the port is taken, not allowed, or the address is not of here."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise ValueError(f"--host={host}: no such address") from None
    made = socket.socket(*found[:3])  # with the protocol, by which asyncio knows that it may send at once
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(found[4])
        made.listen(256)  # so that nobody else gets the port while the model is opened
    except OSError as error:
        made.close()
        why = (error.strerror or str(error)).lower()
        raise ValueError(
            f"--port={port} at {host} can't be had ({why}): give another --port, or 0 for a free one"
        ) from None
    return made


def read_token(file: str | None) -> str:
    """Returns the token of a file, else of LUNGJAX_TOKEN, else "". Raises ValueError for one that can be guessed."""
    try:
        text = Path(file).expanduser().read_text("utf-8") if file else os.environ.get("LUNGJAX_TOKEN", "")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--token_file={file}: can't be read ({type(error).__name__})") from None
    token, where = text.strip(), f"--token_file={file}" if file else "LUNGJAX_TOKEN"
    if not token and not file and "LUNGJAX_TOKEN" not in os.environ:
        return ""
    if len(token) < LEAST_TOKEN or not token.isascii() or any(sign.isspace() for sign in token):
        wanted = f"wanted at least {LEAST_TOKEN} signs (ASCII, no spaces), such as of `openssl rand -hex 32`"
        raise ValueError(f"{where}: {wanted}")
    return token


if __name__ == "__main__":
    cli.run(main, define_flags)
