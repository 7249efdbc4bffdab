"""Commands on damaged, hostile and random files: no traceback, no hang, no file of the user's changed.

    make fuzz                                            5,000 cases of every kind
    python -m tests.fuzz --kind gguf --cases 200 --seed 7

A case is made from its kind, a seed and its number alone, so a failure can be repeated: `--seed S --only N`.
"""
