"""Which TensorRT can build our engines."""

from __future__ import annotations

from typing import Any

from hqmq_trt.errors import HqmqError

OLDEST = (10, 6)
"""The first release that our engines were built with; aliased plugin inputs and outputs exist from 10.3."""
MAJORS = (10, 11)
"""Major versions that the plugin library was loaded with."""


def check_tensorrt() -> Any:
    """The module tensorrt, of a release that fits.

    Raises:
        HqmqError: not installed, too old, or of an unknown major version.
    """
    from hqmq_trt.runtime.trt_engine import tensorrt

    trt = tensorrt()
    version = str(trt.__version__)
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        raise HqmqError(
            f"the module tensorrt calls itself version '{version}'; install TensorRT 10.6 or later"
        ) from None
    if (major, minor) < OLDEST:
        raise HqmqError(f"TensorRT {version} is too old; install 10.6 or later: pip install 'hqmq-trt[tensorrt]'")
    if major not in MAJORS:
        raise HqmqError(
            f"TensorRT {version} has a major version this release was not tested with "
            f"({', '.join(map(str, MAJORS))}); install tensorrt<{MAJORS[-1] + 1}"
        )
    return trt
