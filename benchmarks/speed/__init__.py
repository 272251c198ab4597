"""Speed beside other libraries, each in its own environment; not part of `benchmarks run`, and kept in `runs/speed`."""
