"""Code without sharding types inside of programs that have them.

On a mesh with Explicit axes, the default of `jax.make_mesh`, an array's sharding is part of its
type, and an operation that leaves the sharding of its result open is an error. A loss is traced
with these types, because its author wrote it for them. What this package computes itself runs with
Auto axes, where `Partition.constrain` says what matters and XLA finds the rest.
"""

from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh

from galore_jax.types import PyTree


def explicit_mesh(tree: PyTree) -> AbstractMesh | None:
    """The mesh of the context, or of the arrays in a tree, if it has Explicit axes."""
    context = jax.sharding.get_abstract_mesh()
    if context.axis_names:
        return context if context.explicit_axes else None
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            mesh = jax.typeof(leaf).sharding.mesh
            if mesh.explicit_axes:
                return mesh
    return None


def specs_of(tree: PyTree) -> PyTree:
    """The sharding types of arrays, as a tree of `PartitionSpec`s."""
    return jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, tree)


def with_auto_axes(
    f: Callable[..., PyTree], *arguments: PyTree, out: Callable[[], PyTree]
) -> PyTree:
    """`f(*arguments)`, in which all axes are Auto.

    Args:
      f: a function of arrays, which must not use others from outside.
      *arguments: trees of arrays.
      out: returns the sharding types of the result, a tree of `PartitionSpec`s or a prefix of it;
        called on a mesh with Explicit axes only.

    Returns:
      The result, typed again.
    """
    mesh = explicit_mesh(arguments)
    if mesh is None:
        return f(*arguments)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(f, axes=mesh.explicit_axes, out_sharding=out())(*arguments)
