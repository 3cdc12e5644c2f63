"""Routes of the service.

The files of a request are read into memory under limits (`multipart`), decoded by a few threads (`uploads`), passed to
the network by one thread (`batching`), and freed when the response is sent.
"""

import asyncio
import base64
import contextlib
import io
import itertools
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from PIL import Image
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException

from lungjax import __version__
from lungjax.config import nearest
from lungjax.config.metadata import NOTICE
from lungjax.explain import figures, saliency
from lungjax.inference import artifacts, records
from lungjax.inference.artifacts import Input
from lungjax.inference.model import Model
from lungjax.report import templating
from lungjax.runtime import environment
from lungjax.serve import schemas, uploads
from lungjax.serve.batching import Device
from lungjax.serve.metrics import Metrics
from lungjax.serve.middleware import FRAME_POLICY, Guard, LoopErrors, error_response
from lungjax.serve.multipart import Budget, File, receive
from lungjax.serve.settings import Settings
from lungjax.serve.uploads import UploadError

PAGE = Path(__file__).with_name("page")
LARGE_IMAGE = 4 * 2**20  # bytes from which a decoded image counts as freed memory
TRIM_BYTES = 48 * 2**20  # of freed memory, after which it is returned to the system
# For /docs. FastAPI's own page loads Swagger from a content delivery network, which hospitals may block.
DOCS_POLICY = f"default-src 'none'; style-src 'unsafe-inline'; {FRAME_POLICY}"
MAX_DECODERS = 4  # threads; each may hold some 600 MB for the largest allowed image
DESCRIPTION = (
    "A trained network for lung images over HTTP. Images stay in memory until the response is sent; nothing is "
    "written to disk. Patient data of DICOM files appears neither in responses nor in the log."
)
Rule = Annotated[str | None, Query(description="Operating point of the decisions, from `points` of /model.")]
Class = Annotated[str | None, Query(alias="class", description="Class to explain; default the predicted one.")]
Method = Annotated[str | None, Query(description="One of `methods` of /model; default the first.")]


@dataclass(eq=False)
class _Decoded:
    """A decoded file or its error."""

    name: str
    inputs: list[Input] = field(default_factory=list)  # several for a multi-frame file
    series: str = ""
    size: int = 0  # bytes of the decoded images
    pixels: int = 0
    error: UploadError | None = None


class Service:
    """The model, its threads and the handlers of the routes."""

    def __init__(self, model: Model, settings: Settings, on_failure: Callable[[BaseException], None]) -> None:
        self.model, self.settings, self.metadata = model, settings, model.metadata
        self.metrics = Metrics()
        self.device = Device(model, self.metrics, settings, on_failure)
        self.decoders = min(environment.cores(), MAX_DECODERS)
        self.pool = ThreadPoolExecutor(self.decoders, "decode")
        self.budget = Budget(settings.upload_bytes)
        self.metrics.upload_bytes.set_function(lambda: self.budget.bytes)
        self.freed = 0  # bytes since the last `environment.trim_memory`

    @contextlib.asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Starts the compute thread; at shutdown, ends all threads."""
        asyncio.get_running_loop().set_exception_handler(LoopErrors())
        task = asyncio.create_task(self.device.run())
        yield
        self.device.stop()
        await task
        self.pool.shutdown(cancel_futures=True)

    async def predict(self, request: Request, rule: Rule = None) -> Response:
        """Predicts each image, and each DICOM series of two or more CT slices."""
        rule = self._rule(rule)
        async with self._decoded(request, "predict") as files:
            good = [file for file in files if file.error is None]
            futures = self.device.submit("predict", [image.pixels for file in good for image in file.inputs])
            rows = iter(await asyncio.gather(*futures))
        p = [np.stack(list(itertools.islice(rows, len(file.inputs)))) for file in good]
        results = [self._record(file, rows, rule) for file, rows in zip(good, p, strict=True)]
        return self._response(request, "/predict", files, results, {"series": self._series(good, p, rule)})

    async def explain(self, request: Request, name: Class = None, method: Method = None, rule: Rule = None) -> Response:
        """As /predict, with a saliency map of one class per image."""
        rule, classes = self._rule(rule), self.metadata.classes
        try:
            method = self.model.check_method(method)
        except ValueError as error:
            raise UploadError(422, "method", str(error)) from None
        if name is not None and name not in classes:
            raise UploadError(422, "class", f"unknown class: {nearest(name, classes)}")
        target = None if name is None else classes.index(name)
        async with self._decoded(request, "explain") as files:
            good = [file for file in files if file.error is None]
            futures = self.device.submit("explain", [file.inputs[0].pixels for file in good], target, method)
            maps = await asyncio.gather(*futures)
            shown = [artifacts.picture(self.metadata, file.inputs[0].pixels) for file in good]
            pairs = [(image, heat) for image, (heat, _) in zip(shown, maps, strict=True)]
            pictures = await asyncio.gather(*(self._run(draw, image, heat, method) for image, heat in pairs))
        results = []
        for file, (_, p), urls in zip(good, maps, pictures, strict=True):
            explained = classes[int(np.argmax(p)) if target is None else target]
            results.append(self._record(file, p[None], rule) | {"explained": explained, "method": method} | urls)
        return self._response(request, "/explain", files, results, {})

    async def describe(self) -> dict[str, Any]:
        """The model, its training data and scores, and the limits of the service."""
        return self.metadata.public() | {"methods": list(self.model.methods), "limits": self.settings.limits()}

    async def health(self) -> Response:
        """Returns status 200 when everything is compiled."""
        status = "failed" if self.device.failure else "ok" if self.device.ready else "starting"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def prometheus(self) -> Response:
        """Counters and times for Prometheus."""
        return Response(generate_latest(self.metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def refuse(self, _: Request, error: Any) -> Response:
        """Responds to a rejected request."""
        self.metrics.refused.labels(error.reason).inc()
        return error_response(error)

    async def unknown_route(self, _: Request, error: Any) -> Response:
        """Responds to a request for an unknown path or method."""
        words = {404: "no such page; see /docs", 405: "method not allowed; see /docs"}
        return JSONResponse({"error": words.get(error.status_code, "see /docs")}, error.status_code, error.headers)

    @contextlib.asynccontextmanager
    async def _decoded(self, request: Request, kind: str) -> AsyncIterator[list[_Decoded]]:
        """Decodes the files of a request; the body of the context shares its time limit."""
        self.device.check(kind)
        files, count = await receive(request, self.settings, self.budget)
        limits = replace(self.settings.file, frames=1) if kind == "explain" else self.settings.file
        decoded: list[_Decoded] = []
        turns = asyncio.Semaphore(max(1, self.decoders // 2))  # the other threads decode other requests
        pixels, max_pixels = 0, self.settings.request_pixels

        async def decode(file: File) -> _Decoded:
            nonlocal pixels
            async with turns:
                if pixels <= max_pixels:
                    result = await self._run(self._decode, file, limits)
                    pixels += result.pixels
                if pixels > max_pixels:
                    raise UploadError(413, "pixels", f"more than {max_pixels} pixels in all files; send fewer at once")
                return result

        try:
            async with asyncio.timeout(self.settings.seconds):
                decoded += await asyncio.gather(*map(decode, files))
                for file in decoded:
                    if file.error is not None:
                        self.metrics.refused.labels(file.error.reason).inc()
                yield decoded
        except TimeoutError:
            raise UploadError(504, "time", f"the request took more than {self.settings.seconds:g} seconds") from None
        finally:
            self.budget.bytes -= count
            self.freed += count + sum(file.size for file in decoded if file.size > LARGE_IMAGE)
            if self.freed >= TRIM_BYTES:
                self.freed = 0
                asyncio.get_running_loop().call_later(1.0, self.pool.submit, environment.trim_memory)

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return asyncio.get_running_loop().run_in_executor(self.pool, function, *arguments)

    def _decode(self, file: File, limits: uploads.Limits) -> _Decoded:
        try:
            data, file.data = file.data, b""
            upload = uploads.read(data, limits, self.metadata.hu_windows, self.metadata.plane)
            del data
            size = sum(image.nbytes for image in upload.images)
            inputs = [self.model.prepare(image, modality=upload.modality) for image in upload.images]
            pixels = sum(image.shape[0] * image.shape[1] for image in upload.images)
            return _Decoded(file.name, inputs, upload.series, size, pixels)
        except ValueError as error:
            problem = error if isinstance(error, UploadError) else UploadError(422, "content", str(error))
            return _Decoded(file.name, error=problem)

    def _record(self, file: _Decoded, p: np.ndarray, rule: str) -> dict[str, Any]:
        """Returns the record of a file, aggregated over its frames, from the probabilities `p` [frames, classes]."""
        first = file.inputs[0]
        if len(p) == 1:
            return records.record(self.metadata, file.name, p[0], first.novelty, first.warnings, rule)
        shared = [text for text in first.warnings if all(text in image.warnings for image in file.inputs)]
        warned = sum(bool(image.warnings) for image in file.inputs)
        summary = records.summary(self.metadata, "", p, warned, shared, rule)
        return {"file": file.name, "novelty": None} | {k: v for k, v in summary.items() if k not in ("series", "files")}

    def _response(
        self, request: Request, route: str, files: list[_Decoded], results: list[dict[str, Any]], more: dict[str, Any]
    ) -> Response:
        """Returns the response; `results` has one item per decoded file, in order."""
        good = iter(results)
        every = [next(good) if file.error is None else records.failure(file.name, str(file.error)) for file in files]
        request.scope["lungjax"]["images"] = len(results)
        self.metrics.images.labels(route).inc(len(results))
        first = next((file.error for file in files if file.error is not None), None)
        if not results and first is not None:
            return JSONResponse({"error": str(first), "results": every}, first.status)
        metadata = self.metadata
        model = {"name": metadata.name, "dataset": metadata.dataset, "classes": list(metadata.classes)}
        return JSONResponse({"model": model, "notice": NOTICE, "results": every, **more})

    def _rule(self, rule: str | None) -> str:
        rules = self.metadata.rules()
        if rule is not None and rules and rule not in rules:
            raise UploadError(422, "rule", f"unknown rule: {nearest(rule, rules)}")
        return rule or records.RULE

    def _series(self, files: list[_Decoded], rows: list[np.ndarray], rule: str) -> list[dict[str, Any]]:
        """Returns the records of all series of two or more slices, named by number, since a UID identifies a person."""
        groups: dict[str, list[int]] = {}
        for i, file in enumerate(files):
            if file.series:
                groups.setdefault(file.series, []).append(i)
        summaries: list[dict[str, Any]] = []
        for numbers in groups.values():
            p = np.concatenate([rows[i] for i in numbers])
            warned = sum(bool(image.warnings) for i in numbers for image in files[i].inputs)
            if len(p) > 1:
                summaries.append(records.summary(self.metadata, f"series {len(summaries) + 1}", p, warned, rule=rule))
        return summaries


def build(model: Model, settings: Settings, on_failure: Callable[[BaseException], None] = lambda _: None) -> FastAPI:
    """Returns the ASGI application, which compiles the model on startup and calls `on_failure` if that fails."""
    uploads.quiet()
    service = Service(model, settings, on_failure)
    files = {f"/{file.name}".removesuffix("index.html"): file for file in PAGE.iterdir()}
    app = FastAPI(
        title="lungjax",
        description=f"{DESCRIPTION} {NOTICE}",
        version=__version__,
        redirect_slashes=False,  # an upload would be sent twice
        openapi_url=None,  # these pages are served below with our own headers
        docs_url=None,
        redoc_url=None,
        lifespan=service.lifespan,
    )
    app.add_middleware(Guard, settings=settings, metrics=service.metrics, pages=frozenset(files))
    app.add_exception_handler(UploadError, service.refuse)
    app.add_exception_handler(HTTPException, service.unknown_route)
    app.state.service = service
    work: dict[str, Any] = {"responses": schemas.ERRORS, "openapi_extra": schemas.BODY}
    app.post("/predict", response_model=schemas.Predictions, **work)(service.predict)
    app.post("/explain", response_model=schemas.Explanations, **work)(service.explain)
    app.get("/model")(service.describe)
    starting: Any = {503: {"model": schemas.Health, "description": "Starting, or failed to start."}}
    app.get("/health", response_model=schemas.Health, responses=starting)(service.health)
    text: Any = {200: {"content": {"text/plain": {}}, "description": "Prometheus text format."}}
    app.get("/metrics", response_class=Response, responses=text)(service.prometheus)

    async def openapi(_: Request) -> Response:
        return JSONResponse(openapi_tree(app, settings))

    async def documentation(_: Request) -> Response:
        tree = openapi_tree(app, settings)
        text = templating.render("openapi.html.j2", title=app.title, tree=tree, token=bool(settings.token))
        return HTMLResponse(text, headers={"content-security-policy": DOCS_POLICY})

    async def page(request: Request) -> Response:
        return FileResponse(files[request.url.path])

    for path, handler in {"/openapi.json": openapi, "/docs": documentation, **dict.fromkeys(files, page)}.items():
        app.add_route(path, handler, include_in_schema=False)
    return app


def openapi_tree(app: FastAPI, settings: Settings) -> dict[str, Any]:
    """Returns the OpenAPI description, which includes bearer authentication if the service requires a token."""
    tree = app.openapi()
    if settings.token:
        tree["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, methods in tree["paths"].items():
            for operation in methods.values():
                operation["security"] = [] if path == "/health" else [{"token": []}]
    return tree


def draw(pixels: np.ndarray, heat: np.ndarray, method: str) -> dict[str, str]:
    """Returns the network's input, the map and the overlay as data URLs of PNG files."""
    heat = figures.visible(heat, method)
    image = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    pictures = {"image": image, "heat": saliency.heat_colors(heat), "overlay": saliency.overlay(pixels, heat)}
    urls = {}
    for name, picture in pictures.items():
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG", compress_level=3)
        urls[name] = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return urls
