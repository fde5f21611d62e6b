"""Random numbers as a function of who asks: (seed, what for, position), never of what was drawn before."""

import hashlib

import torch


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for exactly these parts, e.g. generator(seed, "step", 17)."""
    name = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(name[:8], "big") >> 1)


def permutation(size: int, *parts: int | str) -> torch.Tensor:
    """A random order of 0 .. size-1 for exactly these parts."""
    return torch.randperm(size, generator=generator(*parts))
