"""Layout: every fixed address, port and interrupt line of the machine.

Guest-physical memory, as `pykvm.VM` builds it::

    0x0000_0000  +-------------------------------+
                 | real-mode vectors, BIOS data   |  not used by pykvm
    0x0000_0500  | boot GDT                       |  protected and long mode
    0x0000_0600  | boot TSS                       |  long mode
    0x0000_1000  | boot page tables (7 pages)     |  long mode: PML5 PML4 PDPT PD0..PD3
    0x0000_7c00  | boot sectors                   |  real mode has no page tables, its stack ends here
    0x0000_8000  | flat real-mode images          |
    0x0009_0000  | command line, boot information |  stack of protected and long mode ends here
    0x000a_0000  +-------------------------------+
                 | video and option ROM area      |  plain memory, unless a ROM is mapped over it
    0x000c_0000  | firmware, second copy          |  as long as the image, ends at 1 MiB
    0x0010_0000  +-------------------------------+
                 | flat protected/long images     |
                 | memory                         |
    0xc000_0000  +-------------------------------+  RAM beyond 3 GiB goes on at 4 GiB
                 | hole: device MMIO              |
    0xfec0_0000  | I/O APIC                       |
    0xfee0_0000  | local APIC                     |
    0xfffb_c000  | KVM identity map, then TSS     |  VT-x needs these 4 pages in real mode
    0xfffc_0000  | firmware, ends at 4 GiB        |
    0x1_0000_0000+-------------------------------+
                 | memory                         |
                 +-------------------------------+
"""

from __future__ import annotations

PAGE_SIZE = 0x1000

# Low memory
BOOT_GDT = 0x500
BOOT_TSS = 0x600
BOOT_PAGE_TABLES = 0x1000
BOOT_SECTOR = 0x7C00
REAL_MODE_STACK_TOP = 0x7C00
REAL_MODE_IMAGE = 0x8000
BOOT_IST1_STACK_TOP = 0x7_8000
BOOT_INTERRUPT_STACK_TOP = 0x8_0000
BOOT_STACK_TOP = 0x9_0000
BOOT_INFO = 0x9_0000
BOOT_INFO_END = 0xA_0000
FLAT_IMAGE = 0x10_0000
FIRMWARE_LOW_END = 0x10_0000

# High memory
HOLE_START = 0xC000_0000
HOLE_END = 0x1_0000_0000
IOAPIC = 0xFEC0_0000
LOCAL_APIC = 0xFEE0_0000
KVM_IDENTITY_MAP = 0xFFFB_C000
KVM_TSS = 0xFFFB_D000
FIRMWARE_MAX = HOLE_END - 0xFFFC_0000  # 256 KiB fit above KVM's own pages
RESET_VECTOR = 0xFFFF_FFF0

# Ports (first port, number of ports)
PIC1 = 0x20
PIC2 = 0xA0
PIT = 0x40
I8042_DATA = 0x60
PORT_B = 0x61  # PIT channel 2 gate and speaker
I8042_COMMAND = 0x64
CMOS = 0x70
DEBUG_CONSOLE = 0xE9
DEBUG_EXIT = 0xF4
COM1 = 0x3F8
COM2 = 0x2F8
FIRMWARE_DEBUG = 0x402
ACPI_PM_BASE = 0x600
ACPI_SHUTDOWN = 0x604
ACPI_PM_TIMER = 0x608
RESET_CONTROL = 0xCF9

# Interrupt lines (GSI)
IRQ_PIT = 0
IRQ_KEYBOARD = 1
IRQ_COM2 = 3
IRQ_COM1 = 4
IRQ_RTC = 8
IRQ_ACPI = 9

# Boot GDT selectors
SELECTOR_CODE32 = 0x08
SELECTOR_DATA = 0x10
SELECTOR_CODE64 = 0x18
SELECTOR_USER_DATA = 0x20
SELECTOR_USER_CODE64 = 0x28
SELECTOR_TSS = 0x30
