"""Lines with their positions in a file, and groups from file names."""

import pytest

from lungjax.datasets import source_files as files


def test_lines(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("file\n\nb\n")
    assert files.read_lines(path) == [("t.csv line 1", "file"), ("t.csv line 3", "b")]
    for text, word in ((b"\n \n", "empty"), (b"file\n\xff\xfe\n", "UTF-8")):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=word):
            files.read_lines(path)


def test_blocks():
    blocks = {"neg_81": "neg_block2", "neg_119": "neg_block2", "neg_120": "neg_block3", "IM7x": "IMblock0", "x": "x"}
    assert {stem: files.block(stem) for stem in blocks} == blocks


def test_web_cases():
    cases = {
        "SARS-10.1148rg.242035193-g04mr34g09c-Fig9c-day27": "SARS-10.1148rg.242035193",
        "1-s2.0-S1684118220300682-main.pdf-003-b2": "1-s2.0-S1684118220300682",
        "kjr-21-e24-g003-l-a": "kjr-21-e24",
        "41591_2020_819_Fig1_HTML.webp-day5": "41591_2020_819",
        "nejmoa2001191_f1-PA": "nejmoa2001191",
        "auntminnie-d-2020_01_28_23_51_6665": "auntminnie-2020_01_28_23_51_6665",
        "covid-19-pneumonia-58-day-9": "covid-19-pneumonia-58",  # 58 is the number of a case, not of a figure
        "covid-19-rapidly-progressive-acute-ards-day-1": "covid-19-rapidly-progressive-acute-ards",
        "covid-19-pneumonia-rapidly-progressive-12-hours": "covid-19-pneumonia-rapidly-progressive",
        "88de9d8c39e946abd495b37cd07d89e5-0666-0": "88de9d8c39e946abd495b37cd07d89e5",
        "01E392EE-69F9-4E33-BFCE-E5C968654078": "01E392EE-69F9-4E33-BFCE-E5C968654078",
    }
    assert {stem: files.web_case(stem) for stem in cases} == cases
