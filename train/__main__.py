"""`python -m train`: this room is still empty; says what it will hold."""

from __future__ import annotations

import sys

PLAN = """\
train makes the weights: triplets, LoRA/QLoRA fine-tuning, merged and GGUF exports.
Nothing of it is built yet. It will hold these commands:

    prompts   rewrite prompts from a grammar
    texts     original texts from files or written by a model
    rewrites  rewrites of texts made by the target model
    prepare   training, validation and out-of-distribution sets
    sft       LoRA and QLoRA fine-tuning
    merge     an adapter merged into 16-bit weights
    gguf      GGUF files, quantised
    run       a whole recipe

What works today: python -m submission --help
"""


def main() -> int:
    """Print the plan; exit 2 when a command was asked for, since there is none yet."""
    print(PLAN, end="")
    return 2 if any(not argument.startswith("-") for argument in sys.argv[1:]) else 0


if __name__ == "__main__":
    sys.exit(main())
