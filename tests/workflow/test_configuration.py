"""config.yaml: one line per fault, every key explained, former keys, and the schema for editors."""

import json
import re

import pytest
import yaml
from dryrun import REPOSITORY

from halfstep import cli, renamed
from halfstep.commands.config import write_schema
from halfstep.config import (
    Config,
    Continuations,
    Distillation,
    GenerateOptions,
    Network,
    Pretraining,
    RunOptions,
    Sampling,
    Section,
    Teacher,
    Training,
)
from halfstep.errors import ConfigError
from halfstep.renamed import Renamed
from halfstep.resolve import flags, read_yaml, resolve, schema, subsection, validate

PRESETS = REPOSITORY / "workflow/presets"


@pytest.mark.parametrize(
    "words, said",
    [
        (["presett=ci"], "configuration: presett: found 'ci': unknown key; did you mean preset?"),
        (["preset=labtop"], "did you mean laptop?"),
        (
            ['evaluation={"lambada": "gone.jsonl"}'],
            "configuration: evaluation.lambada: gone.jsonl cannot be read "
            "(No such file or directory); check the path",
        ),
        (
            ['sampling={"steps": [8, "owns"]}'],
            "configuration: sampling.steps.1: found 'owns': "
            "expected a whole number above zero, or own",
        ),
        (
            ['corpora={"stories": {"text_field": "story"}}'],
            "text_field: found 'story', which is used only with kind: files; leave it out",
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
    assert any("runs.b" in line and "at most 8 rounds" in line for line in lines)
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
        ConfigError, match="preset: laptop-losses -> laptop -> laptop-losses is a cycle; remove"
    ):
        resolve({"preset": "laptop-losses"}, tmp_path)


def test_config_yaml_explains_every_key():
    """Without the `# `, its comments are a valid configuration: each key once, with its default."""
    text = (REPOSITORY / "config.yaml").read_text()
    first, *lines = text.splitlines()
    assert first == "# yaml-language-server: $schema=workflow/schemas/config.schema.json"
    shown = yaml.safe_load("\n".join(line[2:] for line in lines if line.startswith("# ")))
    validate(shown)

    def covers(model: type[Section], found: dict, of_defaults: set = frozenset()):
        names = {field.alias or name for name, field in model.model_fields.items()}
        assert set(found) == names - of_defaults, model.__name__
        for key in found:
            assert re.search(rf"^#  *{key}:.* # \w", text, re.MULTILINE), (
                f"{model.__name__}.{key}: has no comment"
            )

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
    shared = {k: v for k, v in teacher["pretraining"].items() if k in Training.model_fields}
    covers(sections["distillation"], shared | teacher["distillation"])
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
    (listed,) = validate(shown).teachers.values()
    assert listed.pretraining == default.pretraining
    assert listed.distillation == default.distillation
    assert (
        validate(shown).continuations == Continuations() and filled.continuations is None
    )  # off, or the paper's
    for name in ("sampling", "evaluation", "benchmark", "seed"):
        assert getattr(validate(shown), name) == getattr(filled, name), (
            f"config.yaml lists other defaults of {name} than the models have"
        )


OLD_NOISE = {"draw_dtype": "float32-released"}
NOTICE = "sampling.draw_dtype is the former name of sampler and works for one release only; "


@pytest.mark.parametrize(
    ("sampling", "sampler", "advice"),
    [
        (OLD_NOISE, "ancestral_float32", "write sampler: ancestral_float32"),
        (
            OLD_NOISE | {"sampler": "ancestral"},
            "ancestral_float32",
            "write sampler: ancestral_float32",
        ),
        ({"draw_dtype": "float64"}, "ancestral", "leave it out"),
        ({"draw_dtype": "float64", "sampler": "block"}, "block", "leave it out"),
    ],
)
def test_a_former_key_is_translated_with_one_warning(capsys, sampling, sampler, advice):
    user = {"preset": "ci", "sampling": sampling}
    found = resolve(user, PRESETS)
    assert found.sampling.sampler == sampler
    assert capsys.readouterr().err == f"configuration: {NOTICE}{advice}\n"
    same = {"preset": "ci", "sampling": {"sampler": sampler}}
    assert found == resolve(same, PRESETS) == resolve(user, PRESETS, quiet=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("sampling", "fault"),
    [
        (
            OLD_NOISE | {"sampler": "block"},
            "draw_dtype float32-released is the noise of sampler ancestral, "
            "found sampler block; change one of the two",
        ),
        (
            {"draw_dtype": "float16"},
            "draw_dtype: found 'float16', allowed are float64 and float32-released",
        ),
    ],
)
def test_a_value_that_a_former_key_refused_is_refused(sampling, fault):
    with pytest.raises(ConfigError) as caught:
        resolve({"preset": "ci", "sampling": sampling}, PRESETS)
    assert str(caught.value) == f"sampling.{fault}"


@pytest.fixture
def mine(tmp_path):
    """A folder of presets with one of the user's own, `mine`, over ci."""
    (tmp_path / "ci.yaml").write_text((PRESETS / "ci.yaml").read_text())

    def write(**sections):
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"preset": "ci", **sections}))
        return tmp_path

    return write


def test_a_former_key_in_a_preset(mine, capsys):
    """The warning names the file, and the user's values override the preset's, old name or new."""
    presets = mine(sampling=OLD_NOISE)
    assert resolve({"preset": "mine"}, presets).sampling.sampler == "ancestral_float32"
    warning = f"{presets}/mine.yaml: {NOTICE}write sampler: ancestral_float32\n"
    assert capsys.readouterr().err == warning
    over = {"preset": "mine", "sampling": {"draw_dtype": "float64"}}
    assert resolve(over, presets).sampling.sampler == "ancestral"
    presets = mine(sampling={"sampler": "block"})
    with pytest.raises(ConfigError, match="found sampler block; change one of the two"):
        resolve({"preset": "mine", "sampling": OLD_NOISE}, presets)


def test_the_next_renaming_is_one_row(mine, monkeypatch, capsys):
    """A row without a function moves the value, wherever the section is; the higher layer wins."""
    monkeypatch.setattr(renamed, "RENAMED", [Renamed(Training, "lr_shape", "lr_decay")])
    old = {"lr_shape": "linear"}
    teacher = {
        "pretraining": old,
        "distillation": {"lr_shape": "cosine"},
        "runs": {"kl_backward": old, "lr_shape": {"divergence": "mse"}},  # a run's name is no key
    }
    presets = mine(teachers={"stories-ci": {"baseline": {"lr_decay": "cosine"}}})
    user = {"preset": "mine", "teachers": {"stories-ci": teacher | {"baseline": old}}}
    (found,) = resolve(user, presets).teachers.values()
    assert found.pretraining.lr_decay == found.baseline.lr_decay == "linear"
    assert {name: run.lr_decay for name, run in found.runs.items()} == {
        "kl_backward": "linear",
        "lr_shape": "cosine",
    }
    start = "configuration: teachers.stories-ci."
    end = (
        ".lr_shape is the former name of lr_decay and works for one release only; write lr_decay: "
    )
    assert sorted(capsys.readouterr().err.splitlines()) == sorted(
        f"{start}{section}{end}{value}"
        for section, value in (
            ("pretraining", "linear"),
            ("baseline", "linear"),
            ("distillation", "cosine"),
            ("runs.kl_backward", "linear"),
        )
    )
    user["teachers"]["stories-ci"]["baseline"] = {"lr_shape": "linear", "lr_decay": "cosine"}
    with pytest.raises(ConfigError, match=r"baseline\.lr_shape: found with its new name lr_decay"):
        resolve(user, presets)
    properties = schema()["$defs"]["Distillation"]["properties"]
    assert properties["lr_shape"]["deprecated"] and "lr_decay" in properties


def test_the_graph_warns_once_and_prints_the_new_flag(workflow):
    """In the main process only: each job of a cluster reads the configuration again."""
    target = "results/samples/stories-ci/teacher/provenance.json"
    command = ["-n", "-p", target, "--config", "preset=ci", f"sampling={json.dumps(OLD_NOISE)}"]
    done = workflow.run(*command)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "draw_dtype" in line]
    assert warnings == [f"configuration: {NOTICE}write sampler: ancestral_float32"]
    assert "--sampler ancestral_float32" in done.stdout and "draw-dtype" not in done.stdout
    job = workflow.run(*command, "--mode", "remote")
    assert job.returncode == 0 and NOTICE not in job.stderr, job.stderr


def test_the_schema_marks_former_keys():
    properties = schema()["$defs"]["Sampling"]["properties"]
    assert properties["draw_dtype"] == {"deprecated": True, "description": "former name of sampler"}
    assert not any(
        "deprecated" in entry for entry in schema()["$defs"]["Pretraining"]["properties"].values()
    )


def test_committed_schema_is_the_models_own(tmp_path):
    write_schema(tmp_path / "schema.json")
    written = json.loads((tmp_path / "schema.json").read_text())
    committed = json.loads((REPOSITORY / "workflow/schemas/config.schema.json").read_text())
    assert written == committed, "run `halfstep write-schema`"
    assert {"corpora", "teachers", "sampling"} <= committed["properties"].keys()


def test_prompts_are_not_continued_in_more_steps_than_a_sampler_can_use():
    """A job would fail after all training."""
    steps = {"continuation_steps": [8, 128], "prompt_tokens": 12, "continuation_tokens": 12}
    config = {
        "preset": "ci",
        "sampling": {"sampler": "first_hitting", "steps": [8]},
        "continuations": {**steps, "document_tokens": 30, "num_prompts": 4},
    }
    expected = r"continuations\.continuation_steps: found 128, but sampler first_hitting .*most 24"
    with pytest.raises(ConfigError, match=expected):
        resolve(config, REPOSITORY / "workflow" / "presets")
    config["sampling"]["sampler"] = "ancestral"
    assert resolve(config, REPOSITORY / "workflow" / "presets").continuations


SHORT = {"num_steps": 5, "warmup_steps": 1}
OWN = {
    "corpora": {"mine": {"kind": "files", "files": ["a.txt"]}},
    "evaluation": {"judge": "baseline", "lambada": None},
}


@pytest.mark.parametrize(
    "teacher",
    [
        {"distillation": {**SHORT, "rounds": 2}},
        {"distillation": {**SHORT, "rounds": 2}, "runs": None},
        {"distillation": {**SHORT, "rounds": 2}, "runs": {"kl_backward": None}},
        {"distillation": SHORT, "runs": {"kl_backward": {"rounds": 2}}},
    ],
)
def test_without_runs_one_run_has_the_options_of_distillation(teacher):
    about = {"corpus": "mine", "network": {"size": "tiny"}, "pretraining": None, **teacher}
    (found,) = validate({**OWN, "teachers": {"t": about}}).teachers.values()
    assert found.runs == {"kl_backward": RunOptions(**SHORT, rounds=2)}
    assert found.pretraining == Pretraining()


def test_without_runs_and_distillation_the_run_is_the_papers():
    teachers = {"t": {"corpus": "mine", "network": {}}}
    (found,) = validate({**OWN, "teachers": teachers}).teachers.values()
    assert found.runs == {"kl_backward": RunOptions()}
    assert Teacher(corpus="mine", network=Network(), distillation=Distillation(rounds=2)).runs == {
        "kl_backward": RunOptions(rounds=2)
    }


@pytest.mark.parametrize(
    ("written", "number"),
    [("1e6", 10**6), ("1.0e6", 10**6), ("1_000_000", 10**6), ("2.5e3", 2500), ("1e+3", 1000)],
)
def test_a_whole_number_may_be_written_as_a_float(tmp_path, written, number):
    """YAML 1.1 reads most of these as text."""
    file = tmp_path / "a.yaml"
    file.write_text(
        f"preset: ci\nsampling: {{num_samples: {written}, steps: [1e1]}}\n"
        f"benchmark: {{lengths: [1e1]}}\nteachers: {{stories-ci: {{pretraining: "
        f"{{num_steps: {written}}}}}}}\n"
    )
    found = resolve(read_yaml(file), PRESETS)
    assert found.sampling.num_samples == number and found.sampling.steps == [10]
    assert found.benchmark.lengths == [10]
    assert found.teachers["stories-ci"].pretraining.num_steps == number


@pytest.mark.parametrize("written", ["1.5", "1e-3", "1e400", ".nan", "true", "'ten'", "[1]"])
def test_what_is_no_whole_number_is_explained(tmp_path, written):
    file = tmp_path / "a.yaml"
    file.write_text(f"preset: ci\nsampling: {{num_samples: {written}}}\n")
    expected = r"sampling\.num_samples: found .*: input should be a valid integer.*, as 1000000, "
    with pytest.raises(ConfigError, match=expected):
        resolve(read_yaml(file), PRESETS)


def numbers(tree):
    """Each schema of a whole number below this one."""
    parts = tree if isinstance(tree, list) else tree.values() if isinstance(tree, dict) else []
    if isinstance(tree, dict) and tree.get("type") == "integer":
        yield tree
    for part in parts:
        yield from numbers(part)


def test_every_whole_number_has_a_largest_value():
    found = list(numbers(schema()))
    assert len(found) > 30
    assert all({"minimum", "exclusiveMinimum"} & number.keys() for number in found)
    assert all("maximum" in number for number in found)


def test_a_key_that_is_given_twice_is_refused(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("preset: ci\nsampling:\n  steps: [8]\n  num_samples: 4\n  steps: [16]\n")
    with pytest.raises(ConfigError) as caught:
        read_yaml(file)
    line = f"{file}: key steps is given on line 3 and again on line 5; remove one of them"
    assert str(caught.value) == line
    file.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: {x: 1}\n")  # a merge is none
    assert read_yaml(file)["b"] == {"x": 3, "y": 2}


def test_every_preset_is_read_as_yaml_reads_it():
    for file in PRESETS.glob("*.yaml"):
        assert read_yaml(file) == yaml.safe_load(file.read_text())


def test_without_lambada_nothing_of_it_is_made(workflow):
    plan = workflow.plan("--config", "preset=ci", 'evaluation={"lambada": null}')
    assert "lambada" not in plan and "results/tables/steps.csv" in plan
    assert "lambada" in workflow.plan("--config", "preset=ci")


def test_local_text_does_not_wait_for_the_hub(workflow):
    """The preset's LAMBADA is on the hub; the corpus and the training need nothing from there."""
    target = "results/models/docs-mini/teacher/meta.json"
    assert "fetch" not in workflow.plan(target, "--config", "preset=docs")
    target = "results/metrics/docs-mini/teacher/lambada.json"
    assert "fetch" in workflow.plan(target, "--config", "preset=docs")


def with_teacher_steps(**distillation) -> dict:
    return {"preset": "laptop", "teachers": {"stories-tiny": {"distillation": distillation}}}


@pytest.mark.parametrize(("length", "steps"), [(64, 64), (256, 256)])
def test_the_teacher_takes_one_step_for_each_token(length, steps, capsys):
    """The rounds and the command line know the number; a run may have another one."""
    raw = with_teacher_steps(teacher_steps="length", rounds=5)
    raw["corpora"] = {"stories": {"length": length}}
    raw["teachers"]["stories-tiny"]["runs"] = {"own": {"teacher_steps": 32}, "shared": None}
    teacher = resolve(raw).teachers["stories-tiny"]
    assert teacher.distillation.teacher_steps == teacher.runs["shared"].teacher_steps == steps
    assert teacher.runs["own"].teacher_steps == 32
    assert capsys.readouterr().err == ""


def test_a_corpus_without_a_length_has_the_papers():
    about = {"corpus": "mine", "network": {}, "distillation": {"teacher_steps": "length"}}
    (found,) = validate({**OWN, "teachers": {"t": about}}).teachers.values()
    assert found.runs["kl_backward"].teacher_steps == 1024


@pytest.mark.parametrize(
    ("steps", "few", "first"),
    [(1024, 3, "0.062"), (256, 1, "0.25"), (128, 0, "0.5"), (64, 0, "1")],
)
def test_rounds_of_less_than_a_token_are_named(steps, few, first, capsys):
    """A step of the teacher of round r reveals 64 * 2^(r-1) / steps tokens on average."""
    raw = with_teacher_steps(teacher_steps=steps, rounds=5)
    raw["corpora"] = {"stories": {"length": 64}}
    config = resolve(raw)
    assert few == sum(64 * 2**r / steps < 0.3 for r in range(5))
    error = capsys.readouterr().err
    assert error.count("\n") == len(config.warnings()) == (few > 0)
    if few:
        assert f"in {few} of 5 rounds" in error and f"(in the first {first})" in error
    resolve(raw, quiet=True)
    assert capsys.readouterr().err == ""


def test_the_papers_presets_reveal_a_token_in_each_step():
    for preset in ("owt-small", "owt-scaling"):
        assert resolve({"preset": preset}).warnings() == []


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"pretraining": {"anneal_attention": 5}}, "anneal_attention: found 5 without `adapt`"),
        (
            {"adapt": "gpt2", "pretraining": {**SHORT, "anneal_attention": 6}},
            r"anneal_attention \(6\) must be at most num_steps \(5\)",
        ),
        ({"baseline": {"anneal_attention": 5}}, "baseline.anneal_attention: .*unknown key"),
        ({"distillation": {"anneal_attention": 5}}, "anneal_attention: .*unknown key"),
        (
            {"adapt": "gpt2", "network": {"architecture": "gpt2"}},
            "network.architecture: found gpt2, which follows from `adapt: gpt2`",
        ),
        (
            {"network": {"architecture": "gpt2", "time_conditioning": True}},
            "the architecture gpt2 has no input for the time",
        ),
    ],
)
def test_what_adaptation_rules_out(teacher, message):
    about = {"corpus": "mine", "network": {"size": "tiny"}, **teacher}
    with pytest.raises(ConfigError, match=message):
        validate({**OWN, "teachers": {"t": about}})


@pytest.mark.parametrize("count", [1, 8, 1024])
def test_a_rule_asks_for_as_many_texts_as_the_configuration(count):
    """A person's call writes one text, and flags leave out what is the default of a call."""

    def draw(sampling: GenerateOptions) -> None: ...

    section = subsection(Sampling(num_samples=count), GenerateOptions)
    words = flags(section).split()
    given = cli.parse_arguments(draw, "generate", words)
    assert given["sampling"] == section and given["sampling"].num_samples == count
    assert GenerateOptions().num_samples == 1 and Sampling().num_samples == 1024
