"""`python -m dpo_dist` with every annotated call checked, for ranks that tests launch: `torchrun -m tests.checked ...`.

pytest's own flag (--jaxtyping-packages) acts in pytest's process only. Not an environment variable: the package would
carry code for its tests. Not a sitecustomize: it would act on torchrun and every other Python process, too.
"""

import runpy

from jaxtyping import install_import_hook

if __name__ == "__main__":
    with install_import_hook("dpo_dist", "beartype.beartype"):
        runpy.run_module("dpo_dist", run_name="__main__", alter_sys=True)
