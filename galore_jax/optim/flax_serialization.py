"""Registers the nodes of optimizer states with `flax.serialization`."""

import dataclasses
import sys
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.ops.quantization import Quantized
from galore_jax.optim.state import Unprojected
from galore_jax.subspace.basis import Basis
from galore_jax.subspace.projection import Coordinates


def register_if_flax_imported() -> None:
    """Registers the nodes of optimizer states with Flax, if it has been imported.

    Called when a state is initialised: saving one requires that Flax is imported by then, and
    restoring one requires an initialised state as the target.
    """
    if "flax.serialization" in sys.modules:
        _register()


@cache
def _register() -> None:
    from flax import serialization

    def register(kind: type) -> None:
        is_static = lambda f: f.metadata.get("static") or kind is Unprojected
        names = [f.name for f in dataclasses.fields(kind) if not is_static(f)]

        def to_dict(node: Any) -> dict[str, Any]:
            return {name: serialization.to_state_dict(getattr(node, name)) for name in names}

        def from_dict(node: Any, state: dict[str, Any]) -> Any:
            fields = {
                name: serialization.from_state_dict(getattr(node, name), state[name], name=name)
                for name in names
            }
            if isinstance(node, Basis | Coordinates):
                _check_shapes(node, fields)
            return dataclasses.replace(node, **fields)

        serialization.register_serialization_state(kind, to_dict, from_dict)

    for kind in (Basis, Coordinates, Quantized, Unprojected):
        register(kind)


def _check_shapes(target: Basis | Coordinates, restored: dict[str, Any]) -> None:
    """Raises a ValueError if arrays of a field have other shapes than those of the target."""
    shapes = lambda tree: [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
    for name, field in restored.items():
        found, expected = shapes(field), shapes(getattr(target, name))
        if found != expected:
            raise ValueError(
                f"the restored {name} of {target.projection.name} has the shapes {found}, but the "
                f"target {expected}: restore into the state of an optimizer with the same "
                "settings, such as the rank."
            )
