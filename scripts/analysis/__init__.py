"""What compiled training steps need: memory, communication and work, read without running them."""
