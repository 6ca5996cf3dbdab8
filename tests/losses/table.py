"""What the tables of losses share: a case, how one is declared, and small parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax.types import PyTree

Example = tuple[Callable, PyTree, tuple, dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A loss and what is expected of its gradient.

    Attributes:
      name: a phrase that says what is special about the loss.
      build: returns the loss, its parameters, its batch, and settings: `has_aux` and
        `micro_batches` of `value_and_grad`; `keywords` of the loss; `tolerance`, of the largest
        entry; `zero`, names of leaves whose gradient vanishes; all others are for `galore`.
      status: of each kernel that can be projected, by name. "projected": its whole gradient comes
        from projected products in the backward pass; "partly": the gradient of some uses is
        formed in full, projected and added; "full": there is no projected product.
      x64: whether JAX's numbers of 64 bits are enabled.
    """

    name: str
    build: Callable[[], Example]
    status: dict[str, str]
    x64: bool = False

    def __str__(self):
        return self.name


class Table(list[Case]):
    """The cases of one module, declared by decorators; a function's name is the case's name."""

    def model(self, *, projected: str = "", partly: str = "", full: str = "", x64: bool = False):
        """A case from a function without arguments that returns an `Example`.

        Args:
          projected: names of the kernels of this status, separated by spaces.
          partly: likewise.
          full: likewise.
          x64: see `Case`.
        """
        status = {
            name: key
            for key, names in (("projected", projected), ("partly", partly), ("full", full))
            for name in names.split()
        }

        def declare(build: Callable[[], Example]):
            self.append(Case(build.__name__.replace("_", "-"), build, status, x64))
            return build

        return declare

    def loss(
        self,
        *,
        params: Callable[[], PyTree] | None = None,
        batch: Callable[[], tuple] | None = None,
        projected: str = "",
        partly: str = "",
        full: str = "",
        x64: bool = False,
        **settings,
    ):
        """A case from the loss itself, by default of `mlp()` and five inputs."""

        def declare(loss: Callable):
            def build() -> Example:
                own = (params or mlp)()
                return loss, own, batch() if batch else (inputs(5, 6),), dict(settings)

            build.__name__ = loss.__name__
            self.model(projected=projected, partly=partly, full=full, x64=x64)(build)
            return loss

        return declare

    def rows(self, form: Callable[[Callable], Callable], **common):
        """A short way to declare losses that differ in one function only.

        Returns a function of a case's name, the function `f` that makes the loss `form(f)`, the
        batch (by default five inputs; a tuple is the shape of inputs, and other numbers are
        indices), and the arguments of `loss` that differ from `common`.
        """

        def declare(name: str, f: Callable, *batch, **settings):
            loss = lambda *arguments: form(f)(*arguments)
            loss.__name__ = name.replace(" ", "_")
            made = lambda: tuple(
                inputs(*own) if isinstance(own, tuple) else jnp.array(own, jnp.int32)
                for own in batch
            )
            own = {"batch": made} if batch else {}
            self.loss(**common | own | settings)(loss)

        return declare


def normal(*shape: int, seed: int = 0, scale: float = 0.5) -> jax.Array:
    """Drawn by NumPy, which has nothing to compile."""
    rng = np.random.default_rng((seed, *shape))
    return jnp.asarray(scale * rng.normal(size=shape).astype(np.float32))


def inputs(*shape: int) -> jax.Array:
    return normal(*shape, seed=1, scale=1.0)


def given(*shape: int) -> Callable[[], tuple[jax.Array]]:
    """A batch of inputs of this shape."""
    return lambda: (inputs(*shape),)


def filled(shapes: PyTree) -> PyTree:
    """Arrays in place of `jax.ShapeDtypeStruct`: a model's parameters without its `init`."""
    leaves, tree = jax.tree.flatten(shapes)
    arrays = [normal(*leaf.shape, seed=seed).astype(leaf.dtype) for seed, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, arrays)


def mlp() -> dict[str, jax.Array]:
    """Two kernels, of which one is projected on its in axis, the other on its out axis."""
    return {"w1": normal(6, 8), "b1": normal(8), "w2": normal(8, 6)}


def network(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"]


def squared(y: jax.Array) -> jax.Array:
    """A scalar whose gradient is dense."""
    return jnp.mean(jnp.sin(y.astype(jnp.float32)) ** 2)


def output(f: Callable) -> Callable:
    """A loss of what a function makes of parameters and batch; a form for `Table.rows`."""
    return lambda params, *batch, **keywords: squared(f(params, *batch, **keywords))


def kernel(name: str, *shape: int) -> Callable[[], dict[str, jax.Array]]:
    """A single kernel by its name."""
    return lambda: {name: normal(*shape)}


def sum_of_squares(tree: PyTree) -> jax.Array:
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))


def stack(*batch: int) -> Callable[[], dict[str, jax.Array]]:
    """Square kernels for activations with six features."""
    return kernel("ws", *batch, 6, 6)
