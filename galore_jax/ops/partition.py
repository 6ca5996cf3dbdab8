"""How arrays are partitioned over a mesh of devices, and functions that run on their parts.

A `Partition` is static: it is part of the structure of the trees that carry it. A function traced
under `jax.jit`, where arrays on Auto axes do not show how they are sharded, reads there how to
divide its work. Without a partition (None) everything here does nothing, and XLA decides.

On a mesh with Explicit axes, the default of `jax.make_mesh`, an array's sharding is part of its
type, and an operation that leaves the sharding of its result open is an error. A loss is traced
with these types, because its author wrote it for them. What this package computes itself runs with
Auto axes (`with_auto_axes`), where `Partition.constrain` sets what matters and XLA finds the rest.
"""

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
        """The partition in JAX's notation."""
        return PartitionSpec(*(names or None for names in self.axes))

    def sharding(self, mesh: Mesh) -> NamedSharding:
        """The sharding on a mesh, spelled as `jax.jit` spells that of a result.

        A step would otherwise be compiled once for the first state and again for its own results.
        """
        entries = [names or None for names in self.axes]
        while entries and entries[-1] is None and not mesh.abstract_mesh.explicit_axes:
            entries.pop()
        return NamedSharding(mesh, PartitionSpec(*entries))

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
          like: an array on the mesh, for an `array` without a mesh of its own.
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

        def free(spec: PartitionSpec) -> PartitionSpec:
            return Partition(mesh, tuple(map(names_of, spec)))._without(mesh.manual_axes).spec

        is_spec = lambda node: isinstance(node, PartitionSpec)
        in_specs, out_specs = jax.tree.map(free, (in_specs, out_specs), is_leaf=is_spec)
        names = set(mesh.axis_names) - set(mesh.manual_axes)
        return jax.shard_map(
            f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False
        )

    def _without(self, names: Iterable[str]) -> "Partition":
        rest = lambda axes: tuple(name for name in axes if name not in names)
        return Partition(self.mesh, tuple(map(rest, self.axes)))

    def _context(self) -> AbstractMesh:
        """The mesh with the types that its axes have here, such as Manual inside a `shard_map`."""
        context = jax.sharding.get_abstract_mesh()
        return context if set(self.mesh.axis_names) <= set(context.axis_names) else self.mesh


def map_batch(partition: Partition | None, f: Callable[..., Any], *arguments: Any) -> Any:
    """`f(*arguments)` on the matrices that each device has, if devices have different ones.

    A loop over matrices that lie on several devices would gather all of them.

    Args:
      partition: of the matrices, `(*batch, rows, columns)`.
      f: a function of trees of arrays `(*batch, …)`, as its results are, which treats each matrix
        separately.
      *arguments: its arguments.
    """
    if partition is None:
        return f(*arguments)
    mesh = partition._context()
    batch = Partition(mesh, partition.axes[:-2])._without(mesh.manual_axes)
    if not batch.used:
        return f(*arguments)
    specs: Any = {"in_specs": batch.spec, "out_specs": batch.spec}
    mapped = jax.shard_map(f, mesh=mesh, axis_names=set(batch.used), check_vma=False, **specs)
    return mapped(*arguments)


def partition_of(array: Any) -> Partition | None:
    """The partition of an array or `jax.ShapeDtypeStruct` on a mesh of several devices.

    None if there is no such mesh, or if the array is traced and JAX does not show its sharding.
    """
    sharding = getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    mesh = axes_of(sharding.mesh)
    axes = [tuple(n for n in names_of(entry) if mesh.shape[n] > 1) for entry in sharding.spec]
    return Partition(mesh, (*axes, *[()] * (len(array.shape) - len(axes))))


def axes_of(mesh: Mesh | AbstractMesh) -> AbstractMesh:
    """The names and sizes of the axes alone: equal wherever and however the mesh is used."""
    types = (AxisType.Auto,) * len(mesh.axis_names)
    return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=types)


def names_of(entry: Any) -> MeshAxes:
    """The mesh axes in an entry of a `PartitionSpec`, or in any `AxisNames`."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def meshes_of(tree: PyTree) -> list[AbstractMesh]:
    """The mesh of the context, if there is one, else those of the arrays in a tree."""
    context = jax.sharding.get_abstract_mesh()
    if context.axis_names:
        return [context]
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return [jax.typeof(array).sharding.mesh for array in arrays]


def explicit_mesh(tree: PyTree) -> AbstractMesh | None:
    """The mesh of the context, or of the arrays in a tree, if it has Explicit axes."""
    return next((mesh for mesh in meshes_of(tree) if mesh.explicit_axes), None)


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
