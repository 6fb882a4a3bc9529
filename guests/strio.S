/*
 * strio: string I/O with REP, in every width and both directions.
 *
 * The device at port 0x510 is a FIFO: what is written comes back in the same order, byte by
 * byte, whatever the width of the accesses. The text goes in as doublewords and comes out as
 * words, then goes in again as bytes and is stored from the end, which reverses it. The
 * buffer lies across a page boundary.
 *
 * Mode:      long
 * Prints:    "live on time\nemit no evil\n"
 * Exit:      debug-exit 0
 * Devices:   fifo
 */
        .include "common.inc"
        .equ    COUNT, 12                       # bytes of text
        .equ    BUFFER, SCRATCH + 4096 - COUNT / 2
        .code64

start:  cld
        mov     edx, FIFO
        mov     esi, offset text
        mov     ecx, COUNT / 4
        rep     outsd
        mov     edi, BUFFER
        mov     ecx, COUNT / 2
        rep     insw
        call    show

        mov     esi, BUFFER
        mov     edx, FIFO
        mov     ecx, COUNT
        rep     outsb
        mov     edi, BUFFER + COUNT - 1
        mov     ecx, COUNT
        std
        rep     insb
        cld
        call    show
        exit    0

# show: prints the buffer and a newline in two string writes.
show:   mov     edx, COM1
        mov     esi, BUFFER
        mov     ecx, COUNT
        rep     outsb
        mov     al, '\n'
        out     dx, al
        ret

text:   .ascii  "live on time"
