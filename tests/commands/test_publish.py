"""Published checkpoints in and out: key layouts as REFERENCE describes them, real Lightning files of tiny networks, transformers without halfstep."""

import collections
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import ROUND, call, done

import halfstep
from halfstep.commands import publish
from halfstep.config import SIZES
from halfstep.models import hub
from halfstep.models.dit import DiT
from halfstep.records import journal, provenance

PARITY = Path(__file__).parents[1] / "parity"
KEYS = json.loads((PARITY / "state_dict_keys.json").read_text())


def networks(vocabulary: int) -> tuple[dict, dict]:
    """Two sets of random weights of size tiny, under our names: raw and average."""
    sets = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        network = DiT(vocabulary, SIZES["tiny"][1], SIZES["tiny"][0], SIZES["tiny"][2])
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        sets.append({key: value.clone() for key, value in network.state_dict().items()})
    return tuple(sets)


def lightning(path: Path, raw: dict, ema: dict, prefix: str) -> Path:
    shadow = [ema[key] for key in raw if key != "rotary_emb.inv_freq"]
    content = {
        "epoch": 1,
        "global_step": 3,
        "state_dict": collections.OrderedDict((prefix + k, v) for k, v in raw.items()),
    }
    torch.save(
        content
        | {
            "ema": {"decay": 0.99, "num_updates": 3, "shadow_params": shadow},
            "optimizer_states": [{"lr": 1.0}],
        },
        path,
    )
    return path


def folder(
    path: Path, raw: dict, prefix: str, config: dict, file: str = "model.safetensors"
) -> Path:
    path.mkdir(parents=True)
    state = {prefix + key: value for key, value in raw.items()}
    save_file(state, path / file) if file.endswith("safetensors") else torch.save(
        state, path / file
    )
    (path / "config.json").write_text(json.dumps(config))
    return path


MDLM = {
    "model_type": "mdlm",
    "hidden_dim": 128,
    "n_blocks": 3,
    "n_heads": 8,
    "cond_dim": 128,
    "model_length": 24,
    "time_conditioning": False,
}
SDTT = {"model": {"length": 24, "hidden_size": 128}, "noise": {"type": "loglinear"}}
LAYOUTS = {  # how each is published: -> (source, has an average)
    "MDLM's .ckpt": lambda p, raw, ema: (lightning(p / "best.ckpt", raw, ema, "backbone."), True),
    "SDTT's .ckpt from the hub's model, compiled": lambda p, raw, ema: (
        lightning(p / "x.ckpt", raw, ema, "_orig_mod.backbone.backbone."),
        True,
    ),
    "compiled inside": lambda p, raw, ema: (
        lightning(p / "y.ckpt", raw, ema, "backbone._orig_mod."),
        True,
    ),
    "mdlm-owt": lambda p, raw, ema: (folder(p / "hf", raw, "backbone.", MDLM), False),
    "mdlm-owt, pickled": lambda p, raw, ema: (
        folder(p / "hf", raw, "backbone.", MDLM, "pytorch_model.bin"),
        False,
    ),
    "sdtt": lambda p, raw, ema: (folder(p / "hf", raw, "backbone.backbone.", SDTT), False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_both_sets(layout, pipeline, tmp_path):
    """Raw and average land where they belong, bit for bit; --weights raw drops the average."""
    raw, ema = networks(300)
    source, both = LAYOUTS[layout](tmp_path, raw, ema)
    for weights in ("ema", "raw"):
        output = tmp_path / weights / "teacher"
        done(
            f"import --source {source} --corpus {pipeline.corpus} --output {output} --weights {weights} --size tiny"
        )
        expected = {"model": raw, "ema": ema if both and weights == "ema" else raw}
        for name, state in expected.items():
            found = load_file(output / f"{name}.safetensors")
            assert found.keys() == state.keys() and all(
                torch.equal(found[k], state[k]) for k in state
            )
        model = halfstep.load(output)
        assert (
            model.length,
            model.vocab_size,
            model.meta["round"],
            model.meta["network"]["size"],
        ) == (24, 300, 0, "tiny")
        assert (
            model.meta["imported"]["weights"]
            == {
                True: {"ema": "raw and ema", "raw": "raw"},
                False: {"ema": "the one set it has", "raw": "raw"},
            }[both][weights]
        )
        assert provenance.verify_records(output.parent)[0] == []
        run, points = journal.read_journal(output)
        assert (
            run["tags"]["imported"] == str(source) and run["status"] == "finished" and points == []
        )


def test_an_import_teaches_the_first_round(pipeline, tmp_path):
    source = lightning(tmp_path / "t.ckpt", *networks(300), "backbone.")
    teacher, student = (
        tmp_path / "models/stories-tiny/teacher",
        tmp_path / "models/stories-tiny/kl_backward/round-1",
    )
    done(f"import --source {source} --corpus {pipeline.corpus} --output {teacher}")
    done(f"distill-round --teacher {teacher} --corpus {pipeline.corpus} --output {student} {ROUND}")
    assert halfstep.load(student).meta["teacher_sha256"] == halfstep.load(teacher).meta["sha256"]
    assert len(halfstep.generate(halfstep.load(student), steps=4)) == 1


@pytest.mark.parametrize("name", ["mdlm_lightning.ckpt", "sdtt_lightning_plain.ckpt"])
def test_real_lightning_files(name):
    """Written by the released code's trainers: every tensor is found, and the average is the parameters' in order, near to them after three steps."""
    found = hub.read_published(PARITY / name)
    network = DiT(32, 32, 1, 2, cond_width=8)
    assert hub.shape_of(found.raw, found.file) == (32, 1, 32, 2)
    assert (
        found.raw.keys() == network.state_dict().keys()
        and found.ema.keys() == dict(network.named_parameters()).keys()
    )
    for key, value in network.state_dict().items():
        assert found.raw[key].shape == value.shape
    moved = {key: (found.ema[key] - found.raw[key]).abs().max().item() for key in found.ema}
    assert 0 < max(moved.values()) < 0.05
    assert found.config.get("noise", {}).get("type") == (
        "loglinear" if name.startswith("mdlm") else None
    )  # its pickled configuration, read inertly
    assert "omegaconf" not in sys.modules


class Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_no_code_of_a_pickle_runs(tmp_path):
    witness = tmp_path / "ran"
    raw, _ = networks(20)
    torch.save(
        {"state_dict": raw, "hyper_parameters": {"config": Evil(witness)}}, tmp_path / "evil.ckpt"
    )
    assert (
        hub.read_published(tmp_path / "evil.ckpt").raw.keys() == raw.keys() and not witness.exists()
    )
    pickle.loads(pickle.dumps(Evil(witness)))
    assert witness.exists()  # the test can tell


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_published_sizes_are_known_by_their_shapes(size):
    """Names and shapes of the released networks, on the meta device, under the hub's prefix."""
    theirs = dict(KEYS[f"dit-{size}"]["state_dict"])
    first = {k: v for k, v in theirs.items() if k.startswith("blocks.0.")}
    for i in range(1, KEYS[f"dit-{size}"]["config"]["n_blocks"]):
        theirs |= {k.replace("blocks.0.", f"blocks.{i}."): v for k, v in first.items()}
    raw = {hub.strip_prefixes(f"backbone.{k}"): torch.empty(v, device="meta") for k, v in theirs.items()}
    assert hub.shape_of(raw, Path("x")) == (50257, *SIZES[size])
    with torch.device("meta"):
        own = DiT(50257, SIZES[size][1], SIZES[size][0], SIZES[size][2]).state_dict()
    assert {k: v.shape for k, v in raw.items()} == {k: v.shape for k, v in own.items()}
    assert (
        sum(v.numel() for k, v in raw.items() if k != "rotary_emb.inv_freq")
        == KEYS[f"dit-{size}"]["n_params"]
    )


@pytest.mark.parametrize(("revision", "expected"), [
    ("baselines_kld_step_70000", {"round": 7, "student_steps": 8, "dt": 64 / 1024, "run": {"divergence": "kl_backward"}}),
    ("baselines_tvd_step_10000", {"round": 1, "student_steps": 512, "dt": 1 / 1024, "run": {"divergence": "l1_log_p"}}),
    ("scaling_400k_md_step_20000", {"round": 2, "student_steps": 256, "dt": 2 / 1024, "run": {"divergence": "kl_backward"}}),
    ("teacher_400k_sm_step_400000", {"round": 0}), ("teacher_1M_sm", {"round": 0}), ("", {"round": 0}),
])  # fmt: skip
def test_revisions_tell_their_round(revision, expected):
    assert publish.lineage(revision) == expected


def broken(tmp_path, change):
    raw, ema = networks(300)
    return lightning(tmp_path / "b.ckpt", change(dict(raw)) or raw, ema, "backbone.")


def cut(tmp_path):
    path = lightning(tmp_path / "c.ckpt", *networks(300), "backbone.")
    path.write_bytes(path.read_bytes()[:5000])
    return path


FAULTS = {
    "a key is missing": (lambda p: broken(p, lambda s: {k: v for k, v in s.items() if k != "blocks.1.norm1.weight"}), "1 missing tensors, the first is blocks.1.norm1.weight|average has"),
    "a key too many": (lambda p: folder(p / "f", networks(300)[0] | {"extra": torch.zeros(1)}, "backbone.", MDLM), "1 unknown tensors, the first is extra"),
    "a shape": (lambda p: folder(p / "f", networks(300)[0] | {"output_layer.linear.bias": torch.zeros(4)}, "", MDLM), r"output_layer.linear.bias has shape \[4\]"),
    "NaN": (lambda p: folder(p / "f", networks(300)[0] | {"blocks.0.norm1.weight": torch.full((128,), float("nan"))}, "", MDLM), "holds NaN"),
    "another vocabulary": (lambda p: folder(p / "f", networks(77)[0], "", MDLM), "its vocabulary is 77 tokens and the mask, the tokenizer has 300"),
    "no denoiser": (lambda p: folder(p / "f", {"vocab_embed.embedding": torch.zeros(5, 4), "x": torch.zeros(1)}, "", {}), "an autoregressive network"),
    "cut short": (cut, "cannot be read"),
    "nothing there": (lambda p: p / "none.ckpt", "no such file or folder"),
    "an empty folder": (lambda p: p, "holds none of model.safetensors"),
    "another size": (lambda p: folder(p / "f", networks(300)[0], "", MDLM), "found size tiny, expected small"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_sentence(fault, pipeline, tmp_path, capsys):
    make, message = FAULTS[fault]
    size = "small" if fault == "another size" else "tiny"
    assert (
        call(
            f"import --source {make(tmp_path)} --corpus {pipeline.corpus} --output {tmp_path / 'out'} --size {size}"
        )
        == 1
    )
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("halfstep import: ")
    assert re.search(message, said[0]), said[0]
    assert not (tmp_path / "out" / "meta.json").exists()


def test_hub_names_and_no_network(pipeline, tmp_path, monkeypatch, capsys):
    there, asked = folder(tmp_path / "cache", networks(300)[0], "backbone.backbone.", SDTT), []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **how: asked.append((name, how["revision"])) or str(there),
    )
    output = tmp_path / "round-2"
    done(
        f"import --source jdeschena/sdtt@baselines_mse_step_20000 --corpus {pipeline.corpus} --output {output}"
    )
    assert asked == [("jdeschena/sdtt", "baselines_mse_step_20000")]
    meta = halfstep.load(output).meta
    assert (
        meta["round"] == 2
        and meta["run"]["divergence"] == "mse"
        and meta["imported"]["revision"] == "baselines_mse_step_20000"
    )
    third = ROUND.replace(
        "--round 1 --rounds 2 --teacher-steps 16", "--round 3 --rounds 3 --teacher-steps 16"
    )
    assert (
        call(
            f"distill-round --teacher {output} --corpus {pipeline.corpus} --output {tmp_path / 'm/r/round-3'} {third}"
        )
        == 1
    )
    assert "set reset_optimizer: true" in capsys.readouterr().err
    done(
        f"distill-round --teacher {output} --corpus {pipeline.corpus} --output {tmp_path / 'm/r/round-3'} {third} --reset-optimizer"
    )

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert (
        call(
            f"import --source kuleshov-group/mdlm-owt --corpus {pipeline.corpus} --output {tmp_path / 'no'}"
        )
        == 1
    )
    said = capsys.readouterr().err
    assert (
        "kuleshov-group/mdlm-owt: the hub did not give it" in said
        and "download it elsewhere and name the folder" in said
    )


ALONE = """
import sys; sys.modules["halfstep"] = None
import numpy, torch; from transformers import AutoModelForMaskedLM, AutoTokenizer
folder, ids, out = sys.argv[1:]
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
x = torch.from_numpy(numpy.load(ids))
labels = x.clone(); labels[:, ::2] = 3
found = model(x, labels=labels)
written = model.sample(num_samples=3, steps=4, generator=torch.Generator().manual_seed(0))
given = torch.full((2, 24), model.config.mask_token_id); given[:, :3] = 5
kept = model.sample(num_samples=2, steps=2, input_ids=given)
numpy.savez(out, log_p=found.logits.detach().numpy(), loss=found.loss.item(), written=written.numpy(), kept=kept.numpy(), text=tokenizer.decode([4, 5]))
"""


def test_a_round_trip_keeps_every_bit_and_needs_no_halfstep(pipeline, tmp_path):
    """import -> export -> import; between them transformers alone gives our log-probabilities, within 1e-5."""
    first, second, exported = tmp_path / "a/teacher", tmp_path / "b/teacher", tmp_path / "exported"
    source = lightning(tmp_path / "t.ckpt", *networks(300), "backbone.")
    done(f"import --source {source} --corpus {pipeline.corpus} --output {first}")
    done(f"export --checkpoint {first} --output {exported}")
    done(f"import --source {exported} --output {second}")
    before, after = (load_file(place / "ema.safetensors") for place in (first, second))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert halfstep.load(first).tokenizer.to_str() == halfstep.load(second).tokenizer.to_str()

    model = halfstep.load(first, "cpu")
    x = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    x[:, ::2] = model.mask_id
    np.save(tmp_path / "ids.npy", x.numpy())
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "",
    }
    run = subprocess.run(
        [sys.executable, "-c", ALONE, str(exported), str(tmp_path / "ids.npy"), str(tmp_path / "out.npz")],
        capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=180,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    theirs, masked = np.load(tmp_path / "out.npz"), x == model.mask_id
    log_p = model.denoiser.log_p(model.denoiser.features(x, torch.full((2,), 0.5))[masked])
    found = torch.from_numpy(theirs["log_p"])
    assert (
        torch.allclose(found[masked][:, :300], log_p, atol=1e-5)
        and found[..., 300].isneginf()[masked].all()
    )
    assert (found[~masked].argmax(-1) == x[~masked]).all()
    assert theirs["loss"] == pytest.approx(
        -log_p[:, 3].mean().item() / 2, rel=1e-4
    )  # visible tokens, half of all, cost nothing
    assert (
        theirs["written"].shape == (3, 24)
        and theirs["written"].max() < 300
        and (theirs["kept"][:, :3] == 5).all()
    )
    assert str(theirs["text"]) == model.tokenizer.decode([4, 5])


def test_the_card_names_every_number(pipeline, tmp_path, capsys):
    """Rows of this model only, each with protocol, version and interval."""
    output = tmp_path / "card"
    done(
        f"export --checkpoint {pipeline.teacher} --output {output} --metrics {pipeline.metrics}/teacher/samples.json {pipeline.metrics}/data.json"
    )
    card = (output / "README.md").read_text()
    rows = json.loads((pipeline.metrics / "teacher/samples.json").read_text())
    lines = [
        line
        for line in card.splitlines()
        if line.startswith(
            ("| generative", "| entropy", "| distinct", "| accepted", "| consistent")
        )
    ]
    assert len(lines) == len(rows)
    for row in rows:
        assert any(
            all(
                f"| {part} |" in line
                for part in (
                    row["metric"],
                    row["protocol"],
                    f"{row['value']:.4g}",
                    f"{row['high']:.4g}",
                )
            )
            for line in lines
        )
    assert "stories" in card and "model.sample" in card
    raw = tmp_path / "raw"
    done(
        f"export --checkpoint {pipeline.teacher} --output {raw} --weights raw --metrics {pipeline.metrics}/teacher/samples.json"
    )
    assert (
        "Nothing was measured of these weights" in (raw / "README.md").read_text()
    )  # the rows are those of the average
    assert "are not on the card" in capsys.readouterr().err and {
        "model.safetensors",
        "tokenizer.json",
        "meta.json",
    } <= {Path(path).name for path in json.loads((raw / "provenance.json").read_text())["inputs"]}
    done(f"export --checkpoint {pipeline.student} --output {tmp_path / 'student'}")
    card = (tmp_path / "student" / "README.md").read_text()
    assert (
        "meant for **8 sampling steps**" in card
        and "Nothing was measured" in card
        and "kl_backward" in card
    )


def test_one_revision_per_round(pipeline, tmp_path, monkeypatch, capsys):
    calls = []

    class Api:
        def create_repo(self, name, **how):
            calls.append(("repo", name))

        def create_branch(self, name, branch, **how):
            calls.append(("branch", branch))

        def upload_folder(self, repo_id, folder_path, revision, **how):
            assert (Path(folder_path) / "modeling_halfstep.py").is_file()
            calls.append(("upload", revision))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    done(f"export --checkpoint {pipeline.student} --output {tmp_path / 's'} --push me/mine")
    done(f"export --checkpoint {pipeline.teacher} --output {tmp_path / 't'} --push me/mine")
    assert calls == [
        ("repo", "me/mine"),
        ("branch", "kl_backward-round-1"),
        ("upload", "kl_backward-round-1"),
        ("repo", "me/mine"),
        ("upload", "main"),
    ]

    def refuse(self, *_, **__):
        raise OSError("401 unauthorised")

    monkeypatch.setattr(Api, "create_repo", refuse)
    assert (
        call(f"export --checkpoint {pipeline.teacher} --output {tmp_path / 'u'} --push me/mine")
        == 1
    )
    assert (
        "--push me/mine: the hub did not take it (OSError: 401 unauthorised)"
        in capsys.readouterr().err
    )
    assert call(f"export --checkpoint {pipeline.baseline} --output {tmp_path / 'v'}") == 1


def test_an_imported_teacher_breaks_no_figure(pipeline, tmp_path):
    """Its journal has no points: loss_curves shows the others."""
    from halfstep.report.curves import read_curves

    source = lightning(tmp_path / "t.ckpt", *networks(300), "backbone.")
    done(
        f"import --source {source} --corpus {pipeline.corpus} --output {tmp_path / 'models/x-tiny/teacher'}"
    )
    assert set(
        read_curves(
            [tmp_path / "models/x-tiny/teacher/journal.jsonl", pipeline.baseline / "journal.jsonl"]
        )["series"]
    ) == {"baseline"}
