"""The process that runs the model: `python -m triptych.serving.worker DIR`; batches come on stdin, logits leave on stdout.

A batch is a line of JSON, `{"images": N}`, and N images, raw float32; its answer is `{"shape": [N, C]}` and as many values, or
`{"error": {"kind", "message"}}`. The first line, before any batch, tells the runtime's versions, or why there will be no answers.
"""

from __future__ import annotations

import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from triptych.core.conversation import own_stdout, raised
from triptych.export import runtimes
from triptych.export.worker import FRAMEWORKS, alone
from triptych.serving import artefact


def main(directory: str) -> None:
    """Answer until the input ends, as it does when the server goes."""
    for each in (signal.SIGINT, signal.SIGTERM):  # meant for the server, which drains first
        signal.signal(each, signal.SIG_IGN)
    answers = own_stdout()

    def tell(told: dict[str, Any], values: bytes = b"") -> None:
        answers.write(json.dumps(told).encode() + b"\n" + values)
        answers.flush()

    try:
        served = artefact.load(Path(directory))
        alone(served.runtime)
        run = runtimes.opened(served.runtime, served.path)
    except Exception as error:
        tell(raised(error))
        return
    loaded = [name for name in FRAMEWORKS if name in sys.modules]
    tell({"versions": runtimes.load(served.runtime).versions(), "frameworks_loaded": loaded})
    image = math.prod(served.shape) * np.dtype(np.float32).itemsize
    for line in sys.stdin.buffer:
        count = json.loads(line)["images"]
        values = np.frombuffer(sys.stdin.buffer.read(count * image), np.float32)
        try:
            logits = np.ascontiguousarray(run(values.reshape(count, *served.shape)), np.float32)
        except Exception as error:  # the batch's fault or the runtime's; the next batch is another one
            tell(raised(error))
        else:
            tell({"shape": logits.shape}, logits.tobytes())


if __name__ == "__main__":
    main(sys.argv[1])
