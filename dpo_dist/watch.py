"""Who does not answer: a run in which nothing moves any more ends, and says why.

Ranks wait for each other in collectives, and one that hangs makes all of them hang. A thread of each rank looks at what
the rank has reached (`phases`). Where that has not changed for too long it writes down where every thread stands, waits
for the other ranks to do the same, and names those that have got less far, or did not even do that.
"""

import faulthandler
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from dpo_dist.distributed import Ranks, barrier
from dpo_dist.flight_recorder import last_collectives, without_waiting, write_trace
from dpo_dist.peers import is_peer_lost
from dpo_dist.phases import Place, place, reach

FOLDER, TRACES = "hang", "nccl-"
_COLLECTIVES = ("torch/distributed/distributed_c10d.py", "deepspeed/comm/comm.py")
_GRACE = 30.0  # seconds that the ranks have to write their reports after the first one, at most


@contextmanager
def watching(folder: Path, ranks: Ranks, seconds: int, leave: Callable[[str], NoReturn]) -> Iterator[None]:
    """Inside, no phase may take longer than so many seconds.

    Args:
        folder: of the run; every rank writes `hang/rank-00000.txt` into it.
        ranks: where this process stands.
        seconds: `parallel.ddp_timeout`.
        leave: ends this process at once, from any thread, with a message.
    """
    if ranks.is_first:
        shutil.rmtree(folder / FOLDER, ignore_errors=True)  # of an earlier start
    barrier()  # or another rank would take it for one of this start
    reach("watched")
    watch = _Watch(folder / FOLDER, ranks, seconds, leave)
    watch.start()
    try:
        yield
    except Exception as error:
        # A collective may have run out of time a moment before the thread looks.
        if is_peer_lost(error) and watch.idle() > 0.8 * seconds:
            watch.give_up()
        raise
    finally:
        watch.over.set()
    watch.join()


class _Watch(threading.Thread):
    def __init__(self, folder: Path, ranks: Ranks, seconds: int, leave: Callable[[str], NoReturn]) -> None:
        super().__init__(name="watch", daemon=True)
        self.over = threading.Event()
        self._folder, self._ranks, self._seconds, self._leave = folder, ranks, seconds, leave
        # A little before collectives run out of time: where each rank stands is then still to be seen.
        self._patience = seconds - min(5.0, seconds / 10)
        self._between_looks = min(5.0, seconds / 10)
        self._awake_since = 0.0
        self._giving_up = threading.Lock()

    def run(self) -> None:
        while not self._waited():
            if self.idle() >= self._patience:
                self.give_up()
            if self._folder.is_dir():  # another rank gives up
                self._report()

    def _waited(self) -> bool:
        """Whether it is over, after a while."""
        began = time.monotonic()
        is_over = self.over.wait(min(max(self._patience - self.idle(), 0.1), self._between_looks))
        if (now := time.monotonic()) - began > 2 * self._between_looks:
            self._awake_since = now  # the process was suspended, and so was everything that it waits for
        return is_over

    def idle(self) -> float:
        """Seconds since this rank has reached anything."""
        return time.monotonic() - max(place().since, self._awake_since)

    def give_up(self) -> NoReturn:
        """Report, wait for the others' reports, and end this process."""
        with self._giving_up:  # never given back: the process ends inside
            here, found = place(), dict[int, dict[str, Any]]()
            # In a thread of its own: a file system that hangs must not keep the run from ending.
            looking = threading.Thread(target=self._look_around, args=(found,), daemon=True)
            looking.start()
            looking.join(2 * _GRACE)
            self._leave(self._verdict(here, dict(found)))

    def _look_around(self, found: dict[int, dict[str, Any]]) -> None:
        self._report()
        self._gather(found)
        if found and self._ranks.rank > min(found):
            time.sleep(5.0)  # one says it for all

    def _report(self) -> None:
        """Write down where this rank stands, once."""
        path = self._folder / f"rank-{self._ranks.rank:05d}.txt"
        here, began = place(), path.with_suffix(".tmp")
        on_gpu = self._ranks.device.type == "cuda"
        begun, last = without_waiting(lambda: last_collectives(on_gpu), (0, list[str]()))
        # Of a GPU's waiting nothing is to be seen here.
        waits = on_gpu or _is_in_collective()
        values = {"step": here.step, "phase": here.phase, "count": here.count, "begun": begun, "waits": waits}
        with suppress(OSError):  # nor must a full disk
            self._folder.mkdir(exist_ok=True)
            if path.exists():
                return
            with began.open("w") as file:
                file.write(json.dumps(values) + "\n\n")
                file.flush()  # the traceback goes past Python's buffer
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\nThe last collectives of this rank, the newest last:\n" + "".join(last))
            began.replace(path)
        if on_gpu:
            without_waiting(lambda: write_trace(self._folder / f"{TRACES}{self._ranks.rank}"), None)

    def _gather(self, found: dict[int, dict[str, Any]]) -> None:
        """What every rank has written down, of those that do so in time."""
        end = time.monotonic() + min(_GRACE, self._seconds)
        while len(found) < self._ranks.world_size and time.monotonic() < end:
            for path in self._folder.glob("rank-*.txt"):
                with suppress(OSError, ValueError):
                    values = json.loads(path.read_text(encoding="utf-8").partition("\n")[0])
                    found[int(path.stem.removeprefix("rank-"))] = values
            time.sleep(0.2)

    def _verdict(self, here: Place, found: dict[int, dict[str, Any]]) -> str:
        silent = sorted(set(range(self._ranks.world_size)) - found.keys() - {self._ranks.rank})
        furthest = max((there["count"] for there in found.values()), default=0)
        most = max((there["begun"] for there in found.values()), default=0)
        # Of those that have got equally far, who has begun a collective waits for one who has not; and so does who is
        # in one.
        behind = (
            sorted(rank for rank, there in found.items() if there["count"] < furthest)
            or sorted(rank for rank, there in found.items() if there["begun"] < most)
            or sorted(rank for rank, there in found.items() if not there["waits"])
        )
        stacks = f"see {self._folder}/rank-*.txt for where each rank stands"
        if silent:
            who = f"{_named(silent)} not answer: stopped, or its machine is gone"
        elif len(behind) not in (0, len(found)):
            there = found[behind[0]]
            who = f"{_named(behind)} not get any further than step {there['step']}, {there['phase']}"
        else:
            who = "all ranks stand at the same place: look at the network between them"
        return (
            f"nothing has moved for parallel.ddp_timeout={self._seconds} seconds at step {here.step}, {here.phase}: "
            f"{who}; {stacks}; what was saved before is intact"
        )


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown} does" if len(ranks) == 1 else f"ranks {shown} do"


def _is_in_collective() -> bool:
    for frame in sys._current_frames().values():
        at: FrameType | None = frame
        while at is not None:
            if at.f_code.co_filename.endswith(_COLLECTIVES):
                return True
            at = at.f_back
    return False
