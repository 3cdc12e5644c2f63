"""The routes of the service.

A request's files are read into memory under limits (`multipart`), decoded by a few threads (`lungjax.serve.uploads`),
computed by one (`batching`), and gone once the answer is sent.
"""

import asyncio
import base64
import contextlib
import ctypes
import ctypes.util
import io
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from PIL import Image
from starlette.exceptions import HTTPException

from lungjax import __version__
from lungjax.config import nearest
from lungjax.config.metadata import NOTICE
from lungjax.explain import panels, saliency
from lungjax.inference import records as answers
from lungjax.serve import docs, schemas, uploads
from lungjax.serve.batching import Device
from lungjax.serve.metrics import Meters
from lungjax.serve.middleware import Guard, refusal
from lungjax.serve.multipart import Budget, File, discard, receive
from lungjax.serve.settings import Settings
from lungjax.serve.uploads import UploadError

KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
LARGE = 4 * 2**20  # bytes of a decoded image that are worth giving back
DECODERS = 4  # threads at most: each may hold some 600 MB for the largest image that is allowed
LIMITED = (400, 401, 403, 408, 413, 415, 421, 422, 500, 503, 504)
WORDS = (
    "A trained network for lung images over HTTP. Images stay in memory while they are answered, and are written "
    "nowhere. What a DICOM file says of a person gets neither into an answer nor into the log."
)


@dataclass(eq=False)
class _Read:
    """One file, decoded, or why it was not."""

    name: str
    picture: Any = None
    series: str = ""
    size: int = 0  # bytes of the decoded image
    refused: UploadError | None = None


def build(predictor: Any, settings: Settings, failed: Callable[[BaseException], None] = lambda _: None) -> FastAPI:  # noqa: C901, PLR0915
    """Returns the service as an ASGI application.

    Args:
      predictor: of `lungjax.inference.predictor`; it is compiled when the application starts.
      settings: limits, and who may ask.
      failed: called, in another thread, with the error if compiling fails.
    """
    uploads.quiet()
    told, meters = predictor.metadata, Meters()
    device = Device(predictor, meters, settings.queue, settings.explains, failed)
    pool = ThreadPoolExecutor(min(_cores(), DECODERS), "decode")
    pages = _pages()

    def trim_soon() -> None:
        asyncio.get_running_loop().call_later(1.0, pool.submit, _trim)

    budget = Budget(settings.held_bytes, seen=meters.held.set, much=trim_soon)

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        device.start()
        yield
        await asyncio.to_thread(device.stop)
        pool.shutdown(cancel_futures=True)

    app = FastAPI(
        title="lungjax",
        description=f"{WORDS} {NOTICE}",
        version=__version__,
        redirect_slashes=False,  # an upload would be sent twice
        openapi_url=None,  # our own routes, under our own headers
        docs_url=None,
        redoc_url=None,
        lifespan=life,
    )
    app.add_middleware(Guard, settings=settings, meters=meters, pages=frozenset(pages))

    async def refused(request: Request, error: Any) -> Response:
        meters.refused.labels(error.reason).inc()
        await discard(request)
        return refusal(error)

    app.add_exception_handler(UploadError, refused)
    app.add_exception_handler(HTTPException, _unknown)
    app.state.device, app.state.meters, app.state.budget = device, meters, budget
    named = {"name": told.name, "dataset": told.dataset, "classes": list(told.classes)}

    def decode(file: File) -> _Read:
        try:
            try:
                found = uploads.read(file.data, settings.file, told.hu_windows, told.plane)
            finally:
                file.data = b""
            try:
                return _Read(file.name, predictor.picture(found.pixels), found.series, found.pixels.nbytes)
            except ValueError as error:  # what such a picture can't be turned into
                raise UploadError(422, "content", str(error)) from None
        except UploadError as error:
            return _Read(file.name, refused=error)

    @contextlib.asynccontextmanager
    async def decoded(request: Request, kind: str) -> AsyncIterator[list[_Read]]:
        """The request's files, within the time that it may take; all bad ones are an answer by themselves."""
        device.check(kind)
        files, took = await receive(request, settings, budget)
        try:
            async with asyncio.timeout(settings.seconds):
                loop = asyncio.get_running_loop()
                read = await asyncio.gather(*(loop.run_in_executor(pool, decode, file) for file in files))
                for one in read:
                    if one.refused is not None:
                        meters.refused.labels(one.refused.reason).inc()
                    if one.size > LARGE:  # of a file that may have been small
                        budget.went(one.size)
                yield read
        except TimeoutError:
            raise UploadError(504, "time", f"it took more than {settings.seconds:g} seconds") from None
        finally:
            budget.release(took)

    def answered(request: Request, route: str, read: list[_Read], records: list[dict[str, Any]], more: Any) -> Response:
        """Returns the answer; `records` are those of the good files, in their order."""
        made = iter(records)
        results = [next(made) if one.refused is None else answers.failure(one.name, str(one.refused)) for one in read]
        request.scope["lungjax"]["images"] = len(records)
        meters.images.labels(route).inc(len(records))
        first = next((one.refused for one in read if one.refused is not None), None)
        if not records and first is not None:
            return JSONResponse({"error": str(first), "results": results}, first.status)
        return JSONResponse({"model": named, "notice": NOTICE, "results": results, **more})

    @app.post(
        "/predict",
        description="Says what the network makes of each image, and of each DICOM series of two or more CT slices.",
        response_model=schemas.Predicted,
        responses=schemas.responses(*LIMITED),
        openapi_extra=schemas.BODY,
    )
    async def predict(
        request: Request,
        rule: Annotated[str | None, Query(description="Decide by this operating point of /model's `points`.")] = None,
    ) -> Response:
        rule = _rule(told, rule)
        async with decoded(request, "predict") as read:
            good = [one for one in read if one.refused is None]
            lined = device.predict([one.picture.pixels for one in good])
            found = await asyncio.gather(*map(asyncio.wrap_future, lined))
        records = [
            answers.record(told, one.name, chances, one.picture.unlike, one.picture.warnings, rule)
            for one, chances in zip(good, found, strict=True)
        ]
        return answered(request, "/predict", read, records, {"series": _series(told, good, found, rule)})

    @app.post(
        "/explain",
        description="As /predict, with a heat map of what spoke for a class.",
        response_model=schemas.Explanation,
        responses=schemas.responses(*LIMITED),
        openapi_extra=schemas.BODY,
    )
    async def explain(
        request: Request,
        about: Annotated[
            str | None, Query(alias="class", description="The class to explain; the predicted one if left out.")
        ] = None,
        method: Annotated[str | None, Query(description="One of /model's `methods`; its first if left out.")] = None,
        rule: Annotated[str | None, Query(description="As for /predict.")] = None,
    ) -> Response:
        rule = _rule(told, rule)
        if not predictor.methods:
            raise UploadError(422, "method", "this model has no heat maps: serve the run's folder or a model.pyz")
        if about is not None and about not in told.classes:
            raise UploadError(422, "class", f"no such class: {nearest(about, told.classes)}")
        if method is not None and method not in predictor.methods:
            raise UploadError(422, "method", f"no such method: {nearest(method, predictor.methods)}")
        way = method or predictor.methods[0]
        target = None if about is None else told.classes.index(about)
        async with decoded(request, "explain") as read:
            good = [one for one in read if one.refused is None]
            lined = device.explain([one.picture.pixels for one in good], target, way)
            found = await asyncio.gather(*map(asyncio.wrap_future, lined))
            loop = asyncio.get_running_loop()
            drawn = await asyncio.gather(
                *(
                    loop.run_in_executor(pool, _draw, one.picture.pixels, heat, way)
                    for one, (heat, _) in zip(good, found, strict=True)
                )
            )
        records = []
        for one, (_, chances), pictures in zip(good, found, drawn, strict=True):
            number = int(np.argmax(chances)) if target is None else target
            record = answers.record(told, one.name, chances, one.picture.unlike, one.picture.warnings, rule)
            records.append(record | {"explained": told.classes[number], "method": way} | pictures)
        return answered(request, "/explain", read, records, {})

    @app.get("/model", description="What the model is and was trained on, its scores and limits.")
    async def model() -> dict[str, Any]:
        return told.public() | {"notice": NOTICE, "methods": list(predictor.methods), "limits": settings.limits()}

    @app.get(
        "/health",
        description="Whether the service answers: 200 once everything is compiled.",
        response_model=schemas.Health,
        responses={503: {"model": schemas.Health, "description": "Starting, or it could not start."}},
    )
    async def health() -> Response:
        status = "failed" if device.failure else "ok" if device.ready.is_set() else "starting"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get(
        "/metrics",
        description="Counters and times for Prometheus.",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}, "description": "Prometheus' text format."}},
    )
    async def metrics() -> Response:
        return Response(meters.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(_: Request) -> Response:
        return JSONResponse(described(app, settings))

    async def description(_: Request) -> Response:
        text = docs.page(described(app, settings), bool(settings.token))
        return HTMLResponse(text, headers={"content-security-policy": docs.POLICY})

    async def page(request: Request) -> Response:
        content, kind = pages[request.url.path]
        return Response(content, media_type=kind)

    app.add_route("/openapi.json", openapi, include_in_schema=False)
    app.add_route("/docs", description, include_in_schema=False)
    for path in pages:
        app.add_route(path, page, include_in_schema=False)
    return app


def described(app: FastAPI, settings: Settings) -> dict[str, Any]:
    """Returns the OpenAPI description, with the token where there is one."""
    tree = app.openapi()
    if settings.token:
        tree["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, methods in tree["paths"].items():
            for told in methods.values():
                told["security"] = [] if path == "/health" else [{"token": []}]
    return tree


async def _unknown(request: Request, error: Any) -> Response:
    await discard(request)
    words = {404: "no such page: see /docs", 405: "another method is wanted here: see /docs"}
    return JSONResponse({"error": words.get(error.status_code, "see /docs")}, error.status_code, error.headers)


def _rule(told: Any, rule: str | None) -> str:
    try:
        if rule is not None:
            answers.check_rule(told, rule)
    except ValueError:
        raise UploadError(422, "rule", f"no such rule: {nearest(rule or '', told.rules())}") from None
    return rule or answers.RULE


def _series(told: Any, good: list[_Read], found: list[np.ndarray], rule: str) -> list[dict[str, Any]]:
    """Returns the summary of each series of two or more slices, by numbers: a UID is a person's."""
    groups: dict[str, list[int]] = {}
    for i, one in enumerate(good):
        if one.series:
            groups.setdefault(one.series, []).append(i)
    made: list[dict[str, Any]] = []
    for rows in (rows for rows in groups.values() if len(rows) > 1):
        chances = np.stack([found[i] for i in rows])
        warned = sum(bool(good[i].picture.warnings) for i in rows)
        made.append(answers.summary(told, f"series {len(made) + 1}", chances, warned, rule=rule))
    return made


def _draw(pixels: np.ndarray, heat: np.ndarray, method: str) -> dict[str, str]:
    shown = panels.visible(heat, method)
    image = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    pictures = {"image": image, "heat": saliency.heat_colors(shown), "overlay": saliency.overlay(pixels, shown)}
    return {name: _data_url(picture) for name, picture in pictures.items()}


def _data_url(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=3)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _pages() -> dict[str, tuple[bytes, str]]:
    """Returns the page's files by path: / is index.html, and each lies beside it and below /page/."""
    found: dict[str, tuple[bytes, str]] = {}
    for file in resources.files("lungjax.serve").joinpath("page").iterdir():
        kind = KINDS.get(os.path.splitext(file.name)[1])
        if kind:
            content = file.read_bytes()
            names = ("/",) if file.name == "index.html" else (f"/{file.name}", f"/page/{file.name}")
            found.update(dict.fromkeys(names, (content, kind)))
    return found


def _trim() -> None:
    """Gives the memory of large uploads back, which `environment.keep_freed_memory` keeps with what networks use."""
    name = ctypes.util.find_library("c")
    trim = getattr(ctypes.CDLL(name), "malloc_trim", None) if name else None
    if trim is not None:
        trim(0)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
