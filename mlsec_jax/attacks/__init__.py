"""Attacks: assemblies of threats, trainers and losses, one published method a file."""

from mlsec_jax.attacks._bilevel import bilevel, greedy, joint, require_alive, unit_rows

__all__ = ["bilevel", "greedy", "joint", "require_alive", "unit_rows"]
