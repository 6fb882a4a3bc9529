/*
 * smp: starts every other processor, each of which prints its APIC ID.
 *
 * CMOS byte 0x5f tells how many processors there are besides the first. INIT and SIPI go to all
 * of them at once; they start in real mode, at the page that the SIPI names, and enter protected
 * mode through the boot GDT. A spin lock guards the console and the one stack they share.
 *
 * Mode:      protected
 * Cpus:      4
 * Prints:    /(?=(.*\n)*CPU 1\n)(?=(.*\n)*CPU 2\n)(?=(.*\n)*CPU 3\n)(CPU [123]\n){3}4 CPUs\n/
 * Exit:      debug-exit 0
 * Devices:   irqchip, cmos
 * Backends:  kvm
 */
        .include "common.inc"
        .equ    BITS, 32
        .equ    CMOS_OTHER_CPUS, 0x5f
        .equ    APIC_ID, LOCAL_APIC + 0x20      # bits 31..24
        .equ    APIC_SPURIOUS, LOCAL_APIC + 0xf0
        .equ    APIC_COMMAND, LOCAL_APIC + 0x300        # interrupt command register, low half
        .equ    APIC_ENABLED, 1 << 8
        .equ    ICR_INIT, 5 << 8
        .equ    ICR_STARTUP, 6 << 8
        .equ    ICR_OTHERS, 3 << 18 | 1 << 14   # all but self, level asserted
        .equ    TRAMPOLINE, 0x8000
        .equ    CR0_PE, 1 << 0
        .code32

start:  mov     esi, offset trampoline
        mov     edi, TRAMPOLINE
        mov     ecx, trampoline_end - trampoline
        rep     movsb

        mov     al, CMOS_OTHER_CPUS
        out     CMOS_INDEX, al
        in      al, CMOS_DATA
        movzx   ebx, al

# On a board, 10 ms must pass between the two and a second SIPI may be needed (SDM volume 3,
# 9.4.4); an APIC that is software answers at once.
        mov     dword ptr [APIC_SPURIOUS], APIC_ENABLED | 0xff
        mov     dword ptr [APIC_COMMAND], ICR_OTHERS | ICR_INIT
        mov     dword ptr [APIC_COMMAND], ICR_OTHERS | ICR_STARTUP | TRAMPOLINE >> 12

1:      pause
        cmp     ebx, [arrived]
        jne     1b

        lea     eax, [ebx + 1]
        mov     ecx, 10
        call    put_number
        print   " CPUs\n"
        exit    0

# A processor arrives here from the trampoline, with flat segments.
processor:
        mov     ebx, [APIC_ID]
        shr     ebx, 24
1:      pause
        lock bts dword ptr [console_lock], 0
        jc      1b
        mov     esp, STACK_TOP - 0x1000         # the stack belongs to the lock's owner
        print   "CPU "
        mov     eax, ebx
        mov     ecx, 10
        call    put_number
        print   "\n"
        mov     dword ptr [console_lock], 0
        lock inc dword ptr [arrived]
1:      cli
        hlt
        jmp     1b

        .balign 4
console_lock:
        .long   0
arrived:
        .long   0

# Runs as a copy in the first megabyte, with CS = TRAMPOLINE / 16 and IP = 0.
        .code16
trampoline:
        cli
        lgdt    cs:[gdtr - trampoline]
        mov     eax, cr0
        or      al, CR0_PE
        mov     cr0, eax
        jmp     CODE32:protected - trampoline + TRAMPOLINE
        .code32
protected:
        mov     ax, DATA
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     eax, offset processor
        jmp     eax

gdtr:   .word   3 * 8 - 1                       # null, CODE32, DATA
        .long   BOOT_GDT
trampoline_end:

        .include "console.inc"
