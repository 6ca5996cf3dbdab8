"""A loss rewritten so that its products with projected parameters give coordinates.

The loss is traced once, with plain arrays. Its jaxpr is then evaluated equation by equation, with a
`Tracked` value for each projected parameter. An equation that has a rule passes tracked values on
or makes projected products. Any other equation receives plain arrays, which are differentiated in
the ordinary way, and is reported. Unrecognised equations thus give exact gradients, at more cost.

This is the only file that knows about jaxprs.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core, source_info_util
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import PartitionSpec, Sharding

from galore_jax.grads.projected_product import (
    BATCH,
    IN,
    KINDS,
    OUT,
    Tracked,
    kind,
    moved,
    projected_product,
    ragged_product,
)
from galore_jax.types import PyTree

# Called with a parameter's path and how it is used: None for a projected product, or the primitive
# and the line of the source that receive the plain array.
Report = Callable[[tuple[str, ...], str | None], None]
NO_REPORT: Report = lambda path, reason: None

# The name of a jitted product of two arrays with a custom derivative, equal to that of the plain
# product up to rounding: see `models.dense.matmul`.
PRODUCT = "galore_jax_product"
# The name of the jitted function that makes the array of an `Int8`: see `ops.int8`.
INT8_ARRAY = "galore_jax_array"


class NoRule(Exception):
    """An equation, its parameters or its operands are not what the rule expects."""


def settings(params: Mapping[str, Any], names: set[str], *, besides: set[str]) -> dict[str, Any]:
    """The parameters of these names, to pass on; `NoRule` if there are others than `besides`."""
    if params.keys() != names | besides:
        raise NoRule
    return {name: params[name] for name in names}


class Program:
    """A traced function of a tree that returns `(scalar, pytree of arrays)`.

    Attributes:
      opaque: why the trace cannot be differentiated although the function can, or None. Then the
        function itself is called, and no leaf may be `Tracked`.
      eps: the largest machine epsilon of the floating dtypes in which it computes.
    """

    def __init__(self, f: Callable[[PyTree], tuple[Any, Any]], operands: PyTree):
        leaves, tree = jax.tree.flatten(operands)
        traces: set[Any] = set()

        def traced(*leaves: Any) -> tuple[Any, Any]:
            traces.update({getattr(leaf, "_trace", None) for leaf in leaves} - {None})
            return self._f(*leaves)

        self._f = lambda *leaves: f(tree.unflatten(leaves))
        self._jaxpr, shapes = jax.make_jaxpr(traced, return_shape=True)(*leaves)
        self._outputs = jax.tree.structure(shapes)
        equations = list(all_equations(self._jaxpr.jaxpr))
        self.opaque = next((leak for one in equations if (leak := _leak(one, traces))), None)
        dtypes = {getattr(v.aval, "dtype", jnp.int32) for e in equations for v in e.outvars}
        floating = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)]
        self.eps = max([float(jnp.finfo(dtype).eps) for dtype in floating], default=0.0)

    def __call__(self, leaves: Sequence[Any]) -> tuple[Any, Any]:
        """The function's result for leaves some of which are `Tracked`."""
        if self.opaque:
            return self._f(*leaves)
        return self._outputs.unflatten(_plain(_evaluate(self._jaxpr, leaves, NO_REPORT)))

    def number(self, leaves: Sequence[Any], report: Report) -> Any:
        """Only the number, without the equations that only the other results depend on."""
        wanted = [i == 0 for i in range(len(self._jaxpr.jaxpr.outvars))]
        jaxpr, _ = dce_jaxpr(self._jaxpr.jaxpr, wanted, instantiate=True)
        closed = core.ClosedJaxpr(jaxpr, self._jaxpr.consts)
        return _plain(_evaluate(closed, leaves, report))[0]


def _leak(equation: Any, traces: set[Any]) -> str | None:
    """The reason if an equation's own backward pass reads a value of these traces, otherwise None.

    The traces have ended; while they last, as in `jax.grad`, the value can be read.
    """
    if equation.primitive.name != "custom_vjp_call":
        return None

    def differentiate(*operands: Any) -> Any:
        outputs, pull = jax.vjp(lambda *operands: _bind(equation, operands), *operands)
        return pull(outputs)

    try:
        read = jax.make_jaxpr(differentiate)(*(var.aval for var in equation.invars)).consts
    except Exception:
        # Out of its context, such as a shard_map, an equation may fail that does not fail there.
        return None
    if all(getattr(value, "_trace", None) not in traces for value in read):
        return None
    place = source_info_util.summarize(equation.source_info)
    return f"custom_vjp_call at {place}, whose backward pass reads a value of the loss"


def dependencies(f: Callable[..., tuple], *arguments: PyTree) -> tuple[list[list[bool]], tuple]:
    """Which leaves each part of the tuple `f(*arguments)` depends on, and the tuple's shapes."""
    leaves, tree = jax.tree.flatten(arguments)
    closed, shapes = jax.make_jaxpr(lambda *leaves: f(*tree.unflatten(leaves)), return_shape=True)(
        *leaves
    )
    owners = [i for i, part in enumerate(shapes) for _ in jax.tree.leaves(part)]
    wanted = [[owner == i for owner in owners] for i in range(len(shapes))]
    return [dce_jaxpr(closed.jaxpr, flags)[1] for flags in wanted], shapes


def all_equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a jaxpr and of those among their parameters."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for one in value if isinstance(value, tuple) else (value,):
                inner = getattr(one, "jaxpr", one)
                if hasattr(inner, "eqns"):
                    yield from all_equations(inner)


def _evaluate(jaxpr: Any, arguments: Sequence[Any], report: Report) -> list[Any]:
    """The results of a jaxpr, which may carry its constants."""
    closed = jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())
    jaxpr, consts = closed.jaxpr, closed.consts
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
    read = lambda atom: atom.val if isinstance(atom, core.Literal) else values[atom]
    for equation, needed in zip(jaxpr.eqns, _needed(jaxpr), strict=True):
        operands = [read(atom) for atom in equation.invars]
        outputs = _apply(equation, operands, report if needed else NO_REPORT)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _needed(jaxpr: Any) -> list[bool]:
    """Which equations the results depend on; others print, or compute what is only printed."""
    wanted, needed = {*map(id, jaxpr.outvars)}, []
    for equation in reversed(jaxpr.eqns):
        acts = any("Debug" not in type(effect).__name__ for effect in equation.effects)
        needed.append(acts or not wanted.isdisjoint(map(id, equation.outvars)))
        if needed[-1]:
            wanted.update(map(id, equation.invars))
    return needed[::-1]


def _apply(equation: Any, operands: list[Any], report: Report) -> list[Any]:
    rule = RULES.get(equation.primitive.name)
    is_tracked = any(isinstance(value, Tracked) for value in operands)
    if is_tracked and rule is not None:
        source = equation.source_info
        scope = source_info_util.current_name_stack() + source.name_stack
        # The scope is entered here, so the equation must not add it again.
        inner = equation.replace(
            source_info=source.replace(name_stack=source_info_util.new_name_stack())
        )
        try:
            with source_info_util.user_context(source.traceback, name_stack=scope):
                return rule(inner, equation.params, operands, report)
        except (NoRule, KeyError):
            pass  # Parameters have other names in another version of JAX.
    return _bind(equation, _as_plain(equation, operands, report))


def _as_plain(equation: Any, operands: Sequence[Any], report: Report) -> list[Any]:
    """Operands as plain arrays; tracked ones are reported if a gradient may flow to them."""
    dtypes = [getattr(var.aval, "dtype", jnp.float32) for var in equation.outvars]
    flows = equation.effects or any(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes)
    if flows and equation.primitive.name != "stop_gradient":
        for value in operands:
            if isinstance(value, Tracked):
                place = source_info_util.summarize(equation.source_info)
                report(value.path, f"{equation.primitive.name} at {place}")
    return _plain(operands)


def _plain(values: Sequence[Any]) -> list[Any]:
    return [value.array if isinstance(value, Tracked) else value for value in values]


def _with_arrays(values: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
    """The values with other arrays, tracked as before."""
    return [
        value.with_array(array) if isinstance(value, Tracked) else array
        for value, array in zip(values, arrays, strict=True)
    ]


def _bind(equation: Any, operands: Sequence[Any]) -> list[Any]:
    """The outputs of an equation for plain operands."""
    pairs = zip(equation.invars, operands, strict=True)
    values = {atom: value for atom, value in pairs if not isinstance(atom, core.Literal)}
    kept = [var for var in equation.outvars if not isinstance(var, core.DropVar)]
    debug = core.DebugInfo("rewrite", equation.primitive.name, None, None)
    jaxpr = core.Jaxpr((), list(values), kept, [equation], equation.effects, debug)
    results = iter(core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))(*values.values()))
    return [None if isinstance(var, core.DropVar) else next(results) for var in equation.outvars]


# A rule takes an equation, its parameters, its operands, at least one of which is tracked, and a
# report, and returns the outputs. First come the rules of products.


def _dot_general(equation: Any, params: Any, operands: list[Any], report: Report) -> list[Any]:
    parameter_first = isinstance(operands[0], Tracked)
    order = slice(None, None, -1 if parameter_first else 1)  # x before the parameter
    x, parameter = operands[order]
    contracting, batch = params["dimension_numbers"]
    numbers = contracting[order], batch[order]
    dot = lambda *pair: _bind(equation, pair[order])[0]
    if isinstance(x, Tracked):
        raise NoRule
    precision = params.get("precision")
    product = projected_product(dot, x, parameter, numbers, parameter_first, precision)
    if product is None:
        raise NoRule
    report(parameter.path, None)
    return [product]


def _ragged_dot(equation: Any, params: Any, operands: list[Any], report: Report) -> list[Any]:
    x, parameter, sizes = operands
    unusual = params["group_offset"] is not None or params["out_sharding"] is not None
    if unusual or isinstance(x, Tracked):
        raise NoRule
    dot = lambda *operands: _bind(equation, operands)[0]
    numbers, precision = params["ragged_dot_dimension_numbers"], params["precision"]
    product = ragged_product(dot, x, parameter, sizes, numbers, precision)
    if product is None:
        raise NoRule
    report(parameter.path, None)
    return [product]


def _marked_product(params: Any) -> Any:
    """The parameters of the dot_general in a jitted function named `PRODUCT`, or None."""
    if params["name"] != PRODUCT:
        return None
    for key, expected in (("jaxpr", "custom_vjp_call"), ("call_jaxpr", "dot_general")):
        jaxpr = getattr(params[key], "jaxpr", params[key])
        equation, *casts = jaxpr.eqns
        names = [equation.primitive.name, *(cast.primitive.name for cast in casts)]
        if {*names} - {"convert_element_type"} != {expected} or equation.invars != jaxpr.invars:
            return None
        params = equation.params
    return params


# Rules that pass tracked values on.


def _unchanged(equation: Any, params: Any, operands: list[Any], report: Report) -> list[Any]:
    return _with_arrays(operands, _bind(equation, _plain(operands)))


def _cast(equation: Any, params: Any, operands: list[Any], report: Report) -> list[Any]:
    if not jnp.issubdtype(params["new_dtype"], jnp.floating):
        raise NoRule
    (value,) = operands
    uncast = value.array if params["sharding"] is None else None
    return [value.with_array(*_bind(equation, [value.array]), uncast=uncast)]


def _reshape(equation: Any, params: Any, operands: list[Any], report: Report) -> list[Any]:
    value, *dynamic = operands
    old, new = value.array.shape, params["new_sizes"]
    if dynamic or params["dimensions"] is not None or 0 in old:
        raise NoRule
    axes: list[str] = []
    for before, after in reshape_groups(old, new):
        # All axes of a group are of one kind, and in order, as in (model) → (heads, head size).
        group = [value.axes[i] for i in before if old[i] > 1] or [BATCH]
        if group != [chr(ord(group[0]) + n) for n in range(len(group))]:
            raise NoRule
        axes += [f"{group[0]}{i:03}" for i in after]
    batch = [new[i] for i, axis in enumerate(axes) if kind(axis) == BATCH]
    change = lambda stack: stack.reshape(*batch, *stack.shape[-2:])
    return [moved(value, _bind(equation, [value.array])[0], axes, change)]


# By primitive, its parameters that have a number for each axis, and what leaves an axis of one
# element as it is.
PER_AXIS = {
    "slice": {"start_indices": 0, "limit_indices": 1},
    "dynamic_slice": {"slice_sizes": 1},
    "gather": {"slice_sizes": 1},
    "broadcast_in_dim": {"shape": 1},
    "tile": {"reps": 1},
}


def _select(equation: Any, params: Any, operands: list[Any], report: Report) -> list[Any]:
    """Selects, moves or repeats matrices, or the same rows or columns of each of them.

    Applied to their indices, it shows which ones. Take kernels of three layers with two experts
    each, `W` (3, 2, in, out), letters "ABam", and the left half of those of the second layer,
    `lax.slice(W, (1, 0, 0, 0), (2, 2, in, out / 2))`. The same slice of the matrices' indices, an
    array (3, 2, 1, 1) from 0 to 5, with its limits for the sides lowered to 1, is [[2, 3]]:
    matrices 2 and 3 are what the stacks of basis vectors and coordinates, (3, 2, n, r), are to be
    narrowed to. That of the columns' indices, (1, 1, 1, out), is 0 to out / 2 - 1: these columns
    of the coordinates `PᵀG` are theirs; of coordinates `G Q` all are, in a basis of these rows of
    Q, for `G Q` is a sum over columns of G.
    """
    name, (value, *others) = equation.primitive.name, operands
    arrays, shape = _bind(equation, [value.array, *others]), value.array.shape
    sources = _sources(name, params, len(shape), arrays[0].ndim)
    after = {source: i for i, source in enumerate(sources) if source is not None}
    # The axes of sides with one element may go, or be repeated as batch axes.
    repeated = {i for i in after if shape[i] == 1 and arrays[0].shape[after[i]] > 1}
    letter = lambda i: BATCH if i is None or i in repeated else value.axes[i]
    axes = [axis if kind(axis := letter(i)) != BATCH else BATCH for i in sources]

    reordered = _reordered(name, params)
    chosen = {kind(value.axes[i]) for i in reordered if shape[i] > 1} or {BATCH}
    if chosen != {BATCH} and len({kind(value.axes[i]) for i in reordered}) > 1:
        raise NoRule
    is_kept = lambda i: i in after and all(a.shape[after[i]] == shape[i] for a in arrays)
    is_whole = lambda i: shape[i] == 1 or (is_kept(i) and i not in reordered)

    def selections(this: str, own: list[int]) -> list[Any]:
        """The same equation for the indices of one kind; other kinds of axes have one element."""
        in_order = sorted(own, key=value.axes.__getitem__)
        sizes = [shape[i] for i in in_order]
        indices = np.arange(math.prod(sizes), dtype=np.int32).reshape(sizes)
        indices = indices.transpose([in_order.index(i) for i in own])
        indices = indices.reshape([n if i in own else 1 for i, n in enumerate(shape)])
        kinds = [*map(kind, value.axes if name == "gather" else axes)]
        changed: dict[str, Any] = {
            key: tuple(n if kinds[i] == this else least for i, n in enumerate(params[key]))
            for key, least in PER_AXIS.get(name, {}).items()
        }
        if name == "split" and kinds[params["axis"]] != this:
            changed["sizes"] = (1,)
        if name == "gather":
            # Indices out of range have no gradient, even where they are promised to be in range.
            modes, mode = lax.GatherScatterMode, params["mode"]
            mode = modes.FILL_OR_DROP if mode is modes.PROMISE_IN_BOUNDS else mode
            changed["mode"] = mode if this in chosen else modes.CLIP
            changed["fill_value"] = indices.size
        found = equation.primitive.bind(jnp.asarray(indices), *others, **{**params, **changed})
        found = found if equation.primitive.multiple_results else [found]
        # Of one part alone if all parts have the same.
        return [*found] if len(found) == len(arrays) else [*found] * len(arrays)

    outputs = [moved(value, array, axes, lambda stack: stack) for array in arrays]
    for this in KINDS:
        own = [i for i, axis in enumerate(value.axes) if kind(axis) == this]
        if this != BATCH and all(map(is_whole, own)):
            continue
        if others:
            found = selections(this, own)
        else:
            # A user's transfer guard is not meant for these numbers of our own.
            with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
                found = [*map(np.asarray, selections(this, own))]
        places = {i: axis for i, axis in enumerate(axes) if kind(axis) == this}
        for n, selection in enumerate(found):
            sizes = [arrays[n].shape[i] for i in places]
            if selection.size != math.prod(sizes):
                raise NoRule  # Not the same rows or columns of each matrix.
            outputs[n] = _narrowed(outputs[n], this, selection.reshape(sizes), [*places.values()])
            if this != BATCH and 2 * math.prod(sizes) < _rank(value):
                raise NoRule  # To project the tokens would take longer than to form the gradient.
    return outputs


def _rank(value: Tracked) -> int:
    return max(vectors.shape[-1] for vectors in value.vectors.values())


def _narrowed(value: Tracked, this: str, selection: Any, axes: list[str]) -> Tracked:
    """A tracked value with the selected matrices, rows or columns in place of all.

    Args:
      value: its array is that of the selection already.
      this: the kind of what is selected.
      selection: the indices, with the axes of this kind.
      axes: strings of these axes, as for `moved`.
    """
    if this == BATCH:
        matrices = partial(take_matrices, selection)
        vectors, coordinates = jax.tree.map(matrices, (value.vectors, value.coordinates))
        return replace(value, vectors=vectors, coordinates=coordinates)
    indices = selection.transpose(sorted(range(len(axes)), key=axes.__getitem__)).reshape(-1)
    return _with_side(value, this, partial(_taken, indices))


def _with_side(value: Tracked, this: str, change: Callable[[jax.Array, int], jax.Array]) -> Tracked:
    """A tracked value after its rows, or columns, changed as `change(array, axis)` says."""
    side, axis = ("left", -2) if this == IN else ("right", -1)
    if side not in value.vectors:
        return replace(value, coordinates=change(value.coordinates, axis))
    vectors = jax.tree.map(lambda stack: change(stack, -2), value.vectors[side])
    return replace(value, vectors={**value.vectors, side: vectors})


def _reordered(name: str, params: Any) -> Sequence[int]:
    """The operand's axes that a selection may reorder even if it keeps their size."""
    if name == "gather":
        # Clipping puts a slice that spans an axis at its start.
        clips = params["mode"] is lax.GatherScatterMode.CLIP
        return () if clips else params["dimension_numbers"].start_index_map
    return params["dimensions"] if name == "rev" else ()


def _sources(name: str, params: Any, ndim: int, rank: int) -> list[int | None]:
    """The operand's axis behind each axis of an output, or None."""
    if name == "transpose":
        return [*params["permutation"]]
    if name in ("squeeze", "unstack"):
        gone = params["dimensions"] if name == "squeeze" else (params["axis"],)
        return [i for i in range(ndim) if i not in gone]
    if name == "broadcast_in_dim":
        places = {axis: i for i, axis in enumerate(params["broadcast_dimensions"])}
        return [places.get(i) for i in range(rank)]
    if name == "gather":
        numbers = params["dimension_numbers"]
        dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        taken = iter([i for i in range(ndim) if i not in dropped])
        return [next(taken) if i in numbers.offset_dims else None for i in range(rank)]
    return [*range(ndim)]


def take_matrices(indices: jax.Array | np.ndarray, stack: jax.Array) -> jax.Array:
    """The matrices of a stack `(*batch, n, r)` at flat indices; zeros where one is out of range."""
    taken = _taken(indices.reshape(-1), stack.reshape(-1, *stack.shape[-2:]), 0)
    return taken.reshape(*indices.shape, *stack.shape[-2:])


def _taken(indices: jax.Array | np.ndarray, array: jax.Array, axis: int) -> jax.Array:
    """What an array has at these indices of an axis; zeros where one is out of range."""
    if not isinstance(indices, np.ndarray):
        return jnp.take(array, indices, axis=axis, mode="fill", fill_value=0)
    # What is consecutive is sliced, which is cheaper than gathering it.
    start = int(indices[0]) if indices.size else 0
    if np.array_equal(indices, np.arange(start, start + indices.size)):
        return lax.slice_in_dim(array, start, start + indices.size, axis=axis)
    return jnp.take(array, indices, axis=axis, mode="clip")


def reshape_groups(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[range, range]]:
    """The smallest runs of axes that a reshape turns into each other."""
    i = j = 0
    while i < len(old) or j < len(new):
        start = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while (a := math.prod(old[start[0] : i])) != (b := math.prod(new[start[1] : j])):
            i, j = (i + 1, j) if a < b else (i, j + 1)
        yield range(start[0], i), range(start[1], j)


# Rules that enter a function.


def _jit(equation: Any, params: Any, operands: list[Any], report: Report) -> list[Any]:
    if (dot := _marked_product(params)) is not None:
        return _dot_general(equation, dot, operands, report)
    if params["name"] == INT8_ARRAY:
        names = {inner.primitive.name for inner in all_equations(params["jaxpr"].jaxpr)}
        # Under `jax.vmap` the array may have its axes in another order than the place.
        if len(operands) != 3 or not isinstance(operands[2], Tracked) or "transpose" in names:
            raise NoRule
        codes, scales, place = operands
        return [place.with_array(*_bind(equation, [codes, scales, place.array]))]

    def constrained(values: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
        # Inlining the jit would lose its shardings.
        at = lambda a, to: lax.with_sharding_constraint(a, to) if isinstance(to, Sharding) else a
        return _with_arrays(values, list(map(at, _plain(values), shardings)))

    place = source_info_util.summarize(equation.source_info)

    def placed(path: tuple[str, ...], reason: str | None) -> None:
        # An equation in one of JAX's own functions has no line in the user's source.
        report(path, f"{reason}{place}" if reason and reason.endswith(" at ") else reason)

    operands = constrained(operands, params["in_shardings"])
    return constrained(_evaluate(params["jaxpr"], operands, placed), params["out_shardings"])


def _remat(equation: Any, params: Any, operands: list[Any], report: Report) -> list[Any]:
    names = {"policy", "prevent_cse"} & params.keys()
    options = settings(params, names, besides={"jaxpr", "differentiated"} & params.keys())
    inner = lambda *operands: _evaluate(params["jaxpr"], operands, report)
    return jax.checkpoint(inner, **options)(*operands)


def _hi_primitive(equation: Any, params: Any, operands: list[Any], report: Report) -> list[Any]:
    """Those into which `jax.checkpoint` and `checkpoint_name` are traced under `jax_remat3`."""
    name, params = type(params["_prim"]).__name__, params["_prim"].params
    if name == "RematTraced":
        return _remat(equation, params, operands, report)
    if name == "CheckpointName":
        return _unchanged(equation, params, operands, report)
    raise NoRule


def _scan(equation: Any, params: Any, operands: list[Any], report: Report) -> list[Any]:
    if "ft_in" in params:  # from JAX 0.12 on
        parts, others = params["ft_in"].update(operands).unpack(), {"ft_in", "ft_out"}
    else:
        ends = params["num_consts"], params["num_consts"] + params["num_carry"]
        parts = operands[: ends[0]], operands[ends[0] : ends[1]], operands[ends[1] :]
        others = {"num_consts", "num_carry"}
    consts, carry, xs = map(list, parts)
    options = settings(params, {"length", "reverse", "unroll"}, besides={"jaxpr", *others})

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        outputs = _evaluate(params["jaxpr"], (*consts, *carry, *xs), report)
        outputs = _as_plain(equation, outputs, report)
        return outputs[: len(carry)], outputs[len(carry) :]

    def sliced(value: Any) -> Any:
        """An operand that is scanned over, with the axes that the body sees."""
        if not isinstance(value, Tracked):
            return value
        if kind(value.axes[0]) != BATCH:
            return _as_plain(equation, [value], report)[0]
        stack = moved(value, value.array, value.axes[1:], lambda stack: stack)
        return replace(stack, uncast=value.uncast)

    start = _as_plain(equation, carry, report)
    carry, ys = lax.scan(body, start, [sliced(value) for value in xs], **options)
    return [*carry, *ys]


def _cond(equation: Any, params: Any, operands: list[Any], report: Report) -> list[Any]:
    def branch(jaxpr: Any, *operands: Any) -> list[Any]:
        return _as_plain(equation, _evaluate(jaxpr, operands, report), report)

    settings(params, set(), besides={"branches"})
    branches = [partial(branch, jaxpr) for jaxpr in params["branches"]]
    return lax.switch(operands[0], branches, *operands[1:])


def _parts(value: Tracked, spec: PartitionSpec) -> Tracked | None:
    """The specs of all of a tracked value whose array is divided so; None if there are none.

    Vectors have the rows, and coordinates the rows and columns, of a device's part of the array,
    as in `_narrowed`. A side of several axes can be divided along the first of them only.
    """
    names = [*spec, *[None] * (value.array.ndim - len(spec))]

    def along(this: str) -> list[Any]:
        axes = [i for i, axis in enumerate(value.axes) if kind(axis) == this]
        axes = [i for i in axes if this == BATCH or value.array.shape[i] > 1]
        return [names[i] for i in sorted(axes, key=value.axes.__getitem__)]

    batch, (rows, *others), (columns, *more) = along(BATCH), [*along(IN), None], [*along(OUT), None]
    if any(others) or any(more):
        return None
    by_side = {"left": rows, "right": columns}
    vectors = {side: PartitionSpec(*batch, by_side[side]) for side in value.vectors}
    whole = [None if side in vectors else name for side, name in by_side.items()]
    value = value.with_array(spec, uncast=None if value.uncast is None else spec)
    return replace(value, vectors=vectors, coordinates=PartitionSpec(*batch, *whole))


def _shard_map(equation: Any, params: Any, operands: list[Any], report: Report) -> list[Any]:
    names = {"mesh", "in_specs", "out_specs", "check_vma"}
    options = settings(params, names, besides={"jaxpr", "newly_manual_axes"})
    operands, specs = [*operands], [*params["in_specs"]]
    for i, value in enumerate(operands):
        if not isinstance(value, Tracked):
            continue
        divided = (*value.divided, *params["newly_manual_axes"])
        operands[i] = value = replace(value, divided=divided)
        if (parts := _parts(value, specs[i])) is not None:
            specs[i] = parts
        else:
            [operands[i]] = _as_plain(equation, [value], report)
    options["in_specs"] = tuple(specs)

    def inner(*operands: Any) -> tuple[Any, ...]:
        outputs = _evaluate(params["jaxpr"], operands, report)
        return tuple(_as_plain(equation, outputs, report))

    axes = set(params["newly_manual_axes"])
    return [*jax.shard_map(inner, **options, axis_names=axes)(*operands)]


def _all_gather(equation: Any, params: Any, operands: list[Any], report: Report) -> list[Any]:
    """Inside a `shard_map`, a whole parameter from the devices' parts."""
    (value,), axis = operands, params["all_gather_dimension"]
    # Parts of a parameter with a basis each, where the loss itself is in a `shard_map`, are not
    # parts of a matrix with one basis.
    has_one_basis = {*params["axis_name"]} <= {*value.divided}
    if not (has_one_basis and params["tiled"] and params["axis_index_groups"] is None):
        raise NoRule

    def gather(array: jax.Array, axis: int) -> jax.Array:
        return lax.all_gather(array, params["axis_name"], axis=axis % array.ndim, tiled=True)

    this, letter = kind(value.axes[axis]), value.axes[axis]
    outer = [i for i, other in enumerate(value.axes) if kind(other) == this and other < letter]
    value = value.with_array(*_bind(equation, [value.array]))
    if this == BATCH:
        stacks = value.vectors, value.coordinates
        vectors, coordinates = jax.tree.map(lambda stack: gather(stack, len(outer)), stacks)
        return [replace(value, vectors=vectors, coordinates=coordinates)]
    if any(value.array.shape[i] > 1 for i in outer):
        raise NoRule  # Its parts are not one after another in the side.
    return [_with_side(value, this, gather)]


RULES: dict[str, Callable[[Any, Any, list[Any], Report], list[Any]]] = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
    "reshape": _reshape,
    "jit": _jit,
    "remat2": _remat,
    "call_hi_primitive": _hi_primitive,
    "scan": _scan,
    "cond": _cond,
    "shard_map": _shard_map,
    "all_gather": _all_gather,
    **dict.fromkeys(("slice", "dynamic_slice", "gather", "split", "unstack"), _select),
    **dict.fromkeys(("squeeze", "rev", "broadcast_in_dim", "tile", "transpose"), _select),
    "convert_element_type": _cast,
    **dict.fromkeys(("name", "sharding_constraint", "reshard", "copy"), _unchanged),
    **dict.fromkeys(("optimization_barrier", "pvary"), _unchanged),
}
