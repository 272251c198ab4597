"""Networks as pure functions, on one convolution that is as fast in a loop as outside of it."""

from mlsec_jax.models._conv import conv

__all__ = ["conv"]
