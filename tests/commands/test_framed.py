"""A model of transformers with its own tokenizer: its frame is around every text that it reads."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from framed import FRAMES, save_framed
from small import MACHINE, ROUND, TRAINING, call, done

import halfstep
from halfstep import checkpoint
from halfstep.commands.continuations import references
from halfstep.commands.infilling import corpus_items, last_word_items
from halfstep.commands.train import DiffusionObjective
from halfstep.commands.training_job import HeldOut
from halfstep.commands.writers import encode_prompt
from halfstep.config import Machine, Prompts
from halfstep.data.files import read_documents
from halfstep.data.stories import sample_stories
from halfstep.data.windows import Windows, layout_of, read_manifest
from halfstep.data.zero_shot import cut_windows
from halfstep.distributed.group import ALONE
from halfstep.metrics.elbo import window_nll
from halfstep.metrics.lambada import HalfstepLM
from halfstep.metrics.likelihood import Question
from halfstep.metrics.tasks import TaskLM
from halfstep.training.step import step_generator

LENGTH, CPU = 192, torch.device("cpu")
CORPUS = (
    f"--kind stories --length {LENGTH} --num-documents 120 --validation-documents 8 --workers 1"
)


@pytest.fixture(scope="module", params=FRAMES)
def framed(request, tmp_path_factory):
    """The hub folder of a family, a corpus with its tokenizer, and its checkpoint."""
    kind, root = request.param, tmp_path_factory.mktemp("framed")
    theirs = save_framed(kind, root / "hub", LENGTH)
    corpus, teacher = root / "data/stories", root / "models/stories/teacher"
    done(f"prepare-corpus --output {corpus} {CORPUS} --workers 1 --tokenizer hf:{root}/hub")
    said = "--logits same" if kind in ("llama", "qwen2") else ""
    done(f"import --source hf:{root}/hub --corpus {corpus} --output {teacher} {said}")
    model = halfstep.load(teacher, "cpu")
    last = model.vocab_size
    swap = {theirs.mask_token_id: last, last: theirs.mask_token_id}
    begin, end = (
        [swap.get(i, i) for i in theirs.convert_tokens_to_ids(one.split())]
        for one in FRAMES[kind][1:3]
    )
    return SimpleNamespace(
        kind=kind,
        root=root,
        corpus=corpus,
        teacher=teacher,
        model=model,
        begin=begin,
        end=end,
        inside=slice(len(begin), LENGTH - len(end)),
        encode=lambda text, **how: [swap.get(i, i) for i in theirs(text, **how)["input_ids"]],
    )


def has_frame(framed, ids) -> bool:
    ids = np.asarray(ids)
    stop = ids.shape[1] - len(framed.end)
    begins = (ids[:, : len(framed.begin)] == framed.begin).all()
    return bool(begins and (ids[:, stop:] == framed.end).all())


def test_windows_are_the_stream_in_the_frame_of_the_model(framed):
    """The stream as transformers encodes it, the model's end of text after each document."""
    eos = framed.model.eos_id
    stream = [
        token
        for text in sample_stories(120, 1)
        for token in [*framed.encode(text, add_special_tokens=False), eos]
    ]
    room = LENGTH - len(framed.begin) - len(framed.end)
    cuts = [stream[i : i + room] for i in range(0, len(stream) - room + 1, room)]
    expected = [[*framed.begin, *cut, *framed.end] for cut in cuts]
    windows = Windows(framed.corpus, "train")
    assert windows[np.arange(len(windows))].tolist() == expected
    text = framed.model.tokenizer.decode(expected[0], skip_special_tokens=False)
    assert text.startswith(FRAMES[framed.kind][1]) and text.endswith(FRAMES[framed.kind][2])
    manifest = read_manifest(framed.corpus)
    assert manifest["framing"] == {"begin": framed.begin, "end": framed.end}
    assert manifest["eos_id"] == framed.model.eos_id
    assert framed.model.meta["framing"] == manifest["framing"]


def test_a_frame_is_never_masked_and_the_loss_is_that_of_the_text(framed):
    """The NELBO against a dense textbook over the positions of the text alone."""
    windows, denoiser = Windows(framed.corpus, "train"), framed.model.denoiser
    rows = torch.arange(4).repeat(50)
    x0, asked = windows[rows], windows.asked(rows)
    held_out = HeldOut.read(framed.corpus, CPU, Machine(micro_batch=4), ALONE)
    objective = DiffusionObjective(denoiser, 1e-3, held_out)
    batch = objective.corrupt(x0, step_generator(1, 1), asked=asked)
    part, t = batch.tensors, batch.tensors["t"]
    hidden = part["u"] < t[:, None]
    assert hidden[:, framed.inside].any(0).all()
    assert not hidden[:, : framed.inside.start].any() and not hidden[:, framed.inside.stop :].any()
    assert batch.divisor == len(rows) * (framed.inside.stop - framed.inside.start)
    few = {name: value[:4] for name, value in part.items()}
    xt = x0[:4].masked_fill(hidden[:4], denoiser.mask_id)
    with torch.no_grad():
        log_p = denoiser.log_p(denoiser.features(xt, few["t"].float()))
        found = objective.loss(few)
    nats = -log_p.gather(-1, x0[:4, :, None])[..., 0] / few["t"][:, None]
    inside = hidden[:4][:, framed.inside]
    expected = nats[:, framed.inside][inside].sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_texts_and_prompts_have_the_frame(framed, tmp_path):
    """Of the teacher and of a student that is distilled from it, with and without a prompt."""
    student = framed.root / "models/stories/kl/round-1"
    done(f"distill-round --teacher {framed.teacher} --corpus {framed.corpus} --output {student} "
         f"{ROUND}")  # fmt: skip
    meta = json.loads((student / "meta.json").read_text())
    assert meta["framing"] == framed.model.meta["framing"]
    words = framed.encode("Tom saw", add_special_tokens=False)
    assert encode_prompt(framed.model, "Tom saw").tolist() == [*framed.begin, *words]
    for name, given in (("free", []), ("prompted", words)):
        out = tmp_path / name
        line = f"generate --checkpoint {student} --output {out} --steps 4 --num-samples 5 {MACHINE}"
        prompt = ["--prompt", "Tom saw"] if given else []
        assert halfstep.cli.main([*line.split(), *prompt]) == 0
        ids = np.load(out / "samples.npy")
        assert ids.shape == (5, LENGTH) and has_frame(framed, ids)
        place = slice(len(framed.begin), len(framed.begin) + len(given))
        assert (ids[:, place] == given).all()
    texts = halfstep.generate(framed.model, num_samples=3, steps=4, prompt="Tom saw")
    special = FRAMES[framed.kind][0].split()
    assert all(text.startswith("Tom saw") for text in texts)
    assert not any(text.endswith(one) for text in texts for one in special[1:])


def test_a_teacher_trained_on_the_corpus_has_its_frame(framed, tmp_path):
    """Our own network, and the baseline: neither learns the frame, and both are given it."""
    for command, name in (("pretrain", "teacher"), ("train-baseline", "baseline")):
        out = tmp_path / f"models/own/{name}"
        line = f"--corpus {framed.corpus} --size tiny {TRAINING} {MACHINE}"
        done(f"{command} --output {out} {line}")
        written = tmp_path / name
        done(f"generate --checkpoint {out} --output {written} --steps 4 --num-samples 3 {MACHINE}")
        ids = np.load(written / "samples.npy")
        if name == "baseline" and not framed.begin:
            assert (ids[:, 0] == framed.model.eos_id).all()
            ids = ids[:, 1:]
        assert has_frame(framed, ids)


def test_questions_have_the_frame(framed):
    """LAMBADA's, those of tasks, and rolling windows; tasks ask for the text and not its frame."""
    model, before, after = framed.model, framed.begin, framed.end
    left, right = (framed.encode(text, add_special_tokens=False) for text in ("Tom had", " a fox"))
    start = len(before) + len(left)
    expected = Question((*before, *left, *right, *after), start, start + len(right))
    assert HalfstepLM(model, "parallel").question("Tom had", " a fox") == expected
    lm = TaskLM(model, 4)
    assert lm.question("Tom had", " a fox") == expected
    long = lm.question("Tom had a red kite. " * 60, " a fox")
    assert len(long.ids) == LENGTH and has_frame(framed, [long.ids])
    asked = []
    columns = {"elbo": (), "likelihood": (2,)}
    lm._ask = lambda what, questions: (
        asked.extend(questions) or np.zeros((len(questions), *columns[what]))
    )
    request = SimpleNamespace(args=("Tom had", " a fox"), task_name="mine", doc_id=0)
    lm._elbos([request])
    lm.loglikelihood_rolling([SimpleNamespace(args=("Tom had a red kite. " * 60,))])
    whole = (*before, *left, *right, *after)
    assert (asked[0].start, asked[0].end) == (len(before), len(whole) - len(after))
    assert asked[0].ids == whole and len(asked) > 2
    for question in asked[1:]:
        assert has_frame(framed, [question.ids]) and question.start == len(before)


def test_zero_shot_counts_the_text_and_not_its_frame(framed, tmp_path):
    layout = layout_of(read_manifest(framed.corpus))
    windows = cut_windows(["Tom had a red kite. " * 60], framed.model.tokenizer, layout)
    assert windows.shape[1] == LENGTH and has_frame(framed, windows)
    found = window_nll(framed.model, windows, 4, 8, "cpu", ALONE, "test")
    room = LENGTH - len(framed.begin) - len(framed.end)
    assert (found[:, 1] == room).all() and (found[:, 0] > 0).all()
    short = cut_windows(["Tom"], framed.model.tokenizer, layout)
    assert has_frame(framed, short) and short.shape[1] < LENGTH


def test_continuations_and_infilling_keep_the_frame(framed, tmp_path):
    prompts = Prompts(
        num_prompts=3, prompt_tokens=6, continuation_tokens=6, per_prompt=2, document_tokens=12
    )
    texts = references(framed.corpus, prompts).numpy()
    assert texts.shape == (3, 12) and (texts[:, : len(framed.begin)] == framed.begin).all()
    first = framed.encode(
        next(iter(read_documents(framed.corpus / "validation.jsonl", "text")))[0],
        add_special_tokens=False,
    )
    assert texts[0, len(framed.begin) :].tolist() == first[: 12 - len(framed.begin)]
    flags = "--num-prompts 3 --prompt-tokens 6 --continuation-tokens 6 --per-prompt 2"
    done(f"continue-prompts --checkpoint {framed.teacher} --corpus {framed.corpus} --steps 4 "
         f"--output {tmp_path}/c {flags} --document-tokens 12 {MACHINE}")  # fmt: skip
    ids = np.load(tmp_path / "c/samples.npy")
    assert (ids[:, :6] == texts[:, :6].repeat(2, 0)).all()
    items = corpus_items(framed.corpus, 4)
    assert items.masked[:, framed.inside].any()
    assert not items.masked[:, : framed.inside.start].any()
    assert not items.masked[:, framed.inside.stop :].any()
    words = ([list(range(9, 15)), [40, 41]] for _ in range(9))
    found = last_word_items(words, layout_of(read_manifest(framed.corpus)), 2)
    assert has_frame(framed, found.windows)
    assert (found.windows[found.masked].reshape(-1, 2) == [40, 41]).all()


def test_a_corpus_with_the_frame_of_another_model_is_refused(framed, capsys):
    manifest = json.loads((framed.corpus / "manifest.json").read_text())
    other = framed.root / "other"
    if not other.exists():
        other.mkdir()
        for path in framed.corpus.iterdir():
            (other / path.name).write_bytes(path.read_bytes())
    manifest["framing"] = {"begin": [9], "end": [9]}
    (other / "manifest.json").write_text(json.dumps(manifest))
    said = "--logits same" if framed.kind in ("llama", "qwen2") else ""
    line = (
        f"import --source hf:{framed.root}/hub --corpus {other} --output {framed.root}/m/t {said}"
    )
    capsys.readouterr()
    assert call(line) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "after a text, corpus" in error and "prepare the corpus with tokenizer: hf:" in error
    manifest["framing"] = {"begin": [9] * LENGTH, "end": []}
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert call(line) == 1
    assert f"found {LENGTH} tokens around a text" in capsys.readouterr().err


def test_a_loaded_model_of_our_own_has_two_ends(pipeline):
    """They are part of the text, so nothing is asked for differently."""
    model = halfstep.load(pipeline.teacher, "cpu")
    assert not model.is_framed and (model.framing.begin, model.framing.end) == ([0], [0])
    assert Windows(pipeline.corpus, "train").asked([0, 1]) is None
    assert "framing" not in checkpoint.read_meta(pipeline.teacher)
