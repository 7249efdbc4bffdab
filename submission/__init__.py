"""submission: the offline batch predictor.

python -m submission predict examples/test.csv -o submission.csv
"""

import time

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
]
