"""Conversion accounts for every name on both sides."""

import numpy as np
import pytest

from lungjax.weights.convert import Rule, Rules, convert

KERAS = Rules(layers=(Rule(r"(conv\d|bn|dense)", r"\1"), Rule(r"odd(\d)", "conv<1+1>")))


def numbers(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_one_error_for_all_problems():
    shapes = {"conv1/kernel": (3, 3, 2, 4), "conv2/kernel": (1, 1, 4, 4), "bn/scale": (4,), "bn/bias": (4,)}
    tensors = {
        "conv1/kernel": numbers(3, 3, 4, 2), "conv2/kernel": numbers(1, 1, 4, 4), "odd1/kernel": numbers(1, 1, 4, 4),
        "bn/gamma": numbers(4), "extra/kernel": numbers(7), "conv3/kernel": numbers(8), "dense/momentum": numbers(2),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"some.h5 does not fit \(6 names\)") as error:
        convert(tensors, KERAS, shapes, label="some.h5")
    for part in (
        "conv1/kernel: conv1/kernel (3, 3, 4, 2)", "filled by conv2/kernel and by odd1/kernel",
        "only in the file: extra/kernel (7,)", "only in the file: conv3/kernel (8,)",
        "only in the file: dense/momentum (2,)", "only in the network: bn/bias (4,)",
    ):  # fmt: skip
        assert part in str(error.value)
    with pytest.raises(ValueError, match="and 50 more"):
        convert({f"w{i}": numbers(1) for i in range(90)}, KERAS, {})


def test_fresh_and_optional_parameters():
    shapes = {"conv1/kernel": (1, 1, 2, 3), "dense/kernel": (3, 5), "dense/bias": (5,)}
    body = {"conv1/kernel": numbers(1, 1, 2, 3)}
    for head in ({}, {"dense/kernel": numbers(3, 9), "dense/bias": numbers(9)}, {"dense/bias": numbers(5)}):
        assert list(convert(body | head, KERAS, shapes, fresh="^dense/")) == ["conv1/kernel"]
    for tensors, options in ((body, {}), ({}, {"fresh": "^dense/"})):
        with pytest.raises(ValueError, match="only in the network"):
            convert(tensors, KERAS, shapes, **options)
    tensors = body | {"dense/kernel": numbers(3, 9), "dense/bias": numbers(5)}
    assert list(convert(tensors, KERAS, shapes, optional="^dense/")) == ["conv1/kernel", "dense/bias"]
    # A layer of the head in the file that our network lacks is no error either.
    body_shapes = {"conv1/kernel": (1, 1, 2, 3)}
    assert list(convert(tensors, KERAS, body_shapes, optional="^dense/")) == ["conv1/kernel"]
