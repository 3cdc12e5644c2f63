"""Reads request bodies into files in memory; limits on a request are checked as the bytes arrive."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.formparsers import MultiPartException, MultiPartParser

from lungjax.serve.settings import Settings
from lungjax.serve.uploads import UploadError

RAW = (
    "image/png", "image/jpeg", "image/tiff", "image/bmp", "image/x-ms-bmp", "image/gif", "image/webp", "image/jp2",
    "application/dicom", "application/octet-stream",
)  # fmt: skip
FORM = "multipart/form-data"
FIELDS = ("files", "file")
MIN_RATE = 65536  # bytes per second after the first `read_seconds`


@dataclass
class File:
    """One file of a request."""

    name: str
    data: bytes = field(default=b"", repr=False)


@dataclass
class Budget:
    """The bytes of uploads held in memory across all requests."""

    limit: int
    bytes: int = 0

    def add(self, count: int) -> None:
        """Counts received bytes. Raises UploadError if there are too many."""
        if self.bytes + count > self.limit:
            raise UploadError(503, "memory", "too many uploads at once; try again in a second")
        self.bytes += count


async def receive(request: Request, settings: Settings, budget: Budget) -> tuple[list[File], int]:
    """Returns the files of a body and the number of bytes counted in `budget`, which the caller releases.

    If a body is malformed or exceeds a limit, counts nothing and raises UploadError (400, 408, 413, 415, 422, 503).
    """
    count = 0

    async def chunks() -> AsyncGenerator[bytes, None]:
        nonlocal count
        async for chunk in request.stream():
            if count + len(chunk) > settings.request_bytes:
                raise UploadError(413, "bytes", f"a request of more than {settings.request_bytes} bytes")
            budget.add(len(chunk))
            count += len(chunk)
            limit.reschedule(start + settings.read_seconds + count / MIN_RATE)
            yield chunk

    try:
        is_form = _check_head(request, settings) == FORM
        async with asyncio.timeout(settings.read_seconds) as limit:
            start = asyncio.get_running_loop().time()
            if is_form:
                return await _parse_form(request, chunks(), settings.files), count
            return [File("file", b"".join([chunk async for chunk in chunks()]))], count
    except BaseException as error:
        budget.bytes -= count
        if isinstance(error, TimeoutError):
            raise UploadError(408, "slow", "the request body arrived too slowly") from None
        if isinstance(error, MultiPartException):
            if error.message.startswith("Too many"):
                raise UploadError(413, "files", f"more than {settings.files} files in one request") from None
            raise UploadError(400, "form", "damaged multipart data") from None
        raise


def _check_head(request: Request, settings: Settings) -> str:
    """Returns the content type, FORM or one of RAW. Raises UploadError for unsuitable headers."""
    length = int(request.headers.get("content-length", 0))  # h11 rejects other values
    if length > settings.request_bytes:
        raise UploadError(413, "bytes", f"the request has {length} bytes; the limit is {settings.request_bytes}")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UploadError(415, "type", "a compressed request body; send it uncompressed")
    content_type, options = parse_options_header(request.headers.get("content-type"))
    name = content_type.decode("latin-1").lower()
    if name not in (FORM, *RAW):
        raise UploadError(415, "type", f"expected {FORM} with the field `files`, or one file as {', '.join(RAW)}")
    if name == FORM and not 0 < len(options.get(b"boundary", b"")) <= 200:
        raise UploadError(400, "form", "multipart data without a boundary")
    return name


async def _parse_form(request: Request, chunks: AsyncGenerator[bytes, None], max_files: int) -> list[File]:
    form = _Form(request.headers, chunks, max_files=max_files, max_fields=max_files)
    items = (await form.parse()).multi_items()
    if not form.ended:
        raise UploadError(400, "form", "incomplete multipart data, or a wrong boundary")
    if not items:
        raise UploadError(422, "empty", "no file in the request; put files into the field `files`")
    if any(field not in FIELDS or isinstance(file, str) for field, file in items):
        raise UploadError(422, "form", "only files in the field `files` are accepted")
    files: list[Any] = [file for _, file in items]
    return [File(_display_name(file.filename, i), await file.read()) for i, file in enumerate(files, 1)]


class _Form(MultiPartParser):
    """Starlette's parser, with no files on disk and a check for the closing boundary."""

    spool_max_size = 2**62  # larger than any request: Starlette's default writes files above 1 MiB to disk
    ended = False

    def on_end(self) -> None:
        self.ended = True


if not hasattr(MultiPartParser, "spool_max_size"):  # the privacy of uploads depends on it
    raise ImportError("this version of starlette can't keep uploads in memory; pip install 'starlette>=0.46'")


def _display_name(name: str | None, number: int) -> str:
    """Returns a file's name for the response: without folders or unprintable characters, of limited length."""
    text = (name or "").replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(character for character in text if character.isprintable())[:200] or f"file {number}"
