"""The collectives and matrix products of compiled programs."""

import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from analysis.collectives import Collective, collectives
from analysis.products import flops

ROOT = Path(__file__).parent.parent
DEVICES, N = 8, 64
FLOAT = 4

# Programs on 2 x 4 devices, data and fsdp, by name. Arrays are N x N float32.
PROGRAMS = """
import pathlib, sys
from functools import partial
import jax, jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=2 * (AxisType.Auto,))
folder = pathlib.Path(sys.argv[1])
everywhere, rows_of_four = P(("data", "fsdp")), NamedSharding(mesh, P("fsdp"))

def write(name, f, *arguments):
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in arguments
    ]
    (folder / name).write_text(jax.jit(f).lower(*arguments).compile().as_text())

def manual(f, out=P()):
    return jax.shard_map(f, mesh=mesh, in_specs=P("data", "fsdp"), out_specs=out, check_vma=False)

square, other = ((64, 64), jnp.float32, P("data", "fsdp")), ((64, 64), jnp.bfloat16, everywhere)
weights = ((5, 64, 64), jnp.float32, P(None, "fsdp"))

# One kind each, of a block of 32 x 16.
write("psum", manual(lambda x: lax.psum(x, "data"), P(None, "fsdp")), square)
write("psum of all", manual(lambda x: lax.psum(x, ("data", "fsdp"))), square)
write("all_gather", manual(lambda x: lax.all_gather(x, "fsdp", axis=1, tiled=True), P("data")),
      square)
write("psum_scatter", manual(lambda x: lax.psum_scatter(x, "fsdp", tiled=True), everywhere),
      square)
write("all_to_all", manual(lambda x: lax.all_to_all(x, "data", 0, 1, tiled=True), everywhere),
      square)
write("ppermute", manual(lambda x: lax.ppermute(x, "fsdp", [(0, 1), (1, 2)]), P("data", "fsdp")),
      square)
write("alone", lambda x: 2 * x, square)

# What the partitioner makes of it.
def dense(w, x):
    return lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, w)[0]

write("scan", dense, weights, ((16, 64), jnp.float32, everywhere))
write("gathered", lambda x: lax.with_sharding_constraint(x, NamedSharding(mesh, P())), other)
write("reduced", manual(lambda x: lax.psum(x, ("data", "fsdp"))), ((64, 64), jnp.bfloat16, P()))
rows = (64, 64), jnp.float32, P("fsdp")
write("sliced", lambda x: lax.with_sharding_constraint(jnp.sum(x, 0), rows_of_four), rows)
both = lambda x: (jnp.sum(x, 0), jnp.sum(2 * x, 0))
write("sliced together", lambda x: lax.with_sharding_constraint(both(x), rows_of_four), rows)
write("used whole", lambda x: jnp.sum(x, 0), rows)

# Loops.
@manual
def nested(x):
    def inner(x, _):
        return lax.psum(x @ x.T @ x, "data"), None
    def outer(x, _):
        return lax.psum(jnp.tanh(lax.scan(inner, x, None, 3)[0]), "fsdp"), None
    return lax.scan(outer, x, None, 7)[0]

write("nested", nested, square)

@manual
def until_small(x):
    def body(x):
        x = lax.fori_loop(0, 6, lambda _, x: lax.psum(x @ x.T @ x, "data"), x)
        return lax.psum(x, "fsdp")
    return lax.while_loop(lambda x: x[0, 0] > 1e-3, body, x)

write("while", until_small, square)

@manual
def either(x):
    return lax.cond(x[0, 0] > 0, lambda x: lax.psum(x, "data"), lambda x: lax.psum(x, "fsdp"), x)

write("cond", either, square)
write("flops", lambda x, y: jnp.einsum("bij,bjk->ik", x, y),
      ((8, 12, 5), jnp.float32, P()), ((8, 5, 7), jnp.float32, P()))
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The text of each program by its name."""
    folder = tmp_path_factory.mktemp("programs")
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", textwrap.dedent(PROGRAMS), str(folder)]
    subprocess.run(command, check=True, env=environment)
    return {file.name: file.read_text() for file in folder.iterdir()}


def axes(found: Collective) -> tuple[str, ...]:
    """The axes of the mesh along which devices exchange data."""
    places = [np.unravel_index(group, (2, 4)) for group in found.groups]
    is_crossed = [any(len(set(place[axis])) > 1 for place in places) for axis in (0, 1)]
    return tuple(itertools.compress(("data", "fsdp"), is_crossed))


def only(program: str) -> Collective:
    (collective,) = collectives(program)
    return collective


BLOCK = N // 2 * N // 4 * FLOAT


@pytest.mark.parametrize(
    ("name", "kind", "payload", "sent", "along"),
    [
        ("psum", "all-reduce", BLOCK, BLOCK, ("data",)),
        ("psum of all", "all-reduce", BLOCK, BLOCK * 2 * 7 // 8, ("data", "fsdp")),
        ("all_gather", "all-gather", 4 * BLOCK, 3 * BLOCK, ("fsdp",)),
        ("psum_scatter", "reduce-scatter", BLOCK, BLOCK * 3 // 4, ("fsdp",)),
        ("all_to_all", "all-to-all", BLOCK, BLOCK // 2, ("data",)),
        ("ppermute", "collective-permute", BLOCK, BLOCK, ("fsdp",)),
        # In bfloat16, which CPUs move as float32.
        ("gathered", "all-gather", N * N * 2, N * N * 2 * 7 // 8, ("data", "fsdp")),
        ("reduced", "all-reduce", BLOCK // 2, BLOCK * 7 // 8, ("data", "fsdp")),
    ],
)
def test_each_kind_has_its_bytes_and_axes(programs, name, kind, payload, sent, along):
    found = only(programs[name])
    assert (found.kind, found.payload, found.sent(DEVICES)) == (kind, payload, (sent, 0))
    assert axes(found) == along
    assert (found.times, found.within, found.scatters) == (1, (), False)


def test_work_without_communication_has_no_collectives(programs):
    assert collectives(programs["alone"]) == []


def test_a_scan_repeats_the_gather_of_a_layers_weight(programs):
    found = only(programs["scan"])
    assert (found.kind, found.payload, found.times) == ("all-gather", N * N * FLOAT, 5)
    assert axes(found) == ("fsdp",)
    assert flops(programs["scan"]) == 5 * 2 * (16 // DEVICES) * N * N


def test_nested_scans_multiply(programs):
    times = {axes(found): found.times for found in collectives(programs["nested"])}
    assert times == {("data",): 21, ("fsdp",): 7}
    rows, columns = N // 2, N // 4
    assert flops(programs["nested"]) == 21 * 2 * (2 * rows * rows * columns)


def test_a_loop_of_unknown_length_is_named_and_loops_inside_it_still_count(programs):
    found = {axes(c): c for c in collectives(programs["while"])}
    assert found[("data",)].times == 6
    assert found[("fsdp",)].times == 1
    for collective in found.values():
        (loop,) = collective.within
        assert "while" in loop
    once = flops(programs["while"])
    assert flops(programs["while"], lambda within: 10 ** len(within)) == 10 * once > 0


def test_what_is_in_a_branch_of_a_conditional_says_so(programs):
    found = {axes(c): c for c in collectives(programs["cond"])}
    assert found.keys() == {("data",), ("fsdp",)}
    assert all("cond" in name for c in found.values() for name in c.within)
    assert all(len(c.within) == 1 for c in found.values())


GROUPS_OF_8 = (tuple(range(8)),)


@pytest.mark.parametrize(
    ("kind", "groups", "inside", "between"),
    [
        # Two nodes of 4: shares of a quarter, which each device exchanges with one of the other.
        ("all-reduce", GROUPS_OF_8, 2 * 600, 2 * 100),
        ("reduce-scatter", GROUPS_OF_8, 600, 100),
        ("all-gather", GROUPS_OF_8, 8 * 600, 8 * 100),
        ("all-to-all", GROUPS_OF_8, 300, 400),
        ("all-reduce", ((0, 1, 2, 3), (4, 5, 6, 7)), 2 * 600, 0),
        ("all-reduce", ((0, 4), (1, 5), (2, 6), (3, 7)), 0, 2 * 400),
        ("collective-permute", ((0, 1), (1, 2)), 800, 0),
        ("collective-permute", ((3, 4),), 0, 800),
    ],
)
def test_what_is_sent_inside_of_a_node_and_between_nodes(kind, groups, inside, between):
    collective = Collective(kind, 800, 1, (), groups, "")
    assert collective.sent(node=4) == (inside, between)


@pytest.mark.parametrize(
    ("name", "scatters", "payload", "sent"),
    [
        ("sliced", True, N * FLOAT, N * FLOAT * 3 // 4),
        ("sliced together", True, 2 * N * FLOAT, 2 * N * FLOAT * 3 // 4),
        ("used whole", False, N * FLOAT, N * FLOAT * 6 // 4),
    ],
)
def test_an_all_reduce_of_which_a_device_uses_its_part_sends_as_little_as_a_reduce_scatter(
    programs, name, scatters, payload, sent
):
    found = only(programs[name])
    assert (found.kind, found.payload, found.scatters) == ("all-reduce", payload, scatters)
    assert found.sent(DEVICES) == (sent, 0)


def test_flops_count_batch_and_contracted_axes(programs):
    assert flops(programs["flops"]) == 2 * 12 * 7 * 8 * 5


GROUPS = {
    "{{0,2},{1,3}}": ((0, 2), (1, 3)),
    "{}": ((0, 1, 2, 3, 4, 5, 6, 7),),
    "[2,4]<=[8]": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "[4,2]<=[2,4]T(1,0)": ((0, 4), (1, 5), (2, 6), (3, 7)),
    "mesh['a'=2,'b'=4] {'b'}": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "mesh['a'=2,'b'=4] {'a'}": ((0, 4), (1, 5), (2, 6), (3, 7)),
    "mesh['a'=2,'b'=4] {'a','b'}": ((0, 1, 2, 3, 4, 5, 6, 7),),
    "mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "mesh['a'=8] {'a':(1)2}": ((0, 4), (1, 5), (2, 6), (3, 7)),
    "mesh['a'=8] {'a':(2)4}": ((0, 1, 2, 3), (4, 5, 6, 7)),
}


@pytest.mark.parametrize("groups", GROUPS)
def test_groups_are_read_in_every_format(groups):
    program = f"""HloModule f, num_partitions=8

ENTRY %main (x: f32[3]) -> f32[3] {{
  %x = f32[3]{{0}} parameter(0)
  ROOT %y = f32[3]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add
}}
"""
    found = only(program)
    assert (found.groups, found.size) == (GROUPS[groups], 12)


def test_an_all_reduce_that_is_started_and_ended_is_used_in_full():
    program = """HloModule f, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

ENTRY %main (x: f32[24]) -> f32[24] {
  %x = f32[24]{0} parameter(0)
  %s = ((f32[24]{0}), f32[24]{0}) all-reduce-start(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  %d = f32[24]{0} all-reduce-done(%s)
  ROOT %r = f32[24]{0} negate(%d)
}
"""
    found = only(program)
    assert (found.kind, found.payload, found.scatters) == ("all-reduce", 96, False)


def test_asynchronous_forms_count_once_by_what_goes_in():
    program = """HloModule f, num_partitions=4

%wrapped (x: bf16[8,3]) -> bf16[2,3] {
  %x.1 = bf16[8,3]{1,0} parameter(0)
  ROOT %rs = bf16[2,3]{1,0} reduce-scatter(%x.1), replica_groups={{0,1,2,3}}, to_apply=%add
}

ENTRY %main (x: bf16[8,3]) -> (bf16[32,3], bf16[2,3]) {
  %x = bf16[8,3]{1,0} parameter(0)
  %g = (bf16[8,3]{1,0}, bf16[32,3]{1,0}) all-gather-start(%x), replica_groups={{0,1,2,3}}
  %h = bf16[32,3]{1,0} all-gather-done(%g)
  %s = ((bf16[8,3]{1,0}), bf16[2,3]{1,0}) async-start(%x), calls=%wrapped
  %t = bf16[2,3]{1,0} async-done(%s)
  ROOT %r = (bf16[32,3]{1,0}, bf16[2,3]{1,0}) tuple(%h, %t)
}
"""
    gather, scatter = collectives(program)
    assert gather.is_asynchronous
    assert scatter.is_asynchronous
    assert (gather.kind, gather.payload, gather.sent(4)) == ("all-gather", 192, (144, 0))
    assert (scatter.kind, scatter.payload, scatter.sent(4)) == ("reduce-scatter", 48, (36, 0))


CHAIN = """HloModule f, num_partitions=4

%first (x.1: f32[1,8]) -> (f32[1,8], f32[4,8]) {
  %x.1 = f32[1,8]{1,0} parameter(0)
  %a = f32[4,8]{1,0} all-gather(%x.1), replica_groups={}, frontend_attributes={chain_id="2"}
  ROOT %s = (f32[1,8], f32[4,8]) custom-call(%a), custom_call_target="AsyncCollectiveStart"
}

%beside (x.2: f32[1,8], y.2: f32[8,8]) -> (f32[8,8], f32[4,8]) {
  %x.2 = f32[1,8]{1,0} parameter(0)
  %y.2 = f32[8,8]{1,0} parameter(1)
  %b = f32[4,8]{1,0} all-gather(%x.2), replica_groups={}, frontend_attributes={chain_id="2"}
  %p = f32[8,8]{1,0} convolution(%y.2, %y.2), dim_labels=bf_io->bf
  ROOT %t = (f32[8,8]{1,0}, f32[4,8]{1,0}) tuple(%p, %b)
}

%last (x.3: f32[1,8], z.3: f32[4,8]) -> f32[4,8] {
  %x.3 = f32[1,8]{1,0} parameter(0)
  %z.3 = f32[4,8]{1,0} parameter(1)
  %c = f32[4,8]{1,0} all-gather(%x.3), replica_groups={}, frontend_attributes={chain_id="2"}
  ROOT %e = f32[4,8]{1,0} custom-call(%z.3, %c), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: f32[1,8], y: f32[8,8]) -> f32[4,8] {
  %x = f32[1,8]{1,0} parameter(0)
  %y = f32[8,8]{1,0} parameter(1)
  %async-collective-start = (f32[1,8]{1,0}, f32[4,8]{1,0}) fusion(%x), kind=kCustom, calls=%first
  %started = f32[1,8]{1,0} get-tuple-element(%async-collective-start), index=0
  %fusion.1 = (f32[8,8]{1,0}, f32[4,8]{1,0}) fusion(%started, %y), kind=kOutput, calls=%beside
  %z = f32[4,8]{1,0} get-tuple-element(%fusion.1), index=1
  %q = f32[4,8]{1,0} all-reduce(%z), replica_groups={}, to_apply=%add
  ROOT %done = f32[4,8]{1,0} fusion(%x, %q), kind=kCustom, calls=%last
}
"""


def test_a_collective_that_a_tpu_runs_beside_other_work_counts_once():
    gather, reduction = collectives(CHAIN)
    assert (gather.kind, gather.payload, gather.is_asynchronous) == ("all-gather", 128, True)
    assert (reduction.kind, reduction.is_asynchronous) == ("all-reduce", False)
    assert flops(CHAIN) == 2 * 8**3


def test_a_collective_that_is_started_and_waited_for_at_once_is_not_asynchronous():
    program = """HloModule f, num_partitions=4

ENTRY %main (x: f32[24]) -> f32[24] {
  %x = f32[24]{0} parameter(0)
  %s = (f32[24], f32[24]) collective-permute-start(%x), source_target_pairs={{0,1},{1,2}}CONFIG
  ROOT %d = f32[24]{0} collective-permute-done(%s)
}
"""
    config = ', backend_config={"collective_backend_config":{"is_sync":true}}'
    assert only(program.replace("CONFIG", "")).is_asynchronous
    assert not only(program.replace("CONFIG", config)).is_asynchronous
