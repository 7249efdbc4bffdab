"""The one file that Kaggle runs for `python -m train push`: it hands over to `train.session` in the bundle's wheel.

It needs nothing but the standard library, and the wheel is imported as it is.
"""

import glob
import os
import sys

ROOT = os.environ.get("PROMPT_RECOVERY_KAGGLE", "/kaggle")  # elsewhere in a rehearsal
MARK = "training.toml"

if __name__ == "__main__":
    found = sorted(glob.glob(f"{ROOT}/input/**/{MARK}", recursive=True))
    wheels = [
        wheel for path in found for wheel in glob.glob(os.path.join(os.path.dirname(path), "prompt_recovery-*.whl"))
    ]
    if not wheels:
        sys.exit(f"no {MARK} with a wheel beside it under {ROOT}/input: attach the dataset of `python -m train push`")
    sys.path.insert(0, wheels[0])
    from train.session import main

    sys.exit(main(os.path.dirname(wheels[0])))
