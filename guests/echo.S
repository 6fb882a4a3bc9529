/*
 * echo: sends a line from COM1 back in upper case.
 *
 * Waits for each byte by polling the line status register, and ends after the newline.
 *
 * Mode:      real
 * Input:     "Hello, it is 12 o'clock.\n"
 * Prints:    "HELLO, IT IS 12 O'CLOCK.\n"
 * Exit:      debug-exit 0
 */
        .include "common.inc"
        .equ    BITS, 16
        .code16

start:  call    getc
        cmp     al, 'a'
        jb      1f
        cmp     al, 'z'
        ja      1f
        sub     al, 'a' - 'A'
1:      call    putc
        cmp     al, '\n'
        jne     start
        exit    0

# getc: waits for a byte and returns it in AL. Clobbers DX.
getc:   mov     dx, COM1_LSR
1:      in      al, dx
        test    al, LSR_DATA_READY
        jz      1b
        mov     dx, COM1
        in      al, dx
        ret

        .include "console.inc"
