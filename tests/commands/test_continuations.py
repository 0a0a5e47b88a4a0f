"""Continuations: the documents' own beginnings, kept; each text of its seed and index; scores of texts whose scores are known."""

import json
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from halfstep import checkpoint
from halfstep.cli import main
from halfstep.commands import continuations as commands
from halfstep.commands import generate
from halfstep.commands.continuations import continue_prompts, references, score_continuations
from halfstep.commands.generate import save_samples
from halfstep.config import DrawOptions, Evaluation, Machine, Prompts
from halfstep.data.pack import Windows
from halfstep.diffusion.contracts import Samples
from halfstep.errors import HalfstepError
from halfstep.files import read_json, write_json
from halfstep.metrics.diversity import distinct, self_bleu
from halfstep.resolve import ConfigError, validate

PROMPTS = Prompts(
    num_prompts=20, per_prompt=3, prompt_tokens=10, continuation_tokens=12, document_tokens=21
)
MACHINE = Machine(device="cpu", threads=1, micro_batch=16)


@pytest.fixture(scope="module")
def texts(world):
    return references(world.corpus, PROMPTS)


@pytest.fixture(scope="module")
def written(world, tmp_path_factory):
    """Folders of the teacher's and of the baseline's continuations."""
    root = tmp_path_factory.mktemp("continuations")
    for name in ("teacher", "baseline"):
        continue_prompts(
            world.models / name,
            world.corpus,
            root / name,
            4,
            PROMPTS,
            DrawOptions(sampling_seed=3),
            MACHINE,
        )
    return root


def score(world, folder, to, **more) -> dict:
    evaluation = Evaluation(judge=str(world.models / "baseline" / "hf"), bootstrap=100)
    score_continuations([folder], world.corpus, to / "rows.json", evaluation, MACHINE)
    return {row["metric"]: row for row in read_json(to / "rows.json")}


def test_documents_are_put_together_from_their_windows(world, monkeypatch):
    """Against the documents' own text, tokenised alone, across the borders of windows and of what is read at once."""
    monkeypatch.setattr(commands, "AT_ONCE", 3)
    tokenizer = Tokenizer.from_file(str(world.corpus / "tokenizer.json"))
    expected = [
        tokenizer.encode(json.loads(line)["text"]).ids
        for line in open(world.corpus / "validation.jsonl")
    ]
    *whole, last = (
        text.tolist() for text in commands.held_out_documents(Windows(world.corpus, "validation"))
    )
    assert (
        len(whole) > 40
        and whole == expected[: len(whole)]
        and last == expected[len(whole)][: len(last)]
    )
    long = [text for text in whole if len(text) >= 32]
    assert 5 <= len(long) < len(whole)
    found = references(
        world.corpus,
        Prompts(num_prompts=5, prompt_tokens=4, continuation_tokens=4, document_tokens=32),
    )
    assert found.tolist() == [[world.facts["eos_id"], *text[:7]] for text in long[:5]]


@pytest.mark.parametrize("name", ["teacher", "baseline"])
def test_prompts_are_kept_and_every_text_is_its_own(world, written, texts, name, tmp_path):
    ids, facts = np.load(written / name / "samples.npy"), read_json(written / name / "samples.json")
    assert (
        ids.shape == (60, 22)
        and (ids[:, :10].reshape(20, 3, 10) == texts[:, None, :10].numpy()).all()
    )
    assert 0 <= ids.min() and ids.max() < world.facts["vocab_size"]
    assert len({tuple(row) for row in ids.tolist()}) == 60
    assert facts["prompts"] == PROMPTS.model_dump() and facts["network_evaluations"] == (
        pytest.approx(3.9, abs=0.2) if name == "teacher" else 12
    )
    fewer, how = (
        PROMPTS.model_copy(update={"num_prompts": 7}),
        MACHINE.model_copy(update={"micro_batch": 5}),
    )
    continue_prompts(
        world.models / name, world.corpus, tmp_path, 4, fewer, DrawOptions(sampling_seed=3), how
    )
    assert np.array_equal(
        np.load(tmp_path / "samples.npy"), ids[:21]
    )  # whatever the batch, and however many prompts follow
    continue_prompts(
        world.models / name, world.corpus, tmp_path, 4, fewer, DrawOptions(sampling_seed=4), how
    )
    assert (np.load(tmp_path / "samples.npy")[:, 10:] != ids[:21, 10:]).mean() > 0.5


def test_a_denoiser_is_shown_where_its_window_ends(world, tmp_path, monkeypatch):
    """The EOS behind each text is given, as in every window it learnt from, and not kept."""
    frames, sample = [], generate.sample
    monkeypatch.setattr(
        generate, "sample", lambda *args, **how: frames.append(how["given"]) or sample(*args, **how)
    )
    continue_prompts(
        world.models / "teacher", world.corpus, tmp_path, 4, PROMPTS, DrawOptions(), MACHINE
    )
    frame = torch.cat(frames)
    assert (
        frame.shape == (60, 23)
        and (frame[:, 22] == world.facts["eos_id"]).all()
        and (frame[:, 10:22] == world.facts["vocab_size"]).all()
    )


def test_rows_say_what_they_are(world, written, texts, tmp_path):
    rows = score(world, written / "teacher", tmp_path)
    assert list(rows) == [
        "mauve",
        "continuation_perplexity",
        "self_bleu",
        "continuation_distinct_2",
    ]
    for row in rows.values():
        assert row["low"] <= row["value"] <= row["high"] and row["protocol"] == "continuations"
        assert (
            row["data"]
            == f"stories@{world.facts['splits']['validation']['sha256'][:12]}, 20 prompts of 10 tokens, documents of 21"
        )
        assert (
            row["num_samples"],
            row["length"],
            row["steps"],
            row["seed"],
            row["draw_dtype"],
            row["run"],
        ) == (
            60,
            22,
            4,
            3,
            "float64",
            "teacher",
        )
    ids = np.load(written / "teacher" / "samples.npy")
    new = ids[:, 10:].reshape(20, 3, 12)
    assert rows["self_bleu"]["value"] == pytest.approx(self_bleu(new).mean())
    assert rows["continuation_distinct_2"]["value"] == pytest.approx(distinct(new, 2).mean())
    assert rows["self_bleu"]["judge"] is None and rows["mauve"]["judge"]
    model = checkpoint.load_checkpoint(
        world.models / "baseline"
    )  # the judge's weights, in our own network
    x = torch.from_numpy(ids).long()
    log_p = (
        model.network.log_p(model.network(x)[:, 9:-1].flatten(0, 1))
        .view(60, 12, -1)
        .gather(-1, x[:, 10:, None])
    )
    assert rows["continuation_perplexity"]["value"] == pytest.approx(
        np.exp(-log_p.mean().item()), rel=1e-4
    )
    assert {row["steps"] for row in score(world, written / "baseline", tmp_path).values()} == {None}


def test_documents_themselves_score_as_human_text(world, texts, tmp_path):
    """Written continuations that are the documents' own, and those of a random network: MAUVE tells them apart, self-BLEU sees the copies."""
    model = checkpoint.load_checkpoint(world.models / "teacher")
    ids = texts.numpy().repeat(3, 0)
    save_samples(
        world.models / "teacher",
        tmp_path,
        model,
        4,
        Samples(torch.from_numpy(ids), torch.full((60,), 4)),
        DrawOptions(),
        prompts=PROMPTS.model_dump(),
    )
    rows = score(world, tmp_path, tmp_path)
    assert rows["mauve"]["value"] > 0.99 and rows["self_bleu"]["value"] == pytest.approx(100)
    ids[:, 10:] = world.facts["vocab_size"] - 1
    save_samples(
        world.models / "teacher",
        tmp_path,
        model,
        4,
        Samples(torch.from_numpy(ids), torch.full((60,), 4)),
        DrawOptions(),
        prompts=PROMPTS.model_dump(),
    )
    assert score(world, tmp_path, tmp_path)["mauve"]["value"] < 0.1


def test_self_bleu_by_hand():
    assert self_bleu(np.arange(12)[None, None].repeat(5, 1)) == pytest.approx([100])
    assert self_bleu(np.arange(60).reshape(1, 5, 12)).tolist() == [0]
    assert self_bleu(np.array([[[1, 2, 3, 4], [1, 2, 3, 9]]])).tolist() == [
        0
    ]  # no common 4-gram, no smoothing
    x = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9, 9], [7, 7, 3, 4, 5, 6]]
    first = (
        6 / 6 * 5 / 5 * 4 / 4 * 2 / 3
    ) ** 0.25  # of its 4-grams only 2345 is in neither of the others
    others = (4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    clipped = (
        4 / 5 * 3 / 4 * 2 / 3 * 1 / 2
    ) ** 0.25  # a fifth 1 counts no more than the four of the other
    found = self_bleu(np.array(x)[None])
    assert found == pytest.approx([100 * (first + 2 * others) / 3])
    assert self_bleu(np.array([[[1, 1, 1, 1, 1], [1, 1, 1, 1, 2]]])) == pytest.approx(
        [100 * clipped]
    )


def test_distinct_of_a_group_counts_all_its_texts():
    assert distinct(np.array([[[1, 2, 3], [1, 2, 3]], [[1, 2, 3], [4, 5, 6]]]), 2).tolist() == [
        0.5,
        1,
    ]


def faults(world, written):
    """(flags that replace those of a good command, what is said)"""
    return [
        (
            {"num-prompts": 61},
            r"found \d+ held-out documents of document_tokens \(21\) or more, expected num_prompts \(61\)",
        ),
        ({"document-tokens": 500}, r"found 0 held-out documents of document_tokens \(500\)"),
        ({"document-tokens": 20}, r"document_tokens \(20\) must be at least 21"),
        ({"prompt-tokens": 120, "document-tokens": 131}, r"found 0 held-out documents"),
        ({"steps": 0}, "steps: found 0, expected a number above zero"),
    ]


@pytest.mark.parametrize("which", range(5))
def test_a_fault_is_one_sentence(world, written, which, tmp_path, capsys):
    import re

    given, said = faults(world, written)[which]
    flags = {
        "checkpoint": world.models / "teacher",
        "corpus": world.corpus,
        "output": tmp_path,
        "steps": 4,
        "device": "cpu",
    }
    flags |= {key.replace("_", "-"): value for key, value in PROMPTS.model_dump().items()} | given
    assert (
        main(
            [
                "continue-prompts",
                *(str(word) for key, value in flags.items() for word in (f"--{key}", value)),
            ]
        )
        == 1
    )
    error = capsys.readouterr().err
    assert re.search(said, error) and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_what_does_not_belong_together_is_named(world, written, tmp_path):
    meta = world.models / "teacher"
    short = shutil.copytree(meta, tmp_path / "short")
    write_json(short / "meta.json", read_json(short / "meta.json") | {"length": 16})
    with pytest.raises(HalfstepError, match=r"found 10 \+ 12, but a text of short has 16 tokens"):
        continue_prompts(short, world.corpus, tmp_path / "out", 4, PROMPTS, DrawOptions(), MACHINE)
    with pytest.raises(
        HalfstepError,
        match="samples without prompts; name folders that halfstep continue-prompts wrote",
    ):
        score(world, world.samples / "steps-8", tmp_path)
    facts = read_json(written / "teacher" / "samples.json")
    shifted = shutil.copytree(written / "teacher", tmp_path / "shifted")
    write_json(
        shifted / "samples.json",
        facts
        | {
            "prompts": facts["prompts"]
            | {"document_tokens": 32, "num_prompts": 5, "per_prompt": 12}
        },
    )
    with pytest.raises(HalfstepError, match="its prompts are not those of"):
        score(world, shifted, tmp_path)


def test_configuration_names_what_does_not_fit():
    whole = {
        "corpora": {"a": {"kind": "docs", "length": 64}}, "teachers": {"a-tiny": {"corpus": "a", "network": {"size": "tiny"}}},
        "continuations": {},
    }  # fmt: skip
    with pytest.raises(
        ConfigError,
        match=r"continuations: prompt_tokens \+ continuation_tokens are 50 \+ 50, but a window of corpus 'a' has 64",
    ):
        validate(whole)
    with pytest.raises(
        ConfigError, match=r"continuations: document_tokens \(20\) must be at least 99"
    ):
        validate(whole | {"continuations": {"document_tokens": 20}})
    assert validate(whole | {"continuations": None}).continuations is None
