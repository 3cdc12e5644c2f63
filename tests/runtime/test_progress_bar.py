import io
import sys

import pytest
from tqdm import tqdm

from lungjax.runtime.progress_bar import progress_bar


@pytest.mark.parametrize("terminal", [True, False])
def test_bar_in_a_terminal_and_lines_in_a_log_file(terminal, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(desc="demo", total=400, mininterval=0, miniters=1) as bar:
        for _ in range(400):
            bar.update()
            bar.set_postfix_str("loss 0.5", refresh=False)
            tqdm.write("a message")
    list(progress_bar(range(9), leave=False))
    progress_bar(desc="fold 0 of 5", total=9, initial=1, leave=False).close()
    text = stream.getvalue()
    lines = text.splitlines()
    assert (text.count("\r") > 400) if terminal else ("\r" not in text and len(lines) == 2)  # within 15 seconds
    assert "fold 0 of 5: 1 of 9" in text or terminal
    assert terminal or (lines[0].startswith("demo: 400 of 400, ") and lines[0].endswith(", loss 0.5"))
