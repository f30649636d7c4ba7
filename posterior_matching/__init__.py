"""Posterior Matching: VAEs that model every conditional p(x_u | x_o)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posterior_matching.impute.estimator import PosteriorMatchingImputer
    from posterior_matching.runs import load_model

__all__ = ["PosteriorMatchingImputer", "load_model"]

_HOMES = {"PosteriorMatchingImputer": "posterior_matching.impute.estimator", "load_model": "posterior_matching.runs"}


def __getattr__(name: str) -> Any:
    # Imported on first use, since JAX and Flax take seconds to import.
    if name not in _HOMES:
        raise AttributeError(f"module 'posterior_matching' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
