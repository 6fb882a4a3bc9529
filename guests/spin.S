/*
 * spin: never ends, with interrupts off.
 *
 * Nothing inside the machine can stop it: what a host's timeout or kick has to deal with.
 *
 * Mode:      real
 * Prints:    ""
 * Exit:      timeout
 */
        .include "common.inc"
        .code16

start:  cli
        jmp     .
