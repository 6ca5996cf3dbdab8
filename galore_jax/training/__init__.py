"""The trainer of LLaMAs, and the fine-tuning of encoders."""
