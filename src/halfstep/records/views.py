"""A view of MLflow's pages for each teacher: the loss curves of three runs, in one chart.

The pages read a view from a tag of the experiment, as their button "Share" writes it. The tag holds
what this module writes as JSON: which runs, in which order, and which charts come first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from urllib.parse import quote

from halfstep.records.jobs import Job
from halfstep.seeds import first_training

TAG = "mlflow.sharedViewState."
RUNS = 3
WHOLE = ("finished", "running")
LOSS, PERPLEXITY = "train/loss", "by_steps/generative_perplexity_"


def choose_jobs(children: Sequence[Job]) -> list[Job]:
    """Up to three trainings of a teacher whose losses are worth comparing, the earliest first.

    These are the last rounds of its runs; where it has fewer than three, the first round of the
    first run, the teacher and the baseline follow. Repeats and failed trainings are left out.
    """
    trained = {
        job.model.partition("/")[2]: job
        for job in children
        if job.journal and job.status in WHOLE and job.model == first_training(job.model)
    }
    rounds: dict[str, list[tuple[int, Job]]] = {}
    for name, job in trained.items():
        if found := re.fullmatch(r"(.+)/round-(\d+)", name):
            rounds.setdefault(found[1], []).append((int(found[2]), job))
    by_run = [sorted(rounds[run], key=lambda pair: pair[0]) for run in sorted(rounds)]
    order = [found[-1][1] for found in by_run] + [found[0][1] for found in by_run[:1]]
    order += [trained[name] for name in ("teacher", "baseline") if name in trained]
    chosen = {job.model: job for job in order}  # a first round may be the last one
    return sorted([*chosen.values()][:RUNS], key=lambda job: job.run["started"])


def view_state(run_ids: Sequence[str], jobs: Sequence[Job]) -> str:
    """What a view holds: the runs of these jobs, and two charts before all others.

    They show the losses, and the first perplexity over sampling steps that was measured. The runs
    are sorted by name: sorted by time, MLflow folds them into their parent.
    """
    measured = sorted({key for job in jobs for key, _ in job.evaluations})
    charts = [LOSS, *[key for key in measured if key.startswith(PERPLEXITY)][:1]]
    ids = ",".join(f"'{run_id}'" for run_id in run_ids)
    section = {"uuid": "losses", "name": "losses", "display": True, "isReordered": True}
    state = {
        "searchFilter": f"attributes.run_id IN ({ids})",
        "orderByKey": "tags.`mlflow.runName`",
        "orderByAsc": True,
        "compareRunCharts": [_chart(key) for key in charts],
        "compareRunSections": [section | {"isGenerated": False, "columns": 2, "cardHeight": 400}],
        "isAccordionReordered": True,
    }
    return json.dumps(state)


def _chart(key: str) -> dict[str, object]:
    """The curves of one metric, on a logarithmic scale."""
    return {
        "type": "LINE",
        "uuid": key,
        "metricSectionId": "losses",
        "metricKey": key,
        "selectedMetricKeys": [key],
        "displayName": key,
        "deleted": False,
        "isGenerated": False,
        "runsCountToCompare": RUNS,
        "lineSmoothness": 0,
        "xAxisScaleType": "linear",
        "scaleType": "log",
        "range": {},
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "displayPoints": False,
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }


def view_tag(teacher: str, folder_id: str) -> str:
    """The tag of the experiment that holds a teacher's view, for this results folder."""
    return f"{TAG}{re.sub(r'[^a-zA-Z0-9_.-]', '-', teacher)[:100]}-{folder_id[:8]}"


def view_name(tag: str) -> str:
    """The name of the view that this tag of an experiment holds; "" if it is none of ours."""
    found = re.fullmatch(rf"{re.escape(TAG)}(.+-[0-9a-f]{{8}})", tag)
    return found[1] if found else ""


def view_page(experiment_id: str, name: str) -> str:
    """The address of a view within MLflow's pages."""
    words = f"viewStateShareKey={quote(name)}&compareRunsMode=CHART"
    return f"#/experiments/{experiment_id}/runs?{words}&workflowType=machine_learning"
