"""Results for people: the benchmark report and its pages; runs and benchmarks compared."""
