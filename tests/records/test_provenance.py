"""Records: complete, true, one per job; `verify` names exactly what does not fit; the rules declare every one of them."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from small import MACHINE, ROUND, call, done

from halfstep import files
from halfstep.files import sha256, sha256_once
from halfstep.records import provenance

OPENED: list[str] | None = (
    None  # an audit hook cannot be taken back: it listens while this is a list
)


def _listen(event, args):
    if (
        OPENED is not None
        and event == "open"
        and isinstance(args[0], str | os.PathLike)
        and not args[2] & (os.O_WRONLY | os.O_RDWR)
    ):
        OPENED.append(os.path.abspath(args[0]))


sys.addaudithook(_listen)


@pytest.fixture
def results(pipeline, tmp_path):
    """A copy in another place, merged: everything is still found."""
    done(f"merge-provenance --results {shutil.copytree(pipeline.results, tmp_path / 'results')}")
    return tmp_path / "results"


def verify(capsys, results) -> list[str]:
    """The lines that `halfstep verify` prints of what does not fit, relative to results; none when it is content."""
    capsys.readouterr()
    code, (out, err) = call(f"verify {results}"), capsys.readouterr()
    lines = out.replace(f"{results}/", "").splitlines()
    if not code:
        assert len(lines) == 1 and "as they were made" in lines[0]
        return []
    assert lines and f"named above, found {len(lines)};" in err
    return lines


def test_every_file_of_a_job_is_in_its_record(pipeline):
    found = {path: json.loads(path.read_text()) for path in provenance.find_records(pipeline.results)[0]}
    listed = [
        file
        for path, one in found.items()
        for file in provenance.read_record(path, pipeline.results)["outputs"]
    ]
    written = {
        str(path.relative_to(pipeline.results))
        for path in pipeline.results.rglob("*")
        if path.is_file()
    } - {str(path.relative_to(pipeline.results)) for path in found}
    assert sorted(listed) == sorted(
        written
    )  # each once, none forgotten: nothing but outputs lies there
    for path, one in found.items():
        for file, digest in (one["outputs"] | one["inputs"]).items():
            assert sha256(path.parent / file) == digest
        assert (
            one["command"][0] == "halfstep"
            and one["started"] <= one["ended"]
            and one["versions"].keys() >= {"python", "halfstep", "numpy"}
        )
        assert re.fullmatch(r"[0-9a-f]{12}(\+dirty)?|unknown", one["commit"])


RECORDS = [
    "data/stories/provenance.json",
    "models/stories-tiny/teacher/provenance.json",
    "models/stories-tiny/baseline/provenance.json",
    "models/stories-tiny/kl_backward/round-1/provenance.json",
    "samples/stories-tiny/teacher/steps-8/provenance.json",
    "metrics/stories-tiny/teacher/samples.provenance.json",
    "metrics/stories-tiny/data.provenance.json",
    "tables/steps.provenance.json",
]


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_forgets_no_input(pipeline, tmp_path, name):
    """The recorded command, given again for another output, is heard opening files: all that are the pipeline's are among its inputs."""
    global OPENED
    found = provenance.read_record(pipeline.results / name, pipeline.results)
    command = found["command"][1:]
    at = command.index("--output") + 1
    command[at] = str(tmp_path / Path(command[at]).name)
    OPENED = []
    try:
        assert call(" ".join(command)) == 0
    finally:
        opened, OPENED = OPENED, None
    heard = {
        os.path.relpath(path, pipeline.results)
        for path in opened
        if path.startswith(str(pipeline.results))
    }
    assert heard <= found["inputs"].keys() and bool(heard) == bool(found["inputs"]), (
        heard - found["inputs"].keys()
    )


def test_merged(results, pipeline):
    """One file links every artefact to its inputs' hashes, command, versions and commit; the place of results/ is not in it."""
    merged = json.loads((results / "provenance.json").read_text())
    assert list(merged["records"]) == sorted(RECORDS)
    samples = merged["records"]["metrics/stories-tiny/teacher/samples.provenance.json"]
    assert samples["outputs"].keys() == {"metrics/stories-tiny/teacher/samples.json"}
    source = "samples/stories-tiny/teacher/steps-8/samples.npy"
    maker = merged["records"]["samples/stories-tiny/teacher/steps-8/provenance.json"]
    assert samples["inputs"][source] == maker["outputs"][source] == sha256(results / source)
    assert "models/stories-tiny/baseline/hf/model.safetensors" in samples["inputs"]
    for one in merged["records"].values():
        assert one.keys() == {
            "format",
            "outputs",
            "inputs",
            "command",
            "versions",
            "commit",
            "started",
            "ended",
        }
        assert not any(path.startswith(("/", "..")) for path in [*one["outputs"], *one["inputs"]])


def test_a_copy_elsewhere_is_verified_and_what_nobody_made_is_counted(results, capsys):
    assert verify(capsys, results) == []
    recorded = sum(
        len(one["outputs"])
        for one in json.loads((results / "provenance.json").read_text())["records"].values()
    )
    (results / "notes.txt").write_text("mine")
    (results / "mlflow-artifacts/1").mkdir(parents=True)
    shutil.copy(
        results / "tables/steps.provenance.json", results / "mlflow-artifacts/1"
    )  # MLflow's copy of a record is none
    capsys.readouterr()
    assert call(f"verify {results}") == 0
    assert (
        f"all {recorded} recorded files" in (out := capsys.readouterr().out)
        and "1 files have no record" in out
    )


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["data/stories/train.bin", "models/stories-tiny/teacher/ema.safetensors", "samples/stories-tiny/teacher/steps-8/samples.npy",
                                  "models/stories-tiny/baseline/hf/model.safetensors", "metrics/stories-tiny/data.json", "tables/steps.csv"])  # fmt: skip
def test_a_flipped_bit_is_named_once(results, capsys, name):
    flip(results / name)
    (line,) = verify(capsys, results)
    assert re.fullmatch(
        rf"{name}: changed: its sha256 is [0-9a-f]{{12}}, \S+provenance.json says [0-9a-f]{{12}}; make it again",
        line,
    )
    flip(results / name)
    assert verify(capsys, results) == []


def test_a_missing_file_is_named(results, capsys):
    (results / "models/stories-tiny/teacher/best.safetensors").unlink()  # nothing was made from it
    (line,) = verify(capsys, results)
    assert (
        line
        == "models/stories-tiny/teacher/best.safetensors: missing, though models/stories-tiny/teacher/provenance.json lists it; make it again"
    )


def test_what_is_older_than_its_input_is_stale(results, capsys):
    """Samples drawn with another seed: their scores are stale, and nothing else; with the same seed nothing is, whenever they were drawn."""
    samples = results / "samples/stories-tiny/teacher/steps-8"
    draw = f"generate --checkpoint {results}/models/stories-tiny/teacher --output {samples} --steps 8 --num-samples 4 {MACHINE}"
    npy = sha256(samples / "samples.npy")
    done(draw)
    assert sha256(samples / "samples.npy") == npy
    done(f"{draw} --sampling-seed 2")
    done(f"merge-provenance --results {results}")
    (line,) = verify(capsys, results)
    assert re.fullmatch(
        r"metrics/stories-tiny/teacher/samples: stale: made from samples/stories-tiny/teacher/steps-8/samples\.(npy|json) of sha256 [0-9a-f]{12}, which is "
        r"now [0-9a-f]{12} \(and 1 more inputs\); make it again", line
    )  # fmt: skip


def test_a_teacher_trained_anew(results, capsys):
    """Another seed's teacher under the same name: its samples and its student are stale, and are named."""
    teacher = results / "models/stories-tiny/teacher"
    command = json.loads((teacher / "provenance.json").read_text())["command"]
    line = " ".join(command[1:]).replace(command[command.index("--output") + 1], str(teacher))
    done(f"{line} --seed 5")
    done(f"merge-provenance --results {results}")
    lines = verify(capsys, results)
    assert [line.partition(":")[0] for line in lines] == [
        "models/stories-tiny/kl_backward/round-1",
        "samples/stories-tiny/teacher/steps-8",
    ]
    assert all("stale: made from models/stories-tiny/teacher/" in line for line in lines)


def test_records_themselves(results, capsys):
    """A record that was edited with its file is found out by the merged one; a broken or lost one is named."""
    table, record = results / "tables/steps.csv", results / "tables/steps.provenance.json"
    kept, said = table.read_bytes(), record.read_text()
    flip(table)
    record.write_text(said.replace(files.hashlib.sha256(kept).hexdigest(), sha256(table)))
    assert verify(capsys, results) == [
        "provenance.json: has an older record tables/steps.provenance.json; run halfstep merge-provenance again"
    ]
    table.write_bytes(kept)
    record.write_text("{")
    (broken, old) = verify(capsys, results)
    assert (
        "tables/steps.provenance.json: not valid JSON" in broken
        and "still has the record tables/steps.provenance.json" in old
    )
    record.unlink()
    assert verify(capsys, results) == [
        "provenance.json: still has the record tables/steps.provenance.json; run halfstep merge-provenance again"
    ]
    record.write_text(said)
    (results / "provenance.json").write_text("[]")
    assert verify(capsys, results) == [
        "provenance.json: not what halfstep merge-provenance writes; run it again"
    ]


def test_inputs_from_outside(tmp_path, capsys):
    """Own text beside results/: changed, the corpus is stale; on a machine that does not have it, it cannot be compared and is no fault."""
    (tmp_path / "mine.txt").write_text(
        "\n\n".join(f"A small red kite flew over hill {i}." for i in range(60))
    )
    results, corpus = tmp_path / "results", tmp_path / "results/data/mine"
    done(
        f"prepare-corpus --output {corpus} --kind files --files {tmp_path}/*.txt --length 8 --vocab-size 300 --validation-documents 5 --workers 1"
    )
    assert json.loads((corpus / "provenance.json").read_text())["inputs"] == {
        "../../../mine.txt": sha256(tmp_path / "mine.txt")
    }
    assert verify(capsys, results) == []
    with open(tmp_path / "mine.txt", "a") as file:
        file.write(" More.")
    (line,) = verify(capsys, results)
    assert line.startswith("data/mine: stale: made from ../mine.txt of sha256")
    (tmp_path / "mine.txt").unlink()
    assert verify(capsys, results) == []


def test_what_was_just_hashed_is_not_read_again(tmp_path, monkeypatch):
    """By a record; a check reads the bytes, always. A file that was touched meanwhile is read."""
    path, read = tmp_path / "a", []
    real = files.hashlib.file_digest
    monkeypatch.setattr(
        files.hashlib, "file_digest", lambda file, kind: read.append(file.name) or real(file, kind)
    )
    path.write_text("one")
    first = sha256(path)
    assert sha256_once(path) == first and len(read) == 1
    assert sha256(path) == first and len(read) == 2
    path.write_text("three")
    assert sha256_once(path) == sha256(path) != first
    files.remember_sha256(path, "told")
    assert sha256_once(path) == "told"
    other = tmp_path / "b"
    other.write_text("four!")
    os.replace(
        other, path
    )  # as an atomic write does: another file of the same size under the same name
    assert sha256_once(path) == sha256(path) != "told"


def test_a_round_records_the_moments_it_carries(pipeline, tmp_path):
    second = tmp_path / "kl_backward/round-2"
    for more, carried in (("", True), ("--reset-optimizer", False)):
        line = f"distill-round --teacher {pipeline.student} --corpus {pipeline.corpus} --output {second} {ROUND} {more}"
        done(line.replace("--round 1", "--round 2"))
        inputs = provenance.read_record(second / "provenance.json", pipeline.results)["inputs"]
        assert (
            "models/stories-tiny/kl_backward/round-1/optimizer.safetensors" in inputs
        ) == carried
