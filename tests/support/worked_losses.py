"""Losses of pairs in worked arithmetic: the tests of a loss module take its cases, the table's test counts them all."""

import math

LOG2 = math.log(2)

PAIRWISE = [
    # loss, (lr_w, lr_l, |y_w|, |y_l|), options, loss by hand
    ("sigmoid", (4, -1), {"beta": 0.1}, 0.4741),
    ("sigmoid", (0, 0), {"beta": 0.1}, LOG2),
    ("hinge", (4, -1), {"beta": 0.1}, 0.5),
    ("hinge", (14, -1), {"beta": 0.1}, 0.0),
    ("ipo", (12, 6, 4, 3), {"beta": 1.0}, 0.25),
    ("exo_pair", (3, 3), {"label_smoothing": 0.1}, 0.5108),
    ("nca_pair", (10, -10), {"beta": 0.1}, 1.1265),
    ("robust", (4, -1), {"beta": 0.1, "label_smoothing": 0.1}, 0.4116),
    ("cdpo", (4, -1), {"beta": 0.1, "label_smoothing": 0.1}, 0.5241),
    ("bco_pair", (10, -10), {"beta": 0.1}, 0.6265),
    ("sppo_hard", (4, -3), {"beta": 0.1}, 5.0),
    ("apo_zero", (10, -10), {"beta": 0.1}, 0.5379),
    ("apo_down", (10, -10), {"beta": 0.1}, 0.8503),
    ("discopop", (2, 2), {"beta": 0.1}, 0.8466),
    ("sigmoid_norm", (12, 6, 4, 3), {"beta": 0.5}, 0.4741),
    ("dpop", (-1, -6), {"beta": 0.1, "dpop_lambda": 2.0}, 0.5544),
    ("dpop", (1, -4), {"beta": 0.1, "dpop_lambda": 2.0}, 0.4741),  # above its reference: plain DPO
]

DIVERGENT = [
    # -log σ(β Δ) with f'(t) = 1 - 1/t: Δ = (1 - 1/2) - (1 - 2) = 1.5, β = 2
    ("sigmoid", (LOG2, -LOG2), {"beta": 2.0, "f_divergence_type": "forward_kl"}, 0.0486),
    # f'(t) = log(2t / (1 + t)): Δ = log(4/3) - log(2/3) = log 2, β = 1: -log(2/3)
    ("sigmoid", (LOG2, -LOG2), {"beta": 1.0, "f_divergence_type": "js_divergence"}, 0.4055),
    # f'(t) = (t^(α-1) - 1)/(α - 1), α = 2: t - 1: Δ = 2 - 1/2, β = 2
    (
        "sigmoid",
        (LOG2, -LOG2),
        {"beta": 2.0, "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 2.0},
        0.0486,
    ),
]

REFERENCE_FREE = [
    # loss, chosen tokens, rejected tokens, options, loss by hand
    ("cpo", [-2.0, -2.0], [-4.0, -5.0], {"beta": 0.1}, 0.4741 + 2),
    ("cpo", [-2.0, -2.0], [-4.0, -5.0], {"beta": 0.1, "label_smoothing": 0.1, "cpo_alpha": 0.5}, 0.5241 + 1),
    ("cpo_hinge", [-2.0, -2.0], [-4.0, -5.0], {"beta": 0.1}, 0.5 + 2),
    ("cpo_ipo", [-1.0, -1.0], [-3.0], {"beta": 0.5}, 1 + 1),
    ("simpo", [-1.0, -1.0], [-3.0], {"beta": 0.5, "simpo_gamma": 0.5}, 0.4741),
    # AlphaPO, α = 0.25: p = 1 gives 0, p = 1/16 gives -4; β = 0.25, γ = 0.5
    ("simpo", [0.0], [-4 * LOG2], {"beta": 0.25, "simpo_gamma": 0.5, "alphapo_alpha": 0.25}, 0.4741),
    ("orpo", [math.log(0.8)], [-LOG2, -LOG2], {"beta": 0.1}, 0.2455),
    ("unlikelihood", [-1.0, -1.0, -1.0], [-LOG2], {"unlikelihood_alpha": 0.5}, 1.3466),
    ("sigmoid", [-2.0, -2.0], [-4.0, -5.0], {"beta": 0.1}, 0.4741),
]
