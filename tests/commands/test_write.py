"""`halfstep write`: one answer per line, and a fault of a line does not end the loop."""

import io
import re
import sys

import pytest
from pseudo import Terminal, without_escapes
from small import MACHINE

import halfstep
from halfstep.cli import main
from halfstep.commands.write import HELP
from halfstep.data.tokenizer import EOS
from halfstep.sanitize import one_line

WHERE = MACHINE.replace(" --micro-batch 8", "").split()


@pytest.fixture
def write(pipeline, capsys, monkeypatch):
    """The answers to lines, as a program on the other side of a pipe reads them."""

    def run(*lines, model=pipeline.student, flags=(), last="\n"):
        typed = "\n".join(lines) + last
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
        assert main(["write", str(model), *WHERE, *flags]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def document(model, prompt, number=0, **options):
    """Text `number` of the public function, up to its first end of a document, on one line."""
    text = halfstep.generate(model, num_samples=number + 1, prompt=prompt, **options)[number]
    shown = text.removeprefix(f"\n{EOS}\n")
    return one_line(shown.split(f"\n{EOS}\n")[0])


@pytest.fixture(scope="module")
def student(pipeline):
    return halfstep.load(pipeline.student, device="cpu")


@pytest.mark.parametrize("prompt", ["Tom was", "Tom<|mask|> was <|mask|>"])
def test_a_line_is_continued_and_filled_in_as_by_generate(write, student, prompt):
    """/again is the next text of the same seed, and a new line begins with the first."""
    found = write(prompt, "/again", "/again", prompt)
    expected = [document(student, prompt, number) for number in (0, 1, 2, 0)]
    assert found == expected and len(set(expected)) == 3


def test_commands_change_how_the_next_text_is_written(write, student):
    lines = ["Tom", "/steps 3", "Tom", "/temperature 0.5", "Tom", "/seed 9", "Tom", "/again"]
    how = [{"steps": 8}, {"steps": 3}, {"steps": 3, "temperature": 0.5}]
    how.append(how[-1] | {"seed": 9})
    texts = [document(student, "Tom", **options) for options in how]
    found = write(*lines)
    assert found == [
        *(texts[0], "steps: 3", texts[1], "temperature: 0.5", texts[2], "seed: 9", texts[3]),
        document(student, "Tom", 1, **how[-1]),
    ]
    assert len({*texts[1:], found[-1]}) == 4


def test_flags_are_where_it_begins(write, student):
    flags = ["--steps", "3", "--temperature", "0.5", "--sampling-seed", "9"]
    assert write("Tom", "/steps", "/seed", flags=flags) == [
        document(student, "Tom", steps=3, temperature=0.5, seed=9),
        "steps: 3",
        "seed: 9",
    ]


def test_a_sampler_of_its_own_pace_has_as_many_steps_as_a_text_has_tokens(write, student):
    """Unless a person names a number, which is then its limit."""
    text = document(student, "Tom", sampler="threshold", steps=24)
    found = write("Tom", "/steps", "/steps 3", "Tom", flags=["--sampler", "threshold"])
    assert found[:3] == [text, "steps: 24", "steps: 3"]
    assert found[3] == document(student, "Tom", sampler="threshold", steps=3)


FAULTS = [
    ("/frobnicate", "/frobnicate: unknown command; /help lists all"),
    ("/", "/: unknown command"),
    ("/again", "/again: there is no text yet; type one"),
    ("/steps many", "/steps: found 'many'"),
    ("/steps 0", "/steps: found '0': input should be greater than or equal to 1"),
    ("/temperature -1", "/temperature: found '-1': input should be greater than 0"),
    ("/seed 1.5", "/seed: found '1.5'"),
    ("kite " * 100, "prompt: .* tokens with BOS, but a text of this model has 24; shorten"),
    ("/\x1b[31m", r"/\\x1b\[31m: unknown command"),
]


@pytest.mark.parametrize(("line", "fault"), FAULTS, ids=[fault for _, fault in FAULTS])
def test_a_bad_line_is_answered_by_one_line_and_changes_nothing(write, student, line, fault):
    first, second = write(line, "Tom")
    assert re.match(fault, first)
    assert second == document(student, "Tom", steps=8)


def test_a_step_count_that_the_sampler_refuses_changes_nothing(write):
    found = write("/steps 99", "/steps", flags=["--sampler", "first_hitting"])
    assert found[0].startswith("steps: found 99, but sampler first_hitting takes at most 24 steps")
    assert found[1] == "steps: 8"


def test_bytes_that_are_no_text_are_no_end(write, monkeypatch, capsys, pipeline):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n/seed 3\n")))
    assert main(["write", str(pipeline.student), *WHERE]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1] == "seed: 3"


def test_quit_and_the_end_of_the_input_end_it(write, student):
    assert write("/seed 1", "/quit", "Tom") == ["seed: 1"]
    assert write("/help", "/seed 2", last="") == [HELP, "seed: 2"]
    assert write(last="") == []


def test_a_line_without_a_text_is_answered_by_any_text(write, student):
    assert write("") == [document(student, "")]


def test_an_autoregressive_model_continues_and_fills_nothing_in(write, pipeline):
    found = write("Tom", "Tom<|mask|>", "/steps 4", "Tom", model=pipeline.baseline)
    text = document(halfstep.load(pipeline.baseline, device="cpu"), "Tom")
    assert found[0] == found[3] == text
    assert "an autoregressive model cannot fill in a position" in found[1]
    assert "takes one step per token" in found[2]


def test_a_person_has_colors_and_the_earlier_lines(pipeline):
    """Arrow up brings the last line back; Ctrl-C drops a line, and Ctrl-D ends with code 0."""
    with Terminal("write", str(pipeline.student), *WHERE) as terminal:
        first = terminal.read_until(r"> $")
        assert HELP[:30] in without_escapes(first)
        answered = r"step 8 of 8 ■{8} \| bold: given\s+> $"
        terminal.press("Tom was\n")
        assert "\x1b[38;2;" in terminal.read_until(answered)
        terminal.press("\x1b[A\n")
        assert "Tom was" in without_escapes(terminal.read_until(answered))
        terminal.press("half a line")
        terminal.read_until(r"half a line$")
        terminal.interrupt()
        terminal.read_until(r"> $")
        terminal.press("/seed 5\n")
        assert "seed: 5" in terminal.read_until(r"> $")
        terminal.press("\x04")
        assert terminal.end() == 0
