"""Schemas of the responses, for /openapi.json and /docs; the tests validate responses with them."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from lungjax.data.imaging.images import FORMAT_NAMES
from lungjax.serve.multipart import FORM, RAW


class Strict(BaseModel):
    """A schema that forbids additional keys."""

    model_config = ConfigDict(extra="forbid")


class Decision(Strict):
    """Whether a class reaches its operating point, a threshold chosen on the validation split."""

    called: bool
    rule: str
    level: str = Field(description="level for which the threshold was chosen: slice or patient")
    threshold: float
    sensitivity: float | None = Field(description="on the test split")
    specificity: float | None = Field(description="on the test split")


class Prediction(Strict):
    """Prediction of an image or a series."""

    predicted: str = Field(
        description="class with the highest probability; of several findings those that are called, as `A + B`"
    )
    probabilities: dict[str, float] = Field(description="calibrated, by class")
    decisions: dict[str, Decision] = Field(description="by class")
    warnings: list[str]


class Record(Prediction):
    """One file: an image, or the slices of a multi-frame CT, aggregated as in the report."""

    file: str = Field(description="name in the request")
    novelty: float | None = Field(
        description="above 1 for a warning; null for several slices or if the model has no score"
    )


class Failure(Strict):
    """A file for which prediction failed."""

    file: str
    error: str


class Series(Prediction):
    """The CT slices of one DICOM series; probabilities are aggregated over them as in the report."""

    series: str
    files: int


class Model(Strict):
    """The model that made the prediction."""

    name: str
    dataset: str
    classes: list[str]


class Predictions(Strict):
    """Response of /predict: one result per file, in order, and one per DICOM series of two or more slices."""

    model: Model
    notice: str
    results: list[Record | Failure]
    series: list[Series]


class Explanation(Record):
    """One image with its saliency map; pictures are data URLs (PNG)."""

    explained: str = Field(description="class or finding that the map explains")
    method: str
    image: str = Field(description="the network's input")
    heat: str = Field(description="the saliency map in colors")
    overlay: str = Field(description="the map over the image")


class Explanations(Strict):
    """Response of /explain: one result per file, in order."""

    model: Model
    notice: str
    results: list[Explanation | Failure]


class Problem(Strict):
    """An error."""

    error: str
    results: list[Failure] | None = Field(default=None, description="error of each file, if files were read")


class Health(Strict):
    """State of the service."""

    status: str = Field(description="ok, starting or failed")


BINARY = {"type": "string", "format": "binary"}
FILES = {"files": {"type": "array", "items": BINARY, "minItems": 1}}
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": f"{FORMAT_NAMES}, or DICOM: files in the form field `files`, or one file as the request body.",
        "content": {
            FORM: {"schema": {"type": "object", "required": ["files"], "properties": FILES}},
            **{kind: {"schema": BINARY} for kind in RAW},
        },
    }
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": reason}
    for status, reason in {
        400: "Damaged multipart data, or both Content-Length and Transfer-Encoding.",
        401: "Missing or wrong token.",
        403: "A request from a page of another site.",
        408: "The body arrived too slowly.",
        413: "More bytes, files, pixels or images than allowed, or a file that decompresses to more.",
        415: "Unsupported kind of file or body.",
        421: "Unknown Host header.",
        422: "A damaged or unsuitable file, or an unknown class, method or rule. The first file decides if all fail.",
        500: "An error in the service, whose log describes it under the ID in the message.",
        503: "Starting, or overloaded: try again after Retry-After seconds.",
        504: "The computation took too long.",
    }.items()
}
