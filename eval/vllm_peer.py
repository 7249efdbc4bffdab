"""vLLM as its users run it, in the Python of an environment that has it; `eval.peers.Vllm` is at the other end.

    PYTHON -P eval/vllm_peer.py FOLDER DTYPE CONTEXT < commands.jsonl

Imports nothing of this project. A command is a line of JSON on standard input, and a line on standard output says that
it is done:

    {"do": "generate", "prompts": [[1, 2, 3]], "new_tokens": 40, "ends": [2], "samples": 8, "temperature": 0.8}
    {"do": "score", "texts": [[1, 2, 3, 4]]}
    {"do": "forget"}
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    """Load the model, say so, and do what is asked until there is no more."""
    folder, dtype, context = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints goes elsewhere
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1",
                   "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # fmt: skip
    from vllm import LLM
    from vllm.platforms import current_platform

    model = LLM(folder, skip_tokenizer_init=True, dtype=dtype, max_model_len=int(context), generation_config="vllm",
                enforce_eager=current_platform.is_cpu(), load_format="safetensors", use_tqdm_on_load=False)  # fmt: skip
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps({"done": globals()[f"_{command.pop('do')}"](model, **command)}), file=out, flush=True)


def _generate(
    model: Any, prompts: list[list[int]], new_tokens: int, ends: list[int], samples: int, temperature: float
) -> int:
    """Tokens of all answers."""
    from vllm import SamplingParams

    params = SamplingParams(n=samples, temperature=temperature, max_tokens=new_tokens, stop_token_ids=ends,
                            detokenize=False)  # fmt: skip
    done = model.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return sum(len(one.token_ids) for output in done for one in output.outputs)


def _score(model: Any, texts: list[list[int]]) -> int:
    """Texts whose tokens have a probability now."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0.0, detokenize=False)
    done = model.generate([{"prompt_token_ids": ids} for ids in texts], params, use_tqdm=False)
    return sum(len(output.prompt_logprobs) == len(ids) for output, ids in zip(done, texts, strict=True))


def _forget(model: Any) -> bool:
    return bool(model.reset_prefix_cache())


if __name__ == "__main__":
    main()
