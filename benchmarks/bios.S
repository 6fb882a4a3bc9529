/*
 * bios.S: guests/hello.bin as a 64 KiB BIOS image, for machines that start from the reset vector.
 *
 * The image ends at 4 GiB and is seen at 0xf0000 too. It copies the guest to where `pykvm boot` loads
 * it, 0000:8000, and jumps there.
 */
        .intel_syntax noprefix
        .code16
        .text
        .equ    IMAGE, 0x8000
        .equ    BIOS_SEGMENT, 0xf000

guest:  .incbin "hello.bin"
guest_end:

        .org    0xff00
start:  mov     ax, BIOS_SEGMENT
        mov     ds, ax
        xor     ax, ax
        mov     es, ax
        xor     si, si
        mov     di, IMAGE
        mov     cx, offset guest_end - guest
        cld
        rep movsb
        mov     ds, ax
        mov     ss, ax
        mov     sp, 0x7c00
        jmp     0, IMAGE

        .org    0xfff0                          /* the reset vector */
        jmp     BIOS_SEGMENT, 0xff00
        .org    0x10000
