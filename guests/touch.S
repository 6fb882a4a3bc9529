/*
 * touch: writes one byte, 0xa5, into each of the pages from 2 MiB on.
 *
 * The parameter is the number of pages: exactly those pages are dirty in the slot afterwards,
 * for neither stack nor console is used.
 *
 * Mode:      long
 * Parameter: 64
 * Prints:    ""
 * Exit:      debug-exit 0
 */
        .include "common.inc"
        .code64

start:  parameter pages, 64
        mov     rcx, [pages]
        mov     edi, SCRATCH
        jmp     2f
1:      mov     byte ptr [rdi], 0xa5
        add     rdi, 4096
        dec     rcx
2:      test    rcx, rcx
        jnz     1b
        exit    0
