"""The VM class from several threads, signals and asyncio, on every backend; several processors on KVM."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pykvm import VM, ConfigurationError, Exit, Halt, Interrupted, MemoryInUseError, Stopped, backends

LIMIT = 20.0  # seconds that nothing here needs
MOMENT = 0.03  # seconds in which a running guest counts on, and a paused one would be seen to

COUNTER = 0x9000
COUNT = b"\x66\xff\x06\x00\x90\xeb\xf9"  # 1: inc dword [0x9000]; jmp 1b
ANNOUNCE_AND_COUNT = b"\xe6\x10" + COUNT  # out 0x10, al, so that the host knows
OUT_INC_HALT = b"\xe6\x10\x40\xf4"  # out 0x10, al; inc ax; hlt


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def count(vm: VM) -> int:
    return vm.memory.read_u32(COUNTER)


def start(vm: VM, pool: ThreadPoolExecutor, *, timeout: float | None = LIMIT) -> Future[Exit]:
    """Run a counting guest in the background, and return when it counts."""
    running = threading.Event()
    vm.on_port(0x10)(lambda offset, size, value: running.set())
    vm.load(ANNOUNCE_AND_COUNT)
    future = pool.submit(vm.run, timeout)
    assert running.wait(LIMIT)
    return future


def counts_on(vm: VM) -> bool:
    before = count(vm)
    return wait_until(lambda: count(vm) != before)


def wait_until(condition: Callable[[], bool], seconds: float = LIMIT) -> bool:
    """Whether `condition` comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


def stands_still(vm: VM) -> bool:
    before = count(vm)
    time.sleep(MOMENT)
    return count(vm) == before


# Stop


def test_stop_from_another_thread_ends_the_run(vm: VM, pool: ThreadPoolExecutor) -> None:
    future = start(vm, pool)

    vm.stop(5, "enough")

    assert future.result(LIMIT) == Stopped(0, 5, "enough")
    assert vm.run(timeout=0.01) == Interrupted(0, "timeout")


def test_running_a_machine_that_runs_elsewhere_is_refused(vm: VM, pool: ThreadPoolExecutor) -> None:
    future = start(vm, pool)

    for action in (vm.run, vm.step):
        with pytest.raises(ConfigurationError, match="already running"):
            action()

    vm.stop()
    assert future.result(LIMIT) == Stopped()


def test_stops_that_race_the_start_of_a_run_are_never_lost(vm: VM, pool: ThreadPoolExecutor) -> None:
    vm.load(COUNT)

    for number in range(200):
        future = pool.submit(vm.run, LIMIT)
        vm.stop(number)
        assert future.result(LIMIT) == Stopped(0, number, "stop")


# Pause and resume


def test_a_paused_guest_stands_still_and_shows_its_state(vm: VM, pool: ThreadPoolExecutor) -> None:
    future = start(vm, pool)

    vm.pause()

    assert stands_still(vm)
    assert vm.vcpus[0].registers().rip in (0x8002, 0x8007)
    assert not future.done()
    vm.resume()
    assert counts_on(vm)
    vm.stop()
    assert future.result(LIMIT) == Stopped()


def test_state_set_during_a_pause_is_what_goes_on(vm: VM, pool: ThreadPoolExecutor) -> None:
    future = start(vm, pool)
    vm.memory.write(0x8100, b"\xf4")

    vm.pause()
    vm.vcpus[0].set_registers(type(vm.vcpus[0].registers())(rip=0x8100, rax=99))
    vm.resume()

    assert future.result(LIMIT) == Halt(0)
    assert vm.vcpus[0].registers().rax == 99


def test_pausing_twice_takes_one_resume(vm: VM, pool: ThreadPoolExecutor) -> None:
    future = start(vm, pool)

    vm.pause()
    vm.pause()
    vm.resume()

    assert counts_on(vm)
    vm.stop()
    assert future.result(LIMIT) == Stopped()


def test_a_pause_right_after_a_resume_holds_at_once(vm: VM, pool: ThreadPoolExecutor) -> None:
    future = start(vm, pool)

    for _ in range(100):
        vm.pause()
        vm.resume()
    vm.pause()

    assert stands_still(vm)
    assert not future.done()
    vm.resume()
    assert counts_on(vm)
    vm.stop()
    assert future.result(LIMIT) == Stopped()


def test_resume_without_pause_changes_nothing(vm: VM, pool: ThreadPoolExecutor) -> None:
    future = start(vm, pool)

    vm.resume()

    assert counts_on(vm)
    vm.stop()
    assert future.result(LIMIT) == Stopped()


def test_stop_ends_a_paused_run(vm: VM, pool: ThreadPoolExecutor) -> None:
    future = start(vm, pool)
    vm.pause()

    vm.stop(4)

    assert future.result(LIMIT) == Stopped(0, 4, "stop")


def test_a_timeout_ends_a_paused_run_and_the_pause_outlasts_it(vm: VM, pool: ThreadPoolExecutor) -> None:
    future = start(vm, pool, timeout=0.3)
    vm.pause()

    exit = future.result(LIMIT)
    before = count(vm)
    again = vm.run(timeout=MOMENT)

    assert exit == again == Interrupted(0, "timeout")
    assert count(vm) == before
    vm.resume()
    vm.run(timeout=0.1)
    assert count(vm) != before


def test_a_pause_before_the_run_holds_it_at_its_start(vm: VM, pool: ThreadPoolExecutor) -> None:
    vm.load(COUNT)
    vm.pause()

    future = pool.submit(vm.run, LIMIT)

    assert stands_still(vm)
    assert count(vm) == 0
    vm.resume()
    assert counts_on(vm)
    vm.stop()
    assert future.result(LIMIT) == Stopped()


def test_a_device_that_pauses_holds_the_guest_after_its_access(vm: VM, pool: ThreadPoolExecutor) -> None:
    paused = threading.Event()

    @vm.on_port(0x10)
    def pause(offset: int, size: int, value: int | None) -> None:
        vm.pause()
        paused.set()

    vm.load(OUT_INC_HALT)
    future = pool.submit(vm.run, LIMIT)
    assert paused.wait(LIMIT)
    vm.pause()  # waits until it stands still

    assert vm.vcpus[0].registers().rax == 0
    assert not future.done()
    vm.resume()
    assert future.result(LIMIT) == Halt(0)
    assert vm.vcpus[0].registers().rax == 1


def test_a_step_while_nothing_runs_works_in_a_pause(vm: VM) -> None:
    vm.load(b"\x40\x40\xf4")  # inc ax; inc ax; hlt
    vm.pause()

    vm.step()

    assert vm.vcpus[0].registers().rip == 0x8001
    vm.resume()
    assert vm.run(timeout=LIMIT) == Halt(0)


ACTIONS: dict[str, Callable[[VM], object]] = {
    "pause": VM.pause,
    "resume": VM.resume,
    "kick": lambda vm: vm.vcpus[0].kick(),
    "stop": VM.stop,
    "wait": lambda vm: time.sleep(0.001),
}
SEQUENCES = st.lists(st.lists(st.sampled_from(sorted(ACTIONS)), max_size=6), min_size=1, max_size=3)


@pytest.mark.parametrize("name", backends.NAMES)
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(sequences=SEQUENCES)
def test_any_interleaving_of_controls_ends_and_leaves_a_usable_machine(
    name: str, sequences: list[list[str]]
) -> None:
    why = backends.get(name).why_unavailable()
    if why is not None:
        pytest.skip(why)
    with VM("64K", backend=name) as vm, ThreadPoolExecutor(len(sequences) + 1) as pool:
        vm.load(COUNT)
        future = pool.submit(vm.run, LIMIT)

        workers = [
            pool.submit(lambda names=names: [ACTIONS[each](vm) for each in names]) for names in sequences
        ]
        for worker in workers:
            worker.result(LIMIT)
        vm.resume()
        before = count(vm)
        assert wait_until(lambda: future.done() or count(vm) != before)
        ended = future.done()
        vm.stop(1)

        assert type(future.result(LIMIT)) in (Stopped, Interrupted)
        assert ended <= any({"kick", "stop"} & set(names) for names in sequences)
        vm.run(timeout=0)  # takes what is still sticky
        vm.run(timeout=0)
        before = count(vm)
        assert vm.run(timeout=0.05) == Interrupted(0, "timeout")
        assert count(vm) != before


# Closing


def test_closing_a_machine_that_runs_elsewhere_stops_it_first(backend: str, pool: ThreadPoolExecutor) -> None:
    vm = VM("64K", backend=backend)
    future = start(vm, pool)

    vm.close()

    assert future.result(LIMIT) == Stopped(0, 0, "close")
    with pytest.raises(ConfigurationError, match="closed"):
        vm.run()


def test_closing_a_paused_machine_works_too(backend: str, pool: ThreadPoolExecutor) -> None:
    vm = VM("64K", backend=backend)
    future = start(vm, pool)
    vm.pause()

    vm.close()

    assert future.result(LIMIT) == Stopped(0, 0, "close")


def test_closing_a_running_machine_with_views_stops_it_and_can_be_completed(
    backend: str, pool: ThreadPoolExecutor
) -> None:
    vm = VM("64K", backend=backend)
    view = vm.memory.view(0, 16)
    future = start(vm, pool)

    with pytest.raises(MemoryInUseError):
        vm.close()

    assert future.result(LIMIT) == Stopped(0, 0, "close")
    del view
    vm.close()


def test_several_threads_may_close_at_once(backend: str, pool: ThreadPoolExecutor) -> None:
    vm = VM("64K", backend=backend)
    future = start(vm, pool)

    closers = [pool.submit(vm.close) for _ in range(3)]

    assert [closer.result(LIMIT) for closer in closers] == [None] * 3
    assert future.result(LIMIT) == Stopped(0, 0, "close")


# Several machines


def test_machines_on_several_threads_run_side_by_side(backend: str, pool: ThreadPoolExecutor) -> None:
    def life(number: int) -> int:
        with VM("64K", backend=backend) as vm:
            vm.load(b"\xe5\x10\x40\xf4")  # in ax, 0x10; inc ax; hlt
            vm.on_port(0x10, size=2)(lambda offset, size, value: number)
            assert vm.run(timeout=LIMIT) == Halt(0)
            return vm.vcpus[0].registers().rax

    assert list(pool.map(life, range(40))) == list(range(1, 41))


def test_memory_can_be_added_and_removed_while_the_guest_runs_elsewhere(
    vm: VM, pool: ThreadPoolExecutor
) -> None:
    future = start(vm, pool)

    for _ in range(20):
        vm.memory.remove(vm.memory.add(0x1000_0000, "64K"))

    assert counts_on(vm)
    vm.stop()
    assert future.result(LIMIT) == Stopped()


# Signals


@contextlib.contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Ctrl-C for the main thread, after `seconds`."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        signal.signal(signal.SIGINT, previous)


def test_ctrl_c_leaves_run_and_the_machine_can_run_again(vm: VM) -> None:
    vm.load(b"\xfa" + COUNT)  # cli

    with interrupted_after(0.1), pytest.raises(KeyboardInterrupt):
        vm.run(timeout=LIMIT)

    before = count(vm)
    assert vm.run(timeout=0.05) == Interrupted(0, "timeout")
    assert count(vm) > before


def test_ctrl_c_leaves_a_paused_run(vm: VM) -> None:
    vm.load(COUNT)
    vm.pause()

    with interrupted_after(0.1), pytest.raises(KeyboardInterrupt):
        vm.run(timeout=LIMIT)

    vm.resume()
    assert vm.run(timeout=0.05) == Interrupted(0, "timeout")


def test_a_signal_handler_may_stop_the_machine(vm: VM) -> None:
    vm.load(COUNT)
    previous = signal.signal(signal.SIGALRM, lambda number, frame: vm.stop(14, "alarm"))
    signal.setitimer(signal.ITIMER_REAL, 0.05)

    exit = vm.run(timeout=LIMIT)
    signal.signal(signal.SIGALRM, previous)

    assert exit == Stopped(0, 14, "alarm")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_at_any_line_leaves_a_usable_machine(vm: VM) -> None:
    vm.load(b"\xf4\xeb\xfd")  # 1: hlt; jmp 1b
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGALRM: press_ctrl_c}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}

    for number in range(200):
        with pytest.raises(KeyboardInterrupt):
            run_on_and_on(vm, interrupt_after=0.0002 + number * 1e-5)
        signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in previous.items():
        signal.signal(number, handler)

    assert vm.run(timeout=LIMIT) == Halt(0)


def press_ctrl_c(number: int, frame: object) -> None:
    signal.raise_signal(signal.SIGINT)


def run_on_and_on(vm: VM, *, interrupt_after: float) -> None:
    """Ctrl-C comes again after half a second: Python drops it in finalizers and callbacks of its own."""
    signal.setitimer(signal.ITIMER_REAL, interrupt_after, 0.5)
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        vm.run(timeout=LIMIT)


# asyncio


def test_a_machine_runs_while_the_event_loop_goes_on(vm: VM) -> None:
    vm.load(COUNT)

    async def main() -> tuple[Exit, int]:
        run = asyncio.create_task(vm.run_async(timeout=LIMIT))
        ticks = 0
        while not count(vm):
            await asyncio.sleep(0.001)
            ticks += 1
        vm.stop(3)
        return await run, ticks

    exit, ticks = asyncio.run(main())

    assert exit == Stopped(0, 3, "stop")
    assert ticks > 0


def test_cancelling_stops_the_guest_and_it_can_run_again(vm: VM) -> None:
    vm.load(COUNT)

    async def main() -> None:
        async with asyncio.timeout(0.1):
            await vm.run_async()

    with pytest.raises(TimeoutError):
        asyncio.run(main())

    assert stands_still(vm)
    assert vm.run(timeout=0.05) == Interrupted(0, "timeout")


def test_cancelling_at_once_or_twice_still_stops_the_guest(vm: VM) -> None:
    vm.load(COUNT)

    async def main() -> None:
        task = asyncio.create_task(vm.run_async())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        await task

    for _ in range(20):
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(main())

    assert stands_still(vm)
    assert vm.run(timeout=0.01) == Interrupted(0, "timeout")


def test_what_a_device_raises_reaches_the_awaiting_task(vm: VM) -> None:
    vm.load(OUT_INC_HALT)

    @vm.on_port(0x10)
    def fail(offset: int, size: int, value: int | None) -> None:
        raise LookupError("from the device")

    with pytest.raises(LookupError, match="from the device"):
        asyncio.run(vm.run_async())


def test_many_machines_that_wait_for_each_other_run_concurrently(backend: str) -> None:
    everyone = threading.Barrier(12, timeout=LIMIT)

    async def life() -> Exit:
        with VM("64K", backend=backend) as vm:
            vm.on_port(0x10)(lambda offset, size, value: everyone.wait() and None)
            vm.load(OUT_INC_HALT)
            return await vm.run_async(timeout=LIMIT)

    async def main() -> list[Exit]:
        return await asyncio.gather(*(life() for _ in range(12)))

    assert asyncio.run(main()) == [Halt(0)] * 12


# Several processors

START_OTHERS = bytes.fromhex(
    # in protected mode, at 1 MiB
    "c705f000e0fe ff010000"  # mov dword [0xfee000f0], 0x1ff: enable the local APIC
    "c7050003e0fe 00450c00"  # mov dword [0xfee00300], INIT to all others
    "c7050003e0fe 08460c00"  # mov dword [0xfee00300], SIPI to all others: start at 0x8000
)
SPIN = b"\xeb\xfe"
HALT_FOR_GOOD = b"\xfa\xf4"  # cli; hlt


@pytest.fixture(params=[2, 4])
def smp(request: pytest.FixtureRequest) -> Iterator[VM]:
    """A machine with several processors and local APICs; `at_0x8000` is what the others execute."""
    why = backends.get("kvm").why_unavailable()
    if why is not None:
        pytest.skip(why)
    with VM("2M", backend="kvm", cpus=request.param, irqchip=True) as vm:
        yield vm


def boot(vm: VM, first: bytes, others: bytes) -> None:
    vm.load(START_OTHERS + first, mode="protected")
    vm.memory.write(0x8000, others)


COUNT_UP = b"\xf0\x66\xff\x06\x00\x90"  # lock inc dword [0x9000], in real mode


def test_the_other_processors_run_on_threads_of_their_own(smp: VM) -> None:
    threads = set()
    smp.on_port(0x10)(lambda offset, size, value: threads.add(threading.get_ident()))
    boot(smp, SPIN, COUNT_UP + b"\xe6\x10" + SPIN)
    others = len(smp.vcpus) - 1
    stopper = threading.Thread(target=lambda: wait_until(lambda: len(threads) == others) and smp.stop(2))
    stopper.start()

    exit = smp.run(timeout=LIMIT)
    stopper.join()

    assert exit == Stopped(0, 2, "stop")
    assert count(smp) == others
    assert threading.get_ident() not in threads


def test_what_a_device_raises_on_another_processor_leaves_run_in_the_caller(smp: VM) -> None:
    failures = iter([LookupError("on another thread")])

    @smp.on_port(0x10)
    def fail_once(offset: int, size: int, value: int | None) -> None:
        for failure in failures:
            raise failure
        smp.stop(8)

    boot(smp, SPIN, b"\xe6\x10" + HALT_FOR_GOOD)

    with pytest.raises(LookupError, match="on another thread"):
        smp.run(timeout=LIMIT)

    assert smp.run(timeout=LIMIT) == Stopped(0, 8, "stop")


def test_a_processor_that_waits_for_its_start_does_not_keep_a_final_halt_from_being_one(smp: VM) -> None:
    smp.load(HALT_FOR_GOOD)

    assert type(smp.run(timeout=LIMIT)) is Halt


def test_the_machine_halts_when_its_last_processor_does(smp: VM) -> None:
    boot(smp, HALT_FOR_GOOD, COUNT_UP + HALT_FOR_GOOD)

    exit = smp.run(timeout=LIMIT)

    assert type(exit) is Halt
    assert count(smp) == len(smp.vcpus) - 1


def test_pause_holds_all_processors(smp: VM, pool: ThreadPoolExecutor) -> None:
    boot(smp, SPIN, COUNT)
    future = pool.submit(smp.run, LIMIT)
    assert wait_until(lambda: count(smp) > 0)

    for _ in range(20):
        smp.pause()
        before = count(smp)
        for vcpu in smp.vcpus:
            vcpu.registers()
        assert count(smp) == before
        smp.resume()

    assert counts_on(smp)
    smp.stop()
    assert future.result(LIMIT) == Stopped()


def test_ctrl_c_stops_all_processors(smp: VM) -> None:
    boot(smp, SPIN, COUNT)

    with interrupted_after(0.2), pytest.raises(KeyboardInterrupt):
        smp.run(timeout=LIMIT)

    assert stands_still(smp)
    assert count(smp) > 0
    assert smp.run(timeout=0.05) == Interrupted(0, "timeout")
    assert counts_while_running(smp)


def counts_while_running(vm: VM) -> bool:
    before = count(vm)
    vm.run(timeout=0.1)
    return count(vm) != before


def test_processors_without_interrupt_controllers_run_what_their_registers_say() -> None:
    why = backends.get("kvm").why_unavailable()
    if why is not None:
        pytest.skip(why)
    with VM("64K", backend="kvm", cpus=2) as vm:
        entry = vm.load(SPIN)
        vm.memory.write(0x8100, COUNT_UP + b"\xf4")
        vm.vcpus[1].set_system_registers(entry.system_registers)
        vm.vcpus[1].set_registers(type(entry.registers)(rip=0x8100))

        exit = vm.run(timeout=LIMIT)

        assert exit == Halt(1)
        assert count(vm) == 1


def test_one_processor_of_several_can_be_stepped(smp: VM) -> None:
    smp.load(b"\x40\xf4")

    smp.step(0)

    assert smp.vcpus[0].registers().rax == 1
