"""A denoiser with shifted logits against a dense textbook: whole passes, rolled by one position."""

import pytest
import torch

from halfstep.diffusion.block_sampler import block
from halfstep.diffusion.contracts import Draws
from halfstep.diffusion.masking import corrupt, mask_indices
from halfstep.diffusion.objective import nelbo
from halfstep.diffusion.samplers import SAMPLERS, sample
from halfstep.diffusion.schedules import LogLinear
from halfstep.distill.divergences import kl_backward
from halfstep.distill.targets import teacher_targets
from halfstep.models.denoiser import SubsDenoiser
from halfstep.models.dit import DiT
from halfstep.models.gpt import GPT
from halfstep.models.readers import autoregressor

V, L = 11, 24


class Dense(SubsDenoiser):
    """Each call computes all positions of whole texts; position i gets the output of i - 1."""

    def features(self, xt, t, where=None):
        h = self.network(xt)
        before = [(i - 1) % xt.shape[1] for i in range(xt.shape[1])]
        h = torch.stack([h[:, i] for i in before], 1)
        return h if where is None else h[where]

    def features_and_kv(self, xt, t, places, kv=None):
        raise NotImplementedError("the textbook keeps nothing")


def network() -> DiT:
    torch.manual_seed(0)
    net = DiT(V, 32, 2, 4).eval().requires_grad_(False)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.ndim > 1 else torch.nn.init.normal_(p, 1.0, 0.1)
    return net


@pytest.fixture(scope="module")
def pair():
    """The denoiser, and the textbook with the same weights."""
    net = network()
    return SubsDenoiser(net, LogLinear(), shifted=True), Dense(net, LogLinear())


def texts(n: int = 5) -> torch.Tensor:
    return torch.randint(0, V, (n, L), generator=torch.Generator().manual_seed(1))


def test_position_i_is_predicted_from_the_output_at_i_minus_1(pair):
    """All positions, a mask, and indices in any order; the first from the last."""
    ours, theirs = pair
    x, t = texts(), torch.zeros(5)
    whole = ours.features(x, t)
    assert torch.equal(whole, theirs.features(x, t))
    plain = SubsDenoiser(ours.network, LogLinear()).features(x, t)
    assert torch.equal(whole[:, 0], plain[:, -1]) and torch.equal(whole[:, 5], plain[:, 4])
    where = torch.rand(5, L, generator=torch.Generator().manual_seed(2)) < 0.4
    where[:, 0] = True
    assert torch.allclose(ours.features(x, t, where), whole[where], atol=1e-5)
    indices = torch.tensor([3, 0, 3]), torch.tensor([7, 0, 23])
    assert torch.allclose(ours.features(x, t, indices), whole[indices], atol=1e-5)


# Old keys and values change the drafts of `speculative`, and not its law (test_speculative.py).
@pytest.mark.parametrize("sampler", sorted(SAMPLERS.keys() - {"block", "speculative"}))
@pytest.mark.parametrize("copied", [False, True], ids=["", "inference copy"])
def test_samplers_write_the_texts_of_the_textbook(pair, sampler, copied):
    ours, theirs = pair
    ours = ours.inference_copy if copied else ours
    given = torch.full((L,), V)
    given[:3] = torch.tensor([1, 2, 3])
    options = {"sampler": sampler, "draws": Draws(seed=3), "given": given}
    if "scorer" in SAMPLERS[sampler].options:
        options["scorer"] = autoregressor(GPT(V, 16, 1, 2))
    found, expected = (sample(model, 6, L, 8, **options).ids for model in (ours, theirs))
    assert torch.equal(found, expected)


def test_block_in_one_step_each_equals_whole_passes(pair):
    ours, _ = pair
    x = torch.full((6, L), V)
    kept, whole = (block(ours, x, Draws(seed=3), 2, keep_kv).ids for keep_kv in (True, False))
    assert torch.equal(kept, whole)
    assert (kept < V).all()


@pytest.mark.parametrize("start", [0, 8])
def test_a_part_is_predicted_with_the_token_before_it(start):
    """With one layer a part equals a whole pass in which other keys are unchanged."""
    net = network()
    net.blocks = net.blocks[:1]
    ours = SubsDenoiser(net, LogLinear(), shifted=True)
    x, t, part = texts(), torch.zeros(5), torch.arange(start, start + 8)
    _, kv = ours.features_and_kv(x, t, part)
    x[:, part] = (x[:, part] + 1) % V
    found, _ = ours.features_and_kv(x, t, part, kv)
    assert torch.allclose(found, ours.features(x, t)[:, part], atol=1e-5)


@pytest.mark.parametrize("substeps", [1, 2, 4])
def test_targets_losses_and_gradients_are_those_of_the_textbook(substeps):
    """The targets of a round, its divergence and the NELBO, with the gradients of all weights."""
    x, t = texts(8), torch.linspace(0.3, 0.9, 8)
    u, u_reveal, u_token = torch.rand(3, 8, L, generator=torch.Generator().manual_seed(4)).double()
    found = []
    for kind in (SubsDenoiser, Dense):
        teacher, net = kind(network(), LogLinear(), shifted=True), network().requires_grad_(True)
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(0.9)
        student = kind(net, LogLinear(), shifted=True)
        xt = corrupt(x, t, u, LogLinear(), V)
        masked = mask_indices(xt == V, xt.device)
        with torch.no_grad():
            h = teacher_targets(teacher, xt, t, 0.05, substeps, u_reveal, u_token)
        log_p = student.log_p(student.features(xt, t, masked))
        loss = kl_backward(log_p, teacher.log_p(h)).sum() + nelbo(student, x, t, u)
        loss.backward()
        found.append((h, loss, [p.grad for p in net.parameters() if p.grad is not None]))
    (h, loss, ours), (dense_h, dense_loss, theirs) = found
    assert torch.allclose(h, dense_h, atol=1e-5)
    assert torch.allclose(loss, dense_loss, rtol=1e-5)
    assert len(ours) == len(theirs) > 20
    for p, q in zip(ours, theirs, strict=True):
        assert torch.allclose(p, q, atol=1e-4 * q.abs().max())
