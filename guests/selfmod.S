/*
 * selfmod: changes its own code, just before it runs and after it has run.
 *
 * The first change hits the very next instruction, which the processor has already fetched.
 * The second hits an instruction that has run before and lies across a page boundary, with its
 * opcode on one page and the changed operand on the next. Writing through the address that is
 * executed needs no barrier (SDM volume 3, 9.1.3, except on a 486, which needs a jump).
 *
 * Mode:      protected
 * Prints:    "ahead: new\nacross pages: old, new\n"
 * Exit:      debug-exit 0
 */
        .include "common.inc"
        .equ    BITS, 32
        .code32

start:  print   "ahead: "
        mov     dword ptr [1f + 1], offset new
1:      mov     esi, offset old
        call    puts

        print   "\nacross pages: "
        call    answer
        call    puts
        print   ", "
        mov     dword ptr [answer + 1], offset new
        call    answer
        call    puts
        print   "\n"
        exit    0

old:    .asciz  "old"
new:    .asciz  "new"

        .include "console.inc"

        .org    4096 - 1
answer: mov     esi, offset old                 # one byte of opcode, four of operand
        ret
