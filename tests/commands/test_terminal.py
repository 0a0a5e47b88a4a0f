"""Texts on standard output: as they are drawn, and step by step on a terminal and in a pipe."""

import io
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from known import UNFRAMED
from pseudo import Terminal, without_escapes
from rich.cells import cell_len
from rich.console import Console
from small import MACHINE, call

import halfstep
from halfstep.commands import generate as module
from halfstep.commands import writers
from halfstep.commands.terminal import DenoisingView, document_end, step_color, text_pieces
from halfstep.commands.writers import encode_prompt, separate_documents, text_writer
from halfstep.config import DrawOptions, GenerateOptions
from halfstep.data.stories import sample_stories
from halfstep.data.tokenizer import EOS, train_bpe
from halfstep.diffusion.contracts import Samples
from halfstep.diffusion.plans import ancestral_plan
from halfstep.diffusion.samplers import SAMPLERS
from halfstep.diffusion.schedules import LogLinear
from halfstep.diffusion.watching import GIVEN, HIDDEN
from halfstep.distributed.group import Group
from halfstep.kernels.categorical import uniforms
from halfstep.sanitize import escape_controls

PROMPTS = ["", "Tom was", "Tom<|mask|> was <|mask|>"]


@pytest.fixture(scope="module")
def student(pipeline):
    return halfstep.load(pipeline.student, device="cpu")


@pytest.fixture
def printed(pipeline, capsys, tmp_path, monkeypatch):
    """What `halfstep generate` prints for the student, with further flags; it writes no file."""
    monkeypatch.chdir(tmp_path)

    def run(flags="", code=0, checkpoint=pipeline.student):
        assert call(f"generate --checkpoint {checkpoint} {MACHINE} {flags}") == code
        assert not list(tmp_path.iterdir())
        return capsys.readouterr()

    return run


def listed(texts: list[str]) -> str:
    """Several texts as they are printed; those of a model that learned nothing have any byte."""
    return escape_controls("".join(f"=== {i}\n{text}\n" for i, text in enumerate(texts)))


def test_one_text_of_eight_steps_is_printed_and_no_file_is_written(printed, student):
    assert printed().out == f"{escape_controls(halfstep.generate(student)[0])}\n"


def test_an_autoregressive_model_needs_no_step_count(printed, pipeline):
    found = printed("--num-samples 2", checkpoint=pipeline.baseline)
    texts = halfstep.generate(halfstep.load(pipeline.baseline), num_samples=2)
    assert found.out == listed(texts)
    assert "no effect" not in found.err


def test_printed_texts_are_those_that_are_written(printed, pipeline, student, tmp_path):
    flags = "--num-samples 5 --steps 4 --prompt Tom"
    found = printed(flags).out
    assert call(f"generate --checkpoint {pipeline.student} {MACHINE} {flags} --output out") == 0
    ids = torch.from_numpy(np.load(tmp_path / "out/samples.npy")).long()
    texts = separate_documents(student, Samples(ids, torch.ones(5)))
    assert found == listed(texts)


def test_several_sets_say_how_their_texts_are_drawn(printed):
    found = printed("--steps 2 4 --temperatures 0.7 1").out
    titles = re.findall("^=== (.*)$", found, re.MULTILINE)
    assert titles == [f"0, {n} steps{t}" for n in (2, 4) for t in (", temperature 0.7", "")]


def test_texts_appear_as_each_micro_batch_is_done(pipeline, monkeypatch):
    """The first two texts are on standard output before the third is begun."""
    seen, sample, out = [], writers.sample, io.StringIO()

    def noted(*given, **options):
        seen.append(out.getvalue().count("=== "))
        return sample(*given, **options)

    monkeypatch.setattr(writers, "sample", noted)
    monkeypatch.setattr(sys, "stdout", out)
    line = f"generate --checkpoint {pipeline.student} --num-samples 5 --steps 2 {MACHINE}"
    assert call(line.replace("--micro-batch 8", "--micro-batch 2")) == 0
    assert seen == [0, 2, 4]


def test_rank_0_prints_the_texts_of_all_ranks_in_order(printed, student, monkeypatch):
    """It draws the first two of five; the others reach it at the end."""
    alone = printed("--num-samples 5 --steps 4").out
    prompts = encode_prompt(student, "").expand(5, -1)
    writer = text_writer(student, student.length, 4, GenerateOptions())
    all_texts = writers.draw_texts(writer, prompts, 8)

    class FirstOfTwo(Group):
        def local_slice(self, n):
            return slice(0, 2)

        def gather_rows(self, rows):
            if rows is None:  # no passes of an autoregressive model
                return None
            assert len(rows) == 2
            return (all_texts.ids if rows.ndim == 2 else all_texts.network_evaluations).numpy()

    monkeypatch.setattr(module, "join_group", lambda machine: FirstOfTwo(0, 2))
    assert printed("--num-samples 5 --steps 4").out == alone


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_watched_text_has_the_same_ids(pipeline, student, sampler, prompt):
    asked = {"scorer": str(pipeline.baseline)} if sampler in ("energy", "speculative") else {}
    options, ids = DrawOptions(sampler=sampler, **asked), encode_prompt(student, prompt)[None]
    if sampler == "speculative" and (ids == student.mask_id).any():
        pytest.skip("it continues texts from left to right")

    def writer(show=None):
        return text_writer(student, student.length, 6, options, show=show)

    view = DenoisingView(student, 6, writer, Console(file=io.StringIO(), force_terminal=True))
    for i in range(3):
        plain, watched = writer()(ids, i), view(ids, i)
        assert torch.equal(plain.ids, watched.ids)
        assert torch.equal(plain.network_evaluations, watched.network_evaluations)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_in_a_pipe_each_step_is_a_line_and_the_text_follows(capsys, pipeline, student, prompt):
    """The texts are those without --watch; more of the text is there in each line."""
    words = ["generate", "--checkpoint", str(pipeline.student), *MACHINE.split(), "--steps", "6"]
    words += ["--num-samples", "2", "--prompt", prompt]
    assert halfstep.cli.main(words) == 0
    plain = capsys.readouterr().out
    assert halfstep.cli.main([*words, "--watch"]) == 0
    lines = capsys.readouterr().out.splitlines(keepends=True)
    steps = [line for line in lines if line.startswith("step ")]
    assert "".join(line for line in lines if line not in steps) == plain
    given = int((encode_prompt(student, prompt) != student.mask_id).sum())
    wanted = student.length - given
    found = [re.match(rf"step (\d) of 6 \| (\d+) of {wanted} tokens \| ", line) for line in steps]
    numbers = [tuple(map(int, match.groups())) for match in found]
    assert numbers.count((6, wanted)) == 2  # the last step of both texts
    first = numbers[: numbers.index((6, wanted)) + 1]
    assert first == sorted(set(first)) and len({count for _, count in first}) == len(first)
    for (_, count), line in zip(numbers, steps, strict=True):
        shown = line.split(" | ", 2)[2]
        assert shown.count("_") >= wanted - count  # the text may have one, too


def named_tokens(model) -> SimpleNamespace:
    """What the view reads of a model, with a word for each token."""
    words = SimpleNamespace(decode=lambda ids: "".join(f" w{token}" for token in ids))
    return SimpleNamespace(
        length=model.length,
        mask_id=model.mask_id,
        eos_id=model.eos_id,
        is_framed=model.is_framed,
        framing=model.framing,
        tokenizer=words,
    )


def test_tokens_have_the_color_of_their_step(student):
    """The plan of the sampler, which is drawn before it runs, says which step that is."""
    prompt = encode_prompt(student, PROMPTS[2])
    view = DenoisingView(
        named_tokens(student),
        4,
        lambda show: text_writer(student, student.length, 4, DrawOptions(), show=show),
        Console(file=io.StringIO(), force_terminal=True),
    )
    ids = view(prompt[None], 7).ids[0]
    frame = torch.full((student.length,), student.mask_id)
    frame[: len(prompt)] = prompt
    u = uniforms(1, 7, 1, 2 * student.length)[:, : student.length]
    plan = 1 + ancestral_plan(u.masked_fill(frame != student.mask_id, -1), 4, LogLinear())[0]
    plan[frame != student.mask_id] = GIVEN
    assert torch.equal(view.reveals.step_of, plan)
    body = view.body()
    for step in range(5):
        style = "bold" if step == GIVEN else step_color(step, 4)
        found = "".join(body.plain[one.start : one.end] for one in body.spans if one.style == style)
        tokens = [token for token in ids[plan == step].tolist() if token != student.eos_id]
        assert found.replace(" ¶ ", "") == "".join(f" w{token}" for token in tokens)


def test_every_step_has_a_color_of_its_own():
    for steps in (1, 2, 8, 64):
        colors = [step_color(step, steps) for step in range(1, steps + 1)]
        assert len(set(colors)) == steps and all(re.fullmatch("#[0-9a-f]{6}", c) for c in colors)
    assert step_color(1, 8) == step_color(1, 1024) and step_color(8, 8) == step_color(1024, 1024)


BPE = train_bpe(sample_stories(300, 1), 640)
MODEL = SimpleNamespace(tokenizer=BPE, eos_id=0, **UNFRAMED, mask_id=BPE.get_vocab_size())


@pytest.mark.parametrize(
    "text", [f"{EOS}One.{EOS}Two é 😀.{EOS}", f"cut.{EOS}{EOS}Two", f"{EOS}", "é", "😀" * 3]
)
def test_pieces_are_the_text(text):
    """Together they are what separate_documents gives, and each has the step of its last token."""
    ids = BPE.encode(text).ids
    pieces = text_pieces(MODEL, ids, list(range(len(ids))))
    assert ["".join(piece for piece, _ in pieces)] == separate_documents(
        MODEL, Samples(torch.tensor([ids]), torch.ones(1))
    )
    assert "\ufffd" not in "".join(piece for piece, _ in pieces)
    steps = [step for _, step in pieces]
    assert steps == sorted(set(steps))


def test_a_part_of_a_character_is_shown_until_the_rest_is_revealed():
    ids = BPE.encode("a😀").ids
    assert len(ids) > 2
    hidden = [*ids[:2], *[MODEL.mask_id] * (len(ids) - 2)]
    steps = [1, 2, *[HIDDEN] * (len(ids) - 2)]
    pieces = text_pieces(MODEL, hidden, steps)
    assert pieces[:2] == [("a", 1), ("\ufffd", 2)] and pieces[2:] == [("", HIDDEN)] * (len(ids) - 2)


def test_the_end_of_the_document_of_a_prompt():
    ids = torch.tensor([0, 5, 0, 6, 7, 0, 8, 0])
    assert [document_end(MODEL, ids, given) for given in (0, 1, 3, 6)] == [1, 3, 6, 8]
    assert document_end(MODEL, ids, 8) == document_end(MODEL, ids[:5], 3) + 3 == 8


def test_on_a_terminal_of_80_columns(pipeline):
    """Colors, no line that is wider, and the whole text at the end."""
    flags = [*MACHINE.split(), "--steps", "4", "--watch", "--prompt", PROMPTS[2]]
    with Terminal("generate", "--checkpoint", str(pipeline.student), *flags) as terminal:
        assert terminal.end() == 0
    shown = without_escapes(terminal.printed)
    assert "\x1b[38;2;" in terminal.printed and "░░░" in shown and "\\x1b" not in shown
    assert all(cell_len(line) <= 80 for line in re.split(r"[\r\n]+", shown))
    assert re.search(r"step 4 of 4 ■■■■ \| (\d+) of \1 tokens \| bold: given[^░]*$", shown)


def test_escape_codes_of_a_tokenizer_do_not_reach_the_terminal(pipeline, tmp_path):
    """A hostile vocabulary; what rich draws is the only escape code."""
    model = halfstep.load(pipeline.student, device="cpu")
    bad = SimpleNamespace(
        tokenizer=SimpleNamespace(decode=lambda ids: "\x1b]0;title\x07"),
        **{name: getattr(model, name) for name in ("length", "mask_id", "eos_id")},
    )
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="truecolor", width=80)

    def writer(show):
        return text_writer(model, model.length, 2, DrawOptions(), show=show)

    DenoisingView(bad, 2, writer, console)(encode_prompt(model, "Tom")[None], 0)
    assert "\\x1b]0;title" in out.getvalue()
    assert "\x1b]" not in out.getvalue() and "\x07" not in out.getvalue()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--watch --output out", "--watch: found --output out too, which writes files"),
        ("--steps 0", "--steps: found [0]: input should be greater"),
        ("--steps 99 --sampler first_hitting", "steps: found 99, but sampler first_hitting takes"),
    ],
)
def test_what_cannot_be_shown_is_refused(printed, flags, words):
    found = printed(flags, code=1)
    assert words in found.err and found.out == ""


def test_only_a_diffusion_model_can_be_watched(printed, pipeline):
    found = printed("--watch", code=1, checkpoint=pipeline.baseline)
    assert "--watch: found an autoregressive model" in found.err and found.out == ""
