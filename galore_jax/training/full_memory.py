"""Too little memory ends in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from galore_jax.errors import InputError


@contextmanager
def raise_on_full_memory(remedy: str) -> Iterator[None]:
    """Turns the errors of Python and of JAX for it into an `InputError` that ends in a remedy."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(f"there is too little memory for this training: {remedy}.") from error
