"""Processor state beyond `pykvm.registers`: FPU and SSE, debug registers, pending events.

Field names follow Linux' ``struct kvm_fpu``, ``kvm_debugregs`` and ``kvm_vcpu_events``.
"""

from __future__ import annotations

from pykvm.values import Value

# KVM_MP_STATE_*: whether a vCPU executes (KVM API 4.38)
MP_STATE_RUNNABLE = 0
MP_STATE_UNINITIALIZED = 1
MP_STATE_INIT_RECEIVED = 2
MP_STATE_HALTED = 3
MP_STATE_SIPI_RECEIVED = 4


class FpuState(Value):
    """x87, MMX and SSE registers (``struct kvm_fpu``).

    `fpr` holds ST0..ST7 as 16 bytes each (80 bits used), `xmm` XMM0..XMM15 as 16 bytes each,
    both little-endian; `ftwx` is the abridged tag word of FXSAVE (1: in use).
    """

    fpr: tuple[bytes, ...] = (bytes(16),) * 8
    fcw: int = 0x37F
    fsw: int = 0
    ftwx: int = 0
    last_opcode: int = 0
    last_ip: int = 0
    last_dp: int = 0
    xmm: tuple[bytes, ...] = (bytes(16),) * 16
    mxcsr: int = 0x1F80


class DebugRegisters(Value):
    """DR0..DR3, DR6 and DR7 (``struct kvm_debugregs``)."""

    db: tuple[int, int, int, int] = (0, 0, 0, 0)
    dr6: int = 0xFFFF_0FF0
    dr7: int = 0x400
    flags: int = 0


class VcpuEvents(Value):
    """Exceptions, interrupts and NMIs in flight (``struct kvm_vcpu_events``).

    `flags` says which optional parts are valid (``KVM_VCPUEVENT_VALID_*``).
    """

    exception_injected: int = 0
    exception_nr: int = 0
    exception_has_error_code: int = 0
    exception_pending: int = 0
    exception_error_code: int = 0
    interrupt_injected: int = 0
    interrupt_nr: int = 0
    interrupt_soft: int = 0
    interrupt_shadow: int = 0
    nmi_injected: int = 0
    nmi_pending: int = 0
    nmi_masked: int = 0
    sipi_vector: int = 0
    flags: int = 0
    smi_smm: int = 0
    smi_pending: int = 0
    smi_smm_inside_nmi: int = 0
    smi_latched_init: int = 0
    triple_fault_pending: int = 0
    exception_has_payload: int = 0
    exception_payload: int = 0
