"""The environment of a process with eight virtual CPU devices."""

import os


def environment() -> dict[str, str]:
    """That of this process, with eight devices and without JAX's compilation cache.

    A program for several CPU devices that comes from the cache may run its collective operations in
    different orders on different devices, which then wait for each other (as of jaxlib 0.10).
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    return os.environ | {"XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}
