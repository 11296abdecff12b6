"""What the first person with a GPU runs: `benchmarks/gpu.sh`. It needs a checkout: recorded numbers lie in `tests/`.

__main__.py      the command: all parts in order, gpu.json, gpu.md, the exit code
kit.py           what the parts share: sizes, time, how ranks are started
environment.py   machine, versions, kernels
golden.py        does training equal what was recorded elsewhere?
ceilings.py      what a device can do at best, which every rate stands beside
kernels.py       attention kernels against float64, and their speed
kernels_run.py   the comparison, for the above
throughput.py    speed with and without prompt sharing, and memory against its closed form
observed.py      `dpo-dist train` with an observer, for the above
random_model.py  the model for the above
against_trl.py   speed beside TRL's, if it is installed
trl_run.py       what its ranks run
variants.py      the same with other settings, longer micro-batches, a larger model, where time and memory allow
profiling.py     where the time of one step goes
traced.py        `dpo-dist train` with one step traced, for the above
noise.py         the self-checks of all these runs
bandwidth.py     how fast ranks exchange
clock.py         seconds of a call
page.py          gpu.json as a page
"""
