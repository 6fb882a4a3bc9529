/*
 * A small kernel for any Multiboot loader. It knows two devices of the machine besides the PC's
 * interrupt controllers and timer: a serial port at COM1, and QEMU's isa-debug-exit at 0xf4.
 *
 * It reports what the loader told it (command line, memory map, modules), takes a few timer
 * interrupts (or polls the timer, if the command line has "noirq"), and exits with the value 0x10 if all is well and 0x11 if not. The debug-exit
 * device turns a value v into the process status (v << 1) | 1: 33 and 35.
 */
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { EXIT_PORT = 0xf4, EXIT_OK = 0x10, EXIT_FAILED = 0x11 };

static inline void outb(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline void outl(uint16_t port, uint32_t value)
{
    __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}

static inline uint8_t inb(uint16_t port)
{
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static void __attribute__((noreturn)) leave(uint32_t value)
{
    outl(EXIT_PORT, value);
    for (;;)
        __asm__ volatile("cli; hlt");
}

/* ---- Serial port (16550) ---- */

enum {
    COM1 = 0x3f8,
    SERIAL_DATA = 0, /* divisor, low byte, while DLAB is set */
    SERIAL_IER = 1,  /* divisor, high byte, while DLAB is set */
    SERIAL_FCR = 2,
    SERIAL_LCR = 3,
    SERIAL_MCR = 4,
    SERIAL_LSR = 5,
    LCR_8N1 = 0x03,
    LCR_DLAB = 0x80,
    MCR_LOOPBACK = 0x1e,
    MCR_NORMAL = 0x0f,
    LSR_DATA_READY = 0x01,
    LSR_THR_EMPTY = 0x20,
};

static void put_char(char c)
{
    while (!(inb(COM1 + SERIAL_LSR) & LSR_THR_EMPTY))
        ;
    outb(COM1 + SERIAL_DATA, (uint8_t)c);
}

/* Sets up 38400 8N1 with FIFOs, and sees whether a byte comes back through the loop. */
static bool serial_init(void)
{
    outb(COM1 + SERIAL_IER, 0);
    outb(COM1 + SERIAL_LCR, LCR_DLAB);
    outb(COM1 + SERIAL_DATA, 3);
    outb(COM1 + SERIAL_IER, 0);
    outb(COM1 + SERIAL_LCR, LCR_8N1);
    outb(COM1 + SERIAL_FCR, 0xc7);
    outb(COM1 + SERIAL_MCR, MCR_LOOPBACK);
    outb(COM1 + SERIAL_DATA, 0xae);
    while (!(inb(COM1 + SERIAL_LSR) & LSR_DATA_READY))
        ;
    bool works = inb(COM1 + SERIAL_DATA) == 0xae;
    outb(COM1 + SERIAL_MCR, MCR_NORMAL);
    return works;
}

static void put_string(const char *s)
{
    while (*s)
        put_char(*s++);
}

static void put_unsigned(uint32_t value, uint32_t base, int width)
{
    char digits[16];
    int count = 0;
    do {
        digits[count++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value || count < width);
    while (count)
        put_char(digits[--count]);
}

/* Understands %s, %u, %x (8 digits), %X (64 bits, 16 digits) and %%. */
static void print(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    for (; *format; format++) {
        if (*format != '%') {
            put_char(*format);
            continue;
        }
        switch (*++format) {
        case 's':
            put_string(va_arg(arguments, const char *));
            break;
        case 'u':
            put_unsigned(va_arg(arguments, uint32_t), 10, 1);
            break;
        case 'x':
            put_unsigned(va_arg(arguments, uint32_t), 16, 8);
            break;
        case 'X': {
            uint64_t value = va_arg(arguments, uint64_t);
            put_unsigned((uint32_t)(value >> 32), 16, 8);
            put_unsigned((uint32_t)value, 16, 8);
            break;
        }
        default:
            put_char(*format);
        }
    }
    va_end(arguments);
}

/* ---- Segments and interrupts ---- */

struct __attribute__((packed)) pseudo_descriptor {
    uint16_t limit;
    uint32_t base;
};

struct __attribute__((packed)) gate {
    uint16_t offset_low, selector;
    uint8_t zero, type;
    uint16_t offset_high;
};

struct interrupt_frame;

extern void load_tables(const struct pseudo_descriptor *gdt, const struct pseudo_descriptor *idt);

enum { KERNEL_CODE = 0x08, INTERRUPT_GATE = 0x8e, EXCEPTIONS = 32, IRQ_BASE = 0x20, IRQ_TIMER = 0 };

static const uint64_t gdt[] = {0, 0x00cf9a000000ffff, 0x00cf92000000ffff};
static struct gate idt[48];
static volatile uint32_t ticks;

static void set_gate(int vector, void (*handler)(struct interrupt_frame *))
{
    uint32_t offset = (uint32_t)handler;
    idt[vector] = (struct gate){
        .offset_low = (uint16_t)offset,
        .selector = KERNEL_CODE,
        .type = INTERRUPT_GATE,
        .offset_high = (uint16_t)(offset >> 16),
    };
}

/* Never returns, so it does not matter that some exceptions push an error code. */
static void __attribute__((interrupt)) on_exception(struct interrupt_frame *frame)
{
    (void)frame;
    print("unexpected exception\n");
    leave(EXIT_FAILED);
}

static void __attribute__((interrupt)) on_timer(struct interrupt_frame *frame)
{
    (void)frame;
    ticks++;
    outb(0x20, 0x20);
}

static void tables_init(void)
{
    const struct pseudo_descriptor gdtr = {sizeof gdt - 1, (uint32_t)gdt};
    const struct pseudo_descriptor idtr = {sizeof idt - 1, (uint32_t)idt};
    for (int vector = 0; vector < EXCEPTIONS; vector++)
        set_gate(vector, on_exception);
    set_gate(IRQ_BASE + IRQ_TIMER, on_timer);
    load_tables(&gdtr, &idtr);
}

/* Some old boards need a moment between two commands to an 8259A. */
static void io_wait(void)
{
    outb(0x80, 0);
}

static void pic_command(uint16_t port, uint8_t value)
{
    outb(port, value);
    io_wait();
}

static void pic_init(void)
{
    pic_command(0x20, 0x11);
    pic_command(0xa0, 0x11);
    pic_command(0x21, IRQ_BASE);
    pic_command(0xa1, IRQ_BASE + 8);
    pic_command(0x21, 1 << 2);
    pic_command(0xa1, 2);
    pic_command(0x21, 0x01);
    pic_command(0xa1, 0x01);
    outb(0x21, (uint8_t)~(1 << IRQ_TIMER));
    outb(0xa1, 0xff);
}

static void pit_init(uint32_t hertz)
{
    uint32_t divisor = 1193182 / hertz;
    outb(0x43, 0x34); /* channel 0, both bytes, rate generator */
    outb(0x40, (uint8_t)divisor);
    outb(0x40, (uint8_t)(divisor >> 8));
}

static void wait_for_ticks(uint32_t count)
{
    for (;;) {
        __asm__ volatile("cli");
        if (ticks >= count)
            return;
        __asm__ volatile("sti; hlt");
    }
}

static uint32_t pit_count(void)
{
    outb(0x43, 0); /* latch channel 0 */
    uint32_t low = inb(0x40);
    return low | (uint32_t)inb(0x40) << 8;
}

/* The counter counts down: it is higher than before only after it was reloaded. */
static void poll_for_ticks(uint32_t count)
{
    for (uint32_t before = pit_count(), now; ticks < count; before = now) {
        now = pit_count();
        if (now > before)
            ticks++;
    }
}

/* ---- What the loader tells (Multiboot Specification 3.3) ---- */

enum {
    BOOTLOADER_MAGIC = 0x2badb002,
    INFO_MEMORY = 1 << 0,
    INFO_CMDLINE = 1 << 2,
    INFO_MODULES = 1 << 3,
    INFO_MEMORY_MAP = 1 << 6,
    INFO_LOADER_NAME = 1 << 9,
};

struct multiboot_info {
    uint32_t flags;
    uint32_t mem_lower, mem_upper; /* KiB */
    uint32_t boot_device;
    uint32_t cmdline;
    uint32_t mods_count, mods_addr;
    uint32_t syms[4];
    uint32_t mmap_length, mmap_addr;
    uint32_t drives_length, drives_addr;
    uint32_t config_table;
    uint32_t boot_loader_name;
};

struct __attribute__((packed)) memory_range {
    uint32_t size; /* of what follows this field */
    uint64_t base, length;
    uint32_t type;
};

struct module {
    uint32_t start, end, string, reserved;
};

static const char *memory_type(uint32_t type)
{
    static const char *const names[] = {"?", "available", "reserved", "ACPI", "ACPI NVS", "bad"};
    return names[type < 6 ? type : 0];
}

static void report_memory(const struct multiboot_info *info)
{
    if (info->flags & INFO_MEMORY)
        print("memory: %u KiB low, %u KiB high\n", info->mem_lower, info->mem_upper);
    if (!(info->flags & INFO_MEMORY_MAP))
        return;
    uint32_t end = info->mmap_addr + info->mmap_length;
    for (uint32_t at = info->mmap_addr; at < end;) {
        const struct memory_range *range = (const void *)at;
        print("  %X + %X %s\n", range->base, range->length, memory_type(range->type));
        at += range->size + sizeof range->size;
    }
}

static uint32_t byte_sum(const struct module *module)
{
    uint32_t sum = 0;
    for (const uint8_t *p = (const uint8_t *)module->start; p < (const uint8_t *)module->end; p++)
        sum += *p;
    return sum;
}

static void report_modules(const struct multiboot_info *info)
{
    uint32_t count = info->flags & INFO_MODULES ? info->mods_count : 0;
    const struct module *module = (const void *)info->mods_addr;
    print("modules: %u\n", count);
    for (; count--; module++)
        print("  '%s' %u bytes%s, sum %u\n", (const char *)module->string, module->end - module->start,
              module->start % 4096 ? " misaligned" : "", byte_sum(module));
}

static bool starts_with(const char *text, const char *start)
{
    while (*start && *text == *start)
        text++, start++;
    return !*start;
}

static bool contains(const char *line, const char *text)
{
    for (; *line; line++)
        if (starts_with(line, text))
            return true;
    return false;
}

void kernel_main(uint32_t magic, const struct multiboot_info *info)
{
    if (!serial_init())
        leave(EXIT_FAILED);
    print("stranger: a kernel from elsewhere\n");
    if (magic != BOOTLOADER_MAGIC) {
        print("not started by a Multiboot loader: %x\n", magic);
        leave(EXIT_FAILED);
    }
    if (info->flags & INFO_LOADER_NAME)
        print("loader: %s\n", (const char *)info->boot_loader_name);
    const char *cmdline = info->flags & INFO_CMDLINE ? (const char *)info->cmdline : "";
    print("command line: %s\n", cmdline);
    report_memory(info);
    report_modules(info);

    tables_init();
    pic_init();
    pit_init(100);
    bool polled = contains(cmdline, "noirq");
    if (polled)
        poll_for_ticks(5);
    else
        wait_for_ticks(5);
    print("timer: %u ticks%s\n", ticks, polled ? ", polled" : "");
    leave(EXIT_OK);
}
