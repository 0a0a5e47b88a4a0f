"""`halfstep init`: a project that resolves as it is, for every machine, and never overwrites."""

import os
from pathlib import Path

import pytest
import yaml
from small import call

from halfstep.commands import init as init_command
from halfstep.commands.init import measure_text, seen_from, write_new
from halfstep.errors import HalfstepError
from halfstep.resolve import read_yaml, resolve
from halfstep.workflow.packaged import PACKAGED
from halfstep.workflow.sources import check_sources
from halfstep.workflow.suggestions import Hardware

PRESETS = PACKAGED / "workflow/presets"
FILES = {"config.yaml", "profiles/default/config.yaml", ".gitignore"}
SLURM = {"slurm/config.yaml", "slurm/cluster-default.yaml"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with 300 documents in two files."""
    (tmp_path / "texts").mkdir()
    for part in (1, 2):
        days = "".join(f"Day {day}: it rained all day long.\n\n" for day in range(150))
        (tmp_path / f"texts/{part}.txt").write_text(days)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


MACHINES = [
    Hardware(1, 2),
    Hardware(2, 25),
    Hardware(8, 32, "NVIDIA GeForce RTX 4090"),
    Hardware(16, 128, 'a "GPU"\nof: nobody'),
]


@pytest.mark.parametrize("size", [2, 10_000, 10**6, 10**8, 10**11])
@pytest.mark.parametrize("hardware", MACHINES, ids=lambda hardware: hardware.gpu[:9] or "no GPU")
def test_the_configuration_resolves_without_a_warning(here, monkeypatch, capsys, hardware, size):
    """Its teacher is the suggested one alone, with a corpus of the named files."""
    monkeypatch.setattr(init_command, "this_hardware", lambda: hardware)
    monkeypatch.setattr(init_command, "measure_text", lambda patterns: (size, 300))
    assert call("init project --text texts/*.txt") == 0
    assert ", 300 documents (in a .txt a blank line ends one); suggested" in capsys.readouterr().out
    os.chdir("project")
    config = resolve(read_yaml(Path("config.yaml")), PRESETS)
    check_sources(config)
    (name, teacher), (corpus,) = *config.teachers.items(), config.corpora.values()
    found = init_command.suggest(size, hardware)
    assert name == f"my-text-{found.recipe.size}" and teacher.network.size == found.recipe.size
    assert teacher.pretraining.num_steps == found.num_steps and list(teacher.runs) == [
        "kl_backward"
    ]
    assert corpus.files == [str(here / "texts/*.txt")] and corpus.validation_documents == 15
    assert not config.warnings() and config.evaluation.lambada is None


def test_every_key_is_explained_in_comments(here):
    """The lines of the workflow's own config.yaml, from its first key to its last."""
    assert call("init") == 0
    text = Path("config.yaml").read_text()
    reference = (PACKAGED / "config.yaml").read_text()
    assert text.endswith(reference[reference.index("# seed: 1") :])
    schema = text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert Path(schema).is_file()
    assert yaml.safe_load(text)["corpora"]["my-text"]["files"] == ["text/*.txt"]


def test_keys_that_the_user_of_a_clone_has_set_are_comments_in_a_project(here, monkeypatch):
    text = (PACKAGED / "config.yaml").read_text()
    edited = text.replace("# seed: 1 ", "seed: 7 ").replace("# published: false", "published: true")
    packaged = init_command._packaged
    monkeypatch.setattr(
        init_command, "_packaged", lambda name: edited if name == "config.yaml" else packaged(name)
    )
    assert call("init") == 0
    config = resolve(read_yaml(Path("config.yaml")), PRESETS)
    assert config.seed == 1 and not config.published
    assert "\n# seed: 7 " in Path("config.yaml").read_text()


@pytest.mark.parametrize("flag, expected", [("", FILES), ("--slurm", FILES | SLURM)])
def test_profiles_are_those_of_the_package(here, flag, expected):
    assert call(f"init project {flag}") == 0
    found = contents(here / "project")
    assert found.keys() == expected
    for name in expected - {"config.yaml", ".gitignore"}:
        packaged = name if name.startswith("profiles") else f"profiles/{name}"
        assert found[name] == (PACKAGED / packaged).read_bytes()


@pytest.mark.parametrize("mine", sorted(FILES | SLURM))
def test_a_file_that_exists_is_never_changed(here, capsys, mine):
    file = here / "project" / mine
    file.parent.mkdir(parents=True)
    file.write_text("mine\n")
    assert call("init project --slurm") == 0
    assert file.read_text() == "mine\n"
    said = capsys.readouterr().out.splitlines()
    assert f"kept, as it was, project/{mine}" in said
    assert sum(line.startswith("wrote ") for line in said) == len(FILES | SLURM) - 1
    before = contents(here)
    assert call("init project --slurm") == 0 and contents(here) == before
    kept, *rest, last = capsys.readouterr().out.splitlines()
    assert kept == "kept, as it was, project/config.yaml" and last.startswith("next: cd project")
    assert all(line.startswith("kept, as it was, project/") for line in rest)


def test_a_link_to_nothing_is_not_followed(here):
    Path(".gitignore").symlink_to("elsewhere")
    assert not write_new(Path(".gitignore"), "x") and not Path("elsewhere").exists()


@pytest.mark.parametrize("folder, pattern, expected", [
    (".", "texts/1.txt", "texts/1.txt"),
    ("texts", "texts/*.txt", "*.txt"),
    ("project", "texts/*.txt", "{here}/texts/*.txt"),
    ("project", "{here}/texts/1.txt", "{here}/texts/1.txt"),
    ("text", "texts/1.txt", "{here}/texts/1.txt"),
    ("project", "~/texts/*.txt", "~/texts/*.txt"),
])  # fmt: skip
def test_paths_are_those_that_the_project_sees(here, folder, pattern, expected):
    found = seen_from(Path(folder), pattern.format(here=here))
    assert found == expected.format(here=here)


def stored(command: str) -> list[str]:
    assert call(f"init project {command}") == 0
    return resolve(read_yaml(Path("project/config.yaml")), PRESETS).corpora["my-text"].files


def test_a_pattern_that_the_shell_expanded_is_stored_as_a_pattern(here, capsys):
    """So that files which come later are found."""
    assert stored("--text texts/2.txt texts/1.txt") == [str(here / "texts/*.txt")]
    said = capsys.readouterr().out
    assert "stored as the pattern texts/*.txt: files that match it later are found" in said


@pytest.mark.parametrize("names", ["1.txt 2.txt", "1.txt 2.txt 3.txt 4.jsonl"])
def test_files_that_are_no_pattern_are_stored_by_name_and_a_note_says_so(here, capsys, names):
    Path("texts/3.txt").write_text("One.\n\nTwo.\n")
    Path("texts/4.jsonl").write_text('{"text": "Three."}\n')
    names = [f"texts/{name}" for name in names.split()]
    assert stored(f"--text {' '.join(names)}") == [str(here / name) for name in names]
    assert f"note: {len(names)} files are stored by their names" in capsys.readouterr().out


@pytest.mark.parametrize("size, words", [(120, "120 bytes"), (10_000, "0.01 MB")])
def test_a_short_text_has_a_size(size, words):
    assert init_command.size_in_words(size) == words


def test_one_file_stays_one_file(here, capsys):
    Path("texts/2.txt").unlink()
    assert stored("--text texts/1.txt") == [str(here / "texts/1.txt")]
    assert "stored" not in capsys.readouterr().out


def test_text_is_measured_in_bytes_and_documents(here):
    size = sum(path.stat().st_size for path in here.glob("texts/*"))
    assert measure_text(["texts/*.txt"]) == (size, 300)
    assert measure_text(["texts/1.txt", "texts/*.txt"]) == (size, 300)
    Path("one.txt").write_text("One document.\n")
    with pytest.raises(HalfstepError, match=r"--text: found one document in one.txt, expected two"):
        measure_text(["one.txt"])


@pytest.mark.parametrize("text, fault", [
    ("gone.txt", "files: 'gone.txt' matches nothing"),
    ("texts", "files: texts is a folder; name its files"),
    ("book.pdf", "book.pdf has an unknown suffix"),
    ("br{a}ce.txt", "--text: found ['br{a}ce.txt']: value error, braces are not expanded"),
])  # fmt: skip
def test_a_text_that_cannot_be_used_is_one_sentence_and_nothing_is_written(
    here, capsys, text, fault
):
    for name in ("book.pdf", "br{a}ce.txt"):
        Path(name).write_text("One.\n\nTwo.\n")
    before = contents(here)
    assert call(f"init project --text {text}") == 1
    said = capsys.readouterr().err
    assert fault in said and said.count("\n") == 1
    assert contents(here) == before
