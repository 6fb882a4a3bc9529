/*
 * cpuid: prints what the processor and the hypervisor call themselves.
 *
 * Mode:      protected
 * Prints:    /vendor [ -~]{1,12}\nmax leaf 0x[0-9a-f]+\nhypervisor (none|[ -~]{1,12})\n/
 * Exit:      debug-exit 0
 */
        .include "common.inc"
        .equ    BITS, 32
        .equ    CPUID_HYPERVISOR, 1 << 31       # leaf 1, ECX
        .code32

start:  xor     eax, eax
        cpuid
        mov     ebp, eax
        mov     [name], ebx                     # this leaf's order: "Genu" "ineI" "ntel"
        mov     [name + 4], edx
        mov     [name + 8], ecx
        print   "vendor "
        mov     esi, offset name
        call    puts
        print   "\nmax leaf 0x"
        mov     eax, ebp
        mov     ecx, 16
        call    put_number
        print   "\nhypervisor "

        mov     eax, 1
        cpuid
        test    ecx, CPUID_HYPERVISOR
        jz      1f
        mov     eax, 0x40000000
        cpuid
        mov     [name], ebx
        mov     [name + 4], ecx
        mov     [name + 8], edx
        mov     esi, offset name
        call    puts
        jmp     2f
1:      print   "none"
2:      print   "\n"
        exit    0

name:   .skip   12
        .byte   0

        .include "console.inc"
