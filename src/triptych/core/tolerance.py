"""Every tolerance, with its reason. Errors are scale-relative: max |a - b| over the larger of max |a| and max |b|.

float64 separates a wrong formula from rounding by ten orders of magnitude, so its bounds are fixed. float32 bounds are
measured: `MARGIN` times the largest error of one framework against its own float64 over five input seeds, written to
`noise.json` by `triptych parity MODEL --calibrate` and never typed. `numerics N`, here and elsewhere, is row N of docs/numerics.md.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

NOISE_FILE = Path(__file__).with_name("noise.json")
MARGIN = 8.0
# Rung 8: frameworks are equal when they differ no more than a framework differs from itself; a factor for the spread of chance.
FREE_RUN_RATIO = 5.0
# Steps of a free run count as long as one framework is still this close to itself; fewer than three are no evidence.
FREE_RUN_HORIZON = 1e-3
FREE_RUN_MINIMUM_STEPS = 3
# The field's customary check, which the planted faults are held against: float32 logits, eval mode.
CUSTOMARY_FORWARD_CHECK = 1e-4

EXACT = 0.0
FORWARD = 1e-12
GRADIENT = 1e-11
UPDATE = 1e-14
STEP = 1e-10
# 0.05 of 255 grey levels: frameworks' antialiased resizers sum their taps in different orders (numerics 20).
PIXEL = 0.05 / 255.0
# The same 0.05 levels after division by a standard deviation of about 0.23 and against a scale of about 2.6.
NORMALIZED_PIXEL = 3e-4
# The same arithmetic as PyTorch's in C++ (examples/cpp), but for products and sums that one compiler fuses: units in the last place.
PREPARED = 1e-6
LOGITS_FLOAT32 = 1e-5
# A lane that is timed, and its loss after one update: one number, whose differences pass through zero by chance, so that the yardstick of
# rounding is the largest of as many perturbations, by one unit in the last place, as make a small one unlikely.
UPDATED_LOSS_PERTURBATIONS = 8
# Exported models against their source's own logits. Weights in half precision are off by up to 2^-11 of themselves, weights in 8 bits by up
# to 1/254 of their channel's largest, and so are the activations; layers add to that.
EXPORTED: dict[str, float] = {"float32": LOGITS_FLOAT32, "float16": 5e-3, "int8": 1e-1}

FLOAT64: dict[tuple[int, str], float] = {
    # Names, shapes and weights are carried, not computed.
    (1, "names"): EXACT,
    (1, "weights"): EXACT,
    # Decoders are bit-exact when asked for the accurate transform (numerics 19).
    (2, "decoded"): EXACT,
    (2, "resized"): PIXEL,
    (2, "normalized"): NORMALIZED_PIXEL,
    # Without a resize what is left is (x / 255 - mean) / std, three operations that IEEE 754 rounds alike (numerics 36).
    (2, "unresized"): EXACT,
    # Training batches: after each transform of [0, 255] pixels; then normalized, erased and mixed; and their targets.
    (2, "augmented"): PIXEL,
    (2, "mixed"): NORMALIZED_PIXEL,
    (2, "targets"): EXACT,
    # About 1e4 units in the last place: fifty layers of sums in different orders reach some 1e-13.
    (3, "activation"): FORWARD,
    (3, "logits"): FORWARD,
    (4, "activation"): FORWARD,
    (4, "logits"): FORWARD,
    (4, "statistics"): FORWARD,
    (4, "counter"): EXACT,
    # A mean of 400 standard deviations costs a two-pass variance under three digits and E[x²] - E[x]² over five.
    (4, "probe"): FORWARD,
    (5, "loss"): FORWARD,
    # The backward pass amplifies rounding about tenfold over the forward pass.
    (5, "gradient"): GRADIENT,
    # Elementwise arithmetic on identical inputs; where gradients are clipped, after one sum over all of them.
    (6, "momentum"): UPDATE,
    (6, "exp_avg"): UPDATE,
    (6, "exp_avg_sq"): UPDATE,
    (6, "sgd_weight"): UPDATE,
    (6, "sgd_ema"): UPDATE,
    (6, "adamw_weight"): UPDATE,
    (6, "adamw_ema"): UPDATE,
    (6, "statistics"): EXACT,
    (6, "statistics_ema"): UPDATE,
    (6, "counter"): EXACT,
    (7, "loss"): STEP,
    (7, "momentum"): STEP,
    (7, "sgd_weight"): STEP,
    (7, "sgd_ema"): STEP,
    (7, "statistics"): STEP,
    (7, "statistics_ema"): STEP,
    (7, "counter"): EXACT,
    # AdamW divides by vanishing second moments: its gradients and moments are held as gradients are, and its weights to the
    # update that each framework's own recorded moments imply (compare.implied_update).
    (7, "exp_avg"): GRADIENT,
    (7, "exp_avg_sq"): GRADIENT,
    (7, "adamw_weight"): UPDATE,
    (7, "adamw_ema"): UPDATE,
}


# A ReLU whose input is within rounding of zero takes the other side: rare, and then large. Five gradients sample that poorly; the
# momentum of every synchronised step samples the same noise.
SAME_NOISE: dict[tuple[int, str], tuple[str, ...]] = {(5, "gradient"): ("7/momentum",)}


def tolerance(precision: str, model: str, rung: int, group: str) -> float:
    """The bound on the scale-relative error of a tensor of `group` at `rung`."""
    fixed = FLOAT64[rung, group]
    if precision == "float64" or rung <= 2 or fixed == EXACT:
        return fixed
    measured = MARGIN * noise(model, rung, group)
    return min(measured, LOGITS_FLOAT32) if (rung, group) == (3, "logits") else measured


def noise(model: str, rung: int, group: str) -> float:
    """Measured float32 noise of `model`; for a model without a row, the largest of all rows."""
    table = noise_table()
    keys = (f"{rung}/{group}", *SAME_NOISE.get((rung, group), ()))
    rows = [table[model]] if model in table else list(table.values())
    return max((row["noise"][key] for row in rows for key in keys if key in row["noise"]), default=0.0)


@functools.cache
def noise_table() -> dict[str, dict[str, dict[str, float]]]:
    """The committed measurements: model -> {"noise": {"rung/group": error}, ...}."""
    return json.loads(NOISE_FILE.read_text()) if NOISE_FILE.exists() else {}
