"""Measuring tools: what compiled training steps need, read without running them; comparisons."""
