"""A rank of `dpo-dist doctor --distributed` that may differ from the others: `-m tests.doctor_worker RANKS`.

RANKS is a JSON list with an object for each rank; every key may be missing: `arguments` of the command, `environment`
to add, `folder` to work in, `packages` (a folder that is looked through for packages first), `fault`: `kill` and `hang`
strike when the rank begins to compare clocks, `late` keeps it from meeting the others, `sum` makes its sums wrong.
`grace` is the seconds that the backend has to say by itself that nobody answers, `longest_wait` those for a file.
"""

import json
import os
import signal
import sys
import time
from unittest.mock import patch

from dpo_dist.cli import main


def sleep_away() -> None:
    """Longer than the others wait, and then end without a word."""
    time.sleep(6)
    os._exit(2)


if __name__ == "__main__":
    own = json.loads(sys.argv[1])[int(os.environ.get("RANK", "0"))]
    os.environ.update(own.get("environment", {}))
    os.chdir(own.get("folder", "."))
    if "packages" in own:
        sys.path.insert(0, own["packages"])

    import torch

    from dpo_dist.cli.doctor import meeting, traffic, waiting

    fault = own.get("fault")
    if fault == "late":
        sleep_away()
    if fault == "hang":
        patch.object(meeting, "time_barriers", sleep_away).start()
    if fault == "kill":
        patch.object(meeting, "time_barriers", lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    if fault == "sum":
        reduce = torch.distributed.all_reduce
        wrong = patch.object(traffic.dist, "all_reduce", lambda tensor: (reduce(tensor), tensor.add_(len(tensor) > 1)))
        wrong.start()
    meeting.LONGEST_WAIT = own.get("longest_wait", meeting.LONGEST_WAIT)
    waiting.GRACE = own.get("grace", waiting.GRACE)
    sys.argv[1:] = ["doctor", "--distributed", *own["arguments"]]
    main()
