"""Prove that frameworks compute the same model, and prove that the proof can fail.

`plan` says what to compute, `worker` climbs the ladder of `rungs` in one framework, `compare` holds the workers' streams
against each other, `faults` plants porting mistakes. Nothing here knows a framework or an architecture.
"""
