"""Measures how fast models run on this machine, and describes the machine.

machine.py: processor, kernels, threads, versions, GPUs and extras.
"""

from lowbit.bench.machine import Machine, processor

__all__ = ["Machine", "processor"]
