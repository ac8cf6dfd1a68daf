"""Layouts and data on which the communicator is tested: on threads and on real ranks."""

from __future__ import annotations

from pipeline_model import Case, grid, ragged

CASES = [
    Case(
        "encoder dp2 to language tp2",
        {"images": grid(0, dp=2), "language": grid(2, tp=2)},
        {"images": ["language"], "language": []},
        {"images": ragged(3, 4, seed=1)},
    ),
    Case(
        "fan-out to language dp2 pp2",
        {"images": grid(0, tp=2, dp=1), "language": grid(2, tp=1, cp=1, dp=2, pp=2)},
        {"images": ["language"], "language": []},
        {"images": ragged(4, 4, seed=2)},
        counts_from="model",
    ),
    Case(
        "encoders of unequal depth",
        {"images": grid(0, pp=3), "audio": grid(3, dp=1), "language": grid(4, tp=1, pp=2)},
        {"images": ["language"], "audio": ["language"], "language": []},
        {"images": ragged(6, 2, seed=3, zeros=False), "audio": ragged(6, 2, seed=4)},
    ),
    Case(
        "one encoder feeds two",
        {"images": grid(0, dp=1), "language": grid(1, dp=2), "generator": grid(3, tp=2, dp=1)},
        {"images": ["language", "generator"], "language": [], "generator": []},
        {"images": ragged(3, 4, seed=5)},
    ),
    Case(
        "chain of three",
        {"images": grid(0, dp=3), "language": grid(3, pp=2, dp=2), "generator": grid(7, dp=1)},
        {"images": ["language"], "language": ["generator"], "generator": []},
        {"images": ragged(5, 6, seed=6)},
    ),
    Case(
        "cp copies are partial",
        {"images": grid(0, dp=2), "language": grid(2, cp=2, dp=1)},
        {"images": ["language"], "language": []},
        {"images": [[3, 3], [3, 3]]},
        counts_from="nowhere",
    ),
    Case(
        "fewer microbatches than stages",
        {"images": grid(0, pp=2), "language": grid(2, pp=2)},
        {"images": ["language"], "language": []},
        {"images": ragged(1, 3, seed=7)},
    ),
]
SIMPLE = CASES[0]

# Run on eight real ranks, as are the others; ranks beyond a case's own are in no module.
MORE_CASES = [
    Case(
        "encoder tp2 dp2 to language dp2 pp2",
        {"images": grid(0, tp=2, dp=2), "language": grid(4, tp=1, cp=1, dp=2, pp=2)},
        {"images": ["language"], "language": []},
        {"images": ragged(5, 4, seed=8)},
        counts_from="model",
    ),
    Case(
        "two encoders, one of them pipelined, to language tp2 dp2",
        {"images": grid(0, tp=1, dp=1, pp=2), "audio": grid(2, dp=2), "language": grid(4, tp=2, dp=2)},
        {"images": ["language"], "audio": ["language"], "language": []},
        {"images": ragged(5, 4, seed=9), "audio": ragged(5, 4, seed=10)},
        counts_from="model",
    ),
    Case(
        "ragged fan-in from dp4 to tp2",
        {"images": grid(0, dp=4), "language": grid(4, tp=2, dp=1)},
        {"images": ["language"], "language": []},
        {"images": ragged(4, 8, seed=11)},
    ),
    Case(
        "ragged fan-out from dp1 to dp3",
        {"images": grid(0, tp=2, dp=1), "language": grid(2, tp=2, dp=3)},
        {"images": ["language"], "language": []},
        {"images": ragged(4, 6, seed=12)},
    ),
    Case(
        "lane counts that do not divide one another",
        {"images": grid(0, dp=3), "language": grid(3, tp=2, dp=2)},
        {"images": ["language"], "language": []},
        {"images": ragged(4, 6, seed=13)},
    ),
    Case(
        "two encoders on the same ranks",
        {"images": grid(0, dp=2), "audio": grid(0, tp=2), "language": grid(2, tp=2, dp=2)},
        {"images": ["language"], "audio": ["language"], "language": []},
        {"images": ragged(4, 4, seed=15), "audio": ragged(4, 4, seed=16)},
    ),
    Case(
        "pp before dp in the grid",
        {"images": grid(0, pp=2, dp=2), "language": grid(4, pp=2, tp=2)},
        {"images": ["language"], "language": []},
        {"images": ragged(4, 4, seed=14)},
    ),
]
