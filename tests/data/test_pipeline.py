"""Content and order of batches over epochs, hosts, processes and resumed runs."""

import dataclasses
import itertools

import numpy as np
import pytest

from lungjax.config import Config, DataConfig, InputSpec, TrainConfig
from lungjax.data import pipeline

CONFIG = Config(input=InputSpec(size=(20, 20)), train=TrainConfig(batch_size=6, seed=3))


def take(data, config, n, **kwargs):
    return list(itertools.islice(pipeline.train_batches(data, config, **({"start": 0} | kwargs)), n))


def assert_equal(batches, others):
    for a, b in zip(batches, others, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def joined(parts):
    """Joins the batches of several hosts into those of one."""
    return [{key: np.concatenate([p[key] for p in batch]) for key in batch[0]} for batch in zip(*parts, strict=True)]


def test_epochs_cover_all_examples(small_data):
    rows, order = pipeline.train_rows(small_data).tolist(), pipeline.order(small_data, CONFIG)
    first, second = ([order[i + len(rows) * epoch] for i in range(len(rows))] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == rows and first != second


def test_order_by_seed_and_step(small_data):
    for sampling in ("natural", "balanced"):
        config = dataclasses.replace(CONFIG, data=DataConfig(sampling=sampling))
        batches = take(small_data, config, 16)
        for hosts in (1, 2, 3):
            parts = [take(small_data, config, 3, start=13, host=h, hosts=hosts) for h in range(hosts)]
            assert_equal(joined(parts), batches[13:])  # each host has its part, in order
        rows = pipeline.batch_rows(small_data, config, 13)
        np.testing.assert_array_equal(small_data.columns["label"][rows], batches[13]["label"])
    other = take(small_data, dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, seed=4)), 3)
    assert any((x["image"] != y["image"]).any() for x, y in zip(take(small_data, CONFIG, 3), other, strict=True))


def test_order_of_worker_processes(small_data):
    config = dataclasses.replace(CONFIG, data=DataConfig(workers=2))
    batches = take(small_data, CONFIG, 6, start=5)
    assert_equal(take(small_data, config, 6, start=5), batches)
    assert batches[0]["image"].shape == (6, 20, 20, 1) and batches[0]["image"].dtype == np.uint8
    np.testing.assert_array_equal(batches[0]["place"], range(30, 36))


def test_balanced_sampling(small_data):
    train, labels = small_data.rows("train"), small_data.columns["label"].copy()
    labels[train] = [0] * 28 + [1] * 6 + [2] * 2
    data = dataclasses.replace(small_data, columns={**small_data.columns, "label": labels})
    order = pipeline.order(data, dataclasses.replace(CONFIG, data=DataConfig(sampling="balanced")))
    drawn = np.asarray([order[i] for i in range(84)])
    np.testing.assert_array_equal(np.bincount(labels[drawn]), [28, 28, 28])
    assert set(drawn) == set(train)


def test_evaluation_batches(small_data):
    rows = small_data.rows("test")  # 13 rows, batches of 8
    for hosts in (1, 2):
        batches = [
            b for h in range(hosts) for b in pipeline.eval_batches(small_data, rows, CONFIG, 8, host=h, hosts=hosts)
        ]
        row = np.concatenate([b["row"] for b in batches])
        assert len(row) == 16 and sorted(row[row >= 0]) == sorted(rows)
        assert not any(batch["image"][batch["row"] < 0].any() for batch in batches)


def test_missing_class_and_unreadable_image(small_data):
    split = small_data.columns["split"].copy()
    split[(small_data.columns["label"] == 1) & (split == "train")] = "val"
    with pytest.raises(ValueError, match="middle"):
        pipeline.train_rows(dataclasses.replace(small_data, columns={**small_data.columns, "split": split}))
    records = [{**r, "image": r["image"][:60]} for r in small_data.records]
    with pytest.raises(ValueError, match=r"\d\d\.png"):
        take(dataclasses.replace(small_data, records=records), CONFIG, 1)
