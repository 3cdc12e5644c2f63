"""The answers of the service, for its description in /openapi.json and /docs; the tests hold every answer to them."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from lungjax.data.imaging.images import FORMAT_NAMES
from lungjax.serve.multipart import FORM, RAW


class Strict(BaseModel):
    """No further keys."""

    model_config = ConfigDict(extra="forbid")


class Decision(Strict):
    """Whether a class is called, by an operating point chosen on the validation split."""

    called: bool
    rule: str
    level: str = Field(description="slice or patient: whose threshold it is")
    threshold: float
    sensitivity: float | None = Field(description="on the test split")
    specificity: float | None = Field(description="on the test split")


class Said(Strict):
    """What is said of an image or of a series."""

    predicted: str = Field(description="the class of the highest probability")
    probabilities: dict[str, float] = Field(description="of each class, calibrated")
    decisions: dict[str, Decision]
    warnings: list[str]


class Record(Said):
    """One image."""

    file: str = Field(description="its name in the request")
    unlike: float | None = Field(description="above 1: unlike the training images; null if the model can't tell")


class Failure(Strict):
    """One file of which nothing can be said."""

    file: str
    error: str


class Series(Said):
    """The CT slices of one DICOM series: the mean of their probabilities."""

    series: str
    files: int


class Model(Strict):
    """Which model said it."""

    name: str
    dataset: str
    classes: list[str]


class Predicted(Strict):
    """The answer of /predict: one result a file, in their order, and each DICOM series of two or more slices."""

    model: Model
    notice: str
    results: list[Record | Failure]
    series: list[Series]


class Explained(Record):
    """One image with its heat map; pictures are data URLs (PNG)."""

    explained: str = Field(description="the class that the map is about")
    method: str
    image: str = Field(description="the image as the network sees it")
    heat: str
    overlay: str


class Explanation(Strict):
    """The answer of /explain."""

    model: Model
    notice: str
    results: list[Explained | Failure]


class Problem(Strict):
    """Why there is no answer."""

    error: str
    results: list[Failure] | None = Field(default=None, description="each file's own reason, where files were read")


class Health(Strict):
    """Whether the service answers."""

    status: str = Field(description="ok, starting or failed")


BINARY = {"type": "string", "format": "binary"}
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": f"{FORMAT_NAMES}, or DICOM: files in the form field `files`, or one file as the whole body.",
        "content": {
            FORM: {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {"files": {"type": "array", "items": BINARY, "minItems": 1}},
                }
            },
            **{kind: {"schema": BINARY} for kind in RAW},
        },
    }
}
WORDS = {
    400: "Damaged multipart data.",
    401: "The service has a token, and the request did not.",
    403: "A request from another site's page.",
    408: "The body came too slowly.",
    413: "More bytes, files or pixels than /model allows, or a file that inflates to more.",
    415: "Another kind of file or body.",
    421: "The service isn't called by that name (Host).",
    422: "A damaged or unsuitable file, or an unknown class, method or rule. Of several files the first counts.",
    500: "An error in the service; the log has its number.",
    503: "Starting, or too much at once: try again after Retry-After seconds.",
    504: "It took too long.",
}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns OpenAPI's words for errors."""
    return {status: {"model": Problem, "description": WORDS[status]} for status in statuses}
