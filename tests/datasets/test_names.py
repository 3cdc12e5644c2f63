"""Names of data sets, their help pages, and errors for missing and misspelled ones."""

import commands
import pytest

from lungjax import datasets, prepare
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
    "folder/2020": "folder/2020",
    "folder/default-224": "folder/default-224",
    "folder/default-lungs": "folder/lungs",
    "folder/original-lungs": "folder/original-lungs",
}
BAD_NAMES = {
    "covidx": "did you mean covidx_ct",
    "ct_cov19/lung": "'lung' of ct_cov19.*did you mean lungs",
    "phantom_ct/tine": "did you mean tiny",
    "folder/mine-lung-64": "stage",
    "folder/a-lungs-crop": "stage",
    "folder/mine-99999": "4096",
    "coronahack/lungs-224": "axial",
    "folder/../x": "letters",
}


def test_names():
    for name, full in NAMES.items():
        parts = datasets.resolve(name)[0]
        assert parts.full == full and datasets.resolve(full)[0] == parts
    assert datasets.resolve("covidx_ct/lungs-96x128")[0] == datasets.DatasetName("covidx_ct", "3a", "lungs", (96, 128))
    for name, word in BAD_NAMES.items():
        with pytest.raises(ValueError, match=word):
            datasets.resolve(name)
    assert lung_masks.STAGES == STAGES


def test_missing_data_set(tmp_path):
    command = f"python -m lungjax.prepare --dataset=covidx_ct/2a --source=FOLDER --data_dir={tmp_path}"
    with pytest.raises(ValueError, match=f"kaggle.com/datasets/hgunraj/covidxct.*{command}"):
        datasets.open_dataset("covidx_ct/2a", tmp_path)
    for source, word in ((None, "--source=FOLDER is missing"), (tmp_path / "none", "not a folder")):
        with pytest.raises(ValueError, match=word):
            datasets.write("covidx_ct", source, tmp_path, PrepareOptions())
    with pytest.raises(ValueError, match="--source"):
        datasets.write("phantom_ct/tiny", tmp_path, tmp_path / "data", PrepareOptions())


def test_help_pages(capsys, monkeypatch):
    for name, entry in datasets.DATASETS.items():
        page = datasets.help_text(name)
        for word in ("Where to get it", "Required folder", "License", "Citation", "--dataset=" + name):
            assert word in page, name
        assert set(datasets.about(name).expected) <= set(entry.configs)
    monkeypatch.setattr("sys.argv", ["prepare", "--dataset=ictcf", "--help"])
    prepare.run()
    text = capsys.readouterr().out
    assert text.startswith("ictcf: ") and "NiCT" in text
    assert commands.run(prepare, "--dataset=ictfc") == 2 and "did you mean ictcf" in capsys.readouterr().err
