"""The run loop: exceptions, interrupts, self-modifying code, devices, kicks, stepping, breakpoints."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from pykvm.emulator.backend import EmulatorBackend
from pykvm.errors import ConfigurationError
from pykvm.exits import Debug, Halt, Interrupted, Shutdown
from pykvm.state import VcpuEvents
from tests.unit.emulator.guest import Bus, Guest, Region

HLT = b"\xf4"
HANDLER, STACK, TSS = 0xA000, 0x7000, 0x600


# Exceptions


@pytest.mark.parametrize(
    ("code", "vector", "error", "return_address"),
    [
        ("f7 f1", 0, None, 0x8000),  # div ecx, by zero
        ("cc", 3, None, 0x8001),  # int3
        ("0f 0b", 6, None, 0x8000),  # ud2
        ("0f 04", 6, None, 0x8000),  # no such instruction
        ("f0 90", 6, None, 0x8000),  # lock nop
        ("66 0f ae 1e", 6, None, 0x8000),  # stmxcsr has no form with 66
        ("8e d9", 13, 0x1234 & ~3, 0x8000),  # mov ds, ecx
        ("66 66 66 66 66 66 66 66 66 66 66 66 66 66 66 90", 13, 0, 0x8000),  # 16 bytes
    ],
)
def test_exception_is_delivered_with_its_error_code(
    guest: Guest, code: str, vector: int | None, error: int | None, return_address: int
) -> None:
    guest.long()
    guest.gate64(vector, HANDLER)
    guest.load(HLT, HANDLER)

    guest.run(bytes.fromhex(code), rax=1, rcx=0x1234 if vector == 13 else 0)

    frame = [guest.get(guest.registers.rsp + 8 * place) for place in range(2)]
    assert guest.registers.rip == HANDLER + 1
    assert frame[: 2 if error is not None else 1] == ([error] if error is not None else []) + [return_address]


def test_real_mode_exception_goes_through_the_vector_table(guest: Guest) -> None:
    guest.real()
    guest.put(0, 0x0A00_0000, 4)  # vector 0 at 0a00:0000
    guest.load(HLT, 0xA000)

    guest.run(bytes.fromhex("f7 f1"), rflags=0x202)

    assert guest.registers.rip == 1
    assert guest.vcpu.system_registers().cs.selector == 0xA00
    assert [guest.get(guest.registers.rsp + 2 * place, 2) for place in range(3)] == [0x8000, 0, 0x202]
    assert not guest.registers.rflags & 0x200


def test_fault_during_delivery_becomes_a_double_fault(guest: Guest) -> None:
    guest.long()
    guest.gate64(8, HANDLER)
    guest.load(HLT, HANDLER)

    guest.run(bytes.fromhex("8e d9"), rcx=0x1234)  # #GP, whose gate is not present: #NP, so #DF

    assert guest.registers.rip == HANDLER + 1
    assert guest.get(guest.registers.rsp) == 0


def test_stack_fault_during_delivery_says_that_it_was_external(timer_guest: Guest) -> None:
    guest = timer_guest
    guest.long()
    guest.gate64(0x28, HANDLER)  # on a stack that is not canonical
    guest.gate64(12, HANDLER + 0x100, ist=1)
    guest.put(TSS + 0x24, 0x6000)
    guest.load(HLT, HANDLER + 0x100)
    guest.vcpu.set_events(VcpuEvents(interrupt_injected=1, interrupt_nr=0x28))

    guest.run(b"\x90\xf4", rsp=1 << 63, rflags=0x202)

    assert guest.registers.rip == HANDLER + 0x101
    assert guest.get(guest.registers.rsp) == 1  # EXT


def test_double_fault_without_a_handler_shuts_down(guest: Guest) -> None:
    guest.long()

    assert guest.run(bytes.fromhex("8e d9"), rcx=0x1234) == Shutdown(0)


def test_interrupt_stack_table_selects_the_stack(guest: Guest) -> None:
    guest.long()
    guest.put(TSS + 0x24, 0x6000)
    guest.gate64(6, HANDLER, ist=1)
    guest.load(HLT, HANDLER)

    guest.run(bytes.fromhex("0f 0b"))

    assert guest.registers.rsp == 0x6000 - 40


def test_trap_flag_raises_debug_exception_after_each_instruction(guest: Guest) -> None:
    guest.long()
    guest.gate64(1, HANDLER)
    guest.load(bytes.fromhex("48 ff c3 48 cf"), HANDLER)  # inc rbx; iretq
    # push 0x102; popfq; nop; nop; push 2; popfq; nop; hlt
    code = bytes.fromhex("68 02 01 00 00 9d 90 90 6a 02 9d 90 f4")

    guest.run(code)

    assert guest.registers.rbx == 4  # two nops, push, popfq


# Interrupts and time


def arm_timer(vector: int = 0x20, divisor: int = 1193) -> bytes:
    """Code for long mode that sets up the PIC and a periodic PIT, all but IRQ 0 masked."""
    writes = [
        (0x20, 0x11), (0x21, vector), (0x21, 4), (0x21, 1), (0x21, 0xFE),
        (0xA1, 0xFF), (0x43, 0x34), (0x40, divisor & 0xFF), (0x40, divisor >> 8),
    ]  # fmt: skip
    return b"".join(bytes([0xB0, value, 0xE6, port]) for port, value in writes)  # mov al, value; out port, al


def test_hlt_waits_for_timer_ticks_in_virtual_time(timer_guest: Guest) -> None:
    guest = timer_guest
    guest.long()
    guest.gate64(0x20, HANDLER)
    guest.load(bytes.fromhex("48 ff c3 b0 20 e6 20 48 cf"), HANDLER)  # inc rbx; EOI; iretq
    # sti; 1: hlt; cmp ebx, 100; jb 1b; cli; hlt
    loop = bytes.fromhex("fb f4 83 fb 64 72 fa fa f4")
    start = time.monotonic()

    ended = guest.run(arm_timer() + loop)

    assert ended == Halt(0)
    assert guest.registers.rbx == 100
    assert time.monotonic() - start < 5  # 0.1 s of virtual time, and no waiting
    assert guest.bus.log == []


def test_hlt_that_a_device_may_end_waits_in_real_time(timer_guest: Guest) -> None:
    guest = timer_guest
    guest.long()
    guest.gate64(0x20, HANDLER)
    guest.load(bytes.fromhex("48 ff c3 b0 20 e6 20 48 cf"), HANDLER)  # inc rbx; EOI; iretq
    unmask = bytes.fromhex("b0 ee e6 21")  # mov al, 0xee; out 0x21, al: IRQ 4 besides the timer's
    guest.machine.irq(4)
    threading.Timer(0.2, guest.vcpu.kick).start()
    processor_time = time.process_time()

    ended = guest.run(arm_timer(divisor=11932) + unmask + bytes.fromhex("fb f4 eb fd"))  # 1: hlt; jmp 1b

    assert ended == Interrupted(0)
    assert 1 <= guest.registers.rbx <= 100  # 20 ticks of 10 ms; without waiting, thousands
    assert time.process_time() - processor_time < 0.15


def test_runs_are_deterministic() -> None:
    code = arm_timer(divisor=100) + bytes.fromhex("fb 48 ff c1 48 83 fb 0a 72 f7 fa f4")
    results = []
    for _ in range(2):
        other = Guest(irqchip=True)
        other.long()
        other.gate64(0x20, HANDLER)
        other.load(bytes.fromhex("48 ff c3 b0 20 e6 20 48 cf"), HANDLER)
        other.run(code)
        results.append((other.registers, other.vcpu.instructions))

    assert results[0] == results[1]
    assert results[0][0].rbx == 10


def test_sti_holds_interrupts_back_for_one_instruction(timer_guest: Guest) -> None:
    guest = timer_guest
    guest.long()
    guest.gate64(0x20, HANDLER)
    guest.load(HLT, HANDLER)
    guest.start()
    guest.load(arm_timer() + bytes.fromhex("fb ff c3 ff c3 f4"))  # sti; inc ebx; inc ebx; hlt
    for _ in range(18):
        guest.vcpu.step(guest.bus)
    guest.machine.irq(0).set(True)

    guest.resume()

    assert guest.registers.rbx == 1


def test_nmi_is_masked_until_iret(guest: Guest) -> None:
    guest.long()
    guest.gate64(2, HANDLER)
    guest.load(bytes.fromhex("ff c3 f4 48 cf"), HANDLER)  # inc ebx; hlt; iretq
    guest.vcpu.set_events(VcpuEvents(nmi_pending=1))

    first = guest.run(bytes.fromhex("f4"))
    guest.vcpu.set_events(VcpuEvents(nmi_pending=1, nmi_masked=1))
    second = guest.resume()

    assert (first, second) == (Halt(0), Halt(0))
    assert guest.registers.rbx == 2
    assert guest.registers.rip == HANDLER + 3  # the second one came after iretq


def test_another_thread_wakes_a_halted_processor(timer_guest: Guest) -> None:
    guest = timer_guest
    guest.long()
    guest.gate64(0x24, HANDLER)
    guest.load(bytes.fromhex("ff c3 fa f4"), HANDLER)  # inc ebx; cli; hlt
    setup = ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xEF), (0xA1, 0xFF))
    code = b"".join(bytes([0xB0, value, 0xE6, port]) for port, value in setup) + bytes.fromhex("fb f4")
    timer = threading.Timer(0.05, guest.machine.irq(4).pulse)
    timer.start()

    ended = guest.run(code)

    timer.join()
    assert ended == Halt(0)
    assert guest.registers.rbx == 1


def test_hlt_without_interrupt_controller_ends_the_run_even_with_interrupts_on(guest: Guest) -> None:
    guest.long()

    ended = guest.run(bytes.fromhex("fb f4 ff c0 f4"))

    assert ended == Halt(0)
    assert guest.registers.rip == 0x8002
    assert guest.resume() == Halt(0)
    assert guest.registers.rax == 1


# Self-modifying code


def test_code_that_changes_the_next_instruction_runs_the_new_one(guest: Guest) -> None:
    guest.long()
    # mov byte ptr [rip+1], 7; mov bl, 1; hlt
    code = bytes.fromhex("c6 05 01 00 00 00 07 b3 01 f4")

    guest.run(code)

    assert guest.registers.rbx == 7


def test_code_that_was_executed_can_be_changed_by_the_guest(guest: Guest) -> None:
    guest.long()
    # inc ebx; mov byte [0x8001], 0xcb (dec ebx); dec ecx; jnz 0x8000; hlt
    code = bytes.fromhex("ff c3 c6 04 25 01 80 00 00 cb ff c9 75 f2 f4")

    guest.run(code, rcx=3, rbx=10)

    assert guest.registers.rbx == 9


def test_data_next_to_code_can_be_written(guest: Guest) -> None:
    guest.long()
    # 1: inc dword [0x8100]; dec ecx; jnz 1b; hlt
    code = bytes.fromhex("ff 04 25 00 81 00 00 ff c9 75 f5 f4")

    guest.run(code, rcx=100)

    assert guest.get(0x8100, 4) == 100


def test_string_store_over_the_following_code_takes_effect(guest: Guest) -> None:
    guest.long()
    # rep stosb; then five bytes that it turns into nops; hlt
    code = bytes.fromhex("f3 aa 0f 0b 0f 0b 90 f4")

    ended = guest.run(code, rdi=0x8002, rcx=5, rax=0x90)

    assert ended == Halt(0)


def test_code_changed_by_the_host_between_runs_is_seen(guest: Guest) -> None:
    guest.long()
    guest.run(bytes.fromhex("b3 01 f4"))

    guest.run(bytes.fromhex("b3 02 f4"))

    assert guest.registers.rbx == 2


def test_the_same_page_at_two_addresses_shares_its_changes(guest: Guest) -> None:
    guest.long()
    table = guest.small_pages()
    guest.put(table + 8 * 0x100, 0x8000 | 7)  # 0x100000 is the code page, too
    # mov byte [0x100009], 5; mov bl, 1; hlt
    code = bytes.fromhex("c6 04 25 09 00 10 00 05 b3 01 f4")

    guest.run(code)

    assert guest.registers.rbx == 5


# Devices


def test_string_output_makes_one_access_an_element(guest: Guest) -> None:
    guest.long()
    guest.ram[0x9000:0x9003] = b"abc"
    # cld; rep outsb; hlt
    code = bytes.fromhex("fc f3 6e f4")

    guest.run(code, rsi=0x9000, rcx=3, rdx=0x3F8)

    assert guest.bus.log == [("out", 0x3F8, 1, byte) for byte in b"abc"]
    assert (guest.registers.rsi, guest.registers.rcx) == (0x9003, 0)


def test_string_input_fills_memory_downwards_with_the_direction_flag(guest: Guest) -> None:
    guest.long()
    guest.bus.inputs[0x60] = [1, 2, 3]
    # std; rep insb; hlt
    code = bytes.fromhex("fd f3 6c f4")

    guest.run(code, rdi=0x9002, rcx=3, rdx=0x60)

    assert guest.ram[0x9000:0x9003] == bytes((3, 2, 1))


def test_exception_of_a_device_leaves_the_run_and_the_access_is_repeated(guest: Guest) -> None:
    guest.long()
    guest.ram[0x9000:0x9003] = b"abc"
    # inc ebx; rep outsb; hlt
    code = bytes.fromhex("ff c3 f3 6e f4")
    guest.load(code)
    guest.start(rsi=0x9000, rcx=3, rdx=0x3F8)
    guest.bus.error = RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        guest.resume()
    assert (guest.registers.rip, guest.registers.rcx, guest.registers.rbx) == (0x8002, 3, 1)
    ended = guest.resume()

    assert ended == Halt(0)
    assert [entry[3] for entry in guest.bus.log] == list(b"abc")
    assert guest.registers.rbx == 1


def test_exception_of_a_device_in_mid_block_is_restartable(guest: Guest) -> None:
    guest.long()
    # inc ebx; add eax, [rsi]; inc ebx; hlt
    code = bytes.fromhex("ff c3 03 06 ff c3 f4")
    guest.load(code)
    guest.put(0x3000 + 8, 0xC000_0000 | 0x83)  # the page at 2 MiB is device space
    guest.start(rsi=0x20_0000, rax=1)
    guest.bus.inputs[0xC000_0000] = [41]
    guest.bus.error = RuntimeError("broken")

    with pytest.raises(RuntimeError):
        guest.resume()
    assert (guest.registers.rip, guest.registers.rbx, guest.registers.rax) == (0x8002, 1, 1)
    guest.resume()

    assert (guest.registers.rax, guest.registers.rbx) == (42, 2)
    assert guest.bus.log == [("read", 0xC000_0000, 4)]


def test_write_to_read_only_slot_goes_to_the_bus(guest: Guest) -> None:
    guest.long()
    rom = Region(0x1000)
    rom.buffer[0:4] = b"\x11\x22\x33\x44"
    guest.machine.map(1, 0x1000_0000, rom, readonly=True)
    guest.put(0x3000 + 8, 0x1000_0000 | 0x83)
    # mov eax, [rsi]; mov [rsi], ebx; mov ecx, [rsi]; hlt
    code = bytes.fromhex("8b 06 89 1e 8b 0e f4")

    guest.run(code, rsi=0x20_0000, rbx=5)

    assert (guest.registers.rax, guest.registers.rcx) == (0x4433_2211, 0x4433_2211)
    assert guest.bus.log == [("write", 0x1000_0000, 4, 5)]


def test_dirty_log_names_the_written_pages_once(guest: Guest) -> None:
    guest.long()
    logged = Region(0x4000)
    guest.machine.map(1, 0x1000_0000, logged, log_dirty=True)
    guest.put(0x3000 + 8, 0x1000_0000 | 0x83)
    # mov [rsi+0x1000], eax; mov [rsi+0x1000], eax; mov [rsi+0x3ffe], eax; mov ebx, [rsi]; hlt
    code = bytes.fromhex("89 86 00 10 00 00 89 86 00 10 00 00 89 86 fe 3f 00 00 8b 1e f4")

    guest.run(code, rsi=0x20_0000)

    assert guest.machine.dirty(1).tolist() == [False, True, False, True]
    assert guest.machine.dirty(1).tolist() == [False] * 4
    guest.start(rsi=0x20_0000)
    guest.resume()
    assert guest.machine.dirty(1).tolist() == [False, True, False, True]


# Stopping


def test_kick_before_the_run_is_not_lost(guest: Guest) -> None:
    guest.long()
    guest.vcpu.kick()

    assert guest.run(bytes.fromhex("eb fe")) == Interrupted(0)


def test_kick_from_another_thread_stops_a_guest_that_spins(guest: Guest) -> None:
    guest.long()
    guest.load(bytes.fromhex("fa eb fe"))  # cli; jmp $
    guest.start()
    for _ in range(5):
        timer = threading.Timer(0.01, guest.vcpu.kick)
        timer.start()

        assert guest.resume() == Interrupted(0)
        timer.join()


def interrupt_main_thread() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def test_ctrl_c_comes_between_instructions(guest: Guest) -> None:
    guest.long()
    guest.put(0x9000, 0)
    # 1: inc dword [rsi]; inc eax; jmp 1b
    guest.load(bytes.fromhex("ff 06 ff c0 eb fa"))
    guest.start(rsi=0x9000)

    def resume_and_interrupt(delay: float) -> None:
        threading.Timer(delay, interrupt_main_thread).start()  # on a busy host it may end already here
        guest.resume()

    for delay in (0.001, 0.002, 0.003, 0.005, 0.007):
        with pytest.raises(KeyboardInterrupt):
            resume_and_interrupt(delay)

        assert guest.get(0x9000, 4) - guest.registers.rax == (guest.registers.rip == 0x8002)


def test_ctrl_c_reaches_a_device_that_waits(guest: Guest) -> None:
    class Waiting(Bus):
        def port_read(self, port: int, size: int) -> int:
            threading.Timer(0.01, interrupt_main_thread).start()
            time.sleep(10)
            return 0

    guest.long()
    guest.bus = Waiting()

    with pytest.raises(KeyboardInterrupt):
        guest.run(bytes.fromhex("e4 10"))
    assert guest.registers.rip == 0x8000


def test_kick_by_a_device_stops_after_its_instruction(guest: Guest) -> None:
    guest.long()

    class Kicking(Bus):
        def port_write(self, port: int, size: int, value: int) -> None:
            guest.vcpu.kick()

    guest.bus = Kicking()

    assert guest.run(bytes.fromhex("e6 10 ff c3 f4")) == Interrupted(0)
    assert (guest.registers.rip, guest.registers.rbx) == (0x8002, 0)


def test_kick_ends_a_chain_of_faults(guest: Guest) -> None:
    """The #UD handler is no instruction either, and always gets a fresh stack: nothing ever completes."""
    guest.long()
    guest.put(TSS + 0x24, 0x6000)
    guest.gate64(6, 0x8000, ist=1)
    guest.load(bytes.fromhex("0f 0b"))
    guest.start()
    timer = threading.Timer(0.01, guest.vcpu.kick)
    timer.start()

    assert guest.resume() == Interrupted(0)
    timer.join()


def test_step_executes_one_instruction(guest: Guest) -> None:
    guest.long()
    guest.load(bytes.fromhex("ff c0 ff c3 f4"))
    guest.start()

    first, second = guest.vcpu.step(guest.bus), guest.vcpu.step(guest.bus)

    assert (first.kind, first.address, second.address) == ("step", 0x8002, 0x8004)
    assert (guest.registers.rax, guest.registers.rbx) == (1, 1)
    assert guest.vcpu.step(guest.bus) == Halt(0)


def test_breakpoint_stops_before_its_instruction_and_can_be_resumed(guest: Guest) -> None:
    guest.long()
    guest.load(bytes.fromhex("ff c3 eb fc"))  # 1: inc ebx; jmp 1b
    guest.start()
    guest.vcpu.set_breakpoints([0x8002])

    reached = [guest.resume() for _ in range(3)]

    assert all(isinstance(each, Debug) and each.kind == "breakpoint" for each in reached)
    assert {each.address for each in reached} == {0x8002}
    assert guest.registers.rbx == 3


# The machine


def test_overlapping_and_misaligned_slots_are_refused(guest: Guest) -> None:
    for address, size in ((0x1000, 0x1000), (0x80_0800, 0x1000), (0x80_0000, 0x800)):
        with pytest.raises(ConfigurationError, match="slot 1"):
            guest.machine.map(1, address, Region(size))
    with pytest.raises(ConfigurationError, match="slot 9"):
        guest.machine.unmap(9)


def test_only_one_processor_is_offered() -> None:
    with pytest.raises(ConfigurationError, match="2 vCPUs"):
        EmulatorBackend().machine(cpus=2)
    with pytest.raises(ConfigurationError, match="vCPU 1"):
        EmulatorBackend().machine().vcpu(1)


def test_interrupt_lines_need_a_controller(guest: Guest, timer_guest: Guest) -> None:
    with pytest.raises(ConfigurationError, match="irqchip"):
        guest.machine.irq(4)
    with pytest.raises(ConfigurationError, match="GSI 16"):
        timer_guest.machine.irq(16)


def test_closing_lets_go_of_guest_memory(guest: Guest) -> None:
    guest.long()
    guest.run(bytes.fromhex("48 89 06 48 8b 1e f4"), rsi=0x9000)

    guest.machine.close()

    guest.ram.close()  # would raise BufferError while a view is alive


def test_statistics_count_instructions_and_accesses(guest: Guest) -> None:
    guest.long()

    guest.run(bytes.fromhex("e6 10 e4 20 f4"))

    statistics = guest.vcpu.statistics()
    assert statistics.instructions == 3
    assert statistics.exits == {"KVM_EXIT_IO": 2}
    assert guest.vcpu.recent_exits()[-1] == "KVM_EXIT_IO: 1-byte read of 0x20"
