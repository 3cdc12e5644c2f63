"""Image folders and CSV files provided by users."""

import os

import pytest

from lungjax.data import safe_text
from lungjax.data.csv_table import read_table
from lungjax.data.folder_walk import check_regular, list_files


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_list_files(tmp_path):
    touch(tmp_path / "in", "b.png", "a/c.JPG", "a.png", "__MACOSX/d.png", ".e.png", ".git/f.png")
    touch(tmp_path, "elsewhere/g.png")
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/missing.png").symlink_to(tmp_path / "nothing.png")
    assert list_files(tmp_path / "in") == ["a.png", "a/c.JPG", "b.png", "linked/g.png", "missing.png"]


def test_list_files_loop_and_unreadable_folder(tmp_path, monkeypatch):
    touch(tmp_path, "in/a.png", "in/closed/b.png")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    scandir = os.scandir

    def refuse(path):  # root, as in containers, may read a folder of any mode
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    errors = {}
    assert list_files(tmp_path / "in", lambda path, reason: errors.update({path: reason})) == ["a.png"]
    first_words = {path.rpartition("/")[2]: reason.split()[0] for path, reason in errors.items()}
    assert first_words == {"loop": "a", "closed": "Permission"}
    with pytest.raises(ValueError, match="in/"):
        list_files(tmp_path / "in")


def test_special_files(tmp_path):
    touch(tmp_path, "in/a.png")
    os.mkfifo(tmp_path / "in/pipe.png")
    (tmp_path / "in/zero.png").symlink_to("/dev/zero")
    errors = {}
    assert list_files(tmp_path / "in", lambda path, reason: errors.update({path: reason})) == ["a.png"]
    assert len(errors) == 2 and all(reason.startswith("a device") for reason in errors.values())
    for path in (tmp_path / "in/pipe.png", tmp_path / "in/zero.png"):
        for read in (check_regular, read_table):
            with pytest.raises(ValueError, match="device"):
                read(path)
    assert check_regular(tmp_path / "in/a.png").st_size == 0


def test_links_between_folders(tmp_path):
    """Links to one another would list each file once per path through them."""
    for name in "abcdefg":
        touch(tmp_path, f"{name}/x.png")
        for number in (1, 2):
            (tmp_path / name / f"up{number}").symlink_to("..")
    errors = {}
    files = list_files(tmp_path / "a", lambda path, reason: errors.update({path: reason}))
    assert files == [f"up1/{name}/x.png" for name in "bcdefg"] + ["x.png"]
    assert all("listed already" in reason for reason in errors.values()) and len(errors) == 14


def test_safe_text():
    given = ["=1+1", "'=1+1", "-a", "+a", "@a", "-0.5", "-inf", "+1e-05", "it's", "'x", "", "a=b", -0.5, None]
    cells = safe_text.csv_row(given)
    assert cells[:5] == [f"'{text}" for text in given[:5]] and cells[5:] == given[5:]
    assert [safe_text.csv_text(cell) for cell in cells[:-2]] == given[:-2]
    assert safe_text.csv_row(["\t=a\rb"]) == ["\\t=a\\rb"]
    assert safe_text.printable("a\rb\x1b\nc\u202eä", keep="\n") == "a\\rb\\x1b\nc\\u202eä"
    assert safe_text.cut("a" + "ü" * 120) == "a" + "ü" * 99  # complete characters of 200 bytes


def test_read_table(tmp_path):
    path = tmp_path / "t.csv"
    for text in (
        'path,label\n a.png , x \n\n"b,c.png",\n',
        '\ufeffpath;label\r\na.png;x\r\n;\r\n"b,c.png";\r\n',
        "path\tlabel\na.png\tx\nb,c.png\t\n",
    ):
        path.write_text(text, "utf-8")
        table = read_table(path, ("path", "label"))
        assert table.columns == ("path", "label")
        assert [row for _, row in table.rows] == [{"path": "a.png", "label": "x"}, {"path": "b,c.png", "label": ""}]
        assert {place for place, _ in table.rows} <= {f"t.csv line {number}" for number in (2, 3, 4)}
    path.write_text("path\na,b\n")
    with pytest.raises(ValueError, match="line 2"):
        read_table(path)


def test_read_table_errors(tmp_path):
    path = tmp_path / "t.csv"
    for text, word in (
        (b"name,label\na,1\n", "path is missing"),
        (b"path,path\na,1\n", "twice"),
        (b"path,label\na,1\nb\n", "line 3"),
        (b'path,label\n"a"b,1\n', "line 2"),
        (b'path\n"' + b"x" * 200_000, "line 2"),
        (b"path\n\xff\xfe\n", "UTF-8"),
        (b"", "path is missing"),
        (b"path\n\n", "no rows"),
    ):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=word):
            read_table(path, ("path",))
