"""Runs a script with every annotated call of the package checked: `python -m tests.checked_script FILE [ARGUMENT ...]`.

The same as `checked.py`, for ranks whose work is a function of a test file.
"""

import runpy
import sys

from jaxtyping import install_import_hook

if __name__ == "__main__":
    del sys.argv[0]
    with install_import_hook("dpo_dist", "beartype.beartype"):
        runpy.run_path(sys.argv[0], run_name="__main__")
