/*
 * hello64: prints a greeting on COM1 from 64-bit long mode.
 *
 * The string is addressed relative to RIP, which only 64-bit code can do.
 *
 * Mode:      long
 * Prints:    "Hello, long mode!\n"
 * Exit:      debug-exit 0
 */
        .include "common.inc"
        .equ    BITS, 64
        .code64

start:  lea     rsi, [rip + greeting]
        call    puts
        exit    0

greeting:
        .asciz  "Hello, long mode!\n"

        .include "console.inc"
