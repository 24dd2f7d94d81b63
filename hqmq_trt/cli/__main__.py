"""``python -m hqmq_trt.cli``."""

from hqmq_trt.cli import main

main()
