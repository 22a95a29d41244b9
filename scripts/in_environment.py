"""Imported first by the scripts in Python: they run in ``.venv``, as scripts/test does.

With torch at hand nothing happens: the Python that was called has what is needed. Otherwise
``scripts/environment`` makes ``.venv`` or finds it, and its Python starts the script again.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
# The repository's own package, whatever is installed.
sys.path.insert(0, str(_FOLDER.parent))

if importlib.util.find_spec("torch") is None:
    shell = f'extras=test; . "{_FOLDER}/environment" >&2; printf %s "$venv"'
    made = subprocess.run(["bash", "-c", shell], stdout=subprocess.PIPE, text=True)
    if made.returncode:
        sys.exit(made.returncode)
    python = f"{made.stdout}/bin/python"
    os.execv(python, [python, *sys.argv])
