"""Rounds that train adapters (LoRA), of our own network and of models of transformers."""

import gc
import json
import sys
from pathlib import Path

import pytest
import torch
from published import build_family, masked_tokenizer
from safetensors.torch import load_file
from small import CORPUS, MACHINE, TRAINING, call, done
from torch import Tensor, nn

import halfstep
from halfstep import checkpoint
from halfstep.adapters import adapter_tensors
from halfstep.commands import training_job
from halfstep.commands.adapter_round import AdapterRound, teacher_of_adapters
from halfstep.config import Distillation
from halfstep.training import loop
from halfstep.training.optim import FusedAdamW

V, LENGTH = 300, 24  # of the small corpus
ROUNDS = f"--rounds 2 --teacher-steps 16 --seed 3 {TRAINING} {MACHINE}"
LORA = "--lora-rank 4 --lora-alpha 8 --lr 1e-2"
X = torch.randint(2, V + 1, (3, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "stories"
    done(f"prepare-corpus --output {folder} {CORPUS} --workers 1")
    return folder


@pytest.fixture(scope="module", params=["dit", "bert", "gpt2", "qwen2"])
def teacher(request, corpus, tmp_path_factory):
    """A checkpoint: our own network, or one that transformers builds."""
    kind, root = request.param, tmp_path_factory.mktemp("teacher")
    output = root / "models" / kind / "teacher"
    if kind == "dit":
        done(f"pretrain --corpus {corpus} --size tiny --output {output} {TRAINING} {MACHINE}")
        return output
    build_family(kind, V + 12, LENGTH, root / "hub")
    masked_tokenizer(corpus, 103).save_pretrained(root / "hub")
    said = "--logits same" if kind == "qwen2" else ""
    done(f"import --source hf:{root}/hub --corpus {corpus} --output {output} {said}")
    return output


def distill_once(teacher: Path, corpus: Path, output: Path, options: str = LORA) -> Path:
    """One round; its number is in the name of the folder."""
    number = output.name.removeprefix("round-")
    line = f"distill-round --round {number} --teacher {teacher} --corpus {corpus}"
    done(f"{line} --output {output} {ROUNDS} {options}")
    return output


@pytest.fixture(scope="module")
def first(teacher, corpus, tmp_path_factory):
    """The first round of a teacher."""
    return distill_once(teacher, corpus, tmp_path_factory.mktemp("run") / "kl/round-1")


def adapted(folder: Path, precision="float32", **options):
    """Student and teacher of a round from this checkpoint, as `distill_round` makes them."""
    source = checkpoint.read_meta(folder)
    run = Distillation(lora_rank=4, lora_alpha=8.0, precision=precision, dropout=0.0, **options)
    weights = "ema" if source["round"] == 0 else "raw"
    round = AdapterRound(folder, source, weights, run)
    student = checkpoint.build_denoiser(round.network(1), source)
    return round, student, teacher_of_adapters(student)


def log_p(denoiser):
    with torch.no_grad():
        return denoiser.log_p(denoiser.features(X, torch.full((len(X),), 0.5)))


def move(network, seed=2):
    """Change the adapter of the student as training does, much further."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter_tensors(network).values():
            p += 0.1 * torch.randn(p.shape, generator=generator)


def test_the_student_begins_as_its_teacher(teacher):
    _, student, old = adapted(teacher)
    assert torch.equal(log_p(student), log_p(old))
    plain = halfstep.load(teacher, "cpu").denoiser  # its products may be those of oneDNN
    assert torch.allclose(log_p(student), log_p(plain), atol=1e-6)


def test_only_the_students_adapter_learns_and_the_teacher_stays(teacher):
    _, student, old = adapted(teacher)
    before = log_p(old)
    h = student.features(X, torch.full((len(X),), 0.5))
    student.log_p(h).square().sum().backward()
    learning = {name for name, p in student.network.named_parameters() if p.grad is not None}
    assert learning == adapter_tensors(student.network).keys()
    move(student.network)
    assert not torch.allclose(log_p(student), before, atol=1e-5, rtol=0)
    assert torch.equal(log_p(old), before)


def test_merged_weights_compute_what_the_adapters_compute(teacher, tmp_path):
    round, student, _ = adapted(teacher)
    move(student.network)
    own = adapter_tensors(student.network)
    trained = dict.fromkeys(checkpoint.FILES.values(), own) | {checkpoint.OPTIMIZER: {}}
    files = round.files(student.network, trained)
    network = checkpoint.build_network(round.source)
    checkpoint.load_weights(network, files["model.safetensors"](), tmp_path)
    merged = checkpoint.build_denoiser(network.eval(), round.source)
    student.network.eval()
    assert torch.allclose(log_p(merged), log_p(student), atol=1e-5)


def test_a_round_is_a_checkpoint_like_any_other(teacher, first, tmp_path):
    """Its weights have the names of the teacher's; it loads, writes and can be exported."""
    before, after = load_file(teacher / "ema.safetensors"), load_file(first / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(before[name].ndim == 2 for name in changed)
    assert not any("output_layer" in name or "embed" in name for name in changed)
    assert json.loads((first / "meta.json").read_text())["lora"] == {
        "rank": 4,
        "alpha": 8.0,
        "targets": [],
    }
    texts = halfstep.generate(halfstep.load(first, "cpu"), steps=4, prompt="Tom")
    assert texts[0].startswith("Tom")
    done(f"export --checkpoint {first} --output {tmp_path}/exported")


def test_frozen_matrices_are_in_bfloat16_where_a_round_computes_so(teacher, tmp_path):
    """What is trained stays in float32, and a checkpoint gets the exact weights of its teacher."""
    round, student, _ = adapted(teacher, "bfloat16")
    own = adapter_tensors(student.network)
    assert {p.dtype for p in own.values()} == {torch.float32}
    frozen = {name: p for name, p in student.network.named_parameters() if name not in own}
    halved = sum(p.numel() for p in frozen.values() if p.dtype == torch.bfloat16)
    assert halved > 0.25 * sum(p.numel() for p in frozen.values())
    trained = dict.fromkeys(checkpoint.FILES.values(), own) | {checkpoint.OPTIMIZER: {}}
    files = round.files(student.network, trained)
    before, after = load_file(teacher / "ema.safetensors"), files["model.safetensors"]()
    assert all(torch.equal(before[name], after[name]) for name in before)  # adapters begin with 0


def bytes_of_tensors():
    """Of all tensors in this process, each storage once."""
    tensors = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({found.data_ptr(): found.nbytes() for found in storages}.values())


def test_a_round_keeps_less_than_a_third_above_the_weights(teacher, corpus, tmp_path, monkeypatch):
    """Counted after an update: networks, gradients, optimizer state and averages."""
    weights = sum(t.nbytes for t in load_file(teacher / "model.safetensors").values())
    before, most, counted = bytes_of_tensors(), {}, []
    step = FusedAdamW.step

    def count(optimizer):
        step(optimizer)
        counted.append(bytes_of_tensors())

    monkeypatch.setattr(FusedAdamW, "step", count)
    for kind, options in {"whole": "", "lora": "--lora-rank 1"}.items():
        counted.clear()
        distill_once(teacher, corpus, tmp_path / kind / "round-1", options)
        most[kind] = max(counted) - before - weights
    assert most["lora"] < most["whole"] / 3


def test_too_little_memory_is_one_sentence_before_a_round(
    teacher, corpus, tmp_path, capsys, monkeypatch
):
    """Teacher, student and four more of each trained weight do not fit; with adapters all does."""
    weights = sum(t.nbytes for t in load_file(teacher / "model.safetensors").values())
    monkeypatch.setattr(training_job, "memory_of", lambda device: int(5.9 * weights))
    line = f"distill-round --round 1 --teacher {teacher} --corpus {corpus} {ROUNDS}"
    assert call(f"{line} --output {tmp_path}/whole/round-1") == 1
    (said,) = capsys.readouterr().err.splitlines()[-1:]
    assert "needs at least" in said and f"has {5.9 * weights / 1e9:.3g} GB on cpu" in said
    distill_once(teacher, corpus, tmp_path / "lora/round-1")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--lora-targets nothing", "lora_targets"),
        ("--lora-rank 4 --lora-targets nothing", "'nothing', but no linear layer has this name"),
        ("--lora-rank 0", "lora"),
    ],
)
def test_bad_adapters_are_one_sentence(teacher, corpus, tmp_path, capsys, options, sentence):
    line = f"distill-round --round 1 --teacher {teacher} --corpus {corpus} {ROUNDS} {options}"
    assert call(f"{line} --output {tmp_path}/round-1") != 0
    said = capsys.readouterr().err
    assert sentence in said and "Traceback" not in said
    assert not (tmp_path / "round-1/meta.json").exists()


def test_a_missing_peft_is_one_sentence(teacher, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    line = f"distill-round --round 1 --teacher {teacher} --corpus {corpus} {ROUNDS} {LORA}"
    assert call(f"{line} --output {tmp_path}/round-1") == 1
    said = capsys.readouterr().err
    assert "halfstep[lora]" in said and "Traceback" not in said


@pytest.mark.parametrize("options", ["", LORA])
def test_activations_that_are_computed_again_change_nothing(teacher, corpus, tmp_path, options):
    """With --recompute only the activations between blocks are kept for the backward pass."""
    plain = distill_once(teacher, corpus, tmp_path / "plain/round-1", options)
    again = distill_once(teacher, corpus, tmp_path / "again/round-1", f"{options} --recompute")
    one, two = (load_file(folder / "model.safetensors") for folder in (plain, again))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_the_second_round_goes_on(first, corpus, tmp_path, weights):
    """Its teacher is the student of the first, with all that this one had learned."""
    _, student, old = adapted(first, next_teacher=weights)
    stored = halfstep.load(first, "cpu", weights=weights).denoiser
    assert torch.allclose(log_p(old), log_p(stored), atol=1e-5)
    raw = halfstep.load(first, "cpu", weights="raw").denoiser
    student.network.eval()
    assert torch.allclose(log_p(student), log_p(raw), atol=1e-5)
    second = distill_once(first, corpus, tmp_path / "kl/round-2")
    assert checkpoint.read_meta(second)["ema_updates"] == 4
    state = load_file(second / "optimizer.safetensors")
    assert {value.item() for name, value in state.items() if name.startswith("step:")} == {4}


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("number", [1, 2])
def test_an_interrupted_round_has_the_same_bits(
    teacher, first, corpus, tmp_path, monkeypatch, number
):
    source = {1: teacher, 2: first}[number]
    options = f"{LORA} --num-steps 4 --dropout 0.1"
    undisturbed, interrupted = (tmp_path / which / f"round-{number}" for which in "ab")
    distill_once(source, corpus, undisturbed, options)
    real = training_job.batch_indices
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0)

    def failing(*args):
        if args[-1] == 3:
            raise Interrupted
        return real(*args)

    monkeypatch.setattr(training_job, "batch_indices", failing)
    with pytest.raises(Interrupted):
        distill_once(source, corpus, interrupted, options)
    assert (interrupted / "state/state.safetensors").exists()
    monkeypatch.setattr(training_job, "batch_indices", real)
    distill_once(source, corpus, interrupted, options)
    assert checkpoint.read_meta(undisturbed) == checkpoint.read_meta(interrupted)
