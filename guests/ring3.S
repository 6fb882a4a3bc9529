/*
 * ring3: counts the primes below one million in user mode.
 *
 * Ring 0 opens the lowest 2 MiB to user mode, loads a TSS whose I/O permission bitmap allows
 * COM1 and the debug-exit port, and goes to ring 3 through IRETQ, for good: there is no IDT,
 * and user mode needs none.
 *
 * The parameter says how often to count, for those who time it.
 *
 * Mode:      long
 * Parameter: 1
 * Prints:    "78498\n"
 * Exit:      debug-exit 0
 */
        .include "common.inc"
        .equ    BITS, 64
        .equ    PTE_USER, 1 << 2
        .equ    PTE_ADDRESS, 0xfffff000         # of tables that lie below 4 GiB
        .equ    TABLE, 0x110000                 # 500 000 bytes, all of them below 2 MiB
        .code64

start:  parameter rounds, 1

# A page is open to ring 3 only if every level says so: PML4, PDPT and the 2 MiB entry.
        mov     rax, cr3
        mov     ecx, 3
1:      and     eax, PTE_ADDRESS
        or      qword ptr [rax], PTE_USER
        mov     rax, [rax]
        loop    1b
        mov     rax, cr3                        # forget cached translations
        mov     cr3, rax

        mov     rax, [tss_descriptor]
        mov     [BOOT_GDT + TSS], rax
        mov     qword ptr [BOOT_GDT + TSS + 8], 0       # base, bits 63..32
        mov     ax, TSS
        ltr     ax

        push    USER_DATA                       # ss
        push    STACK_TOP - 0x1000              # rsp
        push    2                               # rflags: interrupts off, IOPL 0
        push    USER_CODE64                     # cs
        push    offset user                     # rip
        iretq

user:   mov     rbx, [rounds]
1:      mov     edi, TABLE
        call    sieve
        dec     rbx
        jnz     1b
        mov     ecx, 10
        call    put_number
        print   "\n"
        exit    0

        .include "sieve.inc"

# Available 64-bit TSS (SDM volume 3, 8.2.3): limit, base 15..0, base 23..16, type, and the rest.
        .balign 8
tss_descriptor:
        .word   tss_end - tss - 1, tss - start
        .byte   FLAT_IMAGE >> 16, 0x89, 0, 0

        .balign 8
tss:    .long   0
        .quad   STACK_TOP                       # rsp for ring 0
        .skip   0x66 - 12
        .word   iomap - tss
iomap:  .fill   0xf4 / 8, 1, 0xff               # a set bit forbids the port
        .byte   0xff & ~(1 << (0xf4 % 8))       # 0xf0..0xf7: DEBUG_EXIT
        .fill   0x3f8 / 8 - 0xf8 / 8, 1, 0xff
        .byte   0                               # 0x3f8..0x3ff: COM1
        .byte   0xff                            # the processor reads one byte further
tss_end:

        .include "console.inc"
