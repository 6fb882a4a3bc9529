#!/bin/sh
# Builds stranger.elf with the host's gcc and nothing else (no 32-bit C library needed).
#
# Try it under QEMU; the exit status is 33:
#   qemu-system-i386 -kernel stranger.elf -append "one two" -initrd build.sh \
#       -device isa-debug-exit,iobase=0xf4,iosize=0x04 -serial stdio -display none
set -eu
cd "$(dirname "$0")"
gcc -m32 -march=i686 -mgeneral-regs-only -O2 -std=c11 -Wall -Wextra \
    -ffreestanding -fno-pie -fno-stack-protector -fno-asynchronous-unwind-tables -fcf-protection=none \
    -nostdlib -static -no-pie -Wl,--build-id=none -Wl,-z,max-page-size=4096 -Wl,-T,kernel.ld \
    boot.S kernel.c -o "${1:-stranger.elf}"
strip "${1:-stranger.elf}"
