"""The penalties against what they are defined by: a linear program, autograd, 50-digit arithmetic."""

import math

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog

from tasft_lib import losses

torch.manual_seed(0)


def random_case(vocabulary: int, hidden: int, tokens: int = 1, scale: float = 2.0):
    embedding = losses.unit_rows(torch.randn(vocabulary, hidden, dtype=torch.float64))
    logits = scale * torch.randn(tokens, vocabulary, dtype=torch.float64)
    return logits, torch.randint(vocabulary, (tokens,)), embedding


def earth_movers_distance(p: np.ndarray, q: np.ndarray, cost: np.ndarray) -> float:
    """min over couplings with marginals p and q of the transport cost (eq. 3), as a linear program."""
    n = len(p)
    rows = np.kron(np.eye(n), np.ones(n))
    columns = np.kron(np.ones(n), np.eye(n))
    result = linprog(cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([p, q]), method="highs")
    assert result.success
    return result.fun


@pytest.mark.parametrize("vocabulary, hidden", [(2, 3), (7, 4), (20, 8), (30, 3)])
def test_emd_exact_is_the_linear_programs_optimum(vocabulary, hidden):
    logits, targets, embedding = random_case(vocabulary, hidden)
    probs = logits.softmax(-1)[0].numpy()
    one_hot = np.eye(vocabulary)[targets.item()]
    cost = 1 - (embedding @ embedding.T).numpy()
    assert -losses.emd_exact(logits, targets, embedding).item() == pytest.approx(
        earth_movers_distance(probs, one_hot, cost), abs=1e-9
    )


@pytest.mark.parametrize("vocabulary, hidden", [(5, 3), (15, 6), (25, 4)])
def test_jensens_and_the_papers_bound_lie_below_the_distance(vocabulary, hidden):
    p = torch.randn(vocabulary, dtype=torch.float64).softmax(-1)
    q = torch.randn(vocabulary, dtype=torch.float64).softmax(-1)
    embedding = losses.unit_rows(torch.randn(vocabulary, hidden, dtype=torch.float64))
    distance = earth_movers_distance(p.numpy(), q.numpy(), 1 - (embedding @ embedding.T).numpy())
    squared = ((p - q) @ embedding).square().sum().item()
    jensen, paper = squared / 2, squared / (2 * vocabulary**2)
    assert 0 < paper < jensen <= distance + 1e-9


def test_emd_is_twice_jensens_bound_for_a_one_hot_target():
    logits, targets, embedding = random_case(12, 5, tokens=50)
    bound = -losses.emd(logits, targets, embedding) / 2
    exact = -losses.emd_exact(logits, targets, embedding)
    expected_norm = (logits.softmax(-1) @ embedding).square().sum(-1)
    assert (bound <= exact + 1e-12).all()
    # The gap is what the paper's bound rewards beside the distance: concentrated next-token mass.
    torch.testing.assert_close(exact - bound, (1 - expected_norm) / 2)


@pytest.mark.parametrize("penalty", ["emd", "emd_exact"])
def test_analytic_gradient_of_emd(penalty):
    """∂ℓ/∂z_w = p_w (g_w − Σ_v p_v g_v), g = −2(μ−ê_y)·ê_w for emd and ê_y·ê_w for emd_exact."""
    logits, targets, embedding = random_case(11, 4, tokens=6)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(getattr(losses, penalty)(logits, targets, embedding).sum(), logits)
    p, e_y = logits.detach().softmax(-1), embedding[targets]
    direction = -2 * (p @ embedding - e_y) if penalty == "emd" else e_y
    g = direction @ embedding.T
    torch.testing.assert_close(gradient, p * (g - (p * g).sum(-1, keepdim=True)))


@pytest.mark.parametrize("penalty", ["emd", "emd_exact"])
def test_emd_gradcheck(penalty):
    logits, targets, embedding = random_case(6, 3, tokens=4)
    assert torch.autograd.gradcheck(
        lambda z: getattr(losses, penalty)(z, targets, embedding), (logits.requires_grad_(),)
    )


def test_nlcl_gradcheck():
    s = torch.tensor([-1e-3, -0.1, -0.69, -0.70, -3.0, -40.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(losses.nlcl, (s,), eps=1e-8, atol=1e-4)


@pytest.mark.parametrize(
    "s", [-1e-9, -1e-6, -1e-3, -0.1, -0.5, -math.log(2), -0.7, -1.0, -5.0, -30.0, -50.0, -300.0, -700.0, -1e3]
)
def test_nlcl_is_its_definition_in_50_digit_arithmetic(s):
    x = torch.tensor([s], dtype=torch.float64, requires_grad=True)
    value = losses.nlcl(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    with mpmath.workdps(50):
        exact_s = mpmath.mpf(s)
        expected = -mpmath.log1p(-mpmath.exp(exact_s))
        expected_gradient = 1 / mpmath.expm1(-exact_s)
    assert value.item() == pytest.approx(float(expected), rel=1e-12, abs=1e-320)
    assert gradient.item() == pytest.approx(float(expected_gradient), rel=1e-7, abs=1e-320)


def test_nlcl_of_the_odds_form():
    """Eq. 7 is ORPO's term with the winner removed: −log(1 − P) with P the length-normalised likelihood."""
    log_probs = -torch.rand(10, dtype=torch.float64)
    sample = torch.tensor([0, 1, 0, 2, 2, 0, 1, 0, 2, 0])
    geometric_mean = torch.stack([log_probs.exp()[sample == s].prod() ** (1 / (sample == s).sum()) for s in range(3)])
    torch.testing.assert_close(losses.nlcl(losses.sample_mean(log_probs, sample, 3)), -(1 - geometric_mean).log())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("penalty", ["emd", "emd_exact", "nlcl"])
@pytest.mark.parametrize("certainty", ["p→1", "p→0", "uniform"])
def test_value_and_gradient_are_finite_and_in_range_at_the_extremes(penalty, certainty, dtype):
    vocabulary = 9
    embedding = losses.unit_rows(torch.randn(vocabulary, 4))
    targets = torch.tensor([2, 5])
    logits = torch.zeros(2, vocabulary, dtype=dtype)
    logits[torch.arange(2), targets] = {"p→1": 6e4, "p→0": -6e4, "uniform": 0.0}[certainty]
    logits.requires_grad_()
    if penalty == "nlcl":
        value = losses.nlcl(losses.token_log_probs(logits, targets))
        low, high = 0, math.inf
    else:
        value = getattr(losses, penalty)(logits, targets, embedding)
        low, high = {"emd": (-4, 1e-6), "emd_exact": (-2, 1e-6)}[penalty]
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.isfinite().all() and (value >= low).all() and (value <= high).all()
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("penalty", ["emd", "emd_exact", "nlcl"])
def test_descending_a_penalty_lowers_it_and_the_unsafe_probability(penalty):
    """The penalty falls on every token. The EMDs may raise an unsafe token's probability while mass leaves its
    neighbourhood, so the probability falls on average over tokens only."""
    logits, targets, embedding = random_case(20, 8, tokens=30)

    def value_of(z):
        if penalty == "nlcl":
            return losses.nlcl(losses.token_log_probs(z, targets))
        return getattr(losses, penalty)(z, targets, embedding)

    logits.requires_grad_()
    before = value_of(logits)
    (gradient,) = torch.autograd.grad(before.sum(), logits)
    lower = logits.detach() - 1e-3 * gradient
    assert (value_of(lower) < before).all()
    change = losses.token_log_probs(lower, targets) - losses.token_log_probs(logits, targets)
    assert change.mean() < 0 and (penalty != "nlcl" or (change < 0).all())


def test_npo_is_its_definition_and_becomes_gradient_ascent():
    r = torch.tensor([-30.0, -1.0, 0.0, 0.5, 7.0], dtype=torch.float64, requires_grad=True)
    for beta in (0.05, 1.0, 2.5):
        torch.testing.assert_close(losses.npo(r, beta), 2 / beta * (1 + r.exp() ** beta).log())
        assert torch.autograd.gradcheck(lambda x, beta=beta: losses.npo(x, beta), (r,))
    (gradient,) = torch.autograd.grad(losses.npo(r, 1e-9).sum(), r)
    torch.testing.assert_close(gradient, torch.ones(5, dtype=torch.float64))


SAMPLE = torch.tensor([0, 2, 0, 2, 2, 0])  # of three samples the second has no unsafe token
REFERENCE = torch.tensor([-1.5, 0.0, -0.7], dtype=torch.float64)
DEFINITIONS = {
    "nlcl": lambda log_p, distance, reference: -(1 - log_p.mean().exp()).log(),
    "gradient_ascent": lambda log_p, distance, reference: log_p.sum() / len(log_p),
    "recover": lambda log_p, distance, _: -log_p.mean() + (1 + distance / 2).clamp(min=0).sum(),
    "imitation": lambda log_p, distance, reference: F.nll_loss(log_p[:, None], torch.zeros(len(log_p)).long()),
    "unlikelihood": lambda log_p, distance, reference: F.binary_cross_entropy(log_p.exp(), torch.zeros_like(log_p)),
    "npo": lambda log_p, distance, reference: -2 / 0.3 * F.logsigmoid(-0.3 * (log_p.sum() - len(log_p) * reference)),
    "simnpo": lambda log_p, distance, reference: -2 / 0.3 * F.logsigmoid(-0.3 * log_p.mean()),
    "emd": lambda log_p, distance, reference: distance.mean(),
    "emd_exact": lambda log_p, distance, reference: distance.mean(),
}


@pytest.mark.parametrize("name", losses.PENALTIES)
def test_every_penalty_is_its_definition_sample_by_sample(name):
    generator = torch.Generator().manual_seed(0)
    log_prob, distance = (-3 * torch.rand(2, 6, generator=generator, dtype=torch.float64)).requires_grad_()
    tokens = losses.UnsafeTokens(log_prob, distance, SAMPLE, 3, beta=0.3, reference_log_prob=REFERENCE)
    expected = [
        DEFINITIONS[name](log_prob[i == SAMPLE], distance[i == SAMPLE], REFERENCE[i]) if i != 1 else torch.zeros(())
        for i in range(3)
    ]
    value = losses.sample_penalty(name, tokens)
    torch.testing.assert_close(value, torch.stack(expected).double())
    weights = torch.tensor([1.0, 5.0, -2.0], dtype=torch.float64)
    gradients = [
        torch.autograd.grad((weights * total).sum(), (log_prob, distance), allow_unused=True, materialize_grads=True)
        for total in (value, torch.stack(expected).double())
    ]
    torch.testing.assert_close(*gradients)
    assert all(gradient.isfinite().all() for gradient in gradients[0])


def test_npo_without_a_reference_measures_from_the_model_itself():
    log_prob = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    tokens = losses.UnsafeTokens(log_prob, torch.zeros(2), torch.zeros(2, dtype=torch.long), 1, beta=0.3)
    value = losses.sample_penalty("npo", tokens)
    assert value.item() == pytest.approx(2 / 0.3 * math.log(2))
    value.backward()
    assert log_prob.grad.tolist() == [1, 1]  # as gradient ascent on the sum


@pytest.mark.parametrize("certainty", [-1e-12, -1e-3, -1.0, -60.0])
@pytest.mark.parametrize("name", sorted(set(losses.PENALTIES) - set(losses.EMBEDDING_PENALTIES)))
def test_every_penalty_of_log_probabilities_falls_with_them_but_imitation(name, certainty):
    log_prob = torch.full((1,), certainty, dtype=torch.float64, requires_grad=True)
    tokens = losses.UnsafeTokens(log_prob, torch.zeros(1), torch.zeros(1, dtype=torch.long), 1, 2.5, torch.tensor([-1]))
    (gradient,) = torch.autograd.grad(losses.sample_penalty(name, tokens).sum(), log_prob)
    assert gradient.isfinite() and (gradient < 0 if name == "imitation" else gradient > 0)


def test_sample_mean_of_one_token_and_of_none():
    values = torch.tensor([5.0, 1.0, 2.0], requires_grad=True)
    mean = losses.sample_mean(values, torch.tensor([1, 3, 3]), 5)
    assert mean.tolist() == [0.0, 5.0, 0.0, 1.5, 0.0]
    mean.sum().backward()
    assert values.grad.tolist() == [1, 0.5, 0.5]
    assert losses.sample_mean(values[:0], torch.empty(0, dtype=torch.long), 2).tolist() == [0, 0]


def test_no_tokens_at_all_gives_an_empty_differentiable_result():
    logits = torch.randn(0, 7, requires_grad=True)
    value = losses.emd(logits, torch.empty(0, dtype=torch.long), losses.unit_rows(torch.randn(7, 3)))
    value.sum().backward()
    assert value.shape == (0,) and logits.grad.shape == (0, 7)


def test_unit_rows_keep_a_zero_row_and_carry_no_gradient():
    weight = torch.randn(5, 3, dtype=torch.bfloat16)
    weight[2] = 0
    weight.requires_grad_()
    unit = losses.unit_rows(weight)
    assert unit.dtype == torch.float32 and not unit.requires_grad
    torch.testing.assert_close(unit.norm(dim=-1), torch.tensor([1.0, 1, 0, 1, 1]))


@pytest.mark.parametrize("components", [0, 1, 3])
def test_centred_rows_have_no_mean_and_nothing_along_the_top_components(components):
    """Of an embedding with a mean, two strong axes and a row of padding."""
    axes = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    weight = torch.randn(40, 8, dtype=torch.float64) * torch.tensor([9.0, 5, 2, 1, 1, 1, 1, 1]) @ axes.T + 3
    weight[7] = 0
    rows = losses.centred_rows(weight, components)
    tokens = torch.arange(40) != 7
    assert (rows[7] == 0).all() and weight[7].eq(0).all()
    torch.testing.assert_close(rows.mean(0), torch.zeros(8, dtype=torch.float64))
    _, _, principal = torch.linalg.svd(weight[tokens] - weight[tokens].mean(0), full_matrices=False)
    along = rows[tokens] @ principal.T
    expected = (weight[tokens] - weight[tokens].mean(0)) @ principal.T
    torch.testing.assert_close(along[:, :components], torch.zeros_like(along[:, :components]))
    torch.testing.assert_close(along[:, components:], expected[:, components:])
    torch.testing.assert_close(losses.unit_rows(rows).norm(dim=-1), tokens.double())


def test_centred_rows_know_neither_shift_nor_rotation_and_are_a_copy():
    weight = torch.randn(30, 6, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    rows, moved = (losses.centred_rows(w, 2) for w in (weight, 5 * weight @ rotation + torch.randn(6)))
    cosines, others = (unit @ unit.T for unit in map(losses.unit_rows, (rows, moved)))
    torch.testing.assert_close(cosines, others)
    tied = torch.nn.Parameter(weight.float())
    before = tied.detach().clone()
    rows = losses.centred_rows(tied)
    assert torch.equal(tied, before) and not rows.requires_grad and rows.data_ptr() != tied.data_ptr()


def test_centred_rows_of_low_precision_are_made_in_float32():
    weight = (torch.randn(50, 8) + 2).bfloat16()
    rows = losses.centred_rows(weight, 1)
    assert rows.dtype == torch.float32 and rows.mean(0).abs().max() < 1e-5
    with pytest.raises(ValueError, match="penalty_components=8 would leave nothing of 8 dimensions"):
        losses.centred_rows(weight, 8)
