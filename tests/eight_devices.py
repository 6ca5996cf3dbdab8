"""The environment of a process with eight virtual CPU devices."""

import os


def environment() -> dict[str, str]:
    """That of this process, with eight devices.

    XLA runs each collective operation on a thread that waits for the other devices, and has as many
    threads as the machine has cores, or `NPROC` says. With two cores they would all be waiting for
    devices that have no thread left.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    return os.environ | {"XLA_FLAGS": flags, "NPROC": "64"}
