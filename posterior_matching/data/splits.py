"""Defines what `train`, `validation` and `test` mean for a dataset."""

from collections.abc import Collection

from posterior_matching.errors import UserError


def resolve_split(split: str, known: Collection[str]) -> str:
    """Returns the dataset's own name for `validation` (`val`, `validation` or else `test`); others are unchanged."""
    if split in known or split not in ("validation", "val"):
        return split
    return next((name for name in ("val", "validation", "test") if name in known), split)


def unknown_split(name: str, split: str, known: Collection[str]) -> UserError:
    """Returns the error for a split that dataset `name` does not have."""
    return UserError(f"dataset '{name}' has no split '{split}': it has {', '.join(known)}")
