"""The report: evidence in, `report.md` with PNG figures, one self-contained `report.html`, and `evidence.json` out.

evidence.py (what there is) -> verdict.py (what it shows) -> document.py (sections of blocks.py) -> html.py and markdown.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from triptych.core.errors import StorageError
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
    for name, content in files.items():
        _replace(directory / name, content)
    return outcome


def _replace(path: Path, content: bytes) -> None:
    """Write beside, then rename: a reader sees the old file or the new one, never half of it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; choose another directory with --out") from error
