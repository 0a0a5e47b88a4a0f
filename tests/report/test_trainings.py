"""Repeated trainings in tables and figures: mean and t-interval, against scipy's distribution."""

import json
from functools import partial

import numpy
import pandas
import pytest
import scipy.stats
import synthetic

from halfstep.commands.report import plot, tabulate
from halfstep.commands.tracked import gather_jobs
from halfstep.errors import HalfstepError
from halfstep.report.catalogue import FIGURES, TABLES
from halfstep.report.conditions import describe_conditions
from halfstep.report.curves import read_curves
from halfstep.report.rows import WITHOUT_STEPS, read_rows, read_table
from halfstep.report.sentences import gains, headline_sentence, headlines
from halfstep.report.tables import select_steps
from halfstep.report.trainings import mean_interval, paired_change, pool_trainings

FACTORS = {None: 1.0, 2: 1.2, 3: 0.95}  # of all values of a training, by the seed in its name
SCORES = ("samples.json", "continuations.json", "lambada.json", "frontier.json")
FIRST = "stories-tiny"


def scaled(row: dict, seed: int, of_run: str | None) -> dict:
    """A row of the first training as the repeat with this seed would have it."""
    values = {
        key: row[key] and row[key] * FACTORS[seed] for key in ("value", "low", "high")
    }  # None: a curve that was not reached
    model = renamed(row["model"], seed, of_run)
    return row | values | {"model": model, "training_seed": seed, "seed": 1 + seed}


def renamed(model: str, seed: int, of_run: str | None) -> str:
    name = of_run or FIRST
    return "/".join(f"{part}-seed-{seed}" if part == name else part for part in model.split("/"))


def repeat(results, seed: int, of_run: str | None = None) -> None:
    """Add the repeat of the teacher's training, or of one of its runs, to synthetic results."""
    parts = (of_run or "**",)
    for file in sorted((results / "metrics" / FIRST).glob("/".join([*parts, "**/*.json"]))):
        folder = file.parent.relative_to(results / "metrics").as_posix()
        model = folder.removesuffix("/released-noise")
        skipped = any(part in model for part in ("baseline", "naive", "-seed-"))
        if file.name not in SCORES or skipped:
            continue
        target = results / "metrics" / renamed(folder, seed, of_run)
        rows = [scaled(row, seed, of_run) for row in json.loads(file.read_text())]
        synthetic.dump(target / file.name, rows)
        if file.name != "samples.json":
            continue
        run, _, round_ = model.removeprefix(f"{FIRST}/").partition("/round-")
        folder = results / "models" / renamed(model, seed, of_run)
        if not folder.exists():
            synthetic.train(folder, renamed(model, seed, of_run), run, int(round_ or 0), points=30)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Three trainings of a teacher and of its run."""
    results = tmp_path_factory.mktemp("trainings")
    synthetic.write(results, runs=("kl_backward",), rounds=2, steps=[8, 16], points=30)
    for seed in (2, 3):
        repeat(results, seed)
    for name in TABLES:
        rows = [results / "metrics", results / "benchmarks"]
        tabulate(name, rows, results / "tables" / name)
    return results


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_interval_is_students(n):
    values = numpy.random.default_rng(n).normal(3, 2, n)
    mean, *interval = mean_interval(values)
    spread = scipy.stats.sem(values)
    assert mean == pytest.approx(values.mean())
    assert interval == pytest.approx(scipy.stats.t.interval(0.95, n - 1, values.mean(), spread))
    assert mean_interval(numpy.ones(n)) == (1, 1, 1)


def test_the_interval_of_two_values_has_a_closed_form():
    """t with one degree of freedom is Cauchy's: its 97.5% point is tan(0.475 pi)."""
    _, low, high = mean_interval(numpy.array([1.0, 2.0]))
    assert (high - low) / 2 == pytest.approx(0.5 * numpy.tan(0.475 * numpy.pi))


def test_csv_holds_the_rows_of_every_training(results):
    table = read_table(results / "tables/steps.csv")
    teacher = table.query("run == 'teacher' and metric == 'entropy' and steps == 8")
    assert (teacher["teacher"] == FIRST).all()
    assert teacher["training_seed"].fillna(0).tolist() == [0, 2, 3]
    assert teacher["model"].tolist() == [
        f"{FIRST}{end}/teacher" for end in ("", "-seed-2", "-seed-3")
    ]
    base = teacher["value"].iloc[0]
    assert teacher["value"].tolist() == pytest.approx([base * f for f in FACTORS.values()])


@pytest.mark.parametrize("name", ["steps", "lambada", "continuations", "temperatures"])
def test_every_cell_is_the_mean_over_its_trainings(results, name):
    """Arithmetic, but geometric for perplexities, with Student's interval in the same scale."""
    table = read_table(results / f"tables/{name}.csv")
    pooled = pool_trainings(table)
    assert pool_trainings(pooled) is pooled
    models = table[table["training_seed"].isna()]
    assert len(pooled) == len(models) and pooled["model"].tolist() == models["model"].tolist()
    factors = numpy.array([*FACTORS.values()])
    near = partial(pytest.approx, nan_ok=True)  # nan: a curve that was not reached
    for (_, row), (_, first) in zip(pooled.iterrows(), models.iterrows(), strict=True):
        if row["run"] in WITHOUT_STEPS:
            assert numpy.isnan(row["trainings"]) and row["low"] == first["low"]
            continue
        log = "perplexity" in row["metric"]
        scale, back = (numpy.log, numpy.exp) if log else (float, float)
        values = numpy.array([scale(first["value"] * factor) for factor in factors])
        spread = scipy.stats.sem(values)
        expected = scipy.stats.t.interval(0.95, 2, values.mean(), spread)
        assert row["trainings"] == 3 and row["value"] == near(back(values.mean()))
        assert [row["low"], row["high"]] == near([back(bound) for bound in expected])
        half = max(first["high"] - first["value"], first["value"] - first["low"])
        assert row["texts_half"] == near(half)  # the median factor is 1


@pytest.mark.parametrize(
    ("metric", "scale"), [("generative_perplexity", numpy.log), ("entropy", numpy.asarray)]
)
def test_models_of_the_same_trainings_are_compared_in_pairs(metric, scale):
    """Scipy's paired t-test, on logarithms of perplexities."""
    values = numpy.random.default_rng(1).uniform(1, 9, (2, 4))

    def row(by_training):
        return pandas.Series({"metric": metric, "by_training": by_training})

    student, teacher = (row(dict(enumerate(each))) for each in values)
    expected = scipy.stats.ttest_rel(*scale(values)).confidence_interval(0.95)
    assert paired_change(student, teacher)[1:] == pytest.approx(tuple(expected))
    assert paired_change(student, row({0: 1.0, 1: 2.0})) is None
    assert paired_change(student, row(None)) is None


def test_sentences_compare_trainings_in_pairs(results):
    """The synthetic trainings differ by a factor, which a pair does not see."""
    rows = pool_trainings(read_table(results / "tables/steps.csv")).query("protocol == 'ids'")
    (text,) = gains(rows, rows[:0])
    times = teacher_of(rows) / student_of(rows)
    assert f"({times:.3g} [{times:.3g}, {times:.3g}] times lower)" in text.splitlines()[1]
    (headline,) = headlines(rows)
    ratio = headline.student["value"] / headline.best["value"]
    assert f", a ratio of {ratio:.2f} [{ratio:.2f}, {ratio:.2f}]: " in headline_sentence(headline)


def teacher_of(rows):
    """The first training's perplexity of the teacher with 8 steps."""
    return rows.query("run == 'teacher' and steps == 8")["by_training"].iloc[0][0]


def student_of(rows):
    """The first training's perplexity of the last round with 8 steps."""
    return rows.query("round == 2 and steps == 8")["by_training"].iloc[0][0]


def test_a_grid_has_one_line_for_all_trainings_and_both_intervals(results):
    text = (results / "tables/steps.md").read_text()
    (grid, *_) = text.split("### ")[1:]
    lines = [line for line in grid.splitlines() if line.startswith("|")]
    models = [line.split("|")[1].strip() for line in lines[2:]]
    assert models == ["teacher", "reverse KL round 1", "reverse KL round 2"]
    mean = 150 * (1.2 * 0.95) ** (1 / 3)
    logs = numpy.log([150, 180, 142.5])
    high = numpy.exp(logs.mean() + scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem(logs))
    assert f"| {mean:.0f} ±{high - mean:.0f} [texts ±6] " in lines[2]
    assert "Models with 3 trainings: mean and 95% t-interval over trainings, each with" in grid
    assert "In brackets: the interval over the texts of one training" in grid
    assert "Without sampling steps: autoregressive: 9.40 ±0.38; held-out text: 7.20 ±0.29." in grid
    for name in ("lambada", "continuations"):
        assert "[texts ±" in (results / f"tables/{name}.md").read_text()


@pytest.mark.parametrize("name", ["ppl_vs_steps", "lambada_vs_round", "frontier", "decoders"])
def test_a_figure_has_one_line_for_all_trainings_and_a_band_over_them(results, name):
    tables = [results / f"tables/{need}.csv" for need in FIGURES[name].needs]
    plot(name, tables, results / "figures" / name)
    pooled = pandas.concat([pool_trainings(read_table(table)) for table in tables])
    known = pooled.loc[pooled["trainings"] == 3, ["value", "low", "high"]].to_numpy(float)
    points = pandas.read_csv(results / f"figures/{name}.csv")
    is_line = points["kind"].isin(["line", "curve"]) & ~points["series"].isin(["baseline", "data"])
    lines = points[is_line]
    assert len(lines) >= 6 and not lines.duplicated(["panel", "series", "x"]).any()
    for point in lines[["y", "low", "high"]].to_numpy(float):
        assert numpy.isclose(known, point).all(1).any(), point
    assert "Models with 3 trainings" in describe_conditions(pooled)


def test_loss_curves_are_means_with_the_range_of_all_trainings(results):
    folder = results / "models"
    plot("loss_curves", [folder], results / "figures/loss_curves")
    points = pandas.read_csv(results / "figures/loss_curves.csv")
    logged = points[~points["series"].str.endswith("smoothed")]
    assert len(logged.drop_duplicates(["panel", "series"])) == 2 * 4  # losses x models
    assert not points.duplicated(["panel", "series", "x"]).any()
    once = points["series"] == "baseline"
    assert points.loc[once, ["low", "high"]].isna().all(axis=None)
    curves = read_curves([folder]).query("key == 'train/loss' and series == 'round 2'")
    by_step = curves.groupby("step")["value"]  # 30 points each, so none is left out
    drawn = points[points["series"] == "round 2"].head(30)
    for column, of_trainings in (("y", "mean"), ("low", "min"), ("high", "max")):
        assert drawn[column].to_numpy() == pytest.approx(by_step.agg(of_trainings).to_numpy())


def test_without_repeats_tables_stay_as_they_are(tmp_path):
    results = synthetic.write(tmp_path, runs=("mse",), rounds=1, steps=[8], points=2)
    table = read_rows([results / "metrics"])
    assert pool_trainings(table) is table
    tabulate("steps", [results / "metrics"], results / "steps")
    assert "training" not in (results / "steps.csv").read_text()
    assert "training" not in (results / "steps.md").read_text()


def test_a_repeat_of_a_run_shares_the_line_of_its_run(tmp_path):
    results = synthetic.write(tmp_path, runs=("kl_backward", "mse"), rounds=1, steps=[8], points=2)
    repeat(results, 2, of_run="mse")
    tabulate("steps", [results / "metrics"], results / "steps")
    grid = (results / "steps.md").read_text().split("### ")[1]
    assert grid.count("\n| squared error round 1 ") == 1 and grid.count("[texts") == 1


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"sampler": "analytic"}, "sampler"),
        ({"weights": "raw"}, "weights"),
        ({"num_samples": 7}, "num_samples"),
        ({"data": "others@ffffffffffff"}, "data"),
        ({"judge": "gpt2"}, "judge gpt2"),
        ({"seed": 9}, "seed 9|seed 3"),
    ],
)
def test_trainings_measured_under_other_conditions_are_refused(tmp_path, change, found):
    """Also a repeat of which one model was drawn with another seed."""
    results = synthetic.write(
        tmp_path, runs=("mse",), rounds=2, steps=[8], points=1, benchmark=False
    )
    repeat(results, 2)
    file = results / "metrics/stories-tiny-seed-2/mse/round-2/samples.json"
    rows = json.loads(file.read_text())
    judged = [key for key in change if key == "judge"]
    changed = [row | change if not judged or row["judge"] else row for row in rows]
    file.write_text(json.dumps(changed))
    with pytest.raises(HalfstepError, match=found) as error:
        select_steps(read_rows([results / "metrics"]))
    assert "do not belong in one column" in str(error.value)


def test_repeats_are_runs_of_mlflow_below_their_teacher(results):
    jobs = {job.model: job for job in gather_jobs(results) if job.folder}
    assert len(jobs) == 3 * 3 + 1 and {job.teacher for job in jobs.values()} == {FIRST}
    names = {model: job.run["name"] for model, job in jobs.items()}
    assert names[f"{FIRST}/teacher"] == "teacher"
    assert names[f"{FIRST}-seed-2/teacher"] == "teacher seed 2"
    assert names[f"{FIRST}-seed-3/kl_backward/round-2"] == "kl_backward/round-2 seed 3"
    tags = {model: job.run["tags"].get("training_seed") for model, job in jobs.items()}
    assert tags[f"{FIRST}-seed-3/kl_backward/round-2"] == 3 and tags[f"{FIRST}/teacher"] is None
    assert jobs[f"{FIRST}-seed-2/teacher"].evaluations != jobs[f"{FIRST}/teacher"].evaluations
