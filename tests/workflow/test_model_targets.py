"""Names of models, their inputs and the files of the graph, computed without Snakemake."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from dryrun import REPOSITORY

from halfstep.config import Distillation
from halfstep.data.files import find_files
from halfstep.errors import ConfigError
from halfstep.resolve import resolve
from halfstep.workflow.sources import check_sources, local_file
from halfstep.workflow.targets import (
    Targets,
    one_of,
    teacher_name,
)

PRESETS = REPOSITORY / "workflow/presets"
TWO_RUNS = {
    "distillation": {"rounds": 2, "teacher_steps": 64},
    "runs": {"a": {}, "b": {"rounds": 1}, "kl_backward": None},
}


def targets(preset: str = "ci", **changes) -> Targets:
    return Targets(resolve({"preset": preset, **changes}, PRESETS))


def of_teacher(preset: str = "ci", **changes) -> Targets:
    """With changes of the only teacher of preset ci."""
    return targets(preset, teachers={"stories-ci": changes})


def test_models_are_named_by_teacher_run_and_round():
    found = of_teacher(**TWO_RUNS)
    rounds = [f"stories-ci/{name}" for name in ("a/round-1", "a/round-2", "b/round-1")]
    assert found.denoisers == ["stories-ci/teacher", *rounds]
    assert found.models == ["stories-ci/baseline", *found.denoisers]
    assert (found.trained, found.imported) == (["stories-ci"], [])
    imported = of_teacher(**{"from": "kuleshov-group/mdlm-owt"})
    assert (imported.trained, imported.imported) == ([], ["stories-ci"])


@pytest.mark.parametrize("preset", sorted(file.stem for file in PRESETS.glob("*.yaml")))
def test_every_preset_names_each_model_once(preset):
    found = targets(preset)
    assert len(set(found.models)) == len(found.models)
    pattern = re.compile(one_of(found.models))
    for model in found.models:
        assert pattern.fullmatch(model) and not pattern.fullmatch(model + "0")
        wildcards = SimpleNamespace(model=model)
        assert found.teacher(wildcards) is found.config.teachers[teacher_name(wildcards)]
        assert found.step_counts(model) == sorted(set(found.step_counts(model)))


def test_a_pattern_of_no_names_matches_nothing():
    assert re.fullmatch(one_of(["a.b"]), "a.b") and not re.fullmatch(one_of(["a.b"]), "axb")
    assert not re.search(one_of([]), "") and not re.search(one_of([]), "a")


def test_a_job_belongs_to_its_wildcards_teacher():
    assert teacher_name(SimpleNamespace(teacher="t", run="r")) == "t"
    assert teacher_name(SimpleNamespace(model="t/r/round-1")) == "t"


def test_each_round_learns_from_the_one_before():
    def before(round: str) -> str:
        return found.previous_round(SimpleNamespace(teacher="t", run="r", round=round))

    found = targets()
    assert before("1") == "results/models/t/teacher/meta.json"
    assert before("2") == "results/models/t/r/round-1/meta.json"
    assert before("10") == "results/models/t/r/round-9/meta.json"


def test_options_of_a_round_do_not_depend_on_later_rounds():
    wildcards = SimpleNamespace(teacher="stories-ci", run="kl_backward", round="2")
    few = of_teacher(distillation={"rounds": 2}).round_options(wildcards)
    many = of_teacher(distillation={"rounds": 7}).round_options(wildcards)
    assert few == many and few.rounds == 2


def test_own_step_counts_are_where_a_round_meets_its_teacher():
    """A model of S steps is scored at S and at its student's S / substeps; the last has none."""
    found = targets(sampling={"steps": ["own", 5]}, teachers={"stories-ci": TWO_RUNS})
    assert found.step_counts("stories-ci/teacher") == [5, 32, 64]
    assert found.step_counts("stories-ci/a/round-1") == [5, 16, 32]
    assert found.step_counts("stories-ci/a/round-2") == [5, 16]
    assert found.step_counts("stories-ci/b/round-1") == [5, 32]


def test_a_baseline_takes_one_step_for_each_token():
    found = targets()
    assert found.step_counts("stories-ci/baseline") == [128]
    assert found.continuation_steps("stories-ci/baseline") == [16]
    assert found.continuation_steps("stories-ci/teacher") == [8]


@pytest.mark.parametrize("rounds, continued", [
    (None, ["baseline", "teacher", "a/round-1", "a/round-2", "b/round-1"]),
    ([0], ["baseline", "teacher"]),
    ([2], ["baseline", "a/round-2"]),
    ([0, 1], ["baseline", "teacher", "a/round-1", "b/round-1"]),
])  # fmt: skip
def test_chosen_rounds_continue_prompts(rounds, continued):
    changes = {"teachers": {"stories-ci": TWO_RUNS}}
    found = targets(continuations={"continuation_rounds": rounds}, **changes)
    assert found.continued_models() == [f"stories-ci/{name}" for name in continued]


SWEEP = {"steps": [4, 8, "own"], "temperature": 0.9, "temperatures": [1.1, 0.9, 0.7]}


@pytest.mark.parametrize("rounds, swept", [
    (None, ["baseline", "teacher", "a/round-2", "b/round-1"]),
    ([1], ["baseline", "a/round-1", "b/round-1"]),
])  # fmt: skip
def test_models_and_samples_of_the_frontier(rounds, swept):
    """The samples at `temperature` are those of all other tables, and are not drawn again."""
    changes = {"teachers": {"stories-ci": TWO_RUNS}}
    found = targets(sampling=SWEEP | {"frontier_rounds": rounds}, **changes)
    assert found.frontier_models() == [f"stories-ci/{name}" for name in swept]
    inputs = [f"results/metrics/stories-ci/{name}/frontier.json" for name in swept]
    assert found.table_inputs()["temperatures"] == inputs
    assert found.config.sampling.other_temperatures == [0.7, 1.1]
    folder, at = "results/samples/stories-ci/a/round-2", "temperature"
    assert found.frontier_folders("stories-ci/a/round-2") == [
        one
        for n in (4, 8)
        for one in (
            f"{folder}/steps-{n}",
            *(f"{folder}/frontier/steps-{n}/{at}-{value}" for value in (0.7, 1.1)),
        )
    ]
    assert found.frontier_steps("stories-ci/baseline") == found.step_counts("stories-ci/baseline")
    of_teacher = ["results/metrics/stories-ci/teacher/frontier.json"] if rounds is None else []
    assert found.frontier_of_teacher("stories-ci/b/round-1") == of_teacher
    assert found.frontier_of_teacher("stories-ci/teacher") == []
    assert found.frontier_of_teacher("stories-ci/baseline") == []


def test_without_temperatures_there_is_no_frontier():
    found = targets(sampling={"temperatures": []})
    assert found.frontier_models() == []
    assert "temperatures" not in found.table_inputs()
    assert "frontier" not in found.figure_inputs()


@pytest.mark.parametrize("keys, words", [
    ({"temperatures": [1]}, "found only 1, which is `temperature` too"),
    ({"temperatures": [0]}, "should be greater than 0"),
    ({"temperatures": [], "frontier_steps": [8]}, "frontier_steps is used only with temp"),
    ({"temperatures": [], "frontier_rounds": [1]}, "frontier_rounds is used only with temp"),
    ({"temperatures": [0.7], "steps": ["own"]}, "found none, and steps has no number"),
])  # fmt: skip
def test_a_frontier_that_cannot_be_is_a_fault_of_the_configuration(keys, words):
    with pytest.raises(ConfigError, match=f"sampling.*{words}"):
        targets(sampling=keys)


def test_the_frontier_may_have_step_counts_of_its_own():
    """They are sampled at the main temperature too. A model that is on the frontier alone is
    sampled at these counts alone."""
    found = targets(sampling={"steps": [8], "temperatures": [0.7], "frontier_steps": [4]})
    assert found.step_counts("stories-ci/teacher") == [8]
    folder = "results/samples/stories-ci/teacher"
    assert found.frontier_folders("stories-ci/teacher") == [
        f"{folder}/steps-4",
        f"{folder}/frontier/steps-4/temperature-0.7",
    ]
    assert found.drawn_steps("stories-ci/teacher") == [4, 8]
    changes = {"steps": [8], "temperatures": [0.7], "frontier_steps": [4], "rounds": [1]}
    found = targets(sampling=changes)
    assert found.drawn_steps("stories-ci/teacher") == [4]
    assert found.drawn_steps(found.denoisers[1]) == [8]


NOISE = {"sampler": "ancestral_float32"}
COLD = {"temperature": 0.7, "steps": [4], "rounds": [0]}


def test_a_variant_draws_the_chosen_models_again():
    """The baseline too, unless only the sampler differs, of which it has none."""
    teachers = {"stories-ci": TWO_RUNS}
    sampling = {"steps": [8, "own"], "top_p": 0.9, "variants": {"noise": NOISE, "cold": COLD}}
    found = targets(sampling=sampling, teachers=teachers)
    drawn = [*(f"{model}/noise" for model in found.denoisers), "stories-ci/baseline/cold"]
    assert list(found.varied) == [*drawn, "stories-ci/teacher/cold"]
    scored = [f"{name}/samples.json" for name in (*found.varied, *found.sampled_models())]
    scored += [f"{name}/frontier.json" for name in found.on_frontier]
    rows = {f"results/metrics/{file}" for file in (*scored, "stories-ci/data.json")}
    assert set(found.table_inputs()["variants"]) == rows
    for model in found.denoisers:
        plain, noise = SimpleNamespace(model=model), SimpleNamespace(model=f"{model}/noise")
        assert found.checkpoint(noise) == found.checkpoint(plain)
        assert found.drawn_steps(noise.model) == found.step_counts(noise.model)
        assert found.step_counts(noise.model) == found.step_counts(model)
        assert found.config.sampling.changed_by(found.sampling(noise)) == NOISE.keys()
        assert (found.variant_flag(plain), found.variant_flag(noise)) == ("", "--variant noise")
    assert found.step_counts("stories-ci/teacher/cold") == [4]
    assert found.sampling(SimpleNamespace(model="stories-ci/baseline/cold")).top_p == 0.9


def test_variants_are_on_the_frontier_with_their_models():
    """At their own step counts, or those of the frontier, and around their own temperature. One
    that changes only the temperature is a point of its model's curve."""
    variants = {
        "noise": NOISE,
        "cold": COLD,
        "asked": {"sampler": "energy", "temperature": 1.1, "steps": [16], "rounds": [0, 1]},
    }
    changes = TWO_RUNS | {"seeds": [1, 2]}
    sampling = SWEEP | {"frontier_steps": [4], "variants": variants}
    found = targets(sampling=sampling, teachers={"stories-ci": changes})
    named = set(found.frontier_models()) - {"stories-ci/baseline"}
    assert "stories-ci-seed-2/a/round-2" in named and "stories-ci/a/round-1" not in named
    asked = {f"{name}/asked" for name in named if name[-1] != "2" or name.endswith("b/round-1")}
    # The baseline is drawn again at another temperature, and has no sampler.
    expected = {f"{name}/noise" for name in named} | asked | {"stories-ci/baseline/asked"}
    assert set(found.varied_frontier) == expected < set(found.varied)
    assert len(found.on_frontier) == len(set(found.on_frontier))
    noise, asked = "stories-ci/a/round-2/noise", "stories-ci/teacher/asked"
    assert (found.frontier_steps(noise), found.frontier_steps(asked)) == ([4], [16])
    assert found.drawn_steps(noise) == found.drawn_steps("stories-ci/a/round-2")
    assert found.drawn_steps(asked) == [16]
    assert found.other_temperatures(noise) == [0.7, 1.1]
    folder = f"results/samples/{asked}"
    assert found.frontier_folders(asked) == [
        f"{folder}/steps-16",
        f"{folder}/frontier/steps-16/temperature-0.7",
        f"{folder}/frontier/steps-16/temperature-0.9",
    ]
    assert found.frontier_of_teacher("stories-ci/a/round-2") != []
    assert found.frontier_of_teacher(noise) == found.frontier_of_teacher(asked) == []
    tables, file = found.table_inputs(), "results/metrics/{}/frontier.json"
    curves = [row for row in tables["variants"] if row.endswith("frontier.json")]
    assert set(curves) == {*map(file.format, found.on_frontier)}
    assert tables["temperatures"] == [file.format(name) for name in found.frontier_models()]


@pytest.mark.parametrize("sampler", ["energy", "speculative"])
def test_a_variant_whose_sampler_asks_a_scorer_needs_the_baseline(sampler):
    """By default that of its teacher, which is then an input and a flag; nothing else needs it."""
    variants = {"asked": {"sampler": sampler}, "noise": NOISE}
    found = targets(sampling={"variants": variants})
    for model in found.denoisers:
        asked, noise, plain = (
            SimpleNamespace(model=name) for name in (f"{model}/asked", f"{model}/noise", model)
        )
        assert found.scorer(asked) == ["results/models/stories-ci/baseline/meta.json"]
        assert found.sampling(asked).scorer == "results/models/stories-ci/baseline"
        assert found.scorer(noise) == found.scorer(plain) == []
        assert found.sampling(plain).scorer is None
    other = {"asked": {"sampler": sampler, "scorer": "elsewhere/baseline"}}
    found = targets(sampling={"variants": other})
    asked = SimpleNamespace(model="stories-ci/teacher/asked")
    assert found.sampling(asked).scorer == "elsewhere/baseline" and found.scorer(asked) == []


def test_a_scorer_that_is_not_there_is_a_fault_of_the_configuration():
    variants = {"asked": {"sampler": "energy"}}
    teachers = {"stories-ci": {"baseline": None}}
    evaluation = {"judge": "gpt2"}
    words = r"sampling\.variants\.asked\.sampler: found energy, .* baseline: null; give it a"
    with pytest.raises(ConfigError, match=words) as error:
        targets(sampling={"variants": variants}, teachers=teachers, evaluation=evaluation)
    assert len(str(error.value).splitlines()) == 1
    variants["asked"]["scorer"] = "elsewhere/baseline"
    targets(sampling={"variants": variants}, teachers=teachers, evaluation=evaluation)


def test_a_variant_with_another_sampler_has_none_of_the_options_of_the_first():
    """One with the same sampler has them, and any other option of the section."""
    section = {"sampler": "threshold", "threshold": 0.7, "num_samples": 5}
    variants = {"plain": {"sampler": "remask"}, "sure": {"temperature": 0.9}}
    found = targets(sampling=section | {"variants": variants}).config.sampling.variants
    assert (found["plain"].threshold, found["sure"].threshold) == (None, 0.7)
    assert found["plain"].num_samples == found["sure"].num_samples == 5


@pytest.mark.parametrize("variant", [
    {"sampler": "threshold", "threshold": 0.7},
    {"sampler": "energy", "candidates": 3},
    {"sampler": "remask", "remasking": "loop", "by_confidence": True},
])  # fmt: skip
def test_the_baseline_is_not_drawn_again_for_a_sampler_and_its_options(variant):
    found = targets(sampling={"variants": {"other": variant}})
    assert list(found.varied) == [f"{model}/other" for model in found.denoisers]
    found = targets(sampling={"variants": {"other": variant | {"sampling_seed": 9}}})
    assert "stories-ci/baseline/other" in found.varied
    baseline = found.sampling(SimpleNamespace(model="stories-ci/baseline/other"))
    assert (baseline.sampler, baseline.scorer, baseline.sampling_seed) == ("ancestral", None, 9)


@pytest.mark.parametrize("variants, words", [
    ({"plain": {"num_samples": 8}}, "variants.plain: found no option of the draws that differs"),
    ({"plain": None}, "variants.plain: found no option of the draws that differs"),
    ({"frontier": NOISE}, "cannot be called frontier"),
    ({"steps-8": NOISE}, "cannot be called steps-8"),
    ({"noise": {"sampler": "exact"}}, r"variants\.noise\.sampler: found 'exact'"),
    ({"noise": {"temperatures": [0.7]}}, r"variants\.noise\.temperatures: .*unknown key"),
    ({"late": {"sampler": "first_hitting", "steps": [4096]}}, r"variants\.late\.steps"),
])  # fmt: skip
def test_a_variant_that_cannot_be_is_a_fault_of_the_configuration(variants, words):
    with pytest.raises(ConfigError, match=f"sampling.*{words}"):
        targets(sampling={"variants": variants})


def test_a_fault_that_a_variant_inherits_is_told_once():
    with pytest.raises(ConfigError) as error:
        targets(sampling={"steps": [0.5], "variants": {"noise": NOISE}})
    assert len(str(error.value).splitlines()) == 1


def test_without_continuations_there_are_none():
    found = targets(continuations=None)
    assert found.continued_models() == []
    assert "continuations" not in found.table_inputs()
    assert "mauve_vs_steps" not in found.figure_inputs()


def test_the_baseline_judges_from_its_folder():
    wildcards = SimpleNamespace(model="stories-ci/teacher")
    both = targets(evaluation={"judge": ["gpt2", "baseline"]})
    folder = "results/models/stories-ci/baseline/hf"
    assert both.judge_file(wildcards) == [f"{folder}/config.json"]
    assert both.judges(wildcards) == ["gpt2", folder]
    other = targets(evaluation={"judge": "gpt2"})
    assert (other.judge_file(wildcards), other.judges(wildcards)) == ([], ["gpt2"])


def test_own_text_is_found_by_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "d.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    corpus = {"kind": "files", "files": ["*.txt", "deep/**/*.txt"], "num_documents": None}
    lambada = {"lambada": "words.jsonl"}
    found = targets(corpora={"stories-ci": corpus}, evaluation=lambada)
    own = found.own_text(SimpleNamespace(corpus="stories-ci"))
    assert own == ["a.txt", "b.txt", "deep/er/c.txt"]
    assert found.sources.last_words() == ["words.jsonl"] and targets().sources.last_words() == []


def test_what_the_hub_must_provide(tmp_path, monkeypatch):
    """Nothing for preset ci; of other names those that are no folder or file of this machine."""
    monkeypatch.chdir(tmp_path)
    assert targets().sources.hub_repositories() == []
    names = ["arc_challenge", "arc_easy", "hellaswag", "mathqa", "piqa", "winogrande"]
    fetched = targets("owt-small").sources.hub_repositories()
    assert [name for name in fetched if not name.startswith("parquet:")] == [
        "dataset:EleutherAI/lambada_openai",
        "dataset:Skylion007/openwebtext",
        "model:gpt2",
        "model:gpt2-large",
        *(f"task:{name}" for name in names),
    ]
    assert "parquet:Salesforce/wikitext:wikitext-103-raw-v1/validation" in fetched
    published = of_teacher(**{"from": "kuleshov-group/mdlm-owt"})
    assert published.sources.hub_repositories() == ["model:kuleshov-group/mdlm-owt"]
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "teacher[1].ckpt").write_text("")
    assert "model:gpt2" not in targets("owt-small").sources.hub_repositories()
    assert of_teacher(**{"from": "teacher[1].ckpt"}).sources.hub_repositories() == []
    assert local_file("teacher[1].ckpt") == ["teacher[1].ckpt"] and local_file("absent") == []


def test_where_the_weights_that_training_starts_from_come_from(tmp_path, monkeypatch):
    """The baseline of the graph, a checkpoint, a folder of transformers, a file, or the hub."""
    monkeypatch.chdir(tmp_path)
    own = "results/models/stories-ci/baseline"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").write_text("{}")
    wildcards = SimpleNamespace(teacher="stories-ci")
    for adapt, source, files, hub in (
        ("baseline", own, [f"{own}/meta.json"], []),
        ("results/models/b/baseline", None, ["results/models/b/baseline/meta.json"], []),
        ("./gpt2", None, ["./gpt2/meta.json"], []),
        ("mine", None, ["mine/config.json"], []),
        ("gpt2", None, [], ["model:gpt2"]),
        ("distilbert/distilgpt2@main", None, [], ["model:distilbert/distilgpt2@main"]),
    ):
        found = of_teacher(adapt=adapt)
        assert found.start(wildcards) == ["--adapt", source or adapt]
        assert found.start_file(wildcards) == files
        assert found.sources.hub_repositories() == hub
    for name, files, hub in (
        ("hf:mine", ["mine"], []),
        ("mine", ["mine"], []),
        ("hf:answerdotai/ModernBERT-base", [], ["model:answerdotai/ModernBERT-base"]),
        ("kuleshov-group/mdlm-owt", [], ["model:kuleshov-group/mdlm-owt"]),
    ):
        found = of_teacher(**{"from": name, "fine_tune": True, "from_weights": "raw"})
        assert found.start(wildcards) == ["--from", name, "--from-weights", "raw"]
        assert found.start_file(wildcards) == files
        assert found.sources.hub_repositories() == hub
        assert (found.trained, found.imported) == (["stories-ci"], [])
    assert of_teacher().start(wildcards) == of_teacher().start_file(wildcards) == []


def test_tables_gather_the_rows_of_all_models():
    found = targets()
    tables, models = found.table_inputs(), found.models
    rows = [f"results/metrics/{model}/samples.json" for model in models]
    of_corpus = [f"results/metrics/stories-ci/{name}.json" for name in ("naive/samples", "data")]
    assert tables["steps"] == [*rows, *of_corpus]
    of_jobs = [f"stories-ci/{name}" for name in ("baseline", "teacher", "kl_backward")]
    assert tables["lambada"] == [f"results/metrics/{name}/lambada.json" for name in of_jobs]
    assert [model for name in of_jobs for model in found.last_words[name]] == models
    assert tables["speed"] == ["results/benchmarks/stories-ci/trained/length-16-128.json"]
    assert not {"tasks", "zero_shot"} & tables.keys()
    asked = targets(evaluation={"tasks": "piqa", "perplexity": ["ptb"]})
    final = ["baseline", "teacher", "kl_backward/round-7"]
    for name in ("tasks", "zero_shot"):
        files = [f"results/metrics/stories-ci/{model}/{name}.json" for model in final]
        assert asked.table_inputs()[name] == files
    continued = [f"stories-ci/{name}" for name in ("baseline", "kl_backward/round-7")]
    assert tables["continuations"] == [
        f"results/metrics/{model}/continuations.json" for model in continued
    ]


def test_written_answers_have_step_counts_and_the_sampler_of_the_samples():
    """Without step counts a job has the flags of older results, so these stay."""
    names = ["baseline", "teacher", "kl_backward/round-7"]
    jobs = [SimpleNamespace(model=f"stories-ci/{name}") for name in names]
    for found in (targets(), targets(sampling={"sampler": "threshold", "num_samples": 8})):
        assert [found.answering(job) for job in jobs] == [[], [], []]
        assert [found.answer_scorer(job) for job in jobs] == [[], [], []]
    sampling = {"sampler": "energy", "temperature": 0.9, "precision": "bfloat16"}
    evaluation = {"tasks": ["gsm8k"], "task_steps": [64, 16, "own"]}
    found = targets(sampling=sampling, evaluation=evaluation)
    own = found.config.teachers["stories-ci"].runs["kl_backward"].teacher_steps
    scorer = "results/models/stories-ci/baseline"
    energy = f"--sampler energy --scorer {scorer}"
    counts = [sorted({16, 64, own, own // 2}), sorted({16, 64, own // 2**7})]
    assert [found.answering(job) for job in jobs] == [
        [],
        *([f"--steps {' '.join(map(str, steps))}", energy] for steps in counts),
    ]
    files = [[], [f"{scorer}/meta.json"], [f"{scorer}/meta.json"]]
    assert [found.answer_scorer(job) for job in jobs] == files
    assert "task_accuracy_vs_steps" in found.figure_inputs()
    with pytest.raises(ConfigError, match="task_steps: found step counts, but no tasks"):
        targets(evaluation={"task_steps": [8]})


def test_denoisers_fill_in_positions_in_all_ways_to_draw():
    """Those that are sampled, in all rounds of a variant; an autoregressive model cannot."""
    variants = {"sure": {"sampler": "threshold", "rounds": [7]}, "cold": {"temperature": 0.9}}
    sampling = {"rounds": [0, 7], "variants": variants}
    found = targets(sampling=sampling)
    last = "stories-ci/kl_backward/round-7"
    models = ["stories-ci/teacher", last]
    expected = [*models, f"{last}/sure", *(f"{model}/cold" for model in models)]
    assert found.infilled() == expected and "stories-ci/baseline/cold" in found.varied
    files = [f"results/metrics/{name}/infilling.json" for name in expected]
    assert found.table_inputs()["infilling"] == files
    without = targets(sampling=sampling, evaluation={"infilling_items": None})
    assert without.infilled() == [] and "infilling" not in without.table_inputs()


def test_figures_are_drawn_from_tables_of_the_same_graph():
    for found in (targets(), targets(continuations=None)):
        tables = {f"results/tables/{name}.csv" for name in found.table_inputs()}
        journals = {f"results/models/{model}/journal.jsonl" for model in found.models}
        for inputs in found.figure_inputs().values():
            assert set(inputs) <= tables or set(inputs) == journals


def test_the_workflow_starts_without_torch_or_pandas():
    names = ("workflow.machine", "workflow.messages", "workflow.targets", "commands.plan")
    modules = ", ".join(f"halfstep.{name}" for name in names)
    code = f"import sys, {modules}; print(*{{'torch', 'pandas', 'numpy'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def own_text_config(**keys):
    corpus = {"kind": "files", "num_documents": None} | keys
    return {"corpora": {"stories-ci": corpus}, "evaluation": {"lambada": "items.jsonl"}}


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A folder with texts whose names are odd, one of them in the home folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for name in ("a[1].txt", "a1.txt", "b{c}.txt", "home/x.txt", "items.jsonl"):
        (tmp_path / name).write_text('{"text": "a b"}\n')
    return tmp_path


def test_the_rule_and_the_reader_expand_patterns_alike(texts):
    patterns = ["a[1].txt", "~/*.txt", "?1.txt"]
    found = targets(**own_text_config(files=patterns))
    own = found.own_text(SimpleNamespace(corpus="stories-ci"))
    assert own == sorted(map(str, find_files(patterns)))
    assert sorted(own) == sorted(["a[1].txt", f"{texts}/home/x.txt", "a1.txt"])
    check_sources(found.config)


def test_pairs_and_their_tokenizer_in_the_graph(texts):
    """The tokenizer is of the hub or a folder; samples answer held-out prompts."""
    Path("pairs.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    keys = {"kind": "pairs", "files": ["pairs.jsonl"], "vocab_size": 8192}
    config = own_text_config(**keys, tokenizer="hf:own/llama@main") | {"continuations": None}
    found = targets(**config)
    assert found.sources.corpus_of_hub("stories-ci") == ["model:own/llama@main"]
    assert "model:own/llama@main" in found.sources.hub_repositories()
    manifest = "results/data/stories-ci/manifest.json"
    for model in ("stories-ci/teacher", "stories-ci/kl_backward/round-2", "stories-ci/baseline"):
        assert found.pairs(SimpleNamespace(model=model)) == [manifest]
    assert targets().pairs(SimpleNamespace(model="stories-ci/teacher")) == []
    Path("here").mkdir()
    local = targets(**own_text_config(**keys, tokenizer="hf:here"))
    assert local.sources.corpus_of_hub("stories-ci") == []
    check_sources(local.config)


def test_a_pattern_with_braces_is_a_fault_of_the_configuration(texts):
    with pytest.raises(
        ConfigError, match="corpora.stories-ci.files.0: found .*braces are not expanded"
    ):
        targets(**own_text_config(files=["{a,b}.txt"]))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (
            {"files": ["no*.txt"]},
            "corpora.stories-ci.files: 'no.*' matches nothing; check the path",
        ),
        ({"files": ["home"]}, "corpora.stories-ci.files: home is a folder; name its files"),
        ({"files": ["b*.txt"]}, r"corpora.stories-ci.files: found 'b\{c\}.txt': .* wildcard"),
        (
            {"files": ["a1.txt"], "tokenizer": "~/gpt2", "vocab_size": 8192},
            "corpora.stories-ci.tokenizer: ~/gpt2 is not a folder",
        ),
        (
            {"files": ["a1.txt"], "tokenizer": "hf:./gone", "vocab_size": 8192},
            "corpora.stories-ci.tokenizer: ./gone is not a folder",
        ),
    ],
)
def test_a_source_that_is_not_there_is_a_fault_of_the_configuration(texts, keys, sentence):
    config = targets(**own_text_config(**keys)).config
    with pytest.raises(ConfigError, match=sentence):
        check_sources(config)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("gone.jsonl", "evaluation.lambada: gone.jsonl cannot be read"),
        ("a1.txt", "evaluation.lambada: a1.txt has an unknown suffix; expected .jsonl or"),
        ("./items", "evaluation.lambada: ./items has an unknown suffix"),
    ],
)
def test_so_is_a_file_of_last_words(texts, name, sentence):
    config = own_text_config(files=["a1.txt"]) | {"evaluation": {"lambada": name}}
    with pytest.raises(ConfigError, match=sentence):
        check_sources(targets(**config).config)


def test_a_repeat_of_a_teacher_is_a_model_with_its_own_seeds():
    """Trained with a seed of the list; the corpus, the judge and the origin are the first's."""
    found = of_teacher(**TWO_RUNS, seeds=[5, 2], adapt="baseline")
    first = ["teacher", "a/round-1", "a/round-2", "b/round-1"]
    names = ("stories-ci", "stories-ci-seed-2")
    assert sorted(found.denoisers) == sorted(f"{name}/{m}" for name in names for m in first)
    assert found.models == ["stories-ci/baseline", *found.denoisers]
    assert (found.teachers, found.trained) == (["stories-ci"], list(names))
    folder = "results/models/stories-ci/baseline"
    for name, seed, draws in zip(names, (5, 2), (1, 3), strict=True):
        wildcards = SimpleNamespace(teacher=name, run="a", round="2", model=f"{name}/a/round-2")
        assert found.training_seed(SimpleNamespace(teacher=name)) == seed
        assert found.training_seed(wildcards) == seed
        assert found.sampling(wildcards).sampling_seed == draws
        assert found.previous_round(wildcards) == f"results/models/{name}/a/round-1/meta.json"
        assert found.manifest(wildcards) == "results/data/stories-ci/manifest.json"
        assert found.start_file(wildcards) == [f"{folder}/meta.json"]
        assert found.judges(wildcards) == [f"{folder}/hf"]


def test_a_repeat_of_a_run_is_trained_from_the_same_teacher():
    runs = {"a": {"seeds": [1, 4]}, "b": {}, "kl_backward": None}
    found = of_teacher(distillation={"rounds": 1}, runs=runs)
    rounds = [f"stories-ci/{run}/round-1" for run in ("a", "a-seed-4", "b")]
    assert found.denoisers == ["stories-ci/teacher", *rounds]
    for run, seed in (("a", 1), ("a-seed-4", 4), ("b", 1)):
        wildcards = SimpleNamespace(teacher="stories-ci", run=run, round="1")
        assert found.training_seed(wildcards) == seed
        assert found.previous_round(wildcards) == "results/models/stories-ci/teacher/meta.json"
        assert type(found.round_options(wildcards)) is Distillation  # without `seeds`


def test_repeats_are_scored_at_the_same_steps_and_continued():
    sampling = {"steps": ["own", 5]}
    changes = {"sampling": sampling, "continuations": {"continuation_rounds": [0, 2]}}
    of_run = {**TWO_RUNS, "runs": {"a": {"seeds": [1, 2]}, "kl_backward": None}}
    found = targets(**changes, teachers={"stories-ci": of_run})
    assert found.step_counts("stories-ci/a-seed-2/round-1") == [5, 16, 32]
    of_teacher = targets(**changes, teachers={"stories-ci": {**TWO_RUNS, "seeds": [1, 2]}})
    assert of_teacher.step_counts("stories-ci-seed-2/teacher") == [5, 32, 64]
    continued = {f"stories-ci-seed-2/{name}" for name in ("teacher", "a/round-2")}
    assert continued == {name for name in of_teacher.continued_models() if "seed" in name}


def test_without_seeds_the_top_level_seed_trains_everything():
    found = of_teacher(**TWO_RUNS)
    wildcards = SimpleNamespace(
        teacher="stories-ci", run="a", round="1", model="stories-ci/teacher"
    )
    assert (
        found.training_seed(wildcards) == 1 and found.sampling(wildcards) == found.config.sampling
    )
    nine = targets(seed=9, teachers={"stories-ci": TWO_RUNS})
    assert nine.training_seed(wildcards) == 9


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seeds": [1, 1]}, "seeds: found .*: expected every seed once; remove the others"),
        ({"seeds": []}, "seeds: found .*at least 1 item"),
        ({"seeds": [0]}, "seeds.0: found 0: .*greater than or equal to 1"),
        ({"seeds": 3}, "seeds: found 3: .*valid list"),
        ({"runs": {"a-seed-2": {}}}, "a run cannot be called a-seed-2: .*choose another name, or"),
        (
            {"seeds": [1, 2], "from": "kuleshov-group/mdlm-owt"},
            "teachers.stories-ci: found `from` and `seeds`.* give the seeds to its runs",
        ),
        (
            {"seeds": [1, 2], "runs": {"kl_backward": {"seeds": [3]}}},
            r"runs.kl_backward.seeds: found \[3\], but .*repeat its runs too; leave one",
        ),
    ],
)
def test_seeds_that_repeat_nothing_are_refused(changes, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        of_teacher(**changes)
    assert "\n" not in str(caught.value)


def test_a_teacher_is_not_called_as_a_repeat():
    with pytest.raises(ConfigError, match="a teacher cannot be called mine-seed-2: repeats of"):
        targets(teachers={"mine-seed-2": {"corpus": "stories-ci", "network": {"size": "tiny"}}})
