"""Published figures, made again: one file a figure. `python -m benchmarks list | run NAME … | report`.

A benchmark is a file `benchmarks/NAME.py` whose docstring says in one line what it shows, with one function:

    from benchmarks._record import Paper, Result, benchmark

    @benchmark
    def run(size, seed, context):
        items = [context.once(f"split-{i}", lambda i=i: one_split(i)) for i in context.progress(range(10), "splits")]
        context.save_figure(plot(items), "poisons")
        return Result(
            figures={"error_clean": ..., "error_poisoned": ...},
            paper={"error_poisoned": Paper(0.5, "Fig. 7")},
            reductions=["10 splits in place of 100"],
        )

`once` stores a finished item beside the record, so that an interrupted run goes on where it stopped.
"""

import time

STARTED = time.perf_counter()  # the process's start, but for the interpreter's own few hundredths of a second
