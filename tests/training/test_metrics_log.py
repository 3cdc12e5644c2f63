from lungjax.training import metrics_log


def test_rewind_drops_later_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (10, 20, 30):
        metrics_log.append(path, {"step": step, "loss": 1 / step})
    assert [row["step"] for row in metrics_log.rewind(path, 20)] == [10, 20]
    metrics_log.append(path, {"step": 30, "loss": 0.5})
    assert [row["loss"] for row in metrics_log.read(path)] == [0.1, 0.05, 0.5]


def test_truncated_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics_log.append(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "los')
    assert metrics_log.read(path) == [{"step": 1}]
    assert metrics_log.read(tmp_path / "none.jsonl") == []
