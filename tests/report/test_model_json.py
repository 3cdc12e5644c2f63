"""model.json of a run: where boxes come from, and the novelty score with its rates."""

from dataclasses import replace

import numpy as np

from lungjax.config import Config, InputSpec
from lungjax.evaluation import novelty
from lungjax.report import model_json


def describe(data, crop="box", detector=None):
    level = {"per_class": {name: {} for name in data.classes}}
    report = {"facts": {}, "warnings": [], "classes": data.classes, "test": {"slice": level, "patient": level}}
    config = Config(input=InputSpec(size=(32, 32), crop=crop))
    return model_json.describe(config, data, report, detector, {})


def test_where_boxes_come_from(small_data):
    boxed = replace(small_data, columns=small_data.columns | {"box": small_data.columns["box"] * 0.5})
    assert describe(small_data).box == ""  # every box is the full image
    assert describe(boxed).box == "given"  # of a user's data set
    assert describe(boxed, crop="none").box == ""
    body = describe(replace(boxed, name="covidx_ct/3a"))
    assert body.box == "body" and any("body" in text for text in body.about["warnings"])


def test_novelty_score_of_a_data_set(small_data):
    fitted = model_json.fit_novelty(small_data)
    description = describe(small_data, detector=fitted)
    score = novelty.from_dict(description.novelty)
    assert description.public()["novelty"] == fitted.rates
    assert score.score(np.zeros((40, 40), np.uint8)) > 1
    assert {split: rate["n"] for split, rate in score.rates["false_alarms"].items()} == {"val": 11, "test": 13}
    detection = score.rates["detection"]
    assert {kind: n for kind in detection if (n := detection[kind]["n"]) < 12} == {}
    for kind in ("blank images, black to white", "noise", "photographs, grayscale"):
        assert detection[kind]["rate"] == 1 and detection[kind]["interval"][0] < 1
    fitted = model_json.fit_novelty(replace(small_data, modality="xray"))
    del detection["synthetic chest X-rays"]
    assert fitted.rates["detection"] == detection and "synthetic CT slices" in detection
    broken = [dict(record, image=b"") if i < 20 else record for i, record in enumerate(small_data.records)]
    assert model_json.fit_novelty(replace(small_data, records=broken)) is None  # 16 training images are too few
