"""The command line: one file a command, imported only when it is called, so that `--help` and `list` stay under 150 ms.

Results go to stdout (`--json` on every command), progress to stderr and only on a terminal. Exit codes are those of
`core/errors.py`; a user's mistake never shows a traceback.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any

import click

from triptych.core.errors import TriptychError

# command -> (module, one line of help); the help stands here so that listing commands imports none of them.
COMMANDS = {
    "list": ("catalog", "List the catalogued models."),
    "info": ("catalog", "Show a model: parameters, FLOPs, layers, preprocessing."),
    "convert": ("convert", "Import a PyTorch checkpoint file into the canonical format."),
    "parity": ("parity", "Prove that the frameworks compute the same model; plant faults to test the proof."),
    "train": ("train", "Train a model from a recipe in one framework."),
    "predict": ("predict", "Classify image files."),
    "evaluate": ("evaluate", "Measure top-1 and top-5 accuracy on a data set, in one framework or in several."),
    "export": ("export", "Write a model for other runtimes, each file verified in its own before it is handed over."),
    "serve": ("serve", "Serve an exported model: the Open Inference Protocol, and an upload of images."),
    "bench": ("bench", "Time proven models against each other; find what became slower."),
    "profile": ("profile", "Trace one step in each framework, and tell where its time goes."),
    "worker": ("worker", "Be the host of one framework's worker processes: what a container of compose.yaml runs."),
    "report": ("report", "Prove, train, compare and write report.md and report.html."),
    "doctor": ("doctor", "Print the environment for a bug report."),
}


class LazyGroup(click.Group):
    """A click group whose commands are imported when called, from the table above."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command, in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command called `name`, imported now; None lets click report an unknown one."""
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"triptych.cli.{COMMANDS[name][0]}")
        command: click.Command = getattr(module, f"{name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command list of `--help`, without importing any command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from triptych import __version__

        click.echo(f"triptych {__version__}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version and exit.")
def group() -> None:
    """One model, three frameworks, provably the same."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `triptych` command: maps every error to its documented exit code."""
    # Ended from outside, we still clean up after ourselves: worker processes and temporary directories go with us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        code = group.main(arguments, prog_name="triptych", standalone_mode=False)
    except click.exceptions.Abort:
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except TriptychError as error:
        click.echo(f"triptych: {error}", err=True)
        code = error.exit_code
    except BrokenPipeError:
        # The reader (`| head`) went away: not an error of ours; keep Python from complaining while it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code if isinstance(code, int) else 0)


def emit(data: Any, as_json: bool, text: str) -> None:
    """Print a result: as JSON (floats as they are, NaN refused), or as text."""
    if as_json:
        import json

        text = json.dumps(data, indent=2, allow_nan=False)
    click.echo(text)


def called(*words: str) -> str:
    """The command line that is running, from its command and arguments and the options that were given; of paths the last part only."""
    context = click.get_current_context()
    given = [
        option
        for option in context.command.params
        if isinstance(option, click.Option) and option.name and option.name not in ("as_json", "out", "work")
        if context.get_parameter_source(option.name) is click.core.ParameterSource.COMMANDLINE
    ]
    options = [max(option.opts, key=len) + ("" if option.is_flag else f" {_shown(context.params[str(option.name)])}") for option in given]
    return " ".join(["triptych", *(os.path.basename(word) for word in words), *options])


def _shown(value: Any) -> str:
    """A value as it may be typed; of paths the last part only."""
    return ",".join(map(_shown, value)) if isinstance(value, tuple) else os.path.basename(str(value))


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
