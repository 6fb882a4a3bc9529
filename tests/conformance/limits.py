"""Why a test cannot hold on this machine's KVM: limits of what runs below pykvm, known by name."""

from __future__ import annotations

from pathlib import Path

from pykvm.kvm.probe import Host


def inside_tcg() -> bool:
    """Whether the processor around this KVM is QEMU's emulation, as in the lab."""
    return "QEMU TCG" in Path("/proc/cpuinfo").read_text()


def why_no_breakpoints(backend: str) -> str:
    """Empty, or why KVM does not stop at breakpoints."""
    if backend == "kvm" and inside_tcg():
        return "QEMU's TCG ignores the debug registers with which a nested guest is entered"
    return ""


def why_no_ports_in_ring3(backend: str) -> str:
    """Empty, or why a guest that starts in ring 3 cannot use the ports that its TSS allows."""
    if backend == "kvm" and inside_tcg():
        return "QEMU's TCG finds no I/O bitmap in a busy TSS, and a nested guest is entered with one"
    return ""


def why_no_oracle() -> str | None:
    """None, or why the processor below KVM does not decide what an instruction does."""
    return "the processor is an emulation itself: QEMU's TCG" if inside_tcg() else None


def why_no_registers_after_a_triple_fault(backend: str) -> str:
    """Empty, or why the registers at a triple fault are not known."""
    if backend == "kvm" and Host.read().kind == "AMD-V":
        return "AMD-V resets the processor at a triple fault"
    return ""
