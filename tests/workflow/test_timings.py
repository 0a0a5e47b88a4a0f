"""The jobs of `latency`: a grid that is asked for, in jobs that fit into their time limits."""

import re
from types import SimpleNamespace

import pytest

from halfstep.config import SIZES, Benchmark, BenchmarkOptions, DrawOptions
from halfstep.errors import ConfigError
from halfstep.resolve import flags, resolve
from halfstep.workflow.machine import Site, base_resources
from halfstep.workflow.targets import Targets
from halfstep.workflow.timings import FEWEST_MINUTES, latency_jobs, latency_minutes

PAPER = [64, 128, 256, 512, 1024, 2048]


def config(preset="owt-small", **benchmark):
    """The preset with these keys of `benchmark`."""
    found = resolve({"preset": preset})
    options = Benchmark(**found.benchmark.model_dump() | benchmark)
    return found.model_copy(update={"benchmark": options})


def grid(jobs: dict[str, BenchmarkOptions]) -> dict[str, set[tuple[int, int, int]]]:
    """The (length, batch size, steps) of every network."""
    found: dict[str, set[tuple[int, int, int]]] = {}
    for name, options in jobs.items():
        found.setdefault(name.split("/")[0], set()).update(
            (length, batch, steps)
            for length in options.lengths
            for batch in options.batch_sizes
            for steps in options.benchmark_steps
        )
    return found


def product(*lists):
    """The Cartesian product, as a set."""
    cases = {()}
    for values in lists:
        cases = {(*case, value) for case in cases for value in values}
    return cases


def test_the_paper_grid_is_not_squared():
    """Curves over lengths in two batch sizes; further ones only where the samples are."""
    found = grid(latency_jobs(config(), "owt-small"))
    few = [4, 8, 16, 32, 64]
    curves = product(PAPER, [8, 4], few)
    assert found.pop("trained") == (
        curves | product([1024], [8, 4], [128, 256]) | product([1024], [1, 32, 128, 512], few)
    )
    assert found == dict.fromkeys(["medium", "large", "1.3B", "3B", "8B"], curves)


def test_every_case_is_timed_in_one_job():
    jobs = latency_jobs(config(), "owt-small")
    cases = [
        (name.split("/")[0], length, batch, steps)
        for name, options in jobs.items()
        for length in options.lengths
        for batch in options.batch_sizes
        for steps in options.benchmark_steps
    ]
    assert len(cases) == len(set(cases))
    assert all(len(options.lengths) == 1 for options in jobs.values())


def test_the_length_of_the_samples_is_always_timed():
    jobs = latency_jobs(config(lengths=[64, 512], sizes=["large"]), "owt-small")
    lengths = {(name.split("/")[0], *options.lengths) for name, options in jobs.items()}
    assert lengths == {
        *(("trained", n) for n in (64, 512, 1024)),
        *(("large", n) for n in (64, 512)),
    }


def test_lengths_of_a_tiny_network_share_a_job_where_their_steps_are_the_same():
    """The demo starts one process; with more_steps the length of the samples has its own."""
    jobs = latency_jobs(config("laptop"), "stories-tiny")
    assert {name: options.lengths for name, options in jobs.items()} == {
        "trained/length-64-256": [64, 256]
    }
    jobs = latency_jobs(config("laptop", lengths=[64, 128], more_steps=[2]), "stories-tiny")
    assert {name: options.lengths for name, options in jobs.items()} == {
        "trained/length-64-128": [64, 128],
        "trained/length-256": [256],
    }


def test_further_sizes_are_timed_once_for_all_teachers():
    found = Targets(config("owt-scaling"))
    sizes = [name.split("/")[:2] for name in found.timings.jobs]
    assert ["owt-small-400k", "1.3B"] in sizes
    assert [teacher for teacher, size in sizes if size != "trained"] == ["owt-small-400k"] * 30


def test_time_limits_grow_with_all_that_takes_time():
    base = BenchmarkOptions(lengths=[1024], batch_sizes=[8], timed_dtype="bfloat16")
    for more in (
        {"lengths": [2048]},
        {"batch_sizes": [8, 512]},
        {"benchmark_steps": [4096]},
        {"repeats": 40},
        {"timed_dtype": "float32"},
    ):
        assert latency_minutes("large", base.model_copy(update=more)) > latency_minutes(
            "large", base
        )
    limits = [latency_minutes(size, base) for size in SIZES]
    assert limits[1:] == sorted(limits[1:]) and min(limits) == FEWEST_MINUTES


def flops(size: str, options: BenchmarkOptions) -> float:
    """Operations of the students alone: 2 per weight and token (arXiv 2001.08361, table 1)."""
    blocks, width, _ = SIZES[size]
    calls = (options.repeats + 1) * sum(options.benchmark_steps)
    tokens = sum(options.lengths) * sum(options.batch_sizes)
    return 2.0 * blocks * 12 * width**2 * tokens * calls


@pytest.mark.parametrize("preset", ["owt-small", "owt-scaling", "owt-adapted"])
def test_no_job_needs_more_than_half_of_its_limit_on_a_common_gpu(preset):
    """At 150 TFLOP/s, which an A100 sustains; a day is the limit of many sites."""
    found = Targets(config(preset))
    for name, options in found.timings.jobs.items():
        teacher, size, _ = name.split("/")
        if size == "trained":
            size = found.config.teachers[teacher].network.size
        minutes = latency_minutes(size, options)
        asked = base_resources(size, "latency", 1, Site(), minutes)
        assert asked["runtime"] == minutes < 24 * 60 and asked["gpu"] == 1
        assert flops(size, options) / 150e12 / 60 < minutes / 2


def test_a_dry_run_lists_a_job_for_each_network_and_length(workflow):
    table = "results/tables/speed.csv"
    plan = workflow.plan("-p", table, "--config", "preset=owt-small")
    jobs = plan.split("rule latency:")[1:]
    assert len(jobs) == 6 * 6 + 4
    by_output = {re.search(r"benchmarks/owt-small/(\S+)\.json", job)[1]: job for job in jobs}
    expected = latency_jobs(config(), "owt-small")
    assert by_output.keys() == expected.keys()
    for name, job in by_output.items():
        command = " ".join(job.split("halfstep latency")[1].split("2>&1")[0].split())
        assert flags(expected[name]) in command
        size = name.split("/")[0]
        assert ("--baseline results/models/owt-small/baseline" in command) == (size == "trained")
        assert (f"--size {size}" in command) == (size != "trained")


VARIANTS = {
    "sure": {"sampler": "threshold", "steps": [16, 64]},
    "drafts": {"sampler": "speculative", "draft_tokens": 8, "steps": [256], "rounds": [4, 7]},
    "scored": {"sampler": "energy", "steps": [16], "rounds": [0]},
}


def with_variants(**benchmark):
    names = {"timed_variants": ["sure", "drafts", "scored"], "more_batch_sizes": [64]}
    sampling = {"variants": VARIANTS}
    return resolve({"preset": "laptop", "sampling": sampling, "benchmark": names | benchmark})


def test_a_variant_is_timed_with_the_models_that_it_draws():
    """By default the teacher and the last round; each variant is one job, in all batch sizes."""
    found = Targets(with_variants())
    models = {}
    for name, options in found.timings.jobs.items():
        if "variant-" in name:
            teacher, size, cases = name.split("/")
            job = SimpleNamespace(teacher=teacher, size=size, cases=cases)
            models[cases] = [file.split("/", 3)[3] for file in found.timings.models(job)]
            assert (options.lengths, options.batch_sizes[-1]) == ([256], 64)
            assert found.timings.minutes(job) >= FEWEST_MINUTES
            assert "--baseline results/models/stories-tiny/baseline" in found.timings.network(job)
    teacher, last = "teacher/meta.json", "kl_backward/round-7/meta.json"
    assert models == {
        "variant-sure": [teacher, last],
        "variant-drafts": ["kl_backward/round-4/meta.json", last],
        "variant-scored": [teacher],
    }
    assert found.timings.jobs["stories-tiny/trained/variant-sure"].benchmark_steps == [16, 64]
    none = Targets(with_variants(timed_variants=[])).timings.jobs
    assert not [name for name in none if "variant-" in name]


def test_another_option_of_a_variant_reruns_its_job_alone():
    """The flags of all other jobs stay the same."""

    def flags_of(config):
        found = Targets(config)
        jobs = {}
        for name, options in found.timings.jobs.items():
            teacher, size, cases = name.split("/")
            job = SimpleNamespace(teacher=teacher, size=size, cases=cases)
            jobs[cases] = flags(options), found.timings.network(job), found.timings.models(job)
        return jobs

    before = flags_of(with_variants())
    config = with_variants()
    drafts = config.sampling.variants["drafts"].model_copy(update={"draft_tokens": 2})
    changed = config.sampling.model_copy(
        update={"variants": config.sampling.variants | {"drafts": drafts}}
    )
    after = flags_of(config.model_copy(update={"sampling": changed}))
    assert [name for name in before if before[name] != after[name]] == ["variant-drafts"]


def test_a_timed_variant_must_be_one_of_the_samples():
    with pytest.raises(ConfigError, match="timed_variants: found other, which is not a key of"):
        with_variants(timed_variants=["other"])


def test_the_time_limit_of_a_variant_grows_with_its_texts():
    options = BenchmarkOptions(lengths=[256], batch_sizes=[64], benchmark_steps=[256])
    few, more = DrawOptions(sampler="speculative"), DrawOptions(sampler="energy", candidates=64)
    plain, drafted, scored = (latency_minutes("tiny", options, 1, how) for how in (None, few, more))
    assert plain < scored and drafted > FEWEST_MINUTES
    assert latency_minutes("tiny", options, 3, more) > latency_minutes("tiny", options, 1, more)
