/*
 * hello: prints a greeting on COM1 from 16-bit real mode.
 *
 * Mode:      real
 * Prints:    "Hello, world!\n"
 * Exit:      debug-exit 0
 */
        .include "common.inc"
        .equ    BITS, 16
        .code16

start:  mov     si, offset greeting
        call    puts
        exit    0

greeting:
        .asciz  "Hello, world!\n"

        .include "console.inc"
