"""Trainings on pairs: losses and gradients of responses alone, and responses that are empty."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from framed import save_framed
from known import UNFRAMED
from small import MACHINE, ROUND, TRAINING, call, done

import halfstep
from halfstep import checkpoint
from halfstep.commands import distill, train
from halfstep.commands.distill import DistillationObjective, _entropy
from halfstep.commands.infilling import corpus_items
from halfstep.commands.train import DiffusionObjective, NextTokenObjective
from halfstep.commands.training_job import HeldOut, watch_empty, watched_texts
from halfstep.commands.writers import (
    encode_prompt,
    end_responses,
    text_writer,
    written_places,
)
from halfstep.config import Distillation, DrawOptions, Machine
from halfstep.data.windows import Windows, read_manifest
from halfstep.diffusion.schedules import LogLinear
from halfstep.distill.rounds import Round
from halfstep.distributed.group import ALONE
from halfstep.errors import HalfstepError
from halfstep.metrics.diversity import unigram_entropy
from halfstep.metrics.perplexity import ids_nll, load_judge
from halfstep.records.journal import read_journal
from halfstep.training.step import step_generator

LENGTH, CPU = 32, torch.device("cpu")
NAMES, THINGS = ("Tom", "Anna", "Lily", "Ben"), ("kite", "fox", "dog", "cat", "ball")


@pytest.fixture(scope="module", params=["bpe", "bert"])
def trained(request, tmp_path_factory):
    """A corpus of pairs, a teacher and a student of it: our own network, or Bert as it comes."""
    root, kind = tmp_path_factory.mktemp("pairs"), request.param
    rows = [
        json.dumps({"prompt": f"Who saw the {thing}?", "response": f"{name} saw it."})
        for thing in THINGS
        for name in NAMES
    ]
    (root / "pairs.jsonl").write_text("\n".join(rows))
    corpus, models = root / "data/pairs", root / "models/pairs"
    tokenizer = "bpe"
    if kind == "bert":
        save_framed("bert", root / "hub", LENGTH)
        tokenizer = f"hf:{root}/hub"
    done(f"prepare-corpus --output {corpus} --kind pairs --files {root}/pairs.jsonl "
         f"--length {LENGTH} --validation-documents 4 --workers 1 "
         f"--tokenizer {tokenizer}")  # fmt: skip
    rest = f"--corpus {corpus} --output {models}/teacher"
    if kind == "bert":
        done(f"import --source hf:{root}/hub {rest}")
    else:
        done(f"pretrain {rest} --size tiny {TRAINING} {MACHINE}")
    done(f"distill-round --teacher {models}/teacher --corpus {corpus} "
         f"--output {models}/kl/round-1 {ROUND}")  # fmt: skip
    return SimpleNamespace(
        kind=kind,
        corpus=corpus,
        teacher=models / "teacher",
        student=models / "kl/round-1",
        windows=Windows(corpus, "train"),
        held_out=HeldOut.read(corpus, CPU, Machine(micro_batch=4), ALONE),
    )


def denoiser_of(folder):
    """The denoiser of a checkpoint with weights by which every visible token counts."""
    meta = checkpoint.read_meta(folder)
    torch.manual_seed(3)
    network = checkpoint.build_network(meta).eval()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2) if p.ndim > 1 else torch.nn.init.normal_(p, 0.5, 0.2)
    return checkpoint.build_denoiser(network, meta)


def test_the_loss_is_the_dense_textbooks_over_responses_alone(trained):
    """Its value and the gradient at each position's features; a prompt contributes none."""
    denoiser, rows = denoiser_of(trained.teacher), torch.arange(6)
    x0, asked = trained.windows[rows], trained.windows.asked(rows)
    objective = DiffusionObjective(denoiser, 1e-3, trained.held_out)
    batch = objective.corrupt(x0, step_generator(1, 2), asked=asked)
    part, t = batch.tensors, batch.tensors["t"].float()
    assert batch.divisor == asked.sum() and (~asked).sum() > 0
    hidden = (part["u"] < t[:, None]) & asked
    xt = x0.masked_fill(hidden, denoiser.mask_id)
    h = denoiser.features(xt, t)
    h.retain_grad()
    nats = -denoiser.log_p(h).gather(-1, x0[..., None])[..., 0]
    expected = (nats * hidden / t[:, None]).sum()
    expected.backward()
    assert h.grad[~asked].abs().max() == 0 and h.grad[hidden].abs().max() > 0
    network = denoiser.network
    wanted = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    found = objective.loss(part)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, p in network.named_parameters():
        if name.endswith("key.bias"):  # softmax ignores it: its gradient is rounding alone
            scale = wanted[name.replace("bias", "weight")].abs().max()
            assert max(p.grad.abs().max(), wanted[name].abs().max()) < 1e-4 * scale, name
        elif name in wanted:
            scale = wanted[name].abs().max()
            assert torch.allclose(p.grad, wanted[name], atol=1e-4 * scale + 1e-7), name


def test_no_noise_reaches_a_prompt_and_its_tokens_are_not_learned(trained):
    """In rounds too; a teacher's targets are asked at masked positions of responses alone."""
    denoiser, rows = denoiser_of(trained.teacher), torch.arange(8).repeat(40)
    x0, asked = trained.windows[rows], trained.windows.asked(rows)
    run = Distillation(teacher_steps=16, rounds=2, num_steps=2, warmup_steps=1)
    validation = DiffusionObjective(denoiser, 1e-3, trained.held_out)
    objective = DistillationObjective(
        denoiser, denoiser, Round(1, 0.25, 2, 2), run, validation, seed=1
    )
    batch = objective.corrupt(x0, step_generator(0, 0), asked=asked)
    masked = batch.tensors["xt"] == denoiser.mask_id
    assert not masked[~asked].any() and batch.divisor == masked.sum()
    assert masked.view(40, 8, LENGTH).any(0)[asked[:8]].all()


def test_a_baseline_learns_the_responses_alone(trained):
    """The cross-entropy of each response given all before it, against a dense textbook."""
    from halfstep.models.gpt import GPT

    rows, vocabulary = torch.arange(5), trained.windows.vocab_size
    x0, asked = trained.windows[rows], trained.windows.asked(rows)
    torch.manual_seed(1)
    network = GPT(vocabulary, 16, 1, 2).eval()
    objective = NextTokenObjective(network, trained.held_out)
    batch = objective.corrupt(x0, step_generator(0, 0), asked=asked)
    with torch.no_grad():
        logits = network.output_layer.linear(network(x0[:, :-1])).log_softmax(-1)
        nats = -logits.gather(-1, x0[:, 1:, None])[..., 0]
        found = objective.loss(batch.tensors)
    assert batch.divisor == asked.sum()  # no response starts at the first position
    assert found.item() == pytest.approx(nats[asked[:, 1:]].sum().item(), rel=1e-5)


def test_checkpoints_know_how_pairs_are_written(trained):
    turn = read_manifest(trained.corpus)["pairs"]
    for folder in (trained.teacher, trained.student):
        assert checkpoint.read_meta(folder)["pairs"] == turn
    model = halfstep.load(trained.student, "cpu")
    assert turn == {"before": "", "after": "\n", "end": ""}
    window = trained.windows[[0]][0]
    start = int(trained.windows.asked([0])[0].nonzero()[0, 0])
    assert encode_prompt(model, f"Who saw the {THINGS[0]}?").tolist() == window[:start].tolist()


def test_texts_keep_the_prompt_and_end_with_the_response(trained, tmp_path):
    """After the first end-of-text there is nothing else, and the frame is there."""
    model, windows = halfstep.load(trained.student, "cpu"), trained.windows
    line = f"generate --checkpoint {trained.student} --output {tmp_path}/s --num-samples 40"
    prompt = ["--prompt", "Who saw the fox?"]
    assert halfstep.cli.main([*f"{line} --steps 4 {MACHINE}".split(), *prompt]) == 0
    ids = torch.from_numpy(np.load(tmp_path / "s/samples.npy")).long()
    given = encode_prompt(model, "Who saw the fox?")
    assert (ids[:, : len(given)] == given).all()
    stop = LENGTH - len(windows.layout.framing.end)
    assert (ids[:, -1] == windows.eos_id).all() or trained.kind == "bpe"
    response = ids[:, len(given) : stop]
    ended = (response == windows.eos_id).cumsum(1) > 0
    assert (response[ended] == windows.eos_id).all()
    texts = halfstep.generate(model, num_samples=3, steps=4, prompt="Who saw the fox?")
    assert all(text.startswith("Who saw the fox?\n") for text in texts)
    assert not any("<|endoftext|>" in text or "[SEP]" in text for text in texts)


def test_after_the_first_end_there_is_nothing_else():
    """But for a text of which something to the right of what is written was given."""
    model = SimpleNamespace(eos_id=0, mask_id=9, **UNFRAMED)
    ids = torch.tensor([[0, 5, 3, 0, 4, 0], [0, 5, 0, 3, 3, 3], [0, 0, 1, 2, 3, 4]])
    prompts = torch.tensor([[0, 5]]).expand(3, -1)
    written = written_places(model, prompts, 6)
    expected = [[0, 5, 3, 0, 0, 0], [0, 5, 0, 0, 0, 0], [0, 0, 1, 2, 3, 4]]
    assert end_responses(ids, written, model).tolist() == expected
    prompts = torch.tensor([[0, 5, 9, 9, 9, 9], [0, 9, 0, 9, 9, 3], [0, 0, 1, 9, 9, 9]])
    written = written_places(model, prompts, 6)
    expected = [[0, 5, 3, 0, 0, 0], [0, 5, 0, 3, 3, 3], [0, 0, 1, 2, 3, 4]]
    assert end_responses(ids, written, model).tolist() == expected


def test_samples_answer_the_held_out_prompts(trained, tmp_path, capsys):
    """In the order of the corpus, again from the first; each prompt and frame is kept."""
    held_out = Windows(trained.corpus, "validation")
    line = f"generate --checkpoint {trained.student} --steps 4 {MACHINE} --pairs"
    done(f"{line} {trained.corpus} --num-samples 6 --output {tmp_path}/s")
    ids = np.load(tmp_path / "s/samples.npy")
    rows = np.arange(6) % len(held_out)
    given = ~held_out.asked(rows).numpy()
    assert (ids[given] == held_out[rows].numpy()[given]).all() and given.any(1).all()
    ended = ((ids == held_out.eos_id) & ~given).cumsum(1) > 0
    assert (ids[ended & ~given] == held_out.eos_id).all()
    facts = json.loads((tmp_path / "s/samples.json").read_text())
    assert facts["pairs"].startswith("pairs@")
    before = (tmp_path / "s/samples.npy").stat().st_mtime_ns
    done(f"{line} {trained.corpus} --num-samples 6 --output {tmp_path}/s")  # is kept
    assert (tmp_path / "s/samples.npy").stat().st_mtime_ns == before
    capsys.readouterr()
    for rest, sentence in (
        (f"{trained.corpus} --prompt Tom", "--prompt: found it with --pairs"),
        (f"{tmp_path}/gone", "manifest.json: no such file"),
    ):
        assert call(f"{line} {rest}") == 1
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["baseline", "drafts"])
def test_what_writes_from_left_to_right_answers_them_too(trained, tmp_path, kind):
    """Prompts differ in length: each text is drawn alone, as with its prompt given by hand."""
    baseline, held_out = tmp_path / "models/pairs/baseline", Windows(trained.corpus, "validation")
    line = f"train-baseline --corpus {trained.corpus} --size tiny --output {baseline}"
    done(f"{line} {TRAINING} {MACHINE}")
    drafts = f"--sampler speculative --draft-tokens 4 --scorer {baseline}"
    folder, options = (baseline, "") if kind == "baseline" else (trained.student, drafts)
    line = f"generate --checkpoint {folder} --steps 32 {options} {MACHINE} --pairs"
    done(f"{line} {trained.corpus} --num-samples 6 --output {tmp_path}/s")
    ids = torch.from_numpy(np.load(tmp_path / "s/samples.npy")).long()
    rows = np.arange(6) % len(held_out)
    asked = held_out.asked(rows)
    assert torch.equal(ids[~asked], held_out[rows][~asked])
    model = halfstep.load(folder, "cpu")
    choice = {"sampler": "speculative", "draft_tokens": 4, "scorer": str(baseline)}
    drawing = DrawOptions(**choice if options else {})
    write = text_writer(model, LENGTH, LENGTH, drawing)
    for i, start in enumerate(asked.int().argmax(1).tolist()):
        alone = write(held_out[rows[i : i + 1]][:, :start], i)
        assert torch.equal(alone.ids[0], ids[i])


def test_prompts_of_a_corpus_without_pairs_are_refused(trained, pipeline, capsys):
    line = f"generate --checkpoint {trained.student} --steps 4 {MACHINE} --pairs {pipeline.corpus}"
    assert call(line) == 1
    assert "is no corpus of kind pairs; leave it out" in capsys.readouterr().err


class Says:
    """A denoiser that writes one token, whatever it reads."""

    schedule, ignores_time = LogLinear(), True

    def __init__(self, token, vocabulary):
        self.token, self.vocab_size, self.mask_id = token, vocabulary, vocabulary

    def features(self, xt, t, where=None):
        h = torch.zeros(*xt.shape, 1)
        return h if where is None else h[where]

    def logits(self, h, chunk=slice(None)):
        z = torch.full((len(h), self.vocab_size), -1e4)
        z[:, self.token] = 0
        return z[:, chunk]

    def logits_at(self, h, tokens):
        return self.logits(h).gather(1, tokens)

    def log_p(self, h):
        return self.logits(h).log_softmax(-1)


def test_empty_responses_are_counted_and_stop_a_training(trained):
    held_out, windows = trained.held_out, trained.windows
    eos, other = windows.eos_id, 7
    texts = watched_texts(Says(eos, windows.vocab_size), held_out, 4, 1)
    rows = torch.arange(len(texts)) % len(held_out.x0)
    asked = held_out.asked[rows]
    assert torch.equal(texts[~asked], held_out.x0[rows][~asked]) and (texts[asked] == eos).all()
    assert watch_empty(texts, held_out, None) == {"val/only_end_of_text": 1.0}
    assert watch_empty(texts, held_out, 1.0) == {"val/only_end_of_text": 1.0}
    full = watched_texts(Says(other, windows.vocab_size), held_out, 4, 1)
    assert watch_empty(full, held_out, 0.0) == {"val/only_end_of_text": 0.0}
    assert _entropy(full, held_out) == 0
    mixed = torch.cat([texts[:4], full[:12]])
    assert watch_empty(mixed, held_out, 0.25) == {"val/only_end_of_text": 0.25}
    with pytest.raises(HalfstepError) as caught:
        watch_empty(mixed, held_out, 0.2)
    assert str(caught.value).startswith("25% of 16 drawn responses are only end-of-text, max_empty")


def test_trainings_log_the_share_and_stop_at_the_limit(trained, tmp_path, capsys, monkeypatch):
    """The journals of both kinds of training have it; a limit below it ends one in a sentence."""
    folders = [trained.student] + ([trained.teacher] if trained.kind == "bpe" else [])
    for folder in folders:
        _, points = read_journal(folder)
        shares = [p["metrics"]["val/only_end_of_text"] for p in points
                  if "val/only_end_of_text" in p.get("metrics", {})]  # fmt: skip
        assert shares and all(0 <= share <= 1 for share in shares), points

    def empty(denoiser, held_out, steps, seed):
        return held_out.x0.masked_fill(held_out.asked, held_out.windows.eos_id)

    monkeypatch.setattr(train, "watched_texts", empty)
    monkeypatch.setattr(distill, "watched_texts", empty)
    rest = f"--corpus {trained.corpus} --max-empty-texts 0.5"
    lines = [f"distill-round --teacher {trained.teacher} --output {tmp_path}/kl/round-1 {ROUND}"]
    if trained.kind == "bpe":
        lines.append(f"pretrain --output {tmp_path}/teacher --size tiny {TRAINING} {MACHINE}")
    for line in lines:
        capsys.readouterr()
        assert call(f"{line} {rest}") == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "100% of 4 drawn responses are only end-of-text, max_empty_texts is 0.5" in error


def test_infilling_asks_for_the_response_and_its_end(trained):
    items, held_out = corpus_items(trained.corpus, 4), Windows(trained.corpus, "validation")
    asked = held_out.asked(np.arange(len(held_out))).numpy()
    assert (items.windows == held_out[np.arange(len(held_out))].numpy()).all()
    for ids, mask, of_response in zip(items.windows, items.masked, asked, strict=True):
        words = int((ids[of_response] != held_out.eos_id).sum())
        assert not (mask & ~of_response).any() and mask.sum() == (words + 1) // 2
        start = int(np.flatnonzero(of_response)[0])
        assert np.flatnonzero(mask)[-1] <= start + words


def test_scores_are_those_of_responses(trained, tmp_path, capsys):
    """Their entropy, and the share that is empty; texts of other prompts are refused."""
    samples = tmp_path / "samples/pairs/kl/round-1/steps-4"
    draw = f"generate --checkpoint {trained.student} --steps 4 --num-samples 8 {MACHINE}"
    baseline = tmp_path / "models/pairs/baseline"
    done(f"train-baseline --corpus {trained.corpus} --size tiny --output {baseline} "
         f"{TRAINING} {MACHINE}")  # fmt: skip
    score = f"--corpus {trained.corpus} --judge {baseline}/hf --bootstrap 100 {MACHINE}"
    done(f"{draw} --output {samples} --pairs {trained.corpus}")
    done(f"score-samples --samples {samples} --output {tmp_path}/rows.json {score}")
    found = json.loads((tmp_path / "rows.json").read_text())
    rows = {(row["metric"], row["protocol"]): row for row in found}
    held_out, ids = Windows(trained.corpus, "validation"), np.load(samples / "samples.npy")
    spans = held_out.spans(np.arange(8) % len(held_out), ids)
    responses = [text[begin:end] for text, (begin, end) in zip(ids, spans, strict=True)]
    assert all((response[:-1] != held_out.eos_id).all() for response in responses)
    row = rows["only_end_of_text", "responses"]
    assert row["value"] == np.mean([response[0] == held_out.eos_id for response in responses])
    assert row["low"] <= row["value"] <= row["high"]
    entropy = rows["entropy", "unigram"]["value"]
    assert entropy == pytest.approx(unigram_entropy(responses).mean())
    judge = load_judge(f"{baseline}/hf")
    assert judge.tokenizer.eos_token_id == held_out.eos_id  # [SEP] is Bert's
    assert len(judge.tokenizer) <= judge.vocab_size
    nll = ids_nll(judge, ids, 8, spans=spans)
    assert rows["generative_perplexity", "ids"]["value"] == pytest.approx(np.exp(nll.mean()))
    done(f"{draw} --output {tmp_path}/other")
    line = f"score-samples --samples {tmp_path}/other --output {tmp_path}/none.json {score}"
    capsys.readouterr()
    assert call(line) == 1
    assert "do not answer the held-out prompts of" in capsys.readouterr().err
    done(f"score-corpus --output {tmp_path}/data.json {score}")
    done(f"score-frontier --samples {samples} --frontier {samples} --held-out "
         f"{tmp_path}/data.json --output {tmp_path}/f {score}")  # fmt: skip
    rows = json.loads((tmp_path / "f/samples.json").read_text())
    assert row in rows
