"""A loss evaluated so that its products with projected parameters give coordinates.

The loss is traced once, with plain arrays. Its jaxpr is then evaluated equation by equation, with a
`Tracked` value for each projected parameter. An equation that has a rule passes tracked values on
or makes projected products. Any other equation takes plain arrays, which are differentiated in the
ordinary way, and is reported. What is not recognised is therefore exact, and merely costs more.

This is the only file that knows about jaxprs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core, source_info_util
from jax.interpreters.partial_eval import dce_jaxpr

from galore_jax.product import Axis, Tracked, projected_product

PyTree = Any
Equation = core.JaxprEqn
# Told the number of a parameter's leaf and how it is used: None is a projected product, a text says
# which primitive, in which line of the source, takes the plain array.
Report = Callable[[int, str | None], None]

# Name of a jitted product of two arrays whose own derivative is that of the plain product, up to
# rounding: see `models.layers.matmul`.
PRODUCT = "galore_jax_product"


class Program(NamedTuple):
    """A traced function of parameters that returns a value and something beside it, a pair.

    Attributes:
      jaxpr: from the leaves of the parameters to the arrays that the function returned.
      consts: of the jaxpr.
      assemble: makes of these arrays what the function returned.
    """

    jaxpr: core.Jaxpr
    consts: Sequence[Any]
    assemble: Callable[[list[Any]], PyTree]

    def __call__(self, leaves: Sequence[Any], report: Report) -> PyTree:
        """What the function returns, given leaves of which some are `Tracked`."""
        return self.assemble(_plain(_evaluate(self.jaxpr, self.consts, leaves, report)))

    def value_alone(self) -> "Program":
        """The program without what only the second of the pair depends on, which becomes None."""
        wanted = [i == 0 for i in range(len(self.jaxpr.outvars))]
        jaxpr, _ = dce_jaxpr(self.jaxpr, wanted, instantiate=True)
        return Program(jaxpr, self.consts, lambda outputs: (outputs[0], None))


def trace(f: Callable[[PyTree], tuple[Any, Any]], params: PyTree) -> Program:
    """Traces `f(params)`, a pair of a number and anything, also of things that are no arrays."""
    leaves, tree = jax.tree.flatten(params)
    returned: list[Any] = []

    def flat(*leaves: Any) -> list[Any]:
        outputs, structure = jax.tree.flatten(f(tree.unflatten(leaves)))
        is_array = [core.valid_jaxtype(output) for output in outputs]
        arrays = [output for output, yes in zip(outputs, is_array, strict=True) if yes]
        others = [None if yes else output for output, yes in zip(outputs, is_array, strict=True)]
        returned[:] = structure, is_array, others
        return arrays

    closed = jax.make_jaxpr(flat)(*leaves)
    structure, is_array, others = returned

    def assemble(arrays: list[Any]) -> PyTree:
        left, outputs = iter(arrays), zip(is_array, others, strict=True)
        return structure.unflatten([next(left) if yes else other for yes, other in outputs])

    return Program(closed.jaxpr, closed.consts, assemble)


def dependencies(f: Callable[..., tuple], *arguments: PyTree) -> tuple[list[list[bool]], tuple]:
    """Which leaves of the arguments each part of the tuple `f(*arguments)` depends on.

    Returns:
      A list of flags for each part; and the shapes of what was returned.
    """
    leaves, tree = jax.tree.flatten(arguments)
    of = lambda *leaves: f(*tree.unflatten(leaves))  # noqa: E731
    closed, shapes = jax.make_jaxpr(of, return_shape=True)(*leaves)
    owners = [i for i, part in enumerate(shapes) for _ in jax.tree.leaves(part)]
    wanted = [[owner == i for owner in owners] for i in range(len(shapes))]
    return [dce_jaxpr(closed.jaxpr, flags)[1] for flags in wanted], shapes


def _evaluate(
    jaxpr: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[Any], report: Report
) -> list[Any]:
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
    read = lambda atom: atom.val if isinstance(atom, core.Literal) else values[atom]  # noqa: E731
    for equation in jaxpr.eqns:
        outputs = _apply(equation, [read(atom) for atom in equation.invars], report)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _inside(jaxpr: Any, operands: Sequence[Any], report: Report) -> list[Any]:
    """What a jaxpr among an equation's parameters gives; some carry constants."""
    is_closed = isinstance(jaxpr, core.ClosedJaxpr)
    jaxpr, consts = (jaxpr.jaxpr, jaxpr.consts) if is_closed else (jaxpr, ())
    return _evaluate(jaxpr, consts, operands, report)


def _apply(equation: Equation, operands: list[Any], report: Report) -> list[Any]:
    tracked = [value for value in operands if isinstance(value, Tracked)]
    if not tracked:
        return _bind(equation, operands)
    rule, *layouts = RULES.get(equation.primitive.name, (None,))
    if rule is not None and any(layout <= equation.params.keys() for layout in layouts):
        source = equation.source_info
        scope = source_info_util.current_name_stack() + source.name_stack
        with source_info_util.user_context(source.traceback, name_stack=scope):
            outputs = rule(equation, operands, report)
        if outputs is not None:
            return outputs
    return _bind(equation, _used_otherwise(equation, operands, report))


def _used_otherwise(equation: Equation, operands: Sequence[Any], report: Report) -> list[Any]:
    """Plain operands, of which the tracked ones are reported if a gradient may flow to them."""
    dtypes = [getattr(var.aval, "dtype", jnp.float32) for var in equation.outvars]
    flows = equation.effects or any(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes)
    if flows and not equation.primitive.name.startswith("debug_"):
        place = source_info_util.summarize(equation.source_info)
        for value in operands:
            if isinstance(value, Tracked):
                report(value.leaf, f"{equation.primitive.name} at {place}")
    return _plain(operands)


def _plain(operands: Sequence[Any]) -> list[Any]:
    return [value.array if isinstance(value, Tracked) else value for value in operands]


def _bind(equation: Equation, operands: Sequence[Any]) -> list[Any]:
    """The outputs of an equation of plain operands."""
    pairs = zip(equation.invars, operands, strict=True)
    values = {atom: value for atom, value in pairs if not isinstance(atom, core.Literal)}
    kept = [var for var in equation.outvars if not isinstance(var, core.DropVar)]
    debug = core.DebugInfo("rewrite", equation.primitive.name, None, None)
    jaxpr = core.Jaxpr((), list(values), kept, [equation], equation.effects, debug)
    found = iter(core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))(*values.values()))
    return [None if isinstance(var, core.DropVar) else next(found) for var in equation.outvars]


# Rules of products.


def _dot_general(equation: Equation, operands: list[Any], report: Report) -> list[Any] | None:
    return _projected(equation, operands, equation.params["dimension_numbers"], report)


def _projected(
    equation: Equation, operands: list[Any], numbers: Any, report: Report
) -> list[Any] | None:
    """The product of the two operands of an equation, if just one of them is tracked."""
    first = isinstance(operands[0], Tracked)  # the kernel
    order = slice(None, None, -1) if first else slice(None)
    x, kernel = operands[order]
    if isinstance(x, Tracked):
        return None
    contracting, batch = numbers
    dot = lambda *pair: _bind(equation, pair[order])[0]  # noqa: E731
    product = projected_product(dot, x, kernel, (contracting[order], batch[order]), first)
    if product is None:
        return None
    report(kernel.leaf, None)
    return [product]


def _numbers_of_marked(equation: Equation) -> Any:
    """Dimension numbers of a jitted function named `PRODUCT`; of any other None."""
    if equation.params["name"] != PRODUCT:
        return None
    jaxpr = getattr(equation.params["jaxpr"], "jaxpr", None)
    for expected in ("custom_vjp_call", "dot_general"):
        inner, *rest = jaxpr.eqns
        casts = all(later.primitive.name == "convert_element_type" for later in rest)
        if inner.primitive.name != expected or inner.invars != jaxpr.invars or not casts:
            return None
        jaxpr = getattr(inner.params.get("call_jaxpr"), "jaxpr", None)
    return inner.params["dimension_numbers"]


# Rules that pass tracked values on.


def _unchanged(equation: Equation, operands: list[Any], report: Report) -> list[Any]:
    del report
    outputs = zip(operands, _bind(equation, _plain(operands)), strict=True)
    return [
        replace(value, array=output) if isinstance(value, Tracked) else output
        for value, output in outputs
    ]


def _cast(equation: Equation, operands: list[Any], report: Report) -> list[Any] | None:
    is_float = jnp.issubdtype(equation.params["new_dtype"], jnp.floating)
    return _unchanged(equation, operands, report) if is_float else None


def _stop_gradient(equation: Equation, operands: list[Any], report: Report) -> list[Any]:
    del report
    return _bind(equation, _plain(operands))


def _transpose(equation: Equation, operands: list[Any], report: Report) -> list[Any]:
    [value] = _unchanged(equation, operands, report)
    axes = tuple(value.axes[axis] for axis in equation.params["permutation"])
    return [replace(value, axes=axes)]


def _reshape(equation: Equation, operands: list[Any], report: Report) -> list[Any] | None:
    value, *dynamic = operands
    old, new = value.array.shape, equation.params["new_sizes"]
    if dynamic or equation.params["dimensions"] is not None or 0 in old:
        return None
    # Each group of axes has to be of one kind, as in (model) → (heads, head size).
    keys: list[tuple[str, int, int]] = []
    for before, after in _groups(old, new):
        axes = [value.axes[i] for i in before]
        kind, place = axes[0] if axes else ("batch", -1)
        if axes != [(kind, place + n) for n in range(len(axes))]:
            return None
        keys += [(kind, place, i) for i in after]
    if {kind for kind, _, _ in keys} < {kind for kind, _ in value.axes} - {"batch"}:
        return None
    [array] = _bind(equation, [value.array])
    ordered = sorted(range(len(new)), key=keys.__getitem__)
    places: dict[int, int] = {}
    for i in ordered:
        places[i] = sum(keys[i][0] == keys[other][0] for other in places)
    axes = tuple((keys[i][0], places[i]) for i in range(len(new)))
    batch = [new[i] for i in ordered if keys[i][0] == "batch"]
    return [_moved(value, array, axes, lambda stack: stack.reshape(*batch, *stack.shape[-2:]))]


def _groups(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[range, range]]:
    """The least runs of axes that a reshape turns into one another."""
    i = j = 0
    while i < len(old) or j < len(new):
        start = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while (a := math.prod(old[start[0] : i])) != (b := math.prod(new[start[1] : j])):
            i, j = (i + 1, j) if a < b else (i, j + 1)
        yield range(start[0], i), range(start[1], j)


def _moved(
    value: Tracked, array: Any, axes: Sequence[Axis], change: Callable[[Any], Any]
) -> Tracked:
    vectors, coordinates = jax.tree.map(change, (value.vectors, value.coordinates))
    return Tracked(array, vectors, coordinates, tuple(axes), value.leaf)


def _matrices_moved(equation: Equation, operands: list[Any], report: Report) -> list[Any] | None:
    """What moves, repeats or leaves out whole matrices.

    Which ones is seen by applying the equation to the numbers of the matrices, with sides of one.
    """
    del report
    value, *others = operands
    name, params, shape = equation.primitive.name, dict(equation.params), value.array.shape
    rank = equation.outvars[0].aval.ndim
    sides = {i for i, (kind, _) in enumerate(value.axes) if kind != "batch"}
    number = math.prod(value.coordinates.shape[:-2])

    # Of each axis of the outputs, which axis of the operand it is; None: a new one.
    sources: list[int | None] = list(range(len(shape)))
    touched: set[int] = set()
    if name == "rev":
        touched = {*params["dimensions"]}
    elif name in ("squeeze", "unstack"):
        gone = (params["axis"],) if name == "unstack" else params["dimensions"]
        sources = [i for i in sources if i not in gone]
    elif name == "broadcast_in_dim":
        kept = list(params["broadcast_dimensions"])
        sources = [kept.index(i) if i in kept else None for i in range(rank)]
    elif name == "gather":
        numbers = params["dimension_numbers"]
        dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        clips = params["mode"] is lax.GatherScatterMode.CLIP  # A full slice then starts at 0.
        touched = {*dropped, *(() if clips else numbers.start_index_map)}
        inner = iter([i for i in sources if i not in dropped])
        sources = [next(inner) if i in numbers.offset_dims else None for i in range(rank)]
        params["fill_value"] = number  # There is no such matrix.
    place = {source: i for i, source in enumerate(sources)}
    shapes = [var.aval.shape for var in equation.outvars]
    whole = lambda i: i in place and all(own[place[i]] == shape[i] for own in shapes)  # noqa: E731
    if touched & sides or not all(map(whole, sides)):
        return None

    # The equation with sides of one.
    after = {place[i] for i in sides}
    for key, ones in (("limit_indices", sides), ("slice_sizes", sides), ("shape", after)):
        if key in params:
            params[key] = tuple(1 if i in ones else size for i, size in enumerate(params[key]))
    batch = [i for i in range(len(shape)) if i not in sides]
    numbers = np.arange(number).reshape(value.coordinates.shape[:-2])
    numbers = numbers.transpose([value.axes[i][1] for i in batch])
    numbers = numbers.reshape([1 if i in sides else size for i, size in enumerate(shape)])
    with nullcontext() if others else jax.ensure_compile_time_eval():
        chosen = _bind(equation.replace(params=params), [numbers, *others])

    batch = [i for i in range(rank) if i not in after]
    axes = {i: value.axes[sources[i]] for i in after} | {
        axis: ("batch", i) for i, axis in enumerate(batch)
    }
    arrays = _bind(equation, [value.array, *others])
    return [
        _moved(
            value,
            array,
            [axes[i] for i in range(rank)],
            partial(_take, numbers.reshape([array.shape[i] for i in batch])),
        )
        for array, numbers in zip(arrays, chosen, strict=True)
    ]


def _take(numbers: jax.Array, stack: jax.Array) -> jax.Array:
    """Of a stack `(*batch, n, r)` the matrices of these numbers."""
    flat = stack.reshape(-1, *stack.shape[-2:])
    if not isinstance(numbers, jax.core.Tracer):
        numbers = np.asarray(numbers)
        start, size = int(numbers.min()), numbers.size
        if np.array_equal(numbers.ravel(), np.arange(start, start + size)):
            return flat[start : start + size].reshape(*numbers.shape, *stack.shape[-2:])
    return jnp.take(flat, numbers, axis=0, mode="fill", fill_value=0)


# Rules that enter a function.


def _jit(equation: Equation, operands: list[Any], report: Report) -> list[Any] | None:
    numbers = _numbers_of_marked(equation)
    if numbers is not None:
        return _projected(equation, operands, numbers, report)
    params = equation.params
    operands = _constrained(operands, params["in_shardings"])
    return _constrained(_inside(params["jaxpr"], operands, report), params["out_shardings"])


def _constrained(values: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
    """Values with the shardings that a jit gives them, which is lost when it is inlined."""

    def constrain(value: Any, sharding: Any) -> Any:
        if not isinstance(sharding, jax.sharding.Sharding):
            return value
        array = lax.with_sharding_constraint(*_plain([value]), sharding)
        return replace(value, array=array) if isinstance(value, Tracked) else array

    return [constrain(*pair) for pair in zip(values, shardings, strict=True)]


def _call(equation: Equation, operands: list[Any], report: Report) -> list[Any]:
    return _inside(equation.params["call_jaxpr"], operands, report)


def _remat(equation: Equation, operands: list[Any], report: Report) -> list[Any] | None:
    settings = dict(equation.params)
    jaxpr, _ = settings.pop("jaxpr"), settings.pop("differentiated")
    if settings.keys() != {"policy", "prevent_cse"}:
        return None
    inside = lambda *operands: _inside(jaxpr, operands, report)  # noqa: E731
    return jax.checkpoint(inside, **settings)(*operands)


def _scan(equation: Equation, operands: list[Any], report: Report) -> list[Any] | None:
    settings = dict(equation.params)
    jaxpr = settings.pop("jaxpr")
    if "ft_in" in settings:
        parts = settings.pop("ft_in").update(operands).unpack()
        consts, carry, xs = map(list, parts)
        settings.pop("ft_out")
    else:
        numbers = settings.pop("num_consts"), settings.pop("num_carry")
        consts, carry, xs = (
            operands[: numbers[0]],
            operands[numbers[0] : sum(numbers)],
            operands[sum(numbers) :],
        )
    if settings.keys() != {"length", "reverse", "unroll"}:
        return None

    def sliced(value: Any) -> Any:
        """What the body gets a slice of: its axes are those of the slice already."""
        if not isinstance(value, Tracked):
            return value
        (kind, place), *axes = value.axes
        if kind != "batch":
            return _used_otherwise(equation, [value], report)[0]
        axes = [(k, i - (k == kind and i > place)) for k, i in axes]
        return _moved(value, value.array, axes, lambda stack: jnp.moveaxis(stack, place, 0))

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        outputs = _inside(jaxpr, (*consts, *carry, *xs), report)
        outputs = _used_otherwise(equation, outputs, report)
        return outputs[: len(carry)], outputs[len(carry) :]

    carry = _used_otherwise(equation, carry, report)
    carry, ys = lax.scan(body, carry, [sliced(value) for value in xs], **settings)
    return [*carry, *ys]


def _cond(equation: Equation, operands: list[Any], report: Report) -> list[Any] | None:
    if equation.params.keys() != {"branches"}:
        return None

    def branch(jaxpr: Any) -> Callable[..., list[Any]]:
        return lambda *operands: _used_otherwise(equation, _inside(jaxpr, operands, report), report)

    index, *others = operands
    return lax.switch(index, [branch(jaxpr) for jaxpr in equation.params["branches"]], *others)


# By the name of a primitive its rule and the parameters that the rule reads, by versions of JAX. A
# rule returns the values of the outputs, or None: it does not fit the operands.
RULES: dict[str, tuple[Callable[..., list[Any] | None], *tuple[set[str], ...]]] = {
    "dot_general": (_dot_general, {"dimension_numbers"}),
    "convert_element_type": (_cast, {"new_dtype"}),
    "stop_gradient": (_stop_gradient, set()),
    "transpose": (_transpose, {"permutation"}),
    "reshape": (_reshape, {"new_sizes", "dimensions"}),
    "jit": (_jit, {"jaxpr", "name", "in_shardings", "out_shardings"}),
    "closed_call": (_call, {"call_jaxpr"}),
    "remat2": (_remat, {"jaxpr", "differentiated"}),
    "scan": (_scan, {"jaxpr", "num_consts", "num_carry"}, {"jaxpr", "ft_in", "ft_out"}),
    "cond": (_cond, {"branches"}),
    "slice": (_matrices_moved, {"start_indices", "limit_indices", "strides"}),
    "dynamic_slice": (_matrices_moved, {"slice_sizes"}),
    "squeeze": (_matrices_moved, {"dimensions"}),
    "rev": (_matrices_moved, {"dimensions"}),
    "split": (_matrices_moved, {"axis", "sizes"}),
    "unstack": (_matrices_moved, {"axis"}),
    "broadcast_in_dim": (_matrices_moved, {"shape", "broadcast_dimensions"}),
    "gather": (
        _matrices_moved,
        {"dimension_numbers", "fill_value", "mode", "slice_sizes"},
    ),
} | dict.fromkeys(
    ("copy", "name", "sharding_constraint", "optimization_barrier", "device_put", "pvary"),
    (_unchanged, set()),
)
