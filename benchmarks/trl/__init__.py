"""Ours and TRL's DPOTrainer on the same model and pairs: python -m benchmarks.trl --help

memory.py        the most memory a process has held
operations.py    the operations that the work asks for, in closed form
inputs.py        the examples, from a file or with random tokens
variants.py      what is run: ours and TRL, with switches
launches.py      one fresh process after another
our_run.py       `dpo-dist train`, observed; with parts of it switched off
their_run.py     TRL; needs nothing of ours, for it may run in another environment
matrix_peak.py   the fastest float32 matrix product of the machine
judging.py       equal losses first; then medians and ratios
page.py          the page of a report
chart.py         bars, as SVG
"""
