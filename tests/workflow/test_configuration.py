"""config.yaml: faults are one line each, every key is explained, and the editor's schema is the models' own."""

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
            "configuration: sampling.steps.1: found 'owns': expected a whole number above zero, or own",
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


def test_a_preset_lies_on_the_one_it_names(tmp_path):
    for file in PRESETS.glob("*.yaml"):
        (tmp_path / file.name).write_text(file.read_text())
    losses = resolve({"preset": "laptop-losses"}, tmp_path)
    assert losses.preset == "laptop-losses" and list(losses.teachers["stories-tiny"].runs) == [
        "kl_backward",
        "mse",
        "tvd",
    ]
    only = resolve(
        {"preset": "laptop-losses", "teachers": {"stories-tiny": {"runs": {"kl_backward": None}}}},
        tmp_path,
    )
    assert list(only.teachers["stories-tiny"].runs) == ["mse", "tvd"]
    (tmp_path / "laptop.yaml").write_text("preset: laptop-losses\n")
    with pytest.raises(
        ConfigError, match="laptop-losses is laid on laptop is laid on laptop-losses: a circle"
    ):
        resolve({"preset": "laptop-losses"}, tmp_path)


def test_config_yaml_explains_every_key():
    """Its commented part, uncommented, is a valid configuration that shows each key of the models once, with its default."""
    text = (REPOSITORY / "config.yaml").read_text()
    assert (
        text.splitlines()[0]
        == "# yaml-language-server: $schema=workflow/schemas/config.schema.json"
    )
    shown = yaml.safe_load(
        "\n".join(line[2:] for line in text.splitlines()[1:] if line.startswith("# "))
    )
    validate(shown)

    def covers(model: type[Section], found: dict, of_defaults: set = frozenset()):
        assert (
            set(found)
            == {field.alias or name for name, field in model.model_fields.items()} - of_defaults
        ), model.__name__
        for key in found:
            assert re.search(rf"^#  *{key}:.* # \w", text, re.MULTILINE), (
                f"{model.__name__}.{key}: no word about it"
            )

    covers(Config, shown, {"preset"})
    (corpus,), (teacher,) = shown["corpora"].values(), shown["teachers"].values()
    fields = {
        name: field.annotation
        for name, field in Config.model_fields["teachers"]
        .annotation.__args__[1]
        .model_fields.items()
    }
    covers(Config.model_fields["corpora"].annotation.__args__[1], corpus)
    covers(Config.model_fields["teachers"].annotation.__args__[1], teacher)
    for name in ("network", "pretraining"):
        covers(fields[name], teacher[name])
    covers(fields["distillation"], teacher["pretraining"] | teacher["distillation"])
    covers(Continuations, shown["continuations"])
    for name in ("sampling", "evaluation", "benchmark"):
        covers(Config.model_fields[name].annotation, shown[name])

    filled = validate(
        {k: shown[k] for k in ("corpora",)}
        | {
            "teachers": {
                k: {"corpus": v["corpus"], "network": {}} for k, v in shown["teachers"].items()
            }
        }
    )
    (default,) = filled.teachers.values()
    (told,) = validate(shown).teachers.values()
    assert told.pretraining == default.pretraining and told.distillation == default.distillation
    assert (
        validate(shown).continuations == Continuations() and filled.continuations is None
    )  # off, or the paper's
    for name in ("sampling", "evaluation", "benchmark", "seed"):
        assert getattr(validate(shown), name) == getattr(filled, name), (
            f"config.yaml shows other values of {name} than the models have"
        )


def test_committed_schema_is_the_models_own(tmp_path):
    write_schema(tmp_path / "schema.json")
    committed = REPOSITORY / "workflow/schemas/config.schema.json"
    assert json.loads((tmp_path / "schema.json").read_text()) == json.loads(
        committed.read_text()
    ), "run `halfstep write-schema`"
    for name in ("corpora", "teachers", "sampling"):
        assert name in json.loads(committed.read_text())["properties"]
