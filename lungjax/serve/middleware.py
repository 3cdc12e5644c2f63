"""What every request passes: who asks, how many at once, what may be logged, and what an unforeseen error says."""

import hashlib
import hmac
import ipaddress
import logging
import secrets
import time
import traceback
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect

from lungjax.serve.metrics import Meters
from lungjax.serve.multipart import discard
from lungjax.serve.settings import LOOPBACK, Settings
from lungjax.serve.uploads import UploadError

LOG = logging.getLogger("lungjax.serve")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
WORK = ("/predict", "/explain")
SHOWN = ("/docs", "/openapi.json", "/health")  # and the page: nothing of the model or of an image is in them
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
LEFT = 499  # status in log and statistics for who left before the answer, as in nginx


def refusal(error: UploadError) -> JSONResponse:
    """Returns the answer that says why."""
    headers = {}
    if error.status == 503:
        headers["retry-after"] = "2" if error.reason == "starting" else "1"
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse({"error": str(error)}, error.status, headers)


class Guard:
    """ASGI middleware around all routes."""

    def __init__(self, app: Any, settings: Settings, meters: Meters, pages: frozenset[str]) -> None:
        self.app, self.settings, self.meters = app, settings, meters
        self.pages = pages  # paths of the page's files
        self.running = 0
        self.known = hashlib.sha256(settings.token.encode()).digest()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, told = time.perf_counter(), {"images": 0, "status": 0, "read": False, "close": False}
        scope["lungjax"] = told

        async def received() -> Any:
            message = await receive()
            told["read"] = told["read"] or (message["type"] == "http.request" and not message.get("more_body"))
            return message

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                told["status"] = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("content-security-policy", POLICY)
                if told["close"]:
                    headers["connection"] = "close"
            await send(message)

        self.running += 1
        self.meters.running.set(self.running)
        try:
            problem = self.check(scope)
            if problem is None:
                await self.app(scope, received, sent)
            else:
                self.meters.refused.labels(problem.reason).inc()
                await discard(Request(scope, received))
                await refusal(problem)(scope, received, sent)
        except ClientDisconnect:
            told["status"] = told["status"] or LEFT
        except Exception as error:
            await self.failed(error, told, scope, receive, sent)
        finally:
            self.running -= 1
            self.meters.running.set(self.running)
            self.tell(scope, told, time.perf_counter() - started)

    def check(self, scope: Any) -> UploadError | None:
        """Returns why a request is refused before anything is read of it, None for a good one."""
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "")
        if not self.called(host):
            return UploadError(
                421, "host", "the service isn't called so: start it with --allowed_hosts=NAME to add a name"
            )
        if scope["method"] not in ("GET", "HEAD"):
            # Any page in a browser may post to any address; only this service's own page shall.
            origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
            if site not in ("same-origin", "none") or (origin is not None and urlsplit(origin).netloc != host):
                return UploadError(403, "origin", "a request from another site's page")
        if self.settings.token and path not in self.pages and path not in SHOWN:
            kind, _, token = headers.get("authorization", "").partition(" ")
            # Digests have one length, and comparing them takes one time.
            right = hmac.compare_digest(hashlib.sha256(token.strip().encode()).digest(), self.known)
            if kind.lower() != "bearer" or not right:
                return UploadError(401, "token", "the service wants its token: Authorization: Bearer TOKEN")
        if path in WORK and self.running > self.settings.requests:
            return UploadError(503, "requests", "too many requests at once; try again in a second")
        return None

    def called(self, host: str) -> bool:
        """Whether `host` is a name of this service, so that no other name can be made to point at it by DNS.

        Open to others, it may be called by any number, which is no name.
        """
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in (*LOOPBACK, self.settings.host.lower(), *self.settings.names):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.settings.open_to_others

    async def failed(self, error: Exception, told: Any, scope: Any, receive: Any, send: Any) -> None:
        """Answers 500 with a number under which the log has where it happened; the error's words stay unsaid."""
        number = secrets.token_hex(4)
        LOG.error("error %s: %s", number, describe(error))
        if told["status"]:
            return  # the answer has begun
        told["close"] = True
        message = f"an error in the service, number {number} in its log"
        await JSONResponse({"error": message}, 500)(scope, receive, send)

    def tell(self, scope: Any, told: Any, seconds: float) -> None:
        """Counts and logs a request: method, route, status, milliseconds and images, and nothing that a user wrote."""
        path = scope["path"]
        if path not in (*WORK, *SHOWN, "/model", "/metrics"):
            path = "/" if path == "/" else "/page" if path in self.pages else "other"
        method = scope["method"] if scope["method"] in METHODS else "other"
        self.meters.requests.labels(path, told["status"]).inc()
        self.meters.seconds.labels(path).observe(seconds)
        LOG.info("%s %s %d %.0f ms %d images", method, path, told["status"], 1000 * seconds, told["images"])


def describe(error: BaseException) -> str:
    """Returns types and places of an error and its causes, without its words, which may quote an upload."""
    lines, seen = [], set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        lines.append(type(link).__name__)
        lines += [f"  {f.filename}:{f.lineno} in {f.name}" for f in traceback.extract_tb(link.__traceback__)]
        link = link.__cause__ or link.__context__
    return "\n".join(lines)
