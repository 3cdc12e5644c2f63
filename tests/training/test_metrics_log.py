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


def test_truncated_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "los')
    assert metrics_log.read(path) == [{"step": 1}]
    assert metrics_log.read(tmp_path / "none.jsonl") == []
