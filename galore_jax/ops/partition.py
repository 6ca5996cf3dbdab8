"""How arrays are partitioned over a mesh of devices, and functions that run on their parts.

A `Partition` is static: it is part of the structure of the trees that carry it, so that a function
traced under `jax.jit`, where arrays do not show where they lie, still knows how to divide its work.
Without a partition (None) everything here does nothing, and XLA decides.

On a mesh with Explicit axes, the default of `jax.make_mesh`, an array's sharding is part of its
type, and an operation that leaves the sharding of its result open is an error. A loss is traced
with these types, because its author wrote it for them. What this package computes itself runs with
Auto axes, where `Partition.constrain` says what matters and XLA finds the rest.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from galore_jax.types import PyTree

MeshAxes = tuple[str, ...]
AxisNames = str | Sequence[str]


@dataclass(frozen=True)
class Partition:
    """How an array is partitioned.

    Attributes:
      mesh: the names and sizes of the mesh's axes; no devices.
      axes: for each axis of the array, the mesh axes that divide it, from major to minor.
    """

    mesh: AbstractMesh
    axes: tuple[MeshAxes, ...]

    @property
    def spec(self) -> PartitionSpec:
        """As JAX writes it."""
        return PartitionSpec(*(names or None for names in self.axes))

    @property
    def used(self) -> MeshAxes:
        """All mesh axes that divide the array."""
        return tuple(name for names in self.axes for name in names)

    def trailing(self, ndim: int) -> "Partition":
        """The partition of an array that has only the last axes of this one."""
        return Partition(self.mesh, self.axes[len(self.axes) - ndim :])

    def constrain(self, array: jax.Array, like: Any = None) -> jax.Array:
        """The array, partitioned like this; its leading axes may be missing.

        Args:
          array: the array.
          like: if the array lies nowhere yet, another one, which lies on the mesh.
        """
        mesh = explicit_mesh((array, like)) or self._context()
        spec = self.trailing(array.ndim)._without(mesh.manual_axes).spec
        if mesh.explicit_axes:
            with jax.sharding.use_abstract_mesh(mesh):
                return jax.sharding.reshard(array, spec)
        return lax.with_sharding_constraint(array, NamedSharding(mesh, spec))

    def map_parts(self, f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`f` applied to the parts of its arguments; see `jax.shard_map` for the specs.

        Inside a `shard_map` over some of the mesh's axes it divides the others.
        """
        mesh = self._context()
        manual = mesh.manual_axes
        if manual:
            free = lambda spec: PartitionSpec(
                *(tuple(n for n in names_of(entry) if n not in manual) or None for entry in spec)
            )
            is_spec = lambda node: isinstance(node, PartitionSpec)
            in_specs, out_specs = jax.tree.map(free, (in_specs, out_specs), is_leaf=is_spec)
        names = set(mesh.axis_names) - set(manual)
        return jax.shard_map(
            f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False
        )

    def map_batch(self, f: Callable[..., Any], *arguments: Any) -> Any:
        """`f(*arguments)` on the matrices that each device has, if devices have different ones.

        A loop over matrices that lie on several devices would gather all of them.

        Args:
          f: a function of trees of arrays `(*batch, …)`, as its results are, which treats each
            matrix separately.
          *arguments: its arguments.
        """
        mesh = self._context()
        batch = Partition(self.mesh, self.axes[:-2])._without(mesh.manual_axes)
        if not batch.used:
            return f(*arguments)
        specs: Any = {"in_specs": batch.spec, "out_specs": batch.spec}
        names = set(batch.used)
        mapped = jax.shard_map(f, mesh=mesh, axis_names=names, check_vma=False, **specs)
        return mapped(*arguments)

    def _without(self, names: Iterable[str]) -> "Partition":
        rest = lambda axes: tuple(name for name in axes if name not in names)
        return Partition(self.mesh, tuple(map(rest, self.axes)))

    def _context(self) -> AbstractMesh:
        """The mesh with the types that its axes have here, such as Manual inside a `shard_map`."""
        context = jax.sharding.get_abstract_mesh()
        return context if set(self.mesh.axis_names) <= set(context.axis_names) else self.mesh


def partition_of(array: Any) -> Partition | None:
    """The partition of an array or `jax.ShapeDtypeStruct` on a mesh of several devices.

    None if there is no such mesh, or if the array is traced and JAX does not tell.
    """
    sharding = getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    mesh = sharding.mesh
    spec = tuple(
        tuple(name for name in names_of(entry) if mesh.shape[name] > 1) for entry in sharding.spec
    )
    return Partition(axes_of(sharding.mesh), spec + ((),) * (len(array.shape) - len(spec)))


def axes_of(mesh: Mesh | AbstractMesh) -> AbstractMesh:
    """The names and sizes of the axes alone: equal wherever and however the mesh is used."""
    types = (AxisType.Auto,) * len(mesh.axis_names)
    return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=types)


def names_of(entry: Any) -> MeshAxes:
    """The mesh axes in an entry of a `PartitionSpec`, or in any `AxisNames`."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def placed(
    mesh: AbstractMesh,
    shape: Sequence[int],
    wanted: Iterable[tuple[str, Sequence[int]]],
    *,
    start: Sequence[MeshAxes] | None = None,
    block: int = 1,
) -> Partition:
    """Places mesh axes one after the other, each on the first axis of an array that it divides.

    Args:
      mesh: the mesh.
      shape: shape of the array.
      wanted: mesh axes, each with the axes of the array to try, in this order. One that divides
        none of them is left out, as is one of size 1.
      start: the mesh axes that are already placed, for each axis of the array.
      block: parts of the last axis must be multiples of this, or the whole axis.

    Returns:
      The partition.
    """
    axes: list[MeshAxes] = [*start] if start is not None else [()] * len(shape)
    for name, places in wanted:
        for place in places if mesh.shape[name] > 1 else ():
            parts = math.prod(mesh.shape[other] for other in (*axes[place], name))
            multiple = block if place == len(shape) - 1 else 1
            if shape[place] % (parts * multiple) == 0:
                axes[place] = (*axes[place], name)
                break
    return Partition(mesh, tuple(axes))


def map_batch(partition: Partition | None, f: Callable[..., Any], *arguments: Any) -> Any:
    """`partition.map_batch(f, *arguments)`; without a partition `f(*arguments)`."""
    return f(*arguments) if partition is None else partition.map_batch(f, *arguments)


def constrained(array: jax.Array, partition: Partition | None) -> jax.Array:
    """The array with a partition, if there is one."""
    return array if partition is None else partition.constrain(array)


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
