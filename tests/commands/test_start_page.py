"""The start page: the numbers of the tables, absent parts by their commands, and escaped texts."""

import json
import os
import re
import shutil
from pathlib import Path

import pandas
import pytest
import synthetic
from reading import Reading
from small import call, done

from halfstep.commands.report import tabulate
from halfstep.commands.start_page import start_page
from halfstep.commands.track import how_to_look
from halfstep.records.provenance import read_record

TABLES = ("steps", "temperatures", "speed", "lambada")
SVG = '<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
BAD = "<img src=x onerror=alert(1)>"
TEXT = '</p></figure><script src="http://evil.example/x.js"></script>\x1b[31m & "kites"'


def write_results(folder: Path, *teachers: str, runs=("kl_backward", "mse")) -> Path:
    """A results folder with tables, one figure, journals and texts."""
    results = folder / "results"
    for teacher in teachers:
        synthetic.write(results, teacher, runs=runs, rounds=1, steps=[8, 16, 64], points=2)
    for table in TABLES:
        sources = [results / "benchmarks" if table == "speed" else results / "metrics"]
        tabulate(table, sources, results / "tables" / table)
    (results / "figures").mkdir()
    for ending in (".svg", ".pdf"):
        (results / f"figures/frontier{ending}").write_text(SVG)
    return results


@pytest.fixture(autouse=True)
def without_a_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return write_results(tmp_path_factory.mktemp("one"), "a")


def read_page(results: Path, preset: str | None = "ci") -> Reading:
    start_page(results, preset)
    return Reading(results / "index.html")


def own(results, table, **where):
    """The rows of a table with these values."""
    rows = pandas.read_csv(results / f"tables/{table}.csv")
    for column, value in where.items():
        rows = rows[rows[column] == value]
    return rows


RUNS = {"reverse KL": "kl_backward", "squared error": "mse"}  # as a reader sees them


def first_number(cell: str) -> float:
    return float(cell.split()[0].replace(",", ""))


@pytest.mark.parametrize(
    ("number", "metric", "protocol"),
    [(0, "generative_perplexity", "ids"), (1, "entropy", "unigram")],
)
def test_the_table_over_steps_has_the_numbers_of_the_csv(results, number, metric, protocol):
    header, *lines = read_page(results).tables[number]
    assert [column.split()[0] for column in header[1:]] == ["8", "16", "64"]
    rows = own(results, "steps", metric=metric, protocol=protocol)
    sampled = rows.dropna(subset="steps")
    names = {"teacher": "teacher", **{f"{name} round 1": run for name, run in RUNS.items()}}
    assert [line[0] for line in lines] == list(names)
    for name, *cells in lines:
        mine = sampled[sampled["run"] == names[name]].sort_values("steps")
        assert [first_number(cell) for cell in cells] == pytest.approx(mine["value"], rel=5e-3)
        halves = [float(re.search(r"±([\d.]+)", cell)[1]) for cell in cells]
        assert halves == pytest.approx(mine["high"] - mine["value"], abs=0.51, rel=0.1)


def test_the_headline_has_the_ratio_and_the_interval_of_the_frontier(results):
    page = read_page(results)
    pattern = r"entropy, ([\w ]+) round 1 with (\d+) steps .* has (\S+) \[(\S+), (\S+)\] times"
    found = re.findall(pattern, page.text)
    assert [run for run, *_ in found] == list(RUNS)
    for run, steps, *numbers in found:
        run = RUNS[run]
        name = "perplexity_ratio_at_equal_entropy"
        rows = own(results, "temperatures", metric=name, run=run, steps=int(steps), protocol="ids")
        expected = rows[["value", "low", "high"]].iloc[0].tolist()
        assert [float(number) for number in numbers] == pytest.approx(expected, abs=5e-3)
    titles = [tag for tag, _ in page.tags if tag.startswith("h")][2:4]
    assert titles == ["h1", "h2"] and page.text.index("at equal entropy") < 200


def test_texts_of_teacher_and_student_stand_next_to_each_other(results):
    page = read_page(results)
    steps = {int(n) for n in re.findall(r"a, [\w ]+, (\d+) steps, the median text", page.text)}
    expected = {
        f"At {n} steps {name} wrote that Mira found a red kite.\nShe kept it."
        for n in steps
        for name in ("teacher", "kl_backward/round-1")
    }
    assert set(page.texts) <= expected and len(page.texts) in (2, 3)
    assert page.texts[1].startswith(f"At {min(steps)} steps kl_backward")
    every = Reading(results / "texts.html")
    (lines,) = every.tables
    assert len(lines) - 1 == len(list(results.rglob("samples.txt")))
    for model, count, _, text in lines[1:]:
        assert text.startswith(f"At {count} steps {model.partition('/')[2]} wrote")


def test_the_times_are_those_of_the_speed_table(results):
    """The synthetic samples have 1,024 tokens; every model is worse than the baseline."""
    page = read_page(results)
    assert "a: At equal quality nothing is gained over autoregression." in page.text
    level = own(results, "temperatures", metric="perplexity_at_data_entropy", run="baseline")
    assert f"as low as the baseline's {level['value'].iloc[0]:.2f}" in page.text


def test_what_was_run_is_that_of_the_records(results):
    page = read_page(results)
    records = list((results / "tables").glob("*.provenance.json"))
    (jobs,) = [table for table in page.tables if table[0][:2] == ["command", "jobs"]]
    assert jobs[-1][:2] == ["all", str(len(records))]
    commit = read_record(records[0], results)["commit"]
    assert f"Commit{commit}" in page.text and "preset ci" in page.text


def test_every_address_is_a_file_of_the_folder_or_is_named_with_its_command(results):
    page = read_page(results)
    for address in page.addresses():
        if address.startswith("data:image/svg+xml;base64,"):
            continue
        assert re.fullmatch(r"[\w./-]+", address) and not address.startswith(("/", "."))
        later = address in ("report.html", "provenance.json")
        assert later or (results / address).is_file(), address
    look = how_to_look(f"sqlite:///{results}/mlflow.db").splitlines()[0]
    for command in ("snakemake --report results/report.html --config preset=ci", look):
        assert command in page.text
    images = [words["src"] for tag, words in page.tags if tag == "img"]
    assert len(images) == 1 and [tag for tag, _ in page.tags].count("script") == 1


def test_a_second_call_changes_nothing(results):
    start_page(results, "ci")
    names = ("index.html", "texts.html")
    before = [(results / name).read_bytes() for name in names]
    start_page(results, "ci")
    assert [(results / name).read_bytes() for name in names] == before
    record = read_record(results / "index.provenance.json", results)
    assert set(record["outputs"]) == set(names) and "tables/steps.csv" in record["inputs"]


PARTS = {
    "tables/steps.csv": "snakemake results/tables/steps.csv --config preset=ci",
    "tables/speed.csv": "snakemake results/tables/speed.csv --config preset=ci",
    "tables/temperatures.csv": "needs sampling.temperatures in config.yaml",
    "figures/frontier.svg": "snakemake results/figures/ppl_vs_steps.svg --config preset=ci",
    "samples": None,
    "models": None,
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_absent_is_left_out_or_named_with_its_command(results, tmp_path, part):
    whole = read_page(results).text
    copy = Path(shutil.copytree(results, tmp_path / "results"))
    shutil.rmtree(copy / part) if (copy / part).is_dir() else os.remove(copy / part)
    page = read_page(copy)
    if PARTS[part]:
        assert PARTS[part] in page.text and PARTS[part] not in whole
    assert f'href="{part}"' not in (copy / "index.html").read_text()
    assert len(page.text) < len(whole) + 200 and "nan" not in page.text.split()


def test_an_empty_folder_has_a_page_of_commands(tmp_path):
    page = read_page(tmp_path, None)
    assert "No model has been compared with its teacher yet" in page.text
    assert "snakemake results/tables/steps.csv" in page.text
    assert "Texts" not in page.text and "Speed" not in page.text
    assert page.addresses() == ["report.html", "provenance.json"]


@pytest.mark.parametrize(
    "change",
    [{"command": []}, {"started": "yesterday"}, {"ended": "2026-01-01"}, {"versions": [1]}],
    ids=str,
)
def test_a_record_that_is_none_is_named(tmp_path, capsys, change):
    times = dict.fromkeys(("started", "ended"), "2026-01-01T00:00:00+00:00")
    record = {"format": 1, "outputs": {}, "inputs": {}, "command": ["halfstep", "pretrain"]}
    file = tmp_path / "provenance.json"
    file.write_text(json.dumps(record | times))
    assert call(f"start-page --results {tmp_path}") == 0
    file.write_text(json.dumps(record | times | change))
    assert call(f"start-page --results {tmp_path}") == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{file}: {next(iter(change))}" in said


def test_no_folder_is_refused(capsys, tmp_path):
    assert call(f"start-page --results {tmp_path}/none") == 1
    assert "no such folder; run snakemake" in capsys.readouterr().err


def test_tables_without_rows_count_as_absent(tmp_path):
    """`halfstep tabulate` writes them where nothing was measured."""
    for table in TABLES:
        (tmp_path / "metrics").mkdir(exist_ok=True)
        tabulate(table, [tmp_path / "metrics"], tmp_path / "tables" / table)
    assert "snakemake results/tables/steps.csv" in read_page(tmp_path).text


def test_several_teachers_have_their_own_parts(tmp_path):
    results = write_results(tmp_path, "a", "b", runs=("kl_backward",))
    page = read_page(results)
    for teacher in ("a", "b"):
        assert f"{teacher}: at equal entropy" in page.text
        assert f"{teacher}: At equal quality" in page.text
        assert f"{teacher}: samples" in page.text
    assert len(page.texts) >= 4
    (lines,) = Reading(results / "texts.html").tables
    assert {line[0].partition("/")[0] for line in lines[1:]} == {"a", "b"}


def test_a_teacher_without_students_and_baseline(tmp_path):
    results = write_results(tmp_path, "a", runs=())
    for file in [*results.rglob("*.csv"), results / "figures/frontier.svg"]:
        os.remove(file)
    shutil.rmtree(results / "metrics/a/baseline")
    tabulate("steps", [results / "metrics"], results / "tables/steps")
    page = read_page(results)
    assert [line[0] for line in page.tables[0][1:]] == ["teacher"]
    assert "No model has been compared" in page.text


def test_hostile_names_and_texts_are_shown_as_text(tmp_path):
    results = write_results(tmp_path, BAD, runs=("kl_backward", "<b>mse"))
    for file in results.rglob("samples.txt"):
        file.write_text(f"=== 0\na\n=== 1\n{TEXT}\n")
    done(f"start-page --results {results} --preset <u>ci</u>")
    for name in ("index.html", "texts.html"):
        page = Reading(results / name)
        assert {tag for tag, _ in page.tags} & {
            "b",
            "u",
            "svg",
            "iframe",
            "link",
            "object",
        } == set()
        assert [tag for tag, _ in page.tags].count("script") == 1
        assert not any(key.startswith("on") for _, words in page.tags for key in words)
        assert not any("evil" in address for address in page.addresses())
        assert BAD in page.text
    assert TEXT.replace("\x1b", r"\x1b") in Reading(results / "index.html").texts
    assert "preset <u>ci</u>" in Reading(results / "index.html").text
    pages = [Reading(file) for file in (results / "tables").glob("*.html")]
    assert len(pages) == len(TABLES) and all(BAD in page.text for page in pages)
    for page in pages:
        assert {tag for tag, _ in page.tags} & {"b", "img"} == set()
