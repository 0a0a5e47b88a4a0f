"""The work of each command against torch's counter of the operations that the command ran."""

import pytest
from small import MACHINE, TRAINING, done
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from halfstep.cli import COMMANDS
from halfstep.commands import evaluate, training_job, variety
from halfstep.data.corpora import CORPORA
from halfstep.diffusion.samplers import SAMPLERS
from halfstep.diffusion.schedules import SCHEDULES, masked_share
from halfstep.kernels import linear
from halfstep.metrics import lambada
from halfstep.models import flops
from halfstep.workflow import work as module
from halfstep.workflow.calls import Call
from halfstep.workflow.drawing import SAMPLER_PASSES, nonempty_steps
from halfstep.workflow.prices import Prices
from halfstep.workflow.rates import Rates
from halfstep.workflow.work import MASKED, WORK

PROMPTS = "--num-prompts 3 --per-prompt 6 --prompt-tokens 8 --continuation-tokens 12"
PROMPTS += " --document-tokens 20"


@pytest.fixture
def counted(pipeline, monkeypatch):
    """The FLOPs of `halfstep <line>` as torch counts them, over those of WORK."""
    monkeypatch.setattr(linear, "LARGE", 2**60)  # oneDNN's products are not counted
    facts = Prices([], pipeline.results).facts

    def ratio(line: str) -> float:
        words = ["halfstep", *line.split()]
        facts.note(words)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            done(line)
        call = Call(words, facts, Rates())
        return counter.get_total_flops() / sum(part.flops for part in WORK[words[1]](call))

    return ratio


def test_trainings_and_their_validations(pipeline, counted, tmp_path):
    """A baseline reads all but the last token of a window, 23 of 24, and half of a round's cost
    depends on its masks."""
    models = tmp_path / "models/stories-tiny"
    options = f"--corpus {pipeline.corpus} {TRAINING} {MACHINE}"
    pretrain = f"pretrain --size tiny --output {models}/teacher {options}"
    baseline = f"train-baseline --size tiny --output {models}/baseline {options}"
    distill_round = "distill-round --round 1 --rounds 2 --teacher-steps 16 "
    distill_round += f"--teacher {pipeline.teacher} --output {models}/kl_backward/round-1 {options}"
    assert counted(pretrain) == pytest.approx(1, abs=0.02)
    assert counted(baseline) == pytest.approx(23 / 24, abs=0.02)
    assert counted(distill_round) == pytest.approx(1, abs=0.04)


@pytest.mark.parametrize("how, tolerance", [
    ("generate --steps 3", 0.04),
    ("generate --steps 16", 0.08),  # whose empty steps are drawn
    ("generate --steps 4 --sampler first_hitting", 0.04),
    ("generate --steps 4 --sampler block", 0.15),  # with texts of two blocks
    ("generate --steps 4 --sampler ancestral_float32", 0.04),
    ("generate --steps 2 4 --temperatures 0.7 1.2", 0.04),
    (f"continue-prompts --steps 3 {PROMPTS}", 0.04),
])  # fmt: skip
def test_samples_of_a_denoiser(pipeline, counted, tmp_path, how, tolerance):
    number = "" if "prompts" in how else "--num-samples 20"
    corpus = f"--corpus {pipeline.corpus}" if "prompts" in how else ""
    folder = f"{tmp_path}/x-{{steps}}" if how.startswith("generate") else f"{tmp_path}/x"
    line = f"{how} {number} {corpus} --checkpoint {pipeline.teacher} --output {folder}"
    assert counted(f"{line} {MACHINE}") == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("sampler, least", [
    ("threshold --threshold 1", 0.9),
    ("entropy_bounded --entropy-bound 0", 0.9),
    ("remask --eta 0.5", 0.5),
    ("energy --candidates 3", 0.9),
    ("speculative --draft-tokens 1", 0.5),  # if all are accepted, half as many drafts
])  # fmt: skip
def test_samplers_whose_passes_depend_on_the_text_are_priced_at_their_most(
    pipeline, counted, tmp_path, sampler, least
):
    """With options that make most of them."""
    asked = "energy" in sampler or "speculative" in sampler
    scorer = f"--scorer {pipeline.baseline}" if asked else ""
    line = f"generate --steps 24 --num-samples 20 --sampler {sampler} {scorer}"
    found = counted(f"{line} --checkpoint {pipeline.teacher} --output {tmp_path}/x {MACHINE}")
    assert least <= found < 1.1


@pytest.mark.parametrize("how", ["generate --steps 24 --num-samples 20", "continue-prompts"])
def test_samples_of_a_baseline(pipeline, counted, tmp_path, how):
    """The last token of a text is not read, and a prompt's first ones have fewer keys."""
    if how == "continue-prompts":
        how += f" --steps 3 {PROMPTS} --corpus {pipeline.corpus}"
    line = f"{how} --checkpoint {pipeline.baseline} --output {tmp_path}/x {MACHINE}"
    assert counted(line) == pytest.approx(0.93, abs=0.04)


def test_scores(pipeline, counted, tmp_path, monkeypatch):
    """The judge is the baseline, so it scores texts by both protocols."""
    for one in (variety, module):
        monkeypatch.setattr(one, "MAUVE_TEXTS", 10)
    samples = f"{tmp_path}/samples/stories-tiny/teacher"
    draw = f"--num-samples 20 --checkpoint {pipeline.teacher} {MACHINE}"
    for steps in (2, 4):
        counted(f"generate --steps {steps} {draw} --output {samples}/steps-{steps}")
    folders = f"--samples {samples}/steps-2 {samples}/steps-4"
    swept = f"{folders} --frontier {samples}/steps-2 {samples}/steps-4"
    judge = f"--judge {pipeline.baseline}/hf --corpus {pipeline.corpus} --bootstrap 100 {MACHINE}"
    output = f"--output {tmp_path}/metrics/stories-tiny"
    held_out = f"--held-out {pipeline.metrics}/data.json"
    for line in (
        f"score-samples {folders} {output}/teacher/samples.json",
        f"score-corpus {output}/data.json",
        f"score-frontier {swept} {held_out} {output}/teacher",
        f"score-frontier {swept} {held_out} {output}/teacher/sure --variant sure",
    ):
        assert counted(f"{line} {judge}") == pytest.approx(1, abs=0.02), line


def test_infilling(world, monkeypatch, tmp_path):
    """The number of masked positions is only known on average."""
    monkeypatch.setattr(linear, "LARGE", 2**60)
    facts = Prices([], world.root).facts
    facts.note_results(world.root)
    facts.sizes["stories-tiny"], facts.corpora["stories-tiny"] = "tiny", "stories"
    line = f"score-infilling --checkpoint {world.models}/teacher --corpus {world.corpus} "
    line += f"--output {tmp_path}/metrics/stories-tiny/teacher/infilling.json "
    line += f"--infilling-items 6 --lambada last_words --bootstrap 100 {MACHINE}"
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        done(line)
    call = Call(["halfstep", *line.split()], facts, Rates())
    expected = sum(part.flops for part in WORK["score-infilling"](call))
    assert counter.get_total_flops() / expected == pytest.approx(1, abs=0.35)


def test_scores_of_continuations(pipeline, counted, tmp_path):
    more = f"{tmp_path}/continuations/stories-tiny/teacher/steps-3"
    options = f"--steps 3 {PROMPTS} --checkpoint {pipeline.teacher} --corpus {pipeline.corpus}"
    counted(f"continue-prompts {options} --output {more} {MACHINE}")
    judge = f"--judge {pipeline.baseline}/hf --corpus {pipeline.corpus} --bootstrap 100 {MACHINE}"
    output = f"--output {tmp_path}/metrics/stories-tiny/teacher/continuations.json"
    assert counted(f"score-continuations --samples {more} {output} {judge}") == pytest.approx(1)


@pytest.mark.parametrize("kind", ["teacher", "baseline"])
def test_last_words(pipeline, counted, tmp_path, monkeypatch, kind):
    """Items fill the window of 24 tokens, and their last words have several tokens.

    elbo-mc draws its masks from those that elbo-exact has.
    """
    passes: list[float] = []
    ask = lambada.HalfstepLM.passes

    def spy(*args):
        found = ask(*args)
        passes.append(found)
        return found

    monkeypatch.setattr(lambada.HalfstepLM, "passes", spy)
    options = f"--corpus {pipeline.corpus} --lambada last_words --bootstrap 100 {MACHINE}"
    output = f"--output {tmp_path}/metrics/stories-tiny/{kind}/lambada.json"
    models = [f"{pipeline.models}/{kind}"]
    if kind == "teacher":
        models += [f"{pipeline.models}/kl_backward/round-1"]
    found = counted(f"score-lambada --checkpoint {' '.join(models)} {output} {options}")
    of_each = sum(passes[0].get(name, 0) for name in ("ar", "confidence"))
    of_each += 2 * passes[0].get("elbo-exact", 0)
    assumed = module.LAST_WORDS.passes if kind == "teacher" else 1
    assert of_each / assumed * 0.5 < found < of_each / assumed * 1.1


def test_timings(pipeline, counted, tmp_path):
    """One warm-up and three repeats of students and of the baseline in each batch."""
    line = f"latency --checkpoint {pipeline.teacher} --baseline {pipeline.baseline} --lengths 16 "
    line += "--batch-sizes 1 4 --benchmark-steps 2 4 --baselines halfstep --repeats 3 "
    line += f"--output {tmp_path}/benchmarks/stories-tiny/latency.json --device cpu --threads 1"
    assert counted(line) == pytest.approx(1, abs=0.06)


def test_timings_of_a_variant(pipeline, counted, tmp_path):
    """Two students write as `generate` does, in turns with the baseline."""
    students = f"{pipeline.teacher} {pipeline.models}/kl_backward/round-1"
    line = f"latency --checkpoint {students} --baseline {pipeline.baseline} --lengths 24 "
    line += "--batch-sizes 4 --benchmark-steps 24 --baselines halfstep --repeats 3 --variant sure "
    line += f"--sampler threshold --threshold 1 --device cpu --threads 1 --output {tmp_path}/"
    assert 0.9 < counted(f"{line}benchmarks/stories-tiny/trained/variant-sure.json") < 1.1


def test_shares_of_masked_tokens_are_those_of_training():
    assert MASKED.keys() == SCHEDULES.keys() and {*SAMPLER_PASSES, "speculative"} == SAMPLERS.keys()
    for name, schedule in SCHEDULES.items():
        assert masked_share(schedule()) == pytest.approx(MASKED[name], rel=2e-3)


def test_steps_that_reveal_a_token():
    """Two positions and two steps: both in one step, or one in each."""
    assert nonempty_steps(2, 2) == 1.5
    assert nonempty_steps(1, 50) == 1 and nonempty_steps(8, 1024) == pytest.approx(8)
    assert nonempty_steps(10**6, 10) == pytest.approx(10, rel=1e-4)


def test_numbers_that_other_modules_have():
    """The rules start without torch, so these numbers are written twice."""
    assert module.VALIDATION_WINDOWS == training_job.VALIDATION_WINDOWS
    assert (module.WATCHED, module.WATCHED_STEPS) == (
        training_job.WATCHED,
        training_job.WATCHED_STEPS,
    )
    assert (module.DATA_WINDOWS, module.MAUVE_TEXTS) == (variety.DATA_WINDOWS, variety.MAUVE_TEXTS)
    assert evaluate.DATA_WINDOWS == module.DATA_WINDOWS and WORK.keys() <= COMMANDS.keys()
    assert {"docs", "openwebtext"} == module.CORPUS_TOKENS.keys() <= CORPORA.keys()


def test_a_decoder_moves_its_weights_at_every_step():
    """4 bytes of each weight for each of 8 tokens, and on average half of a text's keys, values."""
    network = flops.causal_shape(2, 16, 100)
    work = module.decode_work(network, 6, 2, 8, 8, "float32")
    cache = sum(6 * read * 2 * 16 * 2 for read in range(1, 9))  # texts, tokens, both, width, blocks
    assert work.moved == pytest.approx(4 * (2 * 8 * network.weights + cache), rel=0.02)
    assert module.decode_work(network, 6, 2, 8, 8, "bfloat16").moved == work.moved / 2
