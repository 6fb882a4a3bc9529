/*
 * timer: sleeps through ten ticks of the programmable interval timer, one hundredth of a
 * second each.
 *
 * The interrupt controller (8259A) is told to use vectors from 0x20 on, clear of the
 * processor's exceptions; the timer's channel 0 (8254) divides its 1.193182 MHz by 11932.
 *
 * Mode:      real
 * Prints:    "tick 1\ntick 2\ntick 3\ntick 4\ntick 5\n"
 *            "tick 6\ntick 7\ntick 8\ntick 9\ntick 10\n"
 * Exit:      debug-exit 0
 * Devices:   irqchip
 */
        .include "common.inc"
        .equ    BITS, 16
        .equ    PIC1_COMMAND, 0x20
        .equ    PIC1_DATA, 0x21
        .equ    PIC2_DATA, 0xa1
        .equ    PIC_EOI, 0x20
        .equ    PIT_CHANNEL_0, 0x40
        .equ    PIT_COMMAND, 0x43
        .equ    TIMER_VECTOR, 0x20              # IRQ 0
        .code16

start:  mov     word ptr [TIMER_VECTOR * 4], offset on_tick
        mov     word ptr [TIMER_VECTOR * 4 + 2], 0      # code segment

        mov     al, 0x11                        # ICW1: edge triggered, cascaded, ICW4 follows
        out     PIC1_COMMAND, al
        mov     al, TIMER_VECTOR                # ICW2: vector of IRQ 0
        out     PIC1_DATA, al
        mov     al, 1 << 2                      # ICW3: the second controller is on input 2
        out     PIC1_DATA, al
        mov     al, 1                           # ICW4: 8086 mode, explicit end of interrupt
        out     PIC1_DATA, al
        mov     al, 0xfe                        # mask: all but IRQ 0
        out     PIC1_DATA, al
        mov     al, 0xff
        out     PIC2_DATA, al

        mov     al, 0x34                        # channel 0, low then high byte, mode 2: rate
        out     PIT_COMMAND, al
        mov     ax, 11932
        out     PIT_CHANNEL_0, al
        mov     al, ah
        out     PIT_CHANNEL_0, al

# BL counts the ticks that are printed. The check runs with interrupts off and STI takes effect
# after the instruction that follows it, so that no tick can slip in between check and HLT.
        xor     bl, bl
1:      cli
        cmp     bl, [ticks]
        jne     2f
        sti
        hlt
        jmp     1b

2:      inc     bl
        print   "tick "
        movzx   eax, bl
        mov     ecx, 10
        call    put_number
        print   "\n"
        cmp     bl, 10
        jb      1b
        exit    0

on_tick:
        push    ax
        inc     byte ptr [ticks]
        mov     al, PIC_EOI
        out     PIC1_COMMAND, al
        pop     ax
        iret

ticks:  .byte   0

        .include "console.inc"
