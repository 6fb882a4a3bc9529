/*
 * hello32: prints a greeting on COM1 from 32-bit protected mode.
 *
 * Mode:      protected
 * Prints:    "Hello, protected mode!\n"
 * Exit:      debug-exit 0
 */
        .include "common.inc"
        .equ    BITS, 32
        .code32

start:  mov     esi, offset greeting
        call    puts
        exit    0

greeting:
        .asciz  "Hello, protected mode!\n"

        .include "console.inc"
