"""A loss evaluated so that its products with projected parameters give coordinates.

The loss is traced once, with plain arrays. Its jaxpr is then evaluated equation by equation, with a
`Tracked` value for each projected parameter. An equation that has a rule passes tracked values on
or makes projected products. Any other equation takes plain arrays, which are differentiated in the
ordinary way, and is reported. What is not recognised is therefore exact, and merely costs more.

This is the only file that knows about jaxprs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core, source_info_util
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import Sharding

from galore_jax.grads.product import BATCH, Tracked, kind, projected_product
from galore_jax.types import PyTree

# Told the number of a parameter's leaf and how it is used: None is a projected product, a text says
# which primitive, in which line of the source, takes the plain array.
Report = Callable[[int, str | None], None]

# Name of a jitted product of two arrays whose own derivative is that of the plain product, up to
# rounding: see `models.layers.matmul`.
PRODUCT = "galore_jax_product"


class NoRule(Exception):
    """An equation, its parameters or its operands are not as the rule of its primitive wants."""


class _Parameters(dict):
    """Of an equation; versions of JAX may name them otherwise."""

    def __missing__(self, name: str) -> Any:
        raise NoRule

    def settings(self, names: set[str], *, besides: set[str]) -> dict[str, Any]:
        """Those of these names, to pass on; there must be no others besides."""
        if self.keys() != names | besides:
            raise NoRule
        return {name: self[name] for name in names}


class Program:
    """A function of parameters, traced, that returns a number and any arrays beside it, a pair."""

    def __init__(self, f: Callable[[PyTree], tuple[Any, Any]], params: PyTree):
        leaves, tree = jax.tree.flatten(params)
        of = lambda *leaves: f(tree.unflatten(leaves))
        closed, shapes = jax.make_jaxpr(of, return_shape=True)(*leaves)
        self._jaxpr, self._consts, self._outputs = *_opened(closed), jax.tree.structure(shapes)

    def __call__(self, leaves: Sequence[Any], report: Report) -> tuple[Any, Any]:
        """What the function returns, given leaves of which some are `Tracked`."""
        outputs = _evaluate(self._jaxpr, self._consts, leaves, report)
        return self._outputs.unflatten(_plain(outputs))

    def number(self, leaves: Sequence[Any], report: Report) -> Any:
        """The number alone, without what only the rest depends on."""
        wanted = [i == 0 for i in range(len(self._jaxpr.outvars))]
        jaxpr, _ = dce_jaxpr(self._jaxpr, wanted, instantiate=True)
        return _plain(_evaluate(jaxpr, self._consts, leaves, report))[0]


def dependencies(f: Callable[..., tuple], *arguments: PyTree) -> tuple[list[list[bool]], tuple]:
    """For each part of the tuple `f(*arguments)`, which leaves it depends on; and its shapes."""
    leaves, tree = jax.tree.flatten(arguments)
    of = lambda *leaves: f(*tree.unflatten(leaves))
    closed, shapes = jax.make_jaxpr(of, return_shape=True)(*leaves)
    owners = [i for i, part in enumerate(shapes) for _ in jax.tree.leaves(part)]
    wanted = [[owner == i for owner in owners] for i in range(len(shapes))]
    return [dce_jaxpr(closed.jaxpr, flags)[1] for flags in wanted], shapes


def _evaluate(
    jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any], report: Report
) -> list[Any]:
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
    read = lambda atom: atom.val if isinstance(atom, core.Literal) else values[atom]
    for equation in jaxpr.eqns:
        outputs = _apply(equation, [read(atom) for atom in equation.invars], report)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _inside(jaxpr: Any, operands: Sequence[Any], report: Report) -> list[Any]:
    """What a jaxpr among an equation's parameters gives."""
    return _evaluate(*_opened(jaxpr), operands, report)


def _opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and its constants, which some carry."""
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, core.ClosedJaxpr) else (jaxpr, ())


def _apply(equation: Any, operands: list[Any], report: Report) -> list[Any]:
    rule = RULES.get(equation.primitive.name)
    is_tracked = any(isinstance(value, Tracked) for value in operands)
    if is_tracked and rule is not None:
        source = equation.source_info
        scope = source_info_util.current_name_stack() + source.name_stack
        # In its scope it needs none of its own.
        inner = equation.replace(
            source_info=source.replace(name_stack=source_info_util.new_name_stack())
        )
        try:
            with source_info_util.user_context(source.traceback, name_stack=scope):
                return rule(inner, _Parameters(equation.params), operands, report)
        except NoRule:
            pass
    return _bind(equation, _used_otherwise(equation, operands, report))


def _used_otherwise(equation: Any, operands: Sequence[Any], report: Report) -> list[Any]:
    """Plain operands, of which the tracked ones are reported if a gradient may flow to them."""
    dtypes = [getattr(var.aval, "dtype", jnp.float32) for var in equation.outvars]
    flows = equation.effects or any(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes)
    if flows and not equation.primitive.name.startswith("debug_"):
        for value in operands:
            if isinstance(value, Tracked):
                place = source_info_util.summarize(equation.source_info)
                report(value.leaf, f"{equation.primitive.name} at {place}")
    return _plain(operands)


def _plain(values: Sequence[Any]) -> list[Any]:
    return [value.array if isinstance(value, Tracked) else value for value in values]


def _with_arrays(values: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
    """Other arrays in place of those of the values, which are tracked as before."""
    return [
        replace(value, array=array) if isinstance(value, Tracked) else array
        for value, array in zip(values, arrays, strict=True)
    ]


def _bind(equation: Any, operands: Sequence[Any]) -> list[Any]:
    """The outputs of an equation of plain operands."""
    pairs = zip(equation.invars, operands, strict=True)
    values = {atom: value for atom, value in pairs if not isinstance(atom, core.Literal)}
    kept = [var for var in equation.outvars if not isinstance(var, core.DropVar)]
    debug = core.DebugInfo("rewrite", equation.primitive.name, None, None)
    jaxpr = core.Jaxpr((), list(values), kept, [equation], equation.effects, debug)
    found = iter(core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))(*values.values()))
    return [None if isinstance(var, core.DropVar) else next(found) for var in equation.outvars]


# Rules: of an equation, its parameters, its operands, of which one at least is tracked, and a
# report; they return the outputs. First those of products.


def _dot_general(equation: Any, params: Any, operands: list[Any], report: Report) -> list[Any]:
    first = isinstance(operands[0], Tracked)  # the kernel
    order = slice(None, None, -1 if first else 1)
    x, kernel = operands[order]
    if isinstance(x, Tracked):
        raise NoRule
    contracting, batch = params["dimension_numbers"]
    dot = lambda *pair: _bind(equation, pair[order])[0]
    product = projected_product(dot, x, kernel, (contracting[order], batch[order]), first)
    if product is None:
        raise NoRule
    report(kernel.leaf, None)
    return [product]


def _marked_product(params: Any) -> Any:
    """Parameters of the dot_general inside of a jitted function named `PRODUCT`, or None."""
    if params["name"] != PRODUCT:
        return None
    for key, expected in (("jaxpr", "custom_vjp_call"), ("call_jaxpr", "dot_general")):
        jaxpr, _ = _opened(params[key])
        equation, *casts = jaxpr.eqns
        names = [equation.primitive.name, *(cast.primitive.name for cast in casts)]
        if {*names} - {"convert_element_type"} != {expected} or equation.invars != jaxpr.invars:
            return None
        params = _Parameters(equation.params)
    return params


# Rules that pass tracked values on. What selects or moves matrices does so to their vectors and
# coordinates as well.


def _unchanged(equation: Any, params: Any, operands: list[Any], report: Report) -> list[Any]:
    return _with_arrays(operands, _bind(equation, _plain(operands)))


def _cast(equation: Any, params: Any, operands: list[Any], report: Report) -> list[Any]:
    if not jnp.issubdtype(params["new_dtype"], jnp.floating):
        raise NoRule
    return _unchanged(equation, params, operands, report)


def _stop_gradient(equation: Any, params: Any, operands: list[Any], report: Report) -> list[Any]:
    return _bind(equation, _plain(operands))


def _moved(
    value: Tracked, array: Any, axes: Sequence[str], change: Callable[[jax.Array], jax.Array]
) -> Tracked:
    """A tracked value whose stacks `(*batch, n, r)` are changed as its array was.

    The letters of its axes become consecutive: those of the batch in the order of the axes, those
    of a side in the order of the given texts, which begin with a letter of that side.
    """
    order = {i: (kind(axis), i if kind(axis) == BATCH else axis) for i, axis in enumerate(axes)}
    before = lambda i, j: order[j][0] == order[i][0] and order[j] < order[i]
    letters = [chr(ord(order[i][0]) + sum(before(i, j) for j in order)) for i in order]
    vectors, coordinates = jax.tree.map(change, (value.vectors, value.coordinates))
    return Tracked(array, vectors, coordinates, "".join(letters), value.leaf)


def _transpose(equation: Any, params: Any, operands: list[Any], report: Report) -> list[Any]:
    [value] = operands
    axes = [value.axes[axis] for axis in params["permutation"]]
    batch = [ord(axis) - ord(BATCH) for axis in axes if kind(axis) == BATCH]
    change = lambda stack: stack.transpose(*batch, len(batch), len(batch) + 1)
    return [_moved(value, _bind(equation, [value.array])[0], axes, change)]


def _reshape(equation: Any, params: Any, operands: list[Any], report: Report) -> list[Any]:
    value, *dynamic = operands
    old, new = value.array.shape, params["new_sizes"]
    if dynamic or params["dimensions"] is not None or 0 in old:
        raise NoRule
    axes: list[str] = []
    for before, after in _groups(old, new):
        # In a group there is one kind of axes, in their order, as in (model) → (heads, head size).
        group = [value.axes[i] for i in before if old[i] > 1] or [BATCH]
        if group != [chr(ord(group[0]) + n) for n in range(len(group))]:
            raise NoRule
        axes += [f"{group[0]}{i:03}" for i in after]
    batch = [new[i] for i, axis in enumerate(axes) if kind(axis) == BATCH]
    change = lambda stack: stack.reshape(*batch, *stack.shape[-2:])
    return [_moved(value, _bind(equation, [value.array])[0], axes, change)]


def _groups(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[range, range]]:
    """The least runs of axes that a reshape turns into one another."""
    i = j = 0
    while i < len(old) or j < len(new):
        start = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while (a := math.prod(old[start[0] : i])) != (b := math.prod(new[start[1] : j])):
            i, j = (i + 1, j) if a < b else (i, j + 1)
        yield range(start[0], i), range(start[1], j)


# The parameter with the sizes of what is selected.
SIZES = {
    "slice": "limit_indices",
    "dynamic_slice": "slice_sizes",
    "gather": "slice_sizes",
    "broadcast_in_dim": "shape",
}
OUTSIDE = {
    lax.GatherScatterMode.PROMISE_IN_BOUNDS: lax.GatherScatterMode.FILL_OR_DROP,
}


def _select(equation: Any, params: Any, operands: list[Any], report: Report) -> list[Any]:
    """What selects, moves or repeats whole matrices.

    Which ones is seen by applying the equation to the numbers of the matrices, with sides of one.
    """
    name, (value, *others) = equation.primitive.name, operands
    arrays, shape = _bind(equation, [value.array, *others]), value.array.shape
    sources = _sources(name, params, len(shape), arrays[0].ndim)
    sides = {i for i, axis in enumerate(value.axes) if kind(axis) != BATCH}
    after = {source: i for i, source in enumerate(sources) if source in sides}
    for i in sides:
        kept = i in after and all(array.shape[after[i]] == shape[i] for array in arrays)
        if shape[i] > 1 and not kept:
            raise NoRule

    count = math.prod(value.coordinates.shape[:-2])
    numbers = np.arange(count).reshape([1 if i in sides else n for i, n in enumerate(shape)])
    own: dict[str, Any] = {}
    if name == "gather":
        # Indices out of range have no gradient, also where they are promised not to be.
        own = {"fill_value": count, "mode": OUTSIDE.get(params["mode"], params["mode"])}
    if (sizes := SIZES.get(name)) is not None:
        ones = {*after.values()} if name == "broadcast_in_dim" else sides
        own[sizes] = tuple(1 if i in ones else n for i, n in enumerate(params[sizes]))
    smaller = equation.replace(params={**params, **own})
    if others:
        selections = _bind(smaller, [numbers, *others])
    else:
        with jax.ensure_compile_time_eval():
            selections = [*map(np.asarray, _bind(smaller, [numbers]))]

    axes = [BATCH if i is None else value.axes[i] for i in sources]
    batch = [i for i, axis in enumerate(axes) if kind(axis) == BATCH]
    return [
        _moved(value, array, axes, partial(_take, numbers.reshape([array.shape[i] for i in batch])))
        for array, numbers in zip(arrays, selections, strict=True)
    ]


def _sources(name: str, params: Any, ndim: int, rank: int) -> list[int | None]:
    """Of each axis of an output, which axis of the operand it is; None: none, or reordered."""
    if name == "rev":
        return [None if i in params["dimensions"] else i for i in range(ndim)]
    if name in ("squeeze", "unstack"):
        gone = params["dimensions"] if name == "squeeze" else (params["axis"],)
        return [i for i in range(ndim) if i not in gone]
    if name == "broadcast_in_dim":
        places = {axis: i for i, axis in enumerate(params["broadcast_dimensions"])}
        return [places.get(i) for i in range(rank)]
    if name == "gather":
        numbers = params["dimension_numbers"]
        dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        # Where indices are clipped, all of an axis is taken from its start on.
        clips = params["mode"] is lax.GatherScatterMode.CLIP
        moved = () if clips else numbers.start_index_map
        taken = iter([None if i in moved else i for i in range(ndim) if i not in dropped])
        return [next(taken) if i in numbers.offset_dims else None for i in range(rank)]
    return [*range(ndim)]


def _take(numbers: jax.Array | np.ndarray, stack: jax.Array) -> jax.Array:
    """The matrices of these numbers, of a stack `(*batch, n, r)`; zeros of a number above all."""
    flat = stack.reshape(-1, *stack.shape[-2:])
    if not isinstance(numbers, np.ndarray):
        return jnp.take(flat, numbers, axis=0, mode="fill", fill_value=0)
    # Neighbours are cut out, which costs less than to gather them.
    start = int(numbers.flat[0]) if numbers.size else 0
    is_run = np.array_equal(numbers.ravel(), np.arange(start, start + numbers.size))
    taken = flat[start : start + numbers.size] if is_run else flat[numbers.ravel()]
    return taken.reshape(*numbers.shape, *stack.shape[-2:])


# Rules that enter a function.


def _jit(equation: Any, params: Any, operands: list[Any], report: Report) -> list[Any]:
    if (dot := _marked_product(params)) is not None:
        return _dot_general(equation, dot, operands, report)

    def constrained(values: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
        # Of a jit that is inlined nothing else keeps them.
        pairs = zip(_plain(values), shardings, strict=True)
        constrain = lax.with_sharding_constraint
        return _with_arrays(
            values, [constrain(a, own) if isinstance(own, Sharding) else a for a, own in pairs]
        )

    place = source_info_util.summarize(equation.source_info)

    def placed(leaf: int, reason: str | None) -> None:
        # What is inside a function of JAX's own has no line in the source of its user.
        report(leaf, f"{reason}{place}" if reason and reason.endswith(" at ") else reason)

    operands = constrained(operands, params["in_shardings"])
    return constrained(_inside(params["jaxpr"], operands, placed), params["out_shardings"])


def _call(equation: Any, params: Any, operands: list[Any], report: Report) -> list[Any]:
    return _inside(params["call_jaxpr"], operands, report)


def _remat(equation: Any, params: Any, operands: list[Any], report: Report) -> list[Any]:
    settings = params.settings({"policy", "prevent_cse"}, besides={"jaxpr", "differentiated"})
    inside = lambda *operands: _inside(params["jaxpr"], operands, report)
    return jax.checkpoint(inside, **settings)(*operands)


def _scan(equation: Any, params: Any, operands: list[Any], report: Report) -> list[Any]:
    if "ft_in" in params:  # from JAX 0.12 on
        parts, others = params["ft_in"].update(operands).unpack(), {"ft_in", "ft_out"}
    else:
        ends = params["num_consts"], params["num_consts"] + params["num_carry"]
        parts = operands[: ends[0]], operands[ends[0] : ends[1]], operands[ends[1] :]
        others = {"num_consts", "num_carry"}
    consts, carry, xs = map(list, parts)
    settings = params.settings({"length", "reverse", "unroll"}, besides={"jaxpr", *others})

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        outputs = _inside(params["jaxpr"], (*consts, *carry, *xs), report)
        outputs = _used_otherwise(equation, outputs, report)
        return outputs[: len(carry)], outputs[len(carry) :]

    def sliced(value: Any) -> Any:
        """What is scanned over, with the axes that the body sees."""
        if not isinstance(value, Tracked):
            return value
        if kind(value.axes[0]) != BATCH:
            return _used_otherwise(equation, [value], report)[0]
        return _moved(value, value.array, value.axes[1:], lambda stack: stack)

    start = _used_otherwise(equation, carry, report)
    carry, ys = lax.scan(body, start, [sliced(value) for value in xs], **settings)
    return [*carry, *ys]


def _cond(equation: Any, params: Any, operands: list[Any], report: Report) -> list[Any]:
    def branch(jaxpr: Any, *operands: Any) -> list[Any]:
        return _used_otherwise(equation, _inside(jaxpr, operands, report), report)

    params.settings(set(), besides={"branches"})
    branches = [partial(branch, jaxpr) for jaxpr in params["branches"]]
    return lax.switch(operands[0], branches, *operands[1:])


def _shard_map(equation: Any, params: Any, operands: list[Any], report: Report) -> list[Any]:
    names = {"mesh", "in_specs", "out_specs", "check_vma"}
    settings = params.settings(names, besides={"jaxpr", "newly_manual_axes"})
    # A shard has all of a parameter and of its coordinates, or plain rows of it.
    operands = [
        value if not any(spec) else _used_otherwise(equation, [value], report)[0]
        for value, spec in zip(operands, params["in_specs"], strict=True)
    ]

    def inside(*operands: Any) -> tuple[Any, ...]:
        return tuple(_used_otherwise(equation, _inside(params["jaxpr"], operands, report), report))

    axes = set(params["newly_manual_axes"])
    return [*jax.shard_map(inside, **settings, axis_names=axes)(*operands)]


RULES: dict[str, Callable[[Any, Any, list[Any], Report], list[Any]]] = {
    "dot_general": _dot_general,
    "convert_element_type": _cast,
    "stop_gradient": _stop_gradient,
    "transpose": _transpose,
    "reshape": _reshape,
    "jit": _jit,
    "closed_call": _call,
    "remat2": _remat,
    "scan": _scan,
    "cond": _cond,
    "shard_map": _shard_map,
    **dict.fromkeys(("slice", "dynamic_slice", "gather", "split", "unstack"), _select),
    **dict.fromkeys(("squeeze", "rev", "broadcast_in_dim", "tile"), _select),
    **dict.fromkeys(("copy", "name", "sharding_constraint", "device_put"), _unchanged),
    **dict.fromkeys(("optimization_barrier", "pvary", "reshard"), _unchanged),
}
