"""Serves a trained network over HTTP: python -m lungjax.serve --model=runs/my_run

The service has a web page at http://127.0.0.1:8000, and /predict and /explain for programs, documented at /docs. It
needs the `serve` extra. After SIGTERM or Ctrl-C it finishes the requests in progress.
"""

import contextlib
import importlib.util
import logging
import os
import resource
import signal
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

from absl import app, flags

from lungjax import cli

PACKAGES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")
MIN_TOKEN = 16  # characters

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    kinds = "A run folder, or a model.pyz or model.onnx of lungjax.export"
    flags.DEFINE_list("model", [], cli.MODEL_HELP.format(kinds))
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; any other than loopback is open to other machines.")
    flags.DEFINE_integer("port", 8000, "Port; 0 picks a free one.", 0, 65535)
    flags.DEFINE_list("allowed_hosts", [], "Additional Host names to accept; a reverse proxy must forward Host.")
    flags.DEFINE_string("token_file", None, "File with the token that requests must send; default $LUNGJAX_TOKEN.")
    flags.DEFINE_float("max_mb", 64, "Maximum size of a file in MiB.", 0.001)
    flags.DEFINE_float("max_request_mb", 256, "Maximum size of a request in MiB.", 0.001)
    flags.DEFINE_float("max_upload_mb", 512, "Maximum size of the uploads of all requests in memory, in MiB.", 0.001)
    flags.DEFINE_integer("max_files", 64, "Maximum number of files in a request.", 1)
    cli.define_limit_flags(volumes=False)
    flags.DEFINE_float("max_seconds", 60, "Maximum seconds for decoding a request and computing its response.", 0.01)


def main(_: list[str]) -> None:
    """Opens the port, loads the model and serves until a signal."""
    if not FLAGS.model:
        raise app.UsageError("--model=M is missing: a run folder, or a model.pyz or model.onnx")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} not installed: pip install -e '.[serve]'")
    # The decoding threads use all cores; numpy's threads would contend with them, which takes five times as long.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would contain uploads
    with contextlib.suppress(ValueError, OSError):  # some systems refuse an unlimited number
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    from lungjax.runtime import environment

    environment.prepare_jax()
    from lungjax.serve.settings import Settings
    from lungjax.serve.uploads import MIB, Limits

    settings = Settings(
        host=FLAGS.host,
        names=tuple(name.lower() for name in FLAGS.allowed_hosts),
        token=read_token(FLAGS.token_file),
        file=Limits(pixels=int(FLAGS.max_megapixels * 1e6), bytes=int(FLAGS.max_mb * MIB)),
        request_bytes=int(FLAGS.max_request_mb * MIB),
        upload_bytes=int(FLAGS.max_upload_mb * MIB),
        files=FLAGS.max_files,
        seconds=FLAGS.max_seconds,
    )
    listening = listen(FLAGS.host, FLAGS.port)
    sys.exit(serve(settings, listening))


def serve(settings: Any, listening: socket.socket) -> int:
    """Serves until a signal; returns the exit code."""
    from lungjax.inference.model import load
    from lungjax.serve.app import build
    from lungjax.serve.middleware import LOG, describe

    model = load(FLAGS.model)
    LOG.setLevel(logging.INFO)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    LOG.addHandler(handler)
    LOG.propagate = False
    exit_code = 0

    def on_failure(error: BaseException) -> None:
        LOG.error("the model could not be compiled: %s", describe(error))
        nonlocal exit_code
        exit_code = 1
        server.should_exit = True

    server = make_server(build(model, settings, on_failure), settings)
    # On exit, uvicorn re-raises the signal that stopped it, which must not kill the process.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    greet(model.metadata, settings, listening)
    server.run(sockets=[listening])
    return exit_code


def make_server(application: Any, settings: Any) -> Any:
    """Returns a `uvicorn.Server` that logs nothing, since the middleware logs requests."""
    import uvicorn

    from lungjax.serve.protocol import LimitedProtocol

    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    limited = descriptors != resource.RLIM_INFINITY
    connections = min(settings.connections, descriptors // 2) if limited else settings.connections
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    config = uvicorn.Config(
        application, http=partial(LimitedProtocol, max_connections=connections),  # type: ignore[arg-type]
        loop="asyncio", ws="none", lifespan="on", log_config=None,
        access_log=False, server_header=False, proxy_headers=False,
        backlog=256, timeout_keep_alive=30, timeout_graceful_shutdown=int(settings.seconds) + 5,
    )  # fmt: skip
    return uvicorn.Server(config)


def greet(metadata: Any, settings: Any, listening: socket.socket) -> None:
    """Prints the model, the address, and warnings about access."""
    from lungjax.config.metadata import NOTICE

    address, port = listening.getsockname()[:2]
    url = f"http://[{address}]:{port}/" if ":" in address else f"http://{address}:{port}/"
    images = sum(metadata.counts.get("train", {}).values())
    data = f"{metadata.dataset}" + (f" ({images:,} images)" if images else "")
    print(f"{metadata.name}: classifies {', '.join(metadata.classes)}; trained on {data}.")
    print(NOTICE)
    if settings.public and not settings.token:
        print(f"WARNING: {url} accepts requests without a token from anyone who can reach it. Set --token_file.")
    if settings.public:
        print("WARNING: plain HTTP exposes images and the token on the network. Put a TLS proxy in front.")
    print(url, flush=True)


def listen(host: str, port: int) -> socket.socket:
    """Returns a bound socket. Raises ValueError if the port is taken or not permitted, or the address is not local."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(address, family=family, backlog=256)
    except socket.gaierror:
        raise ValueError(f"--host={host}: no such address") from None
    except OSError as error:
        why = os.strerror(error.errno or 0).lower()
        raise ValueError(f"--port={port} at {host} is unavailable ({why}); give another one, or 0 for any") from None
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio does not set it on accepted connections
    return listening


def read_token(file: str | None) -> str:
    """Returns the token in a file or in LUNGJAX_TOKEN, or "" without one. Raises ValueError for a weak token."""
    try:
        text = Path(file).expanduser().read_text("utf-8") if file else os.environ.get("LUNGJAX_TOKEN", "")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--token_file={file}: can't be read ({type(error).__name__})") from None
    token, where = text.strip(), f"--token_file={file}" if file else "LUNGJAX_TOKEN"
    if not token and not file and "LUNGJAX_TOKEN" not in os.environ:
        return ""
    if len(token) < MIN_TOKEN or not token.isascii() or any(map(str.isspace, token)):
        rule = f"at least {MIN_TOKEN} ASCII characters without spaces, for example from `openssl rand -hex 32`"
        raise ValueError(f"{where}: a token has {rule}")
    return token


if __name__ == "__main__":
    cli.run(main, define_flags)
