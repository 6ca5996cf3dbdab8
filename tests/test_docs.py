"""The README and docs/: their code runs, and what they name and link to exists."""

import io
import re
import tomllib
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from analysis.results import cost_table, read_memory, read_results, read_steps, table

import galore_jax
from galore_jax import layerwise
from galore_jax.files import read_json

ROOT = Path(__file__).parents[1]
DOCS, README = ROOT / "docs", ROOT / "README.md"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [README, ROOT / "CONTRIBUTING.md", *PAGES]


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A block of Python that was executed: its code, the names after it, what it printed."""

    code: str
    names: dict[str, Any]
    output: str


class Page:
    """The Python blocks of a page, executed one after another in one namespace."""

    def __init__(self, page: Path, **names: Any):
        self.blocks = []
        for code in blocks(page, "python"):
            with redirect_stdout(io.StringIO()) as output:
                exec(compile(code, page.name, "exec"), names)
            self.blocks.append(Block(code, dict(names), output.getvalue()))

    def after(self, text: str) -> Block:
        """The first block that contains a text."""
        return next(block for block in self.blocks if text in block.code)

    def names(self, text: str) -> dict[str, Any]:
        """The names after it."""
        return self.after(text).names


@cache
def usage() -> Page:
    return Page(DOCS / "usage.md")


def moments(state: Any) -> Any:
    return optax.tree.get(state, "mu")


def test_the_readme_trains_with_low_rank_moments_then_with_projected_gradients():
    def loss(params, batch):
        return jnp.mean((batch @ params["kernel"] - 1) ** 2)

    # More rows than the rank: Adam follows rounding errors where there is no gradient.
    batch = jax.random.normal(jax.random.key(0), (320, 160))
    params = {"kernel": jax.random.normal(jax.random.key(1), (160, 192))}
    page = Page(README, loss=loss, params=params, batches=8 * [batch])
    projected = page.names("make_step(loss, tx)")
    full = {"loss": loss, "params": params, "batches": 8 * [batch]}
    exec(blocks(README, "python")[0], full)  # Again, as the results are donated.
    assert moments(full["state"])["kernel"].value.shape == (128, 192)
    assert loss(full["params"], batch) < loss(params, batch)
    assert loss(projected["params"], batch) < loss(full["params"], batch)
    uses = galore_jax.describe(params, full["tx"], loss, batch).uses
    assert uses["kernel"].gradient == "projected"


def test_the_chain_and_the_stock_chain_of_the_usage_page_train_alike():
    start, chained = usage().names("def loss"), usage().names("tx = chain(galore")
    loss, batch = start["loss"], start["batches"][0]
    assert loss(chained["params"], batch) < loss(start["params"], batch)
    assert moments(chained["state"])["layers"]["up_proj"]["kernel"].value.shape == (2, 16, 256)

    stock = usage().names("optax.chain(galore")
    assert moments(stock["state"])["layers"]["up_proj"]["kernel"].value.shape == (2, 16, 256)
    tx, params = chained["tx"], chained["params"]
    apply = jax.jit(galore_jax.apply_gradients, static_argnums=0)
    wanted, _ = apply(tx, jax.grad(loss)(params, batch), tx.init(params), params)
    jax.tree.map(
        lambda new, wanted: np.testing.assert_allclose(new, wanted, atol=1e-6),
        stock["params"],
        wanted,
    )


def test_the_other_examples_of_the_usage_page_do_what_it_says():
    (table,) = blocks(DOCS / "usage.md", "text")
    assert table == usage().after("print(describe(params, tx))").output

    rules = usage().names("rules=")
    bases = optax.tree.get(rules["tx"].init(rules["params"]), "bases")
    assert bases["layers"]["up_proj"]["kernel"].projection.rank == 8
    assert bases["layers"]["down_proj"]["kernel"].vectors["right"].shape == (2, 64, 16)
    assert bases["embed_tokens"]["embedding"] == optax.MaskedNode()

    convolution = usage().names("GaLoreDimensionNumbers")
    state = jax.eval_shape(convolution["tx"].init, convolution["convolution"])
    assert moments(state)["kernel"].value.shape == (288, 16)

    rounded = usage().names("key=")
    assert rounded["low"]["lm_head"]["kernel"].dtype == jnp.bfloat16
    assert moments(rounded["state"])["lm_head"]["kernel"].dtype == jnp.float32

    injected = usage().names("inject_hyperparams")
    zeros = jax.tree.map(jnp.zeros_like, injected["params"])
    _, state = injected["tx"].update(zeros, injected["state"], injected["params"])
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(5e-4)


def test_the_loop_of_projected_gradients_refreshes_and_learns():
    page = Page(DOCS / "projected-gradients.md")
    start, trained = page.names("def loss"), page.names("refresh_due(state)")
    loss, tokens = start["loss"], start["tokens"]
    assert loss(trained["params"], tokens) < 0.9 * loss(start["params"], tokens)
    assert int(trained["state"].inner_states[0].bases["up"].age) == 3

    assert "projected" in page.after("describe(").output
    checked = page.names("check_projection(loss)")
    gradients = {name: uses.gradient for name, uses in checked["description"].uses.items()}
    assert gradients == {"up": "projected", "down": "projected"}
    assert checked["errors"].keys() == {"up", "down"}

    accumulated = page.names("micro_batches=8")["grads"]["up"]
    params, state = checked["params"], checked["state"]
    _, grads = galore_jax.value_and_grad(loss)(params, state, tokens)
    np.testing.assert_allclose(accumulated.value, grads["up"].value, atol=1e-6)


def test_the_algorithm_in_plain_jax_is_that_of_the_library():
    page = Page(DOCS / "algorithm.md").blocks[-1].names
    assert len(blocks(DOCS / "algorithm.md", "python")[0].splitlines()) <= 60
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "up": jax.random.normal(keys[0], (16, 24)) / 4,
        "down": jax.random.normal(keys[1], (24, 16)) / 5,
        "bias": jnp.zeros(16),
    }

    def loss(params, x):
        return jnp.mean(
            jnp.sin(x + jnp.tanh(x @ params["up"]) @ params["down"] + params["bias"]) ** 2
        )

    settings = {"update_proj_gap": page["GAP"], "scale": page["SCALE"], "refresh": "svd"}
    tx = galore_jax.adamw(page["RATE"], page["RANK"], **settings)
    found, state = params, {name: page["start"](leaf) for name, leaf in params.items()}
    opt_state, gradient = tx.init(params), jax.jit(jax.grad(loss))
    apply = jax.jit(lambda *arguments: galore_jax.apply_gradients(tx, *arguments))
    for step in range(3 * page["GAP"] + 1):
        grads = gradient(params, jax.random.normal(jax.random.key(step), (12, 16)))
        found, state = page["train_step"](params, state, grads, step)
        params, opt_state = apply(grads, opt_state, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, params)
    # Subspace iteration comes to the same subspace.
    basis = jnp.linalg.qr(jax.random.normal(keys[2], (16, page["RANK"])))[0]
    for _ in range(20):
        basis = page["iterated"](grads["up"], basis)
    overlap = jnp.sum((basis.T @ page["leading"](grads["up"])) ** 2) / page["RANK"]
    assert overlap > 0.98


def test_the_layer_wise_loop_refreshes_and_learns():
    page = DOCS / "low-memory.md"
    trained = Page(page).names("LayeredModel")
    start: dict[str, Any] = {}  # Those of the loop are donated.
    exec(blocks(page, "python")[0], start)
    tokens, params = start["batches"][0], start["params"]
    x, shared = start["embed"](params, tokens)
    for kernel in params["layers"]["kernel"]:
        x = start["block"]({"kernel": kernel}, x, shared)
    assert trained["loss"] < start["head_loss"](params, x, tokens)[0]
    basis = trained["state"].inner.inner_states[0].bases["layers"]["kernel"]
    np.testing.assert_array_equal(basis.age, 4 * [3])
    assert basis.vectors["left"].shape == (4, 192, 128)


def test_the_examples_for_moving_from_elsewhere_project_the_sides_they_say():
    page = Page(DOCS / "comparison.md")
    params = {"kernel": jnp.ones((256, 512))}
    reference = page.names("weight_decay=0.0")["state"]
    assert moments(reference)["kernel"].value.shape == (128, 512)
    contrib = jax.eval_shape(page.names("reverse_std")["tx"].init, params)
    assert moments(contrib)["kernel"].value.shape == (256, 128)


def test_the_loop_on_a_mesh_refreshes_and_learns():
    page = DOCS / "scaling.md"
    trained = Page(page).names("make_mesh")
    start: dict[str, Any] = {}  # Those of the loop are donated.
    exec(blocks(page, "python")[0], start)
    with jax.set_mesh(trained["mesh"]):
        before = start["loss"](start["params"], start["batches"][0])
    assert trained["value"] < 0.9 * before
    basis = trained["state"].inner_states[0].bases["up"]
    np.testing.assert_array_equal(basis.age, 4 * [20])
    assert trained["step"]._cache_size() == 1


def test_the_recommended_optimizer_has_the_bytes_that_its_page_says():
    tx = Page(DOCS / "which-optimizer.md").names("galore_jax.muon")["tx"]
    params = {"kernel": jax.ShapeDtypeStruct((1024, 2736), jnp.float32)}
    state = jax.eval_shape(lambda: tx.init(jax.tree.map(jnp.zeros_like, params)))
    basis = state.inner_states[0].bases["kernel"]
    assert basis.projection.rank == 320
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim > 0]
    # Wide kernels take less than the average of a model, square ones more.
    assert 1.5 < 4 * sum(leaf.size for leaf in arrays) / (1024 * 2736) < 2


def test_the_page_of_benchmarks_has_the_table_of_kept_results():
    results = DOCS / "results"
    costs = [
        *map(read_steps, sorted(results.glob("step_*.json"))),
        *map(read_memory, sorted(results.glob("memory_1b*.json"))),
    ]
    entries, page = read_results(results / "c4_5m"), read(DOCS / "benchmarks.md")
    assert table(entries) in page
    assert cost_table(entries, costs) in page


def test_the_page_of_benchmarks_has_the_kept_times_and_states_of_all_optimizers():
    results = DOCS / "results"
    names = "step_350m_cpu", "step_7b_v6e", "step_7b_h100"
    steps = [read_steps(results / f"{name}.json").values for name in names]
    lines = []
    for row in read_json(results / "step_350m_cpu.json")["rows"]:
        times = [step.get(row["name"]) for step in steps]
        cells = ["" if time is None else f"{time:.2f}" for time in times]
        lines.append(" | ".join([row["name"], *cells, f"{row['bytes_of_adamw']:.1%}"]))
    assert "".join(f"| {line} |\n" for line in lines) in read(DOCS / "benchmarks.md")


def test_the_page_which_optimizer_has_the_kept_losses_times_and_memory():
    labels = {
        "Muon, float32": "muon",
        "Muon": "muon",
        "Muon in 8 bits": "muon8bit",
        "recommended": "recommended",
        "the same bytes with more for attention": "attention_half",
        "recommended, in 8 bits with int8 bases": "recommended_8bit",
        "`galore_jax.muon`, rank 1/4": "galore_muon",
        "`galore_jax.adamw`, rank 1/4": "galore_adamw",
        "AdamW": "adamw",
        "[FOAM](baselines.md)": "foam",
    }
    results = DOCS / "results"
    small, larger = (
        {entry.label: entry.mean for entry in read_results(results / folder)}
        for folder in ("c4_5m", "python_10m_batch8")
    )
    steps = [
        read_steps(results / f"step_{name}.json").values
        for name in ("350m_cpu", "7b_v6e", "7b_h100")
    ]
    memory = [
        dict(read_memory(results / f"memory_{name}.json").values)
        for name in ("1b_layerwise", "1b_layerwise_sums", "7b_layerwise", "7b_layerwise_sums")
    ]
    for of_7b in memory[2:]:
        of_7b["recommended_8bit"] = of_7b["galore_muon8bit"]
    rows = [
        [cell.strip("* ") for cell in line.strip("|").split("|")]
        for line in read(DOCS / "which-optimizer.md").splitlines()
        if line.startswith("|")
    ]
    found = [(labels[row[0]], row) for row in rows if row[0] in labels]
    assert {label for label, _ in found} == set(labels.values())
    for label, row in found:
        if len(row) == 5:
            sizes = [one.get(label) for one in memory]
            assert row[1:] == ["" if size is None else f"{size:.2f}" for size in sizes]
        else:
            assert row[2] == f"{small[label]:.4f}"
            assert row[3] == (f"{larger[label]:.4f}" if label in larger else "")
            times = ["1" if label == "adamw" else step.get(label) for step in steps]
            assert row[4:] == [
                f"{time:.2f}" if isinstance(time, float) else time or "" for time in times
            ]


@pytest.mark.parametrize(
    ("page", "folder"),
    [
        ("benchmarks.md", "c4_5m_shorter"),
        ("benchmarks.md", "python_10m"),
        ("benchmarks.md", "python_10m_batch8"),
        ("tried.md", "python_10m_batch8_tried"),
    ],
)
def test_the_pages_have_the_other_tables_of_kept_results(page, folder):
    assert table(read_results(DOCS / "results" / folder)) in read(DOCS / page)


def test_every_page_with_python_is_run_above():
    run = (
        *("usage", "projected-gradients", "low-memory", "comparison", "scaling"),
        *("which-optimizer", "algorithm"),
        "integrations",  # in test_integrations.py
    )
    assert {page for page in TEXTS if blocks(page, "python")} == {
        README,
        *(DOCS / f"{name}.md" for name in run),
    }


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_every_file_target_extra_and_link_that_a_page_names_exists(page):
    text = read(page)
    named = r"(?<![\w/.])((?:scripts|configs|examples|tests|docs|galore_jax)/[\w./*-]*\w)"
    assert [path for path in re.findall(named, text) if not any(ROOT.glob(path))] == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)
    assert [name for name in targets if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = ",".join(re.findall(r"\.\[([\w,]+)\]", text)).split(",")
    assert set(extras) - {""} <= project["optional-dependencies"].keys()
    links = re.findall(r"\]\(([^)\s]+)\)|^\[\w+\]: (\S+)", text, re.MULTILINE)
    for link in (inline or reference for inline, reference in links):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """The anchors of the headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", read(page), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_public_name_is_in_the_reference():
    reference = "\n".join(read(page) for page in (DOCS / "api").glob("*.md"))
    documented = set(re.findall(r"^::: galore_jax\.([\w.]+)$", reference, re.MULTILINE))
    names = set(galore_jax.__all__) - {"layerwise"}
    own = {f"layerwise.{name}" for name in layerwise.__all__}
    assert documented == names | own
    table = read(DOCS / "api" / "index.md").partition("Signatures use")[0]
    listed = set(re.findall(r"`(\w+)`", table.partition("| --- | --- |")[2]))
    assert listed == names | {"layerwise"}
