import subprocess
import sys

import pytest

RUN = """import json
from lungjax import cli
from lungjax.config import overrides
def main(argv):
    {body}
cli.run(main, lambda: None)"""


@pytest.mark.parametrize(
    ("body", "code", "words", "traceback"),
    [
        ("overrides.parse('x', int, 'train.steps')", 2, "lungjax: train.steps=x: expected int", False),
        ("open('/nowhere/at/all')", 2, "No such file", False),
        ("raise KeyboardInterrupt", 130, "give the same command again", False),
        ("json.loads('{')", 1, "JSONDecodeError", True),  # a library's ValueError is a bug of ours
    ],
)
def test_a_mistake_is_a_message_and_a_bug_is_a_traceback(body, code, words, traceback):
    command = [sys.executable, "-c", RUN.format(body=body)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == code
    assert words in result.stderr
    assert ("Traceback" in result.stderr) is traceback


def test_the_traceback_flag_shows_where_a_message_came_from():
    command = [sys.executable, "-c", RUN.format(body="overrides.parse('x', int, 'train.steps')"), "--traceback"]
    assert "overrides.py" in subprocess.run(command, capture_output=True, text=True).stderr
