"""The one exception family of the package."""


class SymmetryError(ValueError):
    """A declaration that does not parse, does not fit its parameters, or does not hold."""
