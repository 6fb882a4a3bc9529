/*
 * exceptions: causes four exceptions, reports each from its handler, and goes on.
 *
 * Every faulting instruction here is two bytes long, and each of these exceptions saves the
 * address of the instruction itself: the handler adds two and returns behind it.
 *
 * Mode:      long
 * Prints:    "#DE vector 0\n"
 *            "#UD vector 6\n"
 *            "#GP vector 13 error 0x1238\n"
 *            "#PF vector 14 error 0x2 address 0x123456789a\n"
 *            "done\n"
 * Exit:      debug-exit 0
 */
        .include "common.inc"
        .equ    BITS, 64
        .code64

start:  lidt    [idtr]

        xor     ecx, ecx
        div     ecx                             # by zero

        ud2

        mov     eax, 0x1238                     # a selector beyond the end of the GDT
        mov     ds, ax

        mov     rax, 0x123456789a               # beyond the identity map
        mov     [rax], cl

        print   "done\n"
        exit    0

# Two of the four push an error code; the others push a zero in its place, so that one report
# serves all:   rsp: vector, error code, rip, cs, rflags, rsp, ss
on_divide_error:
        push    0
        push    0
        jmp     report
on_invalid_opcode:
        push    0
        push    6
        jmp     report
on_general_protection:
        push    13
        jmp     report
on_page_fault:
        push    14

report: mov     rbx, [rsp]
        mov     esi, [rbx * 4 + names]
        call    puts
        mov     rax, rbx
        mov     ecx, 10
        call    put_number
        cmp     rbx, 13
        jb      1f
        print   " error 0x"
        mov     rax, [rsp + 8]
        mov     ecx, 16
        call    put_number
        cmp     rbx, 14
        jne     1f
        print   " address 0x"
        mov     rax, cr2
        call    put_number
1:      print   "\n"
        add     rsp, 16                         # vector and error code
        add     qword ptr [rsp], 2              # rip: behind the instruction
        xor     ecx, ecx
        iretq

names:  .long   de, 0, 0, 0, 0, 0, ud, 0, 0, 0, 0, 0, 0, gp, pf
de:     .asciz  "#DE vector "
ud:     .asciz  "#UD vector "
gp:     .asciz  "#GP vector "
pf:     .asciz  "#PF vector "

        .balign 16
idt:    gate    on_divide_error                 # 0
        .skip   5 * 16                          # not present
        gate    on_invalid_opcode               # 6
        .skip   6 * 16
        gate    on_general_protection           # 13
        gate    on_page_fault                   # 14
idtr:   .word   idtr - idt - 1                  # limit
        .quad   idt                             # base

        .include "console.inc"
