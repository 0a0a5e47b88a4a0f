"""The same seed gives the same bits on a CPU: tokens, checkpoints and samples.

This holds for any number of workers, for any micro-batch of sampling, and for a run that was
interrupted anywhere. Across thread counts and on a GPU, results agree within a stated tolerance.
"""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from small import CORPUS, MACHINE, call, done, trainings

import halfstep
from halfstep import checkpoint
from halfstep.commands import training_job
from halfstep.commands.writers import draw_texts, encode_prompt, text_writer
from halfstep.config import GenerateOptions
from halfstep.data import pack
from halfstep.training import loop

STEPS, EVERY = 4, 2
OPTIONS = (
    f"--num-steps {STEPS} --validate-every {EVERY} --batch-size 8 --warmup-steps 2 --dropout 0.1 "
    f"--lr-decay cosine --precision float32 --seed 4 {MACHINE}"
)
# Share of the range of the log-probabilities. float32 sums may be taken in another order.
NETWORK_TOLERANCE = 1e-3
NOT_COMPARED = ("run.json", "journal.jsonl", "provenance.json", "samples.json")  # they hold times


def bits(folder):
    """The bytes of every file in a folder, except files that hold times."""
    files = [path for path in folder.iterdir() if path.is_file()]
    return {path.name: path.read_bytes() for path in files if path.name not in NOT_COMPARED}


def test_tokens_do_not_depend_on_the_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "CHUNK", 2048)  # many chunks, so that three processes all have work
    corpus = CORPUS.replace("--num-documents 40", "--num-documents 400")
    done(f"prepare-corpus --output {tmp_path}/1 {corpus} --workers 1")
    done(f"prepare-corpus --output {tmp_path}/3 {corpus} --workers 3")
    done(f"prepare-corpus --output {tmp_path}/other {corpus} --corpus-seed 2 --workers 1")
    one, three, other = (bits(tmp_path / name) for name in ("1", "3", "other"))
    assert one == three
    assert one.keys() >= {
        "train.bin",
        "validation.bin",
        "tokenizer.json",
        "manifest.json",
        "last_words.jsonl",
    }
    assert other["train.bin"] != one["train.bin"]


@pytest.fixture(scope="module")
def undisturbed(pipeline, tmp_path_factory):
    """The outputs of each kind of training, without an interruption."""
    outputs = {}
    for name, line in trainings(pipeline, OPTIONS).items():
        outputs[name] = tmp_path_factory.mktemp("undisturbed") / "models" / name / "out"
        done(f"{line} --output {outputs[name]}")
    return outputs


class Interrupted(Exception):
    pass


def interrupt(patch, where: str, at: int) -> None:
    """Raise Interrupted from the `at`-th call of one function.

    batch: before the batch is made; validation: after the held-out loss was computed (in a round,
    the entropy of samples would follow); state: after the rolling state was written to a
    temporary file.
    """
    calls = 0

    def failing(real, before=True):
        def call(*args, **more):
            nonlocal calls
            calls += 1
            if calls == at and before:
                raise Interrupted
            out = real(*args, **more)
            if calls == at:
                raise Interrupted
            return out

        return call

    if where == "batch":
        patch.setattr(training_job, "batch_indices", failing(training_job.batch_indices))
    elif where == "validation":
        measured = failing(training_job.HeldOut.mean_loss, before=False)
        patch.setattr(training_job.HeldOut, "mean_loss", measured)
    else:
        patch.setattr(
            safetensors.torch, "save_file", failing(safetensors.torch.save_file, before=False)
        )


THRICE = [("validation", 1), ("state", 1), ("batch", 2)]
# Kind of training: for each trial, the interruptions of its starts until one comes through.
# tests/training/test_loop.py interrupts the loop at every step.
PLACES = {
    "pretrain": [
        *([("batch", at)] for at in range(1, STEPS + 1)),
        [("validation", 1)],
        [("validation", 2)],
        [("state", 2)],
        THRICE,
    ],
    "train-baseline": [[("validation", 2)]],
    "round-1": [[("batch", 4)], [("validation", 1)], THRICE],
    "round-2": [[("batch", 3)], [("validation", 2)], [("state", 1)]],
}


@pytest.mark.parametrize("name", PLACES)
def test_interrupted_anywhere_and_resumed(pipeline, undisturbed, tmp_path, monkeypatch, name):
    """Every file has the bits of the undisturbed run."""
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0)  # a rolling state after every step but the last
    line = trainings(pipeline, OPTIONS)[name]
    expected = bits(undisturbed[name])
    assert {
        "model.safetensors",
        "ema.safetensors",
        "best.safetensors",
        "optimizer.safetensors",
        "meta.json",
    } <= expected.keys()
    for number, interruptions in enumerate(PLACES[name]):
        output = tmp_path / str(number) / name / "out"
        for where, at in interruptions:
            with monkeypatch.context() as patch, pytest.raises(Interrupted):
                interrupt(patch, where, at)
                call(f"{line} --output {output}")
            assert not (output / "meta.json").exists()
            assert not list(output.rglob("*.part"))
        done(f"{line} --output {output}")
        assert bits(output) == expected, interruptions
        assert not (output / "state").exists()


def test_the_seed_decides(pipeline, undisturbed, tmp_path):
    """The same command gives the same bits, and another seed gives others; samples likewise."""
    line = trainings(pipeline, OPTIONS)["pretrain"]
    done(f"{line} --output {tmp_path}/pretrain/out")
    assert bits(tmp_path / "pretrain/out") == bits(undisturbed["pretrain"])
    done(f"{line.replace('--seed 4', '--seed 5')} --output {tmp_path}/other/out")
    one, other = bits(undisturbed["pretrain"]), bits(tmp_path / "other/out")
    weights = [name for name in other if name.endswith(".safetensors")]
    assert all(one[name] != other[name] for name in weights)
    for number, seed in enumerate((1, 1, 2)):
        done(
            f"generate --checkpoint {undisturbed['round-1']} --output {tmp_path}/{number} "
            f"--steps 8 --num-samples 3 --sampling-seed {seed} {MACHINE}"
        )
    assert bits(tmp_path / "0") == bits(tmp_path / "1") != bits(tmp_path / "2")


@pytest.mark.parametrize("sampler", ["ancestral", "analytic", "first_hitting", "autoregressive"])
def test_a_text_does_not_depend_on_its_batch(pipeline, sampler):
    """Text i depends on (seed, i) only: not on the micro-batch, nor on the number of texts."""
    model = halfstep.load(pipeline.baseline if sampler == "autoregressive" else pipeline.student)
    options = {} if sampler == "autoregressive" else {"sampler": sampler}
    how = GenerateOptions(temperature=0.9, top_p=0.95, sampling_seed=7, **options)

    def texts(micro_batch, num_samples=9, prompt=""):
        prompts = encode_prompt(model, prompt).expand(num_samples, -1)
        written = draw_texts(text_writer(model, model.length, 12, how), prompts, micro_batch)
        return written.ids.numpy(), written.network_evaluations.numpy()

    ids, passes = texts(9)
    assert len({tuple(row) for row in ids}) == 9
    for micro_batch in (1, 2, 4):
        other_ids, other_passes = texts(micro_batch)
        assert np.array_equal(ids, other_ids)
        assert np.array_equal(passes, other_passes)
    assert np.array_equal(texts(9, 4)[0], ids[:4])
    assert np.array_equal(texts(9, prompt="Tom was")[0], texts(2, prompt="Tom was")[0])


def test_top_p_and_the_seed_reach_the_baseline(pipeline, tmp_path):
    """A tiny top-p leaves one token, so the seed changes nothing; without it, the seed decides."""
    texts = {}
    for name, options, seed in (
        ("greedy", "--top-p 1e-6", 1),
        ("greedy-7", "--top-p 1e-6 --sampling-seed 7", 7),
        ("free", "", 1),
        ("free-7", "--sampling-seed 7", 7),
    ):
        done(
            f"generate --checkpoint {pipeline.baseline} --output {tmp_path / name} --steps 24 "
            f"--num-samples 3 {options} {MACHINE}"
        )
        texts[name] = np.load(tmp_path / name / "samples.npy")
        assert json.loads((tmp_path / name / "samples.json").read_text())["seed"] == seed
    assert (texts["greedy"] == texts["greedy"][0]).all()
    assert np.array_equal(texts["greedy"], texts["greedy-7"])
    assert not np.array_equal(texts["free"], texts["free-7"])
    assert len(np.unique(texts["free"], axis=0)) == 3


def log_p(folder, device="cpu"):
    """[N, V] log-probabilities of a text with every second token masked."""
    model = halfstep.load(folder, device=device)
    xt = torch.arange(4 * model.length, device=device).view(4, -1) % model.vocab_size
    xt[:, ::2] = model.mask_id
    with torch.no_grad():
        h = model.denoiser.features(xt, torch.full((4,), 0.5, device=device))
        return model.denoiser.log_p(h[xt == model.mask_id]).cpu()


def distance(a, b):
    """The largest difference, as a share of the range."""
    return ((a - b).abs().max() / (a.max() - a.min())).item()


def test_threads(pipeline, undisturbed, tmp_path):
    """Networks trained with 1 and 3 threads agree within the tolerance; training moves them more.

    Threads may change the order of sums. At this size the bits were the same with 1, 2 and 3
    threads; larger matrices, which are divided among threads, do not promise that.
    """
    three_threads = trainings(pipeline, OPTIONS)["pretrain"].replace("--threads 1", "--threads 3")
    try:
        torch.set_num_threads(1)
        done(f"{three_threads} --output {tmp_path}/pretrain/out")
    finally:
        torch.set_num_threads(1)
    one, three = log_p(undisturbed["pretrain"]), log_p(tmp_path / "pretrain/out")
    assert distance(one, three) < NETWORK_TOLERANCE < distance(one, log_p(pipeline.teacher))


needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device here: the effect of a GPU is not measured"
)
GPU = MACHINE.replace("--device cpu", "--device cuda")


def losses(folder):
    lines = (folder / "journal.jsonl").read_text().splitlines()
    metrics = [json.loads(line)["metrics"] for line in lines]
    return [point["train/loss"] for point in metrics if "train/loss" in point]


@needs_gpu
def test_a_gpu_gives_the_same_log_probabilities(undisturbed):
    """In float32, for the same weights."""
    folder = undisturbed["pretrain"]
    assert distance(log_p(folder), log_p(folder, "cuda")) < NETWORK_TOLERANCE
    assert load_file(folder / checkpoint.FILES["ema"])  # read on either device


@needs_gpu
def test_a_training_on_a_gpu_stays_close(pipeline, tmp_path):
    """Within ten times the tolerance, with losses within 1e-3."""
    line = f"{trainings(pipeline, OPTIONS)['pretrain']} --dropout 0"
    done(f"{line} --output {tmp_path}/cpu/out")
    done(f"{line.replace(MACHINE, GPU)} --output {tmp_path}/gpu/out")
    cpu, gpu = tmp_path / "cpu/out", tmp_path / "gpu/out"
    assert distance(log_p(cpu), log_p(gpu)) < 10 * NETWORK_TOLERANCE
    assert losses(cpu) == pytest.approx(losses(gpu), rel=1e-3)


@needs_gpu
def test_most_texts_of_a_gpu_are_the_same(undisturbed, tmp_path):
    """A draw changes only if its uniform is within rounding of a boundary."""
    texts = {}
    for name, machine in (("cpu", MACHINE), ("gpu", GPU), ("again", GPU)):
        done(
            f"generate --checkpoint {undisturbed['pretrain']} --output {tmp_path}/{name} "
            f"--steps 16 --num-samples 32 {machine}"
        )
        texts[name] = np.load(tmp_path / name / "samples.npy")
    assert (texts["cpu"] == texts["gpu"]).all(1).mean() > 0.9
    assert (texts["gpu"] == texts["again"]).all()
