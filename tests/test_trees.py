from lungjax import trees

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
