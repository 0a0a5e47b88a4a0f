"""Records are complete and correct, one for each job, and `verify` names exactly the faults."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small import MACHINE, ROUND, call, done

from halfstep import files
from halfstep.files import sha256, sha256_once
from halfstep.records import provenance

REPOSITORY = Path(__file__).parents[2]
# An audit hook cannot be removed, so this one listens only while OPENED is a list.
OPENED: list[str] | None = None


def _listen(event, args):
    if OPENED is None or event != "open" or not isinstance(args[0], str | os.PathLike):
        return
    if not args[2] & (os.O_WRONLY | os.O_RDWR):
        OPENED.append(os.path.abspath(args[0]))


sys.addaudithook(_listen)


@pytest.fixture
def results(pipeline, tmp_path):
    """A merged copy in another place, where everything must still be found."""
    done(f"merge-provenance --results {shutil.copytree(pipeline.results, tmp_path / 'results')}")
    return tmp_path / "results"


def verify(capsys, results) -> list[str]:
    """The problems that `halfstep verify` prints, with paths relative to results; [] if none."""
    capsys.readouterr()
    code, (out, err) = call(f"verify {results}"), capsys.readouterr()
    lines = out.replace(f"{results}/", "").splitlines()
    if code == 0:
        assert len(lines) == 1
        assert "recorded files are unchanged" in lines[0]
        return []
    assert lines
    assert f"{len(lines)} problem{'' if len(lines) == 1 else 's'} (listed above);" in err
    return lines


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_every_file_of_a_job_is_in_its_record(pipeline):
    def relative(path: Path) -> str:
        return str(path.relative_to(pipeline.results))

    paths, _ = provenance.find_records(pipeline.results)
    listed = []
    for path in paths:
        record = json.loads(path.read_text())
        listed += provenance.read_record(path, pipeline.results)["outputs"]
        for file, digest in (record["outputs"] | record["inputs"]).items():
            assert sha256(path.parent / file) == digest
        assert record["command"][0] == "halfstep"
        assert record["started"] <= record["ended"]
        assert record["versions"].keys() >= {"python", "halfstep", "numpy"}
        assert re.fullmatch(r"[0-9a-f]{12}(\+dirty)?|unknown", record["commit"])
    written = {relative(path) for path in pipeline.results.rglob("*") if path.is_file()}
    # Each output once and none missing; the folder holds nothing but outputs and records.
    assert sorted(listed) == sorted(written - {relative(path) for path in paths})


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
def test_a_record_lists_every_input(pipeline, tmp_path, name):
    """Repeat the recorded command with another output: each pipeline file it opens is an input."""
    global OPENED
    record = provenance.read_record(pipeline.results / name, pipeline.results)
    command = record["command"][1:]
    at = command.index("--output") + 1
    command[at] = str(tmp_path / Path(command[at]).name)
    OPENED = []
    try:
        assert call(" ".join(command)) == 0
    finally:
        opened, OPENED = OPENED, None
    own = [path for path in opened if path.startswith(str(pipeline.results))]
    read = {os.path.relpath(path, pipeline.results) for path in own}
    assert read <= record["inputs"].keys(), read - record["inputs"].keys()
    assert bool(read) == bool(record["inputs"])


def test_the_merged_record(results):
    """It links every output to the hashes of its inputs, and does not hold the path of results/."""
    merged = json.loads((results / "provenance.json").read_text())
    assert list(merged["records"]) == sorted(RECORDS)
    scores = merged["records"]["metrics/stories-tiny/teacher/samples.provenance.json"]
    assert scores["outputs"].keys() == {"metrics/stories-tiny/teacher/samples.json"}
    source = "samples/stories-tiny/teacher/steps-8/samples.npy"
    maker = merged["records"]["samples/stories-tiny/teacher/steps-8/provenance.json"]
    assert scores["inputs"][source] == maker["outputs"][source] == sha256(results / source)
    assert "models/stories-tiny/baseline/hf/model.safetensors" in scores["inputs"]
    keys = set("format outputs inputs command versions commit started ended".split())
    for record in merged["records"].values():
        assert record.keys() == keys
        for path in [*record["outputs"], *record["inputs"]]:
            assert not path.startswith(("/", ".."))


def test_a_moved_copy_is_verified_and_other_files_are_counted(results, capsys):
    assert verify(capsys, results) == []
    merged = json.loads((results / "provenance.json").read_text())
    recorded = sum(len(record["outputs"]) for record in merged["records"].values())
    (results / "notes.txt").write_text("mine")
    copies = results / "mlflow-artifacts/1"  # MLflow's copy of a record is not a record
    copies.mkdir(parents=True)
    shutil.copy(results / "tables/steps.provenance.json", copies)
    capsys.readouterr()
    assert call(f"verify {results}") == 0
    out = capsys.readouterr().out
    assert f"all {recorded} recorded files" in out
    assert "1 files have no record" in out


@pytest.mark.parametrize(
    "name",
    [
        "data/stories/train.bin",
        "models/stories-tiny/teacher/ema.safetensors",
        "samples/stories-tiny/teacher/steps-8/samples.npy",
        "models/stories-tiny/baseline/hf/model.safetensors",
        "metrics/stories-tiny/data.json",
        "tables/steps.csv",
    ],
)
def test_a_flipped_bit_is_named_once(results, capsys, name):
    flip(results / name)
    (line,) = verify(capsys, results)
    sha = "[0-9a-f]{12}"
    assert re.fullmatch(
        rf"{name}: changed: its sha256 is {sha}, \S+provenance.json says {sha}; make it again",
        line,
    )
    flip(results / name)
    assert verify(capsys, results) == []


def test_a_missing_file_is_named(results, capsys):
    (results / "models/stories-tiny/teacher/best.safetensors").unlink()  # no job reads it
    assert verify(capsys, results) == [
        "models/stories-tiny/teacher/best.safetensors: missing, though "
        "models/stories-tiny/teacher/provenance.json lists it; make it again"
    ]


def test_an_output_older_than_its_input_is_stale(results, capsys):
    """Other samples make only their scores stale; the same samples drawn again make none stale."""
    samples = results / "samples/stories-tiny/teacher/steps-8"
    teacher = results / "models/stories-tiny/teacher"
    draw = f"generate --checkpoint {teacher} --output {samples} --steps 8 --num-samples 4 {MACHINE}"
    npy = sha256(samples / "samples.npy")
    done(draw)
    assert sha256(samples / "samples.npy") == npy
    done(f"{draw} --sampling-seed 2")
    done(f"merge-provenance --results {results}")
    (line,) = verify(capsys, results)
    assert re.fullmatch(
        r"metrics/stories-tiny/teacher/samples: stale: made from "
        r"samples/stories-tiny/teacher/steps-8/samples\.(npy|json) of sha256 [0-9a-f]{12}, "
        r"which is now [0-9a-f]{12} \(and 1 more inputs\); make it again",
        line,
    )


def test_a_teacher_that_was_trained_again(results, capsys):
    """With another seed, under the same name: its samples and its student are stale."""
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


def test_faults_of_the_records_themselves(results, capsys):
    """The merged record reveals a record edited with its file; a broken or lost one is named."""
    table, record = results / "tables/steps.csv", results / "tables/steps.provenance.json"
    table_bytes, record_text = table.read_bytes(), record.read_text()
    if_run = (
        "if the job ran again since, run halfstep merge-provenance, otherwise run the job again"
    )
    gone = "provenance.json: lists the record tables/steps.provenance.json, which is gone; "
    gone += "make its files again"

    flip(table)
    old = hashlib.sha256(table_bytes).hexdigest()
    record.write_text(record_text.replace(old, sha256(table)))
    assert verify(capsys, results) == [
        f"provenance.json: has an older record tables/steps.provenance.json; {if_run}"
    ]
    table.write_bytes(table_bytes)

    record.write_text("{")
    broken, lost = verify(capsys, results)
    assert "tables/steps.provenance.json: not valid JSON" in broken
    assert lost == gone

    record.unlink()
    assert verify(capsys, results) == [gone]
    record.write_text(record_text)
    (results / "provenance.json").write_text("[]")
    assert verify(capsys, results) == [
        "provenance.json: not what halfstep merge-provenance writes; run it again"
    ]


def test_the_merged_record_must_be_there_at_the_end(results, capsys):
    """Without it, a record that is lost with its files would leave no trace."""
    (results / "provenance.json").unlink()
    assert verify(capsys, results) == ["provenance.json: missing; run halfstep merge-provenance"]
    shutil.rmtree(results / "tables")
    assert verify(capsys, results) == []


@pytest.mark.parametrize("digest", [5, None, [], {"x": 5}])
def test_a_record_with_checksums_of_another_type_is_named(results, capsys, digest):
    record = results / "tables/steps.provenance.json"
    content = json.loads(record.read_text())
    content["inputs"] = dict.fromkeys(content["inputs"], digest)
    record.write_text(json.dumps(content))
    assert "tables/steps.provenance.json: not a record of format 1" in verify(capsys, results)[0]


def test_links_are_followed(results, tmp_path, capsys):
    """A folder on another disk is checked like any other, and a link to a parent ends."""
    shutil.move(results / "models", tmp_path / "disk")
    (results / "models").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "up").symlink_to(results)
    assert verify(capsys, results) == []
    capsys.readouterr()
    done(f"merge-provenance --results {results}")
    assert list(json.loads((results / "provenance.json").read_text())["records"]) == sorted(RECORDS)
    flip(results / "models/stories-tiny/teacher/ema.safetensors")
    (line,) = verify(capsys, results)
    assert line.startswith("models/stories-tiny/teacher/ema.safetensors: changed")
    shutil.rmtree(tmp_path / "disk")
    assert any("models/stories-tiny/teacher" in line for line in verify(capsys, results))


def test_files_without_a_record_are_listed_on_request(results, capsys):
    (results / "notes.txt").write_text("mine")
    (results / "models" / "stories-tiny" / "teacher" / "extra.bin").write_bytes(b"x")
    done(f"verify {results} --unrecorded")
    listed = [line for line in capsys.readouterr().out.splitlines() if line.endswith("no record")]
    assert listed == [
        f"{results}/models/stories-tiny/teacher/extra.bin: no record",
        f"{results}/notes.txt: no record",
    ]


def test_the_announced_size_is_what_is_read(results, tmp_path):
    """Inputs outside of results count, files without a record do not."""
    (results / "notes.txt").write_text("mine" * 1000)
    check, read = provenance.Verification(results), []
    assert check.faults(read.append) == [] and sum(read) == check.size
    flip(results / "tables/steps.csv")
    check, read = provenance.Verification(results), []
    assert len(check.faults(read.append)) == 1 and sum(read) == check.size


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    call = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(call, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The source tree as an archive has it, without a repository."""
    folder = tmp_path_factory.mktemp("archive") / "halfstep"
    for name in ("src", "rules", "workflow"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignored)
    for name in ("Snakefile", "config.yaml"):
        shutil.copy(REPOSITORY / name, folder)
    return folder


def commit_of(folder, **environment):
    """The commit that the code in a source tree writes into its records."""
    code = "from halfstep.records.journal import commit; print(commit())"
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), **environment}
    call = [sys.executable, "-c", code]
    return subprocess.run(call, env=environment, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_halfsteps_own_code(tree, tmp_path):
    """A repository around an unpacked archive is a stranger; configuration is no code."""
    outer, vendor = tmp_path / "outer", tmp_path / "outer" / "vendor"
    outer.mkdir()
    git(outer, "init", "-q")
    git(outer, "commit", "-q", "--allow-empty", "-m", "unrelated")
    shutil.copytree(tree, vendor)
    assert commit_of(vendor) == "unknown"
    assert commit_of(vendor, GIT_DIR=str(outer / ".git"), GIT_WORK_TREE=str(outer)) == "unknown"

    own = tmp_path / "own"
    shutil.copytree(tree, own)
    git(own, "init", "-q")
    git(own, "add", ".")
    git(own, "commit", "-q", "-m", "halfstep")
    head = git(own, "rev-parse", "--short=12", "HEAD")
    assert commit_of(own) == head
    assert commit_of(own, GIT_DIR=str(outer / ".git")) == head
    with open(own / "config.yaml", "a") as file:
        file.write("seed: 2\n")
    with open(own / "workflow" / "presets" / "ci.yaml", "a") as file:
        file.write("# mine\n")
    assert commit_of(own) == head
    with open(own / "rules" / "data.smk", "a") as file:
        file.write("# mine\n")
    assert commit_of(own) == f"{head}+dirty"


def test_inputs_outside_of_results(tmp_path, capsys):
    """If the text changes, the corpus is stale; if it is not on this machine, that is no fault."""
    text = "\n\n".join(f"A small red kite flew over hill {i}." for i in range(60))
    (tmp_path / "mine.txt").write_text(text)
    results, corpus = tmp_path / "results", tmp_path / "results/data/mine"
    done(
        f"prepare-corpus --output {corpus} --kind files --files {tmp_path}/*.txt --length 8 "
        "--vocab-size 300 --validation-documents 5 --workers 1"
    )
    inputs = json.loads((corpus / "provenance.json").read_text())["inputs"]
    assert inputs == {"../../../mine.txt": sha256(tmp_path / "mine.txt")}
    assert verify(capsys, results) == []
    with open(tmp_path / "mine.txt", "a") as file:
        file.write(" More.")
    (line,) = verify(capsys, results)
    assert line.startswith("data/mine: stale: made from ../mine.txt of sha256")
    (tmp_path / "mine.txt").unlink()
    assert verify(capsys, results) == []


def test_a_file_that_was_just_hashed_is_not_read_again(tmp_path, monkeypatch):
    """This holds for records; a check always reads the bytes, and a changed file is read again."""
    path, read = tmp_path / "a", []
    file_digest = hashlib.file_digest

    def counting(file, kind):
        read.append(file.name)
        return file_digest(file, kind)

    monkeypatch.setattr(files.hashlib, "file_digest", counting)
    path.write_text("one")
    first = sha256(path)
    assert sha256_once(path) == first
    assert len(read) == 1
    assert sha256(path) == first
    assert len(read) == 2
    path.write_text("three")
    assert sha256_once(path) == sha256(path) != first
    files.remember_sha256(path, "remembered")
    assert sha256_once(path) == "remembered"
    # As an atomic write does: another file of the same size under the same name.
    (tmp_path / "b").write_text("four!")
    os.replace(tmp_path / "b", path)
    assert sha256_once(path) == sha256(path) != "remembered"


@pytest.mark.parametrize(("option", "carried"), [("", True), ("--reset-optimizer", False)])
def test_a_round_records_the_optimizer_state_it_carries_over(pipeline, tmp_path, option, carried):
    second = tmp_path / "kl_backward/round-2"
    options = ROUND.replace("--round 1", "--round 2")
    done(
        f"distill-round --teacher {pipeline.student} --corpus {pipeline.corpus} "
        f"--output {second} {options} {option}"
    )
    inputs = provenance.read_record(second / "provenance.json", pipeline.results)["inputs"]
    state = "models/stories-tiny/kl_backward/round-1/optimizer.safetensors"
    assert (state in inputs) == carried
