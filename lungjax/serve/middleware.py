"""Middleware around every request: access control, a limit on concurrent requests, logging, and unexpected errors."""

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import logging
import os
import secrets
import time
import traceback
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect

from lungjax.serve.metrics import Metrics
from lungjax.serve.settings import LOOPBACK, Settings
from lungjax.serve.uploads import UploadError

LOG = logging.getLogger("lungjax.serve")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
WORK = ("/predict", "/explain")
OPEN = ("/docs", "/openapi.json", "/health")  # need no token, like the page: they reveal nothing about model or images
FRAME_POLICY = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
IMAGE_POLICY = "script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'"
POLICY = f"default-src 'none'; {IMAGE_POLICY}; {FRAME_POLICY}"
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
DISCARD_SECONDS, DISCARD_BYTES = 1.0, 32 * 2**20  # of the body of a refused request
TOKEN_DELAY, MAX_TOKEN_DELAY = 0.02, 2.0  # seconds; the first is added for each wrong token of an address
MAX_ADDRESSES = 1024  # of clients with wrong tokens
LOG_SECONDS = 60.0  # between two reports of the same repeated event
CLIENT_CLOSED = 499  # status in log and metrics if the client disconnected before the response, as in nginx


def error_response(error: UploadError) -> JSONResponse:
    """Returns the response to a rejected request."""
    headers = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": "1"}}  # seconds
    return JSONResponse({"error": str(error)}, error.status, headers.get(error.status))


class Repeated:
    """Counts events that clients can repeat at will, so that each kind of them is reported once per interval."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.next_report: dict[str, float] = {}

    def add(self, kind: str = "") -> int:
        """Counts an event; returns the number of events of its kind to report now, or 0."""
        self.counts[kind] += 1
        now = time.monotonic()
        if now < self.next_report.get(kind, 0.0):
            return 0
        self.next_report[kind] = now + LOG_SECONDS
        return self.counts.pop(kind)


class LoopErrors(Repeated):
    """Handler for errors in the event loop, as when there are no file descriptors for new connections."""

    def __call__(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Reports each type of error once per interval, like `describe`."""
        error = context.get("exception")
        if count := self.add(type(error).__name__):
            LOG.error("event loop, %d times: %s", count, context["message"] if error is None else describe(error))


class Guard:
    """ASGI middleware around all routes. `scope["lungjax"]` is the state of a request."""

    def __init__(self, app: Any, settings: Settings, metrics: Metrics, pages: frozenset[str]) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.pages = pages  # paths of the page's files
        self.running = 0
        metrics.running.set_function(lambda: self.running)
        self.wrong_tokens: dict[str, int] = {}  # by client address, least recent first
        self.repeated_tokens = Repeated()
        self.token_digest = hashlib.sha256(settings.token.encode()).digest()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        state = {"images": 0, "status": 0, "log": True, "read": scope["method"] in ("GET", "HEAD")}
        scope["lungjax"] = state

        async def tracked_receive() -> Any:
            message = await receive()
            state["read"] = state["read"] or not message.get("more_body")
            return message

        async def discard() -> None:
            """Reads the remaining body briefly: a client that is still sending may otherwise miss the response."""
            remaining = DISCARD_BYTES
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DISCARD_SECONDS):
                    while remaining > 0 and not state["read"]:
                        message = await tracked_receive()
                        remaining -= len(message.get("body", b""))

        async def tracked_send(message: Any) -> None:
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("content-security-policy", POLICY)
                if not state["read"] and "expect" not in Headers(scope=scope):
                    await discard()
                if not state["read"] or state["status"] == 400:  # the next request may start anywhere
                    headers["connection"] = "close"
            await send(message)

        self.running += 1
        try:
            problem = self.check(scope)
            state["accepted"] = problem is None and scope["path"] in WORK  # keeps its connection open
            if problem is None:
                await self.app(scope, tracked_receive, tracked_send)
            else:
                await self.refuse(problem, scope)
                await error_response(problem)(scope, tracked_receive, tracked_send)
        except ClientDisconnect:
            state["status"] = state["status"] or CLIENT_CLOSED
        except Exception as error:
            number = secrets.token_hex(4)  # identifies the error in the log, with its location, but not its message
            LOG.error("error %s: %s", number, describe(error))
            if not state["status"]:  # otherwise, the response has started
                message = f"internal error, ID {number} in the log of the service"
                await JSONResponse({"error": message}, 500)(scope, receive, tracked_send)
        finally:
            self.running -= 1
            self.log(scope, state, time.perf_counter() - start)

    def check(self, scope: Any) -> UploadError | None:
        """Returns the reason to reject a request before its body is read, or None."""
        headers, path = Headers(scope=scope), scope["path"]
        if "content-length" in headers and "transfer-encoding" in headers:  # proxies disagree on where the body ends
            return UploadError(400, "framing", "both Content-Length and Transfer-Encoding; send only one of them")
        host = headers.get("host", "")
        if not self.is_own_name(host):
            return UploadError(421, "host", "unknown Host header; start the service with --allowed_hosts=NAME")
        if scope["method"] not in ("GET", "HEAD"):
            # In a browser, pages of other sites may post to any address; only the service's own page is accepted.
            origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
            if site not in ("same-origin", "none") or (origin is not None and urlsplit(origin).netloc != host):
                return UploadError(403, "origin", "a request from a page of another site")
        if self.settings.token and path not in self.pages and path not in OPEN:
            kind, _, token = headers.get("authorization", "").partition(" ")
            digest = hashlib.sha256(token.strip().encode()).digest()  # of constant length, compared in constant time
            if kind.lower() != "bearer" or not hmac.compare_digest(digest, self.token_digest):
                reason = "wrong_token" if "authorization" in headers else "token"
                return UploadError(401, reason, "the service requires its token: Authorization: Bearer TOKEN")
        if path in WORK and self.running > self.settings.requests:
            return UploadError(503, "requests", "too many requests at once; try again in a second")
        return None

    async def refuse(self, problem: UploadError, scope: Any) -> None:
        """Counts a rejected request; waits after a wrong token, longer with each one from the same address."""
        self.metrics.refused.labels(problem.reason).inc()
        if problem.reason != "wrong_token":
            return
        scope["lungjax"]["log"] = False
        if count := self.repeated_tokens.add():
            LOG.warning("%d requests with a wrong token", count)
        address = (scope["client"] or ("",))[0]
        self.wrong_tokens[address] = failures = self.wrong_tokens.pop(address, 0) + 1
        if len(self.wrong_tokens) > MAX_ADDRESSES:
            del self.wrong_tokens[next(iter(self.wrong_tokens))]
        self.running -= 1
        try:
            await asyncio.sleep(min(failures * TOKEN_DELAY, MAX_TOKEN_DELAY))
        finally:
            self.running += 1

    def is_own_name(self, host: str) -> bool:
        """Returns whether a Host header names the service (or, if public, an IP address); prevents DNS rebinding."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in (*LOOPBACK, self.settings.host.lower(), *self.settings.names):
                return True
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.settings.public

    def log(self, scope: Any, state: Any, seconds: float) -> None:
        """Counts and logs a request: method, route, status, milliseconds and images, but no user input."""
        path = scope["path"]
        if path not in (*WORK, *OPEN, "/model", "/metrics"):
            path = "/" if path == "/" else "/page" if path in self.pages else "other"
        method = scope["method"] if scope["method"] in METHODS else "other"
        self.metrics.requests.labels(path, state["status"]).inc()
        self.metrics.seconds.labels(path).observe(seconds)
        if state["log"]:
            LOG.info("%s %s %d %.0f ms %d images", method, path, state["status"], 1000 * seconds, state["images"])


def describe(error: BaseException) -> str:
    """Returns types and locations of an error and its causes, without messages that may quote an upload."""
    lines, seen = [], set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        reason = f" ({os.strerror(link.errno)})" if isinstance(link, OSError) and link.errno else ""
        lines.append(type(link).__name__ + reason)
        lines += [f"  {f.filename}:{f.lineno} in {f.name}" for f in traceback.extract_tb(link.__traceback__)]
        link = link.__cause__ or link.__context__
    return "\n".join(lines)
