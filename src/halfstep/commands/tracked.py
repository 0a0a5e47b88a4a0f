"""What `halfstep track` sends: journals and scores of models, and overviews of teachers."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from halfstep.commands.samples import first_texts
from halfstep.config import NAIVE
from halfstep.errors import HalfstepError
from halfstep.files import read_json
from halfstep.records.jobs import Job, Overview
from halfstep.records.shapes import check_row, check_run, student_steps
from halfstep.sanitize import mask_secrets
from halfstep.seeds import first_training, repeat_seed

if TYPE_CHECKING:
    from halfstep.report.sentences import Headline

TEXTS = 3  # texts of each chosen step count
FIGURES_AND_TABLES = (".svg", ".pdf", ".csv", ".md", ".json")
# Files that a teacher's description links to, where they exist.
LINKED = (
    *("figures/ppl_vs_steps.svg", "figures/loss_curves.svg", "tables/steps.md"),
    *("tables/temperatures.md", "tables/lambada.md", "tables/speed.md"),
)


def gather_jobs(results: Path) -> list[Job]:
    """Every model with a journal or a measurement; of each teacher, the rounds come last.

    Naive samplers are no models: only the tables have them.
    """
    jobs: dict[str, Job] = {}
    for file in sorted((results / "models").rglob("run.json")):
        # If the job starts anew meanwhile, a few new points reach its old run. That does no harm:
        # the next sync replaces the old run.
        model = file.parent.relative_to(results / "models").as_posix()
        run = check_run(mask_secrets(read_json(file)), file)
        steps = student_steps(file.parent)
        jobs[model] = Job(model, _with_seed(run, model), file.parent, own_steps=steps)
    measurements = [
        *(results / "metrics").rglob("*.json"),
        *(results / "benchmarks").rglob("*.json"),
    ]
    for file in sorted(measurements):
        rows = read_json(file)
        for number, row in enumerate(rows if isinstance(rows, list) else [], start=1):
            checked = check_row(row, file, number)
            if checked.get("run") not in NAIVE:
                _add_row(jobs, checked, file)
    for model, job in jobs.items():
        folder = results / "samples" / model
        if folder.resolve().is_relative_to((results / "samples").resolve()):  # model: from a row
            job.texts = _sample_texts(folder, job)
    order = sorted(jobs, key=lambda model: (model.split("/")[0], "round-" in model, model))
    return [jobs[model] for model in order]


def _sample_texts(folder: Path, job: Job) -> dict[str, str]:
    """The first texts at the step count that a student was made for, at the fewest and the most."""
    counts = sorted(
        int(steps)
        for file in folder.glob("steps-*/samples.txt")
        if (steps := file.parent.name.removeprefix("steps-")).isdecimal()
    )
    chosen = {*counts[:1], *counts[-1:], *({job.own_steps} & set(counts))}
    return {
        f"samples/steps-{steps}.txt": f"The first texts of {job.model} at {steps} steps.\n\n"
        + first_texts(folder / f"steps-{steps}" / "samples.txt", TEXTS)
        for steps in sorted(chosen)
    }


def gather_overviews(results: Path, jobs: list[Job]) -> dict[str, Overview]:
    """The overview of each teacher: what `halfstep summary` says first, and files."""
    found = _headlines(results)
    files = _tables_and_figures(results)
    overviews = {}
    for teacher in dict.fromkeys(job.teacher for job in jobs):
        leads, mine = found.get(teacher, ([], []))
        overviews[teacher] = Overview(
            sentences=leads,
            linked=[name for name in LINKED if results / name in files],
            metrics=_summary_metrics(mine),
            files=files,
            configuration=_configuration([job for job in jobs if job.teacher == teacher]),
        )
    return overviews


def _headlines(results: Path) -> dict[str, tuple[list[str], list[Headline]]]:
    """The first sentences and the headlines of each teacher; none without a table of steps."""
    from halfstep.commands.report import read_headlines

    with contextlib.suppress(HalfstepError):  # summary names the fault; curves are sent without it
        if (results / "tables" / "steps.csv").is_file():
            return read_headlines(results / "tables")
    return {}


def _summary_metrics(headlines: list[Headline]) -> dict[str, float]:
    """Perplexity and steps of each run's student, and of the teacher at its best."""
    found = {}
    for headline in headlines:
        rows = {headline.student["run"]: headline.student, "teacher": headline.best}
        for name, row in rows.items():
            found[f"summary/perplexity_{name}"] = float(row["value"])
            found[f"summary/steps_{name}"] = float(row["steps"])
    return {key: value for key, value in found.items() if math.isfinite(value)}


def _configuration(jobs: list[Job]) -> str:
    """The command and all options of each training, as YAML."""
    trainings = {
        job.model: {
            "command": job.run.get("tags", {}).get("command", ""),
            "options": job.run.get("params", {}),
            "data": {data["name"]: data["digest"] for data in job.run.get("datasets", [])},
        }
        for job in jobs
        if job.folder
    }
    return yaml.safe_dump(trainings, sort_keys=False, allow_unicode=True)


def _tables_and_figures(results: Path) -> list[Path]:
    files = [file for kind in ("tables", "figures") for file in (results / kind).glob("*")]
    return sorted(file for file in files if file.suffix in FIGURES_AND_TABLES and file.is_file())


def _with_seed(run: dict, model: str) -> dict:
    """run.json of a repeat with its seed in the name and in the tags; others stay the same."""
    seed = repeat_seed(model)
    if seed is None:
        return run
    name = f"{first_training(run['name'])} seed {seed}"
    return run | {"name": name, "tags": run.get("tags", {}) | {"training_seed": seed}}


def _add_row(jobs: dict[str, Job], row: dict, file: Path) -> None:
    """Add a metric row to the job of its model; skip it if the job's checkpoint is another one."""
    model = _model_of(row)
    if model not in jobs:
        jobs[model] = _untrained_job(model, row)
    job = jobs[model]
    digests = (job.run.get("checkpoint") or {}).get("sha256", {}).values()
    measured = row.get("checkpoint")
    if measured and digests and not any(digest.startswith(measured) for digest in digests):
        return
    steps = int(row.get("steps") or 0)
    for (key, step), value in _metrics(row, job.own_steps).items():
        if value is None or not math.isfinite(value):
            continue
        known = job.evaluations.setdefault((key, step), value)
        if known != value:
            raise HalfstepError(
                f"{file}: {key} of {model} at {steps} steps is {value:g}, "
                f"but {known:g} in another row; keep one of them"
            )


def _is_timing(row: dict) -> bool:
    return row["metric"] == "latency_s"


def _model_of(row: dict) -> str:
    """The model of a row. All timings of a teacher's models belong to one run."""
    if _is_timing(row):
        return f"{row['teacher']}/benchmark"
    return row["model"] if "/" in row["model"] else f"{row['teacher']}/{row['model']}"


def _untrained_job(model: str, row: dict) -> Job:
    """A job without a journal: held-out text, timings, or weights from elsewhere."""
    checkpoint = None
    if row.get("checkpoint") and not _is_timing(row):
        checkpoint = {"folder": "", "sha256": {row.get("weights") or "model": row["checkpoint"]}}
    name = model.split("/", 1)[1]
    command = {"data": "score-corpus", "benchmark": "latency"}.get(name, "score-samples")
    run = {"name": name, "node": f"{command}/{model}", "started": 0.0, "checkpoint": checkpoint}
    return Job(model, run)


def _metrics(row: dict, own_steps: int | None = None) -> dict[tuple[str, int], float | None]:
    """The values of a row by MLflow's keys and steps.

    What is measured at several step counts has a curve over them, `by_steps/...`, and a key for
    each count, `eval/..._at_8_steps`. MLflow shows one number for each key: of a curve it is that
    of the largest count, by which runs must not be sorted. `at_own_steps` is the count that a
    student was made for. The keys are the same for every model, so that MLflow can compare runs.
    Each judge has its own curve, and so have each task, each variant of the draws, and each
    temperature but 1, which have no further keys.
    """
    if _is_timing(row):
        name = row["model"].split("/", 1)[-1].replace("/", "-")
        if not row.get("steps") and row.get("sampler") not in (None, "kv_cache"):
            name += f"-{row['sampler']}"  # another decoder of the same baseline
        if row.get("variant"):
            name += f"-{row['variant']}"
        case = f"{name}_length_{row['length']}_batch_{row['batch_size']}"
        steps = int(row.get("steps") or 0)
        return {
            (f"speed/latency_s_{case}", steps): row["value"],
            (f"speed/tokens_per_s_{case}", steps): row.get("tokens_per_s"),
        }
    judge = (row.get("judge") or "").partition("@")[0]
    suffix = f"_{judge.rpartition('/')[2]}" if judge and "/baseline" not in judge else ""
    if task := row.get("task"):
        suffix += f"_{task}" + (f"_{row['measure']}" if row.get("measure") else "")
        suffix = suffix.replace(",", "")  # "exact_match, strict-match": no key has a comma
    if variant := row.get("variant"):
        suffix += f"_{variant}"
    if temperature := row.get("temperature"):
        suffix += f"_temperature_{temperature:g}"
    name, value = f"{row['metric']}_{row['protocol']}{suffix}", row["value"]
    steps = row.get("steps")
    if steps is None:
        return {(f"eval/{name}", 0): value}
    found = {(f"by_steps/{name}", steps): value}
    if not (row.get("temperature") or row.get("variant")):
        found[f"eval/{name}_at_{steps}_steps", 0] = value
        if steps == own_steps:
            found[f"eval/{name}_at_own_steps", 0] = value
    return found
