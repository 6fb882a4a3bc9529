/* Multiboot 1 header and entry point (Multiboot Specification 0.6.96, 3.1 and 3.2). AT&T syntax. */

#define MULTIBOOT_MAGIC   0x1badb002
#define MULTIBOOT_ALIGN   (1 << 0)      /* modules on page boundaries */
#define MULTIBOOT_MEMORY  (1 << 1)      /* we want the memory map */
#define MULTIBOOT_FLAGS   (MULTIBOOT_ALIGN | MULTIBOOT_MEMORY)

        .section .multiboot, "a"
        .align 4
        .long MULTIBOOT_MAGIC
        .long MULTIBOOT_FLAGS
        .long -(MULTIBOOT_MAGIC + MULTIBOOT_FLAGS)

        .section .bss
        .align 16
stack:  .skip 16384
stack_top:

        .section .text
        .globl _start
_start: cli
        movl $stack_top, %esp
        pushl $0
        popf
        pushl %ebx                      /* physical address of the Multiboot information */
        pushl %eax                      /* magic number of the loader */
        call kernel_main
1:      cli
        hlt
        jmp 1b

/* void load_tables(const struct pseudo_descriptor *gdt, const struct pseudo_descriptor *idt) */
        .globl load_tables
load_tables:
        movl 4(%esp), %eax
        lgdt (%eax)
        movl 8(%esp), %eax
        lidt (%eax)
        movw $0x10, %ax
        movw %ax, %ds
        movw %ax, %es
        movw %ax, %fs
        movw %ax, %gs
        movw %ax, %ss
        ljmp $0x08, $1f
1:      ret

        .section .note.GNU-stack, "", @progbits
