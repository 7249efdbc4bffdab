"""`python -m tests.session ROOT`: run a laid out session of training, and print what came of it as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from train.push import run_session

if __name__ == "__main__":
    code, log, report = run_session(Path(sys.argv[1]), [sys.executable])
    print(json.dumps({"code": code, "log": log, "report": report}))
