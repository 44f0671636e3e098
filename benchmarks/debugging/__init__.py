"""The parts of benchmarks/shape_bug.py: the bugs (`bugs`), a user's program with each of them in every framework, what is measured."""
