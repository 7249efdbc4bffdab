"""submission: the offline batch predictor.

python -m submission predict examples/test.csv -o submission.csv
"""

from submission.errors import BackendError, MissingExtra, PromptRecoveryError, UserError
from submission.types import (
    Backend,
    Budget,
    Chat,
    Completion,
    Failure,
    LogLikelihood,
    Message,
    Pair,
    Part,
    Prediction,
    Recover,
    Request,
    Sampling,
    Triplet,
)

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "BackendError",
    "Budget",
    "Chat",
    "Completion",
    "Failure",
    "LogLikelihood",
    "Message",
    "MissingExtra",
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
