"""`speculative` has the law of the autoregressive model, whatever the draft is worth."""

import pytest
import torch
from oracle import Language, Perfect, PerfectReader, chi_square

from halfstep.diffusion.contracts import Draws
from halfstep.diffusion.samplers import sample
from halfstep.diffusion.schedules import LogLinear
from halfstep.diffusion.speculative import NEIGHBORS, Acceptance
from halfstep.errors import HalfstepError
from halfstep.models.denoiser import SubsDenoiser
from halfstep.models.dit import DiT
from halfstep.models.gpt import GPT
from halfstep.models.readers import autoregressor

ALPHA = 1e-4 / 60
DRAWS = 10_000
LANGUAGE, OTHER = Language(3, 5, seed=3), Language(3, 5, seed=9, sharpness=3.0)


class NoCache:
    """A denoiser that keeps no keys and values."""

    def __init__(self, denoiser):
        self.denoiser = denoiser

    def __getattr__(self, name):
        if name == "features_and_kv":
            raise AttributeError(name)
        return getattr(self.denoiser, name)


KEPT = "hot, kept keys and values"
DRAFTS = {
    "exact": NoCache(Perfect(LANGUAGE)),
    "hot": NoCache(Perfect(LANGUAGE, heat=2.0)),
    "another language": NoCache(Perfect(OTHER)),
    KEPT: Perfect(LANGUAGE, heat=2.0),
}


def cooled(log_p, temperature, top_p):
    """p of a next token at a temperature in a nucleus, from the definitions: [V]."""
    p = (log_p.double() / temperature).softmax(-1)
    kept, total = torch.zeros_like(p), 0.0
    for v in p.argsort(descending=True).tolist():
        if total < top_p:
            kept[v] = p[v]
        total += p[v].item()
    return kept / kept.sum()


def autoregressive_law(scorer, start, temperature=1.0, top_p=1.0):
    """Law [T] over all texts of the language, given how they begin."""
    language, law = scorer.language, []
    for text in scorer.language.texts:
        chance = float((text[: len(start)] == torch.tensor(start)).all())
        if chance:
            log_p = scorer.next_log_p(text[None])[0]
            for i in range(len(start), language.L):
                chance *= cooled(log_p[i - 1], temperature, top_p)[text[i]].item()
        law.append(chance)
    return torch.tensor(law, dtype=torch.float64)


def write(denoiser, start, steps=64, n=DRAWS, seed=1, temperature=1.0, **options):
    frame = torch.full((LANGUAGE.L,), LANGUAGE.V)
    frame[: len(start)] = torch.tensor(start)
    draws = Draws(seed=seed, temperature=temperature)
    options = {"scorer": PerfectReader(LANGUAGE)} | options
    return sample(
        denoiser, n, LANGUAGE.L, steps, sampler="speculative", draws=draws, given=frame, **options
    )


def agrees(out, law):
    return chi_square(LANGUAGE.text_index(out.ids).bincount(minlength=len(law)), law)


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize(("tokens", "passes"), [(1, 1), (2, 1), (4, 1), (4, 2), (3, 3)])
@pytest.mark.parametrize("start", [[1], [0, 2]], ids=str)
def test_law_is_that_of_the_autoregressive_model(draft, tokens, passes, start):
    out = write(DRAFTS[draft], start, draft_tokens=tokens, draft_passes=passes, seed=11)
    law = autoregressive_law(PerfectReader(LANGUAGE), start)
    assert agrees(out, law) > ALPHA


@pytest.mark.parametrize(("temperature", "top_p"), [(0.6, 1.0), (1.5, 1.0), (1.0, 0.7), (0.8, 0.6)])
@pytest.mark.parametrize("draft", ["hot", "another language"])
def test_law_at_a_temperature_and_in_a_nucleus(draft, temperature, top_p):
    out = write(DRAFTS[draft], [1], temperature=temperature, top_p=top_p, draft_tokens=3, seed=12)
    law = autoregressive_law(PerfectReader(LANGUAGE), [1], temperature, top_p)
    assert agrees(out, law) > ALPHA
    plain = autoregressive_law(PerfectReader(LANGUAGE), [1])
    assert agrees(out, plain) < 1e-6  # the test can tell


@pytest.mark.parametrize("steps", [1, 2])
def test_a_budget_of_passes_is_kept_and_the_law_too(steps):
    out = write(DRAFTS["another language"], [1], steps=steps, draft_tokens=2, seed=13)
    assert out.network_evaluations.max() <= steps
    assert agrees(out, autoregressive_law(PerfectReader(LANGUAGE), [1])) > ALPHA


def test_an_exact_draft_of_one_token_is_always_accepted():
    """q = p: so a verification yields the drafted token and one more."""
    out = write(DRAFTS["exact"], [1], draft_tokens=1, n=500)
    assert out.autoregressive_passes.unique().tolist() == [2]  # 4 tokens, two at a time
    worse = write(DRAFTS["another language"], [1], draft_tokens=1, n=500)
    assert worse.autoregressive_passes.double().mean() > 2.2


@pytest.fixture(scope="module")
def networks():
    """A denoiser that keeps keys and values, with an autoregressive model that partly agrees."""
    torch.manual_seed(0)
    both = DiT(11, 32, 3, 4), GPT(11, 32, 2, 4)
    for network in both:
        network.eval().requires_grad_(False)
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.2) if p.ndim > 1 else torch.nn.init.normal_(p, 1.0, 0.1)
    return SubsDenoiser(both[0], LogLinear()), autoregressor(both[1])


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_a_text_does_not_depend_on_the_others(networks, passes):
    """Drafts neither, though what they read was computed in passes for all texts."""
    denoiser, scorer = networks
    given = torch.full((24,), 11)
    given[0] = 1
    options = {"scorer": scorer, "draft_tokens": 4, "draft_passes": passes}

    def written(first, n):
        draws = Draws(seed=14, first=first, temperature=2.0)  # so that some are accepted
        return sample(
            denoiser, n, 24, 24, sampler="speculative", draws=draws, given=given, **options
        )

    together = written(0, 40)
    assert together.autoregressive_passes.unique().numel() > 3
    for i in range(0, 40, 2):
        alone = written(i, 1)
        assert torch.equal(alone.ids[0], together.ids[i])
        assert alone.network_evaluations[0] == together.network_evaluations[i]
        assert alone.autoregressive_passes[0] == together.autoregressive_passes[i]


def test_finished_texts_need_nothing():
    whole = torch.tensor([0, 1, 2, 1, 0])
    options = {"sampler": "speculative", "scorer": PerfectReader(LANGUAGE)}
    out = sample(Perfect(LANGUAGE), 3, 5, 4, given=whole, **options)
    assert out.ids.tolist() == [whole.tolist()] * 3
    assert out.network_evaluations.tolist() == out.autoregressive_passes.tolist() == [0, 0, 0]
    begun = torch.tensor([0, 3, 3, 3, 3])
    assert sample(Perfect(LANGUAGE), 0, 5, 4, given=begun, **options).ids.shape == (0, 5)


def relaxed(p, token, readout, delta):
    """LANTERN's law for one drafted token, from its definition: mass of near tokens moved to it."""
    unit = readout / readout.norm(dim=1, keepdim=True)
    near = sorted((v for v in range(len(p)) if v != token), key=lambda v: -(unit[v] @ unit[token]))
    out, total = p.clone(), 0.0
    for v in near[:NEIGHBORS]:
        total += p[v].item()
        if total >= delta:
            break
        out[token] += out[v]
        out[v] = 0
    return out


@pytest.mark.parametrize("delta", [0.1, 0.3, 0.8])
def test_relaxed_acceptance_has_its_stated_law_and_distance(delta):
    """The second token of a draft of one: the law in closed form, and its distance from p."""
    readout = torch.randn(3, 2, generator=torch.Generator().manual_seed(1)).double()
    denoiser = Perfect(OTHER)
    denoiser.readout = readout, torch.zeros(3)
    denoiser = NoCache(denoiser)
    scorer = PerfectReader(LANGUAGE)
    p = scorer.next_log_p(torch.tensor([[1, 0, 0, 0, 0]]))[0, 0].exp()
    start = torch.tensor([1, 3, 3, 3, 3])
    q = OTHER.posterior[OTHER.index(start), 1]
    law = torch.zeros(3, dtype=torch.float64)
    for token in range(3):
        moved = relaxed(p, token, readout, delta)
        accept = min(1.0, (moved[token] / q[token]).item())
        law[token] += q[token] * accept
        residual = (moved - q).clamp(min=0)
        if accept < 1:
            law += q[token] * (1 - accept) * residual / residual.sum()
    out = write(denoiser, [1], draft_tokens=1, relaxation=delta, seed=15)
    counts = out.ids[:, 1].bincount(minlength=3)
    assert chi_square(counts, law) > ALPHA
    distance = (law - p).abs().sum().item() / 2
    assert distance <= delta + 1e-9
    if delta == 0.8:
        assert distance > 0.02 and chi_square(counts, p) < 1e-6  # the test can tell


def test_acceptance_without_relaxation_leaves_p_as_it_is():
    p = torch.rand(4, 3, dtype=torch.float64)
    assert Acceptance().relaxed(p, torch.tensor([0, 1, 2, 0]), torch.rand(3, 2)) is p


@pytest.mark.parametrize(
    "frame", [[3, 3, 3, 3, 3], [1, 3, 2, 3, 3], [[1, 3, 3, 3, 3], [1, 2, 3, 3, 3]]], ids=str
)
def test_only_prompts_of_one_length_can_be_continued(frame):
    given = torch.tensor(frame)
    with pytest.raises(HalfstepError, match="given: found texts that do not all begin"):
        sample(
            Perfect(LANGUAGE),
            2,
            5,
            4,
            sampler="speculative",
            given=given,
            scorer=PerfectReader(LANGUAGE),
        )


def test_bad_input():
    for options, sentence in (
        ({"scorer": None}, "scorer: found none, but sampler speculative asks"),
        ({"scorer": PerfectReader(Language(2, 5))}, "vocabulary of 2 tokens"),
        ({"draft_tokens": 0}, "draft_tokens: found 0"),
        ({"draft_passes": 0}, "draft_passes: found 0"),
        ({"relaxation": 1.0}, "relaxation: found 1, expected a probability"),
    ):
        with pytest.raises(HalfstepError, match=sentence):
            write(Perfect(LANGUAGE), [1], n=1, **options)
