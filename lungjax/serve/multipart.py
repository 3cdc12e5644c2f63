"""Request bodies to files in memory, under limits that are checked while the bytes arrive.

Starlette's own form parser puts what is over a megabyte into temporary files; here nothing of an upload is written.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from lungjax.serve.settings import Settings
from lungjax.serve.uploads import UploadError

RAW = (
    "image/png", "image/jpeg", "image/tiff", "image/bmp", "image/x-ms-bmp", "image/gif", "image/webp", "image/jp2",
    "application/dicom", "application/octet-stream",
)  # fmt: skip
FORM = "multipart/form-data"
FIELDS = ("files", "file")
HEADERS = 8192  # bytes of the headers of one part
TRIM = 48 * 2**20
RATE = 65536  # bytes a second, at least, after the first `read_seconds`
DISCARD = (1.0, 32 * 2**20)  # seconds and bytes of a refused body that are read, so that its sender hears the answer


@dataclass
class File:
    """One file of a request."""

    name: str
    data: bytes = field(default=b"", repr=False)


@dataclass
class Budget:
    """Bytes of uploads that are in memory, of all requests together."""

    most: int
    now: int = 0
    seen: Callable[[int], object] = lambda _: None  # told of each change
    much: Callable[[], object] = lambda: None  # called after each TRIM bytes that went
    gone: int = 0

    def add(self, count: int) -> None:
        """Counts bytes that came. Raises Refused where they are too many."""
        if self.now + count > self.most:
            raise UploadError(503, "memory", "too many uploads at once; try again in a second")
        self.now += count
        self.seen(self.now)

    def release(self, count: int) -> None:
        """Counts bytes that are gone."""
        self.now -= count
        self.seen(self.now)
        self.went(count)

    def went(self, count: int) -> None:
        """Counts bytes that were freed, of files or of what they were decoded to."""
        self.gone += count
        if self.gone >= TRIM:
            self.gone = 0
            self.much()


async def receive(request: Request, settings: Settings, held: Budget) -> tuple[list[File], int]:
    """Reads a body: its files, and how many bytes were counted in `held`, which the caller releases.

    Raises Refused (400, 408, 413, 415, 422, 503) for a body that is none or breaks a limit; then nothing stays counted.
    """
    took = 0
    try:
        reader = _reader(request, settings)
        async with asyncio.timeout(settings.read_seconds) as limit:
            deadline = asyncio.get_running_loop().time() + settings.read_seconds
            async for chunk in request.stream():
                if not chunk:
                    continue
                if took + len(chunk) > settings.request_bytes:
                    raise UploadError(413, "bytes", f"a request of more than {settings.request_bytes} bytes")
                reader.write(chunk)
                held.add(len(chunk))
                took += len(chunk)
                limit.reschedule(deadline + took / RATE)
        return reader.finish(), took
    except BaseException as error:
        held.release(took)
        if isinstance(error, TimeoutError):
            raise UploadError(408, "slow", "the request's body came too slowly") from None
        if isinstance(error, FormParserError):
            raise UploadError(400, "form", "damaged multipart data") from None
        raise


async def discard(request: Request) -> None:
    """Reads what is left of a body for a moment without keeping it, for who is still sending when the connection closes
    may hear nothing. Where more is left, the connection closes with the answer.

    Whoever waits for "100 Continue" has not begun to send, and is not asked to.
    """
    told = request.scope["lungjax"]
    if told["read"] or request.method in ("GET", "HEAD"):
        return
    told["close"] = True
    if request.headers.get("expect"):
        return
    seconds, most = DISCARD
    try:
        async with asyncio.timeout(seconds):
            while most > 0:
                message = await request.receive()
                most -= len(message.get("body", b""))
                if message["type"] != "http.request" or told["read"]:
                    told["close"] = not told["read"]
                    return
    except TimeoutError:
        return


def _reader(request: Request, settings: Settings) -> "_Raw | _Form":
    try:
        length = int(request.headers.get("content-length", 0))
    except ValueError:
        raise UploadError(400, "form", "a Content-Length that is no number") from None
    if length > settings.request_bytes:
        raise UploadError(413, "bytes", f"a request of {length} bytes; at most {settings.request_bytes} are taken")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UploadError(415, "type", "a compressed request body: send it as it is")
    kind, options = parse_options_header(request.headers.get("content-type"))
    named = kind.decode("latin-1").lower()
    if named == FORM:
        boundary = options.get(b"boundary", b"")
        if not 0 < len(boundary) <= 200:
            raise UploadError(400, "form", "multipart data without a boundary")
        return _Form(boundary, settings)
    if named in RAW:
        return _Raw(settings)
    raise UploadError(415, "type", f"wanted {FORM} with the field `files`, or one file as {', '.join(RAW)}")


class _Raw:
    def __init__(self, settings: Settings) -> None:
        self.most, self.size = settings.file.bytes, 0
        self.parts: list[bytes] = []

    def write(self, chunk: bytes) -> None:
        self.size += len(chunk)
        if self.size > self.most:
            raise UploadError(413, "bytes", f"a file of more than {self.most} bytes")
        self.parts.append(chunk)

    def finish(self) -> list[File]:
        return [File("file", b"".join(self.parts))]


class _Form:
    def __init__(self, boundary: bytes, settings: Settings) -> None:
        self.most, self.files_most = settings.file.bytes, settings.files
        self.files: list[File] = []
        self.parts: list[bytes] = []  # of the file that is being read
        self.size = self.header_bytes = 0
        self.name, self.value = b"", b""
        self.headers: dict[bytes, bytes] = {}
        self.ended = False
        self.parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._open,
                "on_part_data": self._data,
                "on_part_end": self._close,
                "on_end": self._end,
            },
        )

    def write(self, chunk: bytes) -> None:
        self.parser.write(chunk)

    def finish(self) -> list[File]:
        if not self.ended:
            raise UploadError(400, "form", "multipart data that ends too early, or has another boundary than it says")
        if not self.files:
            raise UploadError(422, "empty", "no file in the request: put files into the field `files`")
        return self.files

    def _begin(self) -> None:
        if len(self.files) >= self.files_most:
            raise UploadError(413, "files", f"more than {self.files_most} files in one request")
        self.headers, self.parts = {}, []
        self.size = self.header_bytes = 0
        self.name, self.value = b"", b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self.name += self._header(data, start, end)

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self.value += self._header(data, start, end)

    def _header(self, data: bytes, start: int, end: int) -> bytes:
        self.header_bytes += end - start
        if self.header_bytes > HEADERS:
            raise UploadError(400, "form", "headers of a multipart part that are too long")
        return data[start:end]

    def _header_end(self) -> None:
        self.headers[self.name.lower()] = self.value
        self.name, self.value = b"", b""

    def _open(self) -> None:
        _, options = parse_options_header(self.headers.get(b"content-disposition", b"").decode("latin-1"))
        if options.get(b"name", b"").decode("latin-1") not in FIELDS:
            raise UploadError(422, "form", "a form field of another name than `files`")
        self.files.append(File(_plain(options.get(b"filename", b""), len(self.files) + 1)))

    def _data(self, data: bytes, start: int, end: int) -> None:
        self.size += end - start
        if self.size > self.most:
            raise UploadError(413, "bytes", f"a file of more than {self.most} bytes")
        self.parts.append(data[start:end])

    def _close(self) -> None:
        self.files[-1].data = b"".join(self.parts)
        self.parts = []

    def _end(self) -> None:
        self.ended = True


def _plain(name: bytes, number: int) -> str:
    """Returns a file's name as it goes back in the answer: no folders, nothing that does not print, no end to it."""
    text = name.decode("utf-8", "replace").replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(sign for sign in text if sign.isprintable())[:200] or f"file {number}"
