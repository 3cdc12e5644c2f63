"""Conversion accounts for every name on both sides and puts arrays into our layout."""

import numpy as np
import pytest

from lungjax.weights.convert import SAME_NAMES, Rules, blocks, convert, numbered_blocks, target

KERAS = Rules(layers=((r"(conv\d|bn|dense)", r"\1"), (r"odd(\d)", lambda match: f"conv{int(match[1]) + 1}")))
TORCH = Rules(layers=((r"net\.(conv\d|bn|dense)", r"\1"),), torch=True)


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


def test_layout_of_kernels():
    """A 1x1 convolution can become a dense layer; batch counters are skipped."""
    conv, pointwise, counter = numbers(6, 2, 3, 5), numbers(5, 3, 1, 1), np.asarray(9)
    tensors = {"net.conv1.weight": conv, "net.conv2.weight": pointwise, "net.bn.num_batches_tracked": counter}
    result = convert(tensors, TORCH, {"conv1/kernel": (3, 5, 2, 6), "conv2/kernel": (3, 5)})
    assert result["conv1/kernel"][2, 4, 1, 5] == conv[5, 1, 2, 4]
    np.testing.assert_array_equal(result["conv2/kernel"], pointwise[:, :, 0, 0].T)
    assert np.shares_memory(result["conv1/kernel"], conv)  # large files are not copied


def test_rules():
    rules = Rules(
        layers=(
            (r"conv1", "first"),
            (r"conv\d", "other"),
            blocks(r"stage(\d)_(\d)\.", {"0": "conv", "a.b": "bn"}, stage=1, block=-1, suffix="x?"),
            numbered_blocks(r"block(?:_(\d+))?", {"": "conv", "_bn": "bn"}, (1, 2)),
            numbered_blocks(r"from1_(\d)", {"": "conv"}, (1, 2), first=1),
        ),
        leaves=((r"conv1/odd", "first/kernel"),),
        ignore=(r"mean/.*",),
        special=((r"^first/kernel$", lambda array, shape: array[::-1].reshape(shape)),),
    )
    expected = {
        "conv1/odd": "first/kernel", "conv1/bias": "first/bias", "conv2/bias": "other/bias", "mean/x": "",
        "mean": None, "conv1/x": None, "stage1_2.a.b/gamma": "stage2_block1/bn/scale", "stage1_2.aab/gamma": None,
        "stage0_3.0x/bias": "stage1_block2/conv/bias", "block/bias": "stage1_block1/conv/bias",
        "block_2_bn/beta": "stage2_block2/bn/bias", "block_3/bias": None, "from1_0/bias": None,
        "conv2/conv2_W_1": "other/kernel", "conv2/conv2_b_1": "other/bias",
    }  # fmt: skip
    assert {name: target(name, rules, 1) for name in expected} == expected
    result = convert({"conv1/odd": numbers(4), "mean/x": numbers(9)}, rules, {"first/kernel": (2, 2)})
    np.testing.assert_array_equal(result["first/kernel"], [[3, 2], [1, 0]])
    assert target("a/b/kernel", SAME_NAMES, 4) == "a/b/kernel"
