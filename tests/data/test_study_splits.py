"""The draws of published splits, against scikit-learn itself."""

import numpy as np
import pytest
from sklearn import model_selection, utils

from lungjax.data import study_splits


@pytest.mark.parametrize("count", [2, 7, 97, 1432, 4773])
@pytest.mark.parametrize(("size", "seed"), [(0.1, 25), (1 - 0.7, 42), (0.5, 42)])
def test_plain_split_is_scikit_learns(count, size, seed):
    wanted = model_selection.train_test_split(np.arange(count), test_size=size, random_state=seed)
    made = study_splits.train_test_split(count, size, seed)
    for ours, theirs in zip(made, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("sizes", [(9979, 9000, 9000), (5, 5, 5), (7, 7, 7, 7, 3), (2, 100), (33, 34, 12)])
@pytest.mark.parametrize(("size", "seed"), [(0.1, 25), (0.2 / 0.9, 25), (0.35, 0), (0.5, 7)])
def test_stratified_split_is_scikit_learns(sizes, size, seed):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    count = len(labels)
    try:
        wanted = model_selection.train_test_split(np.arange(count), test_size=size, random_state=seed, stratify=labels)
    except ValueError:
        with pytest.raises(ValueError, match="too few for a stratified split"):
            study_splits.train_test_split(count, size, seed, labels)
        return
    made = study_splits.train_test_split(count, size, seed, labels)
    for ours, theirs in zip(made, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("count", "draws"), [(1, 4), (35996, 26970), (294, 26), (26, 294)])
@pytest.mark.parametrize("seed", [0, 3])
def test_resample_is_scikit_learns(count, draws, seed):
    taken = utils.resample(np.arange(count), replace=True, n_samples=draws, random_state=seed)
    np.testing.assert_array_equal(study_splits.resample(count, draws, seed), np.bincount(taken, minlength=count))


def test_empty_parts_are_refused():
    with pytest.raises(ValueError, match="leaves 0 to train"):
        study_splits.train_test_split(1, 0.5, 0)
    with pytest.raises(ValueError, match="the smallest of 1"):
        study_splits.train_test_split(5, 0.4, 0, [0, 0, 0, 0, 1])


def test_cells_name_rows():
    assert study_splits.cells(4, val=np.array([2]), train=np.array([0, 3])) == ["train", "", "val", "train"]
