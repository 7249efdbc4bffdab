"""What the commands of all rooms have in common: how they look, and how they end."""

from __future__ import annotations

import errno
import io
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from submission.errors import PromptRecoveryError, UserError
from submission.progress import print_line

WorkersOption = Annotated[
    int, typer.Option("--workers", min=0, help="Worker processes, each with a copy of the model; 0 starts one per GPU.")
]
RayOption = Annotated[
    str,
    typer.Option(
        "--ray", metavar="ADDRESS", help="Run the workers on this Ray cluster; 'local' starts one for the run."
    ),
]
RayGpusOption = Annotated[
    float | None,
    typer.Option(
        "--ray-gpus", min=0, help="GPUs per worker on the cluster. Default: 1 if the cluster has GPUs, else 0."
    ),
]
RayCpusOption = Annotated[
    int, typer.Option("--ray-cpus", min=0, help="CPUs per worker on the cluster; 0 splits them evenly.")
]
TemperatureOption = Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")]
TopPOption = Annotated[
    float,
    typer.Option(min=0.01, max=1, help="Nucleus sampling: smallest set of tokens with this total probability (top-p)."),
]
MinPOption = Annotated[
    float, typer.Option(min=0, max=1, help="Minimum token probability, relative to the most probable token (min-p).")
]


def new_app(help: str) -> typer.Typer:
    """A command line without boxes, colours and tracebacks of its own."""
    return typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
        help=help,
    )


def grouped(groups: Mapping[str, Sequence[str]]) -> type[TyperCommand]:
    """A command whose `--help` lists its options in groups.

    Args:
        groups: by heading, the parameters' names; those that are in none come last.
    """

    class Grouped(TyperCommand):
        def format_options(self, ctx: Any, formatter: Any) -> None:
            """Write arguments and options."""
            parameters = self.get_params(ctx)
            told = {one.name: one.get_help_record(ctx) for one in parameters}
            arguments = [str(one.name) for one in parameters if one.param_type_name == "argument"]
            named = {"Arguments": arguments, **groups}
            others = [name for name in told if name and not any(name in names for names in named.values())]
            for heading, names in {**named, "Other": others}.items():
                if records := [record for name in names if (record := told.get(name))]:
                    with formatter.section(heading):
                        formatter.write_dl(records)

    return Grouped


def run_command(command: Callable[[], object]) -> None:
    """Run a room's command. What a user can put right is one or two lines and exit code 2; a traceback is a bug."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # whatever encoding the terminal has
    _show_log()
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        _fail(str(error), 2)
    except RecursionError:
        _fail("a file or an option is nested too deeply to be read", 2)
    except MemoryError:
        _fail("there is too little memory\nLower the batch size, the context or the number of workers.", 1)
    except OSError as error:
        _fail(_words(error), 1)
    except PromptRecoveryError as error:
        _fail(str(error), 1)


def _show_log() -> None:
    """What is logged goes to standard error, in plain lines."""
    handler = _ToStandardError()
    for room in ("submission", "eval", "train", "ensemble"):
        logger = logging.getLogger(room)
        logger.setLevel(logging.INFO)
        logger.handlers = [handler]
        logger.propagate = False


class _ToStandardError(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """Print a line."""
        print_line(record.getMessage(), sys.stderr)


def _fail(words: str, code: int) -> None:
    print_line(f"error: {words}", sys.stderr)
    sys.exit(code)


def _words(error: OSError) -> str:
    """What the system refused, where, and what to do about it."""
    where = f"{error.filename}: " if error.filename else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "\nMake room and run the same command again: what is finished is kept." if full else ""
    return f"{where}{error.strerror or error}{advice}"
