"""Balanced entropic optimal transport in the log domain: Eq. 9 of SOT-GLP (arXiv 2603.08347 v1).

    plan = argmin <plan, cost> - epsilon H(plan)   subject to   plan 1 = a,   plan^T 1 = b

H(plan) = -sum_kl plan_kl (log plan_kl - 1) is the entropy. It is large where the mass is spread evenly, so a large
epsilon gives an even plan and a small one a sparse plan. The solution has the form exp(f_k + g_l - cost_kl / epsilon).
Sinkhorn's iteration (Cuturi, 2013) computes f so that the row sums are right, then g so that the column sums are
right, and repeats. It works on f and g, the logarithms of the usual scaling factors: exp(-cost / epsilon) itself
becomes 0 for a small epsilon, and then no factor can repair the sums.

Letters:  K kept patches (rows)   L local prompts (columns)   ... any number of problems, solved at once
          cost, plan: the paper's C and T   a, b: its marginals   epsilon: the entropy weight
"""

import functools

import torch


def in_float32(function):
    """Computes `function` in float32 at least, also when it is called under autocast or with half inputs.

    why: half precision keeps 8 to 11 bits. That is too few for cosines that differ in the third digit and are then
    divided by epsilon or tau. Autocast on CPU would compute logsumexp and softmax in half precision too.
    """
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        device = next((value.device.type for value in (*args, *kwargs.values()) if torch.is_tensor(value)), "cpu")
        with torch.autocast(device, enabled=False):
            return function(*map(_at_least_float32, args),
                            **{name: _at_least_float32(value) for name, value in kwargs.items()})
    return wrapped


def _at_least_float32(value):
    is_half = torch.is_tensor(value) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_half else value


@in_float32
def sinkhorn(cost, a=None, b=None, epsilon=0.1, n_iters=20):
    """The transport plan of each problem.  Eq. 9

    cost (..., K, L); a (..., K) or (K,), b (..., L) or (L,): the marginals, uniform where None -> plan (..., K, L).
    One iteration is two half-steps. The last one is on b: columns sum to b exactly, rows to a up to convergence.
    The result for a problem does not depend on the others. Gradients flow through all iterations.
    Raises ValueError for epsilon <= 0, n_iters < 1, and marginals of another shape or of different mass.
    """
    if epsilon <= 0 or n_iters < 1:
        raise ValueError(f"sinkhorn needs epsilon > 0 and n_iters >= 1, got epsilon={epsilon}, n_iters={n_iters}")
    *problems, K, L = cost.shape
    _check_marginals(a, b, K, L)
    # why: with the problems in the last, contiguous dimension each step reads whole rows of memory
    score = (-cost / epsilon).movedim((-2, -1), (0, 1)).contiguous()               # (K, L, ...)
    log_a = _log_marginal(a, K, problems, cost)                                    # (K, ...)
    log_b = _log_marginal(b, L, problems, cost)                                    # (L, ...)
    g = torch.zeros_like(log_b)
    for _ in range(n_iters):
        f = log_a - torch.logsumexp(score + g, dim=1)                              # rows sum to a
        g = log_b - torch.logsumexp(score + f[:, None], dim=0)                     # columns sum to b
    return (score + f[:, None] + g).exp().movedim((0, 1), (-2, -1))                # (..., K, L)


def _log_marginal(weights, count, problems, cost):
    """log of the weights, uniform where None, one per problem: (count, ...)."""
    if weights is None:
        weights = cost.new_full((count,), 1 / count)
    return weights.to(cost).expand(*problems, count).movedim(-1, 0).log()


def _check_marginals(a, b, K, L):
    for name, weights, count in (("a", a, K), ("b", b, L)):
        if weights is not None and weights.shape[-1] != count:
            raise ValueError(f"marginal {name} has {weights.shape[-1]} entries, the cost matrix asks for {count}")
    mass_a, mass_b = (torch.ones([]) if weights is None else weights.sum(-1) for weights in (a, b))
    if ((mass_a - mass_b).abs() > 1e-4).any():
        raise ValueError(f"the marginals differ in mass: a sums to {mass_a}, b to {mass_b}")
