from lungjax.training import metrics_log


def test_repeated_rows_after_a_resume(tmp_path):
    """`truncate` drops the rows after the restored step, and the validation of that step, which was not saved."""
    path = tmp_path / "metrics.jsonl"
    names = ("train.loss", "val.slice.loss", "train.loss", "val.slice.loss", "lr")
    for step, name in zip((10, 10, 20, 20, 30), names, strict=True):
        metrics_log.append(path, {"step": step, name: 0.5})
    remaining = metrics_log.truncate(path, 20, 10)
    assert [tuple(row)[1] for row in remaining] == ["train.loss", "val.slice.loss", "train.loss"]
    metrics_log.append(path, {"step": 30, "lr": 1.0})
    assert [row["step"] for row in metrics_log.read(path)] == [10, 10, 20, 30]


def test_truncated_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics_log.append(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "los')
    assert metrics_log.read(path) == [{"step": 1}]
    assert metrics_log.read(tmp_path / "none.jsonl") == []
