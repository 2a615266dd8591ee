"""Tokens, experts and ranks with which exchanges are tried."""

CASES = {
    "top-1": ({"tokens": 23, "layers": 3, "experts": 7, "top_k": 1, "seed": 1}, 4, 2, (9, 3, 6, 5)),
    "top-2": ({"tokens": 23, "layers": 3, "experts": 7, "top_k": 2, "seed": 2}, 4, 2, (9, 3, 6, 5)),
    "top-3, three ranks, absent ids": (
        {"tokens": 17, "layers": 3, "experts": 6, "top_k": 3, "seed": 3, "absent": 0.4},
        3,
        1,
        (17, 0, 0),
    ),
    "uneven nodes": ({"tokens": 20, "layers": 2, "experts": 8, "top_k": 3, "seed": 4}, 3, 2, (5, 9, 6)),
    "one expert for all": (
        {"tokens": 12, "layers": 2, "experts": 5, "top_k": 1, "seed": 5, "single": True},
        4,
        2,
        (3, 3, 3, 3),
    ),
    "no tokens": ({"tokens": 0, "layers": 2, "experts": 5, "top_k": 2, "seed": 6}, 4, 2, (0, 0, 0, 0)),
    "no experts": ({"tokens": 8, "layers": 2, "experts": 5, "top_k": 2, "seed": 7, "absent": 1.0}, 2, 1, (4, 4)),
    "more tokens than are padded": (
        {"tokens": 700, "layers": 2, "experts": 7, "top_k": 2, "seed": 10, "absent": 0.1},
        4,
        2,
        (300, 0, 399, 1),
    ),
    "two ranks": ({"tokens": 8, "layers": 2, "experts": 4, "top_k": 2, "seed": 8}, 2, 2, (1, 7)),
    "one rank": ({"tokens": 8, "layers": 2, "experts": 4, "top_k": 2, "seed": 9}, 1, 1, (8,)),
}
