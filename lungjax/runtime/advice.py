"""Commands in messages, in the form in which the user started lungjax: `./run.sh predict` or `python -m ...`."""

import os
import re
import shlex

VARIABLE = "LUNGJAX_RUN_SH"  # set by run.sh to its own path


def in_user_form(text: str) -> str:
    """Returns `text` with `python -m lungjax.NAME` and `pip install` commands in the form of run.sh, if it is used."""
    script = os.environ.get(VARIABLE)
    if not script:
        return text
    folder, script = shlex.quote(os.path.dirname(script)), shlex.quote(script)
    for pattern, command in (
        (r"python -m lungjax\.main\b", script),
        (r"python -m lungjax\.(?=\w)", f"{script} "),
        (r"\bpip install ", f"{folder}/.venv/bin/python -m pip install "),
        (r"(?<=install -e )'\.(?=\[)", f"{folder}'"),  # the shell joins FOLDER'[dicom]'
    ):
        text = re.sub(pattern, command.replace("\\", "\\\\"), text)
    return text
