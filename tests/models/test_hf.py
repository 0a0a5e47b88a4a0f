"""Models of transformers as denoisers, against a dense textbook on their own logits.

The textbook computes whole texts with the model as transformers has it. Its mask token is in the
middle of the vocabulary, and its table has rows without a token.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from published import FAMILIES, build_family

from halfstep.diffusion.contracts import Draws
from halfstep.diffusion.masking import corrupt, mask_indices
from halfstep.diffusion.objective import nelbo
from halfstep.diffusion.samplers import SAMPLERS, sample
from halfstep.diffusion.schedules import LogLinear
from halfstep.distill.divergences import DIVERGENCES
from halfstep.distill.targets import divergence_loss, teacher_targets
from halfstep.errors import HalfstepError
from halfstep.models.denoiser import SubsDenoiser
from halfstep.models.gpt import GPT
from halfstep.models.hf import TransformersNetwork, build_network_of, read_both_ways, swap_rows
from halfstep.models.readers import autoregressor
from halfstep.pretrained import CAUSAL

V, L, MASK, PADDING = 41, 20, 7, 6
LEARNED = ("bert", "roberta", "gpt2")  # with a table of positions
CASES = [
    (kind, logits)
    for kind, auto in FAMILIES.items()
    for logits in (("same", "shifted") if auto == CAUSAL else ("same",))
]


class Textbook:
    """A Denoiser: its features are log p(x0 | xt), from whole passes of transformers' model."""

    mask_id, vocab_size, ignores_time, schedule = V, V, True, LogLinear()
    readout = torch.eye(V), torch.zeros(V)

    def __init__(self, model, is_causal, shifted):
        self.model, self.is_causal, self.shifted = model, is_causal, shifted

    def features(self, xt, t, where=None):
        ids = torch.arange(V + 1)  # the model's id of each of our tokens
        ids[MASK], ids[V] = V, MASK
        nothing_hidden = torch.zeros(len(xt), 1, xt.shape[1], xt.shape[1])
        options = {"attention_mask": nothing_hidden} if self.is_causal else {}
        z = self.model(input_ids=ids[xt], **options).logits
        if self.shifted:
            z = torch.cat([z[:, -1:], z[:, :-1]], 1)
        log_p = z[..., ids[:V]].log_softmax(-1)
        return log_p if where is None else log_p[where]

    def logits(self, h, chunk=slice(None)):
        return h[..., chunk].clone()

    def logits_at(self, h, tokens):
        return h.gather(-1, tokens)

    def log_p(self, h):
        return h


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def pair(request):
    """The denoiser, and the textbook with the same weights."""
    kind, logits = request.param
    model = build_family(kind, V + 1 + PADDING, L)
    theirs, is_causal = copy.deepcopy(model), FAMILIES[kind] == CAUSAL
    swap_rows(model, MASK, V)
    if is_causal:
        read_both_ways(model)
    ours = SubsDenoiser(TransformersNetwork(model, V), LogLinear(), shifted=logits == "shifted")
    textbook = Textbook(theirs, is_causal, logits == "shifted")
    return SimpleNamespace(kind=kind, ours=ours, theirs=textbook)


def texts(n: int = 4) -> torch.Tensor:
    return torch.randint(2, V, (n, L), generator=torch.Generator().manual_seed(1))


def masked(n: int = 4) -> torch.Tensor:
    u = torch.rand(n, L, generator=torch.Generator().manual_seed(2))
    return texts(n).masked_fill(u < 0.5, V)


@torch.no_grad()
@pytest.mark.parametrize("copied", [False, True], ids=["", "inference copy"])
def test_log_p_is_that_of_the_models_own_logits(pair, copied):
    """At all positions, at some, for some tokens; the mask and the padding have no probability."""
    ours = pair.ours.inference_copy if copied else pair.ours
    x, t = masked(), torch.zeros(4)
    expected = pair.theirs.features(x, t)
    h = ours.features(x, t)
    assert torch.allclose(ours.log_p(h), expected, atol=1e-5)
    where = x == V
    for places in (where, mask_indices(where, x.device)):
        assert torch.allclose(ours.log_p(ours.features(x, t, places)), expected[where], atol=1e-5)
    h, expected = h[where], expected[where]
    assert torch.allclose(ours.logits(h).log_softmax(-1), expected, atol=1e-5)
    tokens = torch.arange(len(h))[:, None] % V
    at = ours.logits_at(h, tokens) - ours.logits(h).logsumexp(-1, keepdim=True)
    assert torch.allclose(at, expected.gather(1, tokens), atol=1e-5)


@pytest.mark.parametrize("sampler", ["ancestral", "entropy_bounded", "energy", "speculative"])
def test_samplers_write_the_texts_of_the_textbook(pair, sampler):
    """Given tokens are carried over; the mask token and padded rows are never drawn."""
    given = torch.full((L,), V)
    given[:3] = torch.tensor([MASK, 2, 3])
    options = {"sampler": sampler, "draws": Draws(seed=3), "given": given}
    if "scorer" in SAMPLERS[sampler].options:
        options["scorer"] = autoregressor(GPT(V, 16, 1, 2).eval())
    with torch.no_grad():
        ours, theirs = (
            sample(model, 6, L, 8, **options).ids
            for model in (pair.ours.inference_copy, pair.theirs)
        )
    assert torch.equal(ours, theirs)
    assert (ours < V).all() and torch.equal(ours[:, :3], given[:3].expand(6, 3))


@pytest.mark.parametrize("loss", ["nelbo", "kl_backward", "mse"])
def test_targets_losses_and_gradients_are_those_of_the_textbook(pair, loss):
    generator = torch.Generator().manual_seed(4)
    x0, t = texts(), torch.tensor([0.2, 0.5, 0.8, 1.0], dtype=torch.float64)
    u, u_reveal, u_token = torch.rand(3, 4, L, generator=generator, dtype=torch.float64)
    values, targets = [], []
    for denoiser in (pair.ours, pair.theirs):
        model = denoiser.network.model if denoiser is pair.ours else denoiser.model
        model.requires_grad_(True).zero_grad()
        if loss == "nelbo":
            value = nelbo(denoiser, x0, t, u)
        else:
            xt = corrupt(x0, t, u, LogLinear(), V)
            target = teacher_targets(denoiser, xt, t, 0.3, 3, u_reveal, u_token)
            targets.append(denoiser.log_p(target))
            # A student that differs from its teacher: it reads the texts backwards.
            where = mask_indices((xt == V), xt.device)
            h = denoiser.features(xt.flip(0), t, where)
            readouts = denoiser.readout, denoiser.readout
            value = divergence_loss(DIVERGENCES[loss], h, readouts[0], target, readouts[1])
        value.backward()
        values.append(value.detach())
        model.requires_grad_(False)
    if targets:
        assert torch.allclose(*targets, atol=1e-5)
    assert torch.allclose(*values, rtol=1e-5)
    theirs = dict(pair.theirs.model.named_parameters())
    largest = max(p.grad.abs().max() for p in theirs.values() if p.grad is not None)
    rows = list(range(V + 1 + PADDING))
    rows[MASK], rows[V] = V, MASK
    for name, p in pair.ours.network.model.named_parameters():
        expected = theirs[name].grad
        if expected is None:  # of a pooler, or a bias that nothing reads
            assert p.grad is None or not p.grad.any()
            continue
        if len(expected) == len(rows):
            expected = expected[rows]
        assert torch.allclose(p.grad, expected, rtol=1e-4, atol=1e-5 * largest), name


@torch.no_grad()
def test_what_it_cannot_do_is_one_sentence(pair):
    x, t = masked(), torch.zeros(4)
    with pytest.raises(HalfstepError, match="found block, but SubsDenoiser keeps no keys and"):
        sample(pair.ours, 1, L, 4, sampler="block")
    with pytest.raises(HalfstepError, match="attention of .* cannot be limited"):
        pair.ours.reading(torch.ones(L, L, dtype=torch.bool)).features(x, t)
    if pair.kind in LEARNED:
        with pytest.raises(HalfstepError, match=f"texts of {L + 1} tokens, .* positions of {L}"):
            pair.ours.features(torch.full((1, L + 1), V), t[:1])


def test_it_is_built_from_a_configuration_with_one_dropout(pair):
    """The same parameters, under the same names; a copy with its weights computes the same."""
    network = pair.ours.network
    auto = FAMILIES[pair.kind]
    about = {"auto": auto, "config": network.model.config.to_dict()}
    built = build_network_of(about, V, dropout=0.0).eval()
    state = dict(network.named_parameters())
    assert state.keys() == dict(built.named_parameters()).keys()
    built.load_state_dict(state, strict=False)
    with torch.no_grad():
        assert torch.equal(built(masked()), network(masked()))
    trained = build_network_of(about, V, dropout=0.5).train()
    rates = {m.p for m in trained.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates <= {0.5} and not torch.equal(trained(masked()), trained(masked()))


def test_a_configuration_that_transformers_does_not_build_is_one_sentence():
    for config in ({"model_type": "own"}, {"model_type": "bert", "num_hidden_layers": 10**7}, {}):
        with pytest.raises(HalfstepError, match="describes no model that this version") as caught:
            build_network_of({"auto": "AutoModelForMaskedLM", "config": config}, V, 0.0)
        assert "\n" not in str(caught.value)
