"""Benchmarks: proven models only, one process a framework, interleaved turns, intervals of paired ratios."""
