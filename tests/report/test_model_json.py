"""model.json of a run: where boxes come from, and the novelty score."""

from dataclasses import replace

import numpy as np

from lungjax.config import Config, InputSpec
from lungjax.evaluation import novelty
from lungjax.report import model_json


def describe(data, crop="box"):
    level = {"per_class": {name: {} for name in data.classes}}
    report = {"facts": {}, "warnings": [], "classes": data.classes, "test": {"slice": level, "patient": level}}
    config = Config(input=InputSpec(size=(32, 32), crop=crop))
    return model_json.describe(config, data, report, model_json.fit_novelty(data), {})


def test_where_boxes_come_from(small_data):
    boxed = replace(small_data, columns=small_data.columns | {"box": small_data.columns["box"] * 0.5})
    assert describe(small_data).box == ""  # every box is the full image
    assert describe(boxed).box == "given"  # of a user's data set
    assert describe(boxed, crop="none").box == ""
    body = describe(replace(boxed, name="covidx_ct/3a"))
    assert body.box == "body" and any("body" in text for text in body.about["warnings"])


def test_novelty_score_of_a_data_set(small_data):
    score = novelty.from_dict(describe(small_data).novelty)
    assert score.score(np.zeros((40, 40), np.uint8)) > 1
    assert score.false_alarms["val"]["n"] == 11 and score.false_alarms["test"]["n"] == 13
    broken = [dict(record, image=b"") if i < 20 else record for i, record in enumerate(small_data.records)]
    assert describe(replace(small_data, records=broken)).novelty is None  # 16 training images are too few
