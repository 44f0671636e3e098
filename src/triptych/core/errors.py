"""Errors with an exit code: what was given, what is allowed, what to do."""

from __future__ import annotations


class TriptychError(Exception):
    """An error meant for the user; the command line prints its message, without a traceback, and exits with `exit_code`."""

    exit_code = 1


class UsageError(TriptychError):
    """A name, option or combination that does not exist."""

    exit_code = 2


class FrameworkMissing(TriptychError):
    """A framework is not installed; the message is the exact pip line."""

    exit_code = 3


class ParityFailed(TriptychError):
    """The ladder found a divergence."""

    exit_code = 4


class ExportFailed(TriptychError):
    """An exported model does not compute what its source does; nothing was left under its name."""

    exit_code = 7


class InputRefused(TriptychError):
    """A file was refused: damaged, unsafe, or not what the command takes."""

    exit_code = 8


class Interrupted(TriptychError):
    """A training run was asked to stop; the step was finished and the state saved."""

    exit_code = 9


class StorageError(TriptychError):
    """Writing failed: disk full, read-only, or the directory exists already."""

    exit_code = 10


class LaneMissing(UsageError):
    """A lane of a benchmark that a framework, a model or this machine does not have."""


class TooNoisy(TriptychError):
    """The measurements do not allow an answer."""

    exit_code = 5


class Regression(TriptychError):
    """Something became slower than it was."""

    exit_code = 6
