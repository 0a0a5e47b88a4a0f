"""Every preset resolves to a graph under both profiles, from the literal commands of the README."""

import json
import re

import pytest
from dryrun import REPOSITORY, copy, counts

GRAPHS = {  # preset: runs, rounds over all runs
    "laptop": (1, 7),
    "laptop-losses": (3, 21),
    "ci": (1, 7),
    "docs": (1, 7),
    "owt-scaling": (3, 21),
    "owt-adapted": (1, 7),
}
SAMPLED = {"laptop": 2, "laptop-losses": 10}  # denoisers of the rounds that are sampled
FRONTIER = {"laptop": 3, "laptop-losses": 5, "ci": 3}  # models at several temperatures
TIMED = {  # jobs of latency: lengths, further batch sizes and untrained sizes
    "laptop": 1,
    "laptop-losses": 1,
    "ci": 1,
    "docs": 3,
    "owt-scaling": 3 * (6 + 4) + 3 * 6,
    "owt-adapted": 5 + 4 + 3 * 5,
}


def test_every_preset_has_a_test_here():
    assert {file.stem for file in (REPOSITORY / "workflow/presets").glob("*.yaml")} == {
        *GRAPHS,
        "owt-small",
    }


@pytest.mark.parametrize("preset", GRAPHS)
def test_preset_resolves(workflow, preset):
    jobs = counts(workflow.plan("--config", f"preset={preset}"))
    teachers, (_, rounds) = jobs["pretrain"], GRAPHS[preset]
    assert jobs["train_baseline"] == jobs["score_corpus"] == teachers
    assert jobs["latency"] == TIMED[preset]
    assert jobs["distill_round"] == rounds
    assert jobs["score_lambada"] == rounds + 2 * teachers
    scored = SAMPLED.get(preset, rounds + teachers)
    assert jobs["score_samples"] == scored + 2 * teachers and jobs["draw_naive"] == teachers
    if preset not in SAMPLED:  # equally often for every denoiser, and once for every baseline
        assert jobs["generate"] % (rounds + teachers) == teachers
    prompts = preset != "laptop"  # whether held-out prompts are continued
    frontier = preset in FRONTIER
    assert jobs.get("generate_frontier", 0) == frontier * FRONTIER.get(preset, 0)
    assert (jobs["plot"], jobs["tabulate"]) == (7 + prompts + frontier, 3 + prompts + frontier)
    assert jobs["track"] == 1
    assert jobs.get("score_continuations", 0) == prompts * (
        2 if preset == "ci" else rounds + 2 * teachers
    )


def test_own_step_counts_are_where_a_round_meets_its_teacher(workflow):
    sampling = {"steps": ["own", 8], "rounds": None, "temperatures": [], "frontier_steps": None}
    jobs = workflow.jobs("--config", "preset=laptop", f"sampling={json.dumps(sampling)}")
    line = ["teacher", *(f"kl_backward/round-{round}" for round in range(1, 8))]
    expected = {
        f"generate stories-tiny/{model} {steps}"
        for at, model in enumerate(line)
        for steps in (256 // 2**at, 256 // 2 ** min(at + 1, 7), 8)
    }
    assert {job for job in jobs if job.startswith("generate")} == expected | {
        "generate stories-tiny/baseline 256"
    }


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


def test_the_own_text_of_the_readme_is_a_graph(tmp_path):
    """Its YAML alone, with a folder of text: nothing of the preset's stories or of the hub."""
    workflow = copy(tmp_path)
    readme = (REPOSITORY / "README.md").read_text()
    blocks = re.findall(r"^```yaml\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    (block,) = [text for text in blocks if "corpora:" in text]
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
