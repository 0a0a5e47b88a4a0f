"""The jobs of `halfstep latency` in a graph: which models each of them times, and how they draw.

Methods that take `wildcards` are input functions of the rule `latency`.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from halfstep.config import BenchmarkOptions, DrawOptions
from halfstep.resolve import flags, subsection
from halfstep.seeds import repeat_seed
from halfstep.workflow.timings import (
    TRAINED,
    VARIANT,
    latency_jobs,
    latency_minutes,
    variant_job,
)

if TYPE_CHECKING:
    from halfstep.workflow.targets import Targets, Wildcards


class Timings:
    """What the jobs of a configuration time, by their names: {teacher}/{size}/{cases}."""

    def __init__(self, targets: Targets):
        self.targets, self.config = targets, targets.config
        self.jobs = {
            f"{name}/{job}": options
            for name in targets.teachers
            for job, options in latency_jobs(self.config, name).items()
        }
        for variant, name in product(self.config.benchmark.timed_variants, targets.teachers):
            if samples := self._samples(name, variant):
                counts = {steps for model in samples for steps in targets.step_counts(model)}
                job = f"{name}/{TRAINED}/{VARIANT}{variant}"
                self.jobs[job] = variant_job(self.config, name, sorted(counts))

    def options(self, wildcards: Wildcards) -> BenchmarkOptions:
        """What a job times."""
        return self.jobs[f"{wildcards.teacher}/{wildcards.size}/{wildcards.cases}"]

    def models(self, wildcards: Wildcards) -> list[str]:
        """The files that stand for the students of a job; of a variant they are several."""
        models = [f"{wildcards.teacher}/teacher"]  # a student has the same network
        if variant := _variant(wildcards):
            samples = self._samples(wildcards.teacher, variant)
            models = [self.targets.varied[name][0] for name in samples]
        return [f"results/models/{model}/meta.json" for model in models]

    def draws(self, wildcards: Wildcards) -> DrawOptions | None:
        """How the variant of a job draws, if it times one; the dtype is that of all timings."""
        variant = _variant(wildcards)
        if not variant:
            return None
        draws = subsection(self.config.sampling.variants[variant], DrawOptions)
        return draws.model_copy(update={"precision": DrawOptions.model_fields["precision"].default})

    def scorer(self, wildcards: Wildcards) -> list[str]:
        """The file that stands for the scorer of a variant, if it names one of ours."""
        draws = self.draws(wildcards)
        return self.targets.scorer_file(draws.scorer if draws else None)

    def baseline(self, wildcards: Wildcards) -> list[str]:
        """The folder of the baseline that is timed together with a trained network."""
        model = f"{wildcards.teacher}/baseline"
        is_timed = wildcards.size == TRAINED and model in self.targets.models
        return [f"results/models/{model}"] if is_timed else []

    def network(self, wildcards: Wildcards) -> str:
        """The flags of `latency` that name what else it times, if anything."""
        if wildcards.size != TRAINED:
            return f"--size {wildcards.size}"
        words = [f"--baseline {folder}" for folder in self.baseline(wildcards)]
        if draws := self.draws(wildcards):
            words += [f"--variant {_variant(wildcards)}", flags(draws)]
        return " ".join(filter(None, words))

    def minutes(self, wildcards: Wildcards) -> int:
        """The time limit of a job."""
        size = self.targets.network_size(wildcards)
        students = len(self.models(wildcards))
        return latency_minutes(size, self.options(wildcards), students, self.draws(wildcards))

    def _samples(self, teacher: str, variant: str) -> list[str]:
        """The names of samples, {model}/{variant}, with which a variant of a teacher is timed.

        They are of all rounds that the variant names, or else of the teacher and the last rounds;
        repeats of a training have no timings.
        """
        final = self.targets.final_models()
        return [
            name
            for name, (model, of) in self.targets.varied.items()
            if of == variant
            and model.startswith(f"{teacher}/")
            and not model.endswith("/baseline")
            and repeat_seed(model) is None
            and (self.config.sampling.variants[variant].rounds or model in final)
        ]


def _variant(wildcards: Wildcards) -> str:
    """The variant that a job times; "" if it times none."""
    found = wildcards.cases.startswith(VARIANT)
    return wildcards.cases.removeprefix(VARIANT) if found else ""
