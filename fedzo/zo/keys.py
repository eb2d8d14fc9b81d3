"""Which direction a scalar belongs to: the one function that clients, replay and virtual paths ask.

A policy is one number, ``directions``, and travels with each record of the log that needs it: ``OWN``, ``SHARED``, or
the size of a pool.
"""

from __future__ import annotations

from fedzo.zo.directions import PURPOSE_POOL, SHARED, philox_words, stream_key

OWN = 0
"""Every owner steps along directions of its own; those of the owner ``SHARED`` are everybody's."""
POOL_OWNER = 0xFFFFFFFE
"""The owner of a pool's directions."""


def step_key(run_seed: int, *, round: int, step: int, probe: int, owner: int, directions: int = OWN) -> int:
    """The stream key of one probe.

    Args:
        run_seed: Seed of the run's directions.
        round: Number of the round.
        step: t.
        probe: p.
        owner: ``SHARED`` or a client's index.
        directions: ``OWN``; ``SHARED``: those that all clients share, whoever the owner is; another number: drawn from
            a pool of so many (FedKSeed, arXiv 2312.06353).
    """
    if directions == OWN:
        return stream_key(run_seed, round=round, step=step, probe=probe, owner=owner)
    if directions == SHARED:
        return stream_key(run_seed, round=round, step=step, probe=probe, owner=SHARED)
    slot = pool_slot(run_seed, round=round, step=step, probe=probe, owner=owner, pool_size=directions)
    return stream_key(run_seed, round=slot, owner=POOL_OWNER)


def step_keys(run_seed: int, *, round: int, step: int, probes: int, owner: int, directions: int = OWN) -> list[int]:
    """Keys of the directions of one local step, one a probe."""
    return [
        step_key(run_seed, round=round, step=step, probe=probe, owner=owner, directions=directions)
        for probe in range(probes)
    ]


def pool_slot(run_seed: int, *, round: int, step: int, probe: int, owner: int, pool_size: int) -> int:
    """Which of the pool's directions (0..pool_size-1) a probe uses: uniform, by a 64-bit word of the probe's stream."""
    key = stream_key(run_seed, round=round, step=step, probe=probe, owner=owner)
    low, high = (int(word) for word in philox_words(key, purpose=PURPOSE_POOL, num_words=2))
    return (low | high << 32) * pool_size >> 64
