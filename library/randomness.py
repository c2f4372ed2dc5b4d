"""Addressed randomness: every random choice is a function of where it is made, never of what was drawn before.

A choice is seeded with the hash of its address, e.g. `(seed, epoch, record, repeat)` for a sample and
`(sample_seed, "noise")` for one of that sample's streams. So the number of workers, prefetching, restarts and the
number of processes cannot change a draw.
"""

import hashlib

import numpy as np


def address(*parts: int | str) -> int:
    """A stable integer in [0, 2**63) for an address, the same on every platform and Python version.

    A part counts with its type, so that 1 and "1" differ. Raises TypeError for anything but int and str, NumPy's
    integers included.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if type(part) not in (int, str):
            raise TypeError(f"an address is made of int and str, not {type(part).__name__}")
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(4, "little"))
        digest.update(text)
    return int.from_bytes(digest.digest(), "little") >> 1


def generator(*parts: int | str) -> np.random.Generator:
    """A NumPy generator for one address."""
    return np.random.default_rng(address(*parts))
