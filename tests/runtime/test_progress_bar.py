"""Progress with and without a terminal."""

import io
import sys

from tqdm import tqdm

from lungjax.runtime import progress_bar
from lungjax.runtime.progress_bar import ProgressBar


def run(monkeypatch, terminal, seconds=0.0, **options):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(progress_bar, "SECONDS", seconds)
    with ProgressBar(desc="demo", total=400, mininterval=0, miniters=1, **options) as bar:
        for step in range(400):
            bar.update()
            bar.set_postfix_str("loss 0.5")
            if step == 9:
                tqdm.write("a message")
    return stream.getvalue()


def test_log_file_has_one_line_per_interval(monkeypatch):
    lines = run(monkeypatch, False, 9).splitlines()  # faster than nine seconds
    assert len(lines) == 2 and lines[0] == "a message"
    assert lines[1].startswith("demo: 400 of 400, ") and lines[1].endswith("loss 0.5")
    text = run(monkeypatch, False, 0)
    assert "\r" not in text and "demo: 7 of 400" in text
    assert run(monkeypatch, False, 9, leave=False) == "a message\n"


def test_terminal_has_a_bar(monkeypatch):
    assert run(monkeypatch, True).count("\r") > 100
