"""Runs whose students are published: the jobs, the faults, and a whole small graph for real."""

import json
import re
from types import SimpleNamespace

import pytest
from dryrun import REPOSITORY, copy
from hub_files import MDLM, folder, lightning, networks
from whole_graph import run_graph

from halfstep.checkpoint import read_meta
from halfstep.data.windows import read_manifest
from halfstep.errors import ConfigError
from halfstep.report.rows import read_table
from halfstep.resolve import resolve
from halfstep.workflow.sources import check_sources
from halfstep.workflow.targets import Targets

PRESETS = REPOSITORY / "workflow/presets"
HUB = "jdeschena/sdtt@baselines_kld_step_<round>0000"
KLD = {"from": HUB, "teacher_steps": 1024, "rounds": 2}


def targets(**teacher) -> Targets:
    changes = {"continuations": None, "teachers": {"stories-ci": teacher}}
    changes["evaluation"] = {"judge": "gpt2"}
    return Targets(resolve({"preset": "ci", **changes}, PRESETS))


def test_a_run_may_be_published_and_another_trained(workflow):
    """Import takes the place of distillation where it is asked for, and of nothing else."""
    runs = {"kld": KLD, "kl_backward": {"rounds": 1}}
    teachers = json.dumps({"stories-ci": {"runs": runs}, "b": OTHER})
    settings = ("--config", "preset=ci", f"teachers={teachers}", "continuations=null")
    jobs = workflow.jobs(*settings)
    made = {job for job in jobs if job.split()[0] in ("distill_round", "import_round")}
    assert made == {
        "import_round stories-ci/kld/round-1",
        "import_round stories-ci/kld/round-2",
        "distill_round stories-ci kl_backward 1",
        "distill_round b kld 1",  # of the same name, and trained
    }
    assert "pretrain stories-ci" in jobs and "import_teacher stories-ci" not in jobs
    target = "results/models/stories-ci/kld/round-2/meta.json"
    command = workflow.plan("-p", target, *settings).replace("\\\n", " ")
    call = " ".join(re.search(r"halfstep import (.*?) 2>&1", command)[1].split())
    assert call == (
        "--source jdeschena/sdtt@baselines_kld_step_20000 --corpus results/data/stories-ci "
        "--output results/models/stories-ci/kld/round-2 --size tiny --round 2 "
        "--divergence kl_backward --teacher-steps 1024 --substeps 2"
    )
    fetched = "model:jdeschena/sdtt@baselines_kld_step_10000 model:jdeschena/sdtt@baselines_kld"
    assert fetched in command and "distill-round" not in command


def test_a_teacher_may_be_a_model_of_transformers(workflow):
    teacher = {"from": "hf:own/llama@main", "logits": "shifted", "network": {"size": "2x32x2"}}
    teacher |= {"corpus": "stories-ci", "baseline": None, "distillation": OTHER["distillation"]}
    target = "results/models/a/teacher/meta.json"
    settings = ("--config", "preset=ci", f"teachers={json.dumps({'a': teacher})}")
    judge = 'evaluation={"judge": "gpt2"}'
    command = workflow.plan("-p", target, *settings, judge, "continuations=null")
    call = " ".join(
        re.search(r"halfstep import (.*?) 2>&1", command.replace("\\\n", " "))[1].split()
    )
    assert call == (
        "--source hf:own/llama@main --corpus results/data/stories-ci --output "
        "results/models/a/teacher --weights ema --size 2x32x2 --logits shifted"
    )
    assert "model:own/llama@main" in command and "model:hf:" not in command
    teachers = f"teachers={json.dumps({'a': teacher | {'trust_remote_code': True}})}"
    command = workflow.plan("-p", target, *settings[:2], teachers, judge, "continuations=null")
    assert "--logits shifted --trust-remote-code " in " ".join(command.split())


def test_code_is_brought_by_models_of_transformers_alone():
    with pytest.raises(ConfigError, match="trust_remote_code: found true, but only a teacher with"):
        targets(trust_remote_code=True)


def test_logits_are_of_models_of_transformers_alone():
    with pytest.raises(ConfigError, match="logits: found same, but only a teacher with from: hf:"):
        targets(logits="same")


OTHER = {
    "corpus": "stories-ci",
    "network": {"size": "tiny"},
    "distillation": {"rounds": 1, "num_steps": 3, "warmup_steps": 1, "teacher_steps": 64},
    "runs": {"kld": {}},
}


def test_a_published_run_has_the_facts_of_its_names_and_no_training():
    """It inherits steps, substeps and rounds, and the divergence is that of the released name."""
    shared = {"teacher_steps": 1024, "divergence": "mse", "lr": 1e-3, "warmup_steps": 1}
    found = targets(distillation=shared, runs={"kl_backward": None, "kld": {"from": HUB}})
    run = found.config.teachers["stories-ci"].runs["kld"]
    assert (run.divergence, run.teacher_steps, run.rounds) == ("kl_backward", 1024, 7)
    assert run.lr == type(run).model_fields["lr"].default
    assert found.step_counts("stories-ci/kld/round-7") == [8]
    assert found.config.warnings() == []
    wildcards = SimpleNamespace(model="stories-ci/kld/round-3")
    name, options, number = found.sources.published_round(wildcards.model)
    assert (name, options, number) == ("jdeschena/sdtt@baselines_kld_step_30000", run, 3)
    assert found.sources.round_of_hub(wildcards.model) == [f"model:{name}"]


def test_a_repeated_teacher_has_its_published_students_once():
    runs = {"kld": KLD, "kl_backward": {"rounds": 1}}
    found = targets(seeds=[1, 2], runs=runs)
    students = [model for model in found.denoisers if "/kld/" in model]
    assert (
        students == found.sources.imported_rounds == [f"stories-ci/kld/round-{n}" for n in (1, 2)]
    )
    assert "stories-ci-seed-2/kl_backward/round-1" in found.denoisers


def test_curves_are_those_of_models_that_are_trained():
    runs = {"kld": KLD, "kl_backward": {"rounds": 1}}
    found = targets(runs=runs, **{"from": "kuleshov-group/mdlm-owt"})
    journals = found.figure_inputs()["loss_curves"]
    models = ("baseline", "kl_backward/round-1")
    assert journals == [f"results/models/stories-ci/{name}/journal.jsonl" for name in models]
    nothing = targets(
        runs={"kld": KLD, "kl_backward": None}, baseline=None, **{"from": "kuleshov-group/mdlm-owt"}
    )
    assert "loss_curves" not in nothing.figure_inputs()


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (
            {"from": "jdeschena/sdtt@baselines_kld_step_10000"},
            "runs.kld: from: .* every round",
        ),
        (
            KLD | {"seeds": [1, 2]},
            r"runs.kld.seeds: found \[1, 2\], but the students of `from` are",
        ),
        (KLD | {"lr": 1e-4}, "runs.kld.lr: found 0.0001, but .* nothing is trained here; leave"),
        (
            KLD | {"divergence": "mse"},
            "_step_10000 is round 1 of kl_backward .*, but this run has it as round 1 of mse",
        ),
        (KLD | {"teacher_steps": 64}, "is round 1 .* from 1024 steps .* of kl_backward from 64 st"),
        (
            KLD | {"from": "jdeschena/sdtt@baselines_kld_step_20000?<round>"},
            "no file, no folder and no name",
        ),
        ({"from": "a{b}<round>"}, "braces are not expanded"),
        ({"from": "--x<round>"}, "a command would read it as a flag"),
        ({"from": "./gone/<round>.ckpt"}, "runs.kld.from: ./gone/1.ckpt is no file"),
    ],
)
def test_a_published_run_that_cannot_be_is_one_sentence(run, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        check_sources(targets(runs={"kl_backward": None, "kld": {"rounds": 1} | run}).config)
    assert "\n" not in str(caught.value)


def test_published_students_have_no_best_weights():
    config = {"preset": "ci", "sampling": {"weights": "best"}}
    with pytest.raises(ConfigError, match=r"teachers.stories-ci.runs.kld.from has no best weights"):
        resolve(config | {"teachers": {"stories-ci": {"runs": {"kld": KLD}}}}, PRESETS)


CONFIG = {
    "preset": "ci",
    "teachers": {
        "stories-ci": {
            "from": "mdlm",
            "distillation": {"teacher_steps": 16, "rounds": 2},
            "runs": {
                "kl_backward": {"rounds": 1},
                "kld": {"from": "kld/round-<round>.ckpt"},
            },
        }
    },
    "sampling": {"steps": ["own"], "num_samples": 4, "temperatures": []},
    "evaluation": {"lambada_items": 2},
    "continuations": {"continuation_rounds": [2]},
    "benchmark": {"lengths": [16], "benchmark_steps": [4]},
}


CORPUS = "results/data/stories-ci/manifest.json"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished graph: an imported teacher, two imported students, and a trained one.

    The commands that Snakemake prints run one after another in one process.
    """
    tree = copy(tmp_path_factory.mktemp("imported"))
    corpus = run_graph(tree, {"preset": "ci"}, CORPUS) / "data/stories-ci"
    raw, ema = networks(read_manifest(corpus)["vocab_size"])
    folder(tree.folder / "mdlm", raw, "backbone.", MDLM)
    (tree.folder / "kld").mkdir()
    for number in (1, 2):
        shifted = {key: value + 0.01 * number for key, value in ema.items()}
        lightning(tree.folder / f"kld/round-{number}.ckpt", raw, shifted)
    run_graph(tree, CONFIG, "all")
    return tree


def test_the_graph_ends_with_tables_figures_and_records(finished):
    results = finished.folder / "results"
    assert (results / "mlflow.synced").read_text() == ""
    for name in ("ppl_vs_steps", "lambada_vs_round", "mauve_vs_steps", "loss_curves"):
        assert (results / f"figures/{name}.svg").stat().st_size > 1000
    assert "Nothing to be done" in finished.run("--cores", "1").stderr
    steps = read_table(results / "tables/steps.csv")
    own = steps[steps["metric"] == "generative_perplexity"].groupby("model")["steps"].unique()
    assert sorted(own["stories-ci/kld/round-1"]) == [4, 8]  # made for 8, and its student for 4
    weights = dict(steps.dropna(subset="weights").groupby("model")["weights"].first())
    assert weights["stories-ci/teacher"] == "published"
    assert weights["stories-ci/kld/round-2"] == weights["stories-ci/kl_backward/round-1"] == "ema"
    lambada = read_table(results / "tables/lambada.csv")
    of_runs = {f"stories-ci/{name}" for name in ("teacher", "kld/round-1", "kld/round-2")}
    assert set(lambada["model"]) >= of_runs and set(own.index) >= of_runs


def test_a_published_student_knows_what_it_was_made_for(finished):
    meta = read_meta(finished.folder / "results/models/stories-ci/kld/round-2")
    assert (meta["round"], meta["student_steps"], meta["dt"]) == (2, 4, 2 / 16)
    assert meta["run"] == {"divergence": "kl_backward", "teacher_steps": 16, "substeps": 2}
    assert meta["imported"]["weights"] == "raw and ema"


def test_summary_and_records_know_the_published_students(finished, capsys):
    from halfstep.cli import main

    results = finished.folder / "results"
    assert main(["summary", "--results", str(results)]) == 0
    assert "kld" in capsys.readouterr().out
    assert main(["verify", str(results)]) == 0
