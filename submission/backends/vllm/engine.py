"""vLLM's engine in this process: loaded from disk, stepped, never more asked of it than it can have on its way."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from submission.backends.common import memory_budget, thread_count
from submission.backends.vllm.adapters import check_fit
from submission.backends.vllm.options import RANKS, Options, adapter_rank
from submission.errors import DeviceLostError, UserError, first_line

_GPU_STREAMS, _CPU_STREAMS = 256, 16  # answers computed together
_STEP_TOKENS = 8192  # that a step computes at most, and at least a whole prompt
_FAILED = ("abort", "error")  # reasons to finish that are no answer's


class Job(Protocol):
    """Something to ask of the engine.

    Attributes:
        failure: why it has no result; "" if it has one.
    """

    failure: str

    @property
    def ids(self) -> list[int]:
        """The tokens to feed."""
        ...

    @property
    def stepwise(self) -> bool:
        """Whether outputs are wanted after each step, with what is new; else one, at the end."""
        ...

    def params(self) -> dict[str, Any]:
        """Arguments of `vllm.SamplingParams`."""
        ...

    def take(self, output: Any) -> bool:
        """Take a `RequestOutput`; True if no more is wanted."""
        ...


T = TypeVar("T", bound=Job)


class Engine:
    """A model that vLLM has loaded.

    Args:
        model: its folder.
        adapter: PEFT folder.
        options: see there.
        context: tokens of a prompt and its answer.

    Raises:
        UserError: something does not suit.
    """

    def __init__(self, model: Path, adapter: Path | None, options: Options, context: int) -> None:
        _set_environment(options)
        from vllm import EngineArgs, LLMEngine

        on_cpu = _check_platform(options)
        streams = options.streams or (_CPU_STREAMS if on_cpu else _GPU_STREAMS)
        self._most = 2 * streams  # on their way: the engine never waits for the next one
        arguments = _arguments(model, options, on_cpu=on_cpu)
        arguments |= {"max_model_len": context, "max_num_seqs": streams,
                      "max_num_batched_tokens": max(context, _STEP_TOKENS)}  # fmt: skip
        self._lora: Any = None
        if adapter is not None:
            check_fit(model, adapter)
            arguments |= _lora_arguments(adapter)
        self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        if adapter is not None:
            self._lora = _add_adapter(self._engine, adapter)
        self._number = 0
        self._lost = ""

    def forget(self) -> None:
        """Empty the prefix cache."""
        self._engine.reset_prefix_cache()

    def run(self, jobs: Iterable[T]) -> Iterator[T]:
        """Yield each job when it is done or has failed; jobs are taken as room falls free.

        Raises:
            DeviceLostError: the engine failed, and can answer nothing any more.
            Exception: of `jobs`, when all that it gave before is done.
        """
        source: Iterator[T] | None = iter(jobs)
        trouble: Exception | None = None
        running: dict[str, T] = {}
        try:
            while True:
                while source is not None and len(running) < self._most:
                    try:
                        job = next(source)
                    except StopIteration:
                        source = None
                    except Exception as error:
                        source, trouble = None, error
                    else:
                        name = self._add(job)
                        if job.failure:
                            yield job
                        else:
                            running[name] = job
                if not running:
                    break
                yield from self._step(running)
        finally:
            self._abort(running)
        if trouble is not None:
            raise trouble

    def _add(self, job: Job) -> str:
        """Ask; what is refused has its failure."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if self._lost:
            raise DeviceLostError(self._lost)
        self._number += 1
        name = str(self._number)
        kind = RequestOutputKind.DELTA if job.stepwise else RequestOutputKind.FINAL_ONLY
        try:
            params = SamplingParams(**job.params(), detokenize=False, output_kind=kind)
            self._engine.add_request(name, {"prompt_token_ids": job.ids}, params, lora_request=self._lora)
        except (ValueError, TypeError) as error:
            job.failure = f"vLLM refuses it: {first_line(error)}"
        return name

    def _step(self, running: dict[str, T]) -> Iterator[T]:
        try:
            outputs = self._engine.step()
        except Exception as error:
            self._lost = f"vLLM's engine failed: {first_line(error)}"
            raise DeviceLostError(self._lost) from error
        done, enough = [], []
        for output in outputs:
            job = running.get(output.request_id)
            if job is None:  # it ended with a stop string a step ago
                continue
            reason = output.outputs[0].finish_reason
            if reason in _FAILED:
                job.failure = f"vLLM gave the request up ({reason})"
            elif not job.take(output):
                if not output.finished:
                    continue
                job.failure = f"vLLM ended the answer early ({reason})"
            elif not output.finished:
                enough.append(output.request_id)
            done.append(running.pop(output.request_id))
        if enough:
            self._engine.abort_request(enough)
        yield from done

    def _abort(self, running: dict[str, T]) -> None:
        if running and not self._lost:
            with suppress(Exception):  # they are nobody's any more
                self._engine.abort_request(list(running))


def _set_environment(options: Options) -> None:
    """What vLLM reads when it is imported: offline, quiet, in this process, with the threads that were asked for."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": str(thread_count(options.threads)), "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    logging.getLogger("vllm").setLevel(logging.ERROR)  # for what it says before it looks at the environment
    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, at what vLLM does


def _check_platform(options: Options) -> bool:
    """True on vLLM's CPU build.

    Raises:
        UserError: it is built for GPUs, and there is none; or it is not, and 4 bits are asked for.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        if options.load_in_4bit:
            raise UserError("vLLM's CPU build has no 4-bit weights: leave --load-in-4bit out")
        return True
    if not current_platform.device_type:
        raise UserError(
            "vLLM finds no GPU that its build suits. On a CPU use --backend transformers or openvino; vLLM's CPU build "
            "is the package vllm-cpu"
        )
    return False


def _arguments(model: Path, options: Options, *, on_cpu: bool) -> dict[str, Any]:
    """Arguments of `vllm.EngineArgs`, but for sizes and the adapter."""
    arguments: dict[str, Any] = {
        "model": str(model), "skip_tokenizer_init": True, "trust_remote_code": False, "load_format": "safetensors",
        "dtype": _dtype(on_cpu=on_cpu) if options.dtype == "auto" else options.dtype, "seed": 0,
        "logprobs_mode": "raw_logprobs", "disable_log_stats": True, "use_tqdm_on_load": False,
        "generation_config": "vllm",  # nothing but what a request says
        "enable_prefix_caching": True,
        # A prompt in parts would move the random stream of its sample by the parts, so by what runs beside it.
        "enable_chunked_prefill": False,
        "enforce_eager": on_cpu or options.eager,
    }  # fmt: skip
    if on_cpu:
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # which would come first
        arguments["kv_cache_memory_bytes"] = options.memory * 1_000_000 or memory_budget()
    else:
        arguments["gpu_memory_utilization"] = options.gpu_memory
    if options.load_in_4bit:
        arguments |= {"quantization": "bitsandbytes", "load_format": "bitsandbytes"}
    return arguments


def _dtype(*, on_cpu: bool) -> str:
    from vllm.platforms import current_platform

    if on_cpu:
        return "float32"
    return "bfloat16" if current_platform.has_device_capability(80) else "float16"


def _lora_arguments(adapter: Path) -> dict[str, Any]:
    rank = adapter_rank(adapter)
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": next(most for most in RANKS if rank <= most)}


def _add_adapter(engine: Any, adapter: Path) -> Any:
    from vllm.lora.request import LoRARequest

    lora = LoRARequest("adapter", 1, str(adapter))
    try:
        engine.add_lora(lora)
    except Exception as error:
        raise UserError(f"adapter {adapter} does not fit this model: {first_line(error)}") from error
    return lora
