"""Synthetic slices: reproducibility, masks and findings."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy import ndimage

from lungjax import datasets
from lungjax.datasets import PrepareOptions, phantom_ct
from lungjax.datasets.phantom import slices as phantom


def examples(config="tiny", seed=0):
    return phantom_ct.listing(None, config, PrepareOptions(seed=seed)).examples


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[tuple[phantom.Patient, phantom.Phantom]]]:
    """Two slices of each of 16 patients, with every finding in turn."""
    result = {}
    for finding in phantom.CLASSES:
        patients = [phantom.new_patient(seed, finding) for seed in range(16)]
        result[finding] = [(p, phantom.draw_slice(p, level)) for p in patients for level in phantom.levels(p, 2)]
    return result


def test_same_bytes_in_any_process_and_order():
    chosen = examples(seed=3)[:4]
    np.random.seed(1)
    with ThreadPoolExecutor(2) as pool:
        backwards = list(pool.map(lambda e: e.image(), chosen[::-1]))[::-1]
    code = (
        "import sys; from lungjax.datasets import PrepareOptions, phantom_ct; "
        "examples = phantom_ct.listing(None, 'tiny', PrepareOptions(seed=3)).examples[:4]; "
        "sys.stdout.buffer.write(b''.join(e.image() for e in examples))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b"".join(backwards)
    assert all(a.image() != b for a, b in zip(examples(seed=4)[:4], backwards, strict=True))


def test_masks_and_hounsfield_units(drawn):
    for finding, slices in drawn.items():
        for patient, image in slices:
            assert not (image.lesion & ~image.lung).any()
            area = image.lesion.sum() * patient.pixel**2
            assert (area == 0) if finding == "Normal" else (area > 150), (finding, patient.seed, area)
            assert 9_000 < image.lung.sum() * patient.pixel**2 < 45_000
    for patient, image in drawn["Normal"]:
        assert -920 < np.median(image.hu[image.lung]) < -650
        xmin, ymin, xmax, ymax = image.box
        inside = np.zeros_like(image.lung)
        inside[ymin:ymax, xmin:xmax] = True
        tissue = inside & ~ndimage.binary_dilation(image.lung, iterations=3) & (image.hu > -400)
        assert -130 < np.median(image.hu[tissue]) < 120
        assert image.hu[inside].max() > 350, patient.seed  # bone


def test_effect_of_finding_on_lesion_only(drawn):
    for finding in phantom.CLASSES[1:]:
        for (patient, ill), (_, well) in zip(drawn[finding], drawn["Normal"], strict=True):
            np.testing.assert_array_equal(ill.lung, well.lung)
            change = np.abs(ill.hu - well.hu)
            near = ndimage.binary_dilation(ill.lesion, iterations=int(np.ceil(14 / patient.pixel)))
            assert change[~near].mean() < 0.5, patient.seed
            assert change[ill.lesion].mean() > 60, patient.seed


def test_gray_and_unknown_finding():
    hu = np.array([[-2000, -1350, -600, 150, 3000]], np.float32)
    np.testing.assert_array_equal(phantom.gray(hu, (-1350, 150)), [[0, 0, 128, 255, 255]])
    with pytest.raises(ValueError, match="'Covid'"):
        phantom.new_patient(0, "Covid")


def test_splits_and_scanners():
    listed = examples("default")
    patients, slices = phantom_ct.SIZES["default"]
    facts = {(e.group, e.split, e.label, e.source) for e in listed}
    assert len(facts) == len({e.group for e in listed}) == patients and len(listed) == patients * slices
    for label in range(3):
        splits, sources = zip(*((split, source) for _, split, lab, source in facts if lab == label), strict=True)
        assert [splits.count(s) for s in ("train", "val", "test")] == [72, 18, 30]
        assert [sources.count(s.name) for s in phantom.SCANNERS] == [24] * 5
    order = [e.label for e in listed]
    assert order != sorted(order)


def test_tiny_set_on_first_use(tmp_path):
    data, listed = datasets.open_dataset("phantom_ct/tiny", tmp_path), examples()
    assert data.classes == phantom.CLASSES
    assert [len(data.rows(s)) for s in ("train", "val", "test")] == [30, 6, 12]
    for row in (0, 17, 47):
        assert data.columns["file"][row] == listed[row].file and data.records[row]["image"] == listed[row].image()
        np.testing.assert_allclose(data.columns["box"][row], listed[row].box)
    with pytest.raises(ValueError, match="data.protocol=study"):
        datasets.open_dataset("phantom_ct/tiny", tmp_path, "study")
