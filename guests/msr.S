/*
 * msr: writes model-specific registers, reads them back, and uses them.
 *
 * The segment bases are used as well as read; the time stamp counter is read as a register and
 * by RDTSC, which must agree on the order; a register that does not exist raises #GP.
 * The exit code is the number of failed checks.
 *
 * Mode:      long
 * Prints:    "EFER ok\nFS_BASE ok\nGS_BASE ok\nKERNEL_GS_BASE ok\n"
 *            "fs: ok\ngs: ok\nTSC ok\nunknown ok\n"
 * Exit:      debug-exit 0
 */
        .include "common.inc"
        .equ    BITS, 64
        .equ    IA32_TIME_STAMP_COUNTER, 0x10
        .equ    IA32_EFER, 0xc0000080
        .equ    IA32_FS_BASE, 0xc0000100
        .equ    IA32_GS_BASE, 0xc0000101
        .equ    IA32_KERNEL_GS_BASE, 0xc0000102
        .equ    UNKNOWN, 0xdeadbeef
        .equ    EFER_SCE, 1 << 0
        .code64

# check "name": prints whether the last comparison found equality, and counts if not.
        .macro  check name
        mov     eax, 0
        setne   al
        add     [failures], eax
        lea     ebx, [rax * 8 + verdicts]
        print   "\name"
        mov     esi, ebx
        call    puts
        .endm

# round_trip register: writes RBX and compares what it reads back.
        .macro  round_trip register
        mov     ecx, \register
        mov     rax, rbx
        mov     rdx, rbx
        shr     rdx, 32
        wrmsr
        call    read_msr
        cmp     rax, rbx
        .endm

start:  lidt    [idtr]

        mov     ecx, IA32_EFER
        call    read_msr
        mov     rbx, rax
        xor     rbx, EFER_SCE
        round_trip IA32_EFER
        check   "EFER"

        mov     rbx, 0x00007edcba987654
        round_trip IA32_FS_BASE
        check   "FS_BASE"
        mov     rbx, 0xffff8edcba987654
        round_trip IA32_GS_BASE
        check   "GS_BASE"
        round_trip IA32_KERNEL_GS_BASE
        check   "KERNEL_GS_BASE"

        mov     ebx, offset left
        round_trip IA32_FS_BASE
        mov     eax, fs:[0]
        cmp     eax, [left]
        check   "fs:"
        mov     ebx, offset right
        round_trip IA32_GS_BASE
        mov     eax, gs:[0]
        cmp     eax, [right]
        check   "gs:"

        mov     ecx, IA32_TIME_STAMP_COUNTER
        call    read_msr
        mov     rbx, rax
        rdtsc
        shl     rdx, 32
        or      rax, rdx
        cmp     rax, rbx
        setb    dil
        mov     rbx, rax
        call    read_msr
        cmp     rax, rbx
        setb    al
        or      al, dil                         # either one went backwards
        check   "TSC"

        mov     ecx, UNKNOWN
        rdmsr
        cmp     byte ptr [faults], 1
        check   "unknown"

        xor     edx, edx                        # it still holds half a time stamp
        exit    [failures]

# read_msr: reads the register ECX into RAX. Clobbers RDX.
read_msr:
        rdmsr
        shl     rdx, 32
        or      rax, rdx
        ret

# #GP: counts it, and returns behind the RDMSR, which is two bytes long.
on_general_protection:
        inc     byte ptr [faults]
        add     rsp, 8                          # error code
        add     qword ptr [rsp], 2
        iretq

left:   .long   0x1eaf1eaf
right:  .long   0x719e719e
failures:
        .long   0
faults: .byte   0
verdicts:
        .asciz  " ok\n"                         # 8 bytes each
        .skip   3
        .asciz  " FAIL\n"

        .balign 16
idt:    .skip   13 * 16
        gate    on_general_protection
idtr:   .word   idtr - idt - 1                  # limit
        .quad   idt                             # base

        .include "console.inc"
