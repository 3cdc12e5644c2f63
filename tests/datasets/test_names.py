"""Names of data sets, their pages, and what is said of a set that is missing, old or misspelt."""

import pytest
from test_prepare import make_folder, run, write

from lungjax import datasets
from lungjax.config import STAGES
from lungjax.data.imaging import lung_masks
from lungjax.datasets import PrepareOptions

NAMES = {
    "covidx_ct": "covidx_ct/3a",
    "covidx_ct/2a-224": "covidx_ct/2a-224",
    "covidx_ct/lungs-96x128": "covidx_ct/3a-lungs-96x128",
    "ct_cov19/lungs_nocrop": "ct_cov19/lungs_nocrop",
    "ct_cov19/original-crop-224": "ct_cov19/crop-224",
    "folder/my-set_2.0": "folder/my-set_2.0",
    "folder/mine-no_lungs": "folder/mine-no_lungs",
    "folder/2020": "folder/2020",
    "folder/default-224": "folder/default-224",
    "folder/default-lungs": "folder/lungs",
    "folder/original-lungs": "folder/original-lungs",
    "phantom_ct/tiny-no_lungs": "phantom_ct/tiny-no_lungs",
}


def test_a_name_holds_configuration_stage_and_size(tmp_path):
    for name, full in NAMES.items():
        parts = datasets.resolve(name)[0]
        assert parts.full == full and datasets.resolve(full)[0] == parts
    assert datasets.resolve("covidx_ct/lungs-96x128")[0] == datasets.DatasetName("covidx_ct", "3a", "lungs", (96, 128))
    with pytest.raises(ValueError, match="unknown configuration 'lung' of ct_cov19; the nearest: lungs"):
        datasets.resolve("ct_cov19/lung")
    for typo in ("folder/mine-lung-64", "folder/a-lungs-crop", "folder/nolung"):
        with pytest.raises(ValueError, match="looks like a stage"):
            datasets.resolve(typo)
    with pytest.raises(ValueError, match="at most 4096 pixels a side"):
        datasets.resolve("folder/mine-99999")
    with pytest.raises(ValueError, match="stages are for axial CT slices, which coronahack has none of"):
        datasets.resolve("coronahack/lungs-224")
    assert lung_masks.STAGES == STAGES


def test_names_that_mean_nothing_and_what_is_missing_are_explained(tmp_path):
    with pytest.raises(ValueError) as error:
        datasets.open_dataset("covidx_ct/2a", tmp_path / "data")
    said = str(error.value)
    for words in (
        "kaggle.com/datasets/hgunraj/covidxct",
        f"python -m lungjax.prepare --dataset=covidx_ct/2a --source=FOLDER --data_dir={tmp_path / 'data'}",
    ):
        assert words in said
    with pytest.raises(ValueError, match="unknown data set 'covidx'; the nearest: covidx_ct"):
        datasets.open_dataset("covidx", tmp_path)
    with pytest.raises(ValueError, match="--source=FOLDER is missing: covidx_ct/3a is made from"):
        datasets.write("covidx_ct", None, tmp_path, PrepareOptions())
    with pytest.raises(ValueError, match="may hold letters"):
        datasets.open_dataset("folder/../x", tmp_path)


def test_a_set_of_an_older_lungjax_is_refused(tmp_path):
    make_folder(tmp_path)
    write(tmp_path)
    new = tmp_path / "data/folder/default/2.0.0"
    new.rename(new.with_name("1.0.0"))
    with pytest.raises(ValueError, match=r"prepared by an older lungjax \(version 1.0.0, this one reads 2.0.0\)"):
        datasets.open_dataset("folder", tmp_path / "data")
    write(tmp_path)
    assert len(datasets.open_dataset("folder", tmp_path / "data").records) == 24


def test_the_salt_of_patient_ids_is_drawn_once_and_never_empty(tmp_path):
    salts = {datasets._salted(PrepareOptions(), tmp_path).salt for _ in range(3)}
    assert len(salts) == 1 and len(salts.pop()) == 32
    assert [p.name for p in tmp_path.iterdir()] == [".patient_salt"]
    assert (tmp_path / ".patient_salt").stat().st_mode & 0o777 == 0o600
    (tmp_path / ".patient_salt").write_text("")
    with pytest.raises(ValueError, match="is empty: without a salt"):
        datasets._salted(PrepareOptions(), tmp_path)


def test_every_data_set_tells_where_to_get_it_and_what_to_cite(tmp_path):
    for name, entry in datasets.DATASETS.items():
        page = datasets.help_text(name)
        for word in ("Where to get it", "What the folder must look like", "Licence", "Cite", "--dataset=" + name):
            assert word in page, name
        expected = datasets.about(name).expected or {}
        assert set(expected) <= set(entry.configs)
    shown = run(tmp_path, "--dataset=ictcf", "--help")
    assert shown.returncode == 0 and shown.stdout.startswith("ictcf: ") and "NiCT" in shown.stdout
    wrong = run(tmp_path, "--dataset=ictfc", "--help")
    assert wrong.returncode and "the nearest: ictcf" in wrong.stderr and "Traceback" not in wrong.stderr
