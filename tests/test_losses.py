"""Gradients of many losses against full ones, and how each of them is computed."""

import contextlib
import importlib
import re

import jax
import numpy as np
import optax
import pytest
from losses.table import Case, filled

import galore_jax
from galore_jax.subspace.basis import Basis
from galore_jax.subspace.projection import is_coordinates

MODULES = [
    "plain_derivatives",
    "plain_transformed",
    "plain_types",
    "plain_products",
    "plain_slices",
    "plain_stacks",
    "plain_ragged",
    "plain_blocks",
    "plain_control",
    "plain_arguments",
    "linen",
    "nnx",
    "equinox_",
    "haiku_",
]


def cases_of(module: str) -> list:
    """The cases of a module; one that is skipped where its framework is not installed."""
    framework, *_ = module.split("_")
    try:
        if framework != "plain":
            pytest.importorskip({"linen": "flax", "nnx": "flax"}.get(framework, framework))
    except pytest.skip.Exception as absent:
        return [pytest.param(None, id=framework, marks=pytest.mark.skip(reason=str(absent)))]
    cases = importlib.import_module(f"losses.{module}").CASES
    return [pytest.param(case, id=f"{framework}-{case}") for case in cases]


def compiled_gradients(loss, batch, keywords, has_aux, micro_batches):
    """The projected and the full gradient as one program of the parameters, state and arrays."""
    leaves, tree = jax.tree.flatten((batch, keywords))
    is_array = [isinstance(leaf, jax.Array) for leaf in leaves]

    @jax.jit
    def gradients(params, state, arrays):
        arrays = iter(arrays)
        pairs = zip(leaves, is_array, strict=True)
        own = [next(arrays) if is_one else leaf for leaf, is_one in pairs]
        batch, keywords = jax.tree.unflatten(tree, own)
        projected = galore_jax.value_and_grad(loss, has_aux=has_aux, micro_batches=micro_batches)
        full = jax.value_and_grad(loss, has_aux=has_aux)
        return projected(params, state, *batch, **keywords), full(params, *batch, **keywords)

    arrays = [leaf for leaf, is_one in zip(leaves, is_array, strict=True) if is_one]
    return lambda params, state: gradients(params, state, arrays)


def bases_by_name(state) -> dict[str, Basis]:
    is_basis = lambda node: isinstance(node, Basis)
    bases = filter(is_basis, jax.tree.leaves(state, is_leaf=is_basis))
    return {basis.projection.name: basis for basis in bases}


def assert_close(found, wanted, tolerance: float, vanishes: bool, name: str):
    """Compares with the largest entry; a gradient that vanishes may be a sum of rounded terms."""
    assert found.shape == wanted.shape, name
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    largest = np.abs(wanted).max()
    assert np.isfinite(largest), name
    assert (largest < 1e-6) == vanishes, (name, largest)
    atol = 1e-6 if vanishes else tolerance * largest
    np.testing.assert_allclose(found, wanted, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("case", [case for module in MODULES for case in cases_of(module)])
def test_gradients_agree_and_are_computed_as_expected(case: Case):
    with contextlib.ExitStack() as stack:
        if case.x64:
            stack.enter_context(jax.enable_x64(True))
        check(case)


def check(case: Case):
    loss, params, batch, settings = case.build()
    has_aux = settings.pop("has_aux", False)
    micro_batches = settings.pop("micro_batches", 1)
    keywords = settings.pop("keywords", {})
    tolerance = settings.pop("tolerance", 1e-5)
    zero = settings.pop("zero", ())
    tx = galore_jax.chain(galore_jax.galore(settings.pop("rank", 4), **settings), optax.scale(-1.0))
    # Projections agree for any vectors, and these take nothing to compile.
    state = filled(jax.eval_shape(tx.init, params))
    bases = bases_by_name(state)
    run = compiled_gradients(loss, batch, keywords, has_aux, micro_batches)
    (value, grads), (full_value, full_grads) = run(params, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), value, full_value)

    paths, structure = jax.tree.flatten_with_path(grads, is_leaf=is_coordinates)
    projected = set()
    for (path, found), full in zip(paths, structure.flatten_up_to(full_grads), strict=True):
        wanted = full
        # Flax NNX ends the path of a variable with the attribute that holds its array.
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        if is_coordinates(found):
            name, basis = found.projection.name, bases[found.projection.name]
            projected.add(name)
            wanted, found = basis.projection.project(basis.vectors, full), found.value
        assert found.dtype == wanted.dtype, name
        assert_close(found, wanted, tolerance, name in zero, name)

    assert projected == {name for name, status in case.status.items() if status != "full"}
    assert set(bases) == set(case.status)
    report = galore_jax.describe(params, tx, loss, *batch, has_aux=has_aux, **keywords).uses
    assert {name: entry.gradient for name, entry in report.items()} == case.status
    for name, entry in report.items():
        assert bool(entry.reasons) == (entry.gradient != "projected"), (name, entry.reasons)
        for reason in entry.reasons:
            assert re.match(r"\w+ at \S+:\d+", reason), "a primitive without a line of the source"
