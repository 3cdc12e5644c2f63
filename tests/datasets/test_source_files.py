"""Files found in any letter case, tables that are wrong, and groups by file name."""

import pytest

from lungjax.datasets import source_files as files


def test_find_ignores_letter_case_and_pictures_skips_the_hidden(tmp_path):
    for name in ("a.png", "x/B.JPG", "__MACOSX/c.png", ".d.png", "notes.txt"):
        (tmp_path / "Train/COV" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "Train/COV" / name).touch()
    folder = files.find(tmp_path, ("nothing/", "train/cov/"), "folder")
    assert files.pictures(folder) == ["a.png", "x/B.JPG"]
    with pytest.raises(ValueError, match=r"no list; looked for train$"):
        files.find(tmp_path, ("train",), "list")  # a folder is no file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,label\na,1\n", "line 1: no column file; "),
        ("file,file\na,1\n", "column file is there twice"),
        ("file,label\na,1\nb\n", "line 3: 1 values, but the header has 2 columns"),
        ('file,label\n"a"b,1\n', "line 2: "),
        ("file,label\n\n", "has no row"),
    ],
)
def test_tables_are_checked(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        files.table(tmp_path / "t.csv", ("file",))


def test_table_and_list_that_are_no_text(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"file\n\xff\xfe\n")
    for read in (lambda path: files.table(path, ("file",)), files.lines):
        with pytest.raises(ValueError, match="not UTF-8"):
            read(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("stem", "made"),
    [("neg_81", "neg_block2"), ("neg_119", "neg_block2"), ("neg_120", "neg_block3"), ("IM7x", "IMblock0"), ("x", "x")],
)
def test_blocks(stem, made):
    assert files.block(stem) == made


@pytest.mark.parametrize(
    ("stem", "case"),
    [
        ("SARS-10.1148rg.242035193-g04mr34g09c-Fig9c-day27", "SARS-10.1148rg.242035193"),
        ("1-s2.0-S1684118220300682-main.pdf-003-b2", "1-s2.0-S1684118220300682"),
        ("kjr-21-e24-g003-l-a", "kjr-21-e24"),
        ("41591_2020_819_Fig1_HTML.webp-day5", "41591_2020_819"),
        ("nejmoa2001191_f1-PA", "nejmoa2001191"),
        ("auntminnie-d-2020_01_28_23_51_6665", "auntminnie-2020_01_28_23_51_6665"),
        ("covid-19-pneumonia-58-day-9", "covid-19-pneumonia-58"),
        ("covid-19-pneumonia-12", "covid-19-pneumonia-12"),  # a case's number, not a figure's
        ("covid-19-rapidly-progressive-acute-ards-day-1", "covid-19-rapidly-progressive-acute-ards"),
        ("covid-19-pneumonia-rapidly-progressive-12-hours", "covid-19-pneumonia-rapidly-progressive"),
        ("88de9d8c39e946abd495b37cd07d89e5-0666-0", "88de9d8c39e946abd495b37cd07d89e5"),
        ("01E392EE-69F9-4E33-BFCE-E5C968654078", "01E392EE-69F9-4E33-BFCE-E5C968654078"),
    ],
)
def test_case_or_paper_of_a_file_name(stem, case):
    assert files.web_case(stem) == case
