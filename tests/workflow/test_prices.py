"""Prices of jobs: assumed, measured by finished jobs, or a time limit; and those of all presets."""

import pytest
import yaml
from dryrun import REPOSITORY

from halfstep.commands.plan import ATTEMPTS, LOCAL, PricedJobs, late_lines
from halfstep.files import write_atomic, write_json
from halfstep.models.flops import denoiser_shape, forward_flops
from halfstep.workflow.graph import PlannedJob
from halfstep.workflow.prices import START_S, STARTS, Prices
from halfstep.workflow.rates import CPU_SPEED, Rates
from halfstep.workflow.work import CORPUS_TOKENS, WORK

TEACHER = "results/models/t/teacher"
PRESETS = sorted(file.stem for file in (REPOSITORY / "workflow/presets").glob("*.yaml"))


def job(line: str, outputs: tuple[str, ...] = (), gpu: int = 0, runtime: float = 60) -> PlannedJob:
    words = ["halfstep", *line.split()]
    rule = words[1].replace("-", "_")
    return PlannedJob(rule, [], list(outputs), gpu, runtime, command=words)


def record(results, output: str, seconds: int, line: str) -> None:
    """Write the provenance record of a finished job."""
    hours, rest = divmod(seconds, 3600)
    content = {
        "format": 1,
        "outputs": {},
        "inputs": {},
        "command": ["halfstep", *line.split()],
        "started": "2026-11-21T00:00:00+00:00",
        "ended": f"2026-11-21T{hours:02d}:{rest // 60:02d}:{rest % 60:02d}+00:00",
    }
    write_json(results / output, content)


CORPUS = job("prepare-corpus --output results/data/c --kind files --length 128 --vocab-size 1000")
PRETRAIN = f"pretrain --corpus results/data/c --output {TEACHER} --size small --num-steps 1000 "
PRETRAIN += "--batch-size 512 --validate-every 1000"


def test_a_training_is_priced_as_by_hand(tmp_path):
    """6 operations per weight and token, and attention: 12 length width in each block. Half of the
    positions have logits; the last block's output and MLP are needed there only."""
    train = job(f"{PRETRAIN} --processes 2", gpu=2)
    prices = Prices([CORPUS, train], tmp_path, Rates("a100"))
    seconds, source = prices.price(train)
    tokens, width = 1000 * 512 * 128, 768
    block = 6 * 12 * width**2 + 12 * 128 * width
    work = tokens * (12 * block - 6 * 9 * width**2 / 2 + 6 * width * 1000 / 2)
    validation = forward_flops(denoiser_shape(12, 768, 1000, 128), 512, 128, 512 * 64)
    speed = 2 * 312e12 * 0.4 * 768 / 1344
    assert source == "assumed"
    assert seconds == pytest.approx(START_S + (work + validation) / speed, rel=1e-3)


def test_a_cpu_shares_a_job_among_its_threads(tmp_path):
    one, four = (job(f"{PRETRAIN} --threads {threads}") for threads in (1, 4))
    prices = Prices([CORPUS, one], tmp_path)
    seconds = [prices.price(train).seconds - START_S for train in (one, four)]
    assert seconds[0] == pytest.approx(4 * seconds[1])
    call = prices.call(one)
    assert seconds[0] == pytest.approx(sum(w.flops for w in WORK["pretrain"](call)) / CPU_SPEED)


def test_a_command_without_work_takes_its_start_and_an_unknown_one_its_limit(tmp_path):
    naive = job(f"draw-naive --output results/samples/t/naive {TEACHER}")
    unknown = job(f"score-riddles --checkpoint {TEACHER}", runtime=120)
    judge = job(f"score-corpus --judge nobody/knows-this --output {TEACHER}", runtime=30)
    prices = Prices([CORPUS, job(PRETRAIN), naive, unknown, judge], tmp_path)
    assert prices.price(naive) == (STARTS["draw-naive"], "assumed")
    assert prices.price(unknown) == (7200, "limit") and prices.price(judge) == (1800, "limit")


def test_a_finished_job_is_the_measure_of_its_kind(tmp_path):
    """A tenth of the steps took 1,000 s on four GPUs, so this one takes 20,000 s on two. A job of
    unknown work takes as long as another one took."""
    train = job(f"{PRETRAIN} --processes 2", gpu=2)
    riddles = job(f"score-riddles --checkpoint {TEACHER}")
    models = tmp_path / "models"
    for broken in ("u/teacher/meta.json", "v/teacher/meta.json", "v/provenance.json"):
        write_json(models / broken, {})  # a price never stops a run
    shorter = PRETRAIN.replace("--num-steps 1000 ", "--num-steps 100 ").replace("/t/", "/u/")
    shorter = shorter.replace("--validate-every 1000", "--validate-every 100 --processes 4")
    record(tmp_path, "models/u/teacher/provenance.json", 1000, shorter)
    scored = "score-riddles --checkpoint results/models/t/teacher"
    record(tmp_path, "metrics/u/teacher/riddles.provenance.json", 77, scored)
    prices = Prices([CORPUS, train, riddles], tmp_path)
    seconds, source = prices.price(train)
    assert source == "measured" and seconds == pytest.approx(20_000, rel=0.02)
    assert prices.price(riddles) == (77, "measured")
    baseline = job(PRETRAIN.replace("pretrain", "train-baseline").replace("teacher", "baseline"))
    assert prices.price(baseline).source == "assumed"


def test_a_job_that_hardly_computes_measures_no_speed(tmp_path):
    """One text of one step took 9 s, nearly all of it to start; that is no speed of many texts."""
    train = job(PRETRAIN.replace("--size small", "--size tiny"))
    texts = job(f"generate --checkpoint {TEACHER} --num-samples 64 --steps 64 --micro-batch 1")
    one = f"generate --checkpoint {TEACHER} --num-samples 1 --steps 1 --micro-batch 1"
    alone = Prices([CORPUS, train, texts], tmp_path).price(texts)
    record(tmp_path, "samples/t/teacher/provenance.json", 9, one)
    assert Prices([CORPUS, train, texts], tmp_path).price(texts) == alone
    assert alone.source == "assumed"


def test_a_frontier_costs_its_sets(tmp_path):
    """Three step counts and two temperatures; all steps but the last few reveal a token."""
    common = f"--checkpoint {TEACHER} --num-samples 64 --micro-batch 1"
    prices = Prices([CORPUS, job(PRETRAIN)], tmp_path)
    one = [job(f"generate {common} --steps {steps}") for steps in (4, 8)]
    both = job(f"generate {common} --steps 4 8 --temperatures 0.7 0.8")
    seconds = [prices.price(each).seconds - START_S for each in (*one, both)]
    assert seconds[2] == pytest.approx(2 * (seconds[0] + seconds[1]))
    assert prices.kind(both.command) == prices.kind(one[0].command)


def test_a_checkpoint_is_its_weights_and_two_moments(tmp_path):
    weights = tuple(f"{TEACHER}/{name}.safetensors" for name in ("model", "optimizer"))
    train = job(PRETRAIN, weights)
    rows = job(f"score-lambada --checkpoint {TEACHER}", ("results/metrics/t/optimizer/l.json",))
    prices = Prices([CORPUS, train], tmp_path)
    parameters = denoiser_shape(12, 768, 1000, 128).parameters
    assert prices.disk(train) == 4 * 3 * parameters and prices.disk(rows) == 0
    unknown = job("import --output results/models/other/teacher", weights)
    assert prices.disk(unknown) == 0
    text = job("prepare-corpus --output results/data/o --kind openwebtext --length 1024")
    assert prices.disk(text) == 6 * CORPUS_TOKENS["openwebtext"]  # ids of 2 bytes, and text


def test_the_paper_sizes_are_those_of_its_table():
    """SDTT table 2: 169M, 424M and 863M."""
    for shape, millions in (((12, 768), 169), ((24, 1024), 424), ((24, 1536), 863)):
        parameters = denoiser_shape(*shape, 50_257, 128).parameters
        assert parameters == pytest.approx(millions * 1e6, rel=0.01)


def test_trainings_are_submitted_as_often_as_the_profile_says():
    profile = yaml.safe_load((REPOSITORY / "workflow/profiles/slurm/config.yaml").read_text())
    assert profile["retries"] + 1 == ATTEMPTS


@pytest.mark.parametrize("preset", PRESETS)
def test_no_job_of_a_preset_is_estimated_above_its_time_limit(workflow, tmp_path, preset):
    """On H100s. A training may take the four limits of its submissions, because it saves its state
    before each of them ends and exits with code 75. Nothing else is priced by its limit alone."""
    if preset == "own-model":  # the text of its user
        write_atomic(workflow.folder / "text/one.txt", b"One day.\n\nTwo days.\n")
    graph = workflow.graph("all", "--profile", "slurm", "--config", f"preset={preset}")
    jobs = [one for one in graph.jobs if one.rule not in LOCAL]
    priced = PricedJobs(jobs, tmp_path, Rates())
    assert jobs and all(one.runtime for one in jobs)
    assert {one.rule for one, found in priced.paid() if found.source == "limit"} == set()
    assert late_lines(priced) == []
    if preset == "sdtt-small":  # a weekend of one GPU
        assert sum(found.seconds * one.gpu for one, found in priced.paid()) / 3600 < 60
