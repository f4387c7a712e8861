"""Runs Hopper attention kernels in JAX's Mosaic GPU interpreter, on a CPU, with race detection.

The interpreter of JAX 0.11 lacks two things that attention needs: accumulators with an initial
value (`pl.run_state`), and products whose left operand lies in registers. Both are added here by
cutting a kernel's jaxpr at those equations: the stock interpreter runs what lies between.
"""

import contextlib
import itertools

import jax
from jax._src import core
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import primitives as gpu_primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as callbacks
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax._src.pallas.mosaic_gpu.interpret import (
    jaxpr_interpret,
    params,
    race_detection_state,
    shared_memory,
)
from jax._src.state import discharge
from jax._src.state import types as state_types

_Races = race_detection_state.GPURaceDetectionState
_Interpreter = jaxpr_interpret.JaxprInterpreter
_stock_interpret = _Interpreter.interpret

_REGISTERS = shared_memory.get_memory_space_idx(gpu_core.MemorySpace.REGS)


@contextlib.contextmanager
def interpreted():
    """Kernels called in this context run interpreted; yields a function: were races found?"""
    _Interpreter.interpret = _interpret
    stock_checks = _Races.check_read, _Races.check_write
    # Registers belong to one warpgroup, but the next block reuses their names.
    _Races.check_read, _Races.check_write = map(_of_shared_buffers, stock_checks)
    try:
        with params.force_gpu_interpret_mode(params.InterpretGPUParams(detect_races=True)):
            yield lambda: interpreter.get_races().races_found
    finally:
        _Interpreter.interpret = _stock_interpret
        _Races.check_read, _Races.check_write = stock_checks
        interpreter.reset_gpu_interpret_mode_state()


def _of_shared_buffers(check):
    def checked(self, thread, clock, buffer, *args, **kwargs):
        if buffer.memory_space_id != _REGISTERS:
            check(self, thread, clock, buffer, *args, **kwargs)

    return checked


def _is_ref(variable):
    return isinstance(variable.aval, state_types.AbstractRef)


def _added(eqn):
    """The interpretation that this file adds for an equation, None if it needs none."""
    if eqn.primitive is discharge.run_state_p:
        return _run_state
    if eqn.primitive is gpu_primitives.wgmma_ref_p and not _is_ref(eqn.invars[1]):
        return _wgmma_from_registers
    return None


def _interpret(self, jaxpr, token, *args):
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], args, strict=True))
    read = lambda atom: atom.val if isinstance(atom, core.Literal) else values[atom]
    for added, run in itertools.groupby(jaxpr.eqns, key=_added):
        eqns = list(run)
        if added is None:
            token = _run_stock(self, jaxpr, eqns, token, values)
            continue
        for eqn in eqns:
            token, out = added(self, eqn, token, [read(x) for x in eqn.invars])
            values.update(zip(eqn.outvars, out, strict=True))
    return token, [read(x) for x in jaxpr.outvars]


def _run_stock(self, jaxpr, eqns, token, values):
    """Runs consecutive equations in the stock interpreter and stores all they define."""
    defined = [v for eqn in eqns for v in eqn.outvars if not isinstance(v, core.DropVar)]
    used = {v for eqn in eqns for v in eqn.invars if isinstance(v, core.Var)}
    inputs = [v for v in values if v in used]
    part = jaxpr.replace(
        constvars=[], invars=inputs, outvars=defined, eqns=eqns, effects=core.no_effects,
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )  # fmt: skip
    token, out = _stock_interpret(self, part, token, *(values[v] for v in inputs))
    values.update(zip(defined, out, strict=True))
    return token


def _hold(self, token, value, eqn):
    """A buffer in this warpgroup's registers that holds a value."""
    token, request = callbacks.call_make_allocation_request_array(
        token=token,
        compute_unit=self.thread,
        memory_space_id=_REGISTERS,
        initial_ref_count=1,
    )
    where = {"mesh_location": self.mesh_location, "thread": self.thread}
    return callbacks.call_allocate_buffer(
        token=token, allocation_request_as_array=request, value=value,
        source_info=eqn.source_info, **where,
    )  # fmt: skip


def _release(self, token, buffer, eqn):
    return callbacks.call_deallocate_buffer(
        token=token, mesh_location=self.mesh_location, thread=self.thread,
        allocation_key_as_array=buffer, source_info=eqn.source_info,
    )  # fmt: skip


def _run_state(self, eqn, token, values):
    buffers = []
    for variable, value in zip(eqn.invars, values, strict=True):
        buffer = value
        if not _is_ref(variable):
            token, buffer = _hold(self, token, value, eqn)
        buffers.append(buffer)
    token, _ = self.interpret(eqn.params["jaxpr"], token, *buffers)
    out = []
    for variable, buffer in zip(eqn.invars, buffers, strict=True):
        result = buffer
        if not _is_ref(variable):
            token, result = callbacks.call_get(
                token=token,
                result_shape_and_dtype=jax.ShapeDtypeStruct(
                    variable.aval.shape, variable.aval.dtype
                ),
                mesh_location=self.mesh_location,
                thread=self.thread,
                allocation_key_as_array=buffer,
                transforms=(),
                source_info=eqn.source_info,
            )
            token = _release(self, token, buffer, eqn)
        out.append(result)
    return token, out


def _wgmma_from_registers(self, eqn, token, values):
    accumulator, left, *rest = values
    token, buffer = _hold(self, token, left, eqn)
    token, out = self._interpret_wgmma_ref_p(eqn, token, lambda: [accumulator, buffer, *rest])
    return _release(self, token, buffer, eqn), out
