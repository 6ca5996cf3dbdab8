"""The benches of scripts/benchmark.py; each has `Settings` and `measure(settings) -> rows`."""
