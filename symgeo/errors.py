"""The one exception family of the package."""


class SymmetryError(ValueError):
    """A declaration that does not parse, does not fit its parameters, or does not hold."""


class RecomputationError(ValueError):
    """A model with activation checkpoints, whose derivatives need its parameters after they have been taken out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device, or the machine, had too little memory; torch has several such."""
    message = str(error).lower()
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in message for w in words))
