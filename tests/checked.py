"""A module as a program, with every annotated call of the package checked: `-m tests.checked MODULE [ARGUMENT ...]`.

pytest's own flag (--jaxtyping-packages) acts in pytest's process only. Not an environment variable: the package would
carry code for its tests. Not a sitecustomize: it would act on torchrun and every other Python process, too.

The package then takes many times as long to import. So one launch of 1 and one of 2 ranks go through it, those with the
most settings (`tests/invariance/conftest.py`); others start their module itself.
"""

import runpy
import sys

from jaxtyping import install_import_hook

if __name__ == "__main__":
    del sys.argv[0]
    with install_import_hook("dpo_dist", "beartype.beartype"):
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
