from lungjax.models import trees

TREE = {"block1": {"conv": {"kernel": 1, "bias": 2}}, "head": {"dense": {"kernel": 3}}}
FLAT = {"block1/conv/kernel": 1, "block1/conv/bias": 2, "head/dense/kernel": 3}


def test_split_and_merge_are_inverse():
    assert trees.flatten(TREE) == FLAT and trees.unflatten(FLAT) == TREE
    for chosen in ((), ("block1/conv/bias",), ("block1/conv/kernel", "block1/conv/bias"), tuple(FLAT)):
        rest, part = trees.split(TREE, chosen)
        assert set(trees.flatten(part)) == set(chosen) and set(trees.flatten(rest)) == set(FLAT) - set(chosen)
        assert all(branch for tree in (rest, part) for branch in tree.values())  # no empty branches
        assert trees.merge(rest, part) == trees.merge(part, rest) == TREE
