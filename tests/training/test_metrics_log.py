import json

from lungjax.training import metrics_log


def test_repeated_rows_after_a_resume(tmp_path):
    """`truncate` drops the rows after the restored step, and the validation of that step, which was not saved."""
    path = tmp_path / "metrics.jsonl"
    names = ("train.loss", "val.slice.loss", "train.loss", "val.slice.loss", "lr")
    rows = [{"step": step, name: 0.5} for step, name in zip((10, 10, 20, 20, 30), names, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    remaining = metrics_log.truncate(path, 20, 10)
    assert [tuple(row)[1] for row in remaining] == ["train.loss", "val.slice.loss", "train.loss"]
    assert metrics_log.read(path) == remaining


def test_damaged_lines(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    bad = (b"\xff\xfe", b"[1]", b'{"lr": 0.1}', b'{"step": "2"}', b'{"step": 2, "lr": "x"}', bytes(8), b"[" * 99999)
    good = [{"step": 1, "train.loss": float("inf")}, {"step": 2, "val.slice.auc_macro": None}]
    lines = [json.dumps(good[0]).encode(), *bad, json.dumps(good[1]).encode(), b'{"step": 3, "los']
    path.write_bytes(b"\n".join(lines))
    assert metrics_log.read(path) == metrics_log.read(path) == good
    assert capsys.readouterr().out.count(f"{path}: skipped {len(bad) + 1} damaged lines") == 1
    assert metrics_log.truncate(path, 9, 9) == metrics_log.read(path) == good
    assert metrics_log.read(tmp_path / "none.jsonl") == []
