"""Drawn slices: the same from the same seed, true masks, findings as described, nothing to cheat by."""

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lungjax import datasets
from lungjax.data.imaging import images
from lungjax.datasets import PrepareOptions, phantom_ct
from lungjax.datasets.phantom import slices as phantom


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[tuple[phantom.Patient, phantom.Phantom]]]:
    """Two slices of each of 16 patients, drawn with every finding in turn."""
    found = {}
    for finding in phantom.CLASSES:
        patients = [phantom.new_patient(seed, finding) for seed in range(16)]
        found[finding] = [(p, phantom.draw_slice(p, at)) for p in patients for at in phantom.levels(p, 2)]
    return found


def test_a_seed_gives_the_same_bytes_in_another_process_and_in_any_order():
    examples = phantom_ct.listing(None, "tiny", PrepareOptions(seed=3)).examples[:6]
    np.random.seed(1)
    with ThreadPoolExecutor(3) as pool:
        backwards = list(pool.map(lambda e: e.image(), examples[::-1]))[::-1]
    code = (
        "import hashlib; from lungjax.datasets import Options, phantom_ct; "
        "e = phantom_ct.listing(None, 'tiny', Options(seed=3)).examples[:6]; "
        "import sys; sys.stdout.buffer.write(b''.join(x.image() for x in e))"
    )
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout
    assert other == b"".join(backwards)
    again = phantom_ct.listing(None, "tiny", PrepareOptions(seed=4)).examples[:6]
    assert all(a.image() != b for a, b in zip(again, backwards, strict=True))


def test_draw_patient_goes_down_the_lungs():
    slices = phantom.draw_patient(5, "COVID-19", 3)
    assert [s.level for s in slices] == sorted(s.level for s in slices)
    assert len({s.hu.shape for s in slices}) == 1
    patient = phantom.new_patient(5, "COVID-19")
    np.testing.assert_array_equal(slices[1].hu, phantom.draw_slice(patient, slices[1].level).hu)


def test_masks_tell_where_the_finding_is(drawn):
    for finding, slices in drawn.items():
        for patient, image in slices:
            assert not (image.lesion & ~image.lung).any()
            area = image.lesion.sum() * patient.pixel**2
            assert (area == 0) if finding == "Normal" else (area > 150), (finding, patient.seed, area)
            lung = image.lung.sum() * patient.pixel**2
            assert 9_000 < lung < 45_000


def test_a_finding_changes_the_lesion_and_nothing_else(drawn):
    for finding in phantom.CLASSES[1:]:
        for (patient, ill), (_, well) in zip(drawn[finding], drawn["Normal"], strict=True):
            np.testing.assert_array_equal(ill.lung, well.lung)
            change = np.abs(ill.hu - well.hu)
            near = ndimage.binary_dilation(ill.lesion, iterations=int(np.ceil(14 / patient.pixel)))
            assert change[~near].mean() < 0.5, patient.seed
            assert change[ill.lesion].mean() > 60, patient.seed


def test_hounsfield_units_are_those_of_a_chest(drawn):
    for patient, image in drawn["Normal"]:
        assert -920 < np.median(image.hu[image.lung]) < -650
        xmin, ymin, xmax, ymax = image.box
        inside = np.zeros_like(image.lung)
        inside[ymin:ymax, xmin:xmax] = True
        tissue = inside & ~ndimage.binary_dilation(image.lung, iterations=3) & (image.hu > -400)
        assert -130 < np.median(image.hu[tissue]) < 120
        assert image.hu[inside].max() > 350, patient.seed  # bone


def test_pneumonia_is_dense_and_one_sided_and_covid_faint_bilateral_peripheral_and_low(drawn):
    share, both, behind, edge, density = {}, {}, {}, {}, {}
    for finding in phantom.CLASSES[1:]:
        rows = []
        for patient, image in drawn[finding]:
            right = np.zeros_like(image.lung)
            middle = round((image.lung.shape[1] - 1) / 2 + patient.shift[0] / patient.pixel)
            right[:, :middle] = True
            areas = (image.lesion & right).sum(), (image.lesion & ~right).sum()
            depth = ndimage.distance_transform_edt(image.lung) * patient.pixel
            below = np.argwhere(image.lesion)[:, 0].mean() > np.argwhere(image.lung)[:, 0].mean()
            hu = np.median(image.hu[image.lesion])
            rows.append((max(areas) / sum(areas), min(areas) > 0, below, np.median(depth[image.lesion]), hu))
        means = np.mean(rows, axis=0)
        share[finding], both[finding], behind[finding], edge[finding], density[finding] = means
    assert share["Pneumonia"] > 0.85 > 0.75 > share["COVID-19"]
    assert both["Pneumonia"] < 0.5 < 0.95 < both["COVID-19"]
    assert behind["COVID-19"] > 0.75
    assert edge["COVID-19"] < 13
    assert density["Pneumonia"] > density["COVID-19"] + 150
    assert -750 < density["COVID-19"] < -500


def test_the_box_is_that_of_the_body(drawn):
    checked = 0
    for patient, image in drawn["Pneumonia"]:
        if patient.build.arms or patient.scanner.view == "tight":
            continue
        solid = ndimage.binary_opening(ndimage.gaussian_filter(image.hu, 1) > -400, iterations=2)
        parts, count = ndimage.label(solid)
        body = 1 + int(np.argmax(ndimage.sum(solid, parts, range(1, count + 1))))
        rows, columns = ndimage.find_objects(parts)[body - 1]
        expected = columns.start, rows.start, columns.stop, rows.stop
        np.testing.assert_allclose(image.box, expected, atol=3.5)
        assert image.box == phantom.body_box(patient, image.level)
        checked += 1
    assert checked >= 6


def test_gray_maps_the_window_to_black_and_white():
    hu = np.array([[-2000, -1350, -600, 150, 3000]], np.float32)
    np.testing.assert_array_equal(phantom.gray(hu, (-1350, 150)), [[0, 0, 128, 255, 255]])


def test_unknown_words_are_named():
    with pytest.raises(ValueError, match=r"'Covid'.*Normal, Pneumonia, COVID-19"):
        phantom.draw_patient(0, "Covid", 1)
    with pytest.raises(ValueError, match=r"unknown configuration 'tine'.*tiny"):
        phantom_ct.listing(None, "tine", PrepareOptions())
    with pytest.raises(ValueError, match="--classes"):
        phantom_ct.listing(None, "tiny", PrepareOptions(classes=("a", "b")))


def test_patients_are_split_within_classes_and_scanners_spread():
    examples = phantom_ct.listing(None, "default", PrepareOptions()).examples
    by_patient = {e.group: e for e in examples}
    patients, slices = phantom_ct.SIZES["default"]
    assert len(by_patient) == patients and len(examples) == patients * slices
    assert len({e.file for e in examples}) == len(examples)
    assert all((e.split, e.label, e.source) == _known(by_patient[e.group]) for e in examples)
    for label in range(3):
        mine = [e for e in by_patient.values() if e.label == label]
        splits = [e.split for e in mine]
        assert [splits.count(s) for s in ("train", "val", "test")] == [72, 18, 30]
        sources = [e.source for e in mine]
        assert [sources.count(s.name) for s in phantom.SCANNERS] == [24] * 5
    order = [e.label for e in by_patient.values()]
    assert order != sorted(order)


def _known(example):
    return example.split, example.label, example.source


def test_the_tiny_set_is_drawn_on_first_use(tmp_path):
    data = datasets.open_dataset("phantom_ct/tiny", tmp_path)
    examples = phantom_ct.listing(None, "tiny", PrepareOptions()).examples
    assert data.classes == phantom.CLASSES
    assert [len(data.rows(s)) for s in ("train", "val", "test")] == [30, 6, 12]
    for row in (0, 17, 47):
        image = images.decode(data.records[row]["image"], data.window)
        assert image.shape == (data.columns["height"][row], data.columns["width"][row])
        np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(examples[row].image()))))
        assert data.columns["file"][row] == examples[row].file
        np.testing.assert_allclose(data.columns["box"][row], examples[row].box)


def test_size_window_noise_and_brightness_do_not_give_the_class_away():
    examples = phantom_ct.listing(None, "default", PrepareOptions()).examples[:540:3]  # a slice of 180 patients
    features = []
    for example in examples:
        image = np.asarray(Image.open(io.BytesIO(example.image())), np.float64)
        rough = image[1:-1, 1:-1] - (image[:-2, 1:-1] + image[2:, 1:-1] + image[1:-1, :-2] + image[1:-1, 2:]) / 4
        window = example.image.args[0].window
        features.append([*image.shape, *window, np.median(np.abs(rough)), image.mean(), image.std()])
    labels, numbers = np.array([e.label for e in examples]), np.array(features)
    train = np.array([e.split == "train" for e in examples])
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(numbers[train], labels[train])
    assert balanced_accuracy_score(labels[~train], model.predict(numbers[~train])) < 0.6
