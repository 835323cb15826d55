"""One command that measures all that a device can tell, most important first, resumable.

``python -m benchmarks.device --out DIR [--quick] [--device cpu|cuda]``. Each step has a process, a
time limit and a JSON file of its own; the page is made anew after each, so that a cut after any
minute leaves what was measured.
"""
