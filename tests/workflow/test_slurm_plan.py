"""What the rules ask of a cluster: dry runs with a site's settings, several GPUs and retries."""

import os
import re

import pytest
from dryrun import REPOSITORY, copy

from halfstep.resolve import resolve
from halfstep.workflow.targets import Targets

SITE = {
    "HALFSTEP_SLURM_PARTITION": "fast",
    "HALFSTEP_SLURM_ACCOUNT": "us",
    "HALFSTEP_SLURM_QOS": "long",
    "HALFSTEP_SLURM_CONSTRAINT": "ib",
    "HALFSTEP_SLURM_GPU_MODEL": "a100",
}
SLURM = ["--profile", "slurm"]
TARGETS = [
    "results/metrics/owt-small/kl_backward/round-1/samples.json",
    "results/metrics/owt-small/teacher/lambada.json",
]
TEACHER = "results/models/owt-small/teacher/meta.json"
CI = "results/models/stories-ci/teacher/meta.json"


def resources(plan: str, rule: str) -> str:
    """The line `resources:` of the first job of a rule."""
    return re.search(r"resources: (.*)", plan.split(f"rule {rule}:")[1])[1]


def command(plan: str, rule: str) -> str:
    """The shell command of the first job of a rule."""
    return plan.split(f"rule {rule}:")[1].split("Shell command:")[1].split("2>&1")[0]


def test_the_sites_settings_reach_every_job(workflow):
    plan = workflow.plan(*SLURM, *TARGETS, **SITE, HALFSTEP_SLURM_MAX_MINUTES="1440")
    for rule in ("distill_round", "generate", "score_samples", "prepare_corpus"):
        for setting in ("slurm_partition=fast", "slurm_account=us", "qos=long", "constraint=ib"):
            assert setting in resources(plan, rule)
    assert "gpu=1, gpu_model=a100" in resources(plan, "generate")
    assert "gpu" not in resources(plan, "prepare_corpus")
    assert "runtime=1440" in resources(plan, "pretrain")
    assert "runtime=480" in resources(plan, "distill_round")


def test_a_job_without_gpu_asks_for_no_model_of_gpu(workflow):
    plan = workflow.plan(*SLURM, "--config", "preset=ci", "--", CI, **SITE)
    assert "gpu_model=," in resources(plan, "pretrain")


def test_one_rule_can_be_set_alone(workflow):
    changes = ["pretrain:gpu_model=h100", "pretrain:runtime=99"]
    plan = workflow.plan(*SLURM, *TARGETS, "--set-resources", *changes)
    assert "gpu_model=h100" in resources(plan, "pretrain")
    assert "runtime=99" in resources(plan, "pretrain")
    assert "h100" not in resources(plan, "distill_round")


def test_blocks_are_prepared_where_the_user_asks_for_it(workflow):
    changes = ["distill_round:blocks='--compile --recompute'", "pretrain:blocks='--recompute'"]
    plan = workflow.plan("-p", *SLURM, *TARGETS, "--set-resources", *changes)
    assert "--compile --recompute" in command(plan, "distill_round")
    shell = command(plan, "pretrain")
    assert "--recompute" in shell and "--compile" not in shell
    plain = workflow.plan("-p", *SLURM, *TARGETS)
    assert "--recompute" not in plain and "--compile" not in plain


@pytest.mark.parametrize("changes, gpus, nodes", [
    ([], 8, 2),
    (["pretrain:gpu=4"], 4, 1),
    (["pretrain:gpu=1"], 1, None),
    (["pretrain:gpu=0"], 0, None),
    (["pretrain:gpu=4", "pretrain:nodes=4"], 4, 4),
    (["pretrain:nodes=1"], 8, 1),
    (["pretrain:gpu=12"], 12, 3),
])  # fmt: skip
def test_several_gpus_are_as_many_processes_on_as_many_nodes(workflow, changes, gpus, nodes):
    changes = ["--set-resources", *changes] if changes else []
    plan = workflow.plan("-p", *SLURM, TEACHER, *changes, **SITE)
    asked, shell = resources(plan, "pretrain"), command(plan, "pretrain")
    assert re.search(rf"\bgpu={gpus}\b", asked)
    assert f"nodes={nodes}," in asked if nodes else "nodes=" not in asked
    assert re.findall(r"--processes (\d+)", shell) == ([str(gpus)] if gpus > 1 else [])
    if nodes is None or nodes == 1:
        assert not re.search(r"\b(mpi|tasks|tasks_per_gpu|gres)=", asked)
        assert shell.split()[:2] == ["halfstep", "pretrain"]
        return
    each = gpus // nodes
    for setting in ("mpi=srun", f"tasks={nodes}", "tasks_per_gpu=0", f"gres=gpu:a100:{each}"):
        assert setting in asked
    srun = rf"\s*srun --nodes={nodes} --ntasks-per-node=1 --gpus-per-node={each} "
    srun += r"--cpus-per-task=\d+ --kill-on-bad-exit=1 "
    assert re.match(srun + "halfstep pretrain ", shell)


def test_a_site_sets_how_many_gpus_a_node_has(workflow):
    plan = workflow.plan(*SLURM, TEACHER, HALFSTEP_SLURM_GPUS_PER_NODE="8")
    assert "nodes=1," in resources(plan, "pretrain")


def test_uneven_shares_are_refused(workflow):
    changes = ["pretrain:gpu=5", "pretrain:nodes=2"]
    done = workflow.run("-n", *SLURM, TEACHER, "--set-resources", *changes)
    fault = "gpu: found 5 for 2 nodes, which do not share them evenly"
    assert done.returncode and fault in done.stdout + done.stderr


def test_a_bad_setting_of_the_site_is_one_line(workflow):
    done = workflow.run("-n", *SLURM, TEACHER, HALFSTEP_SLURM_GPUS_PER_NODE="four")
    fault = "HALFSTEP_SLURM_GPUS_PER_NODE: found 'four', expected a whole number above zero"
    assert done.returncode and fault in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("has, processes", [(0, []), (1, []), (2, ["2"]), (16, ["8"])])
def test_one_machine_starts_no_more_processes_than_it_has_gpus(workflow, has, processes):
    """All on itself, by the same rule. Finished files stay: these numbers are no parameters."""
    plan = workflow.plan("-p", TEACHER, "--resources", f"gpu={has}", "--config", "preset=owt-small")
    shell = command(plan, "pretrain")
    assert re.findall(r"--processes (\d+)", shell) == processes
    assert shell.split()[:2] == ["halfstep", "pretrain"]


def test_a_retry_asks_for_more(workflow):
    first, third = (workflow.plan(*SLURM, *TARGETS, "--attempt", n) for n in "13")
    asked = resources(first, "distill_round")
    assert "mem_mb=32000" in asked and "runtime=480" in asked
    asked = resources(third, "distill_round")
    assert "mem_mb=64000" in asked and "runtime=960" in asked
    assert "runtime=4320" in resources(third, "pretrain")  # the longest time of a job


def grouped(plan: str) -> dict[str, dict[str, str]]:
    """The jobs of each group in a dry run: their lines `resources:`, by rule."""
    found: dict[str, dict[str, str]] = {}
    for name, jobs in re.findall(r"Group job (\S+) .*\n((?:\n| +.*\n|\[.*\]\n)*)", plan):
        facts = re.findall(r"^ +rule (\w+):\n(?: +.*\n)*? +resources: (.*)", jobs, re.MULTILINE)
        assert len(facts) == len(dict(facts))
        found[name] = dict(facts)
    return found


@pytest.mark.parametrize("preset", ["sdtt-small", "owt-small"])
def test_on_a_cluster_the_continuations_of_a_model_and_their_scores_are_one_submission(
    workflow, preset
):
    """The two jobs share the time limit of one that samples. No other job is in a group."""
    config = resolve({"preset": preset}, REPOSITORY / "workflow/presets", quiet=True)
    groups = grouped(workflow.plan(*SLURM, "all", "--config", f"preset={preset}"))
    assert groups.keys() == {f"continuations-{name}" for name in Targets(config).continued_models()}
    for jobs in groups.values():
        assert jobs.keys() == {"continue_prompts", "score_continuations"}
        for asked in jobs.values():
            assert "runtime=120," in asked and "gpu=1," in asked and "mem_mb=32000," in asked


def test_without_a_cluster_there_is_no_group(workflow):
    assert grouped(workflow.plan("all", "--config", "preset=ci")) == {}
    assert len(grouped(workflow.plan(*SLURM, "all", "--config", "preset=ci"))) == 2


def test_a_group_stays_within_the_longest_time_of_a_job(workflow):
    """Slurm gets the sum of the times of its two jobs, in a retry too."""
    for attempt in "13":
        arguments = [*SLURM, "all", "--config", "preset=sdtt-small", "--attempt", attempt]
        groups = grouped(workflow.plan(*arguments, HALFSTEP_SLURM_MAX_MINUTES="90"))
        for jobs in groups.values():
            times = [int(re.search(r"runtime=(\d+)", asked)[1]) for asked in jobs.values()]
            assert times == [45, 45]


def test_only_files_of_the_hub_are_fetched_and_first(workflow):
    plan = workflow.plan("-p", *SLURM, *TARGETS)
    assert "localrule fetch" in plan or "rule fetch" in plan
    repositories = [
        "dataset:EleutherAI/lambada_openai",
        "dataset:Skylion007/openwebtext",
        "model:gpt2",
        "model:gpt2-large",
    ]
    assert f"--repositories {' '.join(repositories)}" in plan, plan
    for rule in ("prepare_corpus", "score_samples", "score_lambada"):
        assert "results/hub.json" in re.search(r"input: (.*)", plan.split(f"rule {rule}:")[1])[1]
    assert "fetch" not in workflow.plan("--config", "preset=ci")


@pytest.mark.parametrize("environment, printed", [
    ({"SLURM_JOB_ID": "7"}, "hub=1\n"),
    ({}, "hub=\n"),
])  # fmt: skip
def test_jobs_run_with_the_hub_switched_off(tmp_path, environment, printed):
    tree = copy(tmp_path)
    shell = "touch {output}; echo hub=${{HF_HUB_OFFLINE:-}}; : "
    tree.edit("rules/data.smk", lambda text: text.replace("halfstep prepare-corpus", shell))
    target = ["-f", "results/data/stories-ci/manifest.json", "--config", "preset=ci"]
    clean = {name: "" for name in os.environ if name.startswith("HF_")}
    done = tree.run("--cores", "1", *target, **clean, **environment)
    assert done.returncode == 0 and printed in done.stdout, done.stdout + done.stderr
