"""A worker process that stays alive: a line of JSON for each thing asked, one for each answer. Standard library only."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait as readable  # not select, which knows no file descriptor above 1,023
from pathlib import Path
from typing import IO, Any, Protocol

from triptych.core import workers
from triptych.core.environment import usable_cores
from triptych.core.errors import TriptychError


class Failed(TriptychError):
    """What a worker raised, or that it ended; `kind` is the name of the error."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.message = kind, message


class Asked(Protocol):
    """A worker, here or in a process of its own."""

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        """`worker.Worker.ask`."""
        ...


class Process:
    """A worker in a process of its own: `python -m module framework`, or what `command` runs.

    `ask` raises Failed for whatever went wrong there; a process that ended stays ended.
    """

    def __init__(
        self, framework: str, log: Path, settings: dict[str, str], cores: list[int], limit_seconds: float, command: Sequence[str] = (),
        module: str = "triptych.bench.worker",
    ) -> None:  # fmt: skip
        self.framework, self.log, self.limit = framework, log, limit_seconds
        with log.open("wb") as errors:
            if command:
                self._process: workers.Process = workers.start_here(
                    command, settings=settings, log=errors, stdin=True, stdout=True, cores=cores
                )
            else:
                self._process = workers.start(
                    module, framework, [framework], settings=settings, log=errors, stdin=True, stdout=True, cores=cores
                )

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        """Ask, and wait for the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **given}).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise self._ended() from None
        if not readable([self._process.stdout.fileno()], self.limit):
            self._process.kill()
            self._process.wait()
            raise Failed("TimeoutError", f"no answer within {self.limit:g} s: a suite's limit_seconds allows more")
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(**answer["error"])
        return answer

    def _ended(self) -> Failed:
        code = self._process.wait()
        tail = self.log.read_text(errors="replace").strip().splitlines()[-1:] or [""]
        why = "killed, as systems do when memory ends" if code == -9 else f"ended with code {code}"
        return Failed("ProcessEnded", f"the process of {self.framework} was {why}; its last words: {tail[0][:300]!r}")

    @property
    def ended(self) -> bool:
        """Whether there is nobody to ask any more."""
        return self._process.poll() is not None

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue


def answer_all(ask: Callable[..., dict[str, Any]]) -> None:
    """The worker's end of `Process.ask`: answer every line of standard input until it ends."""
    answers = own_stdout()
    for line in sys.stdin:
        try:
            answer = ask(**json.loads(line))
        except Exception as error:
            answer = raised(error)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def own_stdout() -> IO[bytes]:
    """The real stdout, for answers alone; what libraries print goes to stderr, the log."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


def raised(error: Exception) -> dict[str, Any]:
    """What is answered in place of an answer; `Failed` takes the entries."""
    text = str(error).strip().partition("\n")[0][:500]
    return {"error": {"kind": type(error).__name__, "message": text or type(error).__name__}}


def available_threads() -> int:
    """What `OMP_NUM_THREADS` says, or else a thread for each core that this process may use."""
    return int(os.environ.get("OMP_NUM_THREADS") or usable_cores())


def numerics(threads: int) -> dict[str, str]:
    """The environment of every worker: one number of threads, and float32 that is float32.

    Of oneDNN's environment nothing stays that would have it compute in bfloat16.
    """
    return {
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"), str(threads)),
        "TF_NUM_INTEROP_THREADS": "1",
        "NVIDIA_TF32_OVERRIDE": "0",
        "ONEDNN_DEFAULT_FPMATH_MODE": "STRICT",
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONUNBUFFERED": "1",
        "JAX_PLATFORMS": "cpu",
    }


def settings(threads: int, cache: Path) -> dict[str, str]:
    """`numerics`, and compilers that keep what they make in `cache`. `TF_XLA_FLAGS` of the caller stay."""
    xla = f"{os.environ.get('TF_XLA_FLAGS', '')} --tf_xla_persistent_cache_directory={cache / 'xla'}".strip()
    return {
        **numerics(threads),
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TF_XLA_FLAGS": xla,
    }
