"""submission: the offline batch predictor.

    python -m submission predict examples/test.csv -o submission.csv

and as a function, `recover`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from submission.errors import BackendError, MissingExtra, PromptRecoveryError, UserError
from submission.types import (
    Backend,
    Budget,
    Chat,
    Completion,
    Failure,
    LogLikelihood,
    Message,
    Model,
    Pair,
    Part,
    Prediction,
    Recover,
    Request,
    Sampling,
    Triplet,
)

if TYPE_CHECKING:
    from submission.predict.recover import recover

__version__ = "0.1.0"

STARTED = time.monotonic()
"""When the program began: from here a deadline counts."""

__all__ = [
    "STARTED",
    "Backend",
    "BackendError",
    "Budget",
    "Chat",
    "Completion",
    "Failure",
    "LogLikelihood",
    "Message",
    "MissingExtra",
    "Model",
    "Pair",
    "Part",
    "Prediction",
    "PromptRecoveryError",
    "Recover",
    "Request",
    "Sampling",
    "Triplet",
    "UserError",
    "__version__",
    "recover",
]


def __getattr__(name: str) -> Any:
    """`recover` is imported when it is asked for: commands and workers start without it."""
    if name == "recover":
        from submission.predict.recover import recover

        return recover
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
