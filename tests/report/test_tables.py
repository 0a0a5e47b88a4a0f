"""Tables: complete, refused where rows are not comparable, with their intervals."""

import csv
import json
import tomllib
from pathlib import Path

import pandas
import pytest
import synthetic
from synthetic import dump, timing

from halfstep.commands.report import tabulate
from halfstep.config import NAIVE
from halfstep.errors import HalfstepError
from halfstep.report import figures, published, speed_figures
from halfstep.report.catalogue import TABLES
from halfstep.report.grids import round_number
from halfstep.report.reproduction import speed_claim
from halfstep.report.rows import read_rows, read_table

QUALITY = [name for name in TABLES if name != "speed"]


def write(folder):
    return synthetic.write(folder, runs=("kl_backward", "mse"), rounds=2, steps=[8, 16], points=2)


@pytest.fixture
def results(tmp_path):
    return write(tmp_path)


def rewrite(file, change):
    file.write_text(json.dumps([change(row) for row in json.loads(file.read_text())]))


def make_tables(results, folder="tables", **options):
    """All tables of these results, as they are read back."""
    for name in TABLES:
        rows = [results / "metrics", results / "benchmarks"]
        tabulate(name, rows, results / folder / name, **options)
    return {name: read_table(results / folder / f"{name}.csv") for name in TABLES}


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    """(results, all their tables) for tests that only look at them."""
    folder = write(tmp_path_factory.mktemp("unchanged"))
    return folder, make_tables(folder)


def cells_of(line):
    """The cells of a line of a Markdown grid."""
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_csv_holds_every_row_with_its_interval_and_origin(unchanged):
    results, found = unchanged
    files = results.rglob("metrics/**/*.json")
    rows = [row for file in files for row in json.loads(file.read_text())]
    drawn = found["variants"]
    again = drawn["variant"] == "default"  # rows of other tables, to compare with
    points = [row for row in rows if "variant" in row and "frontier" in row["metric"]]
    assert sum(len(found[name]) for name in QUALITY) - again.sum() == len(rows) - len(points) > 0
    case = {"model": "stories-tiny/mse/round-2", "steps": 16, "protocol": "ids"}
    case |= {"metric": "generative_perplexity"}
    query = "model == @case['model'] and steps == @case['steps'] and protocol == @case['protocol']"
    row = found["steps"].query(query).iloc[0]
    source = next(row for row in rows if case.items() <= row.items())
    assert {key: row[key] for key in source} == source
    assert row["low"] < row["value"] < row["high"]


def test_variants_of_samples_are_compared_with_those_of_the_same_models(unchanged):
    """No other table of samples has them."""
    _, found = unchanged
    table = found["variants"]
    perplexity = table.query("metric == 'generative_perplexity' and protocol == 'ids'")
    drawn = perplexity[~perplexity["run"].isin(("baseline", "data"))]
    pairs = drawn.pivot(index=["model", "steps"], columns="variant", values="value")
    assert len(pairs) == drawn.groupby(["model", "steps"]).ngroups > 1
    assert pairs["released-noise"].to_list() == pytest.approx((0.6 * pairs["default"]).to_list())
    assert table.drop_duplicates("variant")["variant"].to_list() == ["default", "released-noise"]
    for name in QUALITY:
        assert name in ("variants", "infilling") or found[name]["variant"].isna().all()


def test_variants_are_compared_at_the_entropy_of_held_out_text_too(unchanged):
    """Each value read off a curve is in the table, and no point of a curve."""
    results, found = unchanged
    read = found["variants"].query("metric == 'perplexity_at_data_entropy'")
    files = results.rglob("metrics/**/frontier.json")
    rows = [row for file in files for row in json.loads(file.read_text())]
    expected = [row for row in rows if row["metric"] == "perplexity_at_data_entropy"]
    by = ["model", "variant", "steps", "protocol", "value"]
    key = {tuple(row.get(name) for name in by) for row in expected}
    mine = read[by].astype(object).where(read[by].notna(), None)
    mine["variant"] = mine["variant"].replace("default", None)
    assert set(mine.itertuples(index=False, name=None)) == key and len(read) == len(expected)
    assert set(read["variant"]) == {"default", "released-noise"}
    assert not found["variants"]["metric"].str.startswith("frontier").any()


@pytest.mark.parametrize("metric, changes, words", [
    ("perplexity_at_data_entropy", {"at_entropy": 3.5}, "has at_entropy 3.5"),
    ("generative_perplexity", {"num_samples": 8}, "has num_samples 8"),
])  # fmt: skip
def test_variants_of_other_conditions_are_refused(results, metric, changes, words):
    """The number of stories in as many texts differs by itself."""
    folder = results / "metrics/stories-tiny/teacher/released-noise"
    file = folder / ("frontier.json" if "at_data" in metric else "samples.json")
    rewrite(file, lambda row: row | (changes if row["metric"] == metric else {}))
    with pytest.raises(HalfstepError, match=words):
        tabulate("variants", [results / "metrics"], results / "variants")


def test_entropy_is_compared_with_held_out_text(unchanged):
    table = unchanged[1]["steps"]
    row = table.query("metric == 'entropy' and run == 'teacher' and steps == 8").iloc[0]
    assert row["vs_data_percent"] == pytest.approx(100 * (row["value"] / 3.95 - 1))


def test_ratio_to_the_baseline_is_of_the_same_case(unchanged):
    speed = unchanged[1]["speed"]
    for row in speed[speed["run"] != "baseline"].itertuples():
        base = speed.query(
            "run == 'baseline' and length == @row.length and batch_size == @row.batch_size"
        )["value"].item()
        assert row.times_faster == pytest.approx(base / row.value)
    assert (speed.loc[speed["run"] == "baseline", "times_faster"] == 1).all()


def test_markdown_reads_as_a_grid_with_conditions_below(unchanged):
    results, _ = unchanged
    text = (results / "tables" / "steps.md").read_text()
    rows = [cells_of(line) for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == ["sampling steps (tokens per step)", "8 (128)", "16 (64)"]
    assert [row[0] for row in rows[2:7]] == [
        "teacher",
        "reverse KL round 1",
        "reverse KL round 2",
        "squared error round 1",
        "squared error round 2",
    ]
    assert rows[2][1] == "150 ±6"
    assert "Without sampling steps: autoregressive: 9.40 ±0.38; held-out text: 7.20 ±0.29." in text
    judge = "results/models/stories-tiny/baseline@aabbccddeeff (float32)"
    taken = (
        "data stories@001122334455; sampler ancestral; draws float64; n 512; seed 1; "
        "weights ema; commit 0123456789ab."
    )
    assert f"Judge {judge}; protocol ids v1; {taken}" in text
    assert f"Protocol unigram v1; {taken}" in text
    assert "(+2.8%)" in text and "one network evaluation per sampling step" in text
    speed = (results / "tables" / "speed.md").read_text()
    assert "| 64 × 8 " in speed and "270 ±" in speed and "(8.3×)" in speed
    assert "accuracy, parallel" in (results / "tables" / "lambada.md").read_text()


def changed(column, value, **where):
    """A change of the rows that have these values (a judge that is not None, if True)."""

    def change(row):
        matches = all(
            row[key] is not None if expected is True else row[key] == expected
            for key, expected in where.items()
        )
        return row | {column: value} if matches else row

    return change


@pytest.mark.parametrize(
    "change, found",
    [
        (
            changed("judge", "gpt2-large", metric="generative_perplexity"),
            "judge .* gpt2-large",
        ),
        (changed("protocol", "words", protocol="retokenized"), "protocol .*words"),
        (changed("sampler", "analytic"), "sampler .* analytic"),
        (changed("weights", "raw"), "weights .* raw"),
        (changed("draw_dtype", "float32"), "draw_dtype .* float32"),
        (changed("precision", "bfloat16"), "precision .* bfloat16"),
        (changed("version", 2, protocol="ids"), "version of protocol ids .* 2"),
        (
            changed("judge_dtype", "bfloat16", judge=True),
            "judge .* results/models/stories-tiny/baseline@aabbccddeeff bfloat16",
        ),
        (changed("data", "stories@ffffffffffff"), "data .* stories@ffffffffffff"),
        (changed("temperature", 0.9), "temperature .* 0.9"),
        (changed("seed", 2), "seed .* 2"),
        (changed("num_samples", 500), "num_samples .* 500"),
    ],
)
def test_numbers_of_different_conditions_are_refused(results, change, found):
    rewrite(results / "metrics/stories-tiny/mse/round-2/samples.json", change)
    reverse = ".*".join(reversed(found.split(" .* ")))
    with pytest.raises(HalfstepError, match=f"(?s){found}|{reverse}") as error:
        make_tables(results)
    assert "stories-tiny/" in str(error.value) and "do not belong in one column" in str(error.value)


def test_rows_without_a_precision_are_float32(results):
    """Those of older results; held-out text and naive samplers have none in any."""
    file = results / "metrics/stories-tiny/mse/round-2/samples.json"
    assert not any("precision" in row for row in json.loads(file.read_text()))
    make_tables(results)
    rewrite(file, changed("precision", "float32"))
    make_tables(results)


def test_a_number_that_is_there_twice_is_refused(results):
    """The same measure of one model, taken twice: one of the two would hide the other."""
    folder = results / "metrics/stories-tiny/mse/round-2"
    rows = json.loads((folder / "samples.json").read_text())
    other = {"value": 1.0, "low": 1.0, "high": 1.0}
    again = [row | other for row in rows if row["metric"] == "entropy"]
    (folder / "again.json").write_text(json.dumps(again))
    words = r"of stories-tiny/mse/round-2 by protocol unigram at \d+ steps: found 2 times"
    with pytest.raises(HalfstepError, match=f"entropy {words}"):
        make_tables(results)


@pytest.mark.parametrize(
    "change, found",
    [
        (
            changed("data", "last_words.jsonl[2000]@ffffffffffff"),
            "data .*@66778899aabb.*@ffffffffffff",
        ),
        (changed("weights", "raw"), "weights .*ema.* raw"),
        (changed("version", 2, protocol="elbo-mc"), "version of protocol elbo-mc"),
    ],
)
def test_last_words_of_other_items_or_weights_are_refused(results, change, found):
    rewrite(results / "metrics/stories-tiny/mse/lambada.json", change)
    with pytest.raises(HalfstepError, match=f"(?s){found}.*do not belong in one column"):
        tabulate("lambada", [results / "metrics"], results / "lambada")


def tabulate_commits(results, capsys, *found):
    """The warning and the table when the teacher's rows are of these commits in turn."""
    file, each = results / "metrics/stories-tiny/teacher/samples.json", iter(found * 100)
    rewrite(file, lambda row: row | {"commit": next(each)})
    tabulate("steps", [file], results / "steps")
    assert len(read_table(results / "steps.csv")) == 10
    return capsys.readouterr().err, (results / "steps.md").read_text()


def test_rows_of_one_commit_have_no_warning(results, capsys):
    warning, text = tabulate_commits(results, capsys, "0123456789ab")
    assert warning == "" and "commit 0123456789ab." in text and "Mind" not in text


@pytest.mark.parametrize(
    "found, words",
    [
        (
            ("0123456789ab", "ba9876543210"),
            "of more than one commit (0123456789ab: 5 of 10 rows; ba9876543210: 5 of 10 rows)",
        ),
        (
            ("0123456789ab", "0123456789ab+dirty"),
            "of more than one commit "
            "(0123456789ab: 5 of 10 rows; 0123456789ab+dirty: 5 of 10 rows)",
        ),
        (
            ("0123456789ab+dirty",),
            "of a working tree that differs from its commit (0123456789ab+dirty: 10 of 10 rows)",
        ),
    ],
)
def test_rows_of_more_than_one_commit_are_written_with_a_warning(results, capsys, found, words):
    warning, text = tabulate_commits(results, capsys, *found)
    assert warning.startswith("halfstep tabulate: warning: steps: ")
    assert words in warning and warning.count("\n") == 1
    assert words in text.splitlines()[-1]


def published_cells(text, title):
    """{(source, column): cell} of the published grid with this title."""
    _, _, grid = text.partition(f"### Published, protocol as published: {title}\n")
    grid, _, _ = grid.partition("### ")
    head, _, *lines = [cells_of(line) for line in grid.splitlines() if line.startswith("|")]
    return {
        (line[0], column): cell
        for line in lines
        for column, cell in zip(head[1:], line[1:], strict=True)
        if cell
    }


def test_published_values_have_their_own_rows_and_grids(results):
    plain_tables, tables = make_tables(results), make_tables(results, "with", published=True)
    for name, row in TABLES.items():
        plain, table = plain_tables[name], tables[name]
        before = (results / "tables" / f"{name}.md").read_text()
        text = (results / "with" / f"{name}.md").read_text()
        theirs = table[table["run"] == "published"]
        assert text.startswith(before) and len(table) == len(plain) + len(theirs)
        if name == "infilling":  # a measure of ours
            assert theirs.empty
            continue
        assert set(theirs["protocol"]) == {"as published"} and theirs["source"].notna().all()
        assert set(theirs["metric"]) <= set(row.metrics)
        assert "as published" not in set(plain["protocol"]) and "as published" not in before
        for metric, mine in theirs.groupby("metric"):
            expected = {}
            for value in mine.itertuples():
                count = value.length if metric == "latency_s" else value.steps
                column = "none" if pandas.isna(count) else str(int(count))
                column = column if pandas.isna(value.task) else value.task
                expected[published.source_name(value), column] = round_number(value.value)
            assert published_cells(text[len(before) :], row.metrics[metric]) == expected
    query = "run == 'published' and metric == 'generative_perplexity' and steps == 32"
    assert set(tables["steps"].query(query)["value"]) == {192.31, 66.26, 61.65, 62.29, 25.0}


def test_published_values_are_those_that_were_read(shared):
    """Value, step count and certainty of each one are in the list that the design keeps."""
    with open(shared / "data/published_values.csv") as file:
        kept = {(row["value"], row["steps"], row["certainty"]) for row in csv.DictReader(file)}
    with open(published.FILE) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 100
    paper = (shared / "design/PAPER.md").read_text()
    for row in rows:
        if row["task"]:  # of SDTT's table 1 and of MDLM's table 3
            percent = 100 if row["metric"] == "task_score" else 1
            assert f"{percent * float(row['value']):.2f}" in paper, row
            continue
        value = (
            f"{100 * float(row['value']):g}"
            if row["metric"] == "lambada_accuracy"
            else row["value"]
        )
        steps = row["steps"] or ("AR" if row["model"] == "GPT-2" else "")
        assert (value, steps, row["certainty"]) in kept, row


def test_every_file_that_is_no_module_is_in_the_package():
    root = Path(published.__file__).parents[3]
    source = root / "src/halfstep"
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        file
        for name, patterns in settings["package-data"].items()
        if name != "halfstep.packaged"  # links (tests/workflow/test_packaged.py)
        for pattern in patterns
        for file in (root / "src" / name.replace(".", "/")).glob(pattern)
    }
    expected = set()
    for file in source.rglob("*"):
        is_module = file.suffix == ".py" and (file.parent / "__init__.py").exists()
        if "packaged" in file.parts[len(source.parts) :]:
            continue
        if file.is_file() and file.suffix not in (".pyc", ".so") and not is_module:
            expected.add(file)
    assert found == expected


def test_two_protocols_for_every_model_are_two_grids(unchanged):
    results, _ = unchanged
    text = (results / "tables" / "steps.md").read_text()
    assert text.count("(protocol ids)") == text.count("(protocol retokenized)") == 1


def test_two_teachers_have_their_own_judges(results):
    synthetic.write(results, teacher="owt-small", runs=(), rounds=0, steps=[8], points=2)
    assert set(make_tables(results)["steps"]["teacher"]) == {"stories-tiny", "owt-small"}


def test_a_file_that_holds_no_rows_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(HalfstepError, match=r"x\.json: expected a list of metric rows"):
        read_rows([tmp_path / "x.json"])
    with pytest.raises(HalfstepError, match=r"no\.json: no such file"):
        read_rows([tmp_path / "no.json"])


def test_a_number_keeps_three_digits():
    values = (1234.5, 152.4, 15.24, 1.5, 0.98765, 0.01234)
    expected = ["1,234", "152", "15.2", "1.50", "0.988", "0.0123"]
    assert [round_number(value) for value in values] == expected


def test_missing_levels_and_teachers_are_no_error(tmp_path):
    rows = synthetic.sampled("t", "teacher", 0, "t/teacher", 8, "ab")
    synthetic.dump(tmp_path / "a.json", rows)
    for name in TABLES:
        tabulate(name, [tmp_path / "a.json"], tmp_path / "tables" / f"{name}.csv")
    assert "teacher" in (tmp_path / "tables" / "steps.md").read_text()
    assert (tmp_path / "tables" / "speed.md").read_text() == "No rows of speed yet.\n"
    assert (tmp_path / "tables" / "lambada.md").read_text() == "No rows of lambada yet.\n"


def test_an_unknown_table_is_one_sentence(tmp_path):
    with pytest.raises(
        HalfstepError, match="--table step: no such table.*did you mean steps"
    ) as error:
        tabulate("step", [tmp_path], tmp_path / "step")
    assert f"known are {', '.join(TABLES)}" in str(error.value)


def naive_sentences(results, metric, half=0.0, **values):
    """The sentences on naive samplers under each grid of a metric, which get these values."""
    file = results / "metrics" / "stories-tiny" / "naive" / "samples.json"
    for run, value in values.items():
        for key, number in (("value", value), ("low", value - half), ("high", value + half)):
            rewrite(file, changed(key, number, metric=metric, run=run))
    tabulate("steps", [results / "metrics"], results / "tables" / "steps")
    text = (results / "tables" / "steps.md").read_text()
    return [line for line in text.splitlines() if " above the teacher" in line]


@pytest.mark.parametrize(
    ("metric", "worse", "better"),
    [("generative_perplexity", 1e4, 0.5), ("consistent_share", -0.1, 1.1), ("distinct_2", 0, 0.9)],
)
def test_a_metric_that_ranks_a_naive_sampler_above_the_teacher_is_marked(
    results, metric, worse, better
):
    values = {"unigram": better, "bigram": worse, "cut_and_paste": worse}
    lines = naive_sentences(results, metric, **values)
    grids = 2 if metric == "generative_perplexity" else 1
    marked = (
        "**Random tokens rank above the teacher: this metric alone is no evidence of quality.**"
    )
    assert sum(line.startswith(marked) for line in lines) == grids
    values["unigram"] = worse
    assert not any(marked in line for line in naive_sentences(results, metric, **values))


def test_the_steps_at_which_a_naive_sampler_ranks_above_the_teacher_are_named(results):
    """The teacher has 150 at 8 steps and 70 at 16; entropy has no better direction."""
    lines = naive_sentences(
        results, "generative_perplexity", unigram=140.0, bigram=140.0, cut_and_paste=1e4
    )
    above = "rank above the teacher at 8 steps."
    first = f"Random tokens {above} Random token pairs {above}"
    assert lines[:1] == [first]
    overlap = dict(unigram=140.0, bigram=140.0, cut_and_paste=1e4, half=20)
    assert naive_sentences(results, "generative_perplexity", **overlap) == []
    naive_sentences(
        results, "generative_perplexity", unigram=140.0, bigram=140.0, cut_and_paste=1e4
    )
    lines = naive_sentences(results, "entropy", unigram=9.0, bigram=0.1)
    assert lines[:1] == [first]


def test_naive_samplers_have_a_line_in_tables_and_are_levels_in_figures(unchanged):
    results, tables = unchanged
    table = tables["steps"]
    text = (results / "tables" / "steps.md").read_text()
    values = "random tokens: 180 ±7; random token pairs: 180 ±7; shuffled sentences: 180 ±7."
    assert f"Naive samplers: {values}" in text
    assert set(NAIVE) <= set(table["run"])
    for draw in (figures.ppl_vs_steps, figures.entropy_vs_steps):
        _, points = draw({"steps": table})
        mine = points[points["series"].isin(NAIVE)]
        assert set(mine["series"]) == set(NAIVE) and (mine["kind"] == "level").all()


def test_published_weights_may_stand_next_to_chosen_ones(results):
    """A model with one set of weights leaves no choice; the foot of the table names both."""
    for table, file in (("steps", "round-1/samples"), ("lambada", "lambada")):
        file = results / f"metrics/stories-tiny/mse/{file}.json"
        rewrite(file, lambda row: row | {"weights": "published raw"})
        tabulate(table, [results / "metrics"], results / "tables" / table)
        assert "published raw" in (results / f"tables/{table}.md").read_text()


def test_variants_are_compared_with_the_baseline_of_their_own_turns(tmp_path):
    """And nothing but the table `speed` shows them."""
    usual = [timing("t", "kl", 1, 8, 64, 1, 0.1), timing("t", "baseline", 0, None, 64, 1, 0.4)]
    drafts = timing("t", "kl", 1, 64, 64, 1, 0.25) | {
        "sampler": "speculative(draft_tokens=4)",
        "network_evaluations": 20.0,
        "autoregressive_passes": 21.0,
        "tokens_per_verification": 3.0,
    }
    alone = timing("t", "baseline", 0, None, 64, 1, 0.5)
    varied = [row | {"variant": "drafts"} for row in (drafts, alone)]
    dump(tmp_path / "a.json", usual)
    dump(tmp_path / "b.json", varied)
    tabulate("speed", [tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "speed")
    table = read_table(tmp_path / "speed.csv")
    ratio = table[table["run"] != "baseline"].set_index("steps")["times_faster"].to_dict()
    assert ratio == pytest.approx({8: 4.0, 64: 2.0})
    text = (tmp_path / "speed.md").read_text()
    line = next(cells_of(line) for line in text.splitlines() if line.startswith("| drafts"))
    assert line[:7] == ["drafts", "kl round 1", "64", "64 × 1", "20.0", "21.0", "3.00"]
    assert line[7:] == ["250 [242, 265]", "3.91", "7.81", "2.00"]
    assert "64 steps" not in text
    _, points = speed_figures.latency_vs_length({"speed": table})
    assert set(points["y"]) == {100.0, 400.0}
    _, points = speed_figures.speedup_vs_batch({"speed": table})
    assert set(points["y"]) == {4.0}
    assert speed_claim(table, 64, 1.0)[0].word == "not measured"
