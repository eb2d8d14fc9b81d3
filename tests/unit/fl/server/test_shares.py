"""Shares of a round's mean."""

from __future__ import annotations

from fedzo.fl.server.shares import num_trimmed


def test_a_trimmed_mean_rounds_down_what_the_share_says_and_not_its_binary_neighbour() -> None:
    for hundredths in range(50):
        for count in range(1, 301):
            assert num_trimmed(hundredths / 100, count) == hundredths * count // 100
