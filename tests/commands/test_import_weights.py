"""Import of published weights.

The key layouts are those of the published files, the Lightning files are real ones of tiny
networks, and transformers loads an export without halfstep.
"""

import json
import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import archives
import huggingface_hub
import numpy as np
import pytest
import torch
from hub_files import MDLM, SDTT, folder, lightning, networks
from known import words_tokenizer
from safetensors.torch import load_file, save_file
from small import MACHINE, ROUND, call, done

import halfstep
from halfstep.commands import import_weights
from halfstep.config import SIZES, PublishedStudent
from halfstep.errors import HalfstepError
from halfstep.models import hub
from halfstep.models.dit import DiT
from halfstep.records import provenance
from halfstep.records.journal import read_journal

PARITY = Path(__file__).parents[1] / "parity"
KEYS = json.loads((PARITY / "state_dict_keys.json").read_text())


def write_ckpt(prefix: str):
    return lambda path, raw, ema: lightning(path / "x.ckpt", raw, ema, prefix)


def write_folder(prefix: str, config: dict, file: str = "model.safetensors"):
    return lambda path, raw, ema: folder(path / "hf", raw, prefix, config, file)


def write_wrapped(path: Path, raw: dict, ema: dict) -> Path:
    """The names that FSDP, activation checkpointing and torch.compile leave in a state_dict."""
    inner = "_fsdp_wrapped_module._checkpoint_wrapped_module."
    wrapped = [re.sub(r"^(blocks\.\d+\.)", rf"\1{inner}", key) for key in raw]
    state = {f"_fsdp_wrapped_module.model.{n}": raw[k] for n, k in zip(wrapped, raw, strict=True)}
    torch.save(state, path / "x.pt")
    return path / "x.pt"


def write_nested(nest):
    """A function that saves what `nest` makes of the raw weights and their average."""

    def write(path: Path, raw: dict, ema: dict) -> Path:
        parameters = {key: value for key, value in ema.items() if key != "rotary_emb.inv_freq"}
        torch.save(nest(raw, parameters), path / "x.pt")
        return path / "x.pt"

    return write


def under(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


def write_shards(kind: str):
    """A function that writes a folder with the weights in three files and an index."""

    def write(path: Path, raw: dict, ema: dict) -> Path:
        source = folder(path / "hf", {"x": torch.zeros(1)}, "", MDLM, f"model.{kind}")
        (source / f"model.{kind}").unlink()
        name = {"safetensors": "model", "bin": "pytorch_model"}[kind]
        save = {"safetensors": save_file, "bin": torch.save}[kind]
        places = {key: f"{name}-{1 + i % 3}.{kind}" for i, key in enumerate(raw)}
        for file in set(places.values()):
            save({key: raw[key] for key in raw if places[key] == file}, source / file)
        index = {"metadata": {}, "weight_map": places}
        (source / f"{name}.{kind}.index.json").write_text(json.dumps(index))
        return source

    return write


LAYOUTS = {  # name: (function that writes the source, has it an average?)
    "MDLM's .ckpt": (write_ckpt("backbone."), True),
    "SDTT's .ckpt from the hub's model, compiled": (
        write_ckpt("_orig_mod.backbone.backbone."),
        True,
    ),
    "compiled inside": (write_ckpt("backbone._orig_mod."), True),
    "mdlm-owt": (write_folder("backbone.", MDLM), False),
    "mdlm-owt, pickled": (write_folder("backbone.", MDLM, "pytorch_model.bin"), False),
    "sdtt": (write_folder("backbone.backbone.", SDTT), False),
    "DistributedDataParallel": (write_ckpt("module."), True),
    "several modules": (write_ckpt("module.model._orig_mod.backbone."), True),
    "FSDP and activation checkpointing": (write_wrapped, False),
    "model and ema": (write_nested(lambda raw, ema: {"ema": ema, "model": raw}), True),
    "model_state_dict": (write_nested(lambda raw, _: {"model_state_dict": raw, "step": 3}), False),
    "ema alone": (write_nested(lambda raw, _: {"ema": {"state_dict": raw}}), False),
    "an unknown key": (write_nested(lambda raw, _: {"a": {"b": under("module.", raw)}}), False),
    "AveragedModel": (
        write_nested(
            lambda raw, ema: {
                "state_dict": raw,
                "model_ema": {"n_averaged": torch.tensor(3), **under("module.", ema)},
            }
        ),
        True,
    ),
    "shards": (write_shards("safetensors"), False),
    "pickled shards": (write_shards("bin"), False),
}
KEPT = {  # (has an average, --weights): what meta.json says
    (True, "ema"): "raw and ema",
    (True, "raw"): "raw",
    (False, "ema"): "the one set it has",
    (False, "raw"): "raw",
}


@pytest.mark.parametrize("weights", ["ema", "raw"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_both_sets_of_weights(layout, weights, pipeline, tmp_path):
    """Raw and average are stored bit for bit where they belong; --weights raw drops the average."""
    raw, ema = networks(300)
    write, has_average = LAYOUTS[layout]
    source = write(tmp_path, raw, ema)
    output = tmp_path / weights / "teacher"
    done(
        f"import --source {source} --corpus {pipeline.corpus} --output {output} "
        f"--weights {weights} --size tiny"
    )
    expected = {"model": raw, "ema": ema if has_average and weights == "ema" else raw}
    for name, state in expected.items():
        stored = load_file(output / f"{name}.safetensors")
        assert stored.keys() == state.keys()
        assert all(torch.equal(stored[key], state[key]) for key in state)
    model = halfstep.load(output)
    assert model.length == 24
    assert model.vocab_size == 300
    assert model.meta["round"] == 0
    assert model.meta["network"]["size"] == "tiny"
    assert model.meta["imported"]["weights"] == KEPT[has_average, weights]
    assert provenance.Verification(output.parent).faults() == []
    run, points = read_journal(output)
    assert run["tags"]["imported"] == str(source)
    assert run["status"] == "finished"
    assert points == []


def test_the_checkpoint_records_every_shard(pipeline, tmp_path):
    source, output = write_shards("safetensors")(tmp_path, *networks(300)), tmp_path / "teacher"
    done(f"import --source {source} --corpus {pipeline.corpus} --output {output}")
    record = json.loads((output / provenance.NAME).read_text())
    read = {Path(name).name for name in record["inputs"]}
    shards = {f"model-{i}.safetensors" for i in (1, 2, 3)}
    assert read >= shards | {"model.safetensors.index.json"}


def test_an_average_alone_gets_its_buffer_from_the_configuration(pipeline, tmp_path):
    """A file of parameters lacks the frequencies, which only the number of heads determines."""
    raw, _ = networks(300)
    parameters = {key: value for key, value in raw.items() if key != "rotary_emb.inv_freq"}
    source, output = tmp_path / "x.pt", tmp_path / "teacher"
    torch.save({"ema": parameters}, source)
    line = f"import --source {source} --corpus {pipeline.corpus} --output {output}"
    assert call(line) == 1
    content = {"ema": parameters, "hyper_parameters": {"config": {"model": {"n_heads": 8}}}}
    torch.save(content, source)
    done(line)
    stored = load_file(output / "ema.safetensors")
    assert all(torch.equal(stored[key], raw[key]) for key in raw)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_every_precision_become_float32(dtype, pipeline, tmp_path):
    raw = {key: value.to(dtype) for key, value in networks(300)[0].items()}
    source, output = folder(tmp_path / "hf", raw, "", MDLM), tmp_path / "teacher"
    done(f"import --source {source} --corpus {pipeline.corpus} --output {output}")
    stored = load_file(output / "model.safetensors")
    assert all(torch.equal(stored[key], raw[key].float()) for key in raw)


@pytest.mark.parametrize("shape", [(2, 48, 3, 128), (1, 32, 1, 8), (4, 128, 8, 128)])
def test_any_network_size_is_read_from_the_shapes(shape, pipeline, tmp_path, capsys):
    """It computes what the same weights compute in a DiT that is built by hand."""
    blocks, width, heads, cond_width = shape
    network = DiT(300, width, blocks, heads, cond_width=cond_width).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    source = folder(tmp_path / "hf", network.state_dict(), "backbone.", MDLM)
    output = tmp_path / "teacher"
    line = f"import --source {source} --corpus {pipeline.corpus} --output {output}"
    assert call(f"{line} --size small") == 1
    name = "x".join(map(str, shape)).removesuffix("x128")
    assert f"set network.size: {name}" in capsys.readouterr().err
    done(f"{line} --size {name}")
    model = halfstep.load(output)
    assert model.meta["network"]["size"] == name
    x = torch.randint(0, 301, (2, 24))
    with torch.no_grad():
        assert torch.equal(model.network(x), network(x))
    exported, again = tmp_path / "exported", tmp_path / "again"
    done(f"export --checkpoint {output} --output {exported}")
    done(f"import --source {exported} --output {again} --size {name}")


def test_a_real_lightning_file_is_imported(tmp_path):
    """MDLM's own file, of 32 tokens and a mask: its network has no named size."""
    (tmp_path / "words").mkdir()
    tokenizer = words_tokenizer(" ".join(f"w{i}" for i in range(31)))
    tokenizer.save(str(tmp_path / "words/tokenizer.json"))
    source, output = PARITY / "mdlm_lightning.ckpt", tmp_path / "teacher"
    done(f"import --source {source} --tokenizer {tmp_path}/words --output {output}")
    model = halfstep.load(output)
    assert model.meta["network"]["size"] == "1x32x2x8"
    stored, published = load_file(output / "ema.safetensors"), hub.read_published(source)
    assert all(torch.equal(stored[key], value) for key, value in published.ema.items())


@pytest.mark.parametrize("rows", [304, 320, 512, 1024])
def test_the_rows_of_a_padded_vocabulary_are_cut(rows, pipeline, tmp_path, capsys):
    """What is imported is what was there before the padding, and the command says so."""
    raw, ema = networks(300)
    padded = [dict(raw), dict(ema)]
    for state in padded:
        for key in hub.ROWS:
            more = torch.randn(rows - 301, *state[key].shape[1:])
            state[key] = torch.cat([state[key], more])
    source, output = lightning(tmp_path / "x.ckpt", *padded), tmp_path / "teacher"
    done(f"import --source {source} --corpus {pipeline.corpus} --output {output}")
    message = f"of {rows} rows, those of the 300 tokens and the mask are kept"
    assert message in capsys.readouterr().err
    for name, state in (("model", raw), ("ema", ema)):
        stored = load_file(output / f"{name}.safetensors")
        assert all(torch.equal(stored[key], state[key]) for key in state)
    assert halfstep.load(output).vocab_size == 300


def test_an_import_can_teach_the_first_round(pipeline, tmp_path):
    source = lightning(tmp_path / "t.ckpt", *networks(300))
    models = tmp_path / "models/stories-tiny"
    teacher, student = models / "teacher", models / "kl_backward/round-1"
    done(f"import --source {source} --corpus {pipeline.corpus} --output {teacher}")
    done(f"distill-round --teacher {teacher} --corpus {pipeline.corpus} --output {student} {ROUND}")
    assert halfstep.load(student).meta["teacher_sha256"] == halfstep.load(teacher).meta["sha256"]
    assert len(halfstep.generate(halfstep.load(student), steps=4)) == 1


@pytest.mark.parametrize("name", ["mdlm_lightning.ckpt", "sdtt_lightning_plain.ckpt"])
def test_real_lightning_files(name):
    """Files of the released trainers: every tensor is found, and the average is in the right order.

    After three steps the average is close to the parameters.
    """
    published = hub.read_published(PARITY / name)
    network = DiT(32, 32, 1, 2, cond_width=8)
    assert hub.shape_of(published.raw, published.file) == (32, 1, 32, 2)
    assert published.raw.keys() == network.state_dict().keys()
    assert published.ema.keys() == dict(network.named_parameters()).keys()
    for key, value in network.state_dict().items():
        assert published.raw[key].shape == value.shape
    moved = [(ema - published.raw[key]).abs().max().item() for key, ema in published.ema.items()]
    assert 0 < max(moved) < 0.05
    # The configuration of MDLM's file is a pickled OmegaConf, which is read without omegaconf.
    noise = "loglinear" if name.startswith("mdlm") else None
    assert published.config.get("noise", {}).get("type") == noise
    assert "omegaconf" not in sys.modules


class Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_no_code_of_a_pickle_runs(tmp_path):
    witness = tmp_path / "ran"
    raw, _ = networks(20)
    content = {"state_dict": raw, "hyper_parameters": {"config": Evil(witness)}}
    torch.save(content, tmp_path / "evil.ckpt")
    with pytest.raises(HalfstepError, match="names 'posix.system'"):
        hub.read_published(tmp_path / "evil.ckpt")
    assert not witness.exists()
    pickle.loads(pickle.dumps(Evil(witness)))
    assert witness.exists()  # so the test can detect code that runs


WAYS = {  # of weights into `import`: a function that writes them, and gives --source
    "a file": lambda path, write: write(path / "x.ckpt"),
    "a folder as on the hub": lambda path, write: write(path / "hf/pytorch_model.bin").parent,
    "a name on the hub": lambda path, write: write(path / "hub/pytorch_model.bin") and "a/b",
}


@pytest.mark.parametrize("way", WAYS)
def test_no_torchscript_overwrites_a_file(way, pipeline, tmp_path, monkeypatch, capsys):
    """A module that is loaded may write to any file; `from:` of a teacher gives the same flags."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"untouched")

    def write(path: Path) -> Path:
        archives.write_torchscript(path, victim)
        return path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: tmp_path / "hub")
    source = WAYS[way](tmp_path, write)
    line = f"import --source {source} --corpus {pipeline.corpus} --output {tmp_path / 'out'}"
    assert call(f"{line} --weights ema --size tiny") == 1
    assert "is a TorchScript archive" in capsys.readouterr().err
    assert victim.read_bytes() == b"untouched"
    (file,) = [*tmp_path.rglob("x.ckpt"), *tmp_path.rglob("pytorch_model.bin")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.load(file)
    assert victim.read_bytes() == b"XXXXuched"  # so the test can detect a write


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_published_sizes_are_known_by_their_shapes(size):
    """Names and shapes of the released networks, on the meta device, under the hub's prefix."""
    released = KEYS[f"dit-{size}"]
    shapes = dict(released["state_dict"])
    first = {key: shape for key, shape in shapes.items() if key.startswith("blocks.0.")}
    for i in range(1, released["config"]["n_blocks"]):
        shapes |= {key.replace("blocks.0.", f"blocks.{i}."): shape for key, shape in first.items()}
    raw = {
        hub.strip_prefixes(f"backbone.{key}"): torch.empty(shape, device="meta")
        for key, shape in shapes.items()
    }
    assert hub.shape_of(raw, Path("x")) == (50257, *SIZES[size])
    blocks, width, heads = SIZES[size]
    with torch.device("meta"):
        ours = DiT(50257, width, blocks, heads).state_dict()
    assert {k: v.shape for k, v in raw.items()} == {k: v.shape for k, v in ours.items()}
    parameters = [value for key, value in raw.items() if key != "rotary_emb.inv_freq"]
    assert sum(value.numel() for value in parameters) == released["n_params"]


def lineage(round: int, student_steps: int, dt: float, divergence: str, teacher_steps=1024) -> dict:
    run = {"divergence": divergence, "teacher_steps": teacher_steps, "substeps": 2}
    return {"round": round, "student_steps": student_steps, "dt": dt, "run": run}


@pytest.mark.parametrize(
    ("revision", "expected"),
    [
        ("baselines_kld_step_70000", lineage(7, 8, 64 / 1024, "kl_backward")),
        ("baselines_tvd_step_10000", lineage(1, 512, 1 / 1024, "l1_log_p")),
        ("scaling_400k_md_step_20000", lineage(2, 256, 2 / 1024, "kl_backward")),
        ("teacher_400k_sm_step_400000", {"round": 0}),
        ("teacher_1M_sm", {"round": 0}),
        ("", {"round": 0}),
    ],
)
def test_the_name_of_a_revision_gives_its_round(revision, expected):
    source = f"jdeschena/sdtt@{revision}"
    assert import_weights.lineage(source, PublishedStudent()) == expected


def test_what_a_student_was_trained_for_can_be_said():
    """Of a name that says nothing; and round 0 is a teacher, whatever the name says."""
    said = PublishedStudent(round=2, divergence="mse", teacher_steps=64)
    assert import_weights.lineage("./mine", said) == lineage(2, 16, 2 / 64, "mse", 64)
    name = "jdeschena/sdtt@baselines_kld_step_70000"
    assert import_weights.lineage(name, PublishedStudent(round=0)) == {"round": 0}


def test_rounds_that_do_not_divide_the_steps_are_a_fault(pipeline, tmp_path, capsys):
    source = lightning(tmp_path / "t.ckpt", *networks(300))
    line = f"import --source {source} --corpus {pipeline.corpus} --output {tmp_path / 'out'}"
    assert call(f"{line} --round 3 --teacher-steps 4") == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "3 rounds of 2 substeps do not divide teacher_steps 4: at most 2" in message


@pytest.mark.parametrize(
    ("source", "flags", "called"),
    [
        (lambda path: lightning(path / "x.ckpt", *networks(300)), "", "ema"),
        (lambda path: lightning(path / "x.ckpt", *networks(300)), "--weights raw", "published raw"),
        (lambda path: folder(path / "f", networks(300)[0], "", MDLM), "", "published"),
    ],
)
def test_rows_call_the_weights_by_what_they_are(source, flags, called, pipeline, tmp_path):
    """A source with one set of weights has no average to choose, and no row says that it has."""
    output = tmp_path / "models/stories-tiny/teacher"
    path = source(tmp_path)
    done(f"import --source {path} --corpus {pipeline.corpus} --output {output} {flags}")
    assert halfstep.load(output).weights == called
    samples = tmp_path / "samples"
    done(f"generate --checkpoint {output} --output {samples} --steps 2 --num-samples 2 {MACHINE}")
    assert json.loads((samples / "samples.json").read_text())["weights"] == called
    done(f"export --checkpoint {output} --output {tmp_path / 'exported'}")
    assert f"| weights | {called}, sha256" in (tmp_path / "exported/README.md").read_text()


def with_state(**changes):
    """A function that writes a folder as on the hub, with some tensors replaced or added."""
    return lambda path: folder(path / "f", networks(300)[0] | changes, "backbone.", MDLM)


def without_a_key(path: Path) -> Path:
    raw, ema = networks(300)
    raw.pop("blocks.1.norm1.weight")
    return lightning(path / "b.ckpt", raw, ema)


def cut_short(path: Path) -> Path:
    file = lightning(path / "c.ckpt", *networks(300))
    file.write_bytes(file.read_bytes()[:5000])
    return file


def not_a_denoiser(path: Path) -> Path:
    state = {"vocab_embed.embedding": torch.zeros(5, 4), "x": torch.zeros(1)}
    return folder(path / "f", state, "", {})


NAN = torch.full((128,), float("nan"))
FAULTS = {  # name: (function that writes the source, message)
    "a key is missing": (
        without_a_key,
        "1 missing tensors, the first is blocks.1.norm1.weight|average has",
    ),
    "a key too many": (with_state(extra=torch.zeros(1)), "1 unknown tensors, the first is extra"),
    "a shape": (
        with_state(**{"output_layer.linear.bias": torch.zeros(4)}),
        r"output_layer.linear.bias has shape \[4\]",
    ),
    "NaN": (with_state(**{"blocks.0.norm1.weight": NAN}), "holds NaN"),
    "another vocabulary": (
        lambda path: folder(path / "f", networks(77)[0], "", MDLM),
        "its vocabulary is 77 tokens and the mask, the tokenizer has 300",
    ),
    "no denoiser": (not_a_denoiser, "an autoregressive network"),
    "cut short": (cut_short, "cannot be read"),
    "nothing there": (lambda path: path / "none.ckpt", "no such file or folder"),
    "an empty folder": (lambda path: path, "holds none of model.safetensors"),
    "another size": (with_state(), "found size tiny, expected small"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_sentence(fault, pipeline, tmp_path, capsys):
    write, expected = FAULTS[fault]
    size = "small" if fault == "another size" else "tiny"
    output = tmp_path / "out"
    source = write(tmp_path)
    code = call(
        f"import --source {source} --corpus {pipeline.corpus} --output {output} --size {size}"
    )
    assert code == 1
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert message.startswith("halfstep import: ")
    assert re.search(expected, message), message
    assert not (output / "meta.json").exists()


@pytest.fixture
def second_round(pipeline, tmp_path, monkeypatch):
    """A student of the second round, imported by a hub's name from a hub without network."""
    cache = folder(tmp_path / "cache", networks(300)[0], "backbone.backbone.", SDTT)
    requests = []

    def download(name, revision, **options):
        requests.append((name, revision))
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    output = tmp_path / "round-2"
    name = "jdeschena/sdtt@baselines_mse_step_20000"
    done(f"import --source {name} --corpus {pipeline.corpus} --output {output}")
    assert requests == [("jdeschena/sdtt", "baselines_mse_step_20000")]
    return output


def test_a_hub_name_gives_round_and_revision(second_round):
    meta = halfstep.load(second_round).meta
    assert meta["round"] == 2
    assert meta["run"]["divergence"] == "mse"
    assert meta["imported"]["revision"] == "baselines_mse_step_20000"
    assert halfstep.load(second_round).weights == "published raw"
    about = read_journal(second_round)[0]
    parent = second_round.parent.name
    assert about["name"] == f"{parent}/round-2" and about["tags"]["round"] == 2


def test_a_round_after_an_import_needs_reset_optimizer(second_round, pipeline, tmp_path, capsys):
    third = ROUND.replace("--round 1 --rounds 2", "--round 3 --rounds 3")
    line = (
        f"distill-round --teacher {second_round} --corpus {pipeline.corpus} "
        f"--output {tmp_path / 'm/r/round-3'} {third}"
    )
    assert call(line) == 1
    assert "set reset_optimizer: true" in capsys.readouterr().err
    done(f"{line} --reset-optimizer")


def test_no_network_is_one_sentence(pipeline, tmp_path, monkeypatch, capsys):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    name = "kuleshov-group/mdlm-owt"
    output = tmp_path / "no"
    assert call(f"import --source {name} --corpus {pipeline.corpus} --output {output}") == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"{name}: the download failed (OSError: no route to host)" in message
    assert "download it elsewhere and name the folder" in message


ALONE = """
import sys; sys.modules["halfstep"] = None
import numpy, torch; from transformers import AutoModelForMaskedLM, AutoTokenizer
folder, ids, out = sys.argv[1:]
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
x = torch.from_numpy(numpy.load(ids))
labels = x.clone(); labels[:, ::2] = 3
output = model(x, labels=labels)
sampled = model.sample(num_samples=3, steps=4, generator=torch.Generator().manual_seed(0))
given = torch.full((2, 24), model.config.mask_token_id); given[:, :3] = 5
kept = model.sample(num_samples=2, steps=2, input_ids=given)
numpy.savez(out, log_p=output.logits.detach().numpy(), loss=output.loss.item(),
            sampled=sampled.numpy(), kept=kept.numpy(), text=tokenizer.decode([4, 5]))
"""


def run_transformers_alone(exported: Path, x: torch.Tensor, folder: Path) -> dict:
    """Load an export in a process that cannot import halfstep, and return what ALONE computes."""
    ids, out = folder / "ids.npy", folder / "out.npz"
    np.save(ids, x.numpy())
    environment = os.environ | {
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "",
    }
    run = subprocess.run(
        [sys.executable, "-c", ALONE, str(exported), str(ids), str(out)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=180,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return np.load(out)


def test_a_round_trip_keeps_every_bit_and_needs_no_halfstep(pipeline, tmp_path):
    """import -> export -> import keeps the bits.

    transformers alone gives our log-probabilities from the export, within 1e-5.
    """
    first, second, exported = tmp_path / "a/teacher", tmp_path / "b/teacher", tmp_path / "exported"
    source = lightning(tmp_path / "t.ckpt", *networks(300))
    done(f"import --source {source} --corpus {pipeline.corpus} --output {first}")
    done(f"export --checkpoint {first} --output {exported}")
    done(f"import --source {exported} --output {second}")
    before, after = (load_file(place / "ema.safetensors") for place in (first, second))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert halfstep.load(first).tokenizer.to_str() == halfstep.load(second).tokenizer.to_str()

    model = halfstep.load(first, "cpu")
    x = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    x[:, ::2] = model.mask_id
    theirs = run_transformers_alone(exported, x, tmp_path)
    masked = x == model.mask_id
    ours = model.denoiser.log_p(model.denoiser.features(x, torch.full((2,), 0.5))[masked])
    log_p = torch.from_numpy(theirs["log_p"])
    assert torch.allclose(log_p[masked][:, :300], ours, atol=1e-5)
    assert log_p[..., 300].isneginf()[masked].all()
    assert (log_p[~masked].argmax(-1) == x[~masked]).all()
    # Half of the tokens are visible, and cost nothing.
    assert theirs["loss"] == pytest.approx(-ours[:, 3].mean().item() / 2, rel=1e-4)
    assert theirs["sampled"].shape == (3, 24)
    assert theirs["sampled"].max() < 300
    assert (theirs["kept"][:, :3] == 5).all()
    assert str(theirs["text"]) == model.tokenizer.decode([4, 5])


def test_an_imported_teacher_breaks_no_figure(pipeline, tmp_path):
    """Its journal has no points: loss_curves shows the others."""
    from halfstep.report.curves import read_curves

    source = lightning(tmp_path / "t.ckpt", *networks(300))
    teacher = tmp_path / "models/x-tiny/teacher"
    done(f"import --source {source} --corpus {pipeline.corpus} --output {teacher}")
    table = read_curves([teacher / "journal.jsonl", pipeline.baseline / "journal.jsonl"])
    assert set(table["series"]) == {"baseline"}
