"""`dpo-dist` with its arguments; at the end the names of all imported modules go to the file that comes first."""

import atexit
import json
import sys
from pathlib import Path


def main() -> None:
    """Run the command."""
    out = Path(sys.argv.pop(1))
    atexit.register(lambda: out.write_text(json.dumps(sorted(sys.modules)), encoding="utf-8"))
    from dpo_dist.cli import main as dpo_dist

    dpo_dist()


if __name__ == "__main__":
    main()
