import pytest

from lungjax.models import trees

TREE = {"block1": {"conv": {"kernel": 1, "bias": 2}}, "head": {"dense": {"kernel": 3}}}


def test_flatten_and_back():
    flat = trees.flatten(TREE)
    assert flat == {"block1/conv/kernel": 1, "block1/conv/bias": 2, "head/dense/kernel": 3}
    assert trees.unflatten(flat) == TREE


def test_mask_searches_the_whole_path():
    assert trees.flatten(trees.mask(TREE, r"^block1/.*kernel$")) == {
        "block1/conv/kernel": True,
        "block1/conv/bias": False,
        "head/dense/kernel": False,
    }


@pytest.mark.parametrize("chosen", [(), ("block1/conv/bias",), ("block1/conv/kernel", "block1/conv/bias"), "all"])
def test_split_and_merge_are_inverse_and_leave_no_empty_branch(chosen):
    chosen = list(trees.flatten(TREE)) if chosen == "all" else chosen
    rest, those = trees.split(TREE, frozenset(chosen))
    assert set(trees.flatten(those)) == set(chosen)
    assert set(trees.flatten(rest)) == set(trees.flatten(TREE)) - set(chosen)
    assert all(branch for part in (rest, those) for branch in part.values())
    assert trees.merge(rest, those) == trees.merge(those, rest) == TREE
