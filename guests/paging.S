/*
 * paging: maps a page, watches the processor set its accessed and dirty bits, and maps another
 * page in its place.
 *
 * Mode:      long
 * Prints:    "mapped: accessed 0 dirty 0\n"
 *            "one\n"
 *            "read: accessed 1 dirty 0\n"
 *            "written: accessed 1 dirty 1\n"
 *            "mapped: accessed 0 dirty 0\n"
 *            "two\n"
 *            "read: accessed 1 dirty 0\n"
 *            "first page: One\n"
 * Exit:      debug-exit 0
 */
        .include "common.inc"
        .equ    BITS, 64
        .equ    PTE_PRESENT, 1 << 0
        .equ    PTE_WRITABLE, 1 << 1
        .equ    PTE_ACCESSED_BIT, 5
        .equ    PTE_DIRTY_BIT, 6
        .equ    PTE_FLAGS, PTE_PRESENT | PTE_WRITABLE
        .equ    PML4_INDEX, 1                   # of the window, at 512 GiB
        .equ    PDPT, SCRATCH
        .equ    PD, SCRATCH + 0x1000
        .equ    PT, SCRATCH + 0x2000
        .equ    PAGE_ONE, SCRATCH + 0x3000
        .equ    PAGE_TWO, SCRATCH + 0x4000
        .code64

start:  mov     edi, PDPT
        mov     ecx, 3 * 4096 / 8
        xor     eax, eax
        rep     stosq
        mov     dword ptr [PAGE_ONE], 0x656e6f          # "one\0"
        mov     dword ptr [PAGE_TWO], 0x6f7774          # "two\0"

        mov     rbp, 1 << 39                    # the window: entry 0 of PT, PD and PDPT
        mov     rax, cr3
        and     rax, ~0xfff
        mov     qword ptr [rax + 8 * PML4_INDEX], PDPT | PTE_FLAGS
        mov     qword ptr [PDPT], PD | PTE_FLAGS
        mov     qword ptr [PD], PT | PTE_FLAGS

        mov     ebx, PAGE_ONE | PTE_FLAGS
        call    map
        mov     byte ptr [rbp], 'O'
        print   "written"
        call    put_bits

        mov     ebx, PAGE_TWO | PTE_FLAGS
        call    map

        print   "first page: "
        mov     esi, PAGE_ONE
        call    puts
        print   "\n"
        exit    0

# map: makes the window's entry EBX, and reads a string through it.
map:    mov     [PT], rbx
        invlpg  [rbp]
        print   "mapped"
        call    put_bits
        mov     rsi, rbp
        call    puts
        print   "\nread"
        jmp     put_bits

# put_bits: prints the accessed and the dirty bit of the window's entry.
put_bits:
        print   ": accessed "
        mov     ecx, PTE_ACCESSED_BIT
        call    put_bit
        print   " dirty "
        mov     ecx, PTE_DIRTY_BIT
        call    put_bit
        mov     al, '\n'
        jmp     putc
put_bit:
        mov     eax, [PT]
        shr     eax, cl
        and     al, 1
        add     al, '0'
        jmp     putc

        .include "console.inc"
