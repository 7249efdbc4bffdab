"""What the commands of all rooms have in common: how they look, and how they end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from submission.errors import PromptRecoveryError, UserError

WorkersOption = Annotated[
    int, typer.Option("--workers", min=0, help="Copies of the model, in processes of their own; 0: one for each GPU.")
]
RayOption = Annotated[
    str, typer.Option("--ray", metavar="ADDRESS", help="Put them on this Ray cluster; local: start one for the run.")
]
RayGpusOption = Annotated[
    float | None, typer.Option("--ray-gpus", min=0, help="Of each copy on a cluster; default: 1 if it has any.")
]
RayCpusOption = Annotated[
    int, typer.Option("--ray-cpus", min=0, help="Of each copy on a cluster; 0: the cluster's are divided.")
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


def run_command(command: Callable[[], object]) -> None:
    """Run a room's command; errors that a user can put right are one or two lines and exit code 2."""
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (PromptRecoveryError, OSError) as error:  # a full disk, say
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
