"""Eq. 9: the transport plan, by hand, by its properties and against an independent solver."""

import math

import pytest
import torch

from sinkhorn import sinkhorn


def test_two_by_two_by_hand():
    # cost [[0, 1], [1, 0]], uniform marginals. The plan is exp(f_k + g_l - cost_kl / eps), and by symmetry
    # [[q, 1/2 - q], [1/2 - q, q]] with q / (1/2 - q) = e^(1/eps). For eps = 1 / ln 3 that ratio is 3: q = 3/8.
    plan = sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), epsilon=1 / math.log(3), n_iters=1)
    torch.testing.assert_close(plan, torch.tensor([[3 / 8, 1 / 8], [1 / 8, 3 / 8]]))


def test_uneven_marginals_by_hand():
    # One column takes everything: plan = a. Two columns with equal cost share each row in the ratio of b.
    a, b = torch.tensor([0.2, 0.8]), torch.tensor([0.25, 0.75])
    torch.testing.assert_close(sinkhorn(torch.tensor([[3.0], [7.0]]), a, torch.ones(1)), a[:, None])
    # 0.2 * 0.25 = 0.05, 0.2 * 0.75 = 0.15, 0.8 * 0.25 = 0.2, 0.8 * 0.75 = 0.6
    torch.testing.assert_close(sinkhorn(torch.zeros(2, 2), a, b), torch.tensor([[0.05, 0.15], [0.2, 0.6]]))


def test_first_iteration_by_hand():
    # K = 2, L = 2, eps = 1, kernel e^-cost = [[1, 1/2], [1/4, 1]] (cost ln of its inverse), uniform marginals.
    # rows first:    divide by 1 + 1/2 = 3/2 and 1/4 + 1 = 5/4, times 1/2 -> [[1/3, 1/6], [1/10, 2/5]]
    # columns next:  divide by 13/30 and 17/30, times 1/2 -> [[5/13, 5/34], [3/26, 6/17]]
    cost = torch.tensor([[1.0, 2.0], [4.0, 1.0]], dtype=torch.float64).log()
    expected = torch.tensor([[5 / 13, 5 / 34], [3 / 26, 6 / 17]], dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(cost, epsilon=1.0, n_iters=1), expected)


@pytest.mark.parametrize("options", [dict(), dict(epsilon=0.3), dict(n_iters=3), dict(epsilon=0.05, n_iters=7)])
def test_iterations_are_those_of_the_plain_domain(options):
    # Cuturi's form: kernel e^(-cost / eps), u = a / (kernel v), v = b / (kernel^T u), plan diag(u) kernel diag(v);
    # epsilon is 0.1 and 20 iterations are made where nothing else is said
    cost = torch.rand(5, 3, dtype=torch.float64)
    kernel, v = (-cost / options.get("epsilon", 0.1)).exp(), torch.ones(3, dtype=torch.float64)
    for _ in range(options.get("n_iters", 20)):
        u = 1 / 5 / (kernel @ v)
        v = 1 / 3 / (kernel.T @ u)
    torch.testing.assert_close(sinkhorn(cost, **options), u[:, None] * kernel * v, atol=1e-12, rtol=1e-9)


def test_plan_is_the_entropic_optimum():
    # Any plan of the form diag(u) exp(-cost / eps) diag(v) with the right marginals is the one optimum: then
    # log plan + cost / eps is a sum of a row term and a column term, so its double differences vanish.
    cost = torch.rand(5, 3, dtype=torch.float64)
    potential = sinkhorn(cost, epsilon=0.1, n_iters=300).log() + cost / 0.1
    double_difference = potential - potential[:1] - potential[:, :1] + potential[0, 0]
    torch.testing.assert_close(double_difference, torch.zeros_like(cost), atol=1e-9, rtol=0)


def test_marginals_hold():
    # costs all over [0, 1] at epsilon 0.1 are far harder than cosines of patches and prompts, hence 300 iterations
    a, b = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25]), torch.tensor([0.7, 0.3])
    plan = sinkhorn(torch.rand(64, 5, 2), a, b, n_iters=300)
    torch.testing.assert_close(plan.sum(-2), b.expand(64, 2))
    torch.testing.assert_close(plan.sum(-1), a.expand(64, 5), atol=1e-5, rtol=0)


def test_marginals_are_uniform_where_none_are_given():
    # one of the two given, the other one is 1/5 per row or 1/2 per column
    cost, a, b = torch.rand(5, 2), torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25]), torch.tensor([0.7, 0.3])
    torch.testing.assert_close(sinkhorn(cost, a), sinkhorn(cost, a, torch.full((2,), 1 / 2)))
    torch.testing.assert_close(sinkhorn(cost, b=b), sinkhorn(cost, torch.full((5,), 1 / 5), b))


def test_columns_are_exact_after_any_number_of_iterations():
    for n_iters in (1, 2, 20):
        torch.testing.assert_close(sinkhorn(torch.rand(8, 5, 3), n_iters=n_iters).sum(-2), torch.full((8, 3), 1 / 3))


def test_more_iterations_bring_rows_closer():
    cost = torch.rand(10, 4, dtype=torch.float64)
    errors = [(sinkhorn(cost, n_iters=n).sum(-1) - 0.1).abs().max().item() for n in (1, 5, 20, 80)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6 < errors[0]


def test_marginals_may_differ_from_problem_to_problem():
    a = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    plan = sinkhorn(torch.rand(2, 3, 4), a, n_iters=100)
    torch.testing.assert_close(plan.sum(-1), a, atol=1e-5, rtol=0)
    assert plan[0, 2].eq(0).all()                       # a row of weight 0 carries nothing, and is no NaN


def test_weights_of_zero_or_next_to_it_are_no_nan():
    # rows 0 and 2 and column 1 carry nothing (1e-40 is below the normal numbers of float32): row 1 is left
    cost = torch.rand(3, 3, requires_grad=True)
    plan = sinkhorn(cost, torch.tensor([0.0, 1.0, 1e-40]), torch.tensor([0.4, 0.0, 0.6]), n_iters=50)
    torch.testing.assert_close(plan, torch.tensor([[0.0] * 3, [0.4, 0.0, 0.6], [0.0] * 3]))
    gradient, = torch.autograd.grad((plan * cost).sum(), cost)
    assert gradient.isfinite().all()
    assert sinkhorn(torch.rand(2, 2), torch.zeros(2), torch.zeros(2)).eq(0).all()


def test_where_the_cost_is_infinite_nothing_goes():
    # columns sum to 1/2: row 0 may only fill column 0, so row 1 is left with column 1
    cost = torch.tensor([[0.3, math.inf], [math.inf, 0.2]])
    torch.testing.assert_close(sinkhorn(cost), torch.tensor([[0.5, 0.0], [0.0, 0.5]]))
    # a row without a finite cost is no obstacle where it has no mass: 1 is shared in the ratio of b
    cost = torch.tensor([[math.inf, math.inf], [0.3, 0.3]])
    plan = sinkhorn(cost, torch.tensor([0.0, 1.0]), torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(plan, torch.tensor([[0.0, 0.0], [0.25, 0.75]]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_whole_numbers_are_computed_in_float32(dtype):
    # the cost of the first test, with masses 1 + 1 = 1 + 1, so twice the plan of marginals 1/2: 3/4 and 1/4
    cost, ones = torch.tensor([[0, 1], [1, 0]], dtype=dtype), torch.ones(2, dtype=dtype)
    plan = sinkhorn(cost, ones, ones, epsilon=1 / math.log(3))
    torch.testing.assert_close(plan, torch.tensor([[3 / 4, 1 / 4], [1 / 4, 3 / 4]]))
    torch.testing.assert_close(sinkhorn(cost.float(), ones, ones, epsilon=1 / math.log(3)), plan)
    torch.testing.assert_close(2 * sinkhorn(cost, epsilon=1 / math.log(3)), plan)


def test_each_problem_has_its_own_marginals():
    cost, a, b = torch.rand(3, 2, 5, 4), torch.rand(3, 2, 5).softmax(-1), torch.rand(3, 2, 4).softmax(-1)
    plan = sinkhorn(cost, a, b)
    for i in range(3):
        for j in range(2):
            torch.testing.assert_close(plan[i, j], sinkhorn(cost[i, j], a[i, j], b[i, j]))


def test_constants_added_to_rows_or_columns_change_nothing():
    cost = torch.rand(6, 4, dtype=torch.float64)
    shifted = cost + torch.rand(6, 1, dtype=torch.float64) + torch.rand(4, dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(cost, n_iters=500), sinkhorn(shifted, n_iters=500))


def test_renumbered_patches_and_prompts_give_the_renumbered_plan():
    cost, rows, columns = torch.rand(6, 4), torch.randperm(6), torch.randperm(4)
    torch.testing.assert_close(sinkhorn(cost)[rows][:, columns], sinkhorn(cost[rows][:, columns]))


def test_large_epsilon_is_uniform_and_small_epsilon_an_assignment():
    cost = torch.tensor([[0.9, 0.1, 0.8], [0.2, 0.7, 0.9], [0.8, 0.9, 0.3]])
    torch.testing.assert_close(sinkhorn(cost, epsilon=1e4), torch.full((3, 3), 1 / 9), atol=1e-5, rtol=0)
    # cheapest permutation: row 0 -> column 1, row 1 -> 0, row 2 -> 2, each with its mass of 1/3
    cheapest = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1]]) / 3
    torch.testing.assert_close(sinkhorn(cost, epsilon=0.01, n_iters=200), cheapest, atol=1e-4, rtol=0)


def test_no_nan_at_tiny_epsilon():
    # exp(-1.5 / 0.001) is 0 in every floating format: only the log domain survives this
    plan = sinkhorn(torch.rand(10, 4) * 1.5, epsilon=0.001, n_iters=500)
    assert plan.isfinite().all()
    torch.testing.assert_close(plan.sum(-2), torch.full((4,), 0.25))


def test_one_problem_does_not_depend_on_the_others():
    # the first image's costs are 100 times those of the others: it neither stops nor rescales what they do
    cost = torch.rand(3, 7, 10, 4)
    cost[0] *= 100
    batched = sinkhorn(cost)
    assert batched.shape == cost.shape
    for i in range(3):
        for j in range(7):
            torch.testing.assert_close(batched[i, j], sinkhorn(cost[i, j]), atol=1e-7, rtol=1e-5)


def test_gradient_of_the_entropic_value_is_the_plan():
    # envelope theorem: d/dcost of min_P <P, cost> + eps sum P (log P - 1) is P
    cost = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    plan = sinkhorn(cost, epsilon=0.1, n_iters=500)
    value = (plan * cost).sum() + 0.1 * (plan * (plan.log() - 1)).sum()
    gradient, = torch.autograd.grad(value, cost)
    torch.testing.assert_close(gradient, plan.detach())


def test_gradient_through_the_iterations_equals_finite_differences():
    cost = torch.rand(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: sinkhorn(c, epsilon=0.2, n_iters=7), cost)
    a, b = (torch.rand(2, n, dtype=torch.float64, requires_grad=True) for n in (4, 3))
    assert torch.autograd.gradcheck(lambda a, b: sinkhorn(cost.detach(), a.softmax(-1), b.softmax(-1), 0.2, 7), (a, b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_compute_in_float32(dtype):
    cost = torch.rand(10, 4).to(dtype)
    expected = sinkhorn(cost.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = sinkhorn(cost)
    assert plan.dtype == torch.float32
    torch.testing.assert_close(plan, expected, atol=0, rtol=0)
    assert sinkhorn(cost.double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_marginals_serve_by_place_and_by_name(dtype):
    # 1/8, 3/8, 1/2 and 1/4, 3/4 are exact in every format, so the plans are the same
    cost, a, b = torch.rand(3, 2), torch.tensor([1 / 8, 3 / 8, 1 / 2]), torch.tensor([1 / 4, 3 / 4])
    expected = sinkhorn(cost, a, b)
    assert torch.equal(sinkhorn(cost, a.to(dtype), b.to(dtype)), expected)
    assert torch.equal(sinkhorn(cost, b=b.to(dtype), a=a.to(dtype)), expected)


def test_marginals_may_have_any_mass_that_is_the_same_for_both():
    cost = torch.rand(4, 2)
    plan = sinkhorn(cost, torch.full((4,), 0.5), torch.ones(2))                   # 4 / 2 = 2 * 1 = 2
    torch.testing.assert_close(plan, 2 * sinkhorn(cost))


@pytest.mark.parametrize("mass", [1e-6, 1, 1e6])
def test_rounding_is_no_difference_in_mass(mass):
    # 4 (1/4 + 1.25e-5) = 1 + 5e-5 is still 1, 4 (1/4 + 5e-5) = 1 + 2e-4 is not, whatever the unit
    cost, b = torch.rand(4, 2), torch.full((2,), 0.5 * mass)
    sinkhorn(cost, torch.full((4,), (0.25 + 1.25e-5) * mass), b)
    with pytest.raises(ValueError, match="differ in mass"):
        sinkhorn(cost, torch.full((4,), (0.25 + 5e-5) * mass), b)


@pytest.mark.parametrize("options, complaint", [
    (dict(epsilon=0.0), r"epsilon > 0 .* got epsilon=0.0, n_iters=20"), (dict(epsilon=-0.1), "epsilon > 0"),
    (dict(epsilon=math.nan), "epsilon > 0 .* got epsilon=nan"),
    (dict(epsilon=math.inf), "finite epsilon > 0 .* got epsilon=inf"), (dict(n_iters=math.nan), "n_iters >= 1"),
    (dict(n_iters=0), r"n_iters >= 1, got epsilon=0.1, n_iters=0"), (dict(n_iters=-1), "n_iters >= 1"),
    (dict(a=torch.full((3,), 1 / 3)), "marginal a has 3 entries, the cost matrix asks for 4"),
    (dict(b=torch.full((4,), 1 / 4)), "marginal b has 4 entries, the cost matrix asks for 2"),
    (dict(a=torch.ones(4)), "differ in mass: a sums to 4.0, b to 1.0"),
    (dict(b=torch.ones(2)), "differ in mass: a sums to 1.0, b to 2.0"),
    (dict(a=torch.ones(4), b=torch.ones(2)), "differ in mass: a sums to 4.0, b to 2.0"),
    (dict(a=torch.tensor([[0.25] * 4, [0.5] * 4])), "differ in mass"),
    (dict(a=torch.tensor([-0.5, 0.5, 0.5, 0.5])), "marginal a must hold finite numbers >= 0"),
    (dict(b=torch.tensor([math.nan, 1])), "marginal b must hold finite numbers >= 0"),
    (dict(a=torch.full((4,), math.inf), b=torch.ones(2)), "marginal a must hold finite numbers >= 0")])
def test_bad_input_is_named(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        sinkhorn(torch.rand(2, 4, 2), **options)


@pytest.mark.parametrize("cells, value, complaint", [
    ((1, 2), math.inf, "a row or column with mass has no finite cost"),
    ((1, slice(None), 0), math.inf, "a row or column with mass has no finite cost"),
    ((1, 2, 0), -math.inf, "a cost is -inf")])
def test_costs_that_leave_no_plan_are_refused(cells, value, complaint):
    cost = torch.rand(2, 4, 2)
    cost[cells] = value
    with pytest.raises(ValueError, match=complaint):
        sinkhorn(cost)
    # row 0 may go to column 0 alone, and column 0 takes nothing
    with pytest.raises(ValueError, match="no finite cost"):
        sinkhorn(torch.tensor([[0.0, math.inf], [0.0, 0.0]]), b=torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("shape", [(3,), (0, 4), (4, 0), (2, 0, 0)])
def test_a_cost_matrix_has_rows_and_columns(shape):
    with pytest.raises(ValueError, match="a cost matrix with rows and columns, got "):
        sinkhorn(torch.rand(shape))
    assert sinkhorn(torch.rand(0, 4, 2)).shape == (0, 4, 2)                       # no problem is no fault


def test_float32_stays_close_to_float64_at_small_epsilon():
    # why: every half-step normalises the scores, so they stay near 0, where float32 is finest. Factors that are
    # kept beside scores of 1 / epsilon = 1000 lose their last digits: relative 1000 * 6e-8 = 6e-5
    cost = torch.rand(50, 10, 4, generator=torch.Generator().manual_seed(0))
    error = sinkhorn(cost, epsilon=0.001) - sinkhorn(cost.double(), epsilon=0.001)
    assert error.abs().max() < 2e-6


def test_arguments_may_have_names_and_marginals_another_precision():
    cost, a = torch.rand(4, 2), torch.tensor([0.1, 0.2, 0.3, 0.4])
    expected = sinkhorn(cost, a)
    assert torch.equal(sinkhorn(cost=cost, a=a), expected)
    assert torch.equal(sinkhorn(cost, a.double()), expected)              # one float64 marginal beside none
    assert torch.equal(sinkhorn(cost, a.double(), torch.full((2,), 0.5)), expected)
