"""The report: evidence in, `report.md` with PNG figures, one self-contained `report.html`, and `evidence.json` out.

evidence.py (what there is) -> verdict.py (what it shows) -> document.py (sections of blocks.py) -> html.py and markdown.py.
"""

from __future__ import annotations

import json
from pathlib import Path

from triptych.core.storage import make_directory, storing, write_whole
from triptych.report.evidence import Evidence, to_dict
from triptych.report.verdict import Verdict, verdict


def write_report(evidence: Evidence, directory: Path) -> Verdict:
    """Write `report.md`, `report.html`, `evidence.json` and `figures/*.png`; returns the verdict they state.

    Each file is replaced whole. Raises StorageError when the directory cannot be written.
    """
    from triptych.report import blocks, document, figures, html, markdown

    outcome = verdict(evidence)
    sections = document.sections(evidence, outcome)
    pictures = [block for section in sections for block in section.blocks if isinstance(block, blocks.Picture)]
    files = {f"{markdown.FIGURES}/{picture.slug}.png": figures.png(picture.draw) for picture in pictures}
    files["evidence.json"] = json.dumps(to_dict(evidence), indent=1, allow_nan=False).encode()
    files["report.md"] = markdown.render(evidence, outcome, sections).encode()
    files["report.html"] = html.render(evidence, outcome, sections).encode()
    make_directory(directory / markdown.FIGURES)
    for name, content in files.items():
        with storing(directory / name):
            write_whole(directory / name, content)
    return outcome
