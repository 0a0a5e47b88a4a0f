"""Every command computes in the precision that it is given, and its output says so."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import MACHINE, TRAINING, done
from torch.overrides import TorchFunctionMode

import halfstep
from halfstep.checkpoint import load_checkpoint
from halfstep.diffusion.contracts import Draws
from halfstep.diffusion.samplers import sample
from halfstep.files import read_json
from halfstep.kernels.precision import computing
from halfstep.metrics.perplexity import load_judge, token_nll

PRECISIONS = ("float32", "bfloat16")
CPU = torch.device("cpu")
PROMPTS = "--num-prompts 20 --per-prompt 3 --prompt-tokens 10 --continuation-tokens 12"


class Attention(TorchFunctionMode):
    """Notes whether autocast is on wherever a network attends, which all networks do."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.found.add(torch.is_autocast_enabled("cpu"))
        return func(*args, **(kwargs or {}))


def autocast_in(line: str) -> set[bool]:
    """Whether autocast was on while the networks of a command ran: one value, or both."""
    with Attention() as attention:
        done(line)
    return attention.found


@pytest.fixture(scope="module", params=PRECISIONS)
def written(request, pipeline, world, tmp_path_factory):
    """The commands in one precision: what they wrote, and whether autocast was on in each."""
    root, precision = tmp_path_factory.mktemp("written"), request.param
    found, how = {}, f"--precision {precision} {MACHINE}"
    training = TRAINING.replace("float32", precision)
    trained = f"--corpus {pipeline.corpus} --size tiny {training} {MACHINE}"
    line = f"distill-round --round 1 --teacher {pipeline.teacher} --corpus {pipeline.corpus}"
    line += f" --rounds 2 --teacher-steps 16 {training} {MACHINE}"
    lines = {"pretrain": f"pretrain {trained}", "train-baseline": f"train-baseline {trained}"}
    lines["distill-round"] = line
    judged = f"--corpus {pipeline.corpus} --judge {pipeline.baseline}/hf --bootstrap 100 {how}"
    for name in ("teacher", "baseline"):
        model = f"--checkpoint {getattr(pipeline, name)}"
        lines[f"generate {name}"] = f"generate {model} --steps 8 --num-samples 4 {how}"
        lines[f"generate-frontier {name}"] = (
            f"generate {model} --steps 8 --temperatures 0.7 --num-samples 4 {how}"
        )
        lines[f"continue-prompts {name}"] = (
            f"continue-prompts --checkpoint {world.models}/{name} --corpus {world.corpus} "
            f"--steps 4 {PROMPTS} --document-tokens 21 {how}"
        )
        lines[f"score-lambada {name}"] = (
            f"score-lambada {model} --corpus {pipeline.corpus} --lambada last_words "
            f"--lambada-items 2 --bootstrap 100 {how}"
        )
    drawn = f"{root}/generate-frontier-teacher"
    samples = f"{root}/generate-teacher --frontier {root}/generate-teacher {drawn}/temperature-0.7"
    lines["score-corpus"] = f"score-corpus {judged}"
    lines["score-samples"] = f"score-samples --samples {root}/generate-teacher {judged}"
    held_out = f"--held-out {root}/score-corpus"
    lines["score-frontier"] = f"score-frontier --samples {samples} {held_out} {judged}"
    lines["score-continuations"] = (
        f"score-continuations --samples {root}/continue-prompts-teacher --corpus {world.corpus} "
        f"--judge {world.models}/baseline/hf --bootstrap 100 {how}"
    )
    for name, line in lines.items():
        found[name] = autocast_in(f"{line} --output {root}/{name.replace(' ', '-')}")
    return SimpleNamespace(root=root, precision=precision, found=found)


def test_every_command_computes_in_its_precision(written):
    """In all passes: training, validation, entropy watch, draws, judges, last words."""
    expected = {written.precision == "bfloat16"}
    assert written.found == dict.fromkeys(written.found, expected) and len(written.found) == 15
    assert not torch.is_autocast_enabled("cpu")
    assert torch.get_float32_matmul_precision() == "highest"


def test_samples_and_rows_name_their_precision(written):
    root, precision = written.root, written.precision
    for name in ("generate-teacher", "generate-baseline", "continue-prompts-baseline"):
        assert read_json(root / name / "samples.json")["precision"] == precision
    names = ("score-samples", "score-continuations", "score-lambada-teacher")
    for name in (*names, "score-frontier/samples.json", "score-frontier/frontier.json"):
        assert {row["precision"] for row in read_json(root / name)} == {precision}
    data = read_json(root / "score-corpus")
    assert {row["precision"] for row in data} == {None}  # no model wrote it
    judge = {"float32": "float32", "bfloat16": "bfloat16 autocast"}[precision]
    assert {row["judge_dtype"] for row in data if row["judge"]} == {judge}


def test_float32_is_what_torch_computes_by_itself(written, pipeline):
    """The context changes no bit; bfloat16 draws from almost the same law by the same numbers."""
    model = load_checkpoint(pipeline.teacher)
    expected = sample(model.denoiser.inference_copy, 4, model.length, 8, draws=Draws(1)).ids
    found = np.load(written.root / "generate-teacher/samples.npy")
    equal = (found == expected.numpy()).mean()
    assert equal == 1 if written.precision == "float32" else 0.5 < equal


def test_bfloat16_logits_are_float32_ones_up_to_rounding(world):
    """log p of the same texts, by a denoiser and by a judge.

    Three blocks round a dozen products each to 2^-9; errors add up like a random walk, so a few
    eps of the spread of the logits are allowed. Rows of log p sum to one as in float32.
    """
    eps, log_p = torch.finfo(torch.bfloat16).eps, []
    x = torch.from_numpy(world.held_out[:4].astype(np.int64))
    for precision in PRECISIONS:
        model = load_checkpoint(world.models / "teacher", precision=precision)
        torch.manual_seed(1)
        for p in model.network.blocks.parameters():  # gates are zero at the start
            p.copy_(torch.randn(p.shape) / p.shape[-1] ** 0.5)
        xt = x.masked_fill(torch.arange(x.shape[1]) % 2 == 1, model.mask_id)
        with torch.no_grad(), computing(CPU, precision):
            h = model.denoiser.features(xt, torch.full((len(x),), 0.5), xt == model.mask_id)
            log_p.append(model.denoiser.log_p(h))
    exact, low = log_p
    assert low.dtype == torch.float32 and not torch.equal(exact, low)
    assert (low - exact).abs().max() < 4 * eps * (exact.max() - exact.min())
    assert torch.allclose(low.exp().sum(-1), torch.ones(()), atol=1e-5)

    judges = [load_judge(f"{world.models}/baseline/hf", "cpu", name) for name in PRECISIONS]
    exact, low = (np.stack(token_nll(judge, x.tolist(), 4)) for judge in judges)
    assert low.dtype == np.float32 and 0 < np.abs(low - exact).max() < 4 * eps * np.ptp(exact)


def test_a_judge_has_float32_logits(world):
    """They are no multiples of bfloat16's grid."""
    judge = load_judge(f"{world.models}/baseline/hf", "cpu", "bfloat16")
    with torch.no_grad(), computing(CPU, "bfloat16"):
        logits = judge.network(torch.from_numpy(world.held_out[:2].astype(np.int64))).logits
    assert logits.dtype == torch.float32 and not torch.equal(logits.bfloat16().float(), logits)


def test_the_public_functions_compute_in_the_precision_of_the_model(pipeline):
    texts = {}
    for precision in PRECISIONS:
        for folder in (pipeline.teacher, pipeline.baseline):
            model = halfstep.load(folder, device="cpu", precision=precision)
            with Attention() as attention:
                texts[precision, folder] = halfstep.generate(model, num_samples=2)
            assert attention.found == {precision == "bfloat16"}
    assert all(len(written) == 2 for written in texts.values())
