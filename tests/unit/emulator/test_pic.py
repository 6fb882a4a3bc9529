"""The pair of 8259As: initialization, priority, end of interrupt, cascade, spurious interrupts."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.emulator.pic import Pic
from pykvm.errors import ConfigurationError

MASTER, SLAVE = 0x20, 0xA0
EOI, ROTATE_ON_EOI = 0x20, 0xA0
SPECIFIC_EOI, ROTATE_ON_SPECIFIC_EOI, SET_PRIORITY = 0x60, 0xE0, 0xC0
ROTATE_ON_AEOI = 0x80
READ_IRR, READ_ISR, POLL, SPECIAL_MASK, NO_SPECIAL_MASK = 0x0A, 0x0B, 0x0C, 0x68, 0x48
AEOI, SFNM = 0x02, 0x10


def start(pic: Pic, *, master_icw4: int = 0, slave_icw4: int = 0) -> Pic:
    """Initialize as PC firmware does: vectors 0x20 and 0x28, everything unmasked."""
    for port, vector, cascade, icw4 in ((MASTER, 0x20, 4, master_icw4), (SLAVE, 0x28, 2, slave_icw4)):
        pic.port_write(port, 1, 0x11)
        pic.port_write(port + 1, 1, vector)
        pic.port_write(port + 1, 1, cascade)
        pic.port_write(port + 1, 1, 0x01 | icw4)
    return pic


def read(pic: Pic, port: int, command: int) -> int:
    pic.port_write(port, 1, command)
    return pic.port_read(port, 1)


def pulse(pic: Pic, *lines: int) -> None:
    for line in lines:
        pic.set_irq(line, True)
        pic.set_irq(line, False)


def taken(pic: Pic) -> list[int]:
    """Acknowledge everything that is pending, without ending any."""
    vectors = []
    while pic.pending():
        vectors.append(pic.acknowledge())
    return vectors


@pytest.fixture
def pic() -> Pic:
    return start(Pic())


# Requests


@pytest.mark.parametrize(("line", "vector"), [(0, 0x20), (1, 0x21), (7, 0x27), (8, 0x28), (15, 0x2F)])
def test_a_line_interrupts_with_its_vector(pic: Pic, line: int, vector: int) -> None:
    pic.set_irq(line, True)
    assert pic.pending()
    assert pic.acknowledge() == vector
    assert not pic.pending()


def test_a_pulse_is_one_interrupt(pic: Pic) -> None:
    pulse(pic, 4)
    assert taken(pic) == [0x24]
    pic.port_write(MASTER, 1, EOI)
    assert not pic.pending()


def test_a_line_that_stays_high_is_one_edge(pic: Pic) -> None:
    pic.set_irq(4, True)
    pic.acknowledge()
    pic.port_write(MASTER, 1, EOI)
    pic.set_irq(4, True)
    assert not pic.pending()


def test_a_level_line_interrupts_again_after_the_end_of_interrupt(pic: Pic) -> None:
    pic.port_write(0x4D0, 2, 1 << 11)
    pic.set_irq(11, True)
    assert taken(pic) == [0x2B]
    pic.port_write(SLAVE, 1, EOI)
    pic.port_write(MASTER, 1, EOI)
    assert taken(pic) == [0x2B]


def test_a_level_line_that_falls_is_withdrawn(pic: Pic) -> None:
    pic.port_write(0x4D0, 1, 1 << 5)
    pic.set_irq(5, True)
    pic.set_irq(5, False)
    assert not pic.pending()


def test_ltim_makes_every_line_level_triggered(pic: Pic) -> None:
    pic.port_write(MASTER, 1, 0x19)
    for word in (0x20, 4, 1):
        pic.port_write(MASTER + 1, 1, word)
    pic.set_irq(3, True)
    pic.set_irq(3, False)
    assert not pic.pending()


def test_the_elcr_keeps_only_lines_that_may_be_level_triggered(pic: Pic) -> None:
    pic.port_write(0x4D0, 2, 0xFFFF)
    assert pic.port_read(0x4D0, 2) == 0xDEF8


def test_a_masked_line_waits(pic: Pic) -> None:
    pic.port_write(MASTER + 1, 1, 0xFF)
    pic.set_irq(3, True)
    assert not pic.pending()
    assert read(pic, MASTER, READ_IRR) == 0x08
    pic.port_write(MASTER + 1, 1, 0xF7)
    assert pic.pending()


def test_the_data_port_reads_the_mask(pic: Pic) -> None:
    pic.port_write(MASTER + 1, 1, 0x5A)
    pic.port_write(SLAVE + 1, 1, 0xA5)
    assert (pic.port_read(MASTER + 1, 1), pic.port_read(SLAVE + 1, 1)) == (0x5A, 0xA5)


@pytest.mark.parametrize("line", [-1, 2, 16])
def test_a_line_that_does_not_exist_is_an_error(pic: Pic, line: int) -> None:
    with pytest.raises(ConfigurationError, match=f"IRQ {line}:"):
        pic.set_irq(line, True)


# Initialization


def test_nothing_is_requested_until_the_last_initialization_word(pic: Pic) -> None:
    pic.port_write(MASTER, 1, 0x11)
    pulse(pic, 1)
    states = [pic.pending()]
    for word in (0x40, 4, 1):
        pic.port_write(MASTER + 1, 1, word)
        states.append(pic.pending())
    assert states == [False, False, False, True]
    assert pic.acknowledge() == 0x41


def test_initialization_forgets_requests_masks_and_priorities(pic: Pic) -> None:
    pic.set_irq(4, True)
    pic.acknowledge()
    pulse(pic, 5)
    pic.port_write(MASTER + 1, 1, 0x55)
    pic.port_write(MASTER, 1, SET_PRIORITY | 3)
    start(pic)
    assert not pic.pending()
    assert (pic.port_read(MASTER + 1, 1), read(pic, MASTER, READ_ISR)) == (0, 0)
    pulse(pic, 0, 4)
    assert pic.acknowledge() == 0x20


def test_a_line_high_before_initialization_needs_a_new_edge(pic: Pic) -> None:
    pic.set_irq(4, True)
    start(pic)
    assert not pic.pending()
    pic.set_irq(4, False)
    pic.set_irq(4, True)
    assert pic.pending()


def test_a_single_chip_without_icw4_is_ready_after_icw2(pic: Pic) -> None:
    pic.port_write(MASTER, 1, 0x12)
    pic.port_write(MASTER + 1, 1, 0x50)
    pic.port_write(MASTER + 1, 1, 0xFE)
    assert pic.port_read(MASTER + 1, 1) == 0xFE
    pulse(pic, 0)
    assert pic.acknowledge() == 0x50


# Priority and end of interrupt


def test_lower_lines_come_first_and_the_slave_in_the_place_of_line_2(pic: Pic) -> None:
    order = []
    pulse(pic, *(line for line in range(15, -1, -1) if line != 2))
    while pic.pending():
        vector = pic.acknowledge()
        order.append(vector - 0x20)
        pic.port_write(SLAVE if vector >= 0x28 else MASTER, 1, EOI)
        pic.port_write(MASTER, 1, EOI)
    assert order == [0, 1, 8, 9, 10, 11, 12, 13, 14, 15, 3, 4, 5, 6, 7]


def test_only_a_higher_priority_interrupts_a_handler(pic: Pic) -> None:
    pulse(pic, 4)
    pic.acknowledge()
    pulse(pic, 5)
    assert not pic.pending()
    pulse(pic, 3)
    assert taken(pic) == [0x23]
    assert read(pic, MASTER, READ_ISR) == 0x18


def test_a_non_specific_eoi_ends_the_highest_in_service(pic: Pic) -> None:
    pulse(pic, 4)
    pic.acknowledge()
    pulse(pic, 3)
    pic.acknowledge()
    pic.port_write(MASTER, 1, EOI)
    assert read(pic, MASTER, READ_ISR) == 0x10


def test_a_specific_eoi_ends_the_one_it_names(pic: Pic) -> None:
    pulse(pic, 4)
    pic.acknowledge()
    pulse(pic, 3)
    pic.acknowledge()
    pic.port_write(MASTER, 1, SPECIFIC_EOI | 4)
    assert read(pic, MASTER, READ_ISR) == 0x08


def test_an_eoi_with_nothing_in_service_changes_nothing(pic: Pic) -> None:
    before = pic.save()
    pic.port_write(MASTER, 1, ROTATE_ON_EOI)
    assert pic.save() == before


def test_automatic_eoi_leaves_nothing_in_service() -> None:
    pic = start(Pic(), master_icw4=AEOI)
    pulse(pic, 3, 4)
    assert taken(pic) == [0x23, 0x24]
    assert read(pic, MASTER, READ_ISR) == 0


def test_rotation_on_eoi_gives_the_served_line_the_lowest_priority(pic: Pic) -> None:
    pulse(pic, 4)
    pic.acknowledge()
    pic.port_write(MASTER, 1, ROTATE_ON_EOI)
    pulse(pic, 3, 4, 5)
    assert pic.acknowledge() == 0x25


def test_rotation_on_specific_eoi_names_the_line(pic: Pic) -> None:
    pulse(pic, 6)
    pic.acknowledge()
    pic.port_write(MASTER, 1, ROTATE_ON_SPECIFIC_EOI | 6)
    pulse(pic, 6, 7)
    assert pic.acknowledge() == 0x27


def test_rotation_with_automatic_eoi_serves_in_turn() -> None:
    pic = start(Pic(), master_icw4=AEOI)
    pic.port_write(MASTER, 1, ROTATE_ON_AEOI)
    pulse(pic, 3, 4)
    pic.acknowledge()
    pulse(pic, 3)
    assert taken(pic) == [0x24, 0x23]


def test_rotation_with_automatic_eoi_can_be_switched_off() -> None:
    pic = start(Pic(), master_icw4=AEOI)
    pic.port_write(MASTER, 1, ROTATE_ON_AEOI)
    pic.port_write(MASTER, 1, 0x00)
    pulse(pic, 3, 4)
    pic.acknowledge()
    pulse(pic, 3)
    assert taken(pic) == [0x23, 0x24]


def test_set_priority_names_the_lowest_line(pic: Pic) -> None:
    pic.port_write(MASTER, 1, SET_PRIORITY | 4)
    pulse(pic, 0, 5)
    assert pic.acknowledge() == 0x25


def test_special_mask_mode_lets_lower_lines_interrupt_a_masked_handler(pic: Pic) -> None:
    pulse(pic, 3)
    pic.acknowledge()
    pic.port_write(MASTER + 1, 1, 1 << 3)
    pulse(pic, 6)
    assert not pic.pending()
    pic.port_write(MASTER, 1, SPECIAL_MASK)
    assert taken(pic) == [0x26]
    pic.port_write(MASTER, 1, EOI)
    assert read(pic, MASTER, READ_ISR) == 1 << 3
    pulse(pic, 6)
    pic.port_write(MASTER, 1, NO_SPECIAL_MASK)
    assert not pic.pending()


# Cascade


def test_a_slave_interrupt_is_in_service_on_both_chips(pic: Pic) -> None:
    pulse(pic, 12)
    pic.acknowledge()
    assert (read(pic, MASTER, READ_ISR), read(pic, SLAVE, READ_ISR)) == (0x04, 0x10)


def test_a_higher_slave_line_waits_for_the_master_unless_specially_nested(pic: Pic) -> None:
    pulse(pic, 12)
    pic.acknowledge()
    pulse(pic, 8)
    assert not pic.pending()
    pic.port_write(MASTER, 1, EOI)
    assert taken(pic) == [0x28]


def test_special_fully_nested_mode_lets_the_slave_interrupt_itself() -> None:
    pic = start(Pic(), master_icw4=SFNM)
    pulse(pic, 12)
    pic.acknowledge()
    pulse(pic, 3, 13)
    assert not pic.pending()
    pulse(pic, 8)
    assert taken(pic) == [0x28]


def test_a_slave_with_automatic_eoi_delivers_one_after_the_other() -> None:
    pic = start(Pic(), master_icw4=AEOI, slave_icw4=AEOI)
    pulse(pic, 10, 9)
    assert taken(pic) == [0x29, 0x2A]


# Spurious interrupts


def test_an_acknowledge_without_a_request_is_irq_7_and_not_in_service(pic: Pic) -> None:
    assert pic.acknowledge() == 0x27
    assert read(pic, MASTER, READ_ISR) == 0


def test_a_slave_request_withdrawn_before_the_acknowledge_is_irq_15(pic: Pic) -> None:
    pic.port_write(0x4D0, 2, 1 << 11)
    pic.set_irq(11, True)
    pic.set_irq(11, False)
    assert pic.acknowledge() == 0x2F
    assert (read(pic, MASTER, READ_ISR), read(pic, SLAVE, READ_ISR)) == (0x04, 0)


# Poll


def test_a_poll_acknowledges_and_names_the_line(pic: Pic) -> None:
    pulse(pic, 5)
    assert read(pic, MASTER, POLL) == 0x85
    assert read(pic, MASTER, READ_ISR) == 0x20
    assert not pic.pending()


def test_a_poll_without_a_request_reads_zero_once(pic: Pic) -> None:
    pic.port_write(MASTER + 1, 1, 0x80)
    assert read(pic, MASTER, POLL) == 0
    assert pic.port_read(MASTER + 1, 1) == 0x80


def test_polling_the_slave_lets_its_next_line_interrupt() -> None:
    pic = start(Pic(), slave_icw4=AEOI)
    pulse(pic, 9, 10)
    assert read(pic, SLAVE, POLL) == 0x81
    assert taken(pic) == [0x2A]


# Ports and state


def test_other_ports_read_as_an_empty_bus_and_ignore_writes(pic: Pic) -> None:
    before = pic.save()
    pic.port_write(0x22, 1, 0x11)
    assert pic.port_read(0x22, 1) == 0xFF
    assert pic.save() == before


def test_a_wide_access_is_its_bytes(pic: Pic) -> None:
    pic.port_write(MASTER, 2, 0xA500 | READ_ISR)
    assert pic.port_read(MASTER, 4) == 0xFFFFA500


def test_lines_may_be_driven_from_several_threads(pic: Pic) -> None:
    def drive(line: int) -> None:
        for _ in range(2000):
            pulse(pic, line)

    threads = [threading.Thread(target=drive, args=(line,)) for line in (3, 4, 9, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read(pic, MASTER, READ_IRR) == 0x1C
    assert read(pic, SLAVE, READ_IRR) == 0x06


PORTS = st.sampled_from([0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1])
LINES = st.sampled_from([line for line in range(16) if line != 2])
ACTION = st.one_of(
    st.tuples(st.just("write"), PORTS, st.integers(0, 255)),
    st.tuples(st.just("read"), PORTS, st.just(0)),
    st.tuples(st.just("raise"), LINES, st.just(0)),
    st.tuples(st.just("lower"), LINES, st.just(0)),
    st.tuples(st.just("acknowledge"), st.just(0), st.just(0)),
)


def apply(pic: Pic, action: str, where: int, value: int) -> int:
    match action:
        case "write":
            pic.port_write(where, 1, value)
        case "read":
            return pic.port_read(where, 1)
        case "raise":
            pic.set_irq(where, True)
        case "lower":
            pic.set_irq(where, False)
        case "acknowledge":
            return pic.acknowledge()
    return 0


@settings(max_examples=200, deadline=None)
@given(st.lists(ACTION, max_size=60))
def test_any_guest_gets_bytes_and_never_an_exception(actions: list[tuple[str, int, int]]) -> None:
    pic = start(Pic())
    for action in actions:
        assert 0 <= apply(pic, *action) <= 0xFF


@settings(max_examples=200, deadline=None)
@given(st.lists(ACTION, max_size=40), st.lists(ACTION, max_size=40))
def test_a_restored_copy_behaves_like_the_original(
    before: list[tuple[str, int, int]], after: list[tuple[str, int, int]]
) -> None:
    first, second = start(Pic()), Pic()
    for action in before:
        apply(first, *action)
    second.restore(first.save())
    assert second.pending() == first.pending()
    assert [apply(second, *action) for action in after] == [apply(first, *action) for action in after]
    assert second.save() == first.save()


@settings(max_examples=200, deadline=None)
@given(st.lists(ACTION, max_size=60))
def test_pending_means_that_the_acknowledged_line_was_requested(actions: list[tuple[str, int, int]]) -> None:
    pic = start(Pic())
    for action in actions:
        apply(pic, *action)
    pending = pic.pending()
    before = pic.save().master
    pic.acknowledge()
    after = pic.save().master
    assert pending or (after.isr, after.edges) == (before.isr, before.edges)
