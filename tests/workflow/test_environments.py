"""envs/: the lock pins every requirement of pyproject.toml to a version that it admits.

The conda files have the same versions, of what their jobs need. Every pin has the hashes of its
files.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution

import pytest
from dryrun import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from small import MACHINE, ROUND

LOCK = runpy.run_path(str(REPOSITORY / "envs/lock.py"))
REMEDY = "run `make lock`"


def direct_requirements() -> list[Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        lines += extra
    return [r for r in map(Requirement, lines) if r.name != project["name"]]


def test_every_requirement_is_pinned():
    pins = LOCK["read"]()
    for requirement in direct_requirements():
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is missing in envs/requirements.txt: {REMEDY}"
        assert requirement.specifier.contains(pins[name], prereleases=True), (
            f"{requirement} does not admit the locked {pins[name]}: {REMEDY}"
        )


def test_the_lock_holds_only_pins_and_their_hashes():
    text = (REPOSITORY / "envs/requirements.txt").read_text()
    assert text == LOCK["requirements"](LOCK["read"](), LOCK["read_hashes"](text))
    assert not any(word in text for word in ("://", "@", "+", "\n-"))


def test_every_pin_has_hashes():
    """One hash at least: that of a wheel for all platforms, or of the source."""
    hashes = LOCK["read_hashes"]((REPOSITORY / "envs/requirements.txt").read_text())
    assert hashes.keys() == LOCK["read"]().keys()
    for name, found in hashes.items():
        assert found and len(set(found)) == len(found), name
        assert all(re.fullmatch("[0-9a-f]{64}", one) for one in found), name
    for name in ("torch", "numpy", "tokenizers"):  # wheels of several Pythons and platforms
        assert len(hashes[name]) > 10, name


MACHINES = [("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64"), ("Darwin", "x86_64")]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize(("system", "machine"), MACHINES)
def test_the_lock_is_complete_elsewhere(python, system, machine):
    """pip installs the lock without looking for further packages, so it must hold all of them."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "platform_system": system,
        "platform_machine": machine,
        "sys_platform": system.lower(),
    }
    pins, seen = LOCK["read"](), set()
    todo = [("halfstep", frozenset({"all"}))]
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for requirement in map(Requirement, distribution(name).requires or []):
            marker, needed = requirement.marker, canonicalize_name(requirement.name)
            wanted = [{**environment, "extra": extra} for extra in extras or {""}]
            if marker is not None and not any(map(marker.evaluate, wanted)):
                continue
            if LOCK["BROUGHT_BY_TORCH"].match(needed):
                continue
            assert needed in pins or needed == "halfstep", f"{name} needs {requirement}: {REMEDY}"
            todo.append((needed, frozenset(requirement.extras)))
    assert len({name for name, _ in seen}) > 150


def test_make_installs_the_chosen_torch_and_then_only_what_the_lock_names():
    command = ["make", "-n", "-W", "pyproject.toml", ".venv/ready", "PYTHON=python3"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "pip install --no-deps --require-hashes -r envs/requirements.txt" in done.stdout
    (words,) = re.findall(r'"\$\((sed .*)\)"', done.stdout)
    found = subprocess.run(words, shell=True, cwd=REPOSITORY, capture_output=True, text=True)
    assert found.stdout == f"torch=={LOCK['read']()['torch']}\n"


def test_the_conda_files_equal_the_lock():
    for kind in LOCK["KINDS"]:
        text = (REPOSITORY / "envs" / kind).read_text()
        assert text == LOCK["conda"](kind, LOCK["read"]()), f"envs/{kind} differs: {REMEDY}"


def packages_of(kind: str) -> set[str]:
    return set(LOCK["closure"]("halfstep", frozenset(LOCK["KINDS"][kind][1])))


KEEP = """
import importlib.metadata, json, sys
from importlib.machinery import PathFinder

kept = set(json.loads(sys.argv[1])) | {"halfstep", "pip"}
others = {
    module
    for module, names in importlib.metadata.packages_distributions().items()
    if not kept & {name.lower().replace("_", "-").replace(".", "-") for name in names}
    and not module.startswith(("nvidia", "triton"))
}
assert len(others) > 20


class Kept(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in others else super().find_spec(name, path, target)


sys.meta_path = [Kept if finder is PathFinder else finder for finder in sys.meta_path]
from halfstep.cli import main

for line in json.loads(sys.argv[2]):
    code = main(line.split())
    assert code == 0, f"{line}: {code}"
"""


def run_with_packages_of(kind: str, lines: list[str]) -> None:
    """Run lines of halfstep in a process that finds no other packages than a conda file names."""
    call = [sys.executable, "-c", KEEP, json.dumps(sorted(packages_of(kind))), json.dumps(lines)]
    # A test that spoke to a server in this process has left its address to MLflow.
    environment = {key: value for key, value in os.environ.items() if key[:7] != "MLFLOW_"}
    done = subprocess.run(call, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_tables_figures_and_mlflow_need_only_the_packages_of_their_conda_file(pipeline, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(pipeline.results, results, symlinks=True)
    tables = f"--metrics {results}/metrics --output {results}/tables"
    lines = [
        f"tabulate --table steps {tables}/steps.csv",
        f"plot --figure ppl_vs_steps --tables {results}/tables/steps.csv "
        f"--output {results}/figures/ppl_vs_steps",
        f"track --results {results} --output {results}/mlflow.synced",
    ]
    run_with_packages_of("report.yaml", lines)
    assert (results / "mlflow.synced").read_text() == ""


def test_models_need_only_the_packages_of_their_conda_file(pipeline, tmp_path):
    write = f"--num-samples 4 {MACHINE}"
    judge = f"--corpus {pipeline.corpus} --judge {pipeline.baseline}/hf --bootstrap 100 {MACHINE}"
    lines = [
        f"distill-round --output {tmp_path}/round --teacher {pipeline.teacher} "
        f"--corpus {pipeline.corpus} {ROUND}",
        f"generate --checkpoint {pipeline.teacher} --output {tmp_path}/samples --steps 8 {write}",
        f"score-samples --samples {tmp_path}/samples --output {tmp_path}/samples.json {judge}",
        f"score-lambada --checkpoint {pipeline.teacher} --corpus {pipeline.corpus} "
        f"--output {tmp_path}/words.json --lambada last_words --lambada-items 2 "
        f"--bootstrap 100 {MACHINE}",
        f"latency --checkpoint {pipeline.teacher} --baseline {pipeline.baseline} --lengths 8 "
        f"--batch-sizes 1 --benchmark-steps 2 --baselines halfstep transformers --repeats 3 "
        f"--output {tmp_path}/seconds.json {MACHINE}",
    ]
    run_with_packages_of("gpu.yaml", lines)


def test_each_rule_has_a_conda_file_of_its_kind():
    """Rules of models have that of models; what runs where Snakemake runs has no GPU's."""
    found = {
        file.stem: set(re.findall(r"\.\./envs/(.+?)\"", file.read_text()))
        for file in (REPOSITORY / "rules").glob("*.smk")
    }
    for name, kinds in found.items():
        expected = {"report": "report.yaml", "paper": "report.yaml", "common": None}
        expected |= dict.fromkeys(("data", "fetch", "naive"), "cpu.yaml")
        assert kinds == {expected.get(name, "gpu.yaml")} - {None}, name
    assert len(packages_of("report.yaml")) < 120 > len(packages_of("gpu.yaml"))


def test_make_without_a_python_names_the_version_it_needs(tmp_path):
    for part in ("Makefile", "pyproject.toml"):
        shutil.copy(REPOSITORY / part, tmp_path)
    shutil.copytree(REPOSITORY / "envs", tmp_path / "envs")
    command = ["make", "demo", "PYTHON="]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv").exists()
