/*
 * mmio: reads and writes a memory-mapped device with every access size.
 *
 * The device counts: a write sets its number, a read adds one and returns the new number.
 * Each read keeps the bytes it asked for; what it leaves in the registers is the result.
 *
 * Mode:      long
 * Prints:    ""
 * Exit:      halt rax=0x1122334455667004 rbx=0x55667003 rcx=0x7002 rdx=0x01
 * Devices:   counter
 */
        .include "common.inc"
        .code64

start:  mov     edi, COUNTER
        mov     byte ptr [rdi], 0x11
        mov     word ptr [rdi], 0x1122
        mov     dword ptr [rdi], 0x11223344
        mov     rax, 0x1122334455667000
        mov     [rdi], rax

        movzx   edx, byte ptr [rdi]
        movzx   ecx, word ptr [rdi]
        mov     ebx, [rdi]
        mov     rax, [rdi]

        cli
        hlt
