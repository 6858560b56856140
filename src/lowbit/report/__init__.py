"""Writes a self-contained HTML page about a quantized folder.

records.py reads the JSON files of the folder, and history.py the events of the run. layers.py and
run.py collect what the page shows, and results.py makes tables of measurements. drawing.py turns
numbers into coordinates, page.py fills the template in page/, and write.py writes the page.

The page has no scripts, fonts, images or links, so it can be sent by mail. Names in it come from
untrusted files: all text is escaped, and a content security policy forbids everything else.
"""

from lowbit.report.page import render
from lowbit.report.records import read_results
from lowbit.report.run import read_run
from lowbit.report.write import write_report

__all__ = ["read_results", "read_run", "render", "write_report"]
