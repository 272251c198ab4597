"""The one door to jaxopt: retired upstream, and good at implicit differentiation and solvers.

Importing it warns that it is no longer maintained. We know (docs/design.md), so users of this library need not hear it.
"""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="JAXopt is no longer maintained", category=DeprecationWarning)
    import jaxopt

__all__ = ["jaxopt"]
