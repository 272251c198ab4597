"""Speed beside other libraries, each in its own environment; not part of `benchmarks run`."""
