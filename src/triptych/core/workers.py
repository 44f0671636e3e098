"""Worker processes, one framework each: started here as children, or by a host in a container (`core/hosts.py`). Standard library only."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO

from triptych.core import contract, environment, hosts
from triptych.core.errors import UsageError
from triptych.core.hosts import Hosted

Process = subprocess.Popen[bytes] | Hosted
MODULES = ("triptych.parity.worker", "triptych.training.worker", "triptych.bench.worker", "triptych.export.worker")
"""The workers there are; a host starts nothing else."""


def available() -> list[str]:
    """The frameworks whose workers can be started: those that a host has, and those installed here.

    Raises UsageError for a host whose code is not ours: what is proven would not be what is timed. TriptychError when one is silent.
    """
    for name in hosts.table():
        contract.framework(name)
        _check_code(name)
    installed = contract.installed()
    return [name for name in contract.FRAMEWORKS if name in hosts.table() or name in installed]


@functools.cache
def _check_code(name: str) -> None:
    if hosts.hello(name)["code_sha256"] != environment.code_hash():
        raise UsageError(f"the host of {name} has other code than this process; build all images from one checkout")


def check_available(name: str) -> None:
    """FrameworkMissing, with the pip line, unless a worker of this framework can be started; UsageError for an unknown name."""
    if contract.framework(name).name not in available():
        contract.check_installed(name)


def command(module: str, arguments: Sequence[str]) -> list[str]:
    """The command line of a worker. `-P`: never import from the working directory."""
    return [sys.executable, "-P", "-m", module, *arguments]


def start(
    module: str, framework: str, arguments: Sequence[str], *, settings: Mapping[str, str], log: IO[bytes], stdin: bool = False,
    stdout: bool = False, cores: Sequence[int] = (),
) -> Process:  # fmt: skip
    """Start `python -m module arguments` for a framework, with `settings` on top of the environment there.

    With `stdin` and `stdout` these are pipes to us; without, nothing and the `log`, which takes what it says on stderr as well.
    `cores` binds it; without, it runs where the calling thread may. Raises TriptychError when a host cannot be reached.
    """
    if framework in hosts.table():
        bound = cores or sorted(os.sched_getaffinity(0))
        return hosts.start(module, framework, arguments, settings=settings, log=log, stdin=stdin, stdout=stdout, cores=bound)
    return start_here(command(module, arguments), settings=settings, log=log, stdin=stdin, stdout=stdout, cores=cores)


def start_here(
    line: Sequence[str], *, settings: Mapping[str, str], log: IO[bytes], stdin: bool = False, stdout: bool = False,
    cores: Sequence[int] = (),
) -> subprocess.Popen[bytes]:  # fmt: skip
    """Start a command line as a child of this process, as `start` does."""
    return subprocess.Popen(
        line, stdin=subprocess.PIPE if stdin else subprocess.DEVNULL, stdout=subprocess.PIPE if stdout else log, stderr=log,
        env=environment.inherited() | dict(settings), preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
    )  # fmt: skip
