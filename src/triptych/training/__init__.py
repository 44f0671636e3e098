"""Training runs: one framework-neutral loop around a room's native pipeline and native step.

`job` says what to train, `loop` trains it in this process, `worker` is the process of one framework. The recipe, the order of
the samples and the learning rate come from `core`, so that every framework sees the same batches at the same rates.
"""
