"""How a parameter is projected, and its coordinates in a basis.

GaLore (arXiv 2403.03507, section 3) represents the gradient G of a weight matrix by its coordinates
in the span of r orthonormal vectors P: `PᵀG` (left), `G P` (right), or `PᵀG Q` (both sides).
"""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from galore_jax.ops.loops import flatten_batch
from galore_jax.ops.partition import MeshAxes, Partition, map_batch
from galore_jax.ops.quantization import as_float32, dequantize
from galore_jax.subspace.matrix_view import MatrixView

Side = Literal["left", "right"]
ProjType = Literal["std", "reverse_std", "left", "right", "full"]
Moments = Literal["keep", "rotate"]

PROJ_TYPES: tuple[str, ...] = get_args(ProjType)
MOMENTS: tuple[str, ...] = get_args(Moments)


def projected_sides(proj_type: ProjType, view: MatrixView) -> tuple[Side, ...]:
    """The sides of a matrix that a projection type selects.

    "std" (the paper) selects the smaller side, for a square Flax kernel the in side; "reverse_std"
    the other one; "full" both; "left" the in axis and "right" the out axis of a Flax kernel.
    """
    if proj_type == "full":
        return ("left", "right")
    if proj_type in ("left", "right"):
        return (proj_type,)
    smaller_is_left = view.rows <= view.columns
    return ("left",) if smaller_is_left == (proj_type == "std") else ("right",)


@dataclass(frozen=True)
class Projection:
    """How one parameter is projected.

    Attributes:
      path: path of the parameter in its tree, as names.
      view: the parameter as a batch of (in, out) matrices.
      sides: the projected sides: "left" is the in axis, "right" the out axis.
      rank: number r of basis vectors per side.
      partition: of the parameter over a mesh, from which `subspace.placement` derives everything
        else; None: unknown, or on a single device.
      over: mesh axes that do not divide the parameter, but do divide its moments.
    """

    path: tuple[str, ...]
    view: MatrixView
    sides: tuple[Side, ...]
    rank: int
    partition: Partition | None = None
    over: MeshAxes = ()

    @property
    def name(self) -> str:
        """The names of the path, joined by slashes."""
        return "/".join(self.path)

    @property
    def basis_shapes(self) -> dict[Side, tuple[int, ...]]:
        """Shapes of the vectors: `(*batch, in, r)` for left, `(*batch, out, r)` for right."""
        sizes: dict[Side, int] = {"left": self.view.rows, "right": self.view.columns}
        return {side: (*self.view.batch, sizes[side], self.rank) for side in self.sides}

    @property
    def coordinates_shape(self) -> tuple[int, ...]:
        """Left `(*batch, r, out)`, right `(*batch, in, r)`, both sides `(*batch, r, r)`."""
        rows = self.rank if "left" in self.sides else self.view.rows
        columns = self.rank if "right" in self.sides else self.view.columns
        return (*self.view.batch, rows, columns)

    def project(self, vectors: dict[Side, Any], array: jax.Array) -> jax.Array:
        """Projects an array: `PᵀG`, `G P` or `PᵀG Q`, in float32 at the default precision.

        Args:
          vectors: for each side, as `basis_shapes`.
          array: as `view.shape`.

        Returns:
          The coordinates, as `coordinates_shape`.
        """

        def project_matrices(pair: tuple[dict[Side, Any], jax.Array]) -> jax.Array:
            vectors, value = pair
            if "left" in vectors:
                value = as_float32(vectors["left"]).mT @ value
            if "right" in vectors:
                value = value @ as_float32(vectors["right"])
            return value

        pair = vectors, self.view.to_matrices(array).astype(jnp.float32)
        if self.partition is None or not self.view.batch:
            return project_matrices(pair)

        def project_one_by_one(vectors: dict[Side, Any], value: jax.Array) -> jax.Array:
            # No more than the basis of one matrix is gathered on a device.
            stacks = flatten_batch((vectors, value), len(self.view.batch))
            result = lax.map(project_matrices, stacks)
            return result.reshape(*value.shape[:-2], *result.shape[1:])

        batch = tuple(self.partition.axes[axis] for axis in self.view.batch_axes)
        partition = Partition(self.partition.mesh, (*batch, (), ()))
        return map_batch(partition, project_one_by_one, *pair)

    def lift_matrices(self, vectors: dict[Side, Any], value: jax.Array) -> jax.Array:
        """Lifts coordinates to matrices: `P N`, `N Pᵀ` or `P N Qᵀ`, in float32.

        Args:
          vectors: for each side, `(..., in or out, r)` with any leading axes.
          value: the coordinates, with the last two axes of `coordinates_shape` and the same leading
            axes.

        Returns:
          `(..., in, out)`.
        """
        if "left" in vectors:
            value = as_float32(vectors["left"]) @ value
        if "right" in vectors:
            value = value @ as_float32(vectors["right"]).mT
        return value

    def factors(
        self, vectors: dict[Side, Any], value: jax.Array
    ) -> tuple[jax.Array, jax.Array, bool]:
        """Two factors whose product is the lifted coordinates of one matrix.

        Args:
          vectors: for each side, `(in or out, r)`.
          value: the coordinates N of the matrix.

        Returns:
          `P` (in, r) and `N` (r, out) for left; `N` (in, r) and `P` (out, r) for right; `P` (in, r)
          and `N Qᵀ` (r, out) for both sides; and whether the second factor must be transposed.
        """
        vectors = {side: dequantize(stored) for side, stored in vectors.items()}
        if "left" not in vectors:
            return value, vectors["right"], True
        if "right" in vectors:
            value = value @ as_float32(vectors["right"]).mT
        return vectors["left"], value, False

    def lift(self, vectors: dict[Side, Any], value: jax.Array) -> jax.Array:
        """Lifts coordinates of `coordinates_shape` to an array of `view.shape`, in float32."""
        return self.view.from_matrices(self.lift_matrices(vectors, value))


@jax.tree_util.register_dataclass
@dataclass(eq=False)
class Coordinates:
    """A gradient, moment or update of one projected parameter, as coordinates in its basis.

    It replaces the parameter's leaf in a tree, so that every transformation after galore gives its
    state the shape of `value`.

    Attributes:
      value: array of shape `projection.coordinates_shape`.
      projection: static.
      decay: None, or the fraction of the parameter itself that the update subtracts (weight decay),
        a scalar or one value per matrix, `(*batch,)`. `add_decayed_full_weights` sets it, and must
        be the last transformation.
    """

    value: Any
    projection: Projection = field(metadata={"static": True})
    decay: Any = None


def is_coordinates(node: Any) -> bool:
    """Whether a node is `Coordinates`, for the argument `is_leaf` of tree maps."""
    return isinstance(node, Coordinates)
