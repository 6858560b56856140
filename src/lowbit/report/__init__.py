"""One self-contained HTML page about a quantized folder.

records.py reads its JSON files, history.py follows the events of the run, run.py puts all of it
together, drawing.py turns numbers into coordinates, page.py fills the template in page/, and
write.py writes the page. No script, no font, no image, no request: the page can be mailed. Names in
it come from untrusted files, so all text is escaped, and a content security policy forbids whatever
would slip through.
"""

from lowbit.report.page import render
from lowbit.report.records import read_results
from lowbit.report.run import read_run
from lowbit.report.write import write_report

__all__ = ["read_results", "read_run", "render", "write_report"]
