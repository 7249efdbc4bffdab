"""An OpenVINO language model, compiled so that one call computes many pieces of many sequences.

OpenVINO's own pass replaces the model's attention by paged attention, whose keys and values lie in blocks that
sequences may share. Two things are added: logits are computed at the asked positions only, and what is wanted of them
(the likeliest token, the log-probability of a given token) is computed in the graph, so that the whole vocabulary
leaves it only for answers that are sampled.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from submission.backends.models import OPENVINO_MODEL
from submission.errors import UserError, last_line

# Kernels that OpenVINO, and oneDNN below it, keep for shapes that come again. Hardly a step has the shape of another:
# by default (5,000 and 1,024) memory grows with every step for thousands of rows, and nothing is gained.
_SHAPES = 32
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


def compiled(folder: Path, dtype: str, threads: int) -> Any:
    """The model of a folder, as `openvino.CompiledModel`.

    Inputs beside those of paged attention: `scored` (positions in `input_ids` whose logits are wanted), `targets`
    (a token for each of them), `sampled` (places in `scored` whose logits leave the graph).
    Outputs: `top` and `top_logprob` of each scored position, `target_logprob` likewise, `logits` and `logsumexp` of
    each sampled one. Log-probabilities are natural, at temperature 1, over the whole vocabulary.

    Raises:
        UserError: it cannot be read, or is no such model.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_SHAPES))  # read when it computes for the first time
    import openvino

    core = openvino.Core()
    try:
        model = _paged(core.read_model(folder / OPENVINO_MODEL))
        return core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
                # Not the 8 bits that are OpenVINO's default on some CPUs: with them greedy answers differ from those of
                # transformers. 32 bits are a tenth faster than 16 beside float32. bfloat16 makes bfloat16 of f16.
                "KV_CACHE_PRECISION": "f32" if dtype == "float32" else "f16",
                "INFERENCE_NUM_THREADS": threads,
                "CPU_RUNTIME_CACHE_CAPACITY": _SHAPES,
            },
        )
    except (RuntimeError, AttributeError, IndexError) as error:
        raise UserError(f"model {folder} cannot be loaded by OpenVINO: {last_line(error)}") from error


def _paged(model: Any) -> Any:
    import openvino
    from openvino import opset13 as ops

    # Private by its name, and what the engines that drive such models themselves use (vllm-openvino among them).
    from openvino._offline_transformations import paged_attention_transformation

    paged_attention_transformation(model)
    caches = [one for one in model.inputs if "_cache." in one.any_name]
    if not caches:
        raise UserError("the model keeps no keys and values: export it with its cache (optimum-cli does so by itself)")
    head = model.outputs[0].get_node().input_value(0).get_node()
    if head.get_type_name() != "MatMul":
        raise UserError(f"the model does not end with a product with its vocabulary but with {head.get_type_name()}")
    integers = {name: ops.parameter([-1], openvino.Type.i32, name=name) for name in ("scored", "targets", "sampled")}
    for name, parameter in integers.items():
        parameter.output(0).set_names({name})
    rows, columns = ops.constant(0), ops.constant([1])
    hidden = ops.gather(head.input_value(0), integers["scored"], rows)
    head.input(0).replace_source_output(hidden.output(0))
    logits = ops.convert(ops.squeeze(head.output(0), columns), "f32")
    highest = ops.reduce_max(logits, columns, keep_dims=True)
    summed = ops.reduce_sum(ops.exp(ops.subtract(logits, highest)), columns, keep_dims=True)
    logsumexp = ops.add(ops.log(summed), highest)
    top = ops.topk(logits, ops.constant(1), 1, "max", "none", index_element_type="i32")
    target = ops.gather_elements(logits, ops.unsqueeze(integers["targets"], columns), 1)
    outputs = {
        "top": top.output(1),
        "top_logprob": ops.subtract(top.output(0), logsumexp).output(0),
        "target_logprob": ops.subtract(target, logsumexp).output(0),
        "logits": ops.gather(logits, integers["sampled"], rows).output(0),
        "logsumexp": ops.gather(logsumexp, integers["sampled"], rows).output(0),
    }
    results = []
    for name, output in outputs.items():
        output.get_tensor().set_names({name})
        results.append(ops.result(output))
    return openvino.Model(results, [], [*model.get_parameters(), *integers.values()], "recovery")
