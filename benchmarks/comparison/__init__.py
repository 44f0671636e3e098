"""The parts of benchmarks/transformer.py: what is compared (`setting`), its lanes in each framework, the proof, the rounds, the tables."""
