"""The contracts are used: such parameters are annotated, and the classes fit the protocols."""

import ast
from inspect import signature
from pathlib import Path

import pytest
import torch
from oracle import Language, Perfect

from halfstep.diffusion import contracts
from halfstep.diffusion.samplers import SAMPLERS
from halfstep.diffusion.schedules import SCHEDULES, LogLinear
from halfstep.models.denoiser import SubsDenoiser
from halfstep.models.dit import DiT

SOURCE = Path(__file__).parents[2] / "src" / "halfstep"
NAMES = {"denoiser", "teacher", "student", "schedule", "journal", "group", "machine"}


def members(protocol: type) -> set[str]:
    return {name for name in vars(protocol) if not name.startswith("_")}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: p.name)
def test_parameters_that_hold_a_contract_are_annotated(path):
    bare = [
        f"{node.name}({argument.arg}), line {node.lineno}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        if argument.arg in NAMES and argument.annotation is None
    ]
    assert bare == []


@pytest.mark.parametrize(
    "denoiser",
    [SubsDenoiser(DiT(11, 16, 1, 2), LogLinear()), Perfect(Language(3, 2))],
    ids=["network", "oracle"],
)
def test_denoisers_have_all_members_and_their_shapes(denoiser):
    for name in members(contracts.Denoiser) | members(contracts.KVDenoiser):
        assert hasattr(denoiser, name), name
    V, xt = denoiser.vocab_size, torch.full((4, 2), denoiser.mask_id)
    where = torch.tensor([[True, False]]).expand(4, 2)
    h = denoiser.features(xt, torch.full((4,), 0.5), where)
    assert h.shape[0] == 4 and denoiser.features(xt, torch.full((4,), 0.5)).shape[:2] == (4, 2)
    weight, bias = denoiser.readout
    assert len(weight) >= V == len(bias) and weight.shape[1] == h.shape[1]
    log_p = denoiser.log_p(h)
    assert log_p.shape == (4, V)
    assert torch.allclose(log_p.exp().sum(-1), torch.ones(4, dtype=log_p.dtype))
    assert torch.allclose(denoiser.logits(h).log_softmax(-1), log_p, atol=1e-6)
    assert torch.equal(denoiser.logits(h, slice(0, 2)), denoiser.logits(h)[:, :2])
    tokens = torch.tensor([[V - 1, 0]] * 4)
    expected = denoiser.logits(h).gather(1, tokens)
    assert torch.allclose(denoiser.logits_at(h, tokens), expected, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_have_all_members(name):
    assert all(hasattr(SCHEDULES[name](), member) for member in members(contracts.Schedule))


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_have_one_signature(name):
    parameters = signature(SAMPLERS[name].write).parameters
    assert list(parameters)[:4] == ["denoiser", "x", "draws", "steps"]
    options = list(parameters.values())[4:]
    assert all(option.default is not option.empty for option in options)
