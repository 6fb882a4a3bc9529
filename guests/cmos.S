/*
 * cmos: prints the date from the real-time clock, and stores a byte in its memory.
 *
 * The clock (MC146818) leaves its registers alone for 244 us after its update flag reads clear:
 * all are read before any is printed. Status register B tells whether they hold binary numbers
 * or binary-coded decimals.
 * The exit code is 1 if the byte in memory got lost.
 *
 * Mode:      real
 * Prints:    /20\d\d-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])\nmemory ok\n/
 * Exit:      debug-exit 0
 * Devices:   cmos
 */
        .include "common.inc"
        .equ    BITS, 16
        .equ    RTC_DAY, 0x07
        .equ    RTC_MONTH, 0x08
        .equ    RTC_YEAR, 0x09                  # within the century
        .equ    RTC_STATUS_A, 0x0a
        .equ    RTC_STATUS_B, 0x0b
        .equ    STATUS_A_UPDATING, 1 << 7
        .equ    STATUS_B_BINARY, 1 << 2
        .equ    SPARE, 0x40                     # a byte that firmware does not use
        .code16

start:  mov     al, RTC_STATUS_A
        call    read
        test    al, STATUS_A_UPDATING
        jnz     start

        mov     al, RTC_DAY
        call    read_field
        push    ax
        mov     al, RTC_MONTH
        call    read_field
        push    ax
        mov     al, RTC_YEAR
        call    read_field
        push    ax

        print   "20"
        pop     ax
        call    put_field
        mov     al, '-'
        call    putc
        pop     ax
        call    put_field
        mov     al, '-'
        call    putc
        pop     ax
        call    put_field

        mov     ah, 0x5a
        mov     al, SPARE
        call    write
        mov     ah, 0xa5                        # so that the data port itself forgets
        mov     al, SPARE + 1
        call    write
        mov     al, SPARE
        call    read
        cmp     al, 0x5a
        jne     1f
        print   "\nmemory ok\n"
        exit    0
1:      print   "\nmemory lost\n"
        exit    1

# read: returns in AL the byte at index AL.
read:   out     CMOS_INDEX, al
        in      al, CMOS_DATA
        ret

# write: stores AH at index AL.
write:  out     CMOS_INDEX, al
        mov     al, ah
        out     CMOS_DATA, al
        ret

# read_field: returns in AL the clock register AL, as two digits of four bits. Clobbers BL, AH.
read_field:
        call    read
        mov     bl, al
        mov     al, RTC_STATUS_B
        call    read
        test    al, STATUS_B_BINARY
        mov     al, bl
        jz      1f
        aam                                     # AH: tens, AL: units
        shl     ah, 4
        or      al, ah
1:      ret

# put_field: prints the two digits in AL. Clobbers EAX, BL, DX.
put_field:
        mov     bl, al
        shr     al, 4
        add     al, '0'
        call    putc
        mov     al, bl
        and     al, 0x0f
        add     al, '0'
        jmp     putc

        .include "console.inc"
