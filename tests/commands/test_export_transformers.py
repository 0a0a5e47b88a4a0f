"""`halfstep export` of models of transformers: the folder of the student is as its teacher's."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from published import FAMILIES, build_family, masked_tokenizer
from safetensors.torch import load_file
from small import ROUND, call, done

import halfstep
from halfstep.commands.import_transformers import swap_of

V, LENGTH, MASK, PADDING = 300, 24, 103, 11  # of the small corpus; the last two of the models
CASES = [
    ("bert", "same"),
    ("roberta", "same"),
    ("modernbert", "same"),
    ("gpt2", "shifted"),
    ("llama", "same"),
    ("llama", "shifted"),
    ("qwen2", "same"),
    ("qwen2", "shifted"),
]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def save_source(kind, folder, corpus, **options):
    """A hub folder: a small random model, its mask token in the middle, and a chat template."""
    rows = V + 1 + PADDING
    build_family(kind, rows, LENGTH, folder, mask_token_id=MASK, **options)
    tokenizer = masked_tokenizer(corpus, MASK, framing=kind == "bert")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def flags(kind, logits):
    is_known = kind == "gpt2" or FAMILIES[kind] == "AutoModelForMaskedLM"
    return "" if is_known else f"--logits {logits}"


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def exported(request, pipeline, tmp_path_factory):
    """A source, the teacher that is imported from it, a student of one round, and their exports."""
    kind, logits = request.param
    root = tmp_path_factory.mktemp("export")
    source, models = root / "source", root / "models/t"
    save_source(kind, source, pipeline.corpus)
    corpus = f"--corpus {pipeline.corpus}"
    given = flags(kind, logits)
    done(f"import --source hf:{source} {corpus} --output {models}/teacher {given}")
    done(f"distill-round --teacher {models}/teacher {corpus} --output {models}/kl/round-1 {ROUND}")
    folders = {"teacher": models / "teacher", "student": models / "kl/round-1"}
    for name, folder in folders.items():
        done(f"export --checkpoint {folder} --output {root}/{name}")
    return SimpleNamespace(
        kind=kind, logits=logits, root=root, source=source, corpus=corpus, folders=folders
    )


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def code_of_card(folder):
    """The Python of a model card, up to the loop that samples, and the rest of it."""
    text = (folder / "README.md").read_text().replace('folder = "."', f'folder = "{folder}"')
    code = re.search(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1]
    return code.partition("mask, tokens, length")


def loaded(folder):
    """The names that the first part of a card's code defines."""
    names = {}
    exec(code_of_card(folder)[0], names)
    return SimpleNamespace(**names)


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


# The folder


def test_an_untouched_teacher_has_every_bit_of_its_source(exported):
    """Padding and tied tables included; and no tensor is there twice."""
    assert_same_tensors(weights(exported.root / "teacher"), weights(exported.source))


def test_the_files_of_the_tokenizer_are_those_of_the_source(exported):
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    for folder in ("teacher", "student"):
        for name in names:
            content = (exported.root / folder / name).read_bytes()
            assert content == (exported.source / name).read_bytes(), name


def test_the_configuration_says_what_the_source_said_and_what_the_student_is(exported):
    theirs = config_of(exported.source)
    said = [
        ("teacher", {"round": 0, "student_steps": None}),
        ("student", {"round": 1, "student_steps": 8}),
    ]
    for folder, entry in said:
        config = config_of(exported.root / folder)
        assert config.pop("halfstep") == {**entry, "logits": exported.logits}
        assert config == theirs


def test_a_trained_student_has_other_weights_of_the_same_names_and_shapes(exported):
    before, after = weights(exported.source), weights(exported.root / "student")
    assert {name: value.shape for name, value in before.items()} == {
        name: value.shape for name, value in after.items()
    }
    assert any(not torch.equal(before[name], after[name]) for name in before)


# transformers


@pytest.mark.parametrize("folder", ["teacher", "student"])
def test_transformers_loads_it_as_the_card_says_and_gives_our_log_p(exported, folder):
    """Every position reads all others, also in a causal model."""
    theirs, model = loaded(exported.root / folder), halfstep.load(exported.folders[folder], "cpu")
    assert type(theirs.model).__name__ == config_of(exported.source)["architectures"][0]
    order = torch.tensor([swap_of(MASK, V)(token) for token in range(V + 1)])
    x = torch.randint(2, V + 1, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        z = theirs.model(input_ids=order[x]).logits[..., order[:V]]
        ours = model.denoiser.log_p(model.denoiser.features(x, torch.ones(3)))
    z = z.roll(1, 1) if exported.logits == "shifted" else z
    assert (z.log_softmax(-1) - ours).abs().max() < 1e-5


def test_without_the_cards_lines_a_causal_model_reads_from_left_to_right(exported):
    """So a serving engine reads the student as it reads its teacher."""
    import transformers

    loader = getattr(transformers, FAMILIES[exported.kind])
    model = loader.from_pretrained(exported.root / "student").eval()
    x = torch.arange(2, 2 + LENGTH)[None]
    other = x.clone()
    other[:, -1] += 1
    with torch.no_grad():
        is_equal = torch.equal(model(x).logits[:, 0], model(other).logits[:, 0])
    assert is_equal == (FAMILIES[exported.kind] == "AutoModelForCausalLM")


def test_the_loop_of_the_card_fills_every_mask_with_tokens_of_the_tokenizer(exported, capsys):
    first, middle, rest = code_of_card(exported.root / "student")
    names = {}
    exec(first + middle + rest, names)
    x = names["x"]
    assert x.shape == (1, LENGTH)
    assert x.max() <= V and not (x == MASK).any()
    assert capsys.readouterr().out == names["tokenizer"].decode(x[0]) + "\n"


def test_the_tokenizer_has_the_ids_and_the_template_of_its_teacher(exported):
    from transformers import AutoTokenizer

    found, theirs = (
        AutoTokenizer.from_pretrained(folder)
        for folder in (exported.root / "student", exported.source)
    )
    assert found.get_vocab() == theirs.get_vocab()
    assert found("Tom <|mask|> a dog").input_ids == theirs("Tom <|mask|> a dog").input_ids
    assert (found.mask_token_id, found.chat_template) == (MASK, TEMPLATE)


# Back


@pytest.mark.parametrize("folder", ["teacher", "student"])
def test_an_import_of_the_export_keeps_every_bit_twice_round(exported, tmp_path, folder):
    """Weights, tokenizer, log p; the logits are known without a flag."""
    first = halfstep.load(exported.folders[folder], "cpu")
    hub = exported.root / folder
    for turn in (1, 2):
        again = tmp_path / f"models/again-{turn}/teacher"
        done(f"import --source hf:{hub} {exported.corpus} --output {again}")
        model = halfstep.load(again, "cpu")
        assert model.meta["network"] == first.meta["network"]
        found, expected = model.network.state_dict(), first.network.state_dict()
        assert_same_tensors(found, expected)
        if folder == "teacher":
            assert model.tokenizer.to_str() == first.tokenizer.to_str()
        else:  # a student has that of its corpus, whose file may have another layout
            assert model.tokenizer.get_vocab() == first.tokenizer.get_vocab()
        x = torch.randint(2, V + 1, (3, LENGTH), generator=torch.Generator().manual_seed(2))
        laws = [
            one.denoiser.log_p(one.denoiser.features(x, torch.ones(3))) for one in (first, model)
        ]
        assert torch.equal(*laws)
        hub = tmp_path / f"hub-{turn}"
        done(f"export --checkpoint {again} --output {hub}")
        assert_same_tensors(weights(hub), weights(exported.root / folder))
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            assert (hub / name).read_bytes() == (exported.source / name).read_bytes()


# The card


def test_the_card_names_teacher_round_steps_divergence_and_logits(exported):
    text = (exported.root / "student/README.md").read_text()
    assert "round 1 of Self-Distillation Through Time, meant for **8 sampling steps**" in text
    assert f"| imported from | {exported.source} |" in text
    assert "| divergence | kl_backward |" in text
    assert "| steps | 8 |" in text
    assert f"`logits: {exported.logits}`: the output at" in text
    assert "license" not in text and "base_model" not in text


def test_a_name_on_the_hub_is_the_base_model_of_the_card(exported, tmp_path):
    shutil.copytree(exported.folders["teacher"], tmp_path / "teacher")
    meta = json.loads((tmp_path / "teacher/meta.json").read_text())
    meta["transformers"]["source"] = "own/model@main"
    (tmp_path / "teacher/meta.json").write_text(json.dumps(meta))
    done(f"export --checkpoint {tmp_path}/teacher --output {tmp_path}/hub")
    lines = (tmp_path / "hub/README.md").read_text().splitlines()
    assert lines[:3] == ["---", "base_model: own/model", "library_name: transformers"]


# Other sources


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_in_half_precision_stay_so_if_they_lose_nothing(pipeline, tmp_path, dtype, tied):
    """An untouched teacher keeps its bits; a student in float32 is not rounded."""
    import transformers

    save_source("llama", tmp_path / "own", pipeline.corpus, tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "own")
    corpus, models = f"--corpus {pipeline.corpus}", tmp_path / "models/t"
    given = f"--source hf:{tmp_path}/own {corpus} --logits same"
    done(f"import {given} --output {models}/teacher")
    done(f"distill-round --teacher {models}/teacher {corpus} --output {models}/kl/round-1 {ROUND}")
    done(f"export --checkpoint {models}/teacher --output {tmp_path}/teacher")
    done(f"export --checkpoint {models}/kl/round-1 --output {tmp_path}/student")
    source = weights(tmp_path / "own")
    assert ("lm_head.weight" in source) is not tied
    assert_same_tensors(weights(tmp_path / "teacher"), source)
    assert config_of(tmp_path / "teacher")["dtype"] == dtype
    student = weights(tmp_path / "student")
    assert student.keys() == source.keys()
    assert {value.dtype for value in student.values()} == {torch.float32}
    assert config_of(tmp_path / "student")["dtype"] == "float32"
    assert "weights are in float32." in (tmp_path / "student/README.md").read_text()
    kept = load_file(models / "kl/round-1/ema.safetensors")["output_layer.linear.weight"]
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    order = torch.tensor([swap_of(MASK, V)(token) for token in range(V + 1)])
    assert torch.equal(student[name][order], kept[: V + 1])


def test_a_checkpoint_without_its_tokenizer_files_is_one_sentence(exported, tmp_path, capsys):
    shutil.copytree(exported.folders["teacher"], tmp_path / "teacher")
    meta = json.loads((tmp_path / "teacher/meta.json").read_text())
    meta["sha256"] = {n: s for n, s in meta["sha256"].items() if not n.startswith("source/")}
    (tmp_path / "teacher/meta.json").write_text(json.dumps(meta))
    capsys.readouterr()
    assert call(f"export --checkpoint {tmp_path}/teacher --output {tmp_path}/hub") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "import it again" in error
    assert not (tmp_path / "hub").exists()
