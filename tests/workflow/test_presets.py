"""Every preset resolves to a graph under both profiles, from the literal commands of the README."""

import json
import re

import pytest
from dryrun import REPOSITORY, copy, counts

from halfstep.commands.plan import LOCAL
from halfstep.resolve import resolve
from halfstep.workflow.targets import Targets

GRAPHS = {  # preset: runs, rounds over all runs
    "laptop": (1, 7),
    "laptop-losses": (3, 21),
    "ci": (1, 7),
    "docs": (1, 7),
    "owt-scaling": (3, 21),
    "owt-adapted": (1, 7),
}
PUBLISHED = {  # preset with published teachers: teachers, rounds trained, rounds imported
    "sdtt-small": (1, 7, 0),
    "sdtt-losses": (1, 28, 0),
    "sdtt-ablations": (1, 61, 0),
    "sdtt-published": (1, 0, 21),
    "sdtt-scaling": (3, 0, 21),
}
STEPS = (8, 16, 32, 64, 128, 256, 512, 1024)  # the paper's
SAMPLED = {"laptop": 2, "laptop-losses": 10}  # denoisers of the rounds that are sampled
FRONTIER = {"laptop": 3, "laptop-losses": 5, "ci": 3}  # models at several temperatures
# Models that are drawn in other ways, which are on the frontier too. laptop: two by confidence, one
# from drafts; laptop-losses: four in each of seven ways, and three from drafts.
VARIED = {"laptop": 2 + 1, "laptop-losses": 4 * 7 + 3}
FILLED_IN = {"laptop": 2, "laptop-losses": 4 * 7}  # those of them that fill in positions
TIMED = {  # jobs of latency: lengths, further batch sizes and untrained sizes
    "laptop": 1,
    "laptop-losses": 1,
    "ci": 1,
    "docs": 3,
    "owt-scaling": 3 * (6 + 4) + 5 * 6,
    "owt-adapted": 5 + 4 + 5 * 5,
}


def test_every_preset_has_a_test_here():
    assert {file.stem for file in (REPOSITORY / "workflow/presets").glob("*.yaml")} == {
        *GRAPHS,
        *PUBLISHED,
        "owt-small",
        "own-model",
    }


@pytest.mark.parametrize("preset", GRAPHS)
def test_preset_resolves(workflow, preset):
    jobs = counts(workflow.plan("--config", f"preset={preset}"))
    teachers, (runs, rounds) = jobs["pretrain"], GRAPHS[preset]
    baseline = "import_baseline" if preset.startswith("owt-") else "train_baseline"
    assert jobs[baseline] == jobs["score_corpus"] == teachers
    assert jobs["latency"] == TIMED[preset]
    assert jobs["distill_round"] == rounds
    assert jobs["score_lambada"] == runs + 2 * teachers
    scored = SAMPLED.get(preset, rounds + teachers)
    varied, swept = VARIED.get(preset, 0), FRONTIER.get(preset, 0)
    assert jobs["generate"] == scored + teachers + varied and jobs["draw_naive"] == teachers
    prompts = preset != "laptop"  # whether held-out prompts are continued
    frontier = preset in FRONTIER
    examined = preset in ("owt-small", "owt-adapted")  # tasks of lm-eval, zero-shot texts
    drawn = preset in VARIED
    fills_in = preset in ("ci", "laptop", "laptop-losses")
    tables = 3 + prompts + frontier + drawn + 2 * examined + fills_in
    figures = 7 + prompts + frontier + 2 * drawn + fills_in
    assert (jobs["plot"], jobs["tabulate"]) == (figures, tables)
    assert jobs.get("score_infilling", 0) == fills_in * (scored + FILLED_IN.get(preset, 0))
    of_last_rounds = examined * (2 * teachers + GRAPHS[preset][0])
    for rule in ("score_tasks", "score_perplexity"):
        assert jobs.get(rule, 0) == of_last_rounds
    assert jobs.get("score_frontier", 0) == swept + varied
    assert jobs.get("generate_frontier", 0) == swept + varied
    assert jobs["score_samples"] == scored + 2 * teachers - swept
    assert jobs["track"] == 1
    assert jobs.get("score_continuations", 0) == prompts * (
        2 if preset == "ci" else rounds + 2 * teachers
    )


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_with_published_teachers_has_exactly_these_jobs(workflow, preset):
    """Nothing is pretrained; what is trained are rounds, and where all are published nothing is."""
    config = resolve({"preset": preset}, REPOSITORY / "workflow/presets", quiet=True)
    teachers, trained, imported = PUBLISHED[preset]
    asks_for_tasks = preset != "sdtt-scaling"  # the paper has them of one size
    runs = [(t, r, run) for t, about in config.teachers.items() for r, run in about.runs.items()]
    rounds = [(*names, n) for *names, run in runs for n in range(1, run.rounds + 1)]
    students = [f"{teacher}/{run}/round-{n}" for teacher, run, n in rounds]
    denoisers = [f"{name}/teacher" for name in config.teachers] + students
    models = denoisers + [f"{name}/baseline" for name in config.teachers]
    assert (len(config.teachers), len(students)) == (teachers, trained + imported)
    expected = {f"generate {model}" for model in models}
    for name in config.teachers:
        of_teacher = ("import_teacher", "import_baseline", "score_corpus", "draw_naive")
        expected |= {f"{rule} {name}" for rule in of_teacher}
        expected.add(f"score_samples {name}/naive")
    for rule in ("score_samples", "continue_prompts", "score_continuations"):
        expected |= {f"{rule} {model}" for model in models}
    expected |= {f"score_lambada {model}" for model in models if "/round-" not in model}
    expected |= {f"score_lambada {teacher}/{run}" for teacher, run, _ in runs}
    targets = Targets(config)
    has_noise = preset in ("sdtt-small", "sdtt-losses", "sdtt-published")
    assert list(targets.varied) == [f"{name}/released-noise" for name in denoisers if has_noise]
    for rule in ("generate", "score_samples"):
        expected |= {f"{rule} {drawn}" for drawn in targets.varied}
    expected |= {f"latency {timed.replace('/', ' ')}" for timed in targets.timings.jobs}
    for rule in ("score_tasks", "score_perplexity"):
        expected |= {f"{rule} {model}" for model in targets.final_models() if asks_for_tasks}
    if trained:
        expected |= {f"distill_round {teacher} {run} {n}" for teacher, run, n in rounds}
    else:
        expected |= {f"import_round {model}" for model in students}
    jobs = workflow.jobs("--config", f"preset={preset}")
    local = {*LOCAL, "all", "prepare_corpus"}
    assert {job for job in jobs if job.split()[0] not in local} == expected


def test_a_model_of_the_hub_on_own_text_is_trained_first_and_then_distilled(tmp_path):
    """From the text of its folder; the hub gives model, tokenizer and judge, in one job."""
    workflow = copy(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text/one.txt").write_text("Dear reader, this is a letter.\n\n" * 200)
    plan = workflow.plan("-p", "--config", "preset=own-model", HF_HUB_OFFLINE="1")
    jobs = counts(plan)
    assert (jobs["pretrain"], jobs["distill_round"], jobs["score_frontier"]) == (1, 3, 2)
    assert not {"import_teacher", "train_baseline", "score_lambada"} & jobs.keys()
    assert "--from hf:answerdotai/ModernBERT-base" in plan and jobs["fetch"] == 1
    assert "model:answerdotai/ModernBERT-base model:gpt2-large" in plan
    found = resolve({"preset": "own-model"}, REPOSITORY / "workflow/presets")
    assert found.warnings() == []


def test_what_presets_share_they_have_alike():
    """Sampling but its variants, scores and timings, and a run of one name with its options."""
    folder = REPOSITORY / "workflow/presets"
    small = resolve({"preset": "owt-small"}, folder)
    (known,) = small.teachers.values()
    for preset in PUBLISHED:
        found = resolve({"preset": preset}, folder)
        plain = found.sampling.model_copy(update={"variants": {}})
        found = found.model_copy(update={"sampling": plain})
        for key in ("corpora", "sampling", "continuations", "benchmark", "published"):
            assert getattr(found, key) == getattr(small, key), f"{preset}: {key}"
        for teacher in found.teachers.values():
            for name, run in teacher.runs.items():
                assert run.source or run == known.runs[name], f"{preset}: {name}"
    ablations = resolve({"preset": "sdtt-ablations"}, folder).teachers["mdlm-owt"].runs.keys()
    losses = resolve({"preset": "sdtt-losses"}, folder).teachers["mdlm-owt"].runs.keys()
    assert ablations | losses == known.runs.keys() - {"kl_forward"}
    assert ablations & losses == {"kl_backward"}


def test_a_dry_run_of_published_weights_asks_for_no_hub(workflow):
    """Its one download is a job, which names all released students."""
    settings = ("--config", "preset=sdtt-published")
    plan = workflow.plan("-p", "results/hub.json", *settings, HF_HUB_OFFLINE="1")
    for loss in ("kld", "mse", "tvd"):
        for number in range(1, 8):
            assert f"model:jdeschena/sdtt@baselines_{loss}_step_{number}0000" in plan
    assert "model:kuleshov-group/mdlm-owt" in plan and counts(plan)["fetch"] == 1


def test_own_step_counts_are_where_a_round_meets_its_teacher(workflow):
    sampling = {"steps": ["own", 8], "rounds": None, "temperatures": [], "frontier_steps": None}
    sampling["variants"] = {"by-confidence": None, "drafts": None}
    plan = workflow.plan("-p", "--config", "preset=laptop", f"sampling={json.dumps(sampling)}")
    line = ["teacher", *(f"kl_backward/round-{round}" for round in range(1, 8))]
    expected = {
        model: sorted({256 // 2**at, 256 // 2 ** min(at + 1, 7), 8})
        for at, model in enumerate(line)
    }
    pattern = r"--output 'results/samples/stories-tiny/(\S+)/steps-{steps}' +--steps ([\d ]+\d) "
    found = re.findall(pattern, plan.replace("\\\n", ""))
    drawn = {model: [int(count) for count in counts.split()] for model, counts in found}
    assert drawn == expected | {"baseline": [256]}


def test_a_teacher_can_come_from_elsewhere(workflow):
    """`from` takes the place of pretraining, and of nothing else."""
    source = 'teachers={"stories-ci": {"from": "jdeschena/sdtt@teacher_1M_sm"}}'
    plan = workflow.plan("-p", "--config", "preset=ci", source)
    jobs = counts(plan)
    assert jobs["import_teacher"] == jobs["train_baseline"] == 1 and jobs["distill_round"] == 7
    assert "pretrain" not in jobs
    assert "--source jdeschena/sdtt@teacher_1M_sm" in plan


def test_an_adapted_teacher_starts_from_the_hub(workflow):
    """GPT-2 is fetched once, where snakemake runs, before the teacher is trained."""
    target = "results/models/owt-adapted/teacher/meta.json"
    plan = workflow.plan("-p", target, "--config", "preset=owt-adapted")
    job = plan.split("rule pretrain:")[1].split("\n[")[0]
    assert "--adapt gpt2" in job and "--anneal-attention 10000" in job
    assert "results/hub.json" in job and "model:gpt2 " in plan
    assert "train_baseline" not in counts(plan)


def test_one_figure_needs_no_flag(workflow):
    jobs = counts(workflow.plan("results/figures/ppl_vs_steps.pdf"))
    assert jobs["plot"] == jobs["tabulate"] == 1 and jobs["distill_round"] == 7
    # Nothing that the figure does not show:
    assert not {"track", "latency", "score_lambada"} & jobs.keys()


def test_slurm_runs_the_paper_on_gpus(workflow):
    plan = workflow.plan("--profile", "slurm", "all", HALFSTEP_SLURM_PARTITION="fast")
    jobs = counts(plan)
    assert "models/owt-small/teacher" in plan and "stories" not in plan
    # Fourteen runs: twelve with 2 substeps, one with 4, one with 8.
    assert jobs["distill_round"] == 12 * 7 + 3 + 2
    job = plan.split("rule distill_round:")[1].split("\n[")[0]
    resources = ["gpu=4", "nodes=1", "mem_mb=32000", "runtime=480", "micro_batch=32"]
    for resource in [*resources, "slurm_partition=fast"]:
        assert resource in job, job
    assert "gpu=" not in plan.split("rule tabulate:")[1].split("\n[")[0]


def test_slurm_runs_another_preset_where_it_is_named(workflow):
    target = "results/models/stories-ci/teacher/meta.json"
    plan = workflow.plan("--profile", "slurm", "--config", "preset=ci", "seed=2", "--", target)
    assert counts(plan)["pretrain"] == 1


def test_other_settings_keep_the_preset_of_the_cluster(workflow):
    target = "results/models/owt-small/teacher/meta.json"
    assert target in workflow.plan("--profile", "slurm", target, "--config", "seed=2")


def test_the_own_text_of_the_tutorial_is_a_graph(tmp_path):
    """Its YAML alone, with a folder of text: nothing of the preset's stories or of the hub."""
    workflow = copy(tmp_path)
    page = (REPOSITORY / "docs/tutorials/own-text.md").read_text()
    block = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[0]
    (workflow.folder / "config.yaml").write_text(block)
    letters = workflow.folder / "letters"
    letters.mkdir()
    for number in range(30):
        (letters / f"{number}.txt").write_text("Dear reader, this is one letter.\n")
    done = workflow.run("-np")
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = counts(done.stdout)
    assert (jobs["distill_round"], jobs["pretrain"], jobs["prepare_corpus"]) == (7, 1, 1)
    assert not {"score_lambada", "fetch"} & jobs.keys()
    assert "stories" not in done.stdout
    assert done.stdout.count("--num-steps 150") == 7
    assert "warning" not in done.stderr
