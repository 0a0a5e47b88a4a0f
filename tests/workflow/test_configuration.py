"""config.yaml: a fault is one line, every key is explained, and the schema is up to date."""

import json
import re

import pytest
import yaml
from dryrun import REPOSITORY

from halfstep.commands.config import write_schema
from halfstep.config import Config, Continuations, Section
from halfstep.resolve import ConfigError, resolve, validate

PRESETS = REPOSITORY / "workflow/presets"


@pytest.mark.parametrize(
    "words, said",
    [
        (["presett=ci"], "configuration: presett: found 'ci': unknown key; did you mean preset?"),
        (["preset=labtop"], "did you mean laptop?"),
        (
            ['sampling={"steps": [8, "owns"]}'],
            "configuration: sampling.steps.1: found 'owns': "
            "expected a whole number above zero, or own",
        ),
        (
            ['corpora={"stories": {"text_field": "story"}}'],
            "text_field: found 'story', which is of use with kind: files only; leave it out",
        ),
        (
            ['sampling={"stepz": [8]}'],
            "configuration: sampling.stepz: found [8]: unknown key; did you mean steps?",
        ),
    ],
)
def test_a_fault_is_one_line(workflow, words, said):
    done = workflow.run("-n", "--config", *words)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("configuration")]
    assert len(lines) == 1 and lines[0].endswith(said), done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_every_fault_has_its_line():
    faults = {
        "seed": -1,
        "sampling": {"num_sample": 8},
        "teachers": {
            "stories-tiny": {"runs": {"a": {"divergence": "kl_backwards"}, "b": {"rounds": 11}}}
        },
    }
    with pytest.raises(ConfigError) as caught:
        resolve(faults, PRESETS)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines if "teachers" not in line] == [
        "seed",
        "sampling.num_sample",
    ]
    assert any(
        "runs.a.divergence" in line and "did you mean kl_backward?" in line for line in lines
    )
    assert any("runs.b" in line and "at most 10 rounds" in line for line in lines)
    assert len(lines) == 4


def test_a_preset_overrides_the_one_it_names(tmp_path):
    for file in PRESETS.glob("*.yaml"):
        (tmp_path / file.name).write_text(file.read_text())
    losses = resolve({"preset": "laptop-losses"}, tmp_path)
    assert losses.preset == "laptop-losses"
    assert list(losses.teachers["stories-tiny"].runs) == ["kl_backward", "mse", "tvd"]
    without = {"stories-tiny": {"runs": {"kl_backward": None}}}
    only = resolve({"preset": "laptop-losses", "teachers": without}, tmp_path)
    assert list(only.teachers["stories-tiny"].runs) == ["mse", "tvd"]
    (tmp_path / "laptop.yaml").write_text("preset: laptop-losses\n")
    with pytest.raises(
        ConfigError, match="laptop-losses is laid on laptop is laid on laptop-losses: a circle"
    ):
        resolve({"preset": "laptop-losses"}, tmp_path)


def test_config_yaml_explains_every_key():
    """Its commented part, uncommented, is a valid configuration.

    It shows each key of the models once, with its default.
    """
    text = (REPOSITORY / "config.yaml").read_text()
    first, *lines = text.splitlines()
    assert first == "# yaml-language-server: $schema=workflow/schemas/config.schema.json"
    shown = yaml.safe_load("\n".join(line[2:] for line in lines if line.startswith("# ")))
    validate(shown)

    def covers(model: type[Section], found: dict, of_defaults: set = frozenset()):
        names = {field.alias or name for name, field in model.model_fields.items()}
        assert set(found) == names - of_defaults, model.__name__
        for key in found:
            explained = re.search(rf"^#  *{key}:.* # \w", text, re.MULTILINE)
            assert explained, f"{model.__name__}.{key}: no explanation"

    covers(Config, shown, {"preset"})
    (corpus,), (teacher,) = shown["corpora"].values(), shown["teachers"].values()
    of_corpus, of_teacher = (
        Config.model_fields[name].annotation.__args__[1] for name in ("corpora", "teachers")
    )
    sections = {name: field.annotation for name, field in of_teacher.model_fields.items()}
    covers(of_corpus, corpus)
    covers(of_teacher, teacher)
    for name in ("network", "pretraining"):
        covers(sections[name], teacher[name])
    covers(sections["distillation"], teacher["pretraining"] | teacher["distillation"])
    covers(Continuations, shown["continuations"])
    for name in ("sampling", "evaluation", "benchmark"):
        covers(Config.model_fields[name].annotation, shown[name])

    config = validate(shown)
    bare = {
        name: {"corpus": section["corpus"], "network": {}}
        for name, section in shown["teachers"].items()
    }
    defaults = validate({"corpora": shown["corpora"], "teachers": bare})
    (default,), (given,) = defaults.teachers.values(), config.teachers.values()
    assert given.pretraining == default.pretraining and given.distillation == default.distillation
    assert config.continuations == Continuations() and defaults.continuations is None
    for name in ("sampling", "evaluation", "benchmark", "seed"):
        assert getattr(config, name) == getattr(defaults, name), (
            f"config.yaml shows other values of {name} than the models have"
        )


def test_the_committed_schema_is_up_to_date(tmp_path):
    write_schema(tmp_path / "schema.json")
    written = json.loads((tmp_path / "schema.json").read_text())
    committed = json.loads((REPOSITORY / "workflow/schemas/config.schema.json").read_text())
    assert written == committed, "run `halfstep write-schema`"
    assert {"corpora", "teachers", "sampling"} <= committed["properties"].keys()
