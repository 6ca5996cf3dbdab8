"""`all`: the benchmarks that fit the device at hand, and a page of their results to send.

Each benchmark is a process of its own, which has the device and its memory to itself, and whose
command is on the page.
"""

import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.markdown import markdown_table

from benchmarks import Row, as_text
from galore_jax.errors import InputError, require_choice
from galore_jax.files import write_json, write_text

SCRIPT = Path(__file__).parents[1] / "benchmark.py"
# Without optax.contrib.galore, whose SVDs take most of the time at these widths.
CHOSEN = "optimizers=adamw,galore_full,galore_projected"
BENCHMARKS = {
    "device": [
        f"step {CHOSEN}",
        "training size=350m optimizer=adamw",
        "training size=350m optimizer=galore_adamw",
        "kernels size=350m",
        "kernels size=7b",
        f"step {CHOSEN} size=350m tokens=16384 layers=1",
        f"step {CHOSEN} size=1b tokens=8192 layers=1",
        f"step {CHOSEN} size=7b tokens=4096 layers=1",
        f"step {CHOSEN} size=7b tokens=4096 layers=1 model=plain",
        "optimizers",
        "refresh sizes=1024",
    ],
    "small": [
        f"step {CHOSEN} size=9m tokens=256 layers=1 repeats=1",
        "kernels size=9m repeats=1",
        "training size=9m optimizer=galore_adamw rows=1 steps=3",
    ],
}
# Prints what the device is; the parent of the benchmarks must not take it from them.
PROBE = """
import importlib.metadata as m, json, jax
names = "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "optax", "galore-jax"
installed = {d.metadata["Name"] for d in m.distributions()}
print(json.dumps({
    "device": jax.devices()[0].device_kind, "platform": jax.default_backend(),
    "devices": jax.device_count(), "versions": {n: m.version(n) for n in names if n in installed},
}))
"""


@dataclass(frozen=True)
class Settings:
    """See scripts/benchmark.py.

    Raises:
      InputError: the form is unknown.
    """

    folder: str = "benchmark"
    minutes: int = 15
    form: str = ""

    def __post_init__(self):
        require_choice("form", self.form, ("", *BENCHMARKS))


def measure(settings: Settings) -> list[Row]:
    """Runs what the time allows, and writes `results.md` and `results.json` into the folder.

    Returns:
      A row for each benchmark, with the seconds that it took and what became of it.

    Raises:
      InputError: JAX finds no device.
    """
    deadline = time.monotonic() + 60 * settings.minutes
    machine = probe()
    form = settings.form or ("small" if machine["platform"] == "cpu" else "device")
    folder, results = Path(settings.folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for command in BENCHMARKS[form]:
        print(f"benchmark.py {command}", file=sys.stderr, flush=True)
        results.append(run(command, deadline - time.monotonic()))
        # After each one, so that what interrupts the rest leaves these.
        write_json(folder / "results.json", machine | {"results": results})
        write_text(folder / "results.md", page(machine, results))
    print(f"wrote {folder / 'results.md'} and {folder / 'results.json'}", file=sys.stderr)
    return [
        {"name": one["command"], "seconds": one["seconds"], "result": one.get("problem", "ok")}
        for one in results
    ]


def probe() -> dict[str, Any]:
    """The device, the machine and the versions."""
    found = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if found.returncode:
        raise InputError(f"JAX finds no device: {last_line(found.stderr)}")
    machine = json.loads(found.stdout.splitlines()[-1])
    return machine | {"python": platform.python_version(), "system": platform.platform()}


def run(command: str, seconds: float) -> dict[str, Any]:
    """Runs a benchmark; what fails, as for lack of memory or time, becomes its `problem`."""
    result: dict[str, Any] = {"command": command, "seconds": 0.0}
    if seconds <= 0:
        return result | {"problem": "no time was left"}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        words = [sys.executable, str(SCRIPT), *command.split(), "--json", str(file)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            problem = "it was stopped when the time was over"
        else:
            problem = last_line(done.stderr) if done.returncode else None
        if problem is None:
            result["rows"] = json.loads(file.read_text())["rows"]
        else:
            result["problem"] = problem
    return result | {"seconds": time.monotonic() - start}


def last_line(text: str) -> str:
    """The last line of an error's text, which names the error."""
    lines = [line for line in text.splitlines() if line.strip()]
    marked = [line for line in lines if "RESOURCE_EXHAUSTED" in line]
    return (marked or lines or ["it ended without a word"])[-1].strip()


def page(machine: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"# galore_jax on {machine['device']}",
        "",
        f"One of {machine['devices']} × {machine['device']} ({machine['platform']}); "
        f"{machine['system']}, Python {machine['python']}, {versions}.",
    ]
    for one in results:
        lines += ["", "```bash", f"python scripts/benchmark.py {one['command']}", "```", ""]
        if "rows" in one:
            keys = list(dict.fromkeys(key for row in one["rows"] for key in row))
            rows = [[as_text(row.get(key)) for key in keys] for row in one["rows"]]
            lines += [markdown_table(keys, rows), f"It took {one['seconds']:.0f} s."]
        else:
            lines.append(f"No result: {one['problem']}")
    return "\n".join(lines) + "\n"
