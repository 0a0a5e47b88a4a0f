"""What jobs ask of a cluster, by the site's variables and on a retry; and the plugin that waits where it gave up."""

import asyncio
import os
import re
import subprocess
import sys

import pytest
from dryrun import copy

from halfstep.workflow import slurm_plugin

SITE = {
    f"HALFSTEP_SLURM_{k}": v
    for k, v in {
        "PARTITION": "fast",
        "ACCOUNT": "us",
        "QOS": "long",
        "CONSTRAINT": "ib",
        "GPU_MODEL": "a100",
    }.items()
}

TARGETS = [
    f"results/metrics/owt-small/kl_backward/round-1/{kind}.json" for kind in ("samples", "lambada")
]

TEACHER = "results/models/owt-small/teacher/meta.json"

CI = ["results/models/stories-ci/teacher/meta.json"]


def asked(plan: str, rule: str) -> str:
    return re.search(r"resources: (.*)", plan.split(f"rule {rule}:")[1])[1]


def test_the_sites_words_reach_every_job(workflow):
    plan = workflow.plan("--profile", "slurm", *TARGETS, **SITE, HALFSTEP_SLURM_MAX_MINUTES="1440")
    for rule in ("distill_round", "generate", "score_samples", "prepare_corpus"):
        for words in ("slurm_partition=fast", "slurm_account=us", "qos=long", "constraint=ib"):
            assert words in asked(plan, rule)
    assert "gpu=1, gpu_model=a100" in asked(plan, "generate") and "gpu" not in asked(
        plan, "prepare_corpus"
    )
    assert "runtime=1440" in asked(plan, "pretrain") and "runtime=480" in asked(
        plan, "distill_round"
    )
    assert "gpu_model=," in asked(
        workflow.plan("--profile", "slurm", "--config", "preset=ci", "--", *CI, **SITE), "pretrain"
    )  # asks for no GPU
    one = workflow.plan(
        "--profile",
        "slurm",
        *TARGETS,
        "--set-resources",
        "pretrain:gpu_model=h100",
        "pretrain:runtime=99",
    )
    assert (
        "gpu_model=h100" in asked(one, "pretrain")
        and "runtime=99" in asked(one, "pretrain")
        and "h100" not in asked(one, "distill_round")
    )


@pytest.mark.parametrize("words, gpus, nodes", [
    ([], 8, 2), (["pretrain:gpu=4"], 4, 1), (["pretrain:gpu=1"], 1, None), (["pretrain:gpu=0"], 0, None), (["pretrain:gpu=4", "pretrain:nodes=4"], 4, 4),
    (["pretrain:nodes=1"], 8, 1), (["pretrain:gpu=12"], 12, 3),
])  # fmt: skip
def test_several_gpus_are_as_many_processes_on_as_many_nodes(workflow, words, gpus, nodes):
    plan = workflow.plan(
        "-p", "--profile", "slurm", TEACHER, *(["--set-resources", *words] if words else []), **SITE
    )
    resources, shell = (
        asked(plan, "pretrain"),
        plan.split("rule pretrain:")[1].split("Shell command:")[1].split("2>&1")[0],
    )
    assert re.search(rf"\bgpu={gpus}\b", resources) and (
        f"nodes={nodes}," in resources if nodes else "nodes=" not in resources
    )
    assert re.findall(r"--processes (\d+)", shell) == ([str(gpus)] if gpus > 1 else [])
    if (nodes or 1) > 1:
        assert all(
            word in resources
            for word in (
                "mpi=srun",
                f"tasks={nodes}",
                "tasks_per_gpu=0",
                f"gres=gpu:a100:{gpus // nodes}",
            )
        )
        srun = rf"\s*srun --nodes={nodes} --ntasks-per-node=1 --gpus-per-node={gpus // nodes} --cpus-per-task=\d+ --kill-on-bad-exit=1 "
        assert re.match(srun + "halfstep pretrain ", shell)
    else:
        assert not re.search(r"\b(mpi|tasks|tasks_per_gpu|gres)=", resources) and shell.split()[
            :2
        ] == ["halfstep", "pretrain"]


def test_a_site_says_how_many_gpus_a_node_has_and_uneven_shares_are_refused(workflow):
    assert "nodes=1," in asked(
        workflow.plan("--profile", "slurm", TEACHER, HALFSTEP_SLURM_GPUS_PER_NODE="8"), "pretrain"
    )
    done = workflow.run(
        "-n", "--profile", "slurm", TEACHER, "--set-resources", "pretrain:gpu=5", "pretrain:nodes=2"
    )
    assert (
        done.returncode
        and "gpu: found 5 for 2 nodes, which do not share them evenly" in done.stdout + done.stderr
    )


@pytest.mark.parametrize("has, processes", [(0, []), (1, []), (2, ["2"]), (16, ["8"])])
def test_one_machine_starts_no_more_processes_than_it_has_gpus_and_all_on_itself(
    workflow, has, processes
):
    """The same rule, and what was made with other numbers stays: they are no parameters."""
    plan = workflow.plan("-p", TEACHER, "--resources", f"gpu={has}", "--config", "preset=owt-small")
    shell = plan.split("rule pretrain:")[1].split("Shell command:")[1].split("2>&1")[0]
    assert re.findall(r"--processes (\d+)", shell) == processes and shell.split()[:2] == [
        "halfstep",
        "pretrain",
    ]


def test_a_retry_asks_for_more(workflow):
    first, third = (workflow.plan("--profile", "slurm", *TARGETS, "--attempt", n) for n in "13")
    want = {"1": ("mem_mb=32000", "runtime=480"), "3": ("mem_mb=64000", "runtime=960")}
    assert all(w in asked(first, "distill_round") for w in want["1"]) and all(
        w in asked(third, "distill_round") for w in want["3"]
    )
    assert "runtime=4320" in asked(third, "pretrain")  # no longer than the longest


def test_only_what_comes_from_the_hub_is_fetched_and_first(workflow, tmp_path):
    plan = workflow.plan("-p", "--profile", "slurm", *TARGETS)
    assert "localrule fetch" in plan or "rule fetch" in plan
    assert re.search(
        r"--repositories dataset:EleutherAI/lambada_openai dataset:Skylion007/openwebtext model:gpt2 model:gpt2-large",
        plan,
    ), plan
    for rule in ("prepare_corpus", "score_samples", "score_lambada"):
        assert "results/hub.json" in re.search(r"input: (.*)", plan.split(f"rule {rule}:")[1])[1]
    assert "fetch" not in workflow.plan("--config", "preset=ci")


def test_jobs_run_with_the_hub_switched_off(tmp_path):
    tree = copy(tmp_path)
    text = (tree.folder / "rules/data.smk").read_text()
    (tree.folder / "rules/data.smk").write_text(
        text.replace(
            "halfstep prepare-corpus", "touch {output}; echo hub=${{HF_HUB_OFFLINE:-}}; : "
        )
    )
    for environment, said in (({"SLURM_JOB_ID": "7"}, "hub=1\n"), ({}, "hub=\n")):
        clean = {k: "" for k in os.environ if k.startswith("HF_")}
        done = tree.run(
            "--cores",
            "1",
            "-f",
            "results/data/stories-ci/manifest.json",
            "--config",
            "preset=ci",
            **clean,
            **environment,
        )
        assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr


def test_a_query_that_fails_is_asked_again_and_words_are_understood(monkeypatch):
    monkeypatch.setattr(slurm_plugin, "WAIT_S", 0)
    answers = [(None, None)] * 100 + [
        ({"1": "RUNNING", "2": "CANCELLED by 0"}, 0.1),
        ({"2": "CANCELLED"}, 0.1),
    ]

    async def query(command, logger):
        return answers.pop(0)

    ask = slurm_plugin.patient_query(query, set())
    assert (
        asyncio.run(ask("squeue", None))[0] == {"1": "RUNNING", "2": "CANCELLED"}
        and len(answers) == 1
    )
    assert asyncio.run(ask("squeue", None))[0] == {
        "1": "UNKNOWN",
        "2": "CANCELLED",
    }  # forgotten by Slurm: ended


@pytest.mark.parametrize("age, squeue", [(300, True), (200, True), (199, False), (None, True)])
def test_squeue_unless_it_forgets_before_the_longest_poll(age, squeue):
    """The plugin takes sacct when what it is told is below three polls of the first length, here 60 s; and None for 'unknown, take sacct'."""
    answers = [age, None]
    min_job_age = slurm_plugin.lasting_age(lambda: answers.pop(0))
    assert (min_job_age() >= 60) == squeue
    if age:
        assert (min_job_age() >= 60) == squeue and len(
            answers
        ) == 1  # remembered while the controller is away


def test_a_job_waits_for_the_controller_to_be_submitted(monkeypatch):
    monkeypatch.setattr(slurm_plugin, "WAIT_S", 0)
    answers, sent = [None, None, "up"], []
    monkeypatch.setattr(slurm_plugin, "ask", lambda *words: answers.pop(0))
    slurm_plugin.patient_submit(lambda self, job: sent.append((job, len(answers))))(None, "job")
    assert sent == [("job", 0)]


def test_the_plugin_that_is_installed_is_the_one_that_is_mended():
    """Its functions are looked up where slurm_plugin.py puts ours."""
    code = (
        "import snakemake_executor_plugin_slurm as p, snakemake_executor_plugin_slurm_jobstep as j, inspect; from halfstep import slurm; slurm_plugin.patch_plugin();"
        "source = inspect.getsource(p.Executor.check_active_jobs);"
        "assert 'await query_job_status(' in source and 'get_min_job_age()' in source and '3 * initial_interval' in source;"
        "assert p.query_job_status.__module__ == p.get_min_job_age.__module__ == 'halfstep.workflow.slurm_plugin';"
        "assert all(hasattr(x.Executor.run_job, '__wrapped__') for x in (p, j))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
