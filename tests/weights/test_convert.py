"""Every name on both sides of a conversion is accounted for, and arrays land in our layout."""

import numpy as np
import pytest

from lungjax.weights.convert import SAME_NAMES, Rules, convert, target

KERAS = Rules(layers=((r"(conv\d|bn|dense)", r"\1"), (r"odd(\d)", lambda match: f"conv{int(match[1]) + 1}")))
TORCH = Rules(layers=((r"net\.(conv\d|bn|dense)", r"\1"),), torch=True)


def numbers(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_all_problems_stand_in_one_error_and_nothing_is_returned():
    shapes = {"conv1/kernel": (3, 3, 2, 4), "conv2/kernel": (1, 1, 4, 4), "bn/scale": (4,), "bn/bias": (4,)}
    tensors = {
        "conv1/kernel": numbers(3, 3, 4, 2),
        "conv2/kernel": numbers(1, 1, 4, 4),
        "odd1/kernel": numbers(1, 1, 4, 4),
        "bn/gamma": numbers(4),
        "extra/kernel": numbers(7),
        "conv3/kernel": numbers(8),
        "dense/momentum": numbers(2),
    }
    with pytest.raises(ValueError) as error:
        convert(tensors, KERAS, shapes, where="some.h5")
    head, *lines = str(error.value).splitlines()
    assert head == "some.h5 does not fit (6 names):"
    assert sorted(lines) == sorted(
        [
            "  conv1/kernel: conv1/kernel (3, 3, 4, 2) gives (3, 3, 4, 2), wanted (3, 3, 2, 4)",
            "  conv2/kernel: filled by conv2/kernel and by odd1/kernel",
            "  only in the file: extra/kernel (7,)",
            "  only in the file: conv3/kernel (8,) (would be conv3/kernel)",
            "  only in the file: dense/momentum (2,)",
            "  only in the network: bn/bias (4,)",
        ]
    )


def test_a_long_error_is_cut():
    with pytest.raises(ValueError, match=r"the file does not fit \(90 names\)") as error:
        convert({f"w{i}": numbers(1) for i in range(90)}, KERAS, {})
    assert len(str(error.value).splitlines()) == 42 and str(error.value).endswith("... and 50 more")


def test_fresh_leaves_are_left_out_whether_or_not_the_file_has_them():
    shapes = {"conv1/kernel": (1, 1, 2, 3), "dense/kernel": (3, 5), "dense/bias": (5,)}
    body = {"conv1/kernel": numbers(1, 1, 2, 3)}
    for head in ({}, {"dense/kernel": numbers(3, 9), "dense/bias": numbers(9)}, {"dense/bias": numbers(5)}):
        found = convert(body | head, KERAS, shapes, fresh="^dense/")
        assert list(found) == ["conv1/kernel"]
    with pytest.raises(ValueError, match=r"\(2 names\)"):
        convert(body, KERAS, shapes)
    with pytest.raises(ValueError, match="only in the network: conv1/kernel"):
        convert({}, KERAS, shapes, fresh="^dense/")


def test_optional_leaves_are_taken_where_they_fit():
    shapes = {"conv1/kernel": (1, 1, 2, 3), "dense/kernel": (3, 5), "dense/bias": (5,)}
    tensors = {"conv1/kernel": numbers(1, 1, 2, 3), "dense/kernel": numbers(3, 9), "dense/bias": numbers(5)}
    assert list(convert(tensors, KERAS, shapes, optional="^dense/")) == ["conv1/kernel", "dense/bias"]
    # A layer of the file's head that ours lacks is no error either.
    assert list(convert(tensors, KERAS, {"conv1/kernel": (1, 1, 2, 3)}, optional="^dense/")) == ["conv1/kernel"]


def test_keras_arrays_in_our_layout():
    depthwise, pointwise = numbers(5, 5, 6, 1), numbers(1, 1, 4, 3)
    tensors = {"conv1/depthwise_kernel": depthwise, "dense/kernel": pointwise, "conv2/kernel": numbers(3, 3, 2, 4)}
    shapes = {"conv1/kernel": (5, 5, 1, 6), "dense/kernel": (4, 3), "conv2/kernel": (3, 3, 2, 4)}
    found = convert(tensors, KERAS, shapes)
    np.testing.assert_array_equal(found["conv1/kernel"][:, :, 0], depthwise[..., 0])
    np.testing.assert_array_equal(found["dense/kernel"], pointwise[0, 0])
    np.testing.assert_array_equal(found["conv2/kernel"], tensors["conv2/kernel"])


def test_torch_arrays_in_our_layout():
    conv, linear, pointwise = numbers(6, 2, 3, 5), numbers(4, 3), numbers(5, 3, 1, 1)
    tensors = {
        "net.conv1.weight": conv, "net.dense.weight": linear, "net.conv2.weight": pointwise,
        "net.conv3.weight": numbers(6, 1, 3, 3), "net.bn.weight": numbers(2), "net.bn.running_var": numbers(2),
        "net.bn.num_batches_tracked": np.asarray(9),
    }  # fmt: skip
    shapes = {
        "conv1/kernel": (3, 5, 2, 6), "dense/kernel": (3, 4), "conv2/kernel": (3, 5), "conv3/kernel": (3, 3, 1, 6),
        "bn/scale": (2,), "bn/var": (2,),
    }  # fmt: skip
    found = convert(tensors, TORCH, shapes)
    assert {path: array.shape for path, array in found.items()} == shapes
    assert found["conv1/kernel"][2, 4, 1, 5] == conv[5, 1, 2, 4]
    np.testing.assert_array_equal(found["dense/kernel"], linear.T)
    np.testing.assert_array_equal(found["conv2/kernel"], pointwise[:, :, 0, 0].T)
    assert found["conv3/kernel"][1, 2, 0, 4] == tensors["net.conv3.weight"][4, 0, 1, 2]
    assert np.shares_memory(found["conv1/kernel"], conv)  # large files are not copied


def test_names_by_order_whole_tensors_ignored_ones_and_special_arrays():
    rules = Rules(
        layers=((r"conv1", "first"), (r"conv\d", "other")),
        leaves=((r"conv1/odd", "first/kernel"),),
        ignore=(r"mean/.*",),
        special=((r"^first/kernel$", lambda array, shape: array[::-1].reshape(shape)),),
    )
    expected = {
        "conv1/odd": "first/kernel", "conv1/bias": "first/bias", "conv2/bias": "other/bias", "mean/x": "",
        "mean": None, "conv1/x": None,
    }  # fmt: skip
    assert {name: target(name, rules, 1) for name in expected} == expected
    found = convert({"conv1/odd": numbers(4), "mean/x": numbers(9)}, rules, {"first/kernel": (2, 2)})
    np.testing.assert_array_equal(found["first/kernel"], [[3, 2], [1, 0]])
    few = Rules(layers=((r"block(\d)", lambda match: ["first", "second"][int(match[1])]),))
    assert [target(f"block{i}/bias", few, 1) for i in range(3)] == ["first/bias", "second/bias", None]
    assert target("conv1/conv1_W_1", KERAS, 4) == "conv1/kernel" and target("conv1/conv1_b_1", KERAS, 1) == "conv1/bias"
    assert target("a/b/kernel", SAME_NAMES, 4) == "a/b/kernel"
