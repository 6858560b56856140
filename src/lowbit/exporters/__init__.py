"""Exports quantized folders to the formats of other programs.

Each target is a class derived from `Exporter` in a file of its own. An export first plans every
layer, then writes a new folder, reads it back, and stores the comparison in export.json.
"""

from lowbit.exporters.compare import ComparedLayer, Comparison
from lowbit.exporters.exporter import Exporter, ExportOptions
from lowbit.exporters.plan import ExportPlan, PlannedLayer
from lowbit.exporters.run import TARGETS, Step, export, plan_export, verify

__all__ = [
    "TARGETS",
    "ComparedLayer",
    "Comparison",
    "ExportOptions",
    "ExportPlan",
    "Exporter",
    "PlannedLayer",
    "Step",
    "export",
    "plan_export",
    "verify",
]
