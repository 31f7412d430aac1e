"""Balanced entropic optimal transport in the log domain: Eq. 9 of SOT-GLP (arXiv 2603.08347 v1).

    plan = argmin <plan, cost> - epsilon H(plan)   subject to   plan 1 = a,   plan^T 1 = b

H(plan) = -sum_uv plan_uv (log plan_uv - 1) is the entropy, u being a row and v a column. It is large where
the mass is spread evenly, so a large epsilon gives an even plan and a small one a sparse plan. The solution
is exp(-cost / epsilon), each row and each column multiplied by a factor. Sinkhorn's iteration (Cuturi, 2013)
scales the rows so that they sum to a, then the columns so that they sum to b, and repeats. It works on the
logarithm of the plan, `log_plan`: exp(-cost / epsilon) becomes 0 for a small epsilon, and no factor can
repair that.

Letters:  K kept patches (rows)   L local prompts (columns)   ... any number of problems, solved at once
          cost, plan: the paper's C and T   a, b: its marginals   epsilon: the entropy weight
"""

import math

from clip.precision import in_float32  # before torch: clip/__init__.py sets a variable that torch reads once

import torch

NOTHING = -1e30     # the logarithm of no mass. why not -inf: a row in which all are -inf has no softmax


@in_float32
def sinkhorn(cost, a=None, b=None, epsilon=0.1, n_iters=20):
    """The transport plan of each problem.  Eq. 9

    cost (..., K, L), infinite where nothing may go; a (..., K) or (K,), b (..., L) or (L,): the marginals,
    uniform where None -> plan (..., K, L), float32 at least.
    One iteration is two half-steps, the last one on b: columns sum to b exactly, rows to a up to convergence.
    The result for a problem does not depend on the others. Gradients flow through all iterations.
    Raises ValueError for an epsilon that is infinite or not above 0, n_iters < 1, marginals of other lengths,
    and problems without a plan.
    """
    if not (0 < epsilon < math.inf and n_iters >= 1):
        raise ValueError(f"sinkhorn needs a finite epsilon > 0 and n_iters >= 1, got {epsilon=}, {n_iters=}")
    if not cost.is_floating_point():    # why: `in_float32` raises half precision only
        cost = cost.float()
    _check(cost, a, b)

    *problems, K, L = cost.shape
    log_plan = (-cost / epsilon).clamp(min=NOTHING)                                # (..., K, L)
    # why: with the problems in the last, contiguous dimension each step reads whole rows of memory
    log_plan = log_plan.movedim((-2, -1), (0, 1)).contiguous()                     # (K, L, ...)
    log_a = _log_marginal(a, K, problems, cost)[:, None]                           # (K, 1, ...)
    log_b = _log_marginal(b, L, problems, cost)                                    # (L, ...)
    for _ in range(n_iters):
        log_plan = log_plan.log_softmax(dim=1) + log_a                             # rows sum to a
        log_plan = log_plan.log_softmax(dim=0) + log_b                             # columns sum to b
    return log_plan.exp().movedim((0, 1), (-2, -1))                                # (..., K, L)


def _log_marginal(weights, count, problems, cost):
    """log of the weights, uniform where None, one per problem: (count, ...)."""
    if weights is None:
        weights = cost.new_full((count,), 1 / count)
    return weights.to(cost).log().clamp(min=NOTHING).expand(*problems, count).movedim(-1, 0)


def _check(cost, a, b):
    """Raises ValueError for marginals that do not fit the cost matrix, and for problems without a plan."""
    if cost.dim() < 2 or 0 in cost.shape[-2:]:
        raise ValueError(f"sinkhorn needs a cost matrix with rows and columns, got {tuple(cost.shape)}")
    for name, weights, count in (("a", a, cost.shape[-2]), ("b", b, cost.shape[-1])):
        if weights is not None and weights.shape[-1] != count:
            found = weights.shape[-1]
            raise ValueError(f"marginal {name} has {found} entries, the cost matrix asks for {count}")

    # why not for uniform marginals on a GPU: reading a value makes the host wait for it in every step
    is_asked = cost.device.type == "cpu" or a is not None or b is not None
    if is_asked and not torch.compiler.is_compiling():
        a = cost.new_ones(cost.shape[-2]) / cost.shape[-2] if a is None else a
        b = cost.new_ones(cost.shape[-1]) / cost.shape[-1] if b is None else b
        _check_plan(cost, a, b)


def _check_plan(cost, a, b):
    """Raises ValueError for values that leave no plan. cost (..., K, L), a (..., K), b (..., L)."""
    for name, weights in (("a", a), ("b", b)):
        if not ((weights >= 0) & weights.isfinite()).all():
            raise ValueError(f"marginal {name} must hold finite numbers >= 0, got {weights}")
    mass_a, mass_b = a.sum(-1), b.sum(-1)
    if ((mass_a - mass_b).abs() > 1e-4 * mass_b).any():
        raise ValueError(f"the marginals differ in mass: a sums to {mass_a}, b to {mass_b}")

    rows, columns = a[..., :, None] > 0, b[..., None, :] > 0                       # (..., K, 1), (..., 1, L)
    open_cells = (cost != math.inf) & rows & columns                               # (..., K, L)
    stranded_rows = rows & ~open_cells.any(-1, keepdim=True)
    stranded_columns = columns & ~open_cells.any(-2, keepdim=True)
    if stranded_rows.any() or stranded_columns.any():
        raise ValueError("there is no plan: a row or column with mass has no finite cost")
    if (cost == -math.inf).any():
        raise ValueError("there is no plan: a cost is -inf")
