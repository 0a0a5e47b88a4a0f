"""The patches of Snakemake's Slurm plugin, which waits where it used to give up."""

import asyncio
import subprocess
import sys
from types import SimpleNamespace

import pytest

from halfstep.workflow import slurm_plugin


def test_a_failed_query_is_repeated_and_its_words_are_understood(monkeypatch):
    monkeypatch.setattr(slurm_plugin, "WAIT_S", 0)
    no_answer = (None, None)
    answers = [no_answer] * 100 + [
        ({"1": "RUNNING", "2": "CANCELLED by 0"}, 0.1),
        ({"2": "CANCELLED"}, 0.1),
    ]

    async def query(command, logger):
        return answers.pop(0)

    ask = slurm_plugin.patient_query(query, set())
    assert asyncio.run(ask("squeue", None))[0] == {"1": "RUNNING", "2": "CANCELLED"}
    assert len(answers) == 1
    # Slurm has forgotten job 1: it has ended.
    assert asyncio.run(ask("squeue", None))[0] == {"1": "UNKNOWN", "2": "CANCELLED"}


@pytest.mark.parametrize("age, squeue", [(300, True), (200, True), (199, False), (None, True)])
def test_squeue_is_asked_unless_it_forgets_before_the_longest_poll(age, squeue):
    """The plugin takes sacct for an age below three polls of the first length, here 60 s."""
    answers = [age, None]
    min_job_age = slurm_plugin.lasting_age(lambda: answers.pop(0))
    assert (min_job_age() >= 60) == squeue
    if age:  # it is remembered while the controller is absent
        assert (min_job_age() >= 60) == squeue and len(answers) == 1


def test_a_job_waits_for_the_controller_to_be_submitted(monkeypatch):
    monkeypatch.setattr(slurm_plugin, "WAIT_S", 0)
    answers, sent = [None, None, "up"], []
    monkeypatch.setattr(slurm_plugin, "ask", lambda *words: answers.pop(0))
    slurm_plugin.patient_submit(lambda self, job: sent.append((job, len(answers))))(None, "job")
    assert sent == [("job", 0)]


@pytest.mark.parametrize(
    ("fault", "again"),
    [
        ("Batch job submission failed: Unable to contact slurm controller (connect failure)", True),
        ("Invalid account or account/partition combination specified", False),
    ],
)
def test_a_submission_without_a_controller_is_no_failed_try(fault, again):
    """It is submitted again, by the function that waits; any other fault is reported."""
    said, sent = [], []
    executor = SimpleNamespace(run_job=sent.append)
    report = slurm_plugin.patient_report(lambda self, info, msg: said.append(info.job))
    message = f"SLURM sbatch failed. The error message was 'sbatch: error: {fault}'."
    report(executor, SimpleNamespace(job="job"), message)
    assert (sent, said) == ((["job"], []) if again else ([], ["job"]))


PATCHED = """
import inspect
import snakemake_executor_plugin_slurm as plugin
import snakemake_executor_plugin_slurm_jobstep as jobstep
from halfstep.workflow import slurm_plugin

slurm_plugin.patch_plugin()
source = inspect.getsource(plugin.Executor.check_active_jobs)
for name in ("await query_job_status(", "get_min_job_age()", "3 * initial_interval"):
    assert name in source, name
for function in (plugin.query_job_status, plugin.get_min_job_age):
    assert function.__module__ == "halfstep.workflow.slurm_plugin"
report = plugin.Executor._report_job_error_threadsafe
assert hasattr(report, "__wrapped__") and "SLURM sbatch failed" in inspect.getsource(plugin)
for module in (plugin, jobstep):
    assert hasattr(module.Executor.run_job, "__wrapped__")
"""


def test_the_installed_plugin_is_the_patched_one():
    """It looks up its functions where slurm_plugin.py puts ours."""
    done = subprocess.run([sys.executable, "-c", PATCHED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
