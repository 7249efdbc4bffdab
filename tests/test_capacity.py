"""Memory and minutes on Kaggle's machines, from the sizes of models alone; figures worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from submission.errors import UserError
from submission.predict.capacity import (
    MACHINES,
    Fit,
    Gpu,
    Machine,
    ModelShape,
    Precision,
    Work,
    fit,
    shown,
    together,
)
from submission.predict.estimate import estimate
from submission.predict.plan import RunConfig
from submission.publish.attachable import handle_of, known, shape_of
from submission.publish.forecast import forecast
from tests.conftest import ROOT, write_csv

EXAMPLE = ROOT / "examples" / "four-adapters"


def shape(name: str) -> ModelShape:
    found = shape_of(handle_of(name))
    assert found is not None
    return found


GEMMA, MISTRAL = shape("gemma-7b-it"), shape("mistral-7b-it")
BY_NAME = {machine.name: machine for machine in MACHINES}
WORK = Work(rows=1400, prompt_tokens=500, new_tokens=40)


@pytest.mark.parametrize(
    ("name", "billions", "kv_bytes"),
    [  # parameters as the models' cards give them; 2 x 2 bytes x layers x heads of keys and values x their size
        ("gemma-2b-it", 2.51, 4 * 18 * 1 * 256),
        ("gemma-7b-it", 8.54, 448 * 1024),
        ("gemma-2-2b-it", 2.61, 4 * 26 * 4 * 256),
        ("gemma-2-9b-it", 9.24, 4 * 42 * 8 * 256),
        ("gemma-3-1b-it", 1.00, 4 * 26 * 1 * 256),
        ("gemma-3-4b-it", 3.88, 4 * 34 * 4 * 256),  # its text half
        ("mistral-7b-it", 7.24, 128 * 1024),
    ],
)
def test_the_sizes_of_known_models_are_theirs(name: str, billions: float, kv_bytes: int) -> None:
    assert shape(name).parameters / 1e9 == pytest.approx(billions, abs=0.015)
    assert shape(name).kv_bytes == kv_bytes


@pytest.mark.parametrize("name", ["gemma", "gemma2", "mistral"])
def test_the_sizes_here_are_those_of_transformers(name: str) -> None:
    from transformers import Gemma2Config, GemmaConfig, MistralConfig

    config: Any = {"gemma": GemmaConfig, "gemma2": Gemma2Config, "mistral": MistralConfig}[name]()
    ours = shape({"gemma": "gemma-7b-it", "gemma2": "gemma-2-2b-it", "mistral": "mistral-7b-it"}[name])
    assert ModelShape.from_config(json.loads(config.to_json_string(use_diff=False))) == ours


@pytest.mark.parametrize(
    ("model", "bits", "machine", "weights", "tokens"),
    [  # GB of weights, and thousands of KV tokens in what is left of 95 % of the memory without 0.54 GB:
        # 0.95 x 15.78 - 0.54 - 5.57 = 8.89 GB of 448 KiB each, and so on
        (GEMMA, 4, "t4x2", 5.57, 19.4),
        (GEMMA, 16, "t4x2", 17.07, 0),
        (GEMMA, 16, "l4x4", 17.07, 10.9),
        (GEMMA, 16, "a100", 17.07, 49.6),
        (GEMMA, 16, "h100", 17.07, 137.5),
        (MISTRAL, 4, "t4x2", 4.12, 78.8),
        (MISTRAL, 16, "t4x2", 14.48, 0),
        (MISTRAL, 16, "l4x4", 14.48, 58.2),
        (shape("gemma-2-2b-it"), 16, "t4x2", 10.46, 18.8),  # in float32, as on every GPU without bfloat16
        (shape("gemma-2-2b-it"), 16, "l4x4", 5.23, 158.5),
    ],
)
def test_memory_is_planned(model: ModelShape, bits: int, machine: str, weights: float, tokens: float) -> None:
    found = fit(BY_NAME[machine], model, WORK, Precision(bits))
    assert found.weight_bytes / 1e9 == pytest.approx(weights, abs=0.01)
    assert found.kv_tokens / 1e3 == pytest.approx(tokens, abs=0.2)
    assert found.fits == (tokens > 0)
    if not tokens:
        assert found.minutes == math.inf


def test_minutes_are_the_roofline_s() -> None:
    """One layer of one weight a unit, so that everything can be worked out by hand."""
    toy = ModelShape("toy", 1, 100, 100, 1, 1, 100, 1000, tied=True)
    assert toy.layer_parameters == 2 * 100 * 100 * 2 + 3 * 100 * 100
    assert toy.embedding_parameters == 100_000
    slow = Machine("slow", "", Gpu("slow", 2e9, 1e6, 1e15, 1e15, (8, 0)), 1)  # all time goes into reading
    work = Work(rows=256, prompt_tokens=10, new_tokens=5)
    step = 2 * 70_000 + 2 * 100_000 + 256 * 12.5 * 400
    assert fit(slow, toy, work).minutes * 60 == pytest.approx(5 * step / 0.6e6 + 2 * 170_000 / 0.3e9, rel=1e-4)
    assert fit(slow, toy, Work(512, 10, 5)).minutes == pytest.approx(2 * fit(slow, toy, work).minutes, rel=0.01)
    two = Machine("two", "", slow.gpu, 2)
    assert fit(two, toy, Work(512, 10, 5)).minutes == pytest.approx(fit(slow, toy, work).minutes, rel=0.01)
    busy = Machine("busy", "", Gpu("busy", 2e9, 1e15, 1e6, 1e6, (8, 0)), 1)  # all time goes into arithmetic
    prefill = 256 * (2 * 70_000 * 10 + 2 * 100 * 10**2 + 2 * 100_000)
    decode = 5 * 2 * 256 * 170_000
    loading = 2 * 170_000 / 0.3e9
    assert fit(busy, toy, work).minutes * 60 == pytest.approx((prefill + decode) / 0.4e6 + loading, rel=1e-4)


def test_an_adapter_beside_4_bits_costs_time_and_one_that_is_merged_does_not() -> None:
    four, sixteen = (fit(BY_NAME["a100"], MISTRAL, WORK, Precision(bits, 100e6)) for bits in (4, 16))
    assert four.minutes > 1.4 * fit(BY_NAME["a100"], MISTRAL, WORK, Precision(4)).minutes
    assert sixteen.minutes == fit(BY_NAME["a100"], MISTRAL, WORK, Precision(16)).minutes


def test_models_that_take_turns_add_up_and_cautions_are_told() -> None:
    gemma2 = shape("gemma-2-9b-it")
    fits = [fit(BY_NAME["t4x2"], one, WORK, Precision(4)) for one in (MISTRAL, gemma2)]
    both: Fit = together(fits)
    assert both.minutes == sum(one.minutes for one in fits)
    assert both.weight_bytes == fits[1].weight_bytes
    assert "computes in float32: a T4 has no bfloat16" in both.caution
    lines = list(shown([both, fit(BY_NAME["t4x2"], gemma2, WORK)], limit_minutes=1))
    assert "over the 0.0167 h" in lines[1]
    assert "does not fit" in lines[2]


@pytest.mark.parametrize("change", [{"hidden_size": None}, {"num_attention_heads": "16"}, {"vocab_size": 0}])
def test_a_config_without_sizes_is_named(change: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        ModelShape.from_config({**known()["gemma-7b-it"], **change})


@pytest.mark.parametrize("config", [{"text_config": None}, {"text_config": []}, ["llama"], "llama"])
def test_a_config_of_another_kind_is_refused(config: Any) -> None:
    with pytest.raises(UserError, match="of another kind"):
        ModelShape.from_config(config)


def test_a_text_model_inside_another_is_found() -> None:
    about = known()["gemma-3-4b-it"]
    assert ModelShape.from_config({"model_type": "gemma3", "text_config": about}) == ModelShape.from_config(about)


def test_the_example_of_four_adapters_is_forecast() -> None:
    handles = [handle_of("gemma-7b-it"), handle_of("mistral-7b-it")]
    lines = list(forecast(EXAMPLE, handles))
    assert sum(line.startswith("forecast") for line in lines) == 5
    assert "1400 rows of 500 tokens, 1 answers of up to 40 each, adapter" in lines[0]
    whole = lines[next(number for number, line in enumerate(lines) if "all 4 sources" in line) + 2]
    assert "t4x2" in whole
    assert "5.7 GB" in whole
    assert list(forecast(EXAMPLE, ["you/other/transformers/7b/1"])) == []


def test_a_plain_bundle_is_held_in_4_bits_where_the_kernel_does_so(tmp_path: Path) -> None:
    (tmp_path / "kernel.toml").write_text('recover = "zero_shot"\n')
    lines = list(forecast(tmp_path, [handle_of("gemma-7b-it")]))
    assert ["5.6 GB" in line for line in lines[2:6]] == [True, True, False, False]


def test_a_forecast_reads_settings_in_both_ways_and_says_where_there_is_none(tmp_path: Path) -> None:
    gemma = handle_of("gemma-7b-it")
    (tmp_path / "kernel.toml").write_text('recover = "best_of"\nrecover_config = "b.toml"\n')
    told = []
    for settings in ('["load_in_4bit=true", "context=1024"]', '"load_in_4bit=true,context=1024"'):
        (tmp_path / "b.toml").write_text(f'[[source]]\nname = "g"\nmodel = "find:{gemma}"\nsettings = {settings}\n')
        told.append(list(forecast(tmp_path, [gemma])))
    assert told[0] == told[1]
    assert "5.6 GB" in told[0][2]
    (tmp_path / "b.toml").write_text("")
    assert ["forecast   none: " in line for line in forecast(tmp_path, [gemma])] == [True]


def test_a_model_that_is_too_large_for_this_machine_is_planned_and_not_timed(tmp_path: Path, said: list[str]) -> None:
    folder = tmp_path / "mistral"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(known()["mistral-7b-it"]))
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(2 * 10**12)  # takes no room on disk
    source = f'[[source]]\nname = "m"\nbackend = "transformers"\nmodel = "{folder}"\nsettings = ["load_in_4bit=true"]\n'
    (tmp_path / "b.toml").write_text(f"{source}n = 3\nmax_new_tokens = 20\n")
    table = write_csv(tmp_path / "test.csv", [(str(number), "a" * 900, "b" * 900) for number in range(70)])
    found = estimate(RunConfig(table, tmp_path / "s.csv", recover="ensemble.best_of:best_of",
                               recover_config=tmp_path / "b.toml", fresh=True))  # fmt: skip
    expected = fit(BY_NAME["t4x2"], MISTRAL, Work(70, 450, 20, 4), Precision(4)).minutes
    assert found["minutes_t4x2"] == pytest.approx(expected, abs=0.06)
    assert {f"minutes_{machine.name}" for machine in MACHINES} <= set(found)
    assert "seconds" not in found
    assert any("larger than this machine's memory" in line for line in said)
