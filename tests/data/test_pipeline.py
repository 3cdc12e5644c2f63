import dataclasses
import itertools

import numpy as np
import pytest

from lungjax.config import Config, DataConfig, InputSpec, TrainConfig
from lungjax.data import pipeline

CONFIG = Config(input=InputSpec(size=(20, 20)), train=TrainConfig(batch_size=6, seed=3))


def take(data, config, n, **kwargs):
    kwargs = {"start": 0} | kwargs
    return list(itertools.islice(pipeline.train_batches(data, config, **kwargs), n))


def test_batches_hold_what_the_step_wants(small_data):
    batch = take(small_data, CONFIG, 1)[0]
    assert batch["image"].shape == (6, 20, 20, 1) and batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["place"], range(6))


def test_two_epochs_over_two_hosts_cover_every_example_exactly_twice(small_data):
    rows = pipeline.train_rows(small_data)
    places = 2 * len(rows)
    order = pipeline.order(small_data, CONFIG)
    seen = sorted(order[host::2][i] for host in (0, 1) for i in range(places // 2))
    assert seen == sorted(list(rows) * 2)
    first = [order[i] for i in range(len(rows))]
    assert first != [order[i] for i in range(len(rows), places)], "epochs are shuffled anew"


def test_hosts_share_the_global_batch_of_one_host(small_data):
    whole = take(small_data, CONFIG, 14)
    halves = [take(small_data, CONFIG, 14, host=h, hosts=2) for h in (0, 1)]
    for step, batch in enumerate(whole):
        for k in batch:  # each host its half, in order: the devices of both get what those of one host would
            np.testing.assert_array_equal(np.concatenate([half[step][k] for half in halves]), batch[k])


@pytest.mark.parametrize("sampling", ["natural", "balanced"])
@pytest.mark.parametrize("hosts", [1, 3])
def test_the_order_is_a_function_of_the_step_alone(small_data, sampling, hosts):
    config = dataclasses.replace(CONFIG, data=DataConfig(sampling=sampling))
    straight = take(small_data, config, 16)
    resumed = [take(small_data, config, 3, start=13, host=h, hosts=hosts) for h in range(hosts)]
    for i in range(3):
        for k, values in straight[13 + i].items():
            np.testing.assert_array_equal(np.concatenate([part[i][k] for part in resumed]), values)
        rows = pipeline.batch_rows(small_data, config, 13 + i)
        np.testing.assert_array_equal(small_data.columns["label"][rows], straight[13 + i]["label"])


def test_worker_processes_keep_the_order(small_data):
    config = dataclasses.replace(CONFIG, data=DataConfig(workers=2))
    for a, b in zip(take(small_data, config, 8, start=5), take(small_data, CONFIG, 8, start=5), strict=True):
        for k in a:
            np.testing.assert_array_equal(a[k], b[k])


def test_another_seed_is_another_order(small_data):
    other = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, seed=4))
    a, b = take(small_data, CONFIG, 3), take(small_data, other, 3)
    assert any((x["image"] != y["image"]).any() for x, y in zip(a, b, strict=True))


def test_balanced_sampling_draws_each_class_equally_and_every_example(small_data):
    columns = dict(small_data.columns)
    train = small_data.rows("train")
    labels = columns["label"].copy()
    labels[train] = [0] * 28 + [1] * 6 + [2] * 2
    data = dataclasses.replace(small_data, columns={**columns, "label": labels})
    order = pipeline.order(data, dataclasses.replace(CONFIG, data=DataConfig(sampling="balanced")))
    drawn = np.asarray([order[i] for i in range(84)])
    np.testing.assert_array_equal(np.bincount(labels[drawn]), [28, 28, 28])
    assert set(drawn) == set(train)


def test_every_evaluation_row_comes_once_and_the_rest_is_padding(small_data):
    rows = small_data.rows("test")  # 13 rows, batches of 8
    for hosts in (1, 2):
        batches = [
            b for h in range(hosts) for b in pipeline.eval_batches(small_data, rows, CONFIG, 8, host=h, hosts=hosts)
        ]
        got = np.concatenate([b["row"] for b in batches])
        assert len(got) == 16
        assert sorted(got[got >= 0]) == sorted(rows)
        for batch in batches:
            assert not batch["image"][batch["row"] < 0].any()


def test_a_class_without_a_training_example_is_named(small_data):
    split = small_data.columns["split"].copy()
    split[(small_data.columns["label"] == 1) & (split == "train")] = "val"
    data = dataclasses.replace(small_data, columns={**small_data.columns, "split": split})
    with pytest.raises(ValueError, match="no training example of middle"):
        pipeline.train_rows(data)


def test_an_unreadable_image_is_named(small_data):
    records = [{**r, "image": r["image"][:60]} for r in small_data.records]
    with pytest.raises(ValueError, match=r"\d\d\.png"):
        take(dataclasses.replace(small_data, records=records), CONFIG, 1)
