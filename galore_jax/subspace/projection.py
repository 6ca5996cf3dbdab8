"""The words of GaLore: a projection, a basis, and coordinates in it.

GaLore, arXiv 2403.03507, section 3: the gradient G of a weight matrix is kept as its coordinates
in the span of r orthonormal vectors P: `PᵀG` (left), `G P` (right), or both at once.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from galore_jax.ops.quantization import as_float32, dequantize
from galore_jax.subspace.matrix_view import MatrixView

Side = Literal["left", "right"]
ProjType = Literal["std", "reverse_std", "left", "right", "full"]
Moments = Literal["keep", "reset", "rotate"]

PROJ_TYPES: tuple[str, ...] = get_args(ProjType)
MOMENTS: tuple[str, ...] = get_args(Moments)


def projected_sides(proj_type: ProjType, view: MatrixView) -> tuple[Side, ...]:
    """The sides that a projection type means for a matrix.

    "std" (the paper) is the smaller side, of a square Flax kernel the in side; "reverse_std" the
    other one; "full" both; "left" the in axis and "right" the out axis of the Flax kernel.
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
      path: of the parameter in its tree, the names.
      view: the parameter as a batch of (in, out) matrices.
      sides: which are projected: "left" is the in axis, "right" the out axis.
      rank: number r of basis vectors of each.
    """

    path: tuple[str, ...]
    view: MatrixView
    sides: tuple[Side, ...]
    rank: int

    @property
    def name(self) -> str:
        """The path for people."""
        return "/".join(self.path)

    @property
    def basis_shapes(self) -> dict[Side, tuple[int, ...]]:
        """`(*batch, in, r)` for left, `(*batch, out, r)` for right."""
        sizes: dict[Side, int] = {"left": self.view.rows, "right": self.view.columns}
        return {side: (*self.view.batch, sizes[side], self.rank) for side in self.sides}

    @property
    def coordinates_shape(self) -> tuple[int, ...]:
        """`(*batch, r, out)` for left, `(*batch, in, r)` for right, `(*batch, r, r)` for both."""
        rows = self.rank if "left" in self.sides else self.view.rows
        columns = self.rank if "right" in self.sides else self.view.columns
        return (*self.view.batch, rows, columns)

    def project(self, vectors: dict[Side, Any], array: jax.Array) -> jax.Array:
        """`PᵀG`, `G P` or `PᵀG Q`: from `view.shape` to `coordinates_shape`, in float32."""
        value = self.view.to_matrices(array).astype(jnp.float32)
        if "left" in vectors:
            value = as_float32(vectors["left"]).mT @ value
        if "right" in vectors:
            value = value @ as_float32(vectors["right"])
        return value

    def lift_matrices(self, vectors: dict[Side, Any], value: jax.Array) -> jax.Array:
        """`P N`, `N Pᵀ` or `P N Qᵀ`, in float32.

        Args:
          vectors: `(..., in or out, r)`, any axes in front.
          value: as `coordinates_shape`, the same axes in front.

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
        """Two matrices whose product lifts the coordinates of one matrix.

        Returns:
          `P` and `N` (left), `N` and `P` (right), or `P` and `N Qᵀ`; and whether the second one is
          to be transposed.
        """
        vectors = {side: dequantize(own) for side, own in vectors.items()}
        if "left" not in vectors:
            return value, vectors["right"], True
        if "right" in vectors:
            value = value @ as_float32(vectors["right"]).mT
        return vectors["left"], value, False

    def lift(self, vectors: dict[Side, Any], value: jax.Array) -> jax.Array:
        """From `basis_shapes` and `coordinates_shape` to an array of `view.shape`, in float32."""
        return self.view.from_matrices(self.lift_matrices(vectors, value))


@jax.tree_util.register_dataclass
@dataclass(eq=False)
class Coordinates:
    """A gradient, moment or update of one projected parameter, in its basis.

    Stands in a tree where the parameter's leaf stood, so that every transformation after galore
    shapes its state by `value`.

    Attributes:
      value: `projection.coordinates_shape`.
      projection: static.
      decay: None, or the fraction of the parameter itself that the update takes away, a scalar or
        one a matrix, `(*batch,)`; set by `decay_weights`, after which no other transformation may
        come.
    """

    value: Any
    projection: Projection = field(metadata={"static": True})
    decay: Any = None


def is_coordinates(node: Any) -> bool:
    """For `is_leaf` of tree maps over parameters or updates."""
    return isinstance(node, Coordinates)
