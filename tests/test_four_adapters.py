"""A kernel of several adapters on several bases: one model at a time, the best answer known whatever happens."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

import submission.calls.models as handles
from ensemble.best_of import best_of
from ensemble.pace import WAVE, Pace, Turns
from submission import kernel
from submission.backends import model_spec
from submission.calls.log import Log
from submission.calls.models import open_models
from submission.calls.supervisor import Pool
from submission.errors import UserError
from submission.predict.strategies import Setup, roles_of
from submission.prompts.answers import strip_invalid_utf8
from submission.prompts.templates import get_template
from submission.publish.attachable import Attached, attached_copies, handle_of
from submission.publish.bundle import BundleConfig, bundle, read_contents, split_adapters
from submission.publish.dry_run import lay_out
from submission.publish.wheels import own_wheel
from submission.types import Budget, Pair, Prediction, Request, Sampling
from tests.bench.kernel_kills import CONSTANT, EXAMPLE, make_bundle, make_models, run
from tests.conftest import ROOT, Cli, read_csv, runner, write_csv

PAIRS = [Pair(str(number), f"text {number}", f"rewrite {number}") for number in range(12)]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Attached]]:
    """A bundle of four adapters, and copies of their two bases."""
    folder = tmp_path_factory.mktemp("four")
    models, adapters = make_models(folder)
    return make_bundle(folder / "bundle", own_wheel(folder), adapters), models


def expected(models: list[Attached], folder: Path, rows: int) -> list[str]:
    """What the four sources of the example answer, asked here one after the other."""
    found: list[list[str]] = [[] for _ in range(rows)]
    pairs = [Pair(*row) for row in read_csv(ROOT / "examples" / "test.csv")[1 : rows + 1]]
    for model in models:
        for letter, template in (("a", get_template("instruct")), ("b", get_template(str(EXAMPLE / "winner.toml")))):
            adapter = folder / f"{model.path.name}-{letter}"
            loaded = model_spec("transformers", str(model.path), adapter, ["context=1024"]).load()
            asked = [Request(str(number), template.render(pair), Sampling(max_new_tokens=6))
                     for number, pair in enumerate(pairs)]  # fmt: skip
            for key, completions in loaded.generate(asked):
                assert isinstance(completions, list)
                found[int(key)].append(strip_invalid_utf8(template.parse(completions[0].text)))
    ended = (".", "!", "?")
    return [" ".join(text if text.endswith(ended) else f"{text}." for text in [*texts, CONSTANT]) for texts in found]


@pytest.mark.slow
def test_four_adapters_on_two_bases_answer_and_kills_change_nothing(
    four: tuple[Path, list[Attached]], tmp_path: Path
) -> None:
    made, models, kills = *four, 1
    outcome, answers = run(tmp_path / "run", made, models, 3, "nested", kills)
    assert outcome.problem == "", outcome.log
    assert outcome.report["fallbacks"] == 0
    assert [attempt["exit_code"] for attempt in outcome.report["attempts"]] == [-9] * kills + [0]
    assert list(answers.values()) == expected(models, made.parent, 3)


def test_the_bundle_of_several_adapters_is_flat_and_names_its_models(four: tuple[Path, list[Attached]]) -> None:
    made, _ = four
    contents = read_contents(made)
    assert contents["attach"] == [handle_of("gemma-7b-it"), handle_of("mistral-7b-it")]
    assert not [name for name in contents["files"] if "/" in name]
    assert {f"{name}.lora.adapter_config.json" for name in ("gemma-a", "gemma-b", "mistral-a", "mistral-b")} < set(
        contents["files"]
    )


def test_the_configuration_of_a_kernel_leads_to_models_and_adapters_in_both_layouts(
    four: tuple[Path, list[Attached]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, models = four
    table = write_csv(tmp_path / "table.csv", [("1", "a", "b")])
    for layout in ("flat", "nested"):
        root = tmp_path / layout / "kaggle"
        lay_out(root, layout, table, made, models)
        monkeypatch.setattr(kernel, "ROOT", root)
        place, scratch = kernel.find_bundle(), tmp_path / layout / "scratch"
        scratch.mkdir()
        settings = kernel.read_settings(place / kernel.SETTINGS)
        for gpus, bits in (([], "load_in_4bit=false"), ([15360, 15360], "load_in_4bit=true")):
            kernel.arguments(settings, place, gpus, 5, scratch, kernel.Report())
            content = (scratch / "recover.toml").read_text()
            assert content.count(f'"{bits}"') == 4
            assert f'adapter = "{scratch}/adapters/mistral-b"' in content
            assert f'template = "{place}/winner.toml"' in content
        base = "models/google/gemma/transformers/7b-it/3" if layout == "nested" else "gemma/transformers/7b-it/3"
        assert content.count(f'model = "{root}/input/{base}"') == 2
        assert sorted(path.name for path in (scratch / "adapters" / "gemma-a").iterdir())[0] == "README.md"


def test_a_gguf_adapter_with_a_name_is_a_file_and_no_model(tmp_path: Path) -> None:
    made = tmp_path / "bundle"
    made.mkdir()
    for name in ("base.gguf", "b.lora.gguf", "b.lora.gguf.run.json"):
        (made / name).write_bytes(b"GGUF")
    adapters = kernel.lay_out_adapters(made, tmp_path / "adapters")
    assert sorted(path.name for path in adapters.iterdir()) == ["b", "b.run.json"]
    assert (adapters / "b").is_file()
    assert [kernel.is_adapter(path, kernel.Settings()) for path in sorted(made.glob("*.gguf"))] == [True, False]


def test_adapters_are_told_apart_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    assert split_adapters([str(tmp_path / "a=b")]) == (tmp_path / "a=b", {})
    assert split_adapters(["x=one", "y=two"]) == (None, {"x": Path("one"), "y": Path("two")})
    with pytest.raises(UserError, match="two are called 'x'"):
        split_adapters(["x=one", "x=two"])
    with pytest.raises(UserError, match="--adapter NAME=one"):
        split_adapters(["one", "y=two"])
    with pytest.raises(UserError, match="letters, digits"):
        bundle(BundleConfig(tmp_path / "bundle", adapters={"../x": tmp_path / "a=b"}))


def test_copies_of_attached_models_go_to_their_handles(tmp_path: Path) -> None:
    gemma, mistral = handle_of("gemma-7b-it"), handle_of("mistral-7b-it")
    here = str(tmp_path)
    assert attached_copies([here, here], [gemma, mistral]) == [Attached(tmp_path, gemma), Attached(tmp_path, mistral)]
    assert attached_copies([f"mistral-7b-it={here}", here], [gemma, mistral]) == [
        Attached(tmp_path, mistral), Attached(tmp_path, gemma),
    ]  # fmt: skip
    assert [one.handle for one in attached_copies([here, f"gemma-7b-it={here}"], [gemma, mistral])] == [mistral, gemma]
    assert attached_copies([here], []) == [Attached(tmp_path)]
    with pytest.raises(UserError, match="given already"):
        attached_copies([f"gemma-7b-it={here}"] * 2, [gemma])
    with pytest.raises(UserError, match="--model gemma: "):
        attached_copies([f"gemma={here}"], [gemma])
    with pytest.raises(UserError, match="does not exist"):
        attached_copies(["nowhere"], [])
    with pytest.raises(UserError, match="short names are gemma-7b-it"):
        handle_of("gemma-7b")


# -- the strategy ---------------------------------------------------------------------------------------------


def scripted(name: str, *more: str, **keys: Any) -> dict[str, Any]:
    return {"name": name, "backend": "scripted", "settings": list(more), "n": 0, **keys}


def strategy(sources: list[dict[str, Any]], **options: Any) -> best_of:
    config = {"source": sources, "selector": "first", "near": 1.0, **options}
    return best_of(Setup(lambda: model_spec("scripted"), get_template("short"), config=config))


def answered(made: best_of, folder: Path, budget: Budget) -> list[Prediction]:
    roles = roles_of(made, Setup(lambda: model_spec("scripted"), get_template("short")))
    folder.mkdir(exist_ok=True)
    with open_models(roles, Log(folder / "calls.jsonl")) as models:
        return list(made(iter(PAIRS), models, budget))


@pytest.fixture
def answers(tmp_path: Path) -> list[str]:
    """Files of answers for two scripted sources."""
    names = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({f"{pair.id}/{n}": f"Make it {name} {pair.id}" for pair in PAIRS for n in (0, 1)}))
        names.append(f"answers={path}")
    return names


def test_on_a_gpu_each_model_is_loaded_once_and_alone_whatever_the_deadline(
    answers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    alive: list[int] = []
    opened: list[int] = []

    class Counted(Pool):
        def __init__(self, *arguments: Any) -> None:
            opened.append(len(alive))
            alive.append(1)
            super().__init__(*arguments)

        def close(self) -> None:
            if not self.closed:
                alive.pop()
            super().close()

    monkeypatch.setattr(handles, "Pool", Counted)
    made = strategy([scripted("a", answers[0], n=2), scripted("b", answers[1], n=2)])
    found = answered(made, tmp_path, Budget(time.monotonic() + 600))
    assert opened == [0, 0], "a model was loaded twice, or beside another one"
    assert {one.id for one in found} == {pair.id for pair in PAIRS}


def test_answers_of_all_sources_are_joined_and_a_constant_goes_behind_them(answers: list[str], tmp_path: Path) -> None:
    made = strategy([scripted("a", answers[0]), scripted("b", answers[1])], concat=2, constant="Improve it.")
    found = {one.id: one.text for one in answered(made, tmp_path, Budget())}
    assert found["7"] == "Make it a 7. Make it b 7. Improve it."


def test_what_one_source_answered_counts_when_the_next_one_hangs(answers: list[str], tmp_path: Path) -> None:
    write_csv(tmp_path / "test.csv", [(pair.id, pair.original_text, pair.rewritten_text) for pair in PAIRS])
    (tmp_path / "b.toml").write_text(
        'selector = "first"\nnear = 1.0\nconcat = 2\n'
        f'[[source]]\nname = "a"\nbackend = "scripted"\nn = 0\nsettings = ["{answers[0]}"]\n'
        f'[[source]]\nname = "b"\nbackend = "scripted"\nn = 0\nsettings = ["{answers[1]}", "hang_ids=0/0"]\n'
    )
    predict: Cli = runner("submission", tmp_path)
    done = predict("predict", "test.csv", "-o", "s.csv", "--recover", "ensemble.best_of:best_of", "--recover-config",
                   "b.toml", "--deadline", "10s", "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert done.summary["fallbacks"] == 0
    assert all(row[1].startswith(f"Make it a {row[0]}") for row in read_csv(tmp_path / "s.csv")[1:])


def test_a_source_that_cannot_be_loaded_is_left_out(
    answers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(Pool):
        def __init__(self, carrier: Any, *more: Any) -> None:
            if carrier._shares[0][0].options.batch == 7:
                raise UserError("a damaged adapter")
            super().__init__(carrier, *more)

    monkeypatch.setattr(handles, "Pool", Refusing)
    bad = scripted("bad", "batch=7")
    made = strategy([bad, scripted("a", answers[0])])
    found = {one.id: one.text for one in answered(made, tmp_path, Budget()) if one.status == "ok"}
    assert found["3"] == "Make it a 3"
    with pytest.raises(UserError, match="a damaged adapter"):
        answered(strategy([bad]), tmp_path / "alone", Budget())


def test_fitted_weights_are_a_selector_in_a_configuration_too(answers: list[str], tmp_path: Path) -> None:
    weights = {"name": "mine", "weights": {"longest": 1.0}, "seen": {"pairs": []}}
    (tmp_path / "w.json").write_text(json.dumps(weights))
    made = strategy([scripted("a", answers[0]), scripted("b", answers[1])], selector="mine",
                    weights=[str(tmp_path / "w.json")])  # fmt: skip
    assert len({one.id for one in answered(made, tmp_path, Budget())}) == len(PAIRS)
    with pytest.raises(UserError, match="unknown option 'weigths'"):
        strategy([scripted("a")], weigths=[])


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_turns_share_the_time_by_their_weights_and_pass_on_what_is_left() -> None:
    clock = Clock()
    turns = Turns(Budget(100.0, clock), [2.0, 1.0, 1.0])
    assert turns.next("a").left == pytest.approx(50)
    clock.now = 20  # the first one took less
    assert turns.next("b").left == pytest.approx(40)
    assert turns.next("c").left == pytest.approx(80)


def test_waves_grow_once_the_pace_is_known_and_samples_shrink_when_time_is_short() -> None:
    clock = Clock()
    pace = Pace(Budget(1000.0, clock), 1000.0, "a", most=8)
    assert pace.wave(1400) == 1  # loads the model
    pace.took(100.0, 1, 1.0)
    assert (pace.share(1399), pace.wave(1399)) == (1.0, 32)
    pace.took(32.0, 32, 1.0)  # a second a row
    clock.now = 132
    assert pace.share(1367) == pytest.approx((868 * 0.9 / 1367 - 0.4) / 0.6)  # two fifths are for the prompt
    assert pace.wave(1367) == int(868 / 8)
    assert pace.wave(20) == 20
    clock.now = 990
    assert pace.share(1000) == 0.0
    assert pace.wave(1000) == WAVE
    assert Pace(Budget(), float("inf"), "a").wave(10**6) == 10**6
