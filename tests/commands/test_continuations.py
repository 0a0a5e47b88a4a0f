"""Continuations: prompts are kept, texts depend on seed and index only, and scores are right."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from halfstep import checkpoint
from halfstep.cli import main
from halfstep.commands import continuations, writers
from halfstep.commands.continuations import continue_prompts, references, score_continuations
from halfstep.commands.generate import save_samples
from halfstep.config import DrawOptions, Evaluation, Machine, Prompts
from halfstep.data.windows import Windows
from halfstep.diffusion.contracts import Samples
from halfstep.errors import ConfigError, HalfstepError
from halfstep.files import read_json, write_json
from halfstep.metrics.diversity import distinct, self_bleu
from halfstep.resolve import validate

PROMPTS = Prompts(
    num_prompts=20, per_prompt=3, prompt_tokens=10, continuation_tokens=12, document_tokens=21
)
MACHINE = Machine(device="cpu", threads=1, micro_batch=16)


def write(world, name, output, seed=3, prompts=PROMPTS, machine=MACHINE):
    """Continuations by a model at 4 steps: their ids."""
    folder, drawing = world.models / name, DrawOptions(sampling_seed=seed)
    continue_prompts(folder, world.corpus, output, [4], prompts, drawing, machine)
    return np.load(output / "samples.npy")


def save(world, output, ids):
    """Save ids as continuations by the teacher."""
    folder = world.models / "teacher"
    samples = Samples(torch.from_numpy(ids), torch.full((len(ids),), 4))
    model, more = checkpoint.load_checkpoint(folder), {"prompts": PROMPTS.model_dump()}
    save_samples(folder, output, model, 4, samples, DrawOptions(), **more)


@pytest.fixture(scope="module")
def texts(world):
    return references(world.corpus, PROMPTS)


@pytest.fixture(scope="module")
def written(world, tmp_path_factory):
    """Folders of continuations by the teacher and by the baseline."""
    root = tmp_path_factory.mktemp("continuations")
    for name in ("teacher", "baseline"):
        write(world, name, root / name)
    return root


def score(world, folder, output) -> dict:
    evaluation = Evaluation(judge=str(world.models / "baseline" / "hf"), bootstrap=100)
    score_continuations([folder], world.corpus, output / "rows.json", evaluation, MACHINE)
    return {row["metric"]: row for row in read_json(output / "rows.json")}


def test_documents_are_joined_from_their_windows(world, monkeypatch):
    """They equal the documents' own text, tokenized alone, also across windows and reads."""
    monkeypatch.setattr(continuations, "AT_ONCE", 3)
    tokenizer = Tokenizer.from_file(str(world.corpus / "tokenizer.json"))
    lines = (world.corpus / "validation.jsonl").read_text().splitlines()
    expected = [tokenizer.encode(json.loads(line)["text"]).ids for line in lines]
    documents = continuations.held_out_documents(Windows(world.corpus, "validation"))
    *whole, last = (document.tolist() for document in documents)
    assert len(whole) > 40 and whole == expected[: len(whole)]
    assert last == expected[len(whole)][: len(last)]
    long = [text for text in whole if len(text) >= 45]
    assert 5 <= len(long) < len(whole)
    few = Prompts(num_prompts=5, prompt_tokens=4, continuation_tokens=4, document_tokens=45)
    found = references(world.corpus, few)
    assert found.tolist() == [[world.facts["eos_id"], *text[:7]] for text in long[:5]]


@pytest.mark.parametrize("name", ["teacher", "baseline"])
def test_prompts_are_kept_and_texts_differ(world, written, texts, name):
    ids, facts = np.load(written / name / "samples.npy"), read_json(written / name / "samples.json")
    assert ids.shape == (60, 22)
    assert (ids[:, :10].reshape(20, 3, 10) == texts[:, None, :10].numpy()).all()
    assert 0 <= ids.min() and ids.max() < world.facts["vocab_size"]
    assert len({tuple(row) for row in ids.tolist()}) == 60
    assert facts["prompts"] == PROMPTS.model_dump()
    evaluations = pytest.approx(3.9, abs=0.2) if name == "teacher" else 12
    assert facts["network_evaluations"] == evaluations


@pytest.mark.parametrize("name", ["teacher", "baseline"])
def test_a_text_depends_on_seed_and_index_only(world, written, name, tmp_path):
    """Neither the batch nor the number of prompts matters."""
    ids = np.load(written / name / "samples.npy")
    fewer = PROMPTS.model_copy(update={"num_prompts": 7})
    machine = MACHINE.model_copy(update={"micro_batch": 5})
    again = write(world, name, tmp_path, prompts=fewer, machine=machine)
    assert np.array_equal(again, ids[:21])
    other = write(world, name, tmp_path, seed=4, prompts=fewer, machine=machine)
    assert (other[:, 10:] != ids[:21, 10:]).mean() > 0.5


@pytest.fixture
def drawn(monkeypatch):
    """The step counts that are drawn."""
    counts, draw_texts = [], continuations.draw_texts

    def note(write, given, micro_batch, label, group):
        counts.append(int(label.split()[-2]))
        return draw_texts(write, given, micro_batch, label, group)

    monkeypatch.setattr(continuations, "draw_texts", note)
    return counts


def several(world, root, *steps, prompts=PROMPTS):
    """Continuations by the teacher at several step counts."""
    folder, drawing = world.models / "teacher", DrawOptions(sampling_seed=3)
    output = root / "steps-{steps}"
    continue_prompts(folder, world.corpus, output, [*steps], prompts, drawing, MACHINE)


def test_step_counts_share_a_call_and_a_record(world, written, tmp_path, drawn):
    """Each set is what a call for it alone draws. Finished sets are kept, a new one is drawn."""
    several(world, tmp_path, 4, 2)
    several(world, tmp_path, 4, 2, 3)
    assert drawn == [4, 2, 3]
    for name in ("samples.npy", "samples.txt"):
        alone = (written / "teacher" / name).read_bytes()
        assert (tmp_path / "steps-4" / name).read_bytes() == alone
    record = read_json(tmp_path / "provenance.json")
    files = [f"steps-{n}/samples.{kind}" for n in (2, 3, 4) for kind in ("json", "npy", "txt")]
    assert sorted(record["outputs"]) == sorted(files)
    assert len(list(tmp_path.rglob("provenance.json"))) == 1


@pytest.mark.parametrize("change, expected", [
    ("nothing", []),
    ("killed", [2]),
    ("damaged", [2]),
    ("count", [2, 4]),
    ("version", [2, 4]),
    ("documents", [2, 4]),
])  # fmt: skip
def test_what_differs_or_was_changed_is_drawn_again(
    world, tmp_path, drawn, monkeypatch, change, expected
):
    few = PROMPTS.model_copy(update={"num_prompts": 4})
    several(world, tmp_path, 2, 4, prompts=few)
    drawn.clear()
    if change == "killed":
        (tmp_path / "steps-2/samples.json").unlink()
    if change == "damaged":
        (tmp_path / "steps-2/samples.txt").write_text("another text\n")
    if change == "count":
        few = few.model_copy(update={"num_prompts": 5})
    if change == "version":
        monkeypatch.setattr(continuations, "CONTINUE_STAGE", continuations.CONTINUE_STAGE + 1)
    if change == "documents":
        others = references(world.corpus, PROMPTS)[-4:]
        monkeypatch.setattr(continuations, "references", lambda corpus, prompts: others)
    several(world, tmp_path, 2, 4, prompts=few)
    assert drawn == expected


def test_several_step_counts_need_several_folders(world, tmp_path):
    with pytest.raises(HalfstepError, match=r"found 2 step counts for one folder, .*steps-{steps}"):
        arguments = world.corpus, tmp_path / "out", [2, 4], PROMPTS, DrawOptions(), MACHINE
        continue_prompts(world.models / "teacher", *arguments)
    assert not list(tmp_path.iterdir())


def test_a_denoiser_is_given_eos_to_the_right_of_each_text(world, tmp_path, monkeypatch):
    """As in every training window; the EOS is not kept."""
    frames, sample = [], writers.sample

    def record(*args, given, **options):
        frames.append(given)
        return sample(*args, given=given, **options)

    monkeypatch.setattr(writers, "sample", record)
    write(world, "teacher", tmp_path)
    frame = torch.cat(frames)
    assert frame.shape == (60, 23)
    assert (frame[:, 22] == world.facts["eos_id"]).all()
    assert (frame[:, 10:22] == world.facts["vocab_size"]).all()


def test_rows_describe_themselves(world, written, tmp_path):
    rows = score(world, written / "teacher", tmp_path)
    metrics = ["mauve", "continuation_perplexity", "self_bleu", "continuation_distinct_2"]
    assert list(rows) == metrics
    data = (
        f"stories@{world.facts['splits']['validation']['sha256'][:12]}, 20 prompts of 10 tokens, "
        "documents of 21"
    )
    expected = {
        "protocol": "continuations",
        "data": data,
        "num_samples": 60,
        "length": 22,
        "steps": 4,
        "seed": 3,
        "draw_dtype": "float64",
        "run": "teacher",
    }
    for row in rows.values():
        assert row["low"] - 1e-12 <= row["value"] <= row["high"] + 1e-12  # rounding of a mean
        assert row.items() >= expected.items()
    assert rows["self_bleu"]["judge"] is None and rows["mauve"]["judge"]
    rows = score(world, written / "baseline", tmp_path)
    assert {row["steps"] for row in rows.values()} == {None}


def test_values_are_those_of_the_continuations(world, written, tmp_path):
    rows = score(world, written / "teacher", tmp_path)
    ids = np.load(written / "teacher" / "samples.npy")
    new = ids[:, 10:].reshape(20, 3, 12)
    assert rows["self_bleu"]["value"] == pytest.approx(self_bleu(new).mean())
    assert rows["continuation_distinct_2"]["value"] == pytest.approx(distinct(new, 2).mean())
    # The judge's weights, in our own network.
    model = checkpoint.load_checkpoint(world.models / "baseline")
    x = torch.from_numpy(ids).long()
    h = model.network(x)[:, 9:-1].flatten(0, 1)
    log_p = model.network.log_p(h).view(60, 12, -1).gather(-1, x[:, 10:, None])
    perplexity = np.exp(-log_p.mean().item())
    assert rows["continuation_perplexity"]["value"] == pytest.approx(perplexity, rel=1e-4)


def test_the_documents_themselves_score_as_human_text(world, texts, tmp_path):
    """MAUVE is low for a repeated token; self-BLEU is 100 for copies."""
    ids = texts.numpy().repeat(3, 0)
    save(world, tmp_path, ids)
    rows = score(world, tmp_path, tmp_path)
    assert rows["mauve"]["value"] > 0.99 and rows["self_bleu"]["value"] == pytest.approx(100)
    ids[:, 10:] = world.facts["vocab_size"] - 1
    save(world, tmp_path, ids)
    assert score(world, tmp_path, tmp_path)["mauve"]["value"] < 0.1


def test_self_bleu_by_hand():
    assert self_bleu(np.arange(12)[None, None].repeat(5, 1)) == pytest.approx([100])
    assert self_bleu(np.arange(60).reshape(1, 5, 12)).tolist() == [0]
    # No common 4-gram, and no smoothing.
    assert self_bleu(np.array([[[1, 2, 3, 4], [1, 2, 3, 9]]])).tolist() == [0]
    x = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9, 9], [7, 7, 3, 4, 5, 6]]
    # Of the 4-grams of the first text, only 2345 is in neither of the others.
    first = (6 / 6 * 5 / 5 * 4 / 4 * 2 / 3) ** 0.25
    others = (4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert self_bleu(np.array(x)[None]) == pytest.approx([100 * (first + 2 * others) / 3])
    # Counts are clipped: a fifth 1 has no match among the four of the other text.
    clipped = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    found = self_bleu(np.array([[[1, 1, 1, 1, 1], [1, 1, 1, 1, 2]]]))
    assert found == pytest.approx([100 * clipped])


def test_distinct_counts_all_texts_of_a_group():
    groups = [[[1, 2, 3], [1, 2, 3]], [[1, 2, 3], [4, 5, 6]]]
    assert distinct(np.array(groups), 2).tolist() == [0.5, 1]


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"num-prompts": 61},
            r"found \d+ held-out documents of document_tokens \(21\) or more, "
            r"expected num_prompts \(61\)",
        ),
        ({"document-tokens": 500}, r"found 0 held-out documents of document_tokens \(500\)"),
        ({"document-tokens": 20}, r"document_tokens \(20\) must be at least 21"),
        ({"prompt-tokens": 120, "document-tokens": 131}, r"found 0 held-out documents"),
        ({"steps": 0}, r"steps: found \[0\]: input should be greater than or equal to 1"),
    ],
)
def test_an_error_is_one_line(world, tmp_path, capsys, changed, message):
    flags = {
        "checkpoint": world.models / "teacher",
        "corpus": world.corpus,
        "output": tmp_path,
        "steps": 4,
        "device": "cpu",
    }
    flags |= {key.replace("_", "-"): value for key, value in PROMPTS.model_dump().items()}
    words = [str(word) for key, value in (flags | changed).items() for word in (f"--{key}", value)]
    assert main(["continue-prompts", *words]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_things_that_do_not_belong_together_are_errors(world, written, tmp_path):
    short = shutil.copytree(world.models / "teacher", tmp_path / "short")
    write_json(short / "meta.json", read_json(short / "meta.json") | {"length": 16})
    with pytest.raises(HalfstepError, match=r"found 10 \+ 12, but a text of short has 16 tokens"):
        write(world, short, tmp_path / "out")
    message = "samples without prompts; name folders that halfstep continue-prompts wrote"
    with pytest.raises(HalfstepError, match=message):
        score(world, world.samples / "steps-8", tmp_path)
    shifted = shutil.copytree(written / "teacher", tmp_path / "shifted")
    facts = read_json(shifted / "samples.json")
    facts["prompts"] |= {"document_tokens": 32, "num_prompts": 5, "per_prompt": 12}
    write_json(shifted / "samples.json", facts)
    with pytest.raises(HalfstepError, match="its prompts are not those of"):
        score(world, shifted, tmp_path)


def test_a_configuration_that_cannot_work_is_an_error():
    whole = {
        "corpora": {"a": {"kind": "docs", "length": 64}},
        "teachers": {"a-tiny": {"corpus": "a", "network": {"size": "tiny"}}},
        "continuations": {},
    }
    message = (
        r"continuations: prompt_tokens \+ continuation_tokens are 50 \+ 50, "
        "but a window of corpus 'a' has 64"
    )
    with pytest.raises(ConfigError, match=message):
        validate(whole)
    message = r"continuations: document_tokens \(20\) must be at least 99"
    with pytest.raises(ConfigError, match=message):
        validate(whole | {"continuations": {"document_tokens": 20}})
    assert validate(whole | {"continuations": None}).continuations is None
