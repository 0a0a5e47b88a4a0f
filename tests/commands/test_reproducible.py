"""The same seed gives the same bits on a CPU: tokens, checkpoints and samples, whatever the workers and the micro-batch of sampling, and wherever
a run was interrupted. Across thread counts and on a GPU: the same up to a stated tolerance."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from small import CORPUS, MACHINE, call, done, trainings

import halfstep
from halfstep import checkpoint
from halfstep.commands import distill, train
from halfstep.commands.generate import draw_texts, encode_prompt, text_writer
from halfstep.config import GenerateOptions
from halfstep.data import pack
from halfstep.training import loop

STEPS, EVERY = 4, 2
OPTIONS = f"--num-steps {STEPS} --validate-every {EVERY} --batch-size 8 --warmup-steps 2 --dropout 0.1 --lr-decay cosine --precision float32 --seed 4 {MACHINE}"
NETWORK_TOLERANCE = 1e-3  # of the spread of the log-probabilities: float32 sums in another order


def bits(folder, but=("run.json", "journal.jsonl", "provenance.json", "samples.json")):
    """Everything in a folder but what says when it was made."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name not in but and path.is_file()
    }


def test_tokens_whatever_the_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(
        pack, "CHUNK", 2048
    )  # many chunks, so that three processes have something to do
    for workers in (1, 3):
        done(
            f"prepare-corpus --output {tmp_path}/{workers} {CORPUS.replace('40', '400')} --workers {workers}"
        )
    one, three = bits(tmp_path / "1"), bits(tmp_path / "3")
    assert one == three and one.keys() >= {
        "train.bin",
        "validation.bin",
        "tokenizer.json",
        "manifest.json",
        "last_words.jsonl",
    }
    done(
        f"prepare-corpus --output {tmp_path}/other {CORPUS.replace('40', '400')} --corpus-seed 2 --workers 1"
    )
    assert bits(tmp_path / "other")["train.bin"] != one["train.bin"]


@pytest.fixture(scope="module")
def undisturbed(pipeline, tmp_path_factory):
    """Each kind of training, run through once."""
    root = tmp_path_factory.mktemp("undisturbed")
    for name, line in trainings(pipeline, OPTIONS).items():
        done(f"{line} --output {root}/models/{name}/out")
    return {name: root / "models" / name / "out" for name in trainings(pipeline, OPTIONS)}


class Interrupted(Exception):
    pass


def interrupt(patch, where: str, at: int) -> None:
    """An exception out of the `at`-th call: of the next batch, of the measurement (half of it done), of the writing of the rolling state."""
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
        for module in (train, distill):
            patch.setattr(module, "batch_indices", failing(module.batch_indices))
    elif where == "validation":
        # The held-out loss is measured first; then, in a round, the entropy of samples.
        measured = failing(train.HeldOut.mean_loss, before=False)
        patch.setattr(train.HeldOut, "mean_loss", measured)
    else:
        patch.setattr(
            safetensors.torch, "save_file", failing(safetensors.torch.save_file, before=False)
        )


THRICE = [("validation", 1), ("state", 1), ("batch", 2)]
PLACES = {  # kind of training: the interruptions of each start until it comes through; tests/training/test_loop.py stops the loop at every step
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
    """Every file has the bits of the undisturbed run: interrupted before a step, after a held-out loss was measured but not kept, and in the
    middle of the writing of a rolling state."""
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0)  # a rolling state after every step but the last
    expected = bits(undisturbed[name])
    assert {
        "model.safetensors",
        "ema.safetensors",
        "best.safetensors",
        "optimizer.safetensors",
        "meta.json",
    } <= expected.keys()
    for number, stops in enumerate(PLACES[name]):
        output = tmp_path / str(number) / name / "out"
        for stop in stops:
            with monkeypatch.context() as patch, pytest.raises(Interrupted):
                interrupt(patch, *stop)
                call(f"{trainings(pipeline, OPTIONS)[name]} --output {output}")
            assert not (output / "meta.json").exists() and not list(output.rglob("*.part"))
        done(f"{trainings(pipeline, OPTIONS)[name]} --output {output}")
        assert bits(output) == expected, stops
        assert not (output / "state").exists()


def test_the_seed_decides(pipeline, undisturbed, tmp_path):
    """The same command gives the same bits, another seed others; samples likewise."""
    line = trainings(pipeline, OPTIONS)["pretrain"]
    done(f"{line} --output {tmp_path}/pretrain/out")
    assert bits(tmp_path / "pretrain/out") == bits(undisturbed["pretrain"])
    done(f"{line.replace('--seed 4', '--seed 5')} --output {tmp_path}/other/out")
    a, b = (bits(folder) for folder in (tmp_path / "other/out", undisturbed["pretrain"]))
    assert all(a[name] != b[name] for name in a if name.endswith(".safetensors"))
    for number, seed in enumerate((1, 1, 2)):
        done(
            f"generate --checkpoint {undisturbed['round-1']} --output {tmp_path}/{number} --steps 8 --num-samples 3 --sampling-seed {seed} {MACHINE}"
        )
    assert bits(tmp_path / "0") == bits(tmp_path / "1") != bits(tmp_path / "2")


@pytest.mark.parametrize("sampler", ["ancestral", "analytic", "first_hitting", "autoregressive"])
def test_text_whatever_the_batch(pipeline, sampler):
    """Text i belongs to (seed, i): alone, among others, in one batch or in pieces; and the first texts of a longer list are those of a shorter one."""
    model = halfstep.load(pipeline.baseline if sampler == "autoregressive" else pipeline.student)
    how = GenerateOptions(
        temperature=0.9,
        top_p=0.95,
        sampling_seed=7,
        **({} if sampler == "autoregressive" else {"sampler": sampler}),
    )

    def texts(micro_batch, num_samples=9, prompt=""):
        prompts = encode_prompt(model, prompt).expand(num_samples, -1)
        written = draw_texts(text_writer(model, model.length, 12, how), prompts, micro_batch)
        return written.ids.numpy(), written.network_evaluations.numpy()

    ids, passes = texts(9)
    assert len({tuple(row) for row in ids}) == 9
    for micro_batch in (1, 2, 4):
        other, visited = texts(micro_batch)
        assert np.array_equal(ids, other) and np.array_equal(passes, visited)
    assert np.array_equal(texts(9, 4)[0], ids[:4])
    assert np.array_equal(texts(9, prompt="Tom was")[0], texts(2, prompt="Tom was")[0])


def log_p(folder, device="cpu"):
    """[N, V] log-probabilities of held-out text with every second token masked."""
    model = halfstep.load(folder, device=device)
    xt = torch.arange(4 * model.length, device=device).view(4, -1) % model.vocab_size
    xt[:, ::2] = model.mask_id
    with torch.no_grad():
        return model.denoiser.log_p(
            model.denoiser.features(xt, torch.full((4,), 0.5, device=device))[xt == model.mask_id]
        ).cpu()


def distance(a, b):
    return ((a - b).abs().max() / (a.max() - a.min())).item()


def test_the_nucleus_and_the_seed_reach_the_baseline(pipeline, tmp_path):
    """A nucleus of the likeliest token alone writes one text, whatever the seed; without it the seed decides, and is named."""
    texts = {}
    for name, words in (
        ("greedy", "--top-p 1e-6"),
        ("greedy 7", "--top-p 1e-6 --sampling-seed 7"),
        ("free", ""),
        ("free 7", "--sampling-seed 7"),
    ):
        folder = tmp_path / name.replace(" ", "-")
        done(
            f"generate --checkpoint {pipeline.baseline} --output {folder} --steps 24 --num-samples 3 {words} {MACHINE}"
        )
        texts[name] = np.load(folder / "samples.npy")
        assert json.loads((folder / "samples.json").read_text())["seed"] == (
            7 if "7" in name else 1
        )
    assert (texts["greedy"] == texts["greedy"][0]).all() and np.array_equal(
        texts["greedy"], texts["greedy 7"]
    )
    assert (
        not np.array_equal(texts["free"], texts["free 7"])
        and len(np.unique(texts["free"], axis=0)) == 3
    )


def test_threads(pipeline, undisturbed, tmp_path):
    """Sums may come in another order: what the trained networks say differs by no more than the tolerance, and far less than training moved it.
    (At this size the bits were the same with 1, 2 and 3 threads; matrices large enough to be cut among threads promise no such thing.)"""
    try:
        torch.set_num_threads(1)
        done(
            f"{trainings(pipeline, OPTIONS)['pretrain'].replace('--threads 1', '--threads 3')} --output {tmp_path}/pretrain/out"
        )
    finally:
        torch.set_num_threads(1)
    one, three = (log_p(folder) for folder in (undisturbed["pretrain"], tmp_path / "pretrain/out"))
    moved = distance(one, log_p(pipeline.teacher))
    assert distance(one, three) < NETWORK_TOLERANCE < moved


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device here: what a GPU changes is not measured"
)
def test_gpu(pipeline, undisturbed, tmp_path):
    """The same weights say the same within 1e-3 of the spread of the log-probabilities, in float32; a whole training within 1e-2 of it; and most
    texts are the same token for token, since a draw changes only where its uniform lies within rounding of a boundary."""
    folder = undisturbed["pretrain"]
    assert distance(log_p(folder), log_p(folder, "cuda")) < NETWORK_TOLERANCE
    gpu = MACHINE.replace("--device cpu", "--device cuda")
    done(
        f"{trainings(pipeline, OPTIONS)['pretrain'].replace(MACHINE, gpu)} --dropout 0 --output {tmp_path}/gpu/out"
    )
    done(f"{trainings(pipeline, OPTIONS)['pretrain']} --dropout 0 --output {tmp_path}/cpu/out")
    assert (
        distance(log_p(tmp_path / "cpu/out"), log_p(tmp_path / "gpu/out")) < 10 * NETWORK_TOLERANCE
    )
    a, b = (
        [
            json.loads(line)
            for line in (tmp_path / which / "out/journal.jsonl").read_text().splitlines()
        ]
        for which in ("cpu", "gpu")
    )
    losses = [
        [p["metrics"]["train/loss"] for p in points if "train/loss" in p["metrics"]]
        for points in (a, b)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for which, machine in (("cpu", MACHINE), ("gpu", gpu), ("again", gpu)):
        done(
            f"generate --checkpoint {folder} --output {tmp_path}/{which}-texts --steps 16 --num-samples 32 {machine}"
        )
    cpu, one, again = (
        np.load(tmp_path / f"{which}-texts/samples.npy") for which in ("cpu", "gpu", "again")
    )
    assert (cpu == one).all(1).mean() > 0.9 and (one == again).all()
    assert load_file(folder / checkpoint.FILES["ema"])  # read on either device
