"""JAX's own profiler: a trace of what runs, and its operators by the kind of work they do.

What runs are the instructions of compiled programs. The program's text tells which scope of the source each of them, and each part of a
fused one, comes from: `jit(step)/transpose(jvp(ResNet))/layer1/0/bn1/mul`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from triptych.core import trace
from triptych.core.spec import Spec
from triptych.core.trace import DATA, OPTIMIZER, STEP, Event

INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = .*?\s(?P<code>[a-z][\w-]*)\((?P<rest>.*)$")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
SCOPE, CALLS, REFERENCE = re.compile(r'op_name="([^"]*)"'), re.compile(r"calls=%?([\w.-]+)"), re.compile(r"%([\w.-]+)")
INSIDE = re.compile(r"(?:^|/)(?:transpose\()?(?:jvp\()?[A-Z]\w*\)*/")
"""A scope within a Flax module, which are classes, as no other scope of ours is."""
MOVING = {"bitcast", "broadcast", "constant", "convert", "copy", "iota", "parameter", "reshape", "slice", "transpose", "tuple"}
"""What says nothing about the kind of work when it is a part of a fused instruction."""
PRODUCTS = {"convolution": "convolution", "dot": "matrix_product"}
PIPELINE = {"jit_prepare", "jit_augment"}
"""The programs of the input pipeline (`data.py`)."""
HANDED_OVER = {"DevicePutWithSharding", "shard_args"}

Program = tuple[str, Any]


@contextlib.contextmanager
def profile(directory: Path) -> Iterator[None]:
    """Trace what runs while open: `directory/plugins/profile/`, for TensorBoard's profiler, and there for ui.perfetto.dev.

    Operators only: the frames of Python, which JAX adds by default, are more events than all the rest.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(directory), create_perfetto_trace=True, profiler_options=options):
        yield


def annotate(name: str) -> contextlib.AbstractContextManager[Any]:
    """A region of this name in the trace."""
    region: contextlib.AbstractContextManager[Any] = jax.profiler.TraceAnnotation(name)
    return region


def operators(directory: Path, spec: Spec) -> list[Event]:
    """The operators and regions of the trace under `directory`; called in the process that ran them, which knows the programs."""
    (file,) = directory.glob("plugins/profile/*/*.xplane.pb")
    known = trace.layers(spec)
    planes = [plane for plane in jax.profiler.ProfileData.from_file(str(file)).planes if plane.name == "/host:CPU"]
    rows = [(line.name, event, dict(event.stats)) for plane in planes for line in plane.lines for event in line.events]
    ran = [(event, told, (str(told["hlo_module"]), told.get("program_id"))) for _, event, told in rows if "hlo_op" in told]
    names: dict[Program, set[str]] = {}
    for event, _, program in ran:
        names.setdefault(program, set()).add(event.name)
    programs = compiled_programs(names)
    # An instruction may hand its work to other threads; an event of its own then says when that was done.
    ends = {(told.get("_c"), event.name): event.start_ns for _, event, told in rows if event.name.startswith("end: ")}
    running = []
    for event, told, program in ran:
        found = programs[program].get(event.name, Instruction(event.name, event.name, ""))
        stop = max(event.end_ns, ends.get((told.get("_p"), f"end: {event.name}"), 0.0))
        running.append(replace(found.event(program[0], known), start=event.start_ns / 1e3, stop=stop / 1e3))
    return [*_regions(rows), *trace.disjoint(running, "XLA")]


def _regions(rows: list[tuple[str, Any, dict[str, Any]]]) -> Iterator[Event]:
    for track, event, _ in rows:
        if event.name == STEP or event.name == DATA or event.name in HANDED_OVER:
            category = None if event.name == STEP else DATA
            yield Event(event.name, event.start_ns / 1e3, event.end_ns / 1e3, track, category, region=event.name not in HANDED_OVER)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a compiled program: its name, its opcode, the scope of the source it comes from, and what is fused into it.

    `serves`: XLA added it, and its scope is that of the instruction that reads it.
    """

    name: str
    code: str
    scope: str
    fused: tuple[tuple[str, str], ...] = ()
    serves: bool = False

    def event(self, module: str, known: Mapping[str, str]) -> Event:
        """Its operator, at no time yet."""
        own = category(module, self.scope, self.code, known)
        parts = {category(module, scope, code, known) for code, scope in self.fused if scope and code not in MOVING}
        also = tuple(sorted(part for part in parts if part not in (own, "other")))
        return Event(self._operation(), 0.0, 0.0, "", own, trace.layer_of(self.scope, known), also)

    def _operation(self) -> str:
        primitive = self.scope.rpartition("/")[2] or re.sub(r"[.\d]+$", "", self.name)
        backward = " (backward)" if "transpose(" in self.scope else ""
        added = f"{re.sub(r'[.0-9]+$', '', self.name)} for " if self.serves else ""
        return f"{added}{primitive}{backward}"


def category(module: str, scope: str, code: str, known: Mapping[str, str]) -> str:
    """The kind of work of an instruction, or part of one, of a program."""
    if module in PIPELINE:
        return DATA
    if OPTIMIZER in scope.split("/"):
        return OPTIMIZER
    layer = trace.layer_of(scope, known)
    return known.get(layer) or PRODUCTS.get(code) or ("elementwise" if INSIDE.search(scope) else "other")


def compiled_programs(ran: Mapping[Program, set[str]]) -> dict[Program, dict[str, Instruction]]:
    """For each program, by name and number, of which instructions of these names ran: all its instructions by name.

    The numbers are those of the trace alone. Of several programs of one name, it is the one that has most of the instructions.
    """
    wanted = {name for name, _ in ran}
    held: dict[str, list[dict[str, Instruction]]] = {}
    for client in {device.client for device in jax.local_devices()}:
        for module in (module for program in client.live_executables() for module in program.hlo_modules()):
            if module.name in wanted:
                held.setdefault(module.name, []).append(instructions(module.to_string()))
    found: dict[Program, dict[str, Instruction]] = {}
    for program, names in ran.items():
        candidates = held.get(program[0], [{}])
        found[program] = candidates[int(np.argmax([len(names & made.keys()) for made in candidates]))]
    return found


def instructions(text: str) -> dict[str, Instruction]:
    """The instructions of a program's text, of all its computations, by name."""
    computations: dict[str, list[tuple[str, str]]] = {}
    rows: list[tuple[str, str, str, str]] = []
    inside: list[tuple[str, str]] = []
    for line in text.splitlines():
        opened, found = COMPUTATION.match(line), INSTRUCTION.match(line)
        if opened is not None:
            inside = computations.setdefault(opened["name"], [])
        elif found is not None:
            scope = (SCOPE.search(line) or ["", ""])[1]
            inside.append((found["code"], scope))
            rows.append((found["name"], found["code"], scope, found["rest"]))
    made: dict[str, Instruction] = {}
    serving: dict[str, str] = {}  # by the name of an instruction: the scope of who reads it
    for name, code, scope, rest in reversed(rows):
        called = CALLS.search(rest)
        fused = tuple(computations.get(called[1], ())) if called else ()
        made[name] = Instruction(name, code, scope or serving.get(name, ""), fused, serves=not scope and name in serving)
        if made[name].scope:
            serving |= dict.fromkeys(REFERENCE.findall(rest), made[name].scope)
    return made
