"""A baseline made of a causal language model of transformers: it is that model in all that it does.

Texts, last words and scores are compared with textbook computations on transformers' own logits.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from published import build_family, masked_tokenizer, save_causal_lm, save_gpt2
from safetensors.torch import load_file, save_file
from small import CORPUS, MACHINE, TRAINING, call, done

import halfstep
from halfstep.files import sha256
from halfstep.kernels.categorical import inverse_cdf, nucleus, uniforms
from halfstep.records import provenance
from halfstep.records.journal import read_journal

KINDS = {
    "gpt2": 0,
    "llama": 20,
    "gpt_neox": 212,
    "modernbert-decoder": 3,
}  # rows that pad the vocabulary
LENGTH = 24  # tokens in a window of the corpus


def save(kind, folder, pipeline, padding=0, length=LENGTH, **options):
    """A folder of transformers with the tokenizer of the corpus; the model."""
    tokenizer = pipeline.corpus / "tokenizer.json"
    rows = json.loads((pipeline.corpus / "manifest.json").read_text())["vocab_size"] + padding
    if kind == "gpt2":
        return save_gpt2(folder, rows, length, tokenizer, **options)
    return save_causal_lm(kind, folder, rows, length, tokenizer)


@pytest.fixture(scope="module", params=KINDS)
def baseline(request, pipeline, tmp_path_factory):
    """The folder of transformers, its model, and the checkpoint made of it."""
    kind, root = request.param, tmp_path_factory.mktemp("baseline")
    theirs = save(kind, root / kind, pipeline, KINDS[kind])
    folder = root / f"models/stories-{kind}/baseline"
    done(f"import-baseline --source {root / kind} --corpus {pipeline.corpus} --output {folder}")
    return SimpleNamespace(kind=kind, source=root / kind, theirs=theirs, folder=folder)


def log_p(theirs, ids, vocabulary=300):
    """transformers' log p of each next token among the vocabulary, [B, L, V]."""
    with torch.no_grad():
        return theirs(torch.as_tensor(ids)).logits[..., :vocabulary].log_softmax(-1)


def test_logits_are_those_of_transformers(baseline):
    model = halfstep.load(baseline.folder, "cpu")
    x = torch.randint(0, 300, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    found = model.network.log_p(model.network(x).flatten(0, 1)).view(3, LENGTH, 300)
    assert torch.allclose(found, log_p(baseline.theirs, x), atol=1e-5)
    assert (model.kind, model.denoiser, model.length) == ("autoregressive", None, LENGTH)
    raw = halfstep.load(baseline.folder, "cpu", weights="raw")
    assert raw.sha256 == model.sha256


@pytest.mark.parametrize("mask", [300, 103])
def test_one_of_the_family_of_a_masked_model_judges_its_teacher(pipeline, tmp_path, mask):
    """One tokenizer with a mask, last or not: corpus, teacher and baseline agree in all ids."""
    theirs = save("modernbert-decoder", tmp_path / "decoder", pipeline, padding=4)
    build_family("modernbert", 304, LENGTH, tmp_path / "encoder")
    for name in ("decoder", "encoder"):
        masked_tokenizer(pipeline.corpus, mask).save_pretrained(tmp_path / name)
    texts = CORPUS.replace("--vocab-size 300", f"--tokenizer {tmp_path}/decoder")
    corpus, models = tmp_path / "data", tmp_path / "models/t"
    done(f"prepare-corpus --output {corpus} {texts} --workers 1")
    place = f"--corpus {corpus} --output {models}"
    done(f"import --source hf:{tmp_path}/encoder {place}/teacher")
    done(f"import-baseline --source {tmp_path}/decoder {place}/baseline")
    model = halfstep.load(models / "baseline", "cpu")
    order = torch.arange(300)
    if mask < 300:
        order[mask] = 300  # at the source, the last token is here
    x = torch.randint(0, 300, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    found = model.network.log_p(model.network(x).flatten(0, 1)).view(3, LENGTH, 300)
    with torch.no_grad():
        expected = theirs(order[x]).logits[..., order].log_softmax(-1)
    assert torch.allclose(found, expected, atol=1e-5)
    done(f"generate --checkpoint {models}/teacher --output {tmp_path}/s --steps 4 {MACHINE}")
    judged = f"--samples {tmp_path}/s --corpus {corpus} --judge {models}/baseline/hf"
    done(f"score-samples {judged} --output {tmp_path}/rows.json --bootstrap 100 {MACHINE}")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {"ids", "retokenized"} <= {row["protocol"] for row in rows}


def test_the_readout_has_the_name_of_our_readouts(baseline):
    """What casts matrices leaves this name alone, also where the table is the readout."""
    network = halfstep.load(baseline.folder, "cpu").network
    head = network.model.get_output_embeddings()
    assert [name for name, part in network.named_modules() if part is head] == [
        "output_layer.linear"
    ]


def test_it_says_where_it_comes_from(baseline):
    meta = json.loads((baseline.folder / "meta.json").read_text())
    assert meta["imported"]["source"] == str(baseline.source)
    assert meta["imported"]["sha256"] == sha256(baseline.source / "model.safetensors")
    assert meta["network"]["size"] == "2x32x2"
    assert meta["network"]["architecture"] == "transformers"
    run, points = read_journal(baseline.folder)
    assert (run["name"], points) == ("baseline", [])
    record = provenance.read_record(baseline.folder / provenance.NAME, baseline.folder)
    outputs = {name for name in record["outputs"] if name.startswith("hf/")}
    assert outputs == {
        *("hf/config.json", "hf/model.safetensors"),
        *("hf/tokenizer.json", "hf/tokenizer_config.json"),
    }
    assert any(name.endswith(f"{baseline.kind}/model.safetensors") for name in record["inputs"])


def test_transformers_loads_its_folder(baseline):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(baseline.folder / "hf").eval()
    found, expected = (log_p(one, [[1, 2, 3]]) for one in (model, baseline.theirs))
    assert torch.allclose(found, expected, atol=1e-5)
    text = "Tom met a dog."
    ids = AutoTokenizer.from_pretrained(baseline.folder / "hf")(text)["input_ids"]
    assert ids == halfstep.load(baseline.folder, "cpu").tokenizer.encode(text).ids


def written(theirs, start, length, first, temperature=1.0, top_p=1.0, seed=1):
    """Texts by a full forward pass for each token, and the uniforms of their numbers."""
    ids = torch.as_tensor(start, dtype=torch.long)
    u = uniforms(seed, first, len(ids), length)
    while ids.shape[1] < length:
        scaled = (log_p(theirs, ids)[:, -1] / temperature).log_softmax(-1)
        drawn = inverse_cdf(nucleus(scaled, top_p), u[:, ids.shape[1]])
        ids = torch.cat([ids, drawn[:, None]], 1)
    return ids.numpy()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.0, 0.9), (0.7, 0.95)])
def test_texts_with_the_cache_are_those_of_full_passes(baseline, tmp_path, temperature, top_p):
    """And text i depends on the seed and i alone: the micro-batch has another size."""
    how = f"--temperature {temperature} --top-p {top_p} --steps {LENGTH} --num-samples 6"
    machine = MACHINE.replace("--micro-batch 8", "--micro-batch 4")
    done(f"generate --checkpoint {baseline.folder} --output {tmp_path} {how} {machine}")
    expected = written(baseline.theirs, [[0]] * 6, LENGTH, 0, temperature, top_p)
    assert (np.load(tmp_path / "samples.npy") == expected).all()
    about = json.loads((tmp_path / "samples.json").read_text())
    assert (about["kind"], about["sampler"]) == ("autoregressive", "autoregressive")
    assert (about["top_p"], about["network_evaluations"]) == (top_p, LENGTH - 1)


def test_prompts_are_continued(baseline, pipeline, tmp_path):
    options = "--num-prompts 2 --per-prompt 2 --prompt-tokens 4 --continuation-tokens 6"
    place = f"--checkpoint {baseline.folder} --corpus {pipeline.corpus} --output {tmp_path}"
    done(f"continue-prompts {place} --steps 6 {options} --document-tokens 9 {MACHINE}")
    found = np.load(tmp_path / "samples.npy")
    assert (found == written(baseline.theirs, found[:, :4], 10, 0)).all()


def test_last_words_are_those_of_a_textbook(baseline, pipeline, tmp_path):
    """exp of the mean -log p of a word given all before it; how often it is the argmax."""
    done(
        f"score-lambada --checkpoint {baseline.folder} --corpus {pipeline.corpus} --lambada "
        f"last_words --lambada-items 9 --output {tmp_path}/rows.json --bootstrap 100 {MACHINE}"
    )
    rows = {row["metric"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    encode = halfstep.load(baseline.folder, "cpu").tokenizer.encode
    lines = (pipeline.corpus / "last_words.jsonl").read_text().splitlines()[:9]
    nll, right = [], []
    for text in (json.loads(line)["text"] for line in lines):
        context, _, word = text.rpartition(" ")
        asked = encode(f" {word}").ids
        given = encode(context).ids[-(LENGTH - 2 - len(asked)) :]
        values = log_p(baseline.theirs, [[0, *given, *asked]])[0, len(given) : -1]
        nll.append(-values.gather(1, torch.tensor(asked)[:, None]).sum().item())
        right.append(values.argmax(-1).tolist() == asked)
    assert rows["lambada_perplexity"]["value"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)
    assert rows["lambada_accuracy"]["value"] == pytest.approx(np.mean(right))
    assert {row["protocol"] for row in rows.values()} == {"ar"}


def test_it_is_a_judge(baseline, pipeline, tmp_path):
    """Protocol ids: exp of the mean -log p of the tokens of each text after the first."""
    scores = f"--corpus {pipeline.corpus} --judge {baseline.folder}/hf --bootstrap 100 {MACHINE}"
    done(f"score-samples --samples {pipeline.samples} --output {tmp_path}/rows.json {scores}")
    (value,) = (
        row["value"]
        for row in json.loads((tmp_path / "rows.json").read_text())
        if (row["metric"], row["protocol"]) == ("generative_perplexity", "ids")
    )
    ids = np.load(pipeline.samples / "samples.npy").astype(np.int64)
    table = log_p(baseline.theirs, ids, vocabulary=None)[:, :-1]
    nll = -table.gather(2, torch.from_numpy(ids[:, 1:, None]))
    assert value == pytest.approx(nll.mean().exp().item(), rel=1e-4)


def test_a_teacher_adapted_from_it_is_one_adapted_from_the_model(baseline, pipeline, tmp_path):
    """With GPT-2's architecture; any other is refused in one line."""
    start = f"pretrain --corpus {pipeline.corpus} --size 2x32x2 {TRAINING} {MACHINE}"
    places = {"own": baseline.folder, "theirs": baseline.source}
    if baseline.kind != "gpt2":
        assert call(f"{start} --adapt {baseline.folder} --output {tmp_path}/own/teacher") == 1
        return
    for name, place in places.items():
        done(f"{start} --adapt {place} --output {tmp_path}/{name}/teacher")
    one, other = (load_file(tmp_path / name / "teacher/model.safetensors") for name in places)
    assert all(torch.equal(one[name], value) for name, value in other.items())
    metas = [json.loads((tmp_path / name / "teacher/meta.json").read_text()) for name in places]
    assert metas[0]["adapted"] == metas[1]["adapted"]


def test_another_architecture_cannot_be_adapted(pipeline, tmp_path, capsys):
    folder = tmp_path / "models/t/baseline"
    save("llama", tmp_path / "llama", pipeline)
    source = f"--source {tmp_path / 'llama'}"
    done(f"import-baseline {source} --corpus {pipeline.corpus} --output {folder}")
    capsys.readouterr()
    line = f"pretrain --corpus {pipeline.corpus} --size 2x32x2 {TRAINING} {MACHINE}"
    assert call(f"{line} --adapt {folder} --output {tmp_path}/t/teacher") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "model_type: found 'llama', expected 'gpt2'; name a GPT-2 model" in error


# What it reads


def test_the_layout_of_the_hub_is_read(pipeline, tmp_path):
    """gpt2 on the hub: names without a prefix, causal masks, and a tokenizer in two files."""
    theirs = save("gpt2", tmp_path / "new", pipeline)
    (tmp_path / "old").mkdir()
    state = load_file(tmp_path / "new/model.safetensors")
    state = {name.removeprefix("transformer."): value for name, value in state.items()}
    mask = torch.ones(LENGTH, LENGTH).tril()[None, None]
    state |= {f"h.{i}.attn.bias": mask.clone() for i in range(2)}
    save_file(state, tmp_path / "old/model.safetensors")
    (tmp_path / "old/config.json").write_text((tmp_path / "new/config.json").read_text())
    about = json.loads((pipeline.corpus / "tokenizer.json").read_text())["model"]
    (tmp_path / "old/vocab.json").write_text(json.dumps(about["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in about["merges"]]
    (tmp_path / "old/merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    line = f"--corpus {pipeline.corpus} --output {tmp_path}/models/t/baseline"
    done(f"import-baseline --source {tmp_path}/old {line}")
    model, x = halfstep.load(tmp_path / "models/t/baseline", "cpu"), torch.tensor([[3, 2, 1]])
    assert torch.allclose(model.network.log_p(model.network(x)[0]), log_p(theirs, x)[0], atol=1e-5)


def test_tied_weights_of_a_pickle_are_read(pipeline, tmp_path):
    """pytorch_model.bin, through the checks of halfstep import."""
    theirs = save("gpt2", tmp_path / "model", pipeline)
    torch.save(theirs.state_dict(), tmp_path / "model/pytorch_model.bin")
    (tmp_path / "model/model.safetensors").unlink()
    line = f"--corpus {pipeline.corpus} --output {tmp_path}/models/t/baseline"
    done(f"import-baseline --source {tmp_path}/model {line}")
    model, x = halfstep.load(tmp_path / "models/t/baseline", "cpu"), torch.tensor([[3, 2, 1]])
    assert torch.allclose(model.network.log_p(model.network(x)[0]), log_p(theirs, x)[0], atol=1e-5)


def change_config(folder: Path, **keys) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | keys))


def test_code_in_the_folder_is_neither_run_nor_kept(pipeline, tmp_path):
    save("gpt2", tmp_path / "model", pipeline)
    (tmp_path / "model/evil.py").write_text(f"open('{tmp_path}/ran', 'w')\n")
    code = {"auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}}
    change_config(tmp_path / "model", **code, attn_implementation="someone/kernels")
    line = f"--corpus {pipeline.corpus} --output {tmp_path}/models/t/baseline"
    done(f"import-baseline --source {tmp_path}/model {line}")
    kept = (tmp_path / "models/t/baseline/hf/config.json").read_text()
    assert "auto_map" not in kept and "someone" not in kept
    assert not (tmp_path / "ran").exists()
    assert halfstep.load(tmp_path / "models/t/baseline", "cpu").network.model.config.n_embd == 32


class Runs:
    """Creates a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def with_a_program(folder):
    without_weights(folder)
    torch.save({"a": Runs(folder / "ran")}, folder / "pytorch_model.bin")


def with_more_blocks(folder):
    change_config(folder, n_layer=10**7)


def with_a_huge_table(folder):
    change_config(folder, vocab_size=2**30)


def with_a_huge_head(folder):
    change_config(folder, n_positions=2**30)


def with_an_unknown_kind(folder):
    change_config(folder, model_type="own", auto_map={"AutoConfig": "evil.Config"})


def with_fewer_blocks(folder):
    change_config(folder, n_layer=1)


def with_nan(folder):
    state = load_file(folder / "model.safetensors")
    state["transformer.wte.weight"][0, 0] = torch.nan
    save_file(state, folder / "model.safetensors")


def without_a_tensor(folder):
    state = load_file(folder / "model.safetensors")
    state["transformer.h.0.ln_1.other"] = state.pop("transformer.h.0.ln_1.weight")
    save_file(state, folder / "model.safetensors")


def with_another_tokenizer(folder):
    about = json.loads((folder / "tokenizer.json").read_text())
    tokens = about["model"]["vocab"]
    first, second = list(tokens)[100:102]
    tokens[first], tokens[second] = tokens[second], tokens[first]
    (folder / "tokenizer.json").write_text(json.dumps(about))


def that_is_bert(folder):
    from published import save_model
    from transformers import BertConfig, BertLMHeadModel

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=300, intermediate_size=64, **shape)
    save_model(BertLMHeadModel, config, folder)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without_weights, "holds none of model.safetensors"),
        (with_a_program, "pytorch_model.bin: .*(may not be|holds|names)"),
        (with_more_blocks, "tensors for 10000000 blocks"),
        (with_a_huge_table, "weights for a network of"),
        (with_a_huge_head, "weights for a network of"),
        (with_an_unknown_kind, "transformers cannot load it"),
        (with_fewer_blocks, "unexpected keys, the first is transformer.h.1"),
        (with_nan, "holds NaN or infinity"),
        (without_a_tensor, "missing keys, the first is transformer.h.0.ln_1.weight"),
        (with_another_tokenizer, "its tokenizer has other tokens than that of corpus"),
        (that_is_bert, "is no causal language model with a KV cache"),
    ],
)
def test_refusals_are_one_line(pipeline, tmp_path, capsys, change, sentence):
    folder = tmp_path / "model"
    save("gpt2", folder, pipeline)
    change(folder)
    capsys.readouterr()
    line = f"--corpus {pipeline.corpus} --output {tmp_path}/models/t/baseline"
    assert call(f"import-baseline --source {folder} {line}") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(sentence, error), error
    assert not (folder / "ran").exists()
    assert not (tmp_path / "models/t/baseline/meta.json").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"padding": -10}, "found 290 rows of its vocabulary, but the vocab_size of the corpus is"),
        ({"length": 16}, "found 16 positions, but the length of the corpus is 24; change the"),
    ],
)
def test_a_model_that_is_too_small_is_refused(pipeline, tmp_path, capsys, options, sentence):
    save("gpt2", tmp_path / "model", pipeline, **options)
    capsys.readouterr()
    line = f"--corpus {pipeline.corpus} --output {tmp_path}/models/t/baseline"
    assert call(f"import-baseline --source {tmp_path}/model {line}") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and sentence in error, error


def test_a_machine_without_network_says_so(pipeline, tmp_path, capsys, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    line = f"--corpus {pipeline.corpus} --output {tmp_path}/t/baseline"
    assert call(f"import-baseline --source gpt2@main {line}") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--source gpt2@main: the download failed (OSError: no route to host)" in error


def test_a_changed_file_is_found(pipeline, tmp_path, capsys):
    save("gpt2", tmp_path / "model", pipeline)
    folder = tmp_path / "models/t/baseline"
    line = f"--source {tmp_path}/model --corpus {pipeline.corpus} --output {folder}"
    done(f"import-baseline {line}")
    change_config(folder / "hf", activation_function="relu")
    capsys.readouterr()
    assert call(f"generate --checkpoint {folder} --output {tmp_path}/s --steps 8 {MACHINE}") == 1
    assert "hf/config.json: sha256" in capsys.readouterr().err
    line = f"--output {tmp_path}/s --steps 8 --weights best {MACHINE}"
    assert call(f"generate --checkpoint {folder} {line}") == 1
    assert "has no best.safetensors" in capsys.readouterr().err
