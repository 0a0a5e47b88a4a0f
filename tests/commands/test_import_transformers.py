"""`halfstep import --source hf:...`: models of transformers as checkpoints of denoisers."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from published import (
    FAMILIES,
    LOGITS,
    build_family,
    logits_flag,
    masked_tokenizer,
    save_model,
)
from safetensors.torch import load_file, save_file
from small import MACHINE, ROUND, call, done

import halfstep
from halfstep.commands.import_transformers import KNOWN_LOGITS, check_logits
from halfstep.commands.writers import encode_prompt
from halfstep.data.tokenizer import read_tokenizer
from halfstep.errors import HalfstepError
from halfstep.records import provenance
from halfstep.records.journal import read_journal

V, LENGTH, MASK, PADDING = 300, 24, 103, 11  # of the small corpus; the last two of the models
ORDER = torch.arange(V + 1)  # the model's id of each of our tokens
ORDER[MASK], ORDER[V] = V, MASK


def save(kind, folder, corpus, rows=V + 1 + PADDING, mask=MASK, framing=False, **options):
    """A hub folder: a small random model with the tokens of the corpus and a mask."""
    model = build_family(kind, rows, LENGTH, folder, **options)
    masked_tokenizer(corpus, mask, framing=framing).save_pretrained(folder)
    return model


def own_log_p(model, is_causal, shifted, x):
    """log p of our tokens from transformers' own logits: x[B, L] of our ids -> [B, L, V]."""
    nothing_hidden = torch.zeros(len(x), 1, x.shape[1], x.shape[1])
    options = {"attention_mask": nothing_hidden} if is_causal else {}
    with torch.no_grad():
        z = model(input_ids=ORDER[x], **options).logits[..., ORDER[:V]]
    return (z.roll(1, 1) if shifted else z).log_softmax(-1)


@pytest.fixture(scope="module", params=FAMILIES)
def imported(request, pipeline, tmp_path_factory):
    """The hub folder of a family, its model, and the checkpoint made of it."""
    kind, root = request.param, tmp_path_factory.mktemp("hub")
    is_causal = FAMILIES[kind] == "AutoModelForCausalLM"
    logits = LOGITS.get(kind) or KNOWN_LOGITS.get(kind, "same")
    theirs = save(kind, root / kind, pipeline.corpus, framing=kind == "bert")
    folder = root / f"models/stories-{kind}/teacher"
    done(f"import --source hf:{root / kind} --corpus {pipeline.corpus} --output {folder} "
         f"{logits_flag(kind)}")  # fmt: skip
    return SimpleNamespace(
        kind=kind,
        source=root / kind,
        theirs=theirs,
        folder=folder,
        law=lambda x: own_log_p(theirs, is_causal, logits == "shifted", x),
    )


def test_a_loaded_checkpoint_has_the_models_own_log_p(imported):
    model = halfstep.load(imported.folder, "cpu")
    x = torch.randint(2, V + 1, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    h = model.denoiser.features(x, torch.ones(3))
    assert torch.allclose(model.denoiser.log_p(h), imported.law(x), atol=1e-5)
    assert (model.mask_id, model.vocab_size, model.length) == (V, V, LENGTH)
    assert (model.weights, model.meta["network"]["size"]) == ("published", "2x32x2")


def test_every_weight_is_that_of_the_source(imported):
    """Bit for bit, but for the two rows that have changed places; none is there twice."""
    stored = load_file(imported.folder / "model.safetensors")
    head = "output_layer.linear"
    theirs = {id(p): p for p in imported.theirs.parameters()}
    assert len(stored) == len(theirs)
    table = imported.theirs.get_output_embeddings().weight
    assert torch.equal(stored[f"{head}.weight"][: V + 1], table[ORDER])
    assert torch.equal(stored[f"{head}.weight"][V + 1 :], table[V + 1 :])
    for name, p in imported.theirs.named_parameters():
        if len(p) != len(table):
            assert torch.equal(stored[f"model.{name}"], p), name


def test_it_says_where_it_comes_from(imported):
    meta = json.loads((imported.folder / "meta.json").read_text())
    assert meta["imported"]["source"] == f"hf:{imported.source}"
    assert meta["network"]["architecture"] == "transformers"
    assert meta["transformers"]["auto"] == FAMILIES[imported.kind]
    assert meta["transformers"]["config"]["model_type"] == imported.kind
    assert (meta["transformers"]["mask_id"], meta["eos_id"]) == (MASK, 0)
    run, points = read_journal(imported.folder)
    assert (run["name"], points) == ("teacher", [])
    record = provenance.read_record(imported.folder / provenance.NAME, imported.folder)
    assert any(name.endswith("config.json") for name in record["inputs"])


def test_prompts_have_the_framing_of_the_source(imported):
    """Bert's tokenizer begins texts with token 1; the others of this test begin them with none."""
    model = halfstep.load(imported.folder, "cpu")
    begin = [1] if imported.kind == "bert" else []
    assert model.meta["framing"] == {"begin": begin, "end": begin and [0]}
    ids = encode_prompt(model, "Tom <|mask|> a dog").tolist()
    words = [model.tokenizer.encode(text).ids for text in ("Tom", " a dog")]
    assert ids == [*begin, *words[0], V, *words[1]]


def test_it_writes_and_is_distilled_like_any_checkpoint(imported, pipeline, tmp_path):
    """Two rounds, the second from the student of the first, and texts of that."""
    texts = halfstep.generate(halfstep.load(imported.folder, "cpu"), steps=4, prompt="Tom")
    assert texts[0].startswith("Tom")
    models = tmp_path / "models/t/kl"
    rest = f"--corpus {pipeline.corpus} {ROUND}"
    done(f"distill-round --teacher {imported.folder} --output {models}/round-1 {rest}")
    again = rest.replace("--round 1", "--round 2")
    done(f"distill-round --teacher {models}/round-1 --output {models}/round-2 {again}")
    student = halfstep.load(models / "round-2", "cpu")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (imported.folder, models / "round-2")
    )
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert (student.framing, student.meta["student_steps"]) == (
        halfstep.load(imported.folder, "cpu").framing,
        4,
    )
    line = f"--checkpoint {models}/round-2 --output {tmp_path}/s --steps 4 --num-samples 3"
    done(f"generate {line} {MACHINE}")


def test_heads_for_other_tasks_are_left_out(pipeline, tmp_path):
    """The hub's Bert has a pooler and a head for pairs of sentences."""
    save("bert", tmp_path / "hub", pipeline.corpus)
    state = load_file(tmp_path / "hub/model.safetensors")
    more = {"bert.pooler.dense.weight": torch.ones(32, 32)}
    more["cls.seq_relationship.bias"] = torch.ones(2)
    save_file(state | more, tmp_path / "hub/model.safetensors", {"format": "pt"})
    line = f"--source hf:{tmp_path}/hub --corpus {pipeline.corpus}"
    done(f"import {line} --output {tmp_path}/m/teacher")
    stored = load_file(tmp_path / "m/teacher/model.safetensors")
    assert not [name for name in stored if "pooler" in name or "seq_relationship" in name]


def test_a_tokenizer_of_the_user_is_refused(pipeline, tmp_path, capsys):
    save("bert", tmp_path / "hub", pipeline.corpus)
    capsys.readouterr()
    line = f"--source hf:{tmp_path}/hub --tokenizer gpt2 --output {tmp_path}/m/teacher"
    assert call(f"import {line}") == 1
    assert "which has its own; leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"transformers": None}, "need each other, found only one of them"),
        ({"transformers": {"auto": "AutoModelForVision"}}, "transformers.auto"),
        ({"config": {"model_type": "bert", "num_hidden_layers": 10**7}}, "describes no model"),
        ({"config": {"model_type": "own", "auto_map": {"": "x.Y"}}}, "describes no model"),
        ({"config": {"model_type": "bert", "vocab_size": 2**40}}, "has shape|missing tensors"),
        ({"framing": {"begin": ["[CLS]"]}}, "framing.begin"),
    ],
)
def test_a_changed_meta_json_is_one_sentence(imported, tmp_path, change, sentence):
    shutil.copytree(imported.folder, tmp_path / "teacher")
    meta = json.loads((tmp_path / "teacher/meta.json").read_text())
    if "config" in change:
        meta["transformers"]["config"] = change["config"]
    else:
        meta |= change
    (tmp_path / "teacher/meta.json").write_text(json.dumps(meta))
    with pytest.raises(HalfstepError, match=sentence) as caught:
        halfstep.load(tmp_path / "teacher", "cpu")
    assert "\n" not in str(caught.value)


def test_without_a_corpus_it_has_its_own_tokenizer_and_length(pipeline, tmp_path):
    save("roberta", tmp_path / "hub", pipeline.corpus)
    done(f"import --source hf:{tmp_path}/hub --output {tmp_path}/m/teacher")
    model = halfstep.load(tmp_path / "m/teacher", "cpu")
    assert (model.length, model.eos_id, model.meta["corpus"]) == (LENGTH, 0, None)
    corpus = read_tokenizer(pipeline.corpus / "tokenizer.json")
    assert model.tokenizer.get_vocab() == corpus.get_vocab()


def test_a_corpus_with_the_tokenizer_of_bert_fits_its_model(tmp_path):
    """WordPiece, [MASK] in the middle, and [SEP] ends documents, as the hub's Bert has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "text.txt").write_text("the cat sat on the mat and saw a dog\n\n" * 60)
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    backend.train([str(tmp_path / "text.txt")], trainer)
    names = {f"{name[1:-1].lower()}_token": name for name in special}
    hub = tmp_path / "hub"
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(hub)
    rows = backend.get_vocab_size()
    theirs = build_family("bert", rows, 16, hub)
    line = f"--kind files --files {tmp_path}/text.txt --length 16 --validation-documents 20"
    done(f"prepare-corpus --output {tmp_path}/data {line} --tokenizer {hub} --workers 1")
    done(f"import --source hf:{hub} --corpus {tmp_path}/data --output {tmp_path}/m/teacher")
    model = halfstep.load(tmp_path / "m/teacher", "cpu")
    assert (model.eos_id, model.mask_id) == (3, rows - 1)
    words = backend.encode("the dog").ids
    ours = [{rows - 1: 4}.get(token, token) for token in words]
    assert encode_prompt(model, "the dog").tolist() == ours
    with torch.no_grad():
        z = theirs(torch.tensor([[*words, 4]])).logits[0, -1]
    z[4] = z[rows - 1]  # the last token has the id of the mask
    h = model.denoiser.features(torch.tensor([[*ours, rows - 1]]), torch.ones(1))[0, -1:]
    assert torch.allclose(model.denoiser.log_p(h)[0], z[:-1].log_softmax(-1), atol=1e-5)


def test_an_export_of_ours_needs_no_code_of_its_own(pipeline, tmp_path):
    """Its log p as transformers computes it with the exported file; our own reader takes it."""
    from halfstep.exported.modeling_halfstep import HalfstepForMaskedLM

    done(f"export --checkpoint {pipeline.teacher} --output {tmp_path}/hub")
    line = f"--source hf:{tmp_path}/hub --corpus {pipeline.corpus}"
    done(f"import {line} --output {tmp_path}/m/teacher")
    model = halfstep.load(tmp_path / "m/teacher", "cpu")
    assert model.meta["network"]["architecture"] == "dit"
    first = halfstep.load(pipeline.teacher, "cpu")
    found, expected = model.network.state_dict(), first.network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert model.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    x = torch.randint(0, V + 1, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    theirs = HalfstepForMaskedLM.from_pretrained(tmp_path / "hub").eval()
    with torch.no_grad():
        expected = theirs(x).logits[..., :V]
        found = model.denoiser.log_p(model.denoiser.features(x, torch.ones(3)))
    assert torch.allclose(found[x == V], expected[x == V], atol=1e-5)


class Knows(torch.nn.Module):
    """A network that knows the text 1, 2, 3 ...: its output i says token i or i + 1."""

    vocabulary = V
    readout = 9 * torch.eye(V), torch.zeros(V)

    def __init__(self, shifted, knows=True):
        super().__init__()
        self.shifted, self.knows = shifted, knows

    def forward(self, x, sigma=None, where=None):
        places = torch.arange(1, x.shape[1] + 1) + self.shifted
        h = torch.nn.functional.one_hot(places % V, V).float().expand(*x.shape, V)
        h = h if self.knows else h.flip(1)
        return h if where is None else h[where]


@pytest.mark.parametrize("right", ["same", "shifted"])
def test_logits_that_do_not_fit_real_text_are_refused(right):
    """A network that knows no text in either way is not."""
    texts, wrong = torch.arange(1, 101)[None], {"same": "shifted", "shifted": "same"}[right]
    network = Knows(right == "shifted")
    check_logits(network, right, texts, "hf:x")
    with pytest.raises(HalfstepError) as caught:
        check_logits(network, wrong, texts, "hf:x")
    found = re.fullmatch(
        rf"--source hf:x: logits: {wrong} predicts masked tokens of real text with (.*) nats each, "
        rf"{right} with (.*); set logits: {right}",
        str(caught.value),
    )
    # 9 for the right token among V, and for any other.
    least = torch.tensor(9.0).exp().add(V - 1).log().item() - 9
    assert [float(value) for value in found.groups()] == [round(least + 9, 2), round(least, 2)]
    check_logits(Knows(right == "shifted", knows=False), wrong, texts, "hf:x")


class Runs:
    """A pickle that runs a program when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def change(name, **entries):
    """A function that changes entries of a JSON file in a hub folder."""

    def changed(folder):
        about = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(about | entries))

    return changed


def with_a_program(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"a": Runs(folder / "ran")}, folder / "pytorch_model.bin")


def without_a_tensor(folder):
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if "layer" in name and "norm" in name.lower())
    state["other"] = state.pop(name)
    save_file(state, folder / "model.safetensors")


def without_a_mask(folder):
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    about = json.loads(tokenizer.to_str().replace("<|mask|>", "<|what|>"))
    (folder / "tokenizer.json").write_text(json.dumps(about))
    change("tokenizer_config.json", mask_token=None)(folder)


def with_other_tokens(folder):
    about = json.loads((folder / "tokenizer.json").read_text())
    tokens = about["model"]["vocab"]
    first, second = list(tokens)[110:112]
    tokens[first], tokens[second] = tokens[second], tokens[first]
    (folder / "tokenizer.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("kind", "spoil", "options", "sentence"),
    [
        ("bert", without_a_mask, {}, "has no mask token"),
        ("llama", None, {}, "is a causal language model .* set logits: same, or"),
        ("bert", None, {"is_decoder": True}, "predictions do not depend on later tokens"),
        ("bert", with_other_tokens, {}, "its tokenizer has other tokens than that of corpus"),
        ("bert", None, {"rows": V}, "300 tokens and the mask, but its table has 300 rows"),
        ("bert", None, {"rows": 2 * V}, "its table has 600 rows .* another model's"),
        ("bert", change("config.json", model_type="own"), {}, "'own' has no code in transformers"),
        (
            "bert",
            change("config.json", model_type="own", auto_map={"AutoConfig": "evil.Config"}),
            {},
            "'own' has its code in the repository, which is not run",
        ),
        ("bert", with_a_program, {}, "pytorch_model.bin: .*(may not be|holds|names)"),
        ("bert", without_a_tensor, {}, "missing keys, the first is"),
        ("bert", change("config.json", num_hidden_layers=10**7), {}, "for 10000000 blocks"),
        ("bert", None, {"max_position_embeddings": 16}, "found 16 positions, but the length"),
        ("gemma2", None, {}, "its logits are no linear function of its features"),
        ("vit", None, {}, "is no language model"),
    ],
)
def test_refusals_are_one_line(pipeline, tmp_path, capsys, kind, spoil, options, sentence):
    folder = tmp_path / "hub"
    save(kind if kind in FAMILIES else "bert", folder, pipeline.corpus, **options)
    if kind == "gemma2":
        shape = {"num_key_value_heads": 1, "head_dim": 16, "final_logit_softcapping": 2.0}
        save("llama", folder, pipeline.corpus)
        from transformers import AutoModelForCausalLM, Gemma2Config

        given = {"vocab_size": V + 1, "hidden_size": 32, "num_hidden_layers": 2}
        given |= {"num_attention_heads": 2, "intermediate_size": 64, "pad_token_id": 0}
        save_model(AutoModelForCausalLM.from_config, Gemma2Config(**given, **shape), folder)
    if kind == "vit":
        change("config.json", model_type="vit")(folder)
    if spoil:
        spoil(folder)
    capsys.readouterr()
    said = "--logits same" if kind == "gemma2" else ""
    line = f"--corpus {pipeline.corpus} --output {tmp_path}/m/teacher {said}"
    assert call(f"import --source hf:{folder} {line}") == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert re.search(sentence, error[-1]) and error[-1].startswith("halfstep import: "), error
    assert "Traceback" not in "".join(error)
    assert not (folder / "ran").exists()
    assert not (tmp_path / "m/teacher/meta.json").exists()


def refusal(kind):
    """An error of the hub's client, with an answer of the server."""
    from huggingface_hub import errors

    answer = SimpleNamespace(headers={}, request=None)
    return getattr(errors, kind)("the hub says no.\nMore lines.", response=answer)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: OSError("no route to host"), "(OSError: no route to host)"),
        (lambda: refusal("GatedRepoError"), "(GatedRepoError: "),
        (lambda: refusal("RepositoryNotFoundError"), "(RepositoryNotFoundError: "),
    ],
)
def test_a_repository_that_cannot_be_read_is_one_sentence(
    tmp_path, capsys, monkeypatch, make, sentence
):
    def fail(*_, **__):
        raise make()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert call(f"import --source hf:own/model@main --output {tmp_path}/m/teacher") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"--source own/model@main: the download failed {sentence}" in error
    assert "check name, revision and network" in error


def test_a_repository_that_is_not_in_the_cache_of_an_offline_machine_is_one_sentence(tmp_path):
    """With the real client of the hub, which says so in several lines; and for code too."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    code = "import sys; from halfstep.cli import main; sys.exit(main(sys.argv[1:]))"
    line = f"import --source hf:own/gated --output {tmp_path}/m/teacher --trust-remote-code"
    command = [sys.executable, "-c", code, *line.split()]
    found = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert found.stderr.count("\n") == 1
    assert "--source own/gated: the download failed (LocalEntryNotFoundError" in found.stderr
    assert "name the folder" in found.stderr
