"""The reproduction report: verdicts on published values and on claims, and the report's files."""

import pandas
import pytest
import synthetic

from halfstep.commands.paper import compare_published, list_sizes
from halfstep.commands.report import tabulate
from halfstep.config import SIZES
from halfstep.errors import HalfstepError
from halfstep.report.catalogue import TABLES
from halfstep.report.paper import KLD
from halfstep.report.published import published_rows
from halfstep.report.reproduction import (
    CLAIMS,
    claim_verdict,
    compare,
    kind_of_model,
    published_lines,
    speed_claim,
)
from halfstep.report.rows import read_table, tidy

THEIRS = {
    "metric": "generative_perplexity",
    "value": 50.0,
    "source": "a table, fp64 sampling",
    "round": 5,
    "judge": "gpt2-large",
    "model": "MDLM+SDTT 169M round 5",
}
OURS = {
    "value": 52.0,
    "low": 49.0,
    "high": 55.0,
    "round": 5,
    "judge": "gpt2-large@abc",
    "draw_dtype": "float64",
    "device": "NVIDIA H100",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduction") / "results"
    synthetic.write(folder, "small", (KLD, "mse", "tvd"), 7, points=10)
    for name in TABLES:
        tabulate(name, [folder / "metrics", folder / "benchmarks"], folder / "tables" / name)
    return folder


def test_a_published_value_in_our_interval_agrees():
    assert str(compare(THEIRS, OURS, "small")) == "agrees"


def test_a_published_value_outside_of_it_differs_by_a_percentage():
    assert str(compare(THEIRS | {"value": 40.0}, OURS, "small")) == "differs: by +30%"


@pytest.mark.parametrize(
    "theirs, ours, size, reason",
    [
        ({}, {}, "tiny", "169M parameters there, the size tiny here"),
        ({"round": 7}, {}, "small", "round 7 there, round 5 here"),
        ({}, {"draw_dtype": "float32"}, "small", "drawn in float64 there, in float32 here"),
        ({"source": "a note, second-hand"}, {}, "small", "not from a table of its authors"),
        ({}, {"judge": "baseline@1"}, "small", "judged by gpt2-large there, by baseline here"),
        ({"metric": "latency_s", "source": "A100-80GB"}, {}, "small", "on A100 there, on NVIDIA"),
    ],
)
def test_numbers_of_other_conditions_are_not_compared(theirs, ours, size, reason):
    verdict = compare(THEIRS | theirs, OURS | ours, size)
    assert verdict.word == "not comparable" and reason in verdict.reason


@pytest.mark.parametrize(
    "model, kind",
    [
        ("MDLM (PGM retrain) 169M", "teacher"),
        ("MDLM+SDTT (loss bf16) 169M round 5", "student"),
        ("MDLM+Di4C 169M", None),
        ("Duo+DCD 169M", None),
        ("DiDi-Instruct 169M", None),
        ("GPT-2 169M", "baseline"),
        ("AR+KV 1.3B", "baseline"),
    ],
)
def test_other_methods_are_not_compared(model, kind):
    assert kind_of_model(model) == kind


def test_every_published_value_of_a_model_of_ours_has_a_line(results):
    published = published_rows()
    tables = {"steps": read_table(results / "tables/steps.csv")}
    commands = {name: f"make {name}" for name in TABLES}
    lines = published_lines(published, tables, "small", commands)
    expected = [name for name in published["model"] if kind_of_model(name)]
    assert len(lines) == len(expected) > 50
    teacher = lines[
        lines["published"] == "generative perplexity of MDLM (PGM retrain) 169M 64 steps"
    ]
    row = tables["steps"].query(
        "metric == 'generative_perplexity' and protocol == 'ids' and run == 'teacher' "
        "and steps == 64"
    )
    assert float(teacher["ours"].item()) == pytest.approx(row["value"].item(), rel=0.005)
    not_measured = lines[lines["published"].str.startswith("lambada accuracy")]
    assert set(not_measured["verdict"]) == {"not measured: run `make lambada`"}


def test_claims_read_the_rows_that_they_name():
    """Every claim holds, fails and stays open with tables made for it."""
    for claim in CLAIMS:
        for apart, word in ((5.0, "holds"), (0.5, "cannot be told"), (-5.0, "does not hold")):
            rows = [made(claim.less, 10.0), made(claim.more, 10.0 + apart)]
            tables = {claim.less.table: tidy(pandas.DataFrame(rows))}
            verdict, numbers = claim_verdict(claim, tables)
            assert verdict.word == word, claim.text
            assert numbers.startswith("10.0 [9.00, 11.0] against")
        verdict, numbers = claim_verdict(claim, {})
        assert verdict.word == "not measured" and not numbers


def made(side, value):
    """A metric row that one side of a claim finds, as read from a table."""
    return {
        "metric": side.metric,
        "protocol": side.protocol or "ids",
        "teacher": "t",
        "run": side.run,
        "round": 7 if side.last_round else 0,
        "model": f"t/{side.run}",
        "steps": side.steps,
        "value": value,
        "low": value - 1,
        "high": value + 1,
    }


def test_speed_is_judged_at_the_papers_case_only():
    row = {
        "metric": "latency_s", "protocol": "interleaved", "teacher": "1.3B-untrained",
        "run": "teacher", "model": "1.3B-untrained/teacher", "steps": 16, "value": 1.0,
        "length": 2048, "batch_size": 8, "params": 1_400_000_000, "times_faster": 8.5,
        "device": "H100",
    }  # fmt: skip
    table = tidy(pandas.DataFrame([row, row | {"length": 64, "times_faster": 1.1}]))
    assert speed_claim(table, 16, 8.0)[0].word == "holds"
    assert speed_claim(table, 16, 9.0)[0].word == "does not hold"
    assert speed_claim(table, 32, 4.0)[0].word == "not measured"
    small = table.assign(params=1_000_000)
    verdict, numbers = speed_claim(small, 16, 8.0)
    assert verdict.word == "not comparable" and "8.5 times" in numbers


def test_the_report_has_the_same_lines_in_both_forms(results, tmp_path):
    compare_published([results / "tables"], tmp_path / "report", preset="sdtt-small")
    text, page = (tmp_path / f"report{ending}" for ending in (".md", ".html"))
    lines = [line for line in text.read_text().splitlines() if line.startswith("| ")]
    assert len(lines) == page.read_text().count("<tr>")
    assert "KLD keeps last words better than MSE" in text.read_text()
    assert (tmp_path / "report.provenance.json").is_file()


def test_an_unknown_teacher_is_refused(results, tmp_path):
    with pytest.raises(HalfstepError, match=r"teacher: found other, but .* has small"):
        compare_published([results / "tables"], tmp_path / "report", teacher="other")


def test_no_tables_are_refused(tmp_path):
    with pytest.raises(HalfstepError, match="found no table of halfstep tabulate"):
        compare_published([tmp_path], tmp_path / "report")


def test_sizes_have_the_parameters_of_the_papers_table(tmp_path):
    """169M, 424M, 863M (SDTT table 2); the size 1.3B has more than its name says."""
    list_sizes(tmp_path / "table-2")
    table = pandas.read_csv(tmp_path / "table-2.csv").set_index("size")
    assert list(table.index) == list(SIZES)
    millions = (table["parameters"] / 1e6).to_dict()
    assert millions["small"] == pytest.approx(169, abs=1)
    assert millions["medium"] == pytest.approx(424, abs=1)
    assert millions["large"] == pytest.approx(863, abs=1)
    assert table.loc["small", "blocks"] == 12 and table.loc["3B", "width"] == 3072
