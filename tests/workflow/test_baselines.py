"""The three forms of a baseline: trained, published, and none; what each asks of the graph."""

import json
import re
from types import SimpleNamespace

import pytest
from dryrun import REPOSITORY, copy, counts
from whole_graph import LITTLE, ONE_ROUND, run_graph, write_models

from halfstep.config import BaselineOptions
from halfstep.errors import ConfigError
from halfstep.resolve import resolve, validate
from halfstep.workflow.sources import check_sources
from halfstep.workflow.targets import Targets

PRESETS = REPOSITORY / "workflow/presets"
NONE = {"judge": "gpt2", "lambada": "last_words", "lambada_items": 4, "bootstrap": 100}


def resolved(baseline, preset="ci", **keys):
    """The configuration of a preset with a baseline of its only teacher."""
    (name,) = resolve({"preset": preset}, PRESETS).teachers
    teachers = {name: {"baseline": baseline, **keys.pop("teacher", {})}}
    return resolve({"preset": preset, "teachers": teachers, **keys}, PRESETS)


def baseline_of(config):
    (teacher,) = config.teachers.values()
    return teacher.baseline


# The configuration


def test_null_is_none_and_nothing_is_the_default():
    assert baseline_of(resolved(None, evaluation=NONE)) is None
    assert baseline_of(resolved({})).num_steps == 12  # that of the preset
    about = {"corpus": "a", "network": {}}
    raw = {"corpora": {"a": {"kind": "openwebtext"}}, "teachers": {"t": about}}
    assert baseline_of(validate(raw)) == BaselineOptions()


def test_a_trained_and_a_published_baseline_replace_each_other():
    """In a layer above: their keys are never mixed."""
    assert baseline_of(resolved({"from": "gpt2"})).source == "gpt2"
    trained = baseline_of(resolved({"num_steps": 5000}, "owt-adapted"))
    assert trained == BaselineOptions(num_steps=5000) and trained.source is None
    assert baseline_of(resolved({"from": None}, "owt-adapted")) == BaselineOptions()
    assert baseline_of(resolved({}, "owt-adapted")).source == "gpt2"
    assert baseline_of(resolved({"from": "other"}, "owt-adapted")).source == "other"
    assert baseline_of(resolved({"num_steps": 9})).batch_size == 16  # merged with the preset's
    assert baseline_of(resolved(None, "owt-adapted")) is None


@pytest.mark.parametrize(
    ("baseline", "keys", "message"),
    [
        ({"from": "gpt2", "num_steps": 9}, {}, "baseline: found `from` and num_steps, but a pub"),
        ({"from": ""}, {}, "baseline.from: .*expected a name or a path"),
        (None, {}, "evaluation.judge: found baseline, but teachers.stories-ci.baseline is null"),
        (
            None,
            {"evaluation": NONE, "teacher": {"adapt": "baseline"}},
            "teachers.stories-ci.adapt: found baseline, but teachers.stories-ci.baseline is null",
        ),
        (
            {"from": "gpt2"},
            {"sampling": {"weights": "best"}},
            "sampling.weights is best, but teachers.stories-ci.baseline.from has no best weights",
        ),
        (
            {},
            {"teacher": {"network": {"architecture": "transformers"}}},
            "architecture: found transformers, which follows from `baseline: {from: gpt2}`",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(baseline, keys, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolved(baseline, **keys)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_a_fault_of_the_configuration(tmp_path):
    with pytest.raises(ConfigError, match=r"baseline.from: \./gone is not a folder; name a hub"):
        check_sources(resolved({"from": "./gone"}))
    check_sources(resolved({"from": str(tmp_path)}))


# The graph


def test_a_baseline_of_the_hub_is_fetched_for_its_own_job_alone(tmp_path):
    found = Targets(resolved({"from": "gpt2@main"}))
    wildcards = SimpleNamespace(teacher="stories-ci", model="stories-ci/teacher")
    assert found.sources.hub_repositories() == ["model:gpt2@main"]
    assert found.baseline_file(wildcards) == found.sources.source_of_hub("stories-ci") == []
    assert found.judges(wildcards) == ["results/models/stories-ci/baseline/hf"]
    local = Targets(resolved({"from": str(tmp_path)}))
    assert local.sources.hub_repositories() == []
    assert local.baseline_file(wildcards) == [f"{tmp_path}/config.json"]


def graph(workflow, baseline, **keys) -> set[str]:
    """All jobs of preset ci with a baseline, as `rule wildcard ...`."""
    words = ["preset=ci", f"teachers={json.dumps({'stories-ci': {'baseline': baseline}})}"]
    words += [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    return workflow.jobs("--config", *words)


def test_without_a_baseline_there_is_no_job_of_it(workflow):
    """And one figure less, which compares with it; all other jobs are there."""
    trained, without = (graph(workflow, form, evaluation=NONE) for form in ({}, None))
    assert without <= trained
    fewer = trained - without
    assert {"train_baseline stories-ci", "plot speedup_vs_batch"} <= fewer
    of_it = {job for job in trained if "baseline" in job}
    assert fewer == of_it | {"plot speedup_vs_batch"}
    assert {job.split()[0] for job in of_it} >= {"generate", "score_frontier", "score_lambada"}


def test_a_published_baseline_is_imported_and_not_trained(workflow, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    trained, published = graph(workflow, {}), graph(workflow, {"from": str(tmp_path)})
    assert trained - published == {"train_baseline stories-ci"}
    assert published - trained == {"import_baseline stories-ci"}
    repeated = json.dumps({"stories-ci": {"seeds": [1, 2], "baseline": {"from": str(tmp_path)}}})
    plan = workflow.plan("--config", "preset=ci", f"teachers={repeated}")
    assert counts(plan)["import_baseline"] == 1 and counts(plan)["pretrain"] == 2


# All commands of the graph, with one round


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("form", ["none", "published"])
def test_the_whole_graph(models, tmp_path, form):
    """Tables, figures, MLflow, records and a summary, with and without rows of a baseline.

    The commands that Snakemake prints run one after another in one process.
    """
    tree = copy(tmp_path)
    baseline = {"none": None, "published": {"from": str(models / "gpt2")}}[form]
    judge = {"none": str(models / "judge"), "published": "baseline"}[form]
    config = {
        "preset": "ci",
        "teachers": {"stories-ci": {**ONE_ROUND, "baseline": baseline}},
        "evaluation": {"judge": judge, "lambada_items": 4},
        **LITTLE,
    }
    results = run_graph(tree, config, "all", "summary", "verify")
    assert (results / "mlflow.synced").read_text() == ""
    tables = {file.stem: file.read_text() for file in results.glob("tables/*.csv")}
    assert len(tables) == 6
    for name, text in tables.items():
        wanted = form == "published" and name != "infilling"  # which a baseline cannot do
        assert ("stories-ci/baseline" in text) == wanted, name
    points = {file.stem: file.read_text() for file in results.glob("figures/*.csv")}
    assert ("speedup_vs_batch" in points) == (form == "published")
    for name, text in points.items():
        without = ("loss_curves", "accuracy_vs_parallelism")  # not trained here, nor filling in
        wanted = form == "published" and name not in without
        assert ("baseline" in text) == wanted, name
        if form == "none":
            assert "baseline" not in (results / f"figures/{name}.svg").read_text(), name
    if form == "published":
        rows = (results / "tables/speed.md").read_text()
        assert re.search("baseline, transformers", rows)
